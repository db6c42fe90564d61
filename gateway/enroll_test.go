package gateway

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/bus"
	"sallyport/gateway/store"
	"sallyport/internal/doors"
	"sallyport/internal/enroll"
	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

// memoryCA is the authority, in memory.
type memoryCA struct {
	*identitytest.CA
	t testing.TB

	mu     sync.Mutex
	env    *wire.Envelope
	issued []wire.IssueRequest
	fail   error
}

func (c *memoryCA) Root() *x509.Certificate { return c.CA.Root }

func (c *memoryCA) Issue(_ context.Context, r wire.IssueRequest) ([][]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fail != nil {
		return nil, c.fail
	}
	pub, _, err := identity.ParseCSR(r.CSR)
	if err != nil {
		return nil, err
	}
	c.issued = append(c.issued, r)
	return c.IssueKey(c.t, r.Party, pub, identitytest.Name(r.Name, wire.DefaultTenant)), nil
}

func (c *memoryCA) SignRevocations(_ context.Context, set wire.Revocations, after int64) (wire.Envelope, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fail != nil {
		return wire.Envelope{}, c.fail
	}
	if c.env != nil && after < numberOf(*c.env) {
		return wire.Envelope{}, fmt.Errorf("%w: number %d was signed meanwhile", identity.ErrOlder, numberOf(*c.env))
	}
	set.TrustDomain, set.Issued = c.TrustDomain, time.Now().UTC()
	env := c.Seal(c.t, wire.TypeRevocations, set)
	c.env = &env
	return env, nil
}

func (c *memoryCA) Revocations() (wire.Envelope, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.env == nil {
		return wire.Envelope{}, false
	}
	return *c.env, true
}

// desk is an enrolment whose parties live in the test.
type desk struct {
	*enrolment
	t  testing.TB
	ca *memoryCA

	mu       sync.Mutex
	parties  map[wire.KeyHash]*applicant // that wait now
	told     map[wire.ID][]string        // requests in sessions with certified parties
	answer   func(p wire.Party, method, path string, in, out any) error
	changes  []wire.ID
	looked   []wire.KeyHash
	released []wire.KeyHash
	device   func(wire.AttestationStatement) (*wire.Envelope, error) // of parties to come
}

func newDesk(t testing.TB) *desk {
	t.Helper()
	ca := &memoryCA{CA: identitytest.NewCA(t), t: t}
	return newDeskOn(t, ca, filepath.Join(t.TempDir(), "sallyport.db"), ca.Party(t, wire.RoleGateway))
}

