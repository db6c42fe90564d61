package gateway

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/enroll"
	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

func TestManualGrant(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	code := d.join(api.CreateJoin{Name: "db", Manual: true, Tags: map[string]string{"role": "db"}})
	a := d.party(wire.RoleNode, code, "wish")
	d.see(a)
	d.expect(a, enroll.StateWaiting, wire.EnrollManual)
	q := d.requests(api.RequestPending)[0]
	if q.Name != "db" || q.KeyHash != a.id.KeyHash() || q.Reason != wire.EnrollManual || q.Tags["env"] != "own" {
		t.Errorf("request %+v", q)
	}
	d.see(a) // it comes again: one request, not two
	if n := len(d.requests("")); n != 1 {
		t.Fatalf("%d requests, want 1", n)
	}
	if _, err := d.grant(t.Context(), "db", api.Grant{Fingerprint: "SHA256:wrong"}); !api.Is(err, api.CodeConflict) {
		t.Errorf("another fingerprint: %v", err)
	}
	if _, err := d.grant(t.Context(), "nobody", api.Grant{}); !api.Is(err, api.CodeNotFound) {
		t.Errorf("unknown: %v", err)
	}
	ctx := store.WithActor(t.Context(), store.Actor{Who: "alice", Origin: "test"})
	got, err := d.grant(ctx, "db", api.Grant{Fingerprint: a.id.Fingerprint()})
	if err != nil || got.State != api.RequestGranted || got.DecidedBy != "alice" {
		t.Fatalf("%+v %v", got, err)
	}
	if !slices.Contains(d.looked, a.id.KeyHash()) {
		t.Error("the party was not looked at, at once")
	}
	d.see(a)
	if err := a.Ready(); err != nil {
		t.Error(err)
	}
	if tags, err := d.store.NodeTags(t.Context(), a.id.ID()); err != nil || len(tags) != 1 || tags[0].Value != "db" {
		t.Errorf("tags of the code: %+v %v", tags, err)
	}
	if _, err := d.grant(t.Context(), "db", api.Grant{}); !api.Is(err, api.CodeNotFound) {
		t.Errorf("granted twice: %v", err)
	}
}

// A code without a token serves whoever an operator grants: it is open, and
// says so, until it ends.
func TestManualCodeStaysOpen(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	code := d.join(api.CreateJoin{Manual: true})
	for _, name := range []string{"a", "b"} {
		p := d.party(wire.RoleNode, code, name)
		d.see(p)
		if _, err := d.grant(t.Context(), name, api.Grant{}); err != nil {
			t.Fatal(err)
		}
		d.see(p)
		if err := p.Ready(); err != nil {
			t.Error(err)
		}
	}
	j, err := d.store.Join(t.Context(), mustParse(t, code).TokenID)
	if err != nil {
		t.Fatal(err)
	}
	if v := joinView(j, j.Generation); v.State != "open" || v.Uses != 0 || v.Used != 2 {
		t.Errorf("after two nodes it is %s, %d of %d", v.State, v.Used, v.Uses)
	}
	if _, err := d.createJoin(t.Context(), api.CreateJoin{Manual: true, Uses: 3}); !api.Is(err, api.CodeInvalid) {
		t.Errorf("a number of uses for it: %v", err)
	}
}

func TestGrantSurvivesRestart(t *testing.T) {
	t.Parallel()
	ca := &memoryCA{CA: identitytest.NewCA(t), t: t}
	id := ca.Party(t, wire.RoleGateway)
	path := filepath.Join(t.TempDir(), "sallyport.db")
	d := newDeskOn(t, ca, path, id)
	a := d.party(wire.RoleNode, d.join(api.CreateJoin{Manual: true}), "db")
	d.see(a)
	d.mu.Lock()
	clear(d.parties) // it is away when the operator decides
	d.mu.Unlock()
	if _, err := d.grant(t.Context(), "db", api.Grant{}); err != nil {
		t.Fatal(err)
	}
	d.see(a)
	if a.Ready() == nil {
		t.Fatal("a party that is away got its certificate")
	}
	if err := d.store.Close(); err != nil {
		t.Fatal(err)
	}
	d = newDeskOn(t, ca, path, id)
	d.parties[a.id.KeyHash()] = a
	d.see(a)
	if err := a.Ready(); err != nil {
		t.Errorf("days later: %v", err)
	}
	if q := d.requests("")[0]; q.State != api.RequestDelivered {
		t.Errorf("request %+v", q)
	}
}

