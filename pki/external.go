package pki

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/lockdir"
	"sallyport/internal/wire"
)

// An intermediate that another CA signs waits in these files for its
// certificate.
const (
	fileImportKey = "import.key"
	fileImport    = "import.json"
)

// importRecord says what was asked for.
type importRecord struct {
	TrustDomain string `json:"trust_domain"`
}

// ErrImport says that a chain is not what the authority can use.
var ErrImport = errors.New("this chain cannot be imported")

// RequestIntermediate returns a PKCS #10 request (DER) for a SPIFFE
// intermediate that a root kept elsewhere is to sign. It makes the key, once:
// the same request can be had again. In a directory without an authority, root
// is the one that will sign; the trust domain is made from it unless it is
// given. An existing authority keeps its trust domain.
func RequestIntermediate(dir string, root *x509.Certificate, trustDomain string, opts ...Option) (csr []byte, td string, err error) {
	fail := func(err error) ([]byte, string, error) {
		return nil, "", fmt.Errorf("pki in %s: request an intermediate: %w", dir, err)
	}
	if err := lockdir.Make(dir, 0o700); err != nil {
		return fail(err)
	}
	a := Authority{keys: keyring{dir: dir}}
	for _, o := range opts {
		o(&a)
	}
	defer a.keys.signer.close()
	td, err = domainOf(dir, root, trustDomain)
	if err != nil {
		return fail(err)
	}
	var rec importRecord
	switch err := get(filepath.Join(dir, fileImport), &rec); {
	case errors.Is(err, fs.ErrNotExist):
		rec.TrustDomain = td
	case err != nil:
		return fail(err)
	case rec.TrustDomain != td:
		return fail(fmt.Errorf("there is a request for %s already: import its certificate, or delete %s and %s", rec.TrustDomain, fileImport, fileImportKey))
	}
	key, err := a.keys.load(fileImportKey)
	if errors.Is(err, fs.ErrNotExist) {
		key, err = a.keys.make(fileImportKey)
	}
	if err != nil {
		return fail(err)
	}
	b, err := json.Marshal(rec)
	if err != nil {
		return fail(err)
	}
	if err := writeFile(dir, fileImport, b, 0o600); err != nil {
		return fail(err)
	}
	if csr, err = intermediateRequest(td, key); err != nil {
		return fail(err)
	}
	return csr, td, nil
}

// domainOf is the trust domain of the authority in dir, or of one to come.
func domainOf(dir string, root *x509.Certificate, trustDomain string) (string, error) {
	b, err := os.ReadFile(filepath.Join(dir, fileTrustDomain))
	held := strings.TrimSpace(string(b))
	switch {
	case err == nil && trustDomain != "" && trustDomain != held:
		return "", fmt.Errorf("the authority is that of %s; a trust domain never changes", held)
	case err == nil:
		return held, nil
	case !errors.Is(err, fs.ErrNotExist):
		return "", err
	case trustDomain != "":
		p := wire.Party{Role: wire.RoleGateway, ID: wire.NewID(), TrustDomain: trustDomain}
		if _, err := wire.ParsePartyURI(p.URI()); err != nil || trustDomain != strings.ToLower(trustDomain) || len(trustDomain) > 63 || !wire.ValidName(trustDomain) {
			return "", fmt.Errorf("%q is no trust domain: want a name in lower case, as in DNS, at most 63", wire.Quotable(trustDomain))
		}
		return trustDomain, nil
	case root == nil:
		return "", errors.New("there is no authority here yet: say which root will sign it (--root), or name its trust domain (--trust-domain)")
	}
	return wire.DefaultTrustDomain(root), nil
}

