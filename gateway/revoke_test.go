package gateway

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/doors"
	"sallyport/internal/enroll"
	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

func TestRevokeAndEnrolAgain(t *testing.T) {
	t.Parallel()
	for _, remove := range []bool{false, true} {
		d := newDesk(t)
		a := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
		n, err := d.store.Node(t.Context(), a.id.ID())
		if err != nil {
			t.Fatal(err)
		}
		number, err := d.revokeNode(t.Context(), n, remove)
		if err != nil || number != 1 || !d.id.Revoked(a.id.KeyHash()) {
			t.Fatalf("number %d, %v", number, err)
		}
		if !slices.Contains(d.told[a.id.ID()], "PUT /v1/revocations") {
			t.Error("the node was not told")
		}
		_, err = d.store.Node(t.Context(), a.id.ID())
		if remove != errors.Is(err, store.ErrNotFound) {
			t.Errorf("remove %v: %v", remove, err)
		}
		d.see(a)
		if s := a.Status(); s.State != enroll.StateEnrolled {
			t.Fatalf("status %+v", s)
		}
		// It learns of it, gets a new code, makes a new key and keeps its UUID.
		env, _ := d.ca.Revocations()
		if _, err := a.id.ApplyRevocations(env); err != nil {
			t.Fatal(err)
		}
		uuid, old := a.id.ID(), a.id.KeyHash()
		b := d.partyOf(a.id, d.join(api.CreateJoin{Name: "web"}), "")
		d.see(b)
		if err := b.Ready(); err != nil || b.id.ID() != uuid || b.id.KeyHash() == old {
			t.Errorf("remove %v: enrols again: %v", remove, err)
		}
		if n, err := d.store.Node(t.Context(), uuid); err != nil || n.State == wire.StateRevoked || n.KeyHash != b.id.KeyHash() {
			t.Errorf("node %+v %v", n, err)
		}
	}
}

// A code that many hold gives none of them the UUID of a node that is gone, with
// the tags that operators gave it.
func TestUUIDOfANodeThatIsGoneWaitsForAnOperator(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		remove bool
		join   api.CreateJoin
		waits  bool
	}{
		{"revoked, a code for many", false, api.CreateJoin{Uses: 5}, true},
		{"removed, a code for many", true, api.CreateJoin{Uses: 5}, true},
		{"removed, no token", true, api.CreateJoin{Manual: true}, true},
		{"removed, a code for one", true, api.CreateJoin{}, false},
		{"removed, a code that replaces", true, api.CreateJoin{Name: "web", Replace: true}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDesk(t)
			a := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
			err := d.store.Update(t.Context(), func(ctx context.Context, tx *store.Tx) error {
				return tx.TagNode(ctx, a.id.ID(), map[string]string{"role": "vault"}, nil)
			})
			if err != nil {
				t.Fatal(err)
			}
			n, err := d.store.Node(t.Context(), a.id.ID())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := d.revokeNode(t.Context(), n, c.remove); err != nil {
				t.Fatal(err)
			}
			env, _ := d.ca.Revocations()
			if _, err := a.id.ApplyRevocations(env); err != nil {
				t.Fatal(err)
			}
			b := d.partyOf(a.id, d.join(c.join), "web")
			d.see(b)
			if !c.waits {
				d.expect(b, enroll.StateEnrolled, "")
				return
			}
			d.expect(b, enroll.StateWaiting, wire.EnrollUUIDInUse)
			list := d.requests(api.RequestPending)
			if len(list) != 1 || list[0].Code != wire.EnrollUUIDInUse {
				t.Fatalf("requests %+v", list)
			}
			if _, err := d.grant(t.Context(), list[0].ID, api.Grant{}); !api.Is(err, api.CodeNameInUse) {
				t.Fatalf("granted without --replace: %v", err)
			}
			if _, err := d.grant(t.Context(), list[0].ID, api.Grant{Replace: true}); err != nil {
				t.Fatal(err)
			}
			d.see(b)
			d.expect(b, enroll.StateEnrolled, "")
		})
	}
}