func TestDenyAndDiscard(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	code := d.join(api.CreateJoin{Manual: true})
	denied, discarded := d.party(wire.RoleNode, code, "a"), d.party(wire.RoleNode, code, "b")
	d.see(denied)
	d.see(discarded)
	if _, err := d.deny(t.Context(), "a", api.Deny{Reason: "not ours"}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.discard(t.Context(), "b"); err != nil {
		t.Fatal(err)
	}
	d.see(denied)
	d.see(discarded)
	d.expect(denied, enroll.StateDenied, wire.EnrollByOperator)
	if s := denied.Status(); s.Reason != "not ours" {
		t.Errorf("told %q", s.Reason)
	}
	d.expect(discarded, enroll.StateWaiting, wire.EnrollManual) // it is told nothing
	if n := len(d.requests(api.RequestPending)); n != 0 {
		t.Errorf("%d requests came back", n)
	}
	if d.audited("request.deny") != 1 || d.audited("request.discard") != 1 {
		t.Error("audit rows are missing")
	}
	// Whoever decides again is told what was decided, by whom and what to do.
	no := d.requests(api.RequestDenied)[0]
	for ref, want := range map[string]struct {
		code api.Code
		says []string
	}{
		"a":   {api.CodeNotFound, []string{`no request "a" waits`, no.ID, "was denied by ", "not ours", "another join code"}},
		no.ID: {api.CodeNotFound, []string{"waits no more", "was denied by ", no.DecidedAt.UTC().Format(time.RFC3339), "not ours", "another join code"}},
		"b":   {api.CodeNotFound, []string{"was discarded by ", "another join code"}},
		"c":   {api.CodeNotFound, []string{`no request "c" waits`}},
	} {
		_, granted := d.grant(t.Context(), ref, api.Grant{})
		_, refused := d.deny(t.Context(), ref, api.Deny{})
		for _, err := range []error{granted, refused} {
			if !api.Is(err, want.code) {
				t.Errorf("%s: %v, want %s", ref, err, want.code)
				continue
			}
			for _, part := range want.says {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%s: %v, want %q in it", ref, err, part)
				}
			}
		}
	}
	// Another code is another request.
	other := d.partyOf(denied.id, d.join(api.CreateJoin{}), "a")
	d.see(other)
	if err := other.Ready(); err != nil {
		t.Error(err)
	}
}

func TestNameInUseWaits(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	old := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
	err := d.store.Update(t.Context(), func(ctx context.Context, tx *store.Tx) error {
		return tx.TagNode(ctx, old.id.ID(), map[string]string{"tier": "gold"}, nil)
	})
	if err != nil {
		t.Fatal(err)
	}
	twin := d.party(wire.RoleNode, d.join(api.CreateJoin{Name: "web"}), "")
	d.see(twin)
	d.expect(twin, enroll.StateWaiting, wire.EnrollNameInUse)
	q := d.requests(api.RequestPending)[0]
	if q.Reason != wire.EnrollNameInUse {
		t.Errorf("reason %q, want %q", q.Reason, wire.EnrollNameInUse)
	}
	if _, err := d.grant(t.Context(), "web", api.Grant{}); !api.Is(err, api.CodeAmbiguous) {
		t.Errorf("a request and a node have that name: %v", err)
	}
	if _, err := d.grant(t.Context(), q.ID, api.Grant{}); !api.Is(err, api.CodeNameInUse) {
		t.Errorf("without --replace: %v", err)
	}
	if d.id.Revoked(old.id.KeyHash()) {
		t.Fatal("the old identity ended before it was replaced")
	}
	if _, err := d.grant(t.Context(), q.ID, api.Grant{Replace: true}); err != nil {
		t.Fatal(err)
	}
	d.see(twin)
	if err := twin.Ready(); err != nil {
		t.Fatal(err)
	}
	if !d.id.Revoked(old.id.KeyHash()) {
		t.Error("the old identity lives on")
	}
	tags, err := d.store.NodeTags(t.Context(), twin.id.ID())
	if err != nil || store.Effective(tags)["tier"] != "gold" {
		t.Errorf("tags %v %v", tags, err)
	}
	if n, err := d.store.NodeByName(t.Context(), "default", "web"); err != nil || n.ID != twin.id.ID() {
		t.Errorf("web is %v %v", n, err)
	}
	// join create --replace does the same without an operator at the end.
	third := d.enrolled(d.join(api.CreateJoin{Name: "web", Replace: true}), "")
	if !d.id.Revoked(twin.id.KeyHash()) || d.id.Revoked(third.id.KeyHash()) {
		t.Error("--replace did not end the identity before")
	}
}

