package identity_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

func reopen(t *testing.T, id *identity.Identity) *identity.Identity {
	t.Helper()
	again, err := identity.Open(id.Dir(), id.Role())
	if err != nil {
		t.Fatal(err)
	}
	return again
}

func TestOpenKeepsIDAndKey(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "node", "x")
	a, err := identity.Open(dir, wire.RoleNode)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := wire.ParseID(string(a.ID())); err != nil {
		t.Error(err)
	}
	b := reopen(t, a)
	if a.ID() != b.ID() || a.KeyHash() != b.KeyHash() || a.Fingerprint() != b.Fingerprint() {
		t.Errorf("a second Open gave another party: %s %s, %s %s", a.ID(), a.KeyHash(), b.ID(), b.KeyHash())
	}
	if st, err := os.Stat(filepath.Join(dir, "key.pem")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("key.pem: %v %v, want mode 0600", st.Mode(), err)
	}
	if _, err := a.Certificate(); !errors.Is(err, identity.ErrNoCertificate) {
		t.Errorf("Certificate: %v, want ErrNoCertificate", err)
	}
	if _, ok := a.Party(); ok {
		t.Error("a party without a certificate")
	}
	if _, err := identity.Open(dir, "pki"); err == nil {
		t.Error("a role without certificates was opened")
	}
}

func TestInstallSurvivesReopen(t *testing.T) {
	ca := identitytest.NewCA(t)
	id := ca.Pending(t, wire.RoleNode)
	changed := id.Changed()
	ca.Certify(t, id, identitytest.Name("web.1", "default"))
	select {
	case <-changed:
	default:
		t.Error("Install did not close Changed")
	}
	for _, id := range []*identity.Identity{id, reopen(t, id)} {
		p, ok := id.Party()
		if !ok || p.TrustDomain != ca.TrustDomain || p.ID != id.ID() || p.Role != wire.RoleNode {
			t.Errorf("party %v %v", p, ok)
		}
		cert, err := id.Certificate()
		if err != nil {
			t.Fatal(err)
		}
		if n := len(cert.Certificate); n != 3 {
			t.Errorf("chain of %d, want leaf, intermediate and root", n)
		}
		if id.OutOfTime() || id.NotAfter().IsZero() {
			t.Error("a fresh leaf is expired")
		}
		// 30 days of life: two thirds are 20 days from now, whatever the backdating.
		if d := time.Until(id.RenewAfter()); d < 19*24*time.Hour || d > 21*24*time.Hour {
			t.Errorf("renew in %s, want 20 days", d)
		}
	}
}

func TestInstallRefuses(t *testing.T) {
	ca, other := identitytest.NewCA(t), identitytest.NewCA(t)
	id := ca.Pending(t, wire.RoleNode)
	stranger := ca.Pending(t, wire.RoleNode)
	revoked := ca.Party(t, wire.RoleNode)
	if _, err := revoked.ApplyRevocations(ca.Revoke(t, 1, revoked.KeyHash())); err != nil {
		t.Fatal(err)
	}
	fresh, err := identity.Open(t.TempDir(), wire.RoleNode)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		id    *identity.Identity
		chain [][]byte
		want  error
	}{
		{"another root", id, other.Issue(t, id), identity.ErrUntrusted},
		{"another role", id, ca.Issue(t, id, identitytest.As(wire.RoleGateway)), identity.ErrWrongRole},
		{"another party", id, ca.Issue(t, id, identitytest.WithID(wire.NewID())), identity.ErrWrongParty},
		{"another trust domain", id, ca.Issue(t, id, identitytest.InTrustDomain("x.sallyport")), identity.ErrWrongTrustDomain},
		{"not the SPIFFE intermediate", id, ca.Issue(t, id, identitytest.OtherIntermediate()), identity.ErrUntrusted},
		{"expired", id, ca.Issue(t, id, identitytest.NotAfter(time.Now().Add(-time.Minute))), identity.ErrExpired},
		{"not yet valid", id, ca.Issue(t, id, identitytest.NotBefore(time.Now().Add(time.Hour))), identity.ErrExpired},
		{"nothing pinned", fresh, ca.Issue(t, fresh), identity.ErrNotPinned},
		{"own key revoked", revoked, ca.Issue(t, revoked), identity.ErrRevoked},
		{"without its root", id, ca.Issue(t, id)[:2], identity.ErrUntrusted},
		{"empty", id, nil, nil},
		{"garbage", id, [][]byte{[]byte("garbage")}, nil},
		{"another key", id, ca.Issue(t, stranger, identitytest.WithID(id.ID())), nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, had := c.id.Party()
			err := c.id.Install(c.chain)
			if err == nil || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if _, has := c.id.Party(); has != had {
				t.Error("a refused chain changed the identity")
			}
			reopen(t, c.id)
		})
	}
}