func newDeskOn(t testing.TB, ca *memoryCA, path string, id *identity.Identity) *desk {
	t.Helper()
	db, err := store.Open(t.Context(), store.Config{Path: path, Log: slog.New(slog.DiscardHandler), Bus: new(bus.Local)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	d := &desk{t: t, ca: ca, parties: map[wire.KeyHash]*applicant{}, told: map[wire.ID][]string{}}
	d.enrolment = &enrolment{store: db, ca: ca, id: id, log: slog.New(slog.DiscardHandler), attempts: map[wire.KeyHash]*attempt{}, grace: 365 * 24 * time.Hour}
	d.open = func(_ context.Context, key wire.KeyHash, _ wire.ID) (endToEnd, string, error) {
		d.mu.Lock()
		defer d.mu.Unlock()
		if p := d.parties[key]; p != nil {
			return p, "dmz", nil
		}
		return nil, "", ErrNotConnected
	}
	d.changed = func(_ context.Context, _ wire.Role, id wire.ID) {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.changes = append(d.changes, id)
	}
	d.talk = func(ctx context.Context, p wire.Party, f func(context.Context, caller) error) error {
		return f(ctx, func(_ context.Context, method, path string, in, out any, _ int64) error {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.told[p.ID] = append(d.told[p.ID], method+" "+path)
			if d.answer != nil {
				return d.answer(p, method, path, in, out)
			}
			return nil
		})
	}
	d.push = func() {}
	d.release = func(key wire.KeyHash) {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.released = append(d.released, key)
	}
	d.look = func(key wire.KeyHash) {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.looked = append(d.looked, key)
	}
	if err := d.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return d
}

// applicant is a waiting party: the real one, without a network.
type applicant struct {
	*enroll.Applicant
	id   *identity.Identity
	file string
	bend func(r *http.Request, w *httptest.ResponseRecorder) bool // a hostile party answers itself
}

func (a *applicant) Close() error          { return nil }
func (a *applicant) Done() <-chan struct{} { return nil }

func (a *applicant) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	if a.bend == nil || !a.bend(r, w) {
		a.Handler(nil).ServeHTTP(w, r)
	}
	return w.Result(), nil
}

// party starts a party with a join code, and lets it wait.
func (d *desk) party(role wire.Role, code, name string) *applicant {
	d.t.Helper()
	id, err := identity.Open(d.t.TempDir(), role)
	if err != nil {
		d.t.Fatal(err)
	}
	return d.partyOf(id, code, name)
}

func (d *desk) partyOf(id *identity.Identity, code, name string) *applicant {
	d.t.Helper()
	file := filepath.Join(d.t.TempDir(), "join")
	if err := os.WriteFile(file, []byte(code), 0o600); err != nil {
		d.t.Fatal(err)
	}
	join, err := identity.OpenJoin(file, nil)
	if err != nil {
		d.t.Fatal(err)
	}
	a := &applicant{id: id, file: file}
	a.Applicant = enroll.New(enroll.Config{Identity: id, Join: join, Name: name, Tags: map[string]string{"env": "own"}, Program: "test", Attest: d.device, Log: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	d.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			d.t.Errorf("applicant: %v", err)
		}
	})
	wait, stop := context.WithTimeout(d.t.Context(), 10*time.Second)
	defer stop()
	if err := a.Wait(wait); err != nil {
		d.t.Fatal(err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.parties[id.KeyHash()] = a
	return a
}

// see shows the party to the gateway, as a new connection.
func (d *desk) see(a *applicant) {
	d.t.Helper()
	d.pending(d.t.Context(), a.id.KeyHash(), pendingAt{Name: "dmz", Peer: wire.Peer{Pending: a.id.KeyHash(), Source: "192.0.2.7:1234", Since: time.Now()}})
}

func (d *desk) join(in api.CreateJoin) string {
	d.t.Helper()
	c, err := d.createJoin(d.t.Context(), in)
	if err != nil {
		d.t.Fatal(err)
	}
	return c.Code
}

func (d *desk) enrolled(code, name string) *applicant {
	d.t.Helper()
	a := d.party(wire.RoleNode, code, name)
	d.see(a)
	if err := a.Ready(); err != nil {
		d.t.Fatalf("not enrolled: %v", err)
	}
	return a
}

func (d *desk) expect(a *applicant, state enroll.State, code string) {
	d.t.Helper()
	if s := a.Status(); s.State != state || s.Code != code {
		d.t.Errorf("status %+v, want %s %q", s, state, code)
	}
}

func (d *desk) requests(state string) []*store.Request {
	d.t.Helper()
	list, err := d.store.Requests(d.t.Context(), state)
	if err != nil {
		d.t.Fatal(err)
	}
	return list
}

func (d *desk) audited(what string) int {
	d.t.Helper()
	list, err := d.store.AuditLog(d.t.Context(), store.AuditFilter{What: what, Limit: 100})
	if err != nil {
		d.t.Fatal(err)
	}
	return len(list)
}

func TestTokenGrantsAtOnce(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	code := d.join(api.CreateJoin{Name: "web", Tags: map[string]string{"role": "web"}, AllowTags: []string{"env"}})
	a := d.enrolled(code, "wish")
	n, err := d.store.NodeByName(t.Context(), "default", "web")
	if err != nil {
		t.Fatal(err)
	}
	if n.ID != a.id.ID() || n.KeyHash != a.id.KeyHash() || n.NotAfter.IsZero() || !slices.Equal(n.AllowTags, []string{"env"}) {
		t.Errorf("node %+v", n)
	}
	tags, err := d.store.NodeTags(t.Context(), n.ID)
	if err != nil || len(tags) != 1 || tags[0].Source != store.TagJoin || tags[0].Value != "web" {
		t.Errorf("tags %+v %v", tags, err)
	}
	if r := d.ca.issued[0]; r.Name != "web" || r.Party.Role != wire.RoleNode || r.Party.ID != a.id.ID() {
		t.Errorf("issued %+v", r)
	}
	q := d.requests("")[0]
	if q.State != api.RequestDelivered || q.RCP != "dmz" || q.Source != "192.0.2.7:1234" || q.DecidedBy != "gateway" {
		t.Errorf("request %+v", q)
	}
	if d.audited("join.create") != 1 || d.audited("request.grant") != 1 || d.audited("certificate.issue") != 1 {
		t.Error("audit rows are missing")
	}
	if !slices.Contains(d.changes, n.ID) || !slices.Contains(d.released, n.KeyHash) {
		t.Error("the fleet was not told, or the pending channel was kept")
	}

	// The code is used up for everybody else, and stays good for this key.
	b := d.party(wire.RoleNode, code, "")
	d.see(b)
	d.expect(b, enroll.StateDenied, wire.EnrollTokenUsed)
	if len(d.requests(api.RequestPending)) != 0 {
		t.Error("a used token was queued")
	}
	if err := os.Remove(filepath.Join(a.id.Dir(), "chain.pem")); err != nil {
		t.Fatal(err)
	}
	lost, err := identity.Open(a.id.Dir(), wire.RoleNode)
	if err != nil {
		t.Fatal(err)
	}
	again := d.partyOf(lost, code, "")
	d.see(again)
	if err := again.Ready(); err != nil {
		t.Errorf("the same key may repeat its code: %v", err)
	}
	if j, err := d.store.Joins(t.Context()); err != nil || j[0].Used != 1 {
		t.Errorf("uses %d %v, want 1", j[0].Used, err)
	}
}

func TestBadTokens(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	foreign := newDesk(t)
	tamper := func(code string, f func(*wire.JoinCode)) string {
		c, err := wire.ParseJoinCode(code)
		if err != nil {
			t.Fatal(err)
		}
		f(&c)
		s, err := c.Encode()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	good := d.join(api.CreateJoin{Uses: 10})
	rcp, err := d.addRCP(t.Context(), api.AddRCP{Name: "edge"})
	if err != nil {
		t.Fatal(err)
	}
	revoked := d.join(api.CreateJoin{})
	c, err := wire.ParseJoinCode(revoked)
	if err != nil {
		t.Fatal(err)
	}
	expired := d.join(api.CreateJoin{TTL: wire.Duration(time.Second)})
	err = d.store.Update(t.Context(), func(ctx context.Context, tx *store.Tx) error { return tx.RevokeJoin(ctx, c.TokenID) })
	if err != nil {
		t.Fatal(err)
	}
	otherCode, err := wire.ParseJoinCode(foreign.join(api.CreateJoin{}))
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); { // the code's second passes
		if j, err := d.store.Joins(t.Context()); err != nil || slices.ContainsFunc(j, func(j *store.Join) bool { return time.Now().After(j.ExpiresAt) }) {
			break
		}
		<-time.After(50 * time.Millisecond)
	}
	for name, tc := range map[string]struct{ code, want string }{
		"wrong secret":        {tamper(good, func(c *wire.JoinCode) { c.Token = "guess" }), wire.EnrollTokenUnknown},
		"no secret":           {tamper(good, func(c *wire.JoinCode) { c.Token = "" }), wire.EnrollTokenUnknown},
		"unknown id":          {tamper(good, func(c *wire.JoinCode) { c.TokenID = string(wire.NewID()) }), wire.EnrollTokenUnknown},
		"of another gateway":  {tamper(good, func(c *wire.JoinCode) { c.TokenID, c.Token = otherCode.TokenID, otherCode.Token }), wire.EnrollTokenUnknown},
		"for another role":    {tamper(rcp.Join.Code, func(c *wire.JoinCode) { c.Role = wire.RoleNode }), wire.EnrollTokenForeign},
		"revoked":             {revoked, wire.EnrollTokenUnknown},
		"expired":             {expired, wire.EnrollTokenExpired},
		"the good one at all": {good, ""},
	} {
		t.Run(name, func(t *testing.T) {
			a := d.party(wire.RoleNode, tc.code, "")
			d.see(a)
			if tc.want == "" {
				d.expect(a, enroll.StateEnrolled, "")
				return
			}
			d.expect(a, enroll.StateDenied, tc.want)
			if s := a.Status(); len(s.Reason) < 20 {
				t.Errorf("the party is told %q", s.Reason)
			}
		})
	}
	if n := len(d.requests(api.RequestPending)); n != 0 {
		t.Errorf("%d bad tokens were queued", n)
	}
}

func TestStolenUUIDWaits(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	victim := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
	code := d.join(api.CreateJoin{Uses: 5})
	thief := d.party(wire.RoleNode, code, "thief")
	claim := func(id wire.ID) func(r *http.Request, w *httptest.ResponseRecorder) bool {
		return func(r *http.Request, w *httptest.ResponseRecorder) bool {
			if r.Method != http.MethodGet {
				return false
			}
			thief.Handler(nil).ServeHTTP(w, r)
			var req wire.EnrollRequest
			if err := json.Unmarshal(w.Body.Bytes(), &req); err != nil {
				t.Error(err)
			}
			req.ID = id
			w.Body.Reset()
			if err := json.NewEncoder(w).Encode(req); err != nil {
				t.Error(err)
			}
			return true
		}
	}
	thief.bend = claim(victim.id.ID())
	d.see(thief)
	d.expect(thief, enroll.StateWaiting, wire.EnrollUUIDInUse)
	if d.id.Revoked(victim.id.KeyHash()) {
		t.Error("the victim was revoked")
	}
	thief.bend = claim(d.id.ID())
	d.see(thief)
	d.expect(thief, enroll.StateDenied, wire.EnrollBadRequest)
	if j, err := d.store.Join(t.Context(), mustParse(t, code).TokenID); err != nil || j.Used != 0 {
		t.Errorf("the token was consumed: %+v %v", j, err)
	}
}

func TestNameThatReadsAsAUUIDIsRefused(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	victim := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
	for _, name := range []string{string(victim.id.ID()), string(victim.id.ID())[:8]} {
		thief := d.party(wire.RoleNode, d.join(api.CreateJoin{}), name)
		d.see(thief)
		d.expect(thief, enroll.StateDenied, wire.EnrollBadRequest)
		if s := thief.Status(); !strings.Contains(s.Reason, "SALLYPORT_NODE_NAME") {
			t.Errorf("reason %q", s.Reason)
		}
	}
}

func mustParse(t *testing.T, code string) wire.JoinCode {
	t.Helper()
	c, err := wire.ParseJoinCode(code)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestForeignCSRIsRefused(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a := d.party(wire.RoleNode, d.join(api.CreateJoin{}), "")
	other, err := identity.Open(t.TempDir(), wire.RoleNode)
	if err != nil {
		t.Fatal(err)
	}
	a.bend = func(r *http.Request, w *httptest.ResponseRecorder) bool {
		if r.Method != http.MethodGet {
			t.Errorf("a verdict was sent: %s", r.Method)
			return true
		}
		csr, err := other.CSR(false)
		if err != nil {
			t.Error(err)
		}
		_ = json.NewEncoder(w).Encode(wire.EnrollRequest{Role: wire.RoleNode, ID: a.id.ID(), CSR: csr, Versions: wire.OwnVersions})
		return true
	}
	if _, err := d.ask(t.Context(), a.id.KeyHash(), origin{}); !errors.Is(err, errForeignCSR) {
		t.Errorf("got %v", err)
	}
	if len(d.ca.issued) != 0 {
		t.Error("a certificate was issued")
	}
}

func TestRCPEnrols(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	added, err := d.addRCP(t.Context(), api.AddRCP{Name: "dmz-1", Address: "dmz.example:9090"})
	if err != nil {
		t.Fatal(err)
	}
	if c := mustParse(t, added.Join.Code); len(c.Addresses) != 0 || c.Role != wire.RoleRCP || c.Name != "dmz-1" {
		t.Errorf("a code never makes a dialler of an RCP: %+v", c)
	}
	if _, err := d.addRCP(t.Context(), api.AddRCP{Name: "dmz-1"}); !api.Is(err, api.CodeExists) {
		t.Errorf("twice: %v", err)
	}
	a := d.party(wire.RoleRCP, added.Join.Code, "")
	d.see(a)
	if err := a.Ready(); err != nil {
		t.Fatal(err)
	}
	r, err := d.store.RCP(t.Context(), "dmz-1")
	if err != nil || r.PartyID != a.id.ID() || r.KeyHash != a.id.KeyHash() || r.State != api.RCPConnecting || r.NotAfter.IsZero() {
		t.Errorf("record %+v %v", r, err)
	}
	if c := mustParse(t, d.join(api.CreateJoin{})); !slices.Equal(c.Addresses, []string{"dmz.example:9090"}) {
		t.Errorf("addresses of a node's code: %v", c.Addresses)
	}
	// The record is pinned to its UUID: another one waits.
	code, err := d.joinRCP(t.Context(), r, api.JoinRCP{})
	if err != nil {
		t.Fatal(err)
	}
	b := d.party(wire.RoleRCP, code.Join.Code, "")
	d.see(b)
	d.expect(b, enroll.StateWaiting, wire.EnrollNameInUse)
	code, err = d.joinRCP(t.Context(), r, api.JoinRCP{Replace: true})
	if err != nil {
		t.Fatal(err)
	}
	c := d.party(wire.RoleRCP, code.Join.Code, "")
	d.see(c)
	if err := c.Ready(); err != nil || !d.id.Revoked(a.id.KeyHash()) {
		t.Errorf("--replace: %v, old one revoked: %v", err, d.id.Revoked(a.id.KeyHash()))
	}
	// A removed record's code is good for nothing.
	added, err = d.addRCP(t.Context(), api.AddRCP{Name: "gone"})
	if err != nil {
		t.Fatal(err)
	}
	rec, err := d.store.RCP(t.Context(), "gone")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.removeRCP(t.Context(), rec); err != nil {
		t.Fatal(err)
	}
	e := d.party(wire.RoleRCP, added.Join.Code, "")
	d.see(e)
	d.expect(e, enroll.StateDenied, wire.EnrollTokenUnknown)
	// Nor is it when there is one of that name again.
	again, err := d.addRCP(t.Context(), api.AddRCP{Name: "gone"})
	if err != nil {
		t.Fatal(err)
	}
	f := d.party(wire.RoleRCP, added.Join.Code, "")
	d.see(f)
	d.expect(f, enroll.StateDenied, wire.EnrollTokenUnknown)
	g := d.party(wire.RoleRCP, again.Join.Code, "")
	d.see(g)
	if err := g.Ready(); err != nil {
		t.Errorf("the new code: %v", err)
	}
}

func TestCreateJoinRefuses(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	for name, in := range map[string]api.CreateJoin{
		"name with uses":       {Name: "web", Uses: 2},
		"bad name":             {Name: "a b"},
		"bad tag":              {Tags: map[string]string{"a=b": "c"}},
		"bad glob":             {AllowTags: []string{"["}},
		"negative uses":        {Uses: -1},
		"ttl":                  {TTL: wire.Duration(-time.Hour)},
		"replace without name": {Replace: true},
	} {
		if _, err := d.createJoin(t.Context(), in); !api.Is(err, api.CodeInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := d.createJoin(t.Context(), api.CreateJoin{RCPs: []string{"nobody"}}); !api.Is(err, api.CodeNotFound) {
		t.Errorf("unknown rcp: %v", err)
	}
	if n := d.audited("join.create"); n != 0 {
		t.Errorf("%d codes were made", n)
	}
	c, err := d.createJoin(t.Context(), api.CreateJoin{})
	if err != nil || c.Uses != 1 || time.Until(c.Expires) < 23*time.Hour || c.State != "open" {
		t.Errorf("defaults: %+v %v", c.Join, err)
	}
	j, err := d.store.Join(t.Context(), c.ID)
	if err != nil {
		t.Fatal(err)
	}
	if secret := mustParse(t, c.Code).Token; secret == "" || strings.Contains(j.TokenHash, secret) || j.TokenHash != hashToken(secret) {
		t.Error("the token is not stored as a hash")
	}
}

// A party that stays is not asked over and over; a new connection is.
func TestAttemptsAreBounded(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a := d.party(wire.RoleNode, d.join(api.CreateJoin{Manual: true}), "")
	asked := 0
	a.bend = func(r *http.Request, _ *httptest.ResponseRecorder) bool {
		if r.Method == http.MethodGet {
			asked++
		}
		return false
	}
	peer := wire.Peer{Pending: a.id.KeyHash(), Since: time.Now()}
	for range 5 {
		d.pending(t.Context(), a.id.KeyHash(), pendingAt{Peer: peer})
	}
	if asked != 1 {
		t.Errorf("asked %d times, want once", asked)
	}
	d.see(a)
	if asked != 2 {
		t.Errorf("a new connection: asked %d times, want 2", asked)
	}
	// A party that waits at two RCPs is not asked anew whenever it is met at the other one.
	here := []pendingAt{{Link: wire.NewID(), Name: "here", Peer: peer}, {Link: wire.NewID(), Name: "there", Peer: peer}}
	here[1].Peer.Since = peer.Since.Add(time.Second)
	d.ways = func(wire.KeyHash) []pendingAt { return slices.Clone(here) }
	for n := range 6 {
		d.pending(t.Context(), a.id.KeyHash(), here[n%2])
	}
	if asked != 3 {
		t.Errorf("at two RCPs: asked %d times, want 3", asked)
	}
	here[1].Peer.Since = time.Now()
	d.pending(t.Context(), a.id.KeyHash(), here[0])
	if asked != 4 {
		t.Errorf("a new connection to the other: asked %d times, want 4", asked)
	}
	for range maxAttempts + 10 {
		d.due(wire.KeyHash(wire.NewID()), []pendingAt{{Peer: wire.Peer{Since: time.Now()}}})
	}
	if n := len(d.attempts); n > maxAttempts {
		t.Errorf("%d attempts are remembered", n)
	}
}

// Whatever a waiting party says, nothing but its own name and UUID comes of it.
func FuzzEnrollRequest(f *testing.F) {
	d := newDesk(f)
	id, err := identity.Open(f.TempDir(), wire.RoleNode)
	if err != nil {
		f.Fatal(err)
	}
	csr, err := id.CSR(false)
	if err != nil {
		f.Fatal(err)
	}
	seed, err := json.Marshal(wire.EnrollRequest{Role: wire.RoleNode, ID: id.ID(), Name: "web", CSR: csr, Versions: wire.OwnVersions, Tags: map[string]string{"a": "b"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte(`{"role":"gateway"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		a := &applicant{id: id, bend: func(_ *http.Request, w *httptest.ResponseRecorder) bool {
			_, _ = w.Write(b) // a recorder takes all
			return true
		}}
		d.mu.Lock()
		d.parties[id.KeyHash()] = a
		d.mu.Unlock()
		state, err := d.ask(t.Context(), id.KeyHash(), origin{})
		if err == nil && state == wire.EnrollGranted {
			t.Fatalf("granted without a token: %s", b)
		}
		if len(d.ca.issued) != 0 {
			t.Fatalf("a certificate was issued: %s", b)
		}
	})
}

// BenchmarkEnrolRows is what an enrolment costs in the database, by as many at a
// time as a gateway has under way. CPU time says more than time: most of that is
// waiting for the disk.
func BenchmarkEnrolRows(b *testing.B) {
	d := newDesk(b)
	code, err := wire.ParseJoinCode(d.join(api.CreateJoin{Role: wire.RoleNode, Uses: b.N}))
	if err != nil {
		b.Fatal(err)
	}
	enrol := func() error {
		serial := wire.NewNonce()
		key := wire.HashSPKI(serial[:])
		req := &wire.EnrollRequest{Role: wire.RoleNode, ID: wire.NewID(), TokenID: code.TokenID, Token: code.Token, Versions: wire.OwnVersions, CSR: make([]byte, 400)}
		grant, err := d.register(b.Context(), key, req, origin{spot: spot{rcp: "dmz"}})
		if err != nil {
			return err
		}
		leaf := &x509.Certificate{SerialNumber: new(big.Int).SetBytes(serial[:]), NotAfter: time.Now().Add(90 * 24 * time.Hour)}
		row := &store.Certificate{Issuer: key, Serial: doors.Serial(leaf.SerialNumber), KeyHash: key, Via: string(req.ID), NotAfter: leaf.NotAfter}
		if err := d.store.Update(b.Context(), func(ctx context.Context, tx *store.Tx) error { return tx.AddCertificate(ctx, row) }); err != nil {
			return err
		}
		return d.delivered(b.Context(), key, grant, &issued{leaf: leaf, key: key, issuer: key})
	}
	cpu := func() time.Duration {
		var r syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
			b.Fatal(err)
		}
		return time.Duration(r.Utime.Nano() + r.Stime.Nano())
	}
	began := cpu()
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := enrol(); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64((cpu()-began).Microseconds())/float64(b.N), "cpu-µs/op")
}
