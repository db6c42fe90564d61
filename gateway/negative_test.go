package gateway

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/enroll"
	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

// claiming lets a party say what it likes in its request.
func claiming(t *testing.T, a *applicant, lie func(*wire.EnrollRequest)) {
	t.Helper()
	a.bend = func(r *http.Request, w *httptest.ResponseRecorder) bool {
		if r.Method != http.MethodGet {
			return false
		}
		a.Handler(nil).ServeHTTP(w, r)
		var req wire.EnrollRequest
		if err := json.Unmarshal(w.Body.Bytes(), &req); err != nil {
			t.Error(err)
		}
		lie(&req)
		w.Body.Reset()
		if err := json.NewEncoder(w).Encode(req); err != nil {
			t.Error(err)
		}
		return true
	}
}

// A token that was seen or copied is worth nothing to another key, also while
// uses are left for others; and it brings no name but its own.
func TestTokenReplay(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	code := d.join(api.CreateJoin{Name: "web"})
	d.enrolled(code, "")
	for range 3 {
		thief := d.party(wire.RoleNode, code, "")
		d.see(thief)
		d.expect(thief, enroll.StateDenied, wire.EnrollTokenUsed)
	}
	if j, err := d.store.Joins(t.Context()); err != nil || j[0].Used != 1 {
		t.Errorf("uses %d %v, want 1", j[0].Used, err)
	}
	if n := len(d.requests(api.RequestPending)); n != 0 {
		t.Errorf("%d replays were queued", n)
	}
	other := d.party(wire.RoleNode, d.join(api.CreateJoin{Name: "db"}), "")
	claiming(t, other, func(r *wire.EnrollRequest) { r.Name = "web" })
	d.see(other)
	if n, err := d.store.Node(t.Context(), other.id.ID()); err != nil || n.Name != "db" {
		t.Errorf("node %+v %v: the name is the code's", n, err)
	}
}

// A code that replaces one node does not end another one, whose UUID its holder
// claims.
func TestReplacingCodeReplacesItsNameOnly(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	web := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
	db := d.enrolled(d.join(api.CreateJoin{Name: "db"}), "")
	thief := d.party(wire.RoleNode, d.join(api.CreateJoin{Name: "web", Replace: true}), "")
	claiming(t, thief, func(r *wire.EnrollRequest) { r.ID = db.id.ID() })
	d.see(thief)
	d.expect(thief, enroll.StateWaiting, wire.EnrollUUIDInUse)
	if d.id.Revoked(db.id.KeyHash()) || d.id.Revoked(web.id.KeyHash()) {
		t.Error("a node was revoked")
	}
}

