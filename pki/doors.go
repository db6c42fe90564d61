package pki

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/smallstep/certificates/authority"
	"github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/smallstep/certificates/db"
	"golang.org/x/crypto/ocsp"

	"sallyport/internal/doors"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

const (
	fileDoors    = "doors.pem" // the intermediate, what is above it, and its root
	fileDoorsKey = "doors.key"
	fileDoorsCSR = "doors.csr" // for a root whose key is not here
)

// Doors issues certificates for other programs, from an intermediate that the
// channels do not trust. It is safe for concurrent use.
type Doors struct {
	a       *Authority
	chain   []*x509.Certificate // the intermediate first, the root last
	key     crypto.Signer
	ca      *authority.Authority
	revoked *revocations
	urls    string
}

// Doors opens the intermediate for other programs, or makes it when it is
// wanted for the first time. baseURL, if it is not empty, is where leaves say
// that their CRL and OCSP responder are.
func (a *Authority) Doors(ctx context.Context, baseURL string) (*Doors, error) {
	d := &Doors{a: a, urls: strings.TrimSuffix(baseURL, "/")}
	if err := d.open(ctx); err != nil {
		return nil, fmt.Errorf("doors in %s: %w", a.dir, err)
	}
	return d, nil
}

func (d *Doors) open(ctx context.Context) error {
	made, err := d.loadOrMake()
	if err != nil {
		return err
	}
	inter, root := d.chain[0], d.chain[len(d.chain)-1]
	switch {
	case made:
		d.a.log.InfoContext(ctx, "made the intermediate for other programs", "fingerprint", wire.KeyOf(inter).Fingerprint(), "root", wire.KeyOf(root).Fingerprint())
	case !root.Equal(d.a.mat().root):
		d.a.log.WarnContext(ctx, "the intermediate for other programs is not under the root of this authority; remove doors.pem and doors.key to have a new one, and give its clients the new root", "root", wire.KeyOf(root).Fingerprint())
	}
	if left := time.Until(inter.NotAfter); left < 365*24*time.Hour {
		d.a.log.WarnContext(ctx, "the intermediate for other programs ends soon", "not_after", inter.NotAfter)
	}
	noDB, err := db.New(nil) // what was issued stands in the gateway's database
	if err != nil {
		return err
	}
	d.revoked = &revocations{AuthDB: noDB}
	d.ca, err = authority.NewEmbedded(
		authority.WithConfig(&config.Config{
			SkipValidation: true,
			CommonName:     "Sallyport doors",
			AuthorityConfig: &config.AuthConfig{
				DisableIssuedAtCheck: true,
				Backdate:             &provisioner.Duration{Duration: identity.Backdate},
			},
		}),
		authority.WithDatabase(d.revoked),
		authority.WithQuietInit(),
		authority.WithX509RootCerts(root),
		authority.WithX509SignerChain(d.chain[:len(d.chain)-1], d.key),
		authority.WithX509Enforcers(provisioner.CertificateEnforcerFunc(d.enforce)),
	)
	return err
}

// loadOrMake reads the intermediate. One that is missing is made if the root's
// key is here; else a request is written that the root's owner can sign.
func (d *Doors) loadOrMake() (made bool, err error) {
	dir := d.a.dir
	b, err := os.ReadFile(filepath.Join(dir, fileDoors))
	switch {
	case err == nil:
		return false, d.load(b)
	case !errors.Is(err, fs.ErrNotExist):
		return false, err
	}
	if d.key, err = d.a.keys.load(fileDoorsKey); errors.Is(err, fs.ErrNotExist) {
		d.key, err = d.a.keys.make(fileDoorsKey)
	}
	if err != nil {
		return false, err
	}
	rootKey, err := d.a.keys.load(numbered(fileRootKey, d.a.mat().issuing().Root))
	if errors.Is(err, fs.ErrNotExist) {
		return false, d.request()
	}
	if err != nil {
		return false, err
	}
	root := d.a.mat().root
	inter, err := sign(doorsIntermediate(time.Now(), d.a.mat().trustDomain), root, d.key.Public(), rootKey)
	if err != nil {
		return false, err
	}
	d.chain = []*x509.Certificate{inter, root}
	return true, writeFile(dir, fileDoors, pemChain(d.chain), 0o600)
}

