package pki_test

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
	"sallyport/pki"
)

// issuer is a root of the stranger with the intermediate that it issues from.
type issuer struct {
	root, inter       *x509.Certificate
	rootKey, interKey *ecdsa.PrivateKey
	crosses           []*x509.Certificate
}

func (s *stranger) issuer() issuer { return issuer{s.root, s.inter, s.rootKey, s.interKey, s.crosses} }

func (s *stranger) use(i issuer) {
	s.root, s.rootKey = i.root, i.rootKey
	s.newIntermediate() // for a server below that root
	s.inter, s.interKey, s.crosses = i.inter, i.interKey, i.crosses
	s.server.CloseClientConnections() // as if it had been started anew
}

// next makes a new root with an intermediate, for which the one in use vouches
// too.
func (s *stranger) next() issuer {
	i := issuer{rootKey: identitytest.NewKey(s.t), interKey: identitytest.NewKey(s.t)}
	i.root = newRoot(s.t, "root 2", i.rootKey)
	i.inter = s.intermediate(i.root, i.rootKey, i.interKey)
	i.crosses = []*x509.Certificate{s.intermediate(s.root, s.rootKey, i.interKey)}
	s.offered = append(s.offered, i.root)
	return i
}

func (s *stranger) follow(a *pki.Authority, root *x509.Certificate, alone bool) (wire.CAState, error) {
	sum := sha256.Sum256(root.Raw)
	return a.Follow(s.t.Context(), sum[:], alone, 0)
}

// A new root of the external CA is followed from the moment that an operator
// names it, and the old root's parties follow by what the old root vouches for.
func TestExternalRootIsFollowed(t *testing.T) {
	s, dir := newStranger(t), t.TempDir()
	first := s.option()
	a := open(t, dir, first)
	defer func() { closeIt(t, a) }()
	again := func() {
		closeIt(t, a)
		a = open(t, dir, first)
	}
	gateway, node, away := enrolled(t, a, wire.RoleGateway), enrolled(t, a, wire.RoleNode), enrolled(t, a, wire.RoleNode)
	old, next := s.issuer(), s.next()

	// What the external CA does alone is not followed.
	s.use(issuer{next.root, next.inter, next.rootKey, next.interKey, nil})
	if _, err := a.Issue(t.Context(), request(t, a, fresh(t, a, wire.RoleNode), "x")); !errors.Is(err, pki.ErrExternal) {
		t.Errorf("a root that nobody named issues: %v", err)
	}
	if _, err := s.follow(a, next.root, false); !errors.Is(err, pki.ErrExternal) {
		t.Errorf("a root was named at a server that the old root does not vouch for: %v", err)
	}
	s.use(old)
	if _, err := s.follow(a, newStranger(t).issuer().root, false); !errors.Is(err, pki.ErrRollover) || !strings.Contains(err.Error(), "knows none") {
		t.Errorf("a root that it does not have was named: %v", err)
	}

	state, err := s.follow(a, next.root, false)
	if err != nil {
		t.Fatal(err)
	}
	if r := state.Rollover; r == nil || !r.Named || r.From != r.To || state.Number != 1 || len(state.Roots) != 2 {
		t.Fatalf("after it was named: %+v", state)
	}
	for _, id := range []*identity.Identity{gateway, node} {
		trust(t, a, id)
	}
	if _, err := a.Finish(t.Context(), false, 0); !errors.Is(err, pki.ErrRollover) {
		t.Errorf("finished while the old root issues: %v", err)
	}
	again()

	// Without the word of the old root its intermediate is not taken over.
	s.use(issuer{next.root, next.inter, next.rootKey, next.interKey, nil})
	if err := a.KeepNow(t.Context()); !errors.Is(err, pki.ErrExternal) || !strings.Contains(err.Error(), "--without-cross") {
		t.Errorf("taken over without the old root's word: %v", err)
	}
	if st := a.State(); !strings.Contains(st.Rollover.Waits, "crt") || st.Issuing().Root != 1 {
		t.Errorf("%+v", st.Rollover)
	}
	s.use(next)
	if err := a.KeepNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	state = a.State()
	if state.Rollover.Named || state.Rollover.From == state.Rollover.To || state.RootOf(state.Issuing().Key).Key != wire.KeyOf(next.root) || state.Rollover.Waits != "" {
		t.Fatalf("not taken over: %+v", state)
	}
	again()
	certify(t, a, gateway)
	meet(t, "while the node has its old leaf", gateway, node)
	certify(t, a, node)
	meet(t, "on the new root", gateway, node)
	if !a.Root().Equal(next.root) {
		t.Error("join codes pin the old root")
	}
	// One that heard nothing of it believes the gateway by the old root.
	if err := accepts(t, away, gateway); err != nil {
		t.Errorf("a party that was away refuses the gateway: %v", err)
	}
	if _, err := a.SignRevocations(t.Context(), wire.Revocations{Number: 5}, 0); err != nil {
		t.Fatal(err)
	}

	if state, err = a.Finish(t.Context(), false, 0); err != nil {
		t.Fatal(err)
	}
	if state.Rollover != nil || state.Roots[0].State != wire.IssuerRetired || state.Intermediates[0].State != wire.IssuerRetired {
		t.Fatalf("%+v", state)
	}
	trust(t, a, gateway)
	trust(t, a, node)
	meet(t, "after it", gateway, node)
	if err := accepts(t, gateway, away); !isUntrusted(err) {
		t.Errorf("the old root counts: %v", err)
	}
	if err := waits(t, away, gateway); err != nil {
		t.Errorf("a party that was away cannot be renewed: %v", err)
	}
	certify(t, a, away)
	meet(t, "who was away", gateway, node, away)
	// The setting may name either root; the old intermediate issues no more.
	again()
	closeIt(t, a)
	a = open(t, dir, s.option())
	s.use(old)
	if _, err := a.Issue(t.Context(), request(t, a, fresh(t, a, wire.RoleNode), "x")); !errors.Is(err, pki.ErrExternal) {
		t.Errorf("the old root issues again: %v", err)
	}
}

