package pki

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sallyport/internal/identity"
)

// fileDoorsImportKey is the key of a request that waits for its certificate.
const fileDoorsImportKey = "doors-import.key"

// RequestDoors returns a PKCS #10 request (DER) for an intermediate for other
// programs that a root kept elsewhere is to sign. It makes the key, once: the
// same request can be had again.
func RequestDoors(dir string, opts ...Option) (csr []byte, td string, err error) {
	fail := func(err error) ([]byte, string, error) {
		return nil, "", fmt.Errorf("pki in %s: request an intermediate for other programs: %w", dir, err)
	}
	b, err := os.ReadFile(filepath.Join(dir, fileTrustDomain))
	if errors.Is(err, fs.ErrNotExist) {
		return fail(errors.New("there is no authority here yet, whose trust domain it has to exclude: start it once"))
	}
	if err != nil {
		return fail(err)
	}
	td = strings.TrimSpace(string(b))
	a := Authority{keys: keyring{dir: dir}}
	for _, o := range opts {
		o(&a)
	}
	defer a.keys.signer.close()
	key, err := a.keys.load(fileDoorsImportKey)
	if errors.Is(err, fs.ErrNotExist) {
		key, err = a.keys.make(fileDoorsImportKey)
	}
	if err != nil {
		return fail(err)
	}
	tmpl := doorsIntermediate(time.Now(), td, nil)
	model, err := sign(tmpl, tmpl, key.Public(), key) // its extensions are those to ask for
	if err != nil {
		return fail(err)
	}
	req := &x509.CertificateRequest{Subject: tmpl.Subject}
	for _, e := range model.Extensions {
		switch e.Id.String() {
		case "2.5.29.14", "2.5.29.15", "2.5.29.19", "2.5.29.30", "2.5.29.37": // key identifier, key usage, basic and name constraints, extended key usage
			req.ExtraExtensions = append(req.ExtraExtensions, e)
		}
	}
	if csr, err = x509.CreateCertificateRequest(rand.Reader, req, key); err != nil {
		return fail(err)
	}
	return csr, td, nil
}

// ImportDoors takes the certificate of the key of [RequestDoors], what is above
// it, and the root. It issues from the next start on, and stays until another
// is imported; what issued before it goes on to be good as long as its leaves.
// Nobody may have the directory open.
func ImportDoors(ctx context.Context, dir string, chain []*x509.Certificate, log *slog.Logger, opts ...Option) error {
	a, err := Open(ctx, dir, log, opts...)
	if err == nil {
		err = errors.Join(a.importDoors(ctx, chain), a.Close())
	}
	if err != nil {
		return fmt.Errorf("pki in %s: import: %w", dir, err)
	}
	return nil
}

func (a *Authority) importDoors(ctx context.Context, chain []*x509.Certificate) error {
	key, err := a.keys.load(fileDoorsImportKey)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: nothing was asked for here; begin with `sallyport ca csr --doors`", ErrImport)
	}
	if err != nil {
		return err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	if err := checkDoorsImport(chain, spki, a.TrustDomain()); err != nil {
		return fmt.Errorf("%w: %w", ErrImport, err)
	}
	k := &doorKeys{a: a}
	l, err := k.load()
	if err != nil {
		return err
	}
	n := l.next()
	if err := writeCerts(a.dir, numbered(fileDoors, n), chain); err != nil {
		return err
	}
	// A copy: until the ledger is written the import can be repeated.
	b, err := os.ReadFile(filepath.Join(a.dir, fileDoorsImportKey))
	if err != nil {
		return err
	}
	if err := writeFile(a.dir, numbered(fileDoorsKey, n), b, 0o600); err != nil {
		return err
	}
	if old := l.record(l.Issuing); old != nil {
		old.Until = time.Now().Add(doorsAfter).UTC()
	}
	l.Issuers = append(l.Issuers, doorRecord{N: n})
	l.Issuing = n
	if b, err = json.MarshalIndent(l, "", "  "); err != nil {
		return err
	}
	if err := writeFile(a.dir, fileDoorsLedger, append(b, '\n'), 0o600); err != nil {
		return err
	}
	if err := k.follow(ctx); err != nil { // it opens what the next start will
		return err
	}
	return os.Remove(filepath.Join(a.dir, fileDoorsImportKey))
}

// checkDoorsImport says what is wrong with a chain, before anything depends on it.
func checkDoorsImport(chain []*x509.Certificate, spki []byte, trustDomain string) error {
	if err := checkDoors(chain, trustDomain); err != nil {
		return err
	}
	inter, root := chain[0], chain[len(chain)-1]
	now := time.Now()
	const usages = x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature
	forTLS := len(inter.ExtKeyUsage) == 0 && len(inter.UnknownExtKeyUsage) == 0 || slices.Contains(inter.ExtKeyUsage, x509.ExtKeyUsageAny) || slices.Contains(inter.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	switch {
	case !bytes.Equal(inter.RawSubjectPublicKeyInfo, spki):
		return errors.New("the first certificate is not for the key of the request")
	case !root.IsCA || root.CheckSignatureFrom(root) != nil:
		return errors.New("the last certificate is no root: it did not sign itself as a CA")
	case identity.CheckRootKey(root.PublicKey) != nil:
		return fmt.Errorf("the root: %w", identity.CheckRootKey(root.PublicKey))
	case inter.KeyUsage&usages != usages:
		return errors.New("the intermediate may not sign certificates, CRLs and OCSP responses: sign the request's extensions too (openssl x509 -req -copy_extensions copyall)")
	case len(inter.SubjectKeyId) == 0:
		return errors.New("the intermediate has no subject key identifier, which a CA must have (RFC 5280, 4.2.1.2), and which its CRLs name")
	case !forTLS:
		return errors.New("the intermediate may not certify servers: its extended key usage must have serverAuth, or be missing")
	case now.Before(inter.NotBefore) || now.Before(root.NotBefore):
		return errors.New("it is not valid yet: look at the clocks of both hosts")
	case inter.NotAfter.Before(now.Add(leastLife)) || root.NotAfter.Before(now.Add(leastLife)):
		return fmt.Errorf("it ends within %d days", int(leastLife.Hours()/24))
	}
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	opts.Roots.AddCert(root)
	for _, c := range chain[1 : len(chain)-1] {
		opts.Intermediates.AddCert(c)
	}
	if _, err := inter.Verify(opts); err != nil {
		return fmt.Errorf("nobody would trust what it signs: %w", err)
	}
	return nil
}