// intermediateRequest asks for everything that a SPIFFE intermediate needs.
func intermediateRequest(td string, key crypto.Signer) ([]byte, error) {
	tmpl := spiffeIntermediate(time.Now(), td)
	model, err := sign(tmpl, tmpl, key.Public(), key) // its extensions are those to ask for
	if err != nil {
		return nil, err
	}
	csr := &x509.CertificateRequest{Subject: tmpl.Subject, URIs: tmpl.URIs}
	for _, e := range model.Extensions {
		switch e.Id.String() {
		case "2.5.29.14", "2.5.29.15", "2.5.29.19", "2.5.29.30": // key identifier, key usage, basic constraints, name constraints
			csr.ExtraExtensions = append(csr.ExtraExtensions, e)
		}
	}
	return x509.CreateCertificateRequest(rand.Reader, csr, key)
}

// Import takes the certificate of the key of [RequestIntermediate], and the
// root that signed it. Without an authority in dir it makes one, that never had
// the root's key; to an existing one it is the next intermediate, and a
// rollover is under way. Nobody may have the directory open.
func Import(ctx context.Context, dir string, chain []*x509.Certificate, log *slog.Logger, opts ...Option) (wire.CAState, error) {
	state, err := importChain(ctx, dir, chain, log, opts)
	if err != nil {
		return state, fmt.Errorf("pki in %s: import: %w", dir, err)
	}
	return state, nil
}

func importChain(ctx context.Context, dir string, chain []*x509.Certificate, log *slog.Logger, opts []Option) (wire.CAState, error) {
	var rec importRecord
	if err := get(filepath.Join(dir, fileImport), &rec); errors.Is(err, fs.ErrNotExist) {
		return wire.CAState{}, fmt.Errorf("%w: nothing was asked for here; begin with `sallyport ca csr`", ErrImport)
	} else if err != nil {
		return wire.CAState{}, err
	}
	_, err := os.Stat(filepath.Join(dir, fileTrustDomain))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return wire.CAState{}, err
	}
	if fresh := err != nil; fresh {
		if err := establish(dir, rec.TrustDomain, chain, opts); err != nil {
			return wire.CAState{}, err
		}
		a, err := Open(ctx, dir, log, opts...)
		if err != nil {
			return wire.CAState{}, err
		}
		state := a.State()
		return state, errors.Join(a.Close(), os.Remove(filepath.Join(dir, fileImport)))
	}
	a, err := Open(ctx, dir, log, opts...)
	if err != nil {
		return wire.CAState{}, err
	}
	state, err := a.adopt(ctx, chain)
	if err == nil {
		err = errors.Join(os.Remove(filepath.Join(dir, fileImport)), os.Remove(filepath.Join(dir, fileImportKey)))
	}
	return state, errors.Join(err, a.Close())
}

// establish makes an authority of an imported intermediate. The key takes its
// name after the certificates have theirs: until then this can be repeated.
func establish(dir, td string, chain []*x509.Certificate, opts []Option) (err error) {
	lock, err := lockdir.Acquire(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Release()) }()
	a := Authority{keys: keyring{dir: dir}}
	for _, o := range opts {
		o(&a)
	}
	defer a.keys.signer.close()
	key, err := a.keys.load(fileImportKey)
	if errors.Is(err, fs.ErrNotExist) { // the last attempt came as far as the key's name
		key, err = a.keys.load(fileInterKey)
	}
	if err != nil {
		return err
	}
	if err := checkImport(chain, td, key); err != nil {
		return err
	}
	if err := writePEM(dir, fileRoot, chain[1]); err != nil {
		return err
	}
	if err := writePEM(dir, fileInter, chain[0]); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(dir, fileImportKey), filepath.Join(dir, fileInterKey)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return writeFile(dir, fileTrustDomain, []byte(td+"\n"), 0o600)
}