func TestRekeyTakesOverWithItsCertificate(t *testing.T) {
	ca := identitytest.NewCA(t)
	id := ca.Party(t, wire.RoleRCP)
	old := id.KeyHash()
	der, err := id.CSR(true)
	if err != nil {
		t.Fatal(err)
	}
	pub, next, err := identity.ParseCSR(der)
	if err != nil {
		t.Fatal(err)
	}
	if next == old || id.KeyHash() != old {
		t.Fatalf("old %s, next %s, in use %s", old, next, id.KeyHash())
	}
	id = reopen(t, id) // the waiting key survives
	p, _ := id.Party()
	chain := ca.IssueKey(t, p, pub)
	if err := id.Install(chain); err != nil {
		t.Fatal(err)
	}
	if got := reopen(t, id).KeyHash(); id.KeyHash() != next || got != next {
		t.Errorf("in use %s, after restart %s, want %s", id.KeyHash(), got, next)
	}

	// A crash between the new chain and the new key is finished by Open.
	der, err = id.CSR(true)
	if err != nil {
		t.Fatal(err)
	}
	pub, next, err = identity.ParseCSR(der)
	if err != nil {
		t.Fatal(err)
	}
	before := files(t, id.Dir())
	if err := id.Install(ca.IssueKey(t, p, pub)); err != nil {
		t.Fatal(err)
	}
	write(t, id.Dir(), "key.pem", before["key.pem"])
	write(t, id.Dir(), "key-next.pem", before["key-next.pem"])
	if got := reopen(t, id).KeyHash(); got != next {
		t.Errorf("after the crash %s, want %s", got, next)
	}
}

func files(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	m := map[string][]byte{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		m[e.Name()] = b
	}
	return m
}

