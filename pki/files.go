package pki

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"sallyport/internal/atomicfile"
	"sallyport/internal/wire"
)

const (
	fileRoot        = "root.pem"
	fileRootKey     = "root.key"
	fileInter       = "intermediate.pem"
	fileInterKey    = "intermediate.key"
	fileTrustDomain = "trust-domain"
	fileRevocations = "revocations.json"
	fileRoom        = ".room000000000000" // for a moment; [atomicfile.Tidy] knows what is called so
)

// Lives of the certificates, counted from the moment of issue. The issuers
// are backdated further than the leaves below them.
const (
	rootLife       = 20 * 365 * 24 * time.Hour
	interLife      = 10 * 365 * 24 * time.Hour
	issuerBackdate = 96 * time.Hour
)

// ErrDamaged says that files of the authority are missing or do not fit
// together. Nothing is ever made anew in their place: that would be another CA.
var ErrDamaged = errors.New("certificate authority is damaged")

// material is what the files hold.
type material struct {
	trustDomain string
	ledger      *ledger
	roots       []rootCA
	inters      []spiffeCA

	// Of the intermediate that issues:
	root, inter *x509.Certificate
	certs       []*x509.Certificate // inter, and those of the same key from other roots
	interKey    crypto.Signer

	document *x509.Certificate // of an external CA: interKey is this leaf's, which seals documents
}

func damaged(file, cause string) error {
	repair := "restore the pki directory from a backup (without it every party has to enrol again)"
	if file == fileRevocations {
		repair = "delete it: it is signed again, from what the gateway's database says"
	}
	return fmt.Errorf("%w: %s %s; %s", ErrDamaged, file, cause, repair)
}

// loadOrMake reads the authority in dir, or makes one in an empty directory.
// The trust domain is written last: a directory in which nothing was ever
// issued, because a crash interrupted the making, is made anew.
func loadOrMake(dir string, keys keyring) (*material, bool, error) {
	have, err := Exists(dir)
	if err != nil {
		return nil, false, err
	}
	made := !have
	if made {
		if _, err := os.Stat(filepath.Join(dir, fileImport)); !errors.Is(err, fs.ErrNotExist) {
			return nil, false, fmt.Errorf("an intermediate was asked for with ca csr: import its certificate with `sallyport ca import`, or delete %s to have a CA made here (%w)", fileImport, errors.Join(ErrImport, err))
		}
		if err := create(dir, keys); err != nil {
			return nil, made, err
		}
	}
	m, err := load(dir, keys)
	return m, made, err
}

// Exists tells whether there is an authority in a directory, whole or damaged:
// where there is none, [Open] makes one.
func Exists(dir string) (bool, error) {
	for _, name := range []string{fileInter, fileTrustDomain, fileRevocations, fileIssuers} {
		if _, err := os.Stat(filepath.Join(dir, name)); !errors.Is(err, fs.ErrNotExist) {
			return err == nil, err
		}
	}
	return false, nil
}

func create(dir string, keys keyring) error {
	rootKey, err := keys.make(fileRootKey)
	if err != nil {
		return err
	}
	now := time.Now()
	root, err := signRoot(now, 1, rootKey)
	if err != nil {
		return err
	}
	td := wire.DefaultTrustDomain(root)
	if err := writePEM(dir, fileRoot, root); err != nil {
		return err
	}
	interKey, err := keys.make(fileInterKey)
	if err != nil {
		return err
	}
	inter, err := sign(spiffeIntermediate(now, td), root, interKey.Public(), rootKey)
	if err != nil {
		return err
	}
	if err := writePEM(dir, fileInter, inter); err != nil {
		return err
	}
	return writeFile(dir, fileTrustDomain, []byte(td+"\n"), 0o600)
}

// signRoot makes the certificate of the n-th root.
func signRoot(now time.Time, n int, key crypto.Signer) (*x509.Certificate, error) {
	tmpl := issuer(now, rootLife)
	tmpl.Subject.CommonName = "Sallyport root"
	if n > 1 {
		tmpl.Subject.CommonName += fmt.Sprintf(" %d", n)
	}
	tmpl.MaxPathLen = 1
	return sign(tmpl, tmpl, key.Public(), key)
}