// doorsIntermediate is the template of the intermediate for other programs. It
// is no SPIFFE authority: it has no URI, and the constraints forbid whatever it
// signs a name inside the trust domain (RFC 5280, 4.2.1.10). Its leaves are
// for TLS only.
func doorsIntermediate(now time.Time, trustDomain string) *x509.Certificate {
	tmpl := issuer(now, interLife)
	tmpl.Subject = pkix.Name{CommonName: "Sallyport doors intermediate", Organization: []string{trustDomain}}
	tmpl.MaxPathLenZero = true
	tmpl.KeyUsage |= x509.KeyUsageDigitalSignature // it signs OCSP responses itself
	tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	tmpl.PermittedDNSDomainsCritical = true
	tmpl.ExcludedDNSDomains = []string{trustDomain}
	tmpl.ExcludedURIDomains = []string{trustDomain, "." + trustDomain}
	return tmpl
}

// request writes a CSR for an intermediate that is signed elsewhere.
func (d *Doors) request() error {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "Sallyport doors intermediate", Organization: []string{d.a.mat().trustDomain}},
	}, d.key)
	if err != nil {
		return err
	}
	if err := writeFile(d.a.dir, fileDoorsCSR, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), 0o600); err != nil {
		return err
	}
	return fmt.Errorf("%s is not here, which signs the intermediate for other programs: have %s signed as a CA (path length 0, excluding the names of %s and below), and put its certificate, what is above it and the root into %s",
		fileRootKey, fileDoorsCSR, d.a.mat().trustDomain, fileDoors)
}

// load takes the chain in doors.pem.
func (d *Doors) load(b []byte) (err error) {
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil || block.Type != "CERTIFICATE" {
			return damaged(fileDoors, "holds something that is no certificate")
		}
		d.chain = append(d.chain, c)
	}
	if len(d.chain) > 0 && d.chain[len(d.chain)-1].CheckSignatureFrom(d.chain[len(d.chain)-1]) != nil {
		d.chain = append(d.chain, d.a.mat().root)
	}
	if len(d.chain) < 2 {
		return damaged(fileDoors, "does not hold the intermediate")
	}
	for i, c := range d.chain[:len(d.chain)-1] {
		if err := c.CheckSignatureFrom(d.chain[i+1]); err != nil {
			return damaged(fileDoors, fmt.Sprintf("is no chain: %q was not issued by %q", c.Subject.CommonName, d.chain[i+1].Subject.CommonName))
		}
	}
	inter := d.chain[0]
	if len(inter.URIs) > 0 {
		return fmt.Errorf("%s holds a SPIFFE intermediate, which must not certify other programs", fileDoors)
	}
	if err := d.outside(inter); err != nil {
		return err
	}
	if now := time.Now(); now.After(inter.NotAfter) {
		return fmt.Errorf("the intermediate for other programs expired on %s (is the clock of this host right?); remove %s and %s to have a new one", inter.NotAfter.UTC().Format(time.RFC3339), fileDoors, fileDoorsKey)
	}
	if d.key, err = d.a.keys.load(fileDoorsKey); err != nil {
		return err
	}
	if pub, ok := inter.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(d.key.Public()) {
		return damaged(fileDoorsKey, "does not belong to "+fileDoors)
	}
	return nil
}

// outside insists on the constraint that keeps names of parties out, also of
// an intermediate that was signed elsewhere.
func (d *Doors) outside(inter *x509.Certificate) error {
	for _, name := range inter.ExcludedDNSDomains {
		if strings.TrimPrefix(name, ".") == d.a.mat().trustDomain && inter.IsCA {
			return nil
		}
	}
	return fmt.Errorf("%s: the intermediate must be a CA whose name constraints exclude the DNS names of %s", fileDoors, d.a.mat().trustDomain)
}