func write(t *testing.T, dir, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestOpenNamesDamageAndRepair(t *testing.T) {
	ca := identitytest.NewCA(t)
	for _, c := range []struct {
		file, content, want string // content "-" removes
	}{
		{"key.pem", "-", "key.pem: missing while chain.pem is there"},
		{"key.pem", "garbage", "key.pem: not one PEM block"},
		{"chain.pem", "garbage", "chain.pem: not a list of PEM certificates"},
		{"root.pem", "-", "root.pem: missing"},
		{"id", "not-a-uuid", "id: "},
		{"id", string(wire.NewID()), "the certificate says"},
		{"pin.json", "{", "pin.json: "},
		{"revocations.json", "{}", "revocations.json: "},
	} {
		id := ca.Party(t, wire.RoleNode)
		if c.content == "-" {
			if err := os.Remove(filepath.Join(id.Dir(), c.file)); err != nil {
				t.Fatal(err)
			}
		} else {
			write(t, id.Dir(), c.file, []byte(c.content))
		}
		_, err := identity.Open(id.Dir(), wire.RoleNode)
		if !errors.Is(err, identity.ErrDamaged) || !strings.Contains(err.Error(), c.want) ||
			!strings.Contains(err.Error(), "restore") && !strings.Contains(err.Error(), "delete it") {
			t.Errorf("%s %q: %v, want %q and a repair", c.file, c.content, err, c.want)
		}
	}
	id := ca.Party(t, wire.RoleNode)
	if _, err := identity.Open(id.Dir(), wire.RoleRCP); !errors.Is(err, identity.ErrWrongRole) {
		t.Errorf("another role in the same directory: %v", err)
	}
	// A lost id file is no damage: the certificate says it.
	if err := os.Remove(filepath.Join(id.Dir(), "id")); err != nil {
		t.Fatal(err)
	}
	if again := reopen(t, id); again.ID() != id.ID() {
		t.Errorf("id %s, want %s", again.ID(), id.ID())
	}
}

func TestOpenUnreadable(t *testing.T) {
	if os.Geteuid() == 0 {
		f := filepath.Join(t.TempDir(), "file")
		write(t, filepath.Dir(f), "file", nil)
		if _, err := identity.Open(filepath.Join(f, "x"), wire.RoleNode); err == nil {
			t.Error("a directory below a file was opened")
		}
		return
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := identity.Open(dir, wire.RoleNode); err == nil || !strings.Contains(err.Error(), "run as the user") {
		t.Errorf("got %v", err)
	}
}

func TestPin(t *testing.T) {
	a, b := identitytest.NewCA(t), identitytest.NewCA(t)
	id := a.Pending(t, wire.RoleNode)
	if err := id.Pin(wire.KeyOf(b.Root), b.TrustDomain); err != nil {
		t.Errorf("a waiting party may be given another code: %v", err)
	}
	if id.TrustDomain() != b.TrustDomain {
		t.Errorf("trust domain %s", id.TrustDomain())
	}
	id = reopen(t, id)
	b.Certify(t, id)
	if err := id.Pin(wire.KeyOf(a.Root), a.TrustDomain); !errors.Is(err, identity.ErrWrongTrustDomain) {
		t.Errorf("an enrolled party took another trust domain: %v", err)
	}
	if err := id.Pin(wire.KeyOf(a.Root), b.TrustDomain); !errors.Is(err, identity.ErrWrongTrustDomain) {
		t.Errorf("an enrolled party took another root: %v", err)
	}
	if err := id.Pin(wire.KeyOf(b.Root), b.TrustDomain); err != nil {
		t.Error(err)
	}
	if err := id.Pin("x", b.TrustDomain); err == nil {
		t.Error("a hash that is none was pinned")
	}
}

func TestNewKeyKeepsUUID(t *testing.T) {
	ca := identitytest.NewCA(t)
	id := ca.Party(t, wire.RoleNode)
	uuid, key := id.ID(), id.KeyHash()
	if _, err := id.ApplyRevocations(ca.Revoke(t, 7, key)); err != nil {
		t.Fatal(err)
	}
	if err := id.NewKey(); err != nil {
		t.Fatal(err)
	}
	for _, id := range []*identity.Identity{id, reopen(t, id)} {
		if id.ID() != uuid || id.KeyHash() == key || id.Revoked(id.KeyHash()) || !id.Revoked(key) {
			t.Errorf("uuid %s, key %s", id.ID(), id.KeyHash())
		}
		if _, ok := id.Party(); ok || id.TrustDomain() != ca.TrustDomain {
			t.Errorf("party %v, trust domain %q", ok, id.TrustDomain())
		}
	}
	ca.Certify(t, id)
	if n, _ := reopen(t, id).Revocations(); n != 7 {
		t.Errorf("revocation set %d, want 7", n)
	}
}

func TestExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		id, gw := ca.Party(t, wire.RoleNode), ca.Party(t, wire.RoleGateway)
		cs := state(t, id, gw)
		if _, err := gw.Verify(cs); err != nil {
			t.Fatal(err)
		}
		time.Sleep(31 * 24 * time.Hour)
		if !id.OutOfTime() {
			t.Error("a leaf of 30 days lives after 31")
		}
		// The chains of a resumed session are those of the first handshake.
		if _, err := gw.Verify(cs); !errors.Is(err, identity.ErrExpired) {
			t.Errorf("got %v, want ErrExpired", err)
		}
	})
	ca := identitytest.NewCA(t)
	if id := ca.Expired(t, wire.RoleRCP); !id.OutOfTime() || !id.RenewalDue() {
		t.Error("not expired")
	}
	// Made while the clock was ahead, which was put right since.
	if id := ca.Early(t, wire.RoleRCP); !id.OutOfTime() || !id.RenewalDue() {
		t.Error("a leaf that begins in ten days counts")
	}
	if id := ca.Party(t, wire.RoleRCP); id.OutOfTime() || id.RenewalDue() {
		t.Error("a fresh leaf does not count")
	}
}

// state is what crypto/tls shows a verifier of the peer's certificate.
func state(t *testing.T, peer, verifier *identity.Identity) tls.ConnectionState {
	t.Helper()
	cert, err := peer.Certificate()
	if err != nil {
		t.Fatal(err)
	}
	var cs tls.ConnectionState
	pool := x509.NewCertPool()
	for n, der := range cert.Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		cs.PeerCertificates = append(cs.PeerCertificates, c)
		if n > 0 {
			pool.AddCert(c)
		}
	}
	chains, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: verifier.Roots(), Intermediates: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err == nil {
		cs.VerifiedChains = chains
	}
	return cs
}