func issuer(now time.Time, life time.Duration) *x509.Certificate {
	return &x509.Certificate{
		NotBefore:             now.Add(-issuerBackdate),
		NotAfter:              now.Add(life),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
}

// spiffeIntermediate is the template of the intermediates whose leaves may
// open channels: the URI is the trust domain (X509-SVID, section 3.1), and the
// constraints hold whatever it signs inside that domain (RFC 5280, 4.2.1.10).
func spiffeIntermediate(now time.Time, trustDomain string) *x509.Certificate {
	tmpl := issuer(now, interLife)
	tmpl.Subject = pkix.Name{CommonName: "Sallyport SPIFFE intermediate", Organization: []string{trustDomain}}
	tmpl.MaxPathLenZero = true
	tmpl.KeyUsage |= x509.KeyUsageDigitalSignature // it signs revocation sets itself
	tmpl.URIs = []*url.URL{{Scheme: "spiffe", Host: trustDomain}}
	tmpl.PermittedDNSDomainsCritical = true
	tmpl.PermittedDNSDomains = []string{trustDomain}
	tmpl.PermittedURIDomains = []string{trustDomain}
	return tmpl
}

func sign(tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	tmpl.SerialNumber = serial.Add(serial, big.NewInt(1))
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func load(dir string, keys keyring) (*material, error) {
	l, err := loadLedger(dir)
	if err != nil {
		return nil, err
	}
	return loadAs(dir, l, keys)
}

// loadAs reads what a ledger asks for, which may be one that is not written yet.
func loadAs(dir string, l *ledger, keys keyring) (*material, error) {
	m := material{ledger: l}
	if err := m.loadIssuers(dir, keys); err != nil {
		return nil, err
	}
	if len(m.inter.URIs) != 1 || m.inter.URIs[0].Scheme != "spiffe" {
		return nil, damaged(numbered(fileInter, m.ledger.Issuing), "is not a SPIFFE intermediate")
	}
	m.trustDomain = m.inter.URIs[0].Host
	b, err := os.ReadFile(filepath.Join(dir, fileTrustDomain))
	switch {
	case errors.Is(err, fs.ErrNotExist): // the certificate says it too
		return &m, writeFile(dir, fileTrustDomain, []byte(m.trustDomain+"\n"), 0o600)
	case err != nil:
		return nil, err
	case strings.TrimSpace(string(b)) != m.trustDomain:
		return nil, damaged(fileTrustDomain, fmt.Sprintf("says %q, %s says %q", strings.TrimSpace(string(b)), fileInter, m.trustDomain))
	}
	return &m, nil
}

func readCert(dir, name string) (*x509.Certificate, error) {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, damaged(name, "is missing")
	}
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, damaged(name, "is not a PEM file")
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, damaged(name, "holds no certificate: "+err.Error())
	}
	return c, nil
}

func writePEM(dir, name string, c *x509.Certificate) error {
	return writeFile(dir, name, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}), 0o600)
}

// writeFile replaces dir/name and has it on disk when it returns. It is the
// owner's of dir, also where root works there: a service that has a user of its
// own has to read it.
func writeFile(dir, name string, b []byte, mode fs.FileMode) error {
	if err := atomicfile.WriteForOwner(filepath.Join(dir, name), b, mode); err != nil {
		var written *fs.PathError
		var renamed *os.LinkError
		switch { // of a file beside it, which is gone
		case errors.As(err, &written):
			err = written.Err
		case errors.As(err, &renamed):
			err = renamed.Err
		}
		return fmt.Errorf("write %s: %w", filepath.Join(dir, name), err)
	}
	return nil
}

// readDocument reads a document that was sealed here, and when that was; nil
// where there is none.
func readDocument(dir, name string) (env *wire.Envelope, issued time.Time, err error) {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, issued, nil
	}
	if err != nil {
		return nil, issued, err
	}
	if err := json.Unmarshal(b, &env); err != nil {
		return nil, issued, damaged(name, err.Error())
	}
	var at struct{ Issued time.Time }
	if env == nil {
		return nil, issued, damaged(name, "is empty")
	}
	if err := json.Unmarshal(env.Payload, &at); err != nil {
		return nil, issued, damaged(name, err.Error())
	}
	return env, at.Issued, nil
}