func TestRevocationsMergeAtStart(t *testing.T) {
	t.Parallel()
	ca := &memoryCA{CA: identitytest.NewCA(t), t: t}
	id := ca.Party(t, wire.RoleGateway)
	dir := t.TempDir()
	d := newDeskOn(t, ca, filepath.Join(dir, "a.db"), id)
	a := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
	n, err := d.store.Node(t.Context(), a.id.ID())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.revokeNode(t.Context(), n, false); err != nil {
		t.Fatal(err)
	}
	// A wiped database still revokes what the authority signed.
	d = newDeskOn(t, ca, filepath.Join(dir, "b.db"), id)
	keys, err := d.store.RevokedKeys(t.Context())
	if err != nil || len(keys) != 1 || keys[0].KeyHash != a.id.KeyHash() {
		t.Fatalf("keys %+v %v", keys, err)
	}
	b := d.enrolled(d.join(api.CreateJoin{Name: "db"}), "")
	if n, err = d.store.Node(t.Context(), b.id.ID()); err != nil {
		t.Fatal(err)
	}
	if number, err := d.revokeNode(t.Context(), n, false); err != nil || number != 2 {
		t.Errorf("number %d %v, want 2", number, err)
	}
	if !d.id.Revoked(a.id.KeyHash()) || !d.id.Revoked(b.id.KeyHash()) {
		t.Error("a revocation was lost")
	}
	// A party with a newer set than ours: all our copies are old.
	victim := wire.KeyHash(strings.Repeat("cd", 32))
	newer := ca.Revoke(t, 9, victim)
	d.answer = func(_ wire.Party, method, _ string, _, out any) error {
		if env, ok := out.(*wire.Envelope); ok && method == http.MethodGet {
			*env = newer
		}
		return nil
	}
	rcp := wire.Party{Role: wire.RoleRCP, ID: wire.NewID(), TrustDomain: ca.TrustDomain}
	if err := d.deliverRevocations(t.Context(), rcp.ID, &wire.Hello{Party: rcp, Revocations: 9}); err != nil {
		t.Fatal(err)
	}
	if number, _ := d.id.Revocations(); number != 10 || !d.id.Revoked(victim) || !d.id.Revoked(b.id.KeyHash()) {
		t.Errorf("number %d, want 10 with all keys", number)
	}
	if err := d.deliverRevocations(t.Context(), rcp.ID, &wire.Hello{Party: rcp, Revocations: 3}); err != nil {
		t.Fatal(err)
	}
	if got := d.told[rcp.ID]; got[len(got)-1] != "PUT /v1/revocations" {
		t.Errorf("a party with an older set was told %v", got)
	}
}

func TestRevocationIsSignedLater(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
	n, err := d.store.Node(t.Context(), a.id.ID())
	if err != nil {
		t.Fatal(err)
	}
	d.ca.fail = errors.New("the authority is away")
	_, err = d.revokeNode(t.Context(), n, false)
	if p := (*api.Problem)(nil); !errors.As(err, &p) || p.Code != api.CodeUnavailable || !strings.Contains(p.Detail, "revoked here") {
		t.Errorf("an operator is told %v", err)
	}
	d.see(a)      // not in the signed set, and refused all the same
	for range 3 { // it is asked each minute
		if err := d.publish(t.Context(), nil); !errors.Is(err, errAuthority) {
			t.Errorf("while the authority is away: %v", err)
		}
	}
	if n := d.audited("revocations.sign"); n != 0 {
		t.Errorf("the audit log has %d sets that nobody signed", n)
	}
	d.ca.fail = nil
	if err := d.publish(t.Context(), nil); err != nil || !d.id.Revoked(a.id.KeyHash()) {
		t.Errorf("after the authority came back: %v", err)
	}
	if n := d.audited("revocations.sign"); n != 1 {
		t.Errorf("the audit log has %d signed sets, want 1", n)
	}
}