func TestVerify(t *testing.T) {
	ca, foreign := identitytest.NewCA(t), identitytest.NewCA(t)
	gw := ca.Party(t, wire.RoleGateway)
	node := ca.Party(t, wire.RoleNode, identitytest.Name("db-1.example.org", "acme"))
	peer, err := gw.Verify(state(t, node, gw))
	if err != nil {
		t.Fatal(err)
	}
	if peer.Party.ID != node.ID() || peer.Key != node.KeyHash() || peer.Name != "db-1.example.org" || peer.Tenant != "acme" || peer.Pending {
		t.Errorf("peer %+v", peer)
	}
	if _, err := gw.Verify(tls.ConnectionState{}); !errors.Is(err, identity.ErrUntrusted) {
		t.Errorf("no certificate: %v", err)
	}
	if _, err := gw.Verify(state(t, foreign.Party(t, wire.RoleNode), gw)); !errors.Is(err, identity.ErrUntrusted) {
		t.Errorf("a certificate of another CA: %v", err)
	}
	// A sibling intermediate of the same root verifies for crypto/tls, not for us.
	other := ca.Pending(t, wire.RoleNode)
	cs := chainState(t, ca.Issue(t, other, identitytest.OtherIntermediate()), gw)
	if len(cs.VerifiedChains) == 0 {
		t.Fatal("the chain should verify for crypto/tls")
	}
	if _, err := gw.Verify(cs); !errors.Is(err, identity.ErrUntrusted) {
		t.Errorf("an intermediate for other purposes: %v", err)
	}
	// Revocation holds for connections that were verified before.
	cs = state(t, node, gw)
	if _, err := gw.ApplyRevocations(ca.Revoke(t, 1, node.KeyHash())); err != nil {
		t.Fatal(err)
	}
	if _, err := gw.Verify(cs); !errors.Is(err, identity.ErrRevoked) {
		t.Errorf("a revoked key: %v", err)
	}
	if _, err := gw.VerifyPending(cs); !errors.Is(err, identity.ErrRevoked) {
		t.Errorf("a revoked key on the enrolment ALPN: %v", err)
	}
	if _, err := gw.ApplyRevocations(ca.Revoke(t, 2, wire.KeyOf(ca.Inter))); err != nil {
		t.Fatal(err)
	}
	if _, err := gw.Verify(state(t, ca.Party(t, wire.RoleNode), gw)); !errors.Is(err, identity.ErrRevoked) {
		t.Errorf("a revoked intermediate: %v", err)
	}
}

func chainState(t *testing.T, chain [][]byte, verifier *identity.Identity) tls.ConnectionState {
	t.Helper()
	var cs tls.ConnectionState
	pool := x509.NewCertPool()
	for _, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		cs.PeerCertificates = append(cs.PeerCertificates, c)
		pool.AddCert(c)
	}
	chains, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: verifier.Roots(), Intermediates: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err == nil {
		cs.VerifiedChains = chains
	}
	return cs
}

