package pki_test

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"sallyport/internal/doors"
	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
	"sallyport/pki"
)

func openDoors(t *testing.T, a *pki.Authority, url string) *pki.Doors {
	t.Helper()
	d, err := a.Doors(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func doorCSR(t *testing.T, key crypto.Signer, names ...string) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: names}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestDoorLeaf(t *testing.T) {
	a := open(t, t.TempDir())
	defer closeIt(t, a)
	d := openDoors(t, a, "http://pki.example/")
	key := identitytest.NewKey(t)
	// Whatever the CSR says beside its key, it does not reach the certificate.
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "evil", Organization: []string{"evil"}}, DNSNames: []string{"evil.example"},
		URIs:            []*url.URL{{Scheme: "spiffe", Host: a.TrustDomain(), Path: "/gateway/" + string(wire.NewID())}},
		ExtraExtensions: []pkix.Extension{{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := d.Issue(t.Context(), doors.Request{CSR: csr, Names: []string{"www.plant.example", "b.example"}, Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.7")}})
	if err != nil {
		t.Fatal(err)
	}
	leaf := chain[0]
	if len(chain) != 2 || !chain[1].Equal(d.Chain()[0]) {
		t.Errorf("a chain of %d", len(chain))
	}
	if leaf.IsCA || len(leaf.URIs) != 0 || strings.Join(leaf.DNSNames, " ") != "www.plant.example b.example" || len(leaf.IPAddresses) != 1 || leaf.Subject.String() != "CN=www.plant.example" || !key.PublicKey.Equal(leaf.PublicKey) {
		t.Errorf("leaf: %v %v %v %v", leaf.Subject, leaf.DNSNames, leaf.IPAddresses, leaf.URIs)
	}
	near(t, "leaf from", leaf.NotBefore, time.Now().Add(-72*time.Hour))
	near(t, "leaf until", leaf.NotAfter, time.Now().Add(doors.Life))
	if strings.Join(leaf.OCSPServer, "") != "http://pki.example/ocsp" || strings.Join(leaf.CRLDistributionPoints, "") != "http://pki.example/crl/"+doors.IssuerName(chain[1])+".crl" {
		t.Errorf("where its status is: %v %v", leaf.OCSPServer, leaf.CRLDistributionPoints)
	}
	for name, want := range map[string]bool{"www.plant.example": true, "evil.example": false} {
		if err := verifyLeaf(leaf, a.Root(), chain[1], name); (err == nil) != want {
			t.Errorf("as %s: %v", name, err)
		}
	}
}

func verifyLeaf(leaf, root, inter *x509.Certificate, name string) error {
	roots, inters := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(root)
	inters.AddCert(inter)
	_, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: inters, DNSName: name})
	return err
}

func TestDoorRefuses(t *testing.T) {
	a := open(t, t.TempDir())
	defer closeIt(t, a)
	d := openDoors(t, a, "")
	key := identitytest.NewKey(t)
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Skip("this Go makes no weak keys: ", err)
	}
	good := doorCSR(t, key)
	broken := append([]byte(nil), good...)
	broken[len(broken)-1] ^= 1
	for name, r := range map[string]doors.Request{
		"no names":             {CSR: good},
		"the trust domain":     {CSR: good, Names: []string{a.TrustDomain()}},
		"a name of a node":     {CSR: good, Names: []string{"ok.example", "x.node." + a.TrustDomain()}},
		"a wildcard":           {CSR: good, Names: []string{"*.example.org"}},
		"upper case":           {CSR: good, Names: []string{"X." + strings.ToUpper(a.TrustDomain())}},
		"a trailing dot":       {CSR: good, Names: []string{a.TrustDomain() + "."}},
		"a weak key":           {CSR: doorCSR(t, weak), Names: []string{"a.example"}},
		"broken signature":     {CSR: broken, Names: []string{"a.example"}},
		"garbage":              {CSR: []byte("garbage"), Names: []string{"a.example"}},
		"an address as a name": {CSR: good, Names: []string{"192.0.2.1"}},
	} {
		if chain, err := d.Issue(t.Context(), r); err == nil {
			t.Errorf("%s: issued %v", name, chain[0].DNSNames)
		}
	}
}

// A thief of the doors' key gets into no channel, and no client that knows the
// root takes his names of the trust domain.
func TestDoorsOpenNoChannel(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	defer closeIt(t, a)
	d := openDoors(t, a, "")
	key := readKey(t, dir, "doors.key")
	party := wire.Party{Role: wire.RoleGateway, ID: wire.NewID(), TrustDomain: a.TrustDomain()}
	forge := func(change func(*x509.Certificate)) *x509.Certificate {
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
		change(tmpl)
		return identitytest.Sign(t, tmpl, d.Chain()[0], &key.PublicKey, key)
	}
	node := fresh(t, a, wire.RoleNode)
	for name, leaf := range map[string]*x509.Certificate{
		"names and URI": forge(func(c *x509.Certificate) { c.URIs, c.DNSNames = []*url.URL{party.URI()}, party.DNSNames() }),
		"only the URI":  forge(func(c *x509.Certificate) { c.URIs = []*url.URL{party.URI()} }),
		"only a name":   forge(func(c *x509.Certificate) { c.DNSNames = party.DNSNames() }),
	} {
		if err := verifyLeaf(leaf, a.Root(), d.Chain()[0], ""); err == nil {
			t.Errorf("%s: a client that knows the root takes it", name)
		}
		cs := tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf, d.Chain()[0], a.Root()}}
		if _, err := node.VerifyPinned(cs, wire.RoleGateway); !errors.Is(err, identity.ErrUntrusted) {
			t.Errorf("%s: enrolling: %v, want ErrUntrusted", name, err)
		}
		// Even a TLS stack that ignores constraints does not help him.
		cs.VerifiedChains = [][]*x509.Certificate{cs.PeerCertificates}
		if _, err := node.Verify(cs); err == nil {
			t.Errorf("%s: a channel takes it", name)
		}
	}
}

