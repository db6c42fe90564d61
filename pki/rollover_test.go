package pki_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
	"sallyport/pki"
)

// enrolled is a party with a leaf, and with the trust document that comes with
// a grant.
func enrolled(t *testing.T, a *pki.Authority, role wire.Role) *identity.Identity {
	t.Helper()
	id := fresh(t, a, role)
	certify(t, a, id)
	return id
}

func certify(t *testing.T, a *pki.Authority, id *identity.Identity) {
	t.Helper()
	req := request(t, a, id, "web")
	chain, err := a.Issue(t.Context(), req)
	if id.Role() == wire.RoleGateway {
		chain, err = a.IssueGateway(t.Context(), id.ID(), req.CSR)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := id.Install(chain); err != nil {
		t.Fatalf("the party does not take its leaf: %v", err)
	}
	trust(t, a, id)
}

func trust(t *testing.T, a *pki.Authority, id *identity.Identity) {
	t.Helper()
	if env, ok := a.Trust(); ok {
		if _, err := id.ApplyTrust(env); err != nil {
			t.Fatalf("the party does not take the trust document: %v", err)
		}
	}
}

// accepts is what a makes of b in the handshake of a channel.
func accepts(t *testing.T, a, b *identity.Identity) error {
	t.Helper()
	cert, err := b.BriefCertificate()
	if err != nil {
		t.Fatal(err)
	}
	cs := tls.ConnectionState{}
	opts := x509.VerifyOptions{Roots: a.Roots(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	for i, der := range cert.Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		cs.PeerCertificates = append(cs.PeerCertificates, c)
		if i > 0 {
			opts.Intermediates.AddCert(c)
		}
	}
	if cs.VerifiedChains, err = cs.PeerCertificates[0].Verify(opts); err != nil {
		return err
	}
	_, err = a.Verify(cs)
	return err
}

func meet(t *testing.T, what string, parties ...*identity.Identity) {
	t.Helper()
	for i, a := range parties {
		for j, b := range parties {
			if i != j {
				if err := accepts(t, a, b); err != nil {
					t.Errorf("%s: party %d refuses party %d: %v", what, i, j, err)
				}
			}
		}
	}
}

// waits is what a party makes of another in an enrolment session, where the
// whole chain is shown.
func waits(t *testing.T, id, gateway *identity.Identity) error {
	t.Helper()
	var cs tls.ConnectionState
	for _, der := range gateway.Chain() {
		cs.PeerCertificates = append(cs.PeerCertificates, leafOf(t, [][]byte{der}))
	}
	_, err := id.VerifyPinned(cs, wire.RoleGateway)
	return err
}

func rotate(t *testing.T, a *pki.Authority, kind string) wire.CAState {
	t.Helper()
	s, err := a.Rotate(t.Context(), kind, 0)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func reopen(t *testing.T, a *pki.Authority, dir string) *pki.Authority {
	t.Helper()
	before := a.State()
	closeIt(t, a)
	a = open(t, dir)
	if now := a.State(); now.Number != before.Number || now.Issuing() != before.Issuing() || len(now.Roots) != len(before.Roots) {
		t.Fatalf("another authority after a restart: %+v, was %+v", now, before)
	}
	return a
}

func TestRotateIntermediate(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	defer func() { closeIt(t, a) }()
	first := a.State().Issuing()
	gateway, old := enrolled(t, a, wire.RoleGateway), enrolled(t, a, wire.RoleNode)
	s := rotate(t, a, wire.RolloverIntermediate)
	if s.Issuing().Key == first.Key || s.Rollover == nil || s.Rollover.From != first.Key || s.Number != 0 {
		t.Fatalf("after rotate: %+v", s)
	}
	if _, err := a.Rotate(t.Context(), wire.RolloverRoot, 0); !errors.Is(err, pki.ErrRollover) {
		t.Errorf("a second rollover: %v", err)
	}
	a = reopen(t, a, dir)
	young := enrolled(t, a, wire.RoleRCP)
	meet(t, "during the overlap", gateway, old, young)
	if got := leafOf(t, young.Chain()[1:]); wire.KeyOf(got) != s.Issuing().Key {
		t.Error("the old intermediate issues")
	}
	certify(t, a, gateway)
	certify(t, a, old)
	if _, err := a.Finish(t.Context(), false, 0); err != nil {
		t.Fatal(err)
	}
	a = reopen(t, a, dir)
	if s := a.State(); s.Rollover != nil || s.Intermediates[0].State != wire.IssuerRetired || s.Roots[0].State != wire.IssuerIssuing {
		t.Errorf("after finish: %+v", s)
	}
	if _, err := os.Stat(filepath.Join(dir, "intermediate.key")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the key of the old intermediate: %v", err)
	}
	meet(t, "afterwards", gateway, old, young)
	if _, err := a.Finish(t.Context(), false, 0); !errors.Is(err, pki.ErrRollover) {
		t.Errorf("a second finish: %v", err)
	}
	if _, err := a.Abort(t.Context(), 0); !errors.Is(err, pki.ErrRollover) {
		t.Errorf("an abort of nothing: %v", err)
	}
	if _, err := a.Rotate(t.Context(), "leaf", 0); !errors.Is(err, pki.ErrRollover) {
		t.Errorf("a rollover of leaves: %v", err)
	}
}

// What the intermediate that was given up has signed is refused as soon as a
// party holds the set that names it: its key may lie in a stolen backup.
func TestGivenUpIntermediate(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	defer func() { closeIt(t, a) }()
	party, lost := enrolled(t, a, wire.RoleRCP), enrolled(t, a, wire.RoleNode)
	forged, err := a.SignRevocations(t.Context(), wire.Revocations{Number: 1 << 40}, 0) // by the thief, before anybody knew
	if err != nil {
		t.Fatal(err)
	}
	thief := t.TempDir()
	if err := os.CopyFS(thief, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	first := a.State().Issuing()
	if err := os.Remove(filepath.Join(dir, "revocations.json")); err != nil {
		t.Fatal(err)
	}
	a = reopen(t, a, dir)
	rotate(t, a, wire.RolloverIntermediate)
	certify(t, a, party)
	if _, err := a.Finish(t.Context(), false, 0); err != nil {
		t.Fatal(err)
	}
	set, err := a.SignRevocations(t.Context(), wire.Revocations{Number: 1, Revoked: []wire.Revocation{{Key: first.Key}}}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := party.ApplyRevocations(set); err != nil {
		t.Fatal(err)
	}
	if err := accepts(t, party, lost); !errors.Is(err, identity.ErrRevoked) {
		t.Errorf("a leaf of the old intermediate: %v", err)
	}
	if !party.Ended(identity.Peer{Issuer: first.Key}) {
		t.Error("what it vouched for goes on")
	}
	if _, err := party.ApplyRevocations(forged); !errors.Is(err, identity.ErrRevoked) {
		t.Errorf("a revocation set of the old intermediate: %v", err)
	}
	stolen := open(t, thief)
	defer closeIt(t, stolen)
	rotate(t, stolen, wire.RolloverRoot)
	if _, err := stolen.Abort(t.Context(), 1<<40); err != nil { // a trust document by the old intermediate
		t.Fatal(err)
	}
	env, ok := stolen.Trust()
	if !ok {
		t.Fatal("no trust document")
	}
	if _, err := party.ApplyTrust(env); !errors.Is(err, identity.ErrRevoked) {
		t.Errorf("a trust document of the old intermediate: %v", err)
	}
}

func TestRotateRoot(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	defer func() { closeIt(t, a) }()
	firstRoot := a.Root()
	gateway, online, away := enrolled(t, a, wire.RoleGateway), enrolled(t, a, wire.RoleNode), enrolled(t, a, wire.RoleNode)
	code := fresh(t, a, wire.RoleNode) // pinned to the old root, not enrolled yet
	if _, err := a.SignRevocations(t.Context(), wire.Revocations{Number: 1}, 0); err != nil {
		t.Fatal(err)
	}
	set, _ := a.Revocations()
	if _, err := online.ApplyRevocations(set); err != nil {
		t.Fatal(err)
	}

	s := rotate(t, a, wire.RolloverRoot)
	if a.Root().Equal(firstRoot) || s.Number != 1 || len(s.Roots) != 2 || a.TrustDomain() != gateway.TrustDomain() {
		t.Fatalf("after rotate: %+v", s)
	}
	a = reopen(t, a, dir)
	rcp := enrolled(t, a, wire.RoleRCP) // by a code that pins the new root
	meet(t, "a new party among those that know nothing yet", online, away, gateway)
	if err := accepts(t, online, rcp); err != nil {
		t.Errorf("a party that knows only the old root refuses a new one: %v", err)
	}
	certify(t, a, gateway)
	if err := accepts(t, away, gateway); err != nil {
		t.Errorf("a party that knows only the old root refuses the gateway: %v", err)
	}
	if err := waits(t, code, gateway); err != nil {
		t.Errorf("a join code that pins the old root: %v", err)
	}
	certify(t, a, code)
	meet(t, "during the overlap", gateway, rcp, code)
	first, _ := a.Trust()
	certify(t, a, online)

	if _, err := a.Finish(t.Context(), false, 0); err != nil {
		t.Fatal(err)
	}
	a = reopen(t, a, dir)
	for _, id := range []*identity.Identity{gateway, rcp, code, online} {
		trust(t, a, id)
	}
	meet(t, "afterwards", gateway, rcp, code, online)
	if err := accepts(t, online, away); err == nil {
		t.Error("the old root is trusted still")
	}
	if _, err := online.ApplyTrust(first); !errors.Is(err, identity.ErrOlder) {
		t.Errorf("an older trust document: %v", err)
	}
	again, err := identity.Open(online.Dir(), wire.RoleNode)
	if err != nil {
		t.Fatalf("the party does not start with what it had from the old root: %v", err)
	}
	if err := accepts(t, again, away); err == nil {
		t.Error("the old root is trusted again after a restart")
	}
	meet(t, "after a restart", gateway, again)
	// Its leaf was issued in the overlap; only the new root's word counts now.
	if cert, err := online.BriefCertificate(); err != nil || len(cert.Certificate) != 2 {
		t.Errorf("%d certificates in a handshake, %v", len(cert.Certificate), err)
	}

	// The party that was away all the time.
	certify(t, a, gateway)
	trust(t, a, gateway)
	if err := waits(t, away, gateway); err != nil {
		t.Fatalf("a party that was away cannot be helped: %v", err)
	}
	certify(t, a, away)
	meet(t, "back again", gateway, rcp, code, online, away)
	if err := away.Pin(wire.KeyOf(a.Root()), a.TrustDomain()); err != nil {
		t.Errorf("a code that pins the new root: %v", err)
	}
}

func TestForgetRoot(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	defer func() { closeIt(t, a) }()
	gateway, away := enrolled(t, a, wire.RoleGateway), enrolled(t, a, wire.RoleNode)
	rotate(t, a, wire.RolloverRoot)
	certify(t, a, gateway)
	if _, err := a.Finish(t.Context(), true, 0); err != nil {
		t.Fatal(err)
	}
	a = reopen(t, a, dir)
	certify(t, a, gateway)
	if len(gateway.Chain()) != 3 {
		t.Errorf("chain of %d certificates, want leaf, intermediate, root", len(gateway.Chain()))
	}
	if err := waits(t, away, gateway); err == nil {
		t.Error("the forgotten root still vouches")
	}
	if _, err := os.Stat(filepath.Join(dir, "root.key")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the key of the forgotten root: %v", err)
	}
}

func TestAbortRoot(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	defer func() { closeIt(t, a) }()
	firstRoot, first := a.Root(), a.State().Issuing()
	gateway, old := enrolled(t, a, wire.RoleGateway), enrolled(t, a, wire.RoleNode)
	rotate(t, a, wire.RolloverRoot)
	moved := enrolled(t, a, wire.RoleNode)
	code := fresh(t, a, wire.RoleRCP) // pins the new root
	s, err := a.Abort(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	if !a.Root().Equal(firstRoot) || s.Issuing().Key != first.Key || !s.Rollover.Aborted || s.Number != 8 {
		t.Fatalf("after abort: %+v", s)
	}
	a = reopen(t, a, dir)
	certify(t, a, gateway)
	meet(t, "on the way back", gateway, moved)
	if err := accepts(t, old, moved); err != nil {
		t.Error(err)
	}
	if err := waits(t, code, gateway); err != nil {
		t.Errorf("a join code that pins the new root: %v", err)
	}
	certify(t, a, code)
	certify(t, a, moved)
	if _, err := a.Finish(t.Context(), false, 0); err != nil {
		t.Fatal(err)
	}
	a = reopen(t, a, dir)
	for _, id := range []*identity.Identity{gateway, moved, code, old} {
		trust(t, a, id)
		certify(t, a, id)
	}
	meet(t, "back again", gateway, moved, code, old)
}

// Rollover after rollover: chains stay within what a party takes.
func TestManyRollovers(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	defer func() { closeIt(t, a) }()
	gateway, id := enrolled(t, a, wire.RoleGateway), enrolled(t, a, wire.RoleNode)
	for n := range 5 {
		away := enrolled(t, a, wire.RoleNode)
		kind := wire.RolloverRoot
		if n%2 == 1 {
			kind = wire.RolloverIntermediate
		}
		rotate(t, a, kind)
		certify(t, a, gateway)
		certify(t, a, id)
		if _, err := a.Finish(t.Context(), false, 0); err != nil {
			t.Fatal(err)
		}
		a = reopen(t, a, dir)
		certify(t, a, gateway)
		certify(t, a, id)
		if err := waits(t, away, gateway); err != nil {
			t.Errorf("after rollover %d: %v", n+1, err)
		}
		certify(t, a, away)
		meet(t, "after a rollover", gateway, id, away)
	}
}

// A crash before the ledger is written leaves an authority that works as
// before, and rotates when it is asked again.
func TestInterruptedRotation(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	rotate(t, a, wire.RolloverRoot)
	closeIt(t, a)
	for _, name := range []string{"issuers.json", "trust.json"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	a = open(t, dir)
	defer func() { closeIt(t, a) }()
	gateway, id := enrolled(t, a, wire.RoleGateway), enrolled(t, a, wire.RoleNode)
	if len(id.Chain()) != 3 {
		t.Errorf("chain of %d certificates", len(id.Chain()))
	}
	rotate(t, a, wire.RolloverRoot)
	if _, err := a.Finish(t.Context(), false, 0); err != nil {
		t.Fatal(err)
	}
	a = reopen(t, a, dir)
	certify(t, a, gateway)
	if err := waits(t, id, gateway); err != nil {
		t.Error(err)
	}
	// When the old key is gone, a lost ledger is damage.
	closeIt(t, a)
	if err := os.Remove(filepath.Join(dir, "issuers.json")); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.Open(t.Context(), dir, slog.New(slog.DiscardHandler)); !errors.Is(err, pki.ErrDamaged) {
		t.Errorf("without its ledger: %v", err)
	}
	a = open(t, t.TempDir())
}

// A crash between the ledger and its trust document: the one that is signed at
// the next start is numbered above what parties hold, or none would take it.
func TestTrustNumberOutlivesACrash(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	defer func() { closeIt(t, a) }()
	if s, err := a.Rotate(t.Context(), wire.RolloverRoot, 41); err != nil || s.Number != 42 {
		t.Fatalf("%+v: %v", s, err)
	}
	closeIt(t, a)
	if err := os.Remove(filepath.Join(dir, "trust.json")); err != nil {
		t.Fatal(err)
	}
	a = open(t, dir)
	if s := a.State(); s.Number != 42 {
		t.Errorf("trust document %d after the crash, want 42", s.Number)
	}
}

// A crash, or a full disk, between a finish and the deletion of the keys that it
// gave up leaves none for good.
func TestInterruptedFinish(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	defer func() { closeIt(t, a) }()
	openDoors(t, a, "")
	given := []string{"root.key", "intermediate.key", "doors.key"}
	keys := map[string][]byte{}
	for _, name := range given {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		keys[name] = b
	}
	rotate(t, a, wire.RolloverRoot)
	if _, err := a.Finish(t.Context(), true, 0); err != nil {
		t.Fatal(err)
	}
	for name, b := range keys {
		if exists(t, dir, name) {
			t.Errorf("%s is there after finish", name)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a = reopen(t, a, dir)
	openDoors(t, a, "")
	for _, name := range given {
		if exists(t, dir, name) {
			t.Errorf("%s is there after a restart", name)
		}
	}
	for _, name := range []string{"root-2.key", "intermediate-2.key", "doors-2.key"} {
		if !exists(t, dir, name) {
			t.Errorf("%s is in use, and gone", name)
		}
	}
}

// What an operator is told before another root is made is what happens then.
func TestForgottenRootsAreForeseen(t *testing.T) {
	a := open(t, t.TempDir())
	defer func() { closeIt(t, a) }()
	for range wire.MaxRoots + 1 {
		want := a.State().Forgotten(true)
		rotate(t, a, wire.RolloverRoot)
		if got := a.State().Forgotten(false); !maps.Equal(got, want) {
			t.Errorf("forgotten are %v, foreseen were %v", got, want)
		}
		if _, err := a.Finish(t.Context(), false, 0); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(a.State().Forgotten(false)); n != 2 {
		t.Errorf("%d roots are forgotten, want 2", n)
	}
}

// A root that is in use goes on vouching, and its key stays, however many new
// ones were begun and aborted since.
func TestAbortedRolloversForgetNoRootInUse(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	defer func() { closeIt(t, a) }()
	node, gateway := enrolled(t, a, wire.RoleNode), enrolled(t, a, wire.RoleGateway)
	for range wire.MaxRoots - 1 {
		rotate(t, a, wire.RolloverRoot)
		if _, err := a.Abort(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Finish(t.Context(), false, 0); err != nil {
			t.Fatal(err)
		}
		trust(t, a, node)
		certify(t, a, gateway)
	}
	rotate(t, a, wire.RolloverRoot)
	certify(t, a, gateway)
	if err := accepts(t, node, gateway); err != nil {
		t.Errorf("a node that was away: %v", err)
	}
	a = reopen(t, a, dir)
	if !exists(t, dir, "root.key") || exists(t, dir, "root-2.key") {
		t.Error("want the key of the root in use, and not that of the first that was given up")
	}
	if _, err := a.Abort(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Finish(t.Context(), false, 0); err != nil {
		t.Fatal(err)
	}
	rotate(t, a, wire.RolloverIntermediate)
	a = reopen(t, a, dir)
	certify(t, a, node)
}