func TestVerifyPinned(t *testing.T) {
	ca, foreign := identitytest.NewCA(t), identitytest.NewCA(t)
	waiting := ca.Pending(t, wire.RoleNode)
	gw := ca.Party(t, wire.RoleGateway)
	peer, err := waiting.VerifyPinned(state(t, gw, waiting), wire.RoleGateway)
	if err != nil || peer.Party.ID != gw.ID() {
		t.Fatalf("%v %v", peer, err)
	}
	if _, err := waiting.VerifyPinned(state(t, ca.Party(t, wire.RoleRCP), waiting), wire.RoleGateway); !errors.Is(err, identity.ErrWrongRole) {
		t.Errorf("an RCP asks for the token: %v", err)
	}
	if _, err := waiting.VerifyPinned(state(t, foreign.Party(t, wire.RoleGateway), waiting), wire.RoleGateway); !errors.Is(err, identity.ErrUntrusted) {
		t.Errorf("a gateway of another CA: %v", err)
	}
	if _, err := waiting.VerifyPinned(state(t, ca.Expired(t, wire.RoleGateway), waiting), wire.RoleGateway); !errors.Is(err, identity.ErrExpired) {
		t.Errorf("an expired gateway: %v", err)
	}
	noRoot := state(t, gw, waiting)
	noRoot.PeerCertificates = noRoot.PeerCertificates[:2]
	if _, err := waiting.VerifyPinned(noRoot, wire.RoleGateway); !errors.Is(err, identity.ErrUntrusted) {
		t.Errorf("a chain without the root: %v", err)
	}
	self, err := ca.Pending(t, wire.RoleNode).SelfSigned()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := waiting.VerifyPinned(tls.ConnectionState{PeerCertificates: []*x509.Certificate{self.Leaf}}, wire.RoleGateway); !errors.Is(err, identity.ErrUntrusted) || !strings.Contains(err.Error(), identity.WaitsItself) {
		t.Errorf("a self-signed peer: %v", err)
	}
	fresh, err := identity.Open(t.TempDir(), wire.RoleNode)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fresh.VerifyPinned(state(t, gw, waiting), wire.RoleGateway); !errors.Is(err, identity.ErrNotPinned) {
		t.Errorf("nothing pinned: %v", err)
	}
	p, err := gw.VerifyPending(tls.ConnectionState{PeerCertificates: []*x509.Certificate{self.Leaf}})
	if err != nil || !p.Pending || p.Key != wire.KeyOf(self.Leaf) {
		t.Errorf("pending %+v %v", p, err)
	}
	renews := ca.Party(t, wire.RoleNode)
	seen := state(t, gw, renews)
	if _, err := renews.VerifyPinned(seen, wire.RoleGateway); err != nil {
		t.Error(err)
	}
	if _, err := renews.VerifyPinned(seen, wire.RoleRCP); !errors.Is(err, identity.ErrWrongRole) {
		t.Errorf("a chain that was seen before, in another role: %v", err)
	}
	if _, err := renews.ApplyRevocations(ca.Revoke(t, 1, gw.KeyHash())); err != nil {
		t.Fatal(err)
	}
	if _, err := renews.VerifyPinned(seen, wire.RoleGateway); !errors.Is(err, identity.ErrRevoked) {
		t.Errorf("a chain that was seen before, revoked since: %v", err)
	}
}