func TestDoorsSurviveRestart(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	first := openDoors(t, a, "").Chain()[0]
	closeIt(t, a)
	a = open(t, dir)
	if again := openDoors(t, a, "").Chain()[0]; !again.Equal(first) {
		t.Error("another intermediate after a restart")
	}
	closeIt(t, a)

	// Its key is gone, or that of another: nothing is made in its place.
	if err := os.Remove(filepath.Join(dir, "doors.key")); err != nil {
		t.Fatal(err)
	}
	a = open(t, dir)
	defer closeIt(t, a)
	if _, err := a.Doors(t.Context(), ""); err == nil {
		t.Error("without its key")
	}
	b, err := os.ReadFile(filepath.Join(dir, "intermediate.key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "doors.key"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Doors(t.Context(), ""); !errors.Is(err, pki.ErrDamaged) {
		t.Errorf("with the SPIFFE key: %v", err)
	}
	// The SPIFFE intermediate in its place is refused, however it came there.
	for _, name := range []string{"intermediate.pem"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "doors.pem"), b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Doors(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "SPIFFE") {
			t.Errorf("with the SPIFFE intermediate: %v", err)
		}
	}
}

// Where the root's key is kept elsewhere, its owner signs a request.
func TestDoorsSignedElsewhere(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	defer closeIt(t, a)
	rootKey := readKey(t, dir, "root.key")
	if err := os.Remove(filepath.Join(dir, "root.key")); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Doors(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "ca csr --doors") {
		t.Fatalf("without the root's key: %v", err)
	}
	// The files may also be put there by hand.
	key := identitytest.NewKey(t)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "doors.key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, excluded := range []string{"", "elsewhere.example", a.TrustDomain()} {
		want := excluded == a.TrustDomain()
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(9), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature}
		if excluded != "" {
			tmpl.ExcludedDNSDomains = []string{excluded}
		}
		writeCert(t, filepath.Join(dir, "doors.pem"), identitytest.Sign(t, tmpl, a.Root(), &key.PublicKey, rootKey).Raw)
		d, err := a.Doors(t.Context(), "")
		if (err == nil) != want {
			t.Errorf("excluding %q: %v, want it taken: %v", excluded, err, want)
		}
		if err != nil {
			continue
		}
		chain, err := d.Issue(t.Context(), doors.Request{CSR: doorCSR(t, identitytest.NewKey(t)), Names: []string{"a.example"}})
		if err != nil {
			t.Fatal(err)
		}
		if err := verifyLeaf(chain[0], a.Root(), chain[1], "a.example"); err != nil {
			t.Error(err)
		}
	}
}