func TestTokenOfAnotherTenant(t *testing.T) {
	t.Parallel()
	ca := &memoryCA{CA: identitytest.NewCA(t), t: t}
	path := filepath.Join(t.TempDir(), "sallyport.db")
	d := newDeskOn(t, ca, path, ca.Party(t, wire.RoleGateway))
	raw, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = raw.ExecContext(t.Context(), "INSERT INTO tenants (id, name, created_at) VALUES ('acme', 'acme', '2026-01-01')")
	if cerr := raw.Close(); err != nil || cerr != nil {
		t.Fatal(err, cerr)
	}
	// foreign makes a code of tenant acme.
	foreign := func(j store.Join) string {
		t.Helper()
		j.ID, j.Role, j.Tenant, j.TrustDomain, j.TokenHash = string(wire.NewID()), wire.RoleNode, "acme", d.id.TrustDomain(), hashToken("secret")
		j.MaxUses, j.ExpiresAt = 1, time.Now().Add(time.Hour)
		if err := d.store.Update(t.Context(), func(ctx context.Context, tx *store.Tx) error { return tx.AddJoin(ctx, &j) }); err != nil {
			t.Fatal(err)
		}
		code, err := wire.JoinCode{TrustDomain: j.TrustDomain, Root: wire.KeyOf(ca.Root()), Role: j.Role, Name: j.Name, TokenID: j.ID, Token: "secret"}.Encode()
		if err != nil {
			t.Fatal(err)
		}
		return code
	}
	web := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")

	// The same name in another tenant is another node.
	a := d.enrolled(foreign(store.Join{Name: "web"}), "")
	if n, err := d.store.Node(t.Context(), a.id.ID()); err != nil || n.Tenant != "acme" || n.Name != "web" {
		t.Errorf("node %+v %v", n, err)
	}
	if d.id.Revoked(web.id.KeyHash()) {
		t.Error("the node of that name in another tenant was revoked")
	}
	// Nor does a code of acme get hold of the UUID, alive or ended, with or
	// without --replace.
	claim := func(what string, j store.Join) {
		t.Helper()
		thief := d.party(wire.RoleNode, foreign(j), "")
		claiming(t, thief, func(r *wire.EnrollRequest) { r.ID = web.id.ID() })
		d.see(thief)
		if s := thief.Status(); s.State != enroll.StateDenied || s.Code != wire.EnrollUUIDInUse {
			t.Errorf("%s: %+v", what, s)
		}
		if n, err := d.store.AnyNode(t.Context(), web.id.ID()); err != nil || n.Tenant != store.DefaultTenant || n.KeyHash != web.id.KeyHash() {
			t.Errorf("%s: the node is %+v %v", what, n, err)
		}
	}
	claim("live", store.Join{Name: "web-2"})
	claim("replacing", store.Join{Name: "web", Replaces: true})
	n, err := d.store.Node(t.Context(), web.id.ID())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.revokeNode(t.Context(), n, true); err != nil {
		t.Fatal(err)
	}
	claim("removed", store.Join{Name: "web-3"})
	// A key that is known stays where it is, whatever code comes with it.
	b := d.enrolled(d.join(api.CreateJoin{Name: "db"}), "")
	claiming(t, b, func(r *wire.EnrollRequest) {
		c := mustParse(t, foreign(store.Join{}))
		r.TokenID, r.Token = c.TokenID, "secret"
	})
	if state, err := d.register(t.Context(), b.id.KeyHash(), &wire.EnrollRequest{Role: wire.RoleNode, ID: b.id.ID(), Versions: wire.OwnVersions}, origin{}); err != nil || state.tenant != store.DefaultTenant {
		t.Errorf("%+v %v", state, err)
	}
}

// Role, name, UUID and tenant are the code's or the record's: a party that
// claims another's role is refused, whatever its code.
func TestRequestForAnotherRole(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	rcp, err := d.addRCP(t.Context(), api.AddRCP{Name: "edge"})
	if err != nil {
		t.Fatal(err)
	}
	for name, lie := range map[string]struct {
		lie  func(*wire.EnrollRequest)
		want string
	}{
		"a node's code for an RCP":    {func(r *wire.EnrollRequest) { r.Role, r.Name = wire.RoleRCP, "edge" }, wire.EnrollTokenForeign},
		"a gateway":                   {func(r *wire.EnrollRequest) { r.Role = wire.RoleGateway }, wire.EnrollBadRequest},
		"the gateway's UUID":          {func(r *wire.EnrollRequest) { r.ID = d.id.ID() }, wire.EnrollBadRequest},
		"no UUID":                     {func(r *wire.EnrollRequest) { r.ID = "../../x" }, wire.EnrollBadRequest},
		"the RCP's code":              {func(r *wire.EnrollRequest) { c := mustParse(t, rcp.Join.Code); r.TokenID, r.Token = c.TokenID, c.Token }, wire.EnrollTokenForeign},
		"a name that is none":         {func(r *wire.EnrollRequest) { r.Name = "web\nadmin" }, wire.EnrollBadRequest},
		"protocol versions of no use": {func(r *wire.EnrollRequest) { r.Versions = wire.VersionRange{Min: 900, Max: 901} }, wire.EnrollBadRequest},
	} {
		t.Run(name, func(t *testing.T) {
			a := d.party(wire.RoleNode, d.join(api.CreateJoin{}), "")
			claiming(t, a, lie.lie)
			d.see(a)
			d.expect(a, enroll.StateDenied, lie.want)
		})
	}
	if len(d.ca.issued) != 0 || len(d.requests("")) != 0 {
		t.Errorf("%d certificates, %d requests", len(d.ca.issued), len(d.requests("")))
	}
}