func TestJoinSource(t *testing.T) {
	mk := func(td string) (wire.JoinCode, string) {
		c := wire.JoinCode{TrustDomain: td, Root: wire.KeyHash(strings.Repeat("0a", 32)), Role: wire.RoleNode, TokenID: "1", Token: "secret"}
		s, err := c.Encode()
		if err != nil {
			t.Fatal(err)
		}
		return c, s
	}
	codes := func(value, stdin string) []identity.Join {
		t.Helper()
		s, err := identity.OpenJoin(value, strings.NewReader(stdin))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(s.String(), "secret") || strings.Contains(s.String(), wire.JoinPrefix) {
			t.Errorf("the source prints the code: %s", s)
		}
		j, err := s.Codes()
		if err != nil {
			t.Fatal(err)
		}
		return j
	}
	_, a := mk("a.sallyport")
	_, b := mk("b.sallyport")
	dir := t.TempDir()
	write(t, dir, "a", []byte(a+"\n"))
	write(t, dir, "b", []byte("\n "+b))
	write(t, dir, ".hidden", []byte("garbage"))
	write(t, dir, "empty", []byte("\n"))
	for name, got := range map[string][]identity.Join{
		"code":     codes(a, ""),
		"stdin":    codes("-", a+"\n"),
		"file":     codes(filepath.Join(dir, "a"), ""),
		"dir":      codes(dir, "")[:1],
		"one of 2": codes(dir, "")[:1],
	} {
		if len(got) != 1 || got[0].Code.TrustDomain != "a.sallyport" {
			t.Errorf("%s: %d codes", name, len(got))
		}
	}
	if n := len(codes(dir, "")); n != 2 {
		t.Errorf("directory: %d codes, want 2", n)
	}
	if n := len(codes(filepath.Join(dir, "missing"), "")); n != 0 {
		t.Errorf("missing file: %d codes", n)
	}
	if n := len(codes("", "")); n != 0 {
		t.Errorf("empty: %d codes", n)
	}
	write(t, dir, "c", []byte("sp1.!!!"))
	s, err := identity.OpenJoin(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := s.Codes(); !errors.Is(err, wire.ErrJoinCode) || len(got) != 2 || !strings.Contains(err.Error(), filepath.Join(dir, "c")) {
		t.Errorf("a malformed file among good ones: %d codes, %v", len(got), err)
	}
	if _, err := identity.OpenJoin("-", strings.NewReader(strings.Repeat("x", 1<<20))); !errors.Is(err, wire.ErrJoinCode) {
		t.Errorf("a long standard input: %v", err)
	}
}

func TestReidentify(t *testing.T) {
	ca := identitytest.NewCA(t)
	id := ca.Party(t, wire.RoleNode)
	uuid, key := id.ID(), id.KeyHash()
	if err := id.Reidentify(); err != nil {
		t.Fatal(err)
	}
	for _, got := range []*identity.Identity{id, reopen(t, id)} {
		if got.ID() == uuid || got.ID() != id.ID() || got.KeyHash() == key || got.KeyHash() != id.KeyHash() || got.TrustDomain() != ca.TrustDomain {
			t.Errorf("id %s (was %s), key %s", got.ID(), uuid, got.KeyHash())
		}
		if _, ok := got.Party(); ok {
			t.Error("it has a certificate")
		}
		if _, err := got.RenewalCSR(false); !errors.Is(err, identity.ErrNoCertificate) {
			t.Errorf("it asks for a renewal: %v", err)
		}
	}
	ca.Certify(t, id)
	if _, err := id.RenewalCSR(false); err != nil {
		t.Error(err)
	}
	if p, ok := reopen(t, id).Party(); !ok || p.ID != id.ID() {
		t.Errorf("party %v", p)
	}
}

// A crash between any two steps leaves the old identity or a new one, never the
// old key under a new UUID: that one is known as another party's.
func TestReidentifyThatACrashInterrupts(t *testing.T) {
	ca := identitytest.NewCA(t)
	write := func(id *identity.Identity, name, text string) {
		if err := os.WriteFile(filepath.Join(id.Dir(), name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	id := ca.Party(t, wire.RoleNode)
	next := wire.NewID()
	write(id, "id-next", string(next)+"\n")
	if got := reopen(t, id); got.ID() != id.ID() || got.KeyHash() != id.KeyHash() {
		t.Errorf("nothing had happened yet, and it is %s", got.ID())
	}
	if _, err := os.Stat(filepath.Join(id.Dir(), "id-next")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the mark stays: %v", err)
	}
	write(id, "id-next", string(next)+"\n")
	if err := os.Remove(filepath.Join(id.Dir(), "chain.pem")); err != nil {
		t.Fatal(err)
	}
	got := reopen(t, id)
	if got.ID() != next || got.KeyHash() == id.KeyHash() {
		t.Errorf("id %s, want %s; same key: %t", got.ID(), next, got.KeyHash() == id.KeyHash())
	}
	if again := reopen(t, id); again.ID() != next || again.KeyHash() != got.KeyHash() {
		t.Error("the next start made it another party again")
	}
}

// Clocks that differ by up to three days change nothing: the peer's clock, and
// that of whoever issued its leaf, may be ahead of ours or behind it.
func TestClocksDaysApart(t *testing.T) {
	ca := identitytest.NewCA(t)
	node := ca.Party(t, wire.RoleNode)
	const life = 14 * 24 * time.Hour // of a gateway's leaf, the shortest
	for _, tc := range []struct {
		skew time.Duration // of the issuer's clock against ours
		good bool
	}{{0, true}, {48 * time.Hour, true}, {71 * time.Hour, true}, {73 * time.Hour, false}, {-72 * time.Hour, true}, {-13 * 24 * time.Hour, true}, {-15 * 24 * time.Hour, false}} {
		there := time.Now().Add(tc.skew)
		gw := ca.Pending(t, wire.RoleGateway)
		chain := ca.Issue(t, gw, identitytest.NotBefore(there.Add(-identity.Backdate)), identitytest.NotAfter(there.Add(life)))
		err := gw.Install(chain)
		if err == nil {
			_, err = node.Verify(state(t, gw, node))
		}
		if (err == nil) != tc.good || !tc.good && !errors.Is(err, identity.ErrExpired) {
			t.Errorf("issued by a clock that is %s ahead of ours: %v", tc.skew, err)
		}
		if !tc.good && err != nil && !strings.Contains(err.Error(), "clock") && !strings.Contains(err.Error(), "valid from") {
			t.Errorf("%v does not speak of clocks", err)
		}
	}
}