// adopt makes an imported intermediate the one that issues.
func (a *Authority) adopt(ctx context.Context, chain []*x509.Certificate) (wire.CAState, error) {
	key, err := a.keys.load(fileImportKey)
	if err != nil {
		return wire.CAState{}, err
	}
	if err := checkImport(chain, a.TrustDomain(), key); err != nil {
		return wire.CAState{}, err
	}
	return a.turn(func(m *material) (*ledger, error) {
		l := m.ledger.clone()
		if l.Rollover != nil {
			return nil, fmt.Errorf("%w: a rollover of the %s is under way since %s: finish or abort it first", ErrRollover, l.Rollover.Kind, l.Rollover.Since.Format(time.RFC3339))
		}
		old, n := m.issuing(), 1
		for _, r := range l.Intermediates {
			n = max(n, r.N+1)
		}
		root, err := a.rootNumber(m, l, chain[1])
		if err != nil {
			return nil, err
		}
		kind := wire.RolloverIntermediate
		if root != old.Root {
			kind = wire.RolloverRoot
		}
		certs, err := a.vouchFor(l, root, chain[0], key, m.trustDomain)
		if err != nil {
			return nil, err
		}
		if err := writeCerts(a.dir, numbered(fileInter, n), certs); err != nil {
			return nil, err
		}
		// A copy: until the ledger is written the import can be repeated.
		b, err := os.ReadFile(filepath.Join(a.dir, fileImportKey))
		if err != nil {
			return nil, err
		}
		if err := writeFile(a.dir, numbered(fileInterKey, n), b, 0o600); err != nil {
			return nil, err
		}
		l.Rollover = &rollover{Kind: kind, From: old.N, To: n, Since: time.Now().UTC()}
		l.Intermediates = append(l.Intermediates, interRecord{N: n, Root: root})
		l.Issuing = n
		return l, nil
	}, 0, func(s wire.CAState) {
		a.log.InfoContext(ctx, "certificate authority: an imported intermediate issues", "intermediate", s.Issuing().Key.Fingerprint(), "root", wire.KeyOf(a.Root()).Fingerprint())
	})
}

// rootNumber is the number of a root, which is added if it is a new one.
func (a *Authority) rootNumber(m *material, l *ledger, root *x509.Certificate) (int, error) {
	n := 1
	for _, r := range l.Roots {
		if have := m.rootCA(r.N); have != nil && wire.KeyOf(have.cert) == wire.KeyOf(root) {
			if !have.cert.Equal(root) {
				return 0, fmt.Errorf("%w: its root has the key of %s, but is another certificate", ErrImport, numbered(fileRoot, r.N))
			}
			if !r.Retired.IsZero() {
				return 0, fmt.Errorf("%w: its root was retired at %s", ErrImport, r.Retired.Format(time.RFC3339))
			}
			return r.N, nil
		}
		n = max(n, r.N+1)
	}
	if err := writePEM(a.dir, numbered(fileRoot, n), root); err != nil {
		return 0, err
	}
	l.Roots = append(l.Roots, rootRecord{N: n})
	return n, nil
}

// vouchFor has the roots whose keys are here vouch for an imported
// intermediate: parties that do not know its root yet verify it by theirs.
func (a *Authority) vouchFor(l *ledger, root int, inter *x509.Certificate, key crypto.Signer, td string) ([]*x509.Certificate, error) {
	certs := []*x509.Certificate{inter}
	for _, r := range l.Roots {
		if r.N == root || !r.vouches() {
			continue
		}
		rootKey, err := a.keys.keyOf(fileRootKey, r.N)
		if err != nil {
			if !r.Retired.IsZero() {
				continue
			}
			return nil, fmt.Errorf("parties know another root, which has to vouch for the new intermediate: %w; bring %s back for the time of the import", err, numbered(fileRootKey, r.N))
		}
		cert, err := readCert(a.dir, numbered(fileRoot, r.N))
		if err != nil {
			return nil, err
		}
		tmpl := spiffeIntermediate(time.Now(), td)
		tmpl.NotAfter = inter.NotAfter
		if tmpl.NotAfter.After(cert.NotAfter) {
			tmpl.NotAfter = cert.NotAfter
		}
		c, err := sign(tmpl, cert, key.Public(), rootKey)
		if err != nil {
			return nil, err
		}
		certs = append(certs, c)
	}
	return certs, nil
}

// leastLife is what is worth importing.
const leastLife = 90 * 24 * time.Hour