// Ten thousand strangers who wait for an operator: nodes with a code enrol,
// those that have a certificate renew, strangers behind another RCP can still
// be seen, and an operator gets rid of them with one call.
func TestTenThousandStrangers(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	old := d.enrolled(d.join(api.CreateJoin{Name: "old"}), "")
	fill := func(rcp string, n int) {
		t.Helper()
		err := d.store.Update(t.Context(), func(ctx context.Context, tx *store.Tx) error {
			for i := range n {
				q := &store.Request{ID: string(wire.NewID()), Role: wire.RoleNode, PartyID: wire.NewID(), KeyHash: wire.HashSPKI(fmt.Appendf(nil, "%s %d", rcp, i)),
					Name: fmt.Sprintf("stranger-%d", i), RCP: rcp, CSR: []byte{1}, State: api.RequestPending}
				if err := tx.AddRequest(ctx, q); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	kept := map[wire.KeyHash]int{} // places where parties wait
	d.keepPlace = func(_ context.Context, key wire.KeyHash) { kept[key]++ }
	fill("dmz", maxWaitingPerRCP)
	late, told := d.asking("late", "", nil)
	d.see(late)
	if told.State != wire.EnrollPending || len(d.requests(api.RequestPending)) != maxWaitingPerRCP {
		t.Errorf("one more behind a full RCP: told %+v, %d wait", told, len(d.requests(api.RequestPending)))
	}
	elsewhere, _ := d.asking("elsewhere", "", nil)
	d.pending(t.Context(), elsewhere.id.KeyHash(), pendingAt{Name: "dmz-2", Peer: wire.Peer{Since: time.Now()}})
	if _, err := d.store.LastRequest(t.Context(), elsewhere.id.KeyHash()); err != nil {
		t.Errorf("a stranger behind another RCP is not listed: %v", err)
	}
	if kept[late.id.KeyHash()] != 0 || kept[elsewhere.id.KeyHash()] != 1 {
		t.Errorf("places are kept for %v, want the one that is listed, %s", kept, elsewhere.id.KeyHash())
	}
	fill("dmz-2", maxWaiting-maxWaitingPerRCP-1)
	third, _ := d.asking("third", "", nil)
	d.pending(t.Context(), third.id.KeyHash(), pendingAt{Name: "dmz-3", Peer: wire.Peer{Since: time.Now()}})
	if n := len(d.requests(api.RequestPending)); n != maxWaiting {
		t.Errorf("%d wait, want %d", n, maxWaiting)
	}

	d.enrolled(d.join(api.CreateJoin{Name: "new"}), "")
	again, err := identity.Open(old.id.Dir(), wire.RoleNode)
	if err != nil {
		t.Fatal(err)
	}
	req := &wire.EnrollRequest{Role: wire.RoleNode, ID: again.ID(), Versions: wire.OwnVersions}
	if got, err := d.register(t.Context(), again.KeyHash(), req, origin{}); err != nil || got.state != wire.EnrollGranted {
		t.Errorf("a renewal: %+v %v", got, err)
	}
	var refs []string
	for _, q := range d.requests(api.RequestPending) {
		refs = append(refs, q.ID)
	}
	out, err := d.decideMany(t.Context(), verbDiscard, api.DecideRequests{Refs: refs})
	if err != nil || out.Decided != maxWaiting {
		t.Errorf("discarded %d, failed %d: %v", out.Decided, out.Failed, err)
	}
	d.see(late)
	if n := len(d.requests(api.RequestPending)); n != 1 {
		t.Errorf("%d wait afterwards, want the one that is there", n)
	}
}
