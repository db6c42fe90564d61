package pki_test

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
	"sallyport/pki"
)

// outside is a root that is kept elsewhere, with an RSA key.
type outside struct {
	t    *testing.T
	key  *rsa.PrivateKey
	root *x509.Certificate
}

func newOutside(t *testing.T) *outside {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	o := &outside{t: t, key: key}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Example Corp root"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(20, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	o.root = o.certify(tmpl, tmpl, &key.PublicKey)
	return o
}

func (o *outside) certify(tmpl, parent *x509.Certificate, pub any) *x509.Certificate {
	o.t.Helper()
	return identitytest.Sign(o.t, tmpl, parent, pub, o.key)
}

// sign is what openssl x509 -req -copy_extensions copyall does.
func (o *outside) sign(der []byte, change func(*x509.Certificate)) *x509.Certificate {
	o.t.Helper()
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		o.t.Fatal(err)
	}
	if err := csr.CheckSignature(); err != nil {
		o.t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: csr.Subject, ExtraExtensions: csr.Extensions,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().AddDate(5, 0, 0),
	}
	if change != nil {
		change(tmpl)
	}
	return o.certify(tmpl, o.root, csr.PublicKey)
}

func TestImport(t *testing.T) {
	dir, root := t.TempDir(), newOutside(t)
	secret := pki.WithPassphrase([]byte("correct horse battery"))
	if _, _, err := pki.RequestIntermediate(dir, nil, "", secret); err == nil || !strings.Contains(err.Error(), "which root") {
		t.Errorf("neither root nor trust domain: %v", err)
	}
	csr, td, err := pki.RequestIntermediate(dir, root.root, "", secret)
	if err != nil || td != wire.DefaultTrustDomain(root.root) {
		t.Fatalf("%s, %v", td, err)
	}
	sealedKey(t, dir, "import.key")
	// A start in between makes no other CA.
	if _, err := pki.Open(t.Context(), dir, quiet, secret); !errors.Is(err, pki.ErrImport) {
		t.Errorf("a start between request and import: %v", err)
	}
	again, _, err := pki.RequestIntermediate(dir, root.root, "", secret)
	if err != nil {
		t.Fatal(err)
	}
	if a, b := publicOf(t, csr), publicOf(t, again); !a.Equal(b) {
		t.Error("the second request is for another key")
	}
	inter := root.sign(csr, nil)
	if !pki.Constrained(inter) {
		t.Error("the request does not ask for name constraints")
	}
	state, err := pki.Import(t.Context(), dir, []*x509.Certificate{inter, root.root}, quiet, secret)
	if err != nil {
		t.Fatal(err)
	}
	if state.TrustDomain != td || state.Rollover != nil || state.Issuing().Key != wire.KeyOf(inter) {
		t.Errorf("%+v", state)
	}
	a := open(t, dir, secret)
	for _, role := range []wire.Role{wire.RoleNode, wire.RoleRCP, wire.RoleGateway} {
		id := fresh(t, a, role)
		r := request(t, a, id, "web-1")
		chain, err := a.IssueGateway(t.Context(), id.ID(), r.CSR)
		if role != wire.RoleGateway {
			chain, err = a.Issue(t.Context(), r)
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := id.Install(chain); err != nil {
			t.Errorf("%s: %v", role, err)
		}
	}
	env, err := a.SignRevocations(t.Context(), wire.Revocations{Number: 1}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := identity.VerifyRevocations(env, []*x509.Certificate{root.root}, td, time.Now()); err != nil {
		t.Error(err)
	}
	// The root's key is not here: only an import makes the next intermediate.
	if _, err := a.Rotate(t.Context(), wire.RolloverIntermediate, 0); err == nil || !strings.Contains(err.Error(), "kept elsewhere") {
		t.Errorf("rotated without the root's key: %v", err)
	}
	old := fresh(t, a, wire.RoleRCP)
	chain, err := a.Issue(t.Context(), request(t, a, old, ""))
	if err != nil {
		t.Fatal(err)
	}
	if err := old.Install(chain); err != nil {
		t.Fatal(err)
	}
	closeIt(t, a)

	csr, _, err = pki.RequestIntermediate(dir, nil, "", secret)
	if err != nil {
		t.Fatal(err)
	}
	if state, err = pki.Import(t.Context(), dir, []*x509.Certificate{root.sign(csr, nil), root.root}, quiet, secret); err != nil {
		t.Fatal(err)
	}
	if state.Rollover == nil || state.Rollover.Kind != wire.RolloverIntermediate {
		t.Errorf("%+v", state)
	}
	a = open(t, dir, secret)
	defer closeIt(t, a)
	if chain, err = a.Issue(t.Context(), request(t, a, old, "")); err != nil {
		t.Fatal(err)
	}
	if err := old.Install(chain); err != nil {
		t.Error(err)
	}
	if _, err := a.Finish(t.Context(), false, 0); err != nil {
		t.Error(err)
	}
}

// An installation with a root of its own goes below a root kept elsewhere:
// parties that know only the old one take leaves of the new intermediate.
func TestImportNewRoot(t *testing.T) {
	dir, root := t.TempDir(), newOutside(t)
	a := open(t, dir)
	td := a.TrustDomain()
	id := fresh(t, a, wire.RoleRCP)
	chain, err := a.Issue(t.Context(), request(t, a, id, ""))
	if err != nil {
		t.Fatal(err)
	}
	if err := id.Install(chain); err != nil {
		t.Fatal(err)
	}
	closeIt(t, a)
	if _, _, err := pki.RequestIntermediate(dir, root.root, "another.example"); err == nil {
		t.Error("the trust domain was to change")
	}
	csr, got, err := pki.RequestIntermediate(dir, root.root, "")
	if err != nil || got != td {
		t.Fatalf("%s, %v", got, err)
	}
	state, err := pki.Import(t.Context(), dir, []*x509.Certificate{root.sign(csr, nil), root.root}, quiet)
	if err != nil || state.Rollover == nil || state.Rollover.Kind != wire.RolloverRoot {
		t.Fatalf("%+v, %v", state, err)
	}
	a = open(t, dir)
	defer closeIt(t, a)
	if !a.Root().Equal(root.root) || a.TrustDomain() != td {
		t.Error("join codes do not pin the new root")
	}
	if chain, err = a.Issue(t.Context(), request(t, a, id, "")); err != nil {
		t.Fatal(err)
	}
	if err := id.Install(chain); err != nil {
		t.Errorf("a party of the old root: %v", err)
	}
	doc, ok := a.Trust()
	if !ok {
		t.Fatal("there is no trust document")
	}
	if _, err := id.ApplyTrust(doc); err != nil {
		t.Error(err)
	}
	if _, err := a.Finish(t.Context(), true, 0); err != nil {
		t.Fatal(err)
	}
	if doc, ok = a.Trust(); !ok {
		t.Fatal("there is no trust document")
	}
	if _, err := id.ApplyTrust(doc); err != nil {
		t.Error(err)
	}
	newcomer := fresh(t, a, wire.RoleNode)
	if chain, err = a.Issue(t.Context(), request(t, a, newcomer, "web-1")); err != nil {
		t.Fatal(err)
	}
	if err := newcomer.Install(chain); err != nil {
		t.Error(err)
	}
}

func publicOf(t *testing.T, der []byte) *ecdsa.PublicKey {
	t.Helper()
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	key, ok := csr.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		t.Fatalf("the key is a %T", csr.PublicKey)
	}
	return key
}

// A chain that would leave the installation without a working CA changes nothing.
func TestImportRefuses(t *testing.T) {
	dir, root := t.TempDir(), newOutside(t)
	if _, err := pki.Import(t.Context(), dir, []*x509.Certificate{root.root, root.root}, quiet); !errors.Is(err, pki.ErrImport) || !strings.Contains(err.Error(), "ca csr") {
		t.Errorf("nothing was asked for: %v", err)
	}
	csr, td, err := pki.RequestIntermediate(dir, root.root, "")
	if err != nil {
		t.Fatal(err)
	}
	without := func(oid string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			var keep []pkix.Extension
			for _, e := range c.ExtraExtensions {
				if e.Id.String() != oid {
					keep = append(keep, e)
				}
			}
			c.ExtraExtensions = keep
		}
	}
	other := identitytest.NewKey(t)
	good := root.sign(csr, nil)
	for name, c := range map[string]struct {
		chain []*x509.Certificate
		want  string
	}{
		"no root":      {[]*x509.Certificate{good}, "want two"},
		"another root": {[]*x509.Certificate{good, newOutside(t).root}, "did not sign the intermediate"},
		"not a root":   {[]*x509.Certificate{good, good}, "no root"},
		"wrong order":  {[]*x509.Certificate{root.root, good}, "not for the key of the request"},
		"another key":  {[]*x509.Certificate{root.certify(&x509.Certificate{SerialNumber: big.NewInt(7), NotAfter: time.Now().AddDate(1, 0, 0)}, root.root, &other.PublicKey), root.root}, "not for the key"},
		"no CA":        {[]*x509.Certificate{root.sign(csr, without("2.5.29.19")), root.root}, "no CA"},
		"no key usage": {[]*x509.Certificate{root.sign(csr, without("2.5.29.15")), root.root}, "copy_extensions"},
		"no CRLs": {[]*x509.Certificate{root.sign(csr, func(c *x509.Certificate) {
			without("2.5.29.15")(c)
			c.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
		}), root.root}, "may not sign CRLs"},
		"no key identifier": {[]*x509.Certificate{root.sign(csr, without("2.5.29.14")), root.root}, "subject key identifier"},
		"no SPIFFE ID":      {[]*x509.Certificate{root.sign(csr, without("2.5.29.17")), root.root}, "spiffe://" + td},
		"two SPIFFE IDs": {[]*x509.Certificate{root.sign(csr, func(c *x509.Certificate) {
			without("2.5.29.17")(c)
			c.URIs = []*url.URL{{Scheme: "spiffe", Host: td}, {Scheme: "spiffe", Host: "x"}}
		}), root.root}, "spiffe://" + td},
		"ends soon":        {[]*x509.Certificate{root.sign(csr, func(c *x509.Certificate) { c.NotAfter = time.Now().AddDate(0, 1, 0) }), root.root}, "ends within 90 days"},
		"begins later":     {[]*x509.Certificate{root.sign(csr, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }), root.root}, "not valid yet"},
		"of another place": {[]*x509.Certificate{root.sign(csr, func(c *x509.Certificate) { without("2.5.29.30")(c); c.PermittedDNSDomains = []string{"example.com"} }), root.root}, "nobody would trust"},
		"for servers only": {[]*x509.Certificate{root.sign(csr, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), root.root}, "nobody would trust"},
	} {
		if _, err := pki.Import(t.Context(), dir, c.chain, quiet); !errors.Is(err, pki.ErrImport) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want it to say %q", name, err, c.want)
		}
	}
	if _, err := pki.Import(t.Context(), dir, []*x509.Certificate{good, root.root}, quiet); err != nil {
		t.Errorf("the good one, after all: %v", err)
	}
	if _, err := pki.ParseChain([]byte("nothing")); !errors.Is(err, pki.ErrImport) {
		t.Errorf("no certificates: %v", err)
	}
}