// TestGrantThatIsTakenBack: who is removed, revoked or replaced before it has come
// for its certificate gets none, and the request says so.
func TestGrantThatIsTakenBack(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	code := d.join(api.CreateJoin{Manual: true})
	parties := map[string]*applicant{}
	for _, name := range []string{"removed", "revoked", "replaced", "other"} {
		parties[name] = d.party(wire.RoleNode, code, name)
		d.see(parties[name])
	}
	heir := d.party(wire.RoleNode, code, "replaced")
	d.see(heir)
	d.mu.Lock()
	away := d.parties
	d.parties = map[wire.KeyHash]*applicant{}
	d.mu.Unlock()
	for name, a := range parties {
		if _, err := d.grant(t.Context(), name, api.Grant{Fingerprint: a.id.Fingerprint()}); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"removed", "revoked"} {
		n, err := d.store.NodeByName(t.Context(), store.DefaultTenant, name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.revokeNode(t.Context(), n, name == "removed"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := d.grant(t.Context(), "replaced", api.Grant{Fingerprint: heir.id.Fingerprint(), Replace: true}); err != nil {
		t.Fatal(err)
	}
	for name, a := range parties {
		q, err := d.store.LastRequest(t.Context(), a.id.KeyHash())
		if err != nil {
			t.Fatal(err)
		}
		want := api.RequestFailed
		if name == "other" {
			want = api.RequestGranted
		}
		if q.State != want || (q.Reason == "") != (name == "other") {
			t.Errorf("request of %s is %s, %q; want %s", name, q.State, q.Reason, want)
		}
	}
	if _, err := d.grant(t.Context(), "removed", api.Grant{}); err == nil || !strings.Contains(err.Error(), "its key was revoked first") {
		t.Errorf("granted again: %v", err)
	}
	d.mu.Lock()
	d.parties = away
	d.mu.Unlock()
	d.see(heir)
	if q, err := d.store.LastRequest(t.Context(), heir.id.KeyHash()); err != nil || q.State != api.RequestDelivered {
		t.Errorf("the one in its place: %+v %v", q, err)
	}
}

// TestCodeThatIsGoneWhileItsPartyWaits: a host that is started again while its
// request waits may have its join code no more. What that says holds on, and so
// does what an operator said.
func TestCodeThatIsGoneWhileItsPartyWaits(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	again := func(a *applicant, name string) *applicant {
		t.Helper()
		id, err := identity.Open(a.id.Dir(), wire.RoleNode)
		if err != nil {
			t.Fatal(err)
		}
		b := d.partyOf(id, "", name)
		d.see(b)
		return b
	}
	bound := d.join(api.CreateJoin{Uses: 2, Tags: map[string]string{"role": "db"}})
	d.rules(fmt.Sprintf("kind: rule\nname: dbs\njoins: [%s]\nnames: [db]\n", mustParse(t, bound).TokenID), false)
	for name, code := range map[string]string{"web": d.join(api.CreateJoin{Manual: true, Name: "web", Tags: map[string]string{"role": "db"}}), "wish": bound} {
		a := d.party(wire.RoleNode, code, "wish")
		d.see(a)
		b := again(a, "wish")
		if q := d.requests(api.RequestPending); len(q) != 1 || q[0].Name != name || q[0].Tags["role"] != "db" || q[0].JoinID == "" {
			t.Fatalf("requests %+v; want one of %s with the tags of its code", q, name)
		}
		if _, err := d.grant(t.Context(), name, api.Grant{}); err != nil {
			t.Fatal(err)
		}
		d.see(b)
		d.expect(b, enroll.StateEnrolled, "")
		if tags, err := d.store.NodeTags(t.Context(), b.id.ID()); err != nil || store.Effective(tags)["role"] != "db" {
			t.Errorf("tags of %s: %v %v", name, tags, err)
		}
	}

	// A rule that changes meanwhile takes such a party, as the dry run says.
	a := d.party(wire.RoleNode, bound, "db-2")
	d.see(a)
	a = again(a, "db-2")
	if out := d.rules(fmt.Sprintf("kind: rule\nname: dbs\njoins: [%s]\n", mustParse(t, bound).TokenID), false); len(out.Grants) != 1 || out.Grants[0].Why != "" {
		t.Errorf("grants %+v", out.Grants)
	}
	d.see(a)
	d.expect(a, enroll.StateEnrolled, "")

	a = d.party(wire.RoleNode, d.join(api.CreateJoin{Manual: true}), "denied")
	d.see(a)
	if _, err := d.deny(t.Context(), "denied", api.Deny{Reason: "not ours"}); err != nil {
		t.Fatal(err)
	}
	a = again(a, "denied")
	d.expect(a, enroll.StateDenied, wire.EnrollByOperator)
	if q := d.requests(api.RequestPending); len(q) != 0 {
		t.Errorf("a denied party asks anew without another code: %+v", q[0])
	}
}

func TestTwoRequestsOfOneName(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	code := d.join(api.CreateJoin{Manual: true})
	a, b := d.party(wire.RoleNode, code, "web"), d.party(wire.RoleNode, code, "web")
	d.see(a)
	d.see(b)
	if _, err := d.grant(t.Context(), "web", api.Grant{}); !api.Is(err, api.CodeAmbiguous) {
		t.Errorf("two requests: %v", err)
	}
	if _, err := d.deny(t.Context(), "web", api.Deny{}); !api.Is(err, api.CodeAmbiguous) {
		t.Errorf("deny of two: %v", err)
	}
	if _, err := d.grant(t.Context(), "web", api.Grant{Fingerprint: "SHA256:other"}); err == nil || !strings.Contains(err.Error(), a.id.Fingerprint()) || !strings.Contains(err.Error(), b.id.Fingerprint()) {
		t.Errorf("the fingerprint of neither: %v", err)
	}
	if _, err := d.grant(t.Context(), "web", api.Grant{Fingerprint: b.id.Fingerprint()}); err != nil {
		t.Fatal(err)
	}
	d.see(a)
	d.see(b)
	if a.Ready() == nil || b.Ready() != nil {
		t.Errorf("granted the wrong one: a %v, b %v", a.Ready(), b.Ready())
	}
	d.expect(a, enroll.StateWaiting, wire.EnrollNameInUse) // the other one took the name
}