// checkImport says what is wrong with a chain, before anything depends on it.
func checkImport(chain []*x509.Certificate, td string, key crypto.Signer) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: "+format, append([]any{ErrImport}, args...)...)
	}
	if len(chain) != 2 {
		return bad("it has %d certificates; want two, the intermediate and the root that signed it (a longer way to the root is not supported)", len(chain))
	}
	inter, root := chain[0], chain[1]
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	now := time.Now()
	switch {
	case !bytes.Equal(inter.RawSubjectPublicKeyInfo, spki):
		return bad("the first certificate (%s) is not for the key of the request", wire.KeyOf(inter).Fingerprint())
	case !root.IsCA || root.CheckSignatureFrom(root) != nil:
		return bad("the second certificate is no root: it did not sign itself as a CA")
	case identity.CheckRootKey(root.PublicKey) != nil:
		return bad("the root: %v", identity.CheckRootKey(root.PublicKey))
	case inter.CheckSignatureFrom(root) != nil:
		return bad("the root did not sign the intermediate")
	case !inter.IsCA || inter.KeyUsage&x509.KeyUsageCertSign == 0:
		return bad("the intermediate is no CA: sign the request's extensions too (openssl x509 -req -copy_extensions copyall)")
	case inter.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return bad("the intermediate may not sign documents: key usage digitalSignature is missing, and revocations are signed with it")
	case inter.KeyUsage&x509.KeyUsageCRLSign == 0:
		return bad("the intermediate may not sign CRLs: key usage cRLSign is missing")
	case len(inter.SubjectKeyId) == 0:
		return bad("the intermediate has no subject key identifier, which a CA must have (RFC 5280, 4.2.1.2), and which its CRLs name")
	case len(inter.URIs) != 1 || inter.URIs[0].String() != "spiffe://"+td:
		return bad("the intermediate is not that of the trust domain: want the one URI name spiffe://%s, have %v", td, inter.URIs)
	case now.Before(inter.NotBefore) || now.Before(root.NotBefore):
		return bad("it is not valid yet: look at the clocks of both hosts")
	case inter.NotAfter.Before(now.Add(leastLife)) || root.NotAfter.Before(now.Add(leastLife)):
		return bad("it ends within %d days", int(leastLife.Hours()/24))
	}
	return tryLeaf(inter, root, td, key)
}

// tryLeaf issues a leaf to nobody: whatever else stands in the chain, parties
// must be able to verify what it signs.
func tryLeaf(inter, root *x509.Certificate, td string, key crypto.Signer) error {
	p := wire.Party{Role: wire.RoleGateway, ID: wire.NewID(), TrustDomain: td}
	now := time.Now()
	leaf, err := sign(&x509.Certificate{
		NotBefore: now.Add(-identity.Backdate), NotAfter: now.Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true,
		DNSNames: p.DNSNames(), URIs: []*url.URL{p.URI()},
	}, inter, key.Public(), key)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrImport, err)
	}
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), DNSName: p.ServerName()}
	opts.Roots.AddCert(root)
	opts.Intermediates.AddCert(inter)
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		opts.KeyUsages = []x509.ExtKeyUsage{usage}
		if _, err := leaf.Verify(opts); err != nil {
			return fmt.Errorf("%w: nobody would trust what it signs: %w", ErrImport, err)
		}
	}
	return nil
}

// Constrained tells whether an intermediate is kept inside its trust domain by
// name constraints, as ours are.
func Constrained(inter *x509.Certificate) bool {
	return len(inter.PermittedDNSDomains) > 0 && len(inter.PermittedURIDomains) > 0
}

// ParseChain reads certificates in PEM form.
func ParseChain(b []byte) (chain []*x509.Certificate, err error) {
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%w: it holds a %q, want certificates only", ErrImport, wire.Quotable(block.Type))
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrImport, err)
		}
		chain = append(chain, c)
	}
	if len(chain) == 0 {
		return nil, fmt.Errorf("%w: it holds no certificate in PEM form", ErrImport)
	}
	return chain, nil
}