func pemChain(chain []*x509.Certificate) (out []byte) {
	for _, c := range chain {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

// Chain is the intermediate, what is above it, and the root.
func (d *Doors) Chain() []*x509.Certificate { return d.chain }

// Issuers are the intermediates whose leaves' status is signed here: the SPIFFE
// ones too, of which there are two during a rollover.
func (d *Doors) Issuers() (all []*x509.Certificate) {
	for _, i := range d.a.mat().inters {
		if i.Retired.IsZero() {
			all = append(all, i.certs[0])
		}
	}
	return append(all, d.chain[0])
}

// Issue makes a leaf with exactly the names of the request, and returns it
// with the chain up to, and without, the root.
func (d *Doors) Issue(ctx context.Context, r doors.Request) ([]*x509.Certificate, error) {
	if len(r.CSR) > doors.MaxCSR || len(r.Names)+len(r.Addresses) > doors.MaxNames {
		return nil, fmt.Errorf("%w: the request is too large", doors.ErrRefused)
	}
	csr, err := x509.ParseCertificateRequest(r.CSR)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", doors.ErrRefused, err)
	}
	named := provisioner.CertificateEnforcerFunc(func(cert *x509.Certificate) error {
		*cert = x509.Certificate{PublicKey: csr.PublicKey, PublicKeyAlgorithm: csr.PublicKeyAlgorithm, DNSNames: r.Names}
		for _, a := range r.Addresses {
			cert.IPAddresses = append(cert.IPAddresses, net.IP(a.Unmap().AsSlice()))
		}
		return nil
	})
	chain, err := d.ca.SignWithContext(ctx, csr, provisioner.SignOptions{}, named)
	if err != nil {
		return nil, fmt.Errorf("sign certificate of %v: %w", r.Names, err)
	}
	return chain, nil
}

// enforce is the last word on every leaf, whichever door it leaves by: it
// replaces the template whole and keeps of it the key, the names, and an end
// that comes sooner.
func (d *Doors) enforce(cert *x509.Certificate) error {
	if err := checkDoorKey(cert.PublicKey); err != nil {
		return fmt.Errorf("%w: %w", doors.ErrRefused, err)
	}
	if len(cert.DNSNames)+len(cert.IPAddresses) == 0 || len(cert.URIs)+len(cert.EmailAddresses) > 0 {
		return fmt.Errorf("%w: it must have host names or addresses, and no others", doors.ErrRefused)
	}
	for _, name := range cert.DNSNames {
		if !doors.ValidHost(name) {
			return fmt.Errorf("%w: %q is not a host name", doors.ErrRefused, wire.Quotable(name))
		}
		if td := d.a.mat().trustDomain; name == td || strings.HasSuffix(name, "."+td) {
			return fmt.Errorf("%w: %q is a name of the trust domain", doors.ErrRefused, name)
		}
	}
	now := time.Now()
	end := now.Add(doors.Life)
	if !cert.NotAfter.IsZero() && cert.NotAfter.After(now) && cert.NotAfter.Before(end) {
		end = cert.NotAfter
	}
	if end.After(d.chain[0].NotAfter) {
		end = d.chain[0].NotAfter
	}
	leaf := x509.Certificate{
		PublicKey: cert.PublicKey, PublicKeyAlgorithm: cert.PublicKeyAlgorithm,
		DNSNames: cert.DNSNames, IPAddresses: cert.IPAddresses,
		NotBefore: now.Add(-identity.Backdate), NotAfter: end,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	if _, ok := cert.PublicKey.(*rsa.PublicKey); ok {
		leaf.KeyUsage |= x509.KeyUsageKeyEncipherment
	}
	const maxCommonName = 64 // ub-common-name, RFC 5280, appendix A
	if len(leaf.DNSNames) > 0 && len(leaf.DNSNames[0]) <= maxCommonName {
		leaf.Subject.CommonName = leaf.DNSNames[0]
	} else if len(leaf.DNSNames) == 0 {
		leaf.Subject.CommonName = leaf.IPAddresses[0].String()
	}
	if d.urls != "" {
		leaf.CRLDistributionPoints = []string{d.urls + "/crl/" + doors.IssuerName(d.chain[0]) + ".crl"}
		leaf.OCSPServer = []string{d.urls + "/ocsp"}
	}
	*cert = leaf
	return nil
}

// checkDoorKey takes the keys that other programs have.
func checkDoorKey(pub any) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if bits := k.Params().BitSize; bits < 256 {
			return fmt.Errorf("an ECDSA key of %d bits; want P-256, P-384 or P-521", bits)
		}
	case ed25519.PublicKey:
	case *rsa.PublicKey:
		if bits := k.N.BitLen(); bits < 2048 || bits > 4096 {
			return fmt.Errorf("an RSA key of %d bits; want 2048 to 4096", bits)
		}
	default:
		return fmt.Errorf("a key of type %T; want ECDSA, Ed25519 or RSA", pub)
	}
	return nil
}