func TestExpiredLeafIsRenewedWithItsKey(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
	var chain strings.Builder
	for _, der := range d.ca.CA.Issue(t, a.id, identitytest.NotAfter(time.Now().Add(-time.Hour))) {
		chain.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	if err := os.WriteFile(filepath.Join(a.id.Dir(), "chain.pem"), []byte(chain.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	id, err := identity.Open(a.id.Dir(), wire.RoleNode)
	if err != nil {
		t.Fatal(err)
	}
	if !id.OutOfTime() {
		t.Fatal("not expired")
	}
	b := d.partyOf(id, "", "")
	d.see(b)
	if err := b.Ready(); err != nil || b.id.KeyHash() != a.id.KeyHash() {
		t.Errorf("renewal: %v", err)
	}
	if n := len(d.requests("")); n != 1 {
		t.Errorf("%d requests, want the first one alone", n)
	}
}

// renews answers as a connected party does that is renewed, with a new key if it
// is asked for one. While *lost is set, its answer to the leaf gets lost.
func renews(a *applicant, lost *error) func(p wire.Party, method, path string, in, out any) error {
	return func(_ wire.Party, _, path string, in, out any) error {
		switch path {
		case wire.PathCSR:
			der, err := a.id.CSR(in.(wire.CSRRequest).Rekey)
			out.(*wire.CSR).DER = der
			return err
		case wire.PathCertificate:
			return errors.Join(a.id.Install(in.(wire.Certificate).Chain), *lost)
		}
		return nil
	}
}

// TestExpiredLeafOfANewKeyWhoseAnswerWasLost: the node took the leaf for its new
// key, the gateway fell before it heard so, and the node was away until it ended.
func TestExpiredLeafOfANewKeyWhoseAnswerWasLost(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
	party, _ := a.id.Party()
	first := a.id.KeyHash()
	stolen := t.TempDir()
	if err := os.CopyFS(stolen, os.DirFS(a.id.Dir())); err != nil {
		t.Fatal(err)
	}
	lost := errors.New("the connection broke")
	d.answer = renews(a, &lost)
	if err := d.renewNow(t.Context(), party.ID, true); !errors.Is(err, lost) || a.id.KeyHash() == first {
		t.Fatalf("rekey: %v", err)
	}
	id := d.ca.CA.Worn(t, a.id, identitytest.NotAfter(time.Now().Add(-time.Hour)))
	b := d.partyOf(id, "", "")
	d.see(b)
	if err := b.Ready(); err != nil {
		t.Errorf("renewal: %v", err)
	}
	if n, err := d.store.Node(t.Context(), party.ID); err != nil || n.KeyHash != id.KeyHash() {
		t.Errorf("node %+v %v", n, err)
	}
	if n := len(d.requests("")); n != 1 {
		t.Errorf("%d requests, want the first one alone", n)
	}
	// Whoever has the key that it had before is not taken for it any more.
	old, err := identity.Open(stolen, wire.RoleNode)
	if err != nil {
		t.Fatal(err)
	}
	thief := d.partyOf(d.ca.CA.Worn(t, old, identitytest.NotAfter(time.Now().Add(-time.Hour))), "", "")
	d.see(thief)
	if err := thief.Ready(); err == nil {
		t.Error("an older key was renewed")
	}
}

// TestFirstLeafWhoseAnswerWasLost: the node took its first leaf, and the way to it
// broke before the gateway heard so. Once it comes by that leaf nothing is left open.
func TestFirstLeafWhoseAnswerWasLost(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a := d.party(wire.RoleNode, d.join(api.CreateJoin{Name: "web"}), "")
	a.bend = func(r *http.Request, w *httptest.ResponseRecorder) bool {
		if r.Method != http.MethodPut {
			return false
		}
		a.Handler(nil).ServeHTTP(httptest.NewRecorder(), r)
		http.Error(w, "verdict: enrolment: remember the join code: write /var/lib/sallyport/rcp/identity/.join.json75409: no space left on device", http.StatusBadGateway)
		return true
	}
	d.see(a)
	if err := a.Ready(); err != nil {
		t.Fatal(err)
	}
	if q := d.requests("")[0]; q.State != api.RequestGranted || !strings.HasSuffix(q.Reason, "no space left on device") { // the cause comes last
		t.Fatalf("request %+v", q)
	}
	d.answer = renews(a, new(error))
	party, _ := a.id.Party()
	if err := d.renewDue(t.Context(), party.ID, &wire.Hello{Party: party, RenewAfter: a.id.RenewAfter()}); err != nil {
		t.Fatal(err)
	}
	if q := d.requests("")[0]; q.State != api.RequestDelivered || q.Reason != "" {
		t.Errorf("request %+v, want it delivered", q)
	}
}

// TestRCPBeyondTheGraceIsGranted: it asks without a name and without a code, and
// an operator can let it come back all the same.
func TestRCPBeyondTheGraceIsGranted(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	added, err := d.addRCP(t.Context(), api.AddRCP{Name: "edge", Address: "192.0.2.9:9090"})
	if err != nil {
		t.Fatal(err)
	}
	a := d.party(wire.RoleRCP, added.Join.Code, "")
	d.see(a)
	if err := a.Ready(); err != nil {
		t.Fatal(err)
	}
	d.grace = -365 * 24 * time.Hour // as if it had been away for so long
	b := d.partyOf(d.ca.CA.Worn(t, a.id, identitytest.NotAfter(time.Now().Add(-time.Hour))), "", "")
	d.see(b)
	if q := d.requests(api.RequestPending); len(q) != 1 || q[0].Name != "edge" {
		t.Fatalf("waiting %+v, want it by its name", q)
	}
	if _, err := d.grant(t.Context(), "edge", api.Grant{}); err != nil {
		t.Fatal(err)
	}
	if q := d.requests(api.RequestPending); len(q) != 0 {
		t.Errorf("still waiting: %+v", q)
	}
	d.see(b)
	if err := b.Ready(); err != nil {
		t.Errorf("granted: %v", err)
	}
}

// TestNodeBeyondTheGraceStaysWhatItWas: it asks without a code and by the name of
// its host, and is granted with the name, the tags and the limits that its code gave.
func TestNodeBeyondTheGraceStaysWhatItWas(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a := d.enrolled(d.join(api.CreateJoin{Name: "web", Tags: map[string]string{"role": "web"}, AllowTags: []string{"env=*"}}), "host-7")
	d.grace = -365 * 24 * time.Hour // as if it had been away for so long
	b := d.partyOf(d.ca.CA.Worn(t, a.id, identitytest.NotAfter(time.Now().Add(-time.Hour))), "", "host-7")
	d.see(b)
	if q := d.requests(api.RequestPending); len(q) != 1 || q[0].Name != "web" {
		t.Fatalf("waiting %+v, want it by its name", q)
	}
	if _, err := d.grant(t.Context(), "web", api.Grant{Fingerprint: b.id.Fingerprint()}); err != nil {
		t.Fatal(err)
	}
	d.see(b)
	if err := b.Ready(); err != nil {
		t.Errorf("granted: %v", err)
	}
	n, err := d.store.NodeByName(t.Context(), store.DefaultTenant, "web")
	if err != nil || n.ID != b.id.ID() || !slices.Equal(n.AllowTags, []string{"env=*"}) || n.JoinID == "" {
		t.Errorf("node %+v %v", n, err)
	}
	tags, err := d.store.NodeTags(t.Context(), b.id.ID())
	if err != nil || len(tags) != 1 || tags[0].Source != store.TagJoin || tags[0].Value != "web" {
		t.Errorf("tags %+v %v", tags, err)
	}
}

func TestRenewal(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
	party, _ := a.id.Party()
	var installed error
	d.answer = func(_ wire.Party, method, path string, in, out any) error {
		switch path {
		case wire.PathCSR:
			der, err := a.id.CSR(false)
			out.(*wire.CSR).DER = der
			return err
		case wire.PathCertificate:
			installed = a.id.Install(in.(wire.Certificate).Chain)
			return installed
		}
		return nil
	}
	hello := &wire.Hello{Party: party, RenewAfter: time.Now().Add(-time.Hour)} // the party's word does not count
	if err := d.renewDue(t.Context(), party.ID, hello); err != nil || len(d.told[party.ID]) != 0 {
		t.Errorf("renewed a fresh leaf: %v %v", err, d.told[party.ID])
	}
	err := d.store.Update(t.Context(), func(ctx context.Context, tx *store.Tx) error {
		k, err := tx.Key(ctx, a.id.KeyHash())
		if err != nil {
			return err
		}
		k.IssuedAt, k.NotAfter = time.Now().Add(-21*24*time.Hour), time.Now().Add(9*24*time.Hour)
		return tx.PutKey(ctx, k)
	})
	if err != nil {
		t.Fatal(err)
	}
	// A party that takes none of them has no leaf made with each of its hellos.
	take := d.answer
	d.answer = func(p wire.Party, method, path string, in, out any) error {
		if path == wire.PathCertificate {
			return &statusError{Status: http.StatusUnprocessableEntity, Reason: "not that one"}
		}
		return take(p, method, path, in, out)
	}
	made := len(d.ca.issued)
	for range 10 * maxLeaves {
		_ = d.renewDue(t.Context(), party.ID, hello)
	}
	if n := len(d.ca.issued) - made; n != maxLeaves {
		t.Errorf("%d leaves for a party that refuses them, want %d", n, maxLeaves)
	}
	d.answer, d.told[party.ID] = take, nil
	d.renewals[party.ID].counted = time.Now().Add(-retryGranted) // a minute later
	before := a.id.NotAfter()
	if err := d.renewDue(t.Context(), party.ID, hello); err != nil || installed != nil {
		t.Fatalf("%v %v", err, installed)
	}
	if len(d.renewals) > 0 {
		t.Error("it is counted although it was renewed")
	}
	if got := d.told[party.ID]; !slices.Equal(got, []string{"POST /v1/csr", "PUT /v1/certificate"}) || a.id.NotAfter().Before(before) {
		t.Errorf("told %v", got)
	}
	if k, err := d.store.Key(t.Context(), a.id.KeyHash()); err != nil || time.Until(k.NotAfter) < 29*24*time.Hour {
		t.Errorf("key %+v %v", k, err)
	}
	if d.audited("certificate.renew") != 1 {
		t.Error("no audit row")
	}
	if err := d.renewNow(t.Context(), party.ID, false); err != nil || len(d.told[party.ID]) != 4 {
		t.Errorf("an operator's renewal: %v %v", err, d.told[party.ID])
	}
	d.talk = func(context.Context, wire.Party, func(context.Context, caller) error) error {
		return errors.New("open session: the rcp does not have it")
	}
	if err := d.renewNow(t.Context(), party.ID, false); !errors.Is(err, ErrNotConnected) {
		t.Errorf("a node that cannot be reached: %v", err)
	}
	if err := d.renewNow(t.Context(), wire.NewID(), false); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("unknown node: %v", err)
	}
}

func parsed(t *testing.T, der []byte) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestRevocationNamesKeysOfRenewalsThatFailed(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a, other := d.enrolled(d.join(api.CreateJoin{Name: "web"}), ""), d.enrolled(d.join(api.CreateJoin{Name: "db"}), "")
	party, _ := a.id.Party()
	victim, _ := other.id.Party()
	csrOf := func(id *identity.Identity) []byte {
		der, err := id.CSR(false)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	var der []byte
	var taken [][]byte
	d.answer = func(_ wire.Party, _, path string, in, out any) error {
		switch path {
		case wire.PathCSR:
			out.(*wire.CSR).DER = der
		case wire.PathCertificate: // it takes the leaf, and says that it did not
			taken = in.(wire.Certificate).Chain
			leaf, inter := parsed(t, taken[0]), parsed(t, taken[1])
			if _, err := d.store.Certificate(t.Context(), wire.KeyOf(inter), doors.Serial(leaf.SerialNumber)); err != nil {
				t.Errorf("a leaf that is on its way to its party stands in no record, and will stand in no CRL: %v", err)
			}
			return errors.New("disk full")
		}
		return nil
	}
	var keys []wire.KeyHash
	for range maxKeys + 3 {
		fresh, err := identity.Open(t.TempDir(), wire.RoleNode)
		if err != nil {
			t.Fatal(err)
		}
		der, taken = csrOf(fresh), nil
		if err := d.renewNow(t.Context(), party.ID, false); err == nil {
			t.Fatal("a renewal that the party says failed counts as done")
		}
		if taken != nil {
			keys = append(keys, fresh.KeyHash())
		}
	}
	if len(keys) != maxKeys-1 {
		t.Errorf("the party got leaves for %d keys", len(keys))
	}
	// Nor does it get one for a key that another's revocation must name.
	der, taken = csrOf(other.id), nil
	if err := d.renewNow(t.Context(), party.ID, false); !errors.Is(err, errKey) || taken != nil {
		t.Errorf("a leaf for another party's key: %v", err)
	}
	if k, err := d.store.Key(t.Context(), other.id.KeyHash()); err != nil || k.PartyID != victim.ID {
		t.Errorf("another party's key: %+v %v", k, err)
	}
	n, err := d.store.Node(t.Context(), party.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.revokeNode(t.Context(), n, false); err != nil {
		t.Fatal(err)
	}
	for _, key := range append(keys, a.id.KeyHash()) {
		if !d.id.Revoked(key) {
			t.Errorf("the revoked node holds a good leaf for %s", key.Fingerprint())
		}
	}
	if d.id.Revoked(other.id.KeyHash()) {
		t.Error("another party's key was revoked too")
	}
}

func TestSignedSetThatWasNotTakenOverIsTakenOverLater(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
	party, _ := a.id.Party()
	err := d.store.Update(t.Context(), func(ctx context.Context, tx *store.Tx) error {
		_, err := tx.RevokeKeys(ctx, party.ID, "test")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if env, _, err := d.sign(t.Context()); err != nil || env == nil { // and then the disk was full
		t.Fatal(env, err)
	}
	if err := d.publish(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if !d.id.Revoked(a.id.KeyHash()) {
		t.Error("the gateway trusts a key that its own authority revoked")
	}
}

// A gateway whose disk is full for the set, and not for the database, tells the
// others all the same, and whoever asked that it could not write it.
func TestSetThatCannotBeWrittenIsSpread(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
	rcp := wire.NewID()
	err := d.store.Update(t.Context(), func(ctx context.Context, tx *store.Tx) error {
		return tx.AddRCP(ctx, &store.RCP{Name: "dmz", PartyID: rcp, Source: store.RCPAdded, State: api.RCPConnected})
	})
	if err != nil {
		t.Fatal(err)
	}
	n, err := d.store.Node(t.Context(), a.id.ID())
	if err != nil {
		t.Fatal(err)
	}
	obstacle := filepath.Join(d.id.Dir(), "revocations.json") // no file takes the place of a directory
	if err := errors.Join(os.RemoveAll(obstacle), os.Mkdir(obstacle, 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, err := d.revokeNode(t.Context(), n, false); !api.Is(err, api.CodeUnavailable) || !strings.Contains(err.Error(), "could not write") {
		t.Errorf("whoever revokes is told %v", err)
	}
	if !slices.Contains(d.told[rcp], http.MethodPut+" "+wire.PathRevocations) || !d.id.Revoked(a.id.KeyHash()) {
		t.Errorf("the RCP was told %q, revoked here: %v", d.told[rcp], d.id.Revoked(a.id.KeyHash()))
	}
	if err := errors.Join(os.Remove(obstacle), d.publish(t.Context(), nil)); err != nil {
		t.Fatal(err)
	}
	if number, _ := d.id.Revocations(); number == 0 {
		t.Error("the set is not held after the disk had room")
	}
}

// TestRenewalRacesRekey: a renewal that began before a rekey ends after it. The
// key that was revoked in between does not come back into the record.
func TestRenewalRacesRekey(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
	party, _ := a.id.Party()
	rekeying := false
	d.talk = func(ctx context.Context, _ wire.Party, f func(context.Context, caller) error) error {
		return f(ctx, func(_ context.Context, _, path string, in, out any, _ int64) error {
			err := renews(a, new(error))(party, "", path, in, out)
			if err != nil || rekeying || path != wire.PathCertificate {
				return err
			}
			rekeying = true
			return d.renewNow(t.Context(), party.ID, true) // before the first is written down
		})
	}
	if err := d.renewNow(t.Context(), party.ID, false); !errors.Is(err, identity.ErrRevoked) {
		t.Errorf("the renewal of the key that is over: %v", err)
	}
	if n, err := d.store.Node(t.Context(), party.ID); err != nil || n.KeyHash != a.id.KeyHash() {
		t.Errorf("node %+v %v, which has the key %s", n, err, a.id.Fingerprint())
	}
}

// TestLostRekeyEndsTheOldKeyLater: the answer to a rekey was lost. As soon as the
// gateway sees the new key, the one before it ends, as it was promised.
func TestLostRekeyEndsTheOldKeyLater(t *testing.T) {
	t.Parallel()
	for _, away := range []bool{false, true} { // until its leaf had ended
		d := newDesk(t)
		a := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
		party, _ := a.id.Party()
		first := a.id.KeyHash()
		lost := errors.New("the connection broke")
		d.answer = renews(a, &lost)
		if err := d.renewNow(t.Context(), party.ID, true); !errors.Is(err, lost) {
			t.Fatal(err)
		}
		lost = nil
		if away {
			b := d.partyOf(d.ca.CA.Worn(t, a.id, identitytest.NotAfter(time.Now().Add(-time.Hour))), "", "")
			d.see(b)
			if err := b.Ready(); err != nil {
				t.Fatal(err)
			}
		} else if err := d.renewNow(t.Context(), party.ID, false); err != nil {
			t.Fatal(err)
		}
		if k, err := d.store.Key(t.Context(), first); err != nil || k.RevokedAt.IsZero() {
			t.Errorf("away %t: the old key %+v %v", away, k, err)
		}
		if !d.id.Revoked(first) {
			t.Errorf("away %t: the signed set does not name the old key", away)
		}
	}
}

// TestLostRekeyIsSeenInASession: nor does the list show the old fingerprint until the
// next renewal. A rekey that is under way is left alone.
func TestLostRekeyIsSeenInASession(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
	party, _ := a.id.Party()
	first := a.id.KeyHash()
	lost := errors.New("the connection broke")
	d.answer = renews(a, &lost)
	if err := d.renewNow(t.Context(), party.ID, true); !errors.Is(err, lost) {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(a.id.Chain()[0])
	if err != nil {
		t.Fatal(err)
	}
	peer := identity.Peer{Party: party, Name: "web", Tenant: "default", Key: a.id.KeyHash(), Issuer: wire.KeyOf(d.ca.Inter), Leaf: leaf}
	shows := func(when string, want wire.KeyHash) {
		t.Helper()
		if err := d.follow(t.Context(), peer); err != nil {
			t.Errorf("%s: %v", when, err)
		}
		if n, err := d.store.Node(t.Context(), party.ID); err != nil || n.KeyHash != want {
			t.Errorf("%s the list shows %s (%v), want %s", when, n.KeyHash.Fingerprint(), err, want.Fingerprint())
		}
	}
	shows("while the answer may come", first)
	ago := func(key wire.KeyHash, age time.Duration) {
		t.Helper()
		if err := d.store.Update(t.Context(), func(ctx context.Context, tx *store.Tx) error {
			k, err := tx.Key(ctx, key)
			if err != nil {
				return err
			}
			k.IssuedAt = k.IssuedAt.Add(-age)
			return tx.PutKey(ctx, k)
		}); err != nil {
			t.Fatal(err)
		}
	}
	ago(first, time.Hour)
	ago(peer.Key, 2*lostAfter)
	shows("later", peer.Key)
	if !d.id.Revoked(first) {
		t.Error("the key before does not end")
	}
	renewals := d.audited("certificate.renew")
	shows("once more", peer.Key)
	peer.Key = first
	shows("with the key that ended", a.id.KeyHash())
	peer.Key = wire.KeyHash(strings.Repeat("ab", 32))
	shows("with a key that nobody knows", a.id.KeyHash())
	if d.audited("certificate.renew") != renewals || renewals != 1 {
		t.Errorf("%d rows in the audit log", renewals)
	}
}

// TestNodeLostInAWarmSession: the session was dead, and no other could be opened.
func TestNodeLostInAWarmSession(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
	party, _ := a.id.Party()
	d.talk = func(ctx context.Context, _ wire.Party, f func(context.Context, caller) error) error {
		if err := f(ctx, func(context.Context, string, string, any, any, int64) error { return errors.New("POST /v1/csr: EOF") }); err == nil {
			t.Error("a dead session is no error")
		}
		return errors.New("open session: the rcp does not have it")
	}
	if err := d.renewNow(t.Context(), party.ID, false); !errors.Is(err, ErrNotConnected) {
		t.Errorf("told as the gateway's own failure: %v", err)
	}
}

// TestRevocationIsNotTakenBackByPresence: that a node came into reach, or was lost,
// was seen before it was revoked, and is written after that.
func TestRevocationIsNotTakenBackByPresence(t *testing.T) {
	t.Parallel()
	w, _, n := running(t)
	w.update(func(ctx context.Context, tx *store.Tx) error {
		if err := tx.SetNodeState(ctx, n.id.ID(), wire.StateRevoked, "revoked by an operator"); err != nil {
			return err
		}
		return w.s.writeChange(ctx, tx, change{ID: n.id.ID(), Role: wire.RoleNode, Name: "web", Known: true, From: wire.StateRunning, To: wire.StateDown,
			Alarms: []alarm{{Lost: true, State: wire.StateDown, Reason: "its channel ended"}}})
	})
	if lost, err := w.s.lostNodes(t.Context()); err != nil || len(lost) != 0 {
		t.Errorf("the revoked node is told as lost: %v, %v", lost, err)
	}
	if row, err := w.db.Node(t.Context(), n.id.ID()); err != nil || row.State != wire.StateRevoked || row.StateReason != "revoked by an operator" {
		t.Errorf("%s (%s), %v; want revoked", row.State, row.StateReason, err)
	}
}

// TestNodeThatEnrolledAgainStaysSo: that a node was revoked is in the database before
// it is seen, so that what was seen of it is never written: it may be late, and the
// node have enrolled again, which would be revoked in the list for ever then.
func TestNodeThatEnrolledAgainStaysSo(t *testing.T) {
	t.Parallel()
	w, r, n := running(t)
	eventually(t, "it is written down that the node runs", func() bool {
		row, err := w.db.Node(t.Context(), n.id.ID())
		return err == nil && row.State == wire.StateRunning
	})
	for _, c := range []change{
		{ID: n.id.ID(), Role: wire.RoleNode, Name: "web", Known: true, From: wire.StateRunning, To: wire.StateRevoked, Reason: "revoked by an operator",
			Alarms: []alarm{{Lost: false, State: wire.StateRunning}, {Lost: true, State: wire.StateDown, Reason: "its channel ended"}}},
		{ID: r.id.ID(), Role: wire.RoleRCP, From: wire.StateRunning, To: wire.StateRevoked, Reason: "revoked"},
	} {
		w.update(func(ctx context.Context, tx *store.Tx) error { return w.s.writeChange(ctx, tx, c) })
	}
	if row, err := w.db.Node(t.Context(), n.id.ID()); err != nil || row.State != wire.StateRunning {
		t.Errorf("%s (%s), %v; want running", row.State, row.StateReason, err)
	}
	if row, err := w.db.RCPByID(t.Context(), r.id.ID()); err != nil || row.State == api.RCPRevoked {
		t.Errorf("the RCP is %s (%s), %v", row.State, row.StateReason, err)
	}
	if lost, err := w.s.lostNodes(t.Context()); err != nil || len(lost) != 0 {
		t.Errorf("the node is told as lost: %v, %v", lost, err)
	}
}

// awayIssuer signs no set of revocations while it is away.
type awayIssuer struct {
	Issuer

	away atomic.Bool
}

func (i *awayIssuer) SignRevocations(ctx context.Context, set wire.Revocations, after int64) (wire.Envelope, error) {
	if i.away.Load() {
		return wire.Envelope{}, errors.New("the authority is away")
	}
	return i.Issuer.SignRevocations(ctx, set, after)
}

// TestNodeRevokedLateIsTold: its revocation could not be signed when it was
// revoked. Nothing else is said to it meanwhile; when the set is there it hears of
// it, before the RCPs cut it.
func TestNodeRevokedLateIsTold(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ca := &awayIssuer{}
	ca.away.Store(true)
	w.before = func(s *Server) {
		ca.Issuer = s.ca
		s.enrolment.ca = ca
	}
	r, n := w.rcp("dmz"), w.enrolled(w.node("web"))
	told := make(chan bool, 1)
	n.mux.HandleFunc("PUT "+wire.PathRevocations, func(rw http.ResponseWriter, req *http.Request) {
		var env wire.Envelope
		err := wire.DecodeJSON(req.Body, wire.MaxRevocations, &env)
		if err == nil {
			_, err = n.id.ApplyRevocations(env)
		}
		if err != nil {
			t.Errorf("told %v", err)
		}
		told <- r.id.Revoked(n.id.KeyHash())
	})
	r.hold(n)
	w.run()
	w.state(n.id.ID(), wire.StateRunning)
	row, err := w.s.store.Node(t.Context(), n.id.ID())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.s.enrolment.revokeNode(t.Context(), row, false); !api.Is(err, api.CodeUnavailable) {
		t.Fatalf("revoked while the authority is away: %v", err)
	}
	w.state(n.id.ID(), wire.StateRevoked)
	if _, err := w.s.fleet.routes(n.id.ID()); err == nil {
		t.Error("there are sessions with a revoked node")
	}
	unsigned := func(after time.Duration, want wire.Severity) {
		t.Helper()
		if c := w.s.enrolment.unsigned.concern(time.Now().Add(after), awayFor); c.severity != want || want != wire.SeverityNormal && !strings.Contains(c.text, "the authority is away") {
			t.Errorf("after %s: %+v", after, c)
		}
		if c := w.s.checkAuthority(t.Context()); after > 0 && c.OK != (want == wire.SeverityNormal) { // the doctor does not wait
			t.Errorf("after %s the doctor finds %+v", after, c)
		}
	}
	unsigned(0, wire.SeverityNormal)
	unsigned(awayFor+time.Minute, wire.SeverityMajor)
	ca.away.Store(false)
	if err := w.s.enrolment.publish(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	unsigned(awayFor+time.Minute, wire.SeverityNormal)
	select {
	case after := <-told:
		if after || !n.id.Revoked(n.id.KeyHash()) {
			t.Errorf("the RCP heard first: %t", after)
		}
	default:
		t.Error("the node was not told")
	}
}
