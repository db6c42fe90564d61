package pki_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/lockdir"
	"sallyport/internal/wire"
	"sallyport/pki"
)

func open(t *testing.T, dir string, opts ...pki.Option) *pki.Authority {
	t.Helper()
	a, err := pki.Open(t.Context(), dir, slog.New(slog.DiscardHandler), opts...)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func closeIt(t *testing.T, a *pki.Authority) {
	t.Helper()
	if err := a.Close(); err != nil {
		t.Error(err)
	}
}

func fresh(t *testing.T, a *pki.Authority, role wire.Role) *identity.Identity {
	t.Helper()
	id, err := identity.Open(t.TempDir(), role)
	if err != nil {
		t.Fatal(err)
	}
	if err := id.Pin(wire.KeyOf(a.Root()), a.TrustDomain()); err != nil {
		t.Fatal(err)
	}
	return id
}

func request(t *testing.T, a *pki.Authority, id *identity.Identity, name string) wire.IssueRequest {
	t.Helper()
	csr, err := id.CSR(false)
	if err != nil {
		t.Fatal(err)
	}
	return wire.IssueRequest{Party: wire.Party{Role: id.Role(), ID: id.ID(), TrustDomain: a.TrustDomain()}, Name: name, CSR: csr}
}

func leafOf(t *testing.T, chain [][]byte) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func near(t *testing.T, what string, got, want time.Time) {
	t.Helper()
	if d := got.Sub(want).Abs(); d > time.Minute {
		t.Errorf("%s: %s, want %s", what, got, want)
	}
}

func TestLeaves(t *testing.T) {
	a := open(t, t.TempDir())
	defer closeIt(t, a)
	now := time.Now()
	if want := wire.DefaultTrustDomain(a.Root()); a.TrustDomain() != want {
		t.Errorf("trust domain %s, want %s", a.TrustDomain(), want)
	}
	near(t, "root from", a.Root().NotBefore, now.Add(-96*time.Hour))

	for _, c := range []struct {
		role wire.Role
		life time.Duration
		name string
		want []string
	}{
		{wire.RoleNode, 30 * 24 * time.Hour, "Web_1.example", []string{"web_1.example.default.node."}},
		{wire.RoleRCP, 30 * 24 * time.Hour, "", nil},
		{wire.RoleGateway, 14 * 24 * time.Hour, "", nil},
	} {
		id := fresh(t, a, c.role)
		req := request(t, a, id, c.name)
		var chain [][]byte
		var err error
		if c.role == wire.RoleGateway {
			chain, err = a.IssueGateway(t.Context(), id.ID(), req.CSR)
		} else {
			chain, err = a.Issue(t.Context(), req)
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := id.Install(chain); err != nil {
			t.Fatalf("%s: the party does not take its own certificate: %v", c.role, err)
		}
		leaf := leafOf(t, chain)
		near(t, "leaf from", leaf.NotBefore, now.Add(-72*time.Hour))
		near(t, "leaf until", leaf.NotAfter, now.Add(c.life))
		want := req.Party.DNSNames()
		for _, n := range c.want {
			want = append(want, n+a.TrustDomain())
		}
		if strings.Join(leaf.DNSNames, " ") != strings.Join(want, " ") {
			t.Errorf("%s: names %v, want %v", c.role, leaf.DNSNames, want)
		}
		if len(leaf.URIs) != 1 || leaf.URIs[0].String() != req.Party.URI().String() || leaf.IsCA {
			t.Errorf("%s: URIs %v, CA %v", c.role, leaf.URIs, leaf.IsCA)
		}
	}
}

// Only the public key of a request counts.
func TestHostileRequest(t *testing.T) {
	a := open(t, t.TempDir())
	defer closeIt(t, a)
	key := identitytest.NewKey(t)
	id := wire.NewID()
	gateway := wire.Party{Role: wire.RoleGateway, ID: wire.NewID(), TrustDomain: a.TrustDomain()}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject:         pkix.Name{CommonName: "root", Organization: []string{"evil"}},
		DNSNames:        []string{"evil.example", gateway.ServerName()},
		URIs:            []*url.URL{gateway.URI()},
		IPAddresses:     []net.IP{net.IPv4(127, 0, 0, 1)},
		EmailAddresses:  []string{"root@evil.example"},
		ExtraExtensions: []pkix.Extension{{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}}, // CA: true
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := a.Issue(t.Context(), wire.IssueRequest{Party: wire.Party{Role: wire.RoleNode, ID: id, TrustDomain: a.TrustDomain()}, Name: "web", CSR: csr})
	if err != nil {
		t.Fatal(err)
	}
	leaf := leafOf(t, chain)
	if leaf.IsCA || leaf.KeyUsage != x509.KeyUsageDigitalSignature || len(leaf.DNSNames) != 3 || len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0 ||
		leaf.Subject.String() != "CN="+string(id) || len(leaf.URIs) != 1 || strings.Contains(leaf.URIs[0].String(), "gateway") {
		t.Errorf("the request reached the certificate: %s %v %v %v", leaf.Subject, leaf.DNSNames, leaf.URIs, leaf.IsCA)
	}
	if !key.PublicKey.Equal(leaf.PublicKey) {
		t.Error("another key")
	}
}

func TestRefuses(t *testing.T) {
	a := open(t, t.TempDir())
	defer closeIt(t, a)
	node := fresh(t, a, wire.RoleNode)
	good := request(t, a, node, "web")
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	rsaCSR, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, rsaKey)
	if err != nil {
		t.Fatal(err)
	}
	broken := bytes.Clone(good.CSR)
	broken[len(broken)-1] ^= 1
	for name, change := range map[string]func(*wire.IssueRequest){
		"gateway":            func(r *wire.IssueRequest) { r.Party.Role = wire.RoleGateway },
		"pki":                func(r *wire.IssueRequest) { r.Party.Role = "pki" },
		"other trust domain": func(r *wire.IssueRequest) { r.Party.TrustDomain = "x.sallyport" },
		"no UUID":            func(r *wire.IssueRequest) { r.Party.ID = "web" },
		"no name":            func(r *wire.IssueRequest) { r.Name = "" },
		"bad name":           func(r *wire.IssueRequest) { r.Name = "a/b" },
		"bad tenant":         func(r *wire.IssueRequest) { r.Tenant = "a b" },
		"broken signature":   func(r *wire.IssueRequest) { r.CSR = broken },
		"RSA":                func(r *wire.IssueRequest) { r.CSR = rsaCSR },
		"garbage":            func(r *wire.IssueRequest) { r.CSR = []byte("garbage") },
	} {
		r := good
		change(&r)
		if _, err := a.Issue(t.Context(), r); !errors.Is(err, pki.ErrRefused) {
			t.Errorf("%s: %v, want ErrRefused", name, err)
		}
	}
	if _, err := a.SignRevocations(t.Context(), wire.Revocations{Number: 1, Revoked: []wire.Revocation{{Key: node.KeyHash()}}}, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Issue(t.Context(), good); !errors.Is(err, identity.ErrRevoked) {
		t.Errorf("a revoked key: %v", err)
	}
}

// The intermediate cannot be used outside its trust domain.
func TestNameConstraints(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	defer closeIt(t, a)
	inter := readCert(t, dir, "intermediate.pem")
	if !inter.PermittedDNSDomainsCritical || len(inter.PermittedDNSDomains) != 1 || len(inter.PermittedURIDomains) != 1 || !inter.MaxPathLenZero ||
		len(inter.URIs) != 1 || inter.URIs[0].String() != "spiffe://"+a.TrustDomain() {
		t.Fatalf("intermediate: %v %v %v", inter.PermittedDNSDomains, inter.PermittedURIDomains, inter.URIs)
	}
	near(t, "intermediate from", inter.NotBefore, time.Now().Add(-96*time.Hour))

	key := readKey(t, dir, "intermediate.key") // a thief's view
	roots, inters := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(a.Root())
	inters.AddCert(inter)
	for name, want := range map[string]bool{"x.node." + a.TrustDomain(): true, "www.example.org": false} {
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{name}}
		_, err := identitytest.Sign(t, tmpl, inter, &key.PublicKey, key).Verify(x509.VerifyOptions{Roots: roots, Intermediates: inters, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
		if (err == nil) != want {
			t.Errorf("%s verifies: %v, want %v", name, err, want)
		}
	}
}

func readKey(t *testing.T, dir, name string) *ecdsa.PrivateKey {
	t.Helper()
	k, err := x509.ParsePKCS8PrivateKey(readPEM(t, dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return k.(*ecdsa.PrivateKey)
}

func readCert(t *testing.T, dir, name string) *x509.Certificate {
	t.Helper()
	return leafOf(t, [][]byte{readPEM(t, dir, name)})
}

func readPEM(t *testing.T, dir, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		t.Fatalf("%s is not a PEM file", name)
	}
	return block.Bytes
}

func TestSurvivesRestart(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	root := a.Root()
	id := fresh(t, a, wire.RoleNode)
	if _, ok := a.Revocations(); ok {
		t.Error("a revocation set before the first")
	}
	set := wire.Revocations{Number: 4, Revoked: []wire.Revocation{{Key: wire.KeyHash(strings.Repeat("ab", 32)), Role: wire.RoleNode}}}
	if _, err := a.SignRevocations(t.Context(), set, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := a.SignRevocations(t.Context(), set, 4); !errors.Is(err, identity.ErrOlder) {
		t.Errorf("the same number twice: %v", err)
	}
	if _, err := pki.Open(t.Context(), dir, slog.New(slog.DiscardHandler)); !errors.Is(err, lockdir.ErrLocked) {
		t.Errorf("a second process: %v", err)
	}
	closeIt(t, a)

	a = open(t, dir)
	defer closeIt(t, a)
	if !a.Root().Equal(root) {
		t.Error("another root after a restart")
	}
	chain, err := a.Issue(t.Context(), request(t, a, id, "web"))
	if err != nil {
		t.Fatal(err)
	}
	if err := id.Install(chain); err != nil {
		t.Error(err)
	}
	env, ok := a.Revocations()
	if !ok {
		t.Fatal("the revocation set is gone")
	}
	if newer, err := id.ApplyRevocations(env); err != nil || !newer || !id.Revoked(set.Revoked[0].Key) {
		t.Errorf("the set does not verify: %v %v", newer, err)
	}
	if _, err := a.SignRevocations(t.Context(), wire.Revocations{Number: 3}, 4); !errors.Is(err, identity.ErrOlder) {
		t.Errorf("a lower number after the restart: %v", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if st, err := e.Info(); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v %v, want 0600", e.Name(), st.Mode(), err)
		}
	}
}

func TestDamage(t *testing.T) {
	for file, content := range map[string]string{
		"root.pem": "", "intermediate.pem": "", "intermediate.key": "", "trust-domain": "x.sallyport", "revocations.json": "{}",
	} {
		dir := t.TempDir()
		closeIt(t, open(t, dir))
		path := filepath.Join(dir, file)
		if content == "" {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		} else if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		repair := "backup"
		if file == "revocations.json" { // the one file that is made again
			repair = "delete it"
		}
		_, err := pki.Open(t.Context(), dir, slog.New(slog.DiscardHandler))
		if !errors.Is(err, pki.ErrDamaged) || !strings.Contains(err.Error(), file) || !strings.Contains(err.Error(), repair) {
			t.Errorf("%s: %v", file, err)
		}
	}
	// Keys of another authority do not pass.
	dir, other := t.TempDir(), t.TempDir()
	closeIt(t, open(t, dir))
	closeIt(t, open(t, other))
	b, err := os.ReadFile(filepath.Join(other, "intermediate.key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "intermediate.key"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.Open(t.Context(), dir, slog.New(slog.DiscardHandler)); !errors.Is(err, pki.ErrDamaged) {
		t.Errorf("a foreign key: %v", err)
	}
}

// A crash while the authority was made leaves nothing that counts.
func TestInterruptedMaking(t *testing.T) {
	dir := t.TempDir()
	closeIt(t, open(t, dir))
	for _, name := range []string{"trust-domain", "intermediate.pem"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	a := open(t, dir)
	defer closeIt(t, a)
	if a.TrustDomain() != wire.DefaultTrustDomain(readCert(t, dir, "root.pem")) {
		t.Errorf("trust domain %s does not belong to the root on disk", a.TrustDomain())
	}
}

// TestIntermediateEnds: a running authority certifies nothing with an intermediate
// that has ended, least of all by leaves that have ended with it, until there is
// another one.
func TestIntermediateEnds(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		a := open(t, dir)
		defer func() { closeIt(t, a) }()
		s, err := pki.Listen(a, "127.0.0.1:0", quiet, prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = s.Close() }()
		id := fresh(t, a, wire.RoleNode)
		issue := func() ([][]byte, error) { return a.Issue(t.Context(), request(t, a, id, "web-1")) }
		if _, err := issue(); err != nil || s.Ready() != nil {
			t.Fatal(err, s.Ready())
		}
		time.Sleep(time.Until(a.State().Issuing().NotAfter) + time.Hour)
		const why, way = "expired on", "ca rotate intermediate"
		switch chain, err := issue(); {
		case err == nil:
			t.Errorf("it issues a leaf that ended at %s", leafOf(t, chain).NotAfter)
		case errors.Is(err, pki.ErrRefused) || !strings.Contains(err.Error(), why) || !strings.Contains(err.Error(), way):
			t.Error(err)
		}
		if err := s.Ready(); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("ready: %v", err)
		}
		// The next one is made, or imported, by a process that starts with this.
		closeIt(t, a)
		a = open(t, dir)
		if _, err := issue(); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("started again: %v", err)
		}
		rotate(t, a, wire.RolloverIntermediate)
		if chain, err := issue(); err != nil || !leafOf(t, chain).NotAfter.After(time.Now()) {
			t.Errorf("with the next one: %v", err)
		}
	})
}