func writeCert(t *testing.T, path string, der []byte) {
	t.Helper()
	if err := os.WriteFile(path, pemCert(der), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestDoorStatus(t *testing.T) {
	a, err := pki.Open(t.Context(), t.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer closeIt(t, a)
	d := openDoors(t, a, "")
	now := time.Now().UTC().Truncate(time.Second)
	gone := doors.Revoked{Serial: big.NewInt(77), At: now.Add(-time.Hour), Reason: ocsp.KeyCompromise}
	if len(d.Issuers()) != 2 {
		t.Fatalf("%d issuers", len(d.Issuers()))
	}
	for _, issuer := range d.Issuers() {
		key := wire.KeyOf(issuer)
		der, err := d.SignCRL(t.Context(), key, doors.CRL{Number: big.NewInt(5), This: now, Next: now.Add(time.Hour), Revoked: []doors.Revoked{gone}})
		if err != nil {
			t.Fatal(err)
		}
		crl, err := x509.ParseRevocationList(der)
		if err != nil {
			t.Fatal(err)
		}
		if err := crl.CheckSignatureFrom(issuer); err != nil {
			t.Error(err)
		}
		if len(crl.RevokedCertificateEntries) != 1 || crl.RevokedCertificateEntries[0].SerialNumber.Int64() != 77 || crl.RevokedCertificateEntries[0].ReasonCode != ocsp.KeyCompromise {
			t.Errorf("CRL: %+v", crl.RevokedCertificateEntries)
		}
		for _, s := range []doors.Status{
			{Serial: big.NewInt(78), Hash: crypto.SHA1, This: now, Next: now.Add(time.Hour)},
			{Serial: gone.Serial, Hash: crypto.SHA256, This: now, Next: now.Add(time.Hour), Revoked: &gone},
			{Serial: big.NewInt(78), Hash: crypto.SHA256, This: now, Next: now.Add(time.Hour), Nonce: bytes.Repeat([]byte{7}, 32)},
		} {
			der, err := d.SignOCSP(t.Context(), key, s)
			if err != nil {
				t.Fatal(err)
			}
			res, err := ocsp.ParseResponse(der, issuer)
			if err != nil {
				t.Fatal(err)
			}
			if want := map[bool]int{true: ocsp.Revoked, false: ocsp.Good}[s.Revoked != nil]; res.Status != want || res.SerialNumber.Cmp(s.Serial) != 0 || res.IssuerHash != s.Hash {
				t.Errorf("OCSP: status %d of %v, want %d", res.Status, res.SerialNumber, want)
			}
			if s.Nonce != nil != bytes.Contains(der, bytes.Repeat([]byte{7}, 32)) {
				t.Errorf("the nonce %x in %x", s.Nonce, der)
			}
		}
	}
	if _, err := d.SignCRL(t.Context(), wire.KeyOf(a.Root()), doors.CRL{Number: big.NewInt(1), This: now, Next: now}); err == nil {
		t.Error("signed as the root")
	}
}

func pemCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