// signer finds the key of one of [Doors.Issuers].
func (d *Doors) signer(issuer wire.KeyHash) (*x509.Certificate, crypto.Signer, error) {
	if issuer == wire.KeyOf(d.chain[0]) {
		return d.chain[0], d.key, nil
	}
	m := d.a.mat()
	for _, i := range m.inters {
		switch {
		case wire.KeyOf(i.certs[0]) != issuer || !i.Retired.IsZero():
		case i.N == m.ledger.Issuing:
			return m.inter, m.interKey, nil
		default:
			key, err := d.a.keys.keyOf(fileInterKey, i.N)
			return i.certs[0], key, err
		}
	}
	return nil, nil, fmt.Errorf("no issuer with the key %s is here", issuer.Fingerprint())
}

// SignCRL signs a list of revoked leaves of one issuer.
func (d *Doors) SignCRL(_ context.Context, issuer wire.KeyHash, crl doors.CRL) ([]byte, error) {
	cert, key, err := d.signer(issuer)
	if err != nil {
		return nil, fmt.Errorf("sign CRL: %w", err)
	}
	tmpl := &x509.RevocationList{Number: crl.Number, ThisUpdate: crl.This, NextUpdate: crl.Next}
	for _, r := range crl.Revoked {
		tmpl.RevokedCertificateEntries = append(tmpl.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: r.Serial, RevocationTime: r.At, ReasonCode: r.Reason})
	}
	der, err := x509.CreateRevocationList(rand.Reader, tmpl, cert, key)
	if err != nil {
		return nil, fmt.Errorf("sign CRL of %s: %w", cert.Subject.CommonName, err)
	}
	return der, nil
}

// SignOCSP signs what is known of one leaf, as its issuer.
func (d *Doors) SignOCSP(_ context.Context, issuer wire.KeyHash, s doors.Status) ([]byte, error) {
	cert, key, err := d.signer(issuer)
	if err != nil {
		return nil, fmt.Errorf("sign OCSP response: %w", err)
	}
	tmpl := ocsp.Response{Status: ocsp.Good, SerialNumber: s.Serial, ThisUpdate: s.This, NextUpdate: s.Next, IssuerHash: s.Hash}
	if s.Revoked != nil {
		tmpl.Status, tmpl.RevokedAt, tmpl.RevocationReason = ocsp.Revoked, s.Revoked.At, s.Revoked.Reason
	}
	der, err := ocsp.CreateResponse(cert, cert, tmpl, key)
	if err != nil {
		return nil, fmt.Errorf("sign OCSP response of %s: %w", cert.Subject.CommonName, err)
	}
	return der, nil
}

var _ doors.Authority = (*Doors)(nil)