// TestExternalIntermediateIsFollowed: another intermediate of the same root is
// taken over before anybody asks for a leaf, once for each time that it changes,
// and so is the way back.
func TestExternalIntermediateIsFollowed(t *testing.T) {
	s := newStranger(t)
	a := open(t, t.TempDir(), s.option())
	defer closeIt(t, a)
	first := s.issuer()
	s.newIntermediate()
	second := s.issuer()
	for n, now := range []issuer{second, first, second} {
		s.use(now)
		if err := a.KeepNow(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := a.State().Issuing().Key; got != wire.KeyOf(now.inter) {
			t.Fatalf("change %d: it issues from %s", n, got.Fingerprint())
		}
		if _, err := a.Issue(t.Context(), request(t, a, fresh(t, a, wire.RoleNode), "web-1")); err != nil {
			t.Errorf("change %d: the next leaf: %v", n, err)
		}
	}
	// It says that it issues from another one, and does not: the leaf that seals
	// documents is not renewed each minute because of that.
	if _, err := a.SignRevocations(t.Context(), wire.Revocations{Number: 1}, 0); err != nil {
		t.Fatal(err)
	}
	s.says = s.intermediate(s.root, s.rootKey, identitytest.NewKey(t))
	for range 3 {
		if err := a.KeepNow(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if env, _ := a.Revocations(); number(t, env) > 2 {
		t.Errorf("the set was sealed again and again: number %d", number(t, env))
	}
}

// TestSetIsSealedAgain: what came between the next leaf for documents and the set that
// it is to seal, a crash or a full disk, is made good. Newcomers could not verify the
// set when the old leaf has ended, which nobody would think of before the next one.
func TestSetIsSealedAgain(t *testing.T) {
	s, dir := newStranger(t), t.TempDir()
	a := open(t, dir, s.option())
	defer func() { closeIt(t, a) }()
	if _, err := a.SignRevocations(t.Context(), wire.Revocations{Number: 1}, 0); err != nil {
		t.Fatal(err)
	}
	file, old := filepath.Join(dir, "revocations.json"), keyFile(t, dir, "revocations.json")
	for n, again := range []func(){
		func() {},
		func() {
			closeIt(t, a)
			a = open(t, dir, s.option())
		},
	} {
		before, _ := a.Revocations()
		s.newIntermediate()
		if err := errors.Join(os.Remove(file), os.Mkdir(file, 0o700)); err != nil {
			t.Fatal(err)
		}
		if err := a.KeepNow(t.Context()); err == nil {
			t.Fatal("a set was signed that cannot be written")
		}
		if err := errors.Join(os.Remove(file), os.WriteFile(file, []byte(old), 0o600)); err != nil {
			t.Fatal(err)
		}
		again()
		for range 2 { // the second one has nothing to do
			if err := a.KeepNow(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		env, _ := a.Revocations()
		if slices.Equal(env.Chain[0], before.Chain[0]) || number(t, env) != number(t, before)+1 {
			t.Errorf("%d: number %d after %d, sealed by the leaf before: %t", n, number(t, env), number(t, before), slices.Equal(env.Chain[0], before.Chain[0]))
		}
		old = keyFile(t, dir, "revocations.json")
	}
}

// TestExternalBelowAnotherRoot: a CA whose own server is below a root that nobody
// named, or that was given up, is told from one that is away.
func TestExternalBelowAnotherRoot(t *testing.T) {
	s := newStranger(t)
	a := open(t, t.TempDir(), s.option())
	defer closeIt(t, a)
	first, second := s.issuer(), s.next()
	_, err := s.follow(a, second.root, false)
	if err != nil {
		t.Fatal(err)
	}
	s.use(second)
	if err := a.KeepNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Finish(t.Context(), false, 0); err != nil {
		t.Fatal(err)
	}
	third := s.next()
	for what, c := range map[string]struct {
		now  issuer
		want string
	}{
		"given up": {first, "root 1, which was given up at"},
		"unnamed":  {third, "ca rotate root --fingerprint"},
	} {
		s.use(c.now)
		if _, err := a.Issue(t.Context(), request(t, a, fresh(t, a, wire.RoleNode), "web-1")); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", what, err)
		}
		_, err := s.follow(a, third.root, false)
		if !errors.Is(err, pki.ErrExternal) || !strings.Contains(err.Error(), c.want) || errors.As(err, new(*url.Error)) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func isUntrusted(err error) bool {
	unknown := x509.UnknownAuthorityError{}
	return errors.As(err, &unknown) || errors.Is(err, identity.ErrUntrusted)
}

// Without the old root's key the new intermediate may issue alone, when the
// operator says so in a second step.
func TestExternalRootWithoutCross(t *testing.T) {
	s := newStranger(t)
	a := open(t, t.TempDir(), s.option())
	defer func() { closeIt(t, a) }()
	gateway, node := enrolled(t, a, wire.RoleGateway), enrolled(t, a, wire.RoleNode)
	next := s.next()
	next.crosses = nil
	if _, err := s.follow(a, next.root, true); !errors.Is(err, pki.ErrRollover) {
		t.Errorf("in one step: %v", err)
	}
	for _, alone := range []bool{false, true} {
		if _, err := s.follow(a, next.root, alone); err != nil {
			t.Fatal(err)
		}
	}
	trust(t, a, gateway)
	trust(t, a, node)
	s.use(next)
	if err := a.KeepNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	certify(t, a, gateway)
	meet(t, "one on each root", gateway, node)
	certify(t, a, node)
	if _, err := a.Finish(t.Context(), true, 0); err != nil {
		t.Fatal(err)
	}
	trust(t, a, gateway)
	trust(t, a, node)
	meet(t, "after it", gateway, node)
}

// Before it issues the new root can be given up, and named again; afterwards the
// external CA goes back first.
func TestExternalRootIsAborted(t *testing.T) {
	s, dir := newStranger(t), t.TempDir()
	first := s.option()
	a := open(t, dir, first)
	defer func() { closeIt(t, a) }()
	gateway, node := enrolled(t, a, wire.RoleGateway), enrolled(t, a, wire.RoleNode)
	old, next := s.issuer(), s.next()
	if _, err := a.Abort(t.Context(), 0); !errors.Is(err, pki.ErrRollover) {
		t.Errorf("nothing to abort: %v", err)
	}
	for range 2 {
		if _, err := s.follow(a, next.root, false); err != nil {
			t.Fatal(err)
		}
		trust(t, a, node)
		if _, err := s.follow(a, s.next().root, false); !errors.Is(err, pki.ErrRollover) {
			t.Errorf("two at once: %v", err)
		}
		if state, err := a.Abort(t.Context(), 0); err != nil || len(state.Roots) != 1 {
			t.Fatalf("%+v, %v", state, err)
		}
		closeIt(t, a)
		a = open(t, dir, first)
	}
	if _, err := s.follow(a, next.root, false); err != nil {
		t.Fatal(err)
	}
	s.use(next)
	if err := a.KeepNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	certify(t, a, gateway)
	certify(t, a, node)
	if _, err := a.Abort(t.Context(), 0); !errors.Is(err, pki.ErrRollover) {
		t.Errorf("aborted while the new root issues: %v", err)
	}
	s.use(old)
	if err := a.KeepNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	certify(t, a, node)
	certify(t, a, gateway)
	state, err := a.Abort(t.Context(), 0)
	if err != nil || state.Rollover != nil || state.Intermediates[1].State != wire.IssuerRetired {
		t.Fatalf("%+v, %v", state, err)
	}
	trust(t, a, gateway)
	trust(t, a, node)
	meet(t, "back again", gateway, node)
	if _, err := s.follow(a, next.root, false); !errors.Is(err, pki.ErrRollover) {
		t.Errorf("a root that was given up is named again: %v", err)
	}
}

// A root that is named must be one.
func TestExternalRootIsExamined(t *testing.T) {
	s := newStranger(t)
	a := open(t, t.TempDir(), s.option())
	defer closeIt(t, a)
	key := identitytest.NewKey(t)
	make := func(change func(*x509.Certificate)) *x509.Certificate {
		tmpl := &x509.Certificate{NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(5, 0, 0), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
		change(tmpl)
		return signed(t, tmpl, tmpl, &key.PublicKey, key)
	}
	for name, root := range map[string]*x509.Certificate{
		"no CA":         make(func(c *x509.Certificate) { c.IsCA = false }),
		"soon over":     make(func(c *x509.Certificate) { c.NotAfter = time.Now().AddDate(0, 1, 0) }),
		"not yet":       make(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }),
		"the same":      s.root,
		"the same key":  newRoot(t, "again", s.rootKey),
		"not its own":   s.inter,
		"of no account": signed(t, &x509.Certificate{URIs: []*url.URL{{Scheme: "spiffe", Host: strangerDomain}}}, s.root, &key.PublicKey, s.rootKey),
	} {
		s.offered = []*x509.Certificate{root}
		if state, err := s.follow(a, root, false); !errors.Is(err, pki.ErrRollover) {
			t.Errorf("%s: %+v, %v", name, state, err)
		}
	}
	s.offered = nil
	if _, err := s.follow(a, newRoot(t, "unknown", key), false); !errors.Is(err, pki.ErrExternal) {
		t.Errorf("a root that the external CA does not have: %v", err)
	}
	own := open(t, t.TempDir())
	defer closeIt(t, own)
	if _, err := s.follow(own, s.root, false); !errors.Is(err, pki.ErrRollover) {
		t.Errorf("an authority of its own: %v", err)
	}
}
