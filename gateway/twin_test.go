package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport/gateway/store"
	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

// reignRCP is the part of an RCP's session API that keeps reigns, and lies if
// the test wants it to.
type reignRCP struct {
	mu   sync.Mutex
	held *wire.Envelope
	mark *wire.ReignMark // what the hello says; nil: nothing
	puts int
}

func (r *reignRCP) talk(id *identity.Identity) caller {
	return func(_ context.Context, method, path string, in, out any, _ int64) error {
		r.mu.Lock()
		defer r.mu.Unlock()
		switch {
		case method == http.MethodPut && path == wire.PathReign:
			r.puts++
			if r.held == nil {
				env := in.(wire.Envelope)
				r.held = &env
			}
		case method == http.MethodGet && strings.HasPrefix(path, wire.PathReign):
		default:
			return errors.New("not in this test")
		}
		*out.(*wire.Envelope) = *r.held
		return nil
	}
}

// show is what becomes of a gateway that meets this RCP.
func (r *reignRCP) show(w *world) error {
	party, _ := w.s.id.Party()
	hello := &wire.Hello{Party: wire.Party{Role: wire.RoleRCP, ID: wire.NewID(), TrustDomain: party.TrustDomain}}
	if r.mark != nil {
		hello.Reigns = []wire.ReignMark{*r.mark}
	}
	return newTwin(w.s).compare(context.Background(), r.talk(w.s.id), hello)
}

func TestReignIsBroughtAndRefreshed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run()
	eventually(t, "the gateway has its certificate", func() bool { return w.s.Ready() == nil })
	r := new(reignRCP)
	if err := r.show(w); err != nil || r.puts != 1 {
		t.Fatalf("%v after %d", err, r.puts)
	}
	var brought wire.Reign
	if err := json.Unmarshal(r.held.Payload, &brought); err != nil || brought.Generation != 1 || brought.Installation != w.db.Installation().UID {
		t.Fatalf("%+v, %v", brought, err)
	}
	mark := brought.Mark()
	r.mark = &mark
	if err := r.show(w); err != nil || r.puts != 1 {
		t.Errorf("brought again without need: %v, %d", err, r.puts)
	}
	mark.Issued = mark.Issued.Add(-2 * reignEvery)
	if err := r.show(w); err != nil || r.puts != 2 {
		t.Errorf("not brought again before its signature ends: %v, %d", err, r.puts)
	}
	older := mark
	older.Generation = 0
	r.mark = &older
	if err := r.show(w); err != nil || r.puts != 3 {
		t.Errorf("an older one was left there: %v, %d", err, r.puts)
	}
}

// newerReign is the proof that stops the gateway of w.
func newerReign(w *world, signer *identity.Identity) wire.Reign {
	own := w.s.twin.own()
	own.Generation, own.RestoredAt, own.Name, own.Gateway = own.Generation+1, time.Now().UTC(), "newer", signer.ID()
	return own
}

func TestOnlyProofStopsAGateway(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run()
	eventually(t, "the gateway has its certificate", func() bool { return w.s.Ready() == nil })
	gw := w.ca.Party(t, wire.RoleGateway)
	seal := func(id *identity.Identity, typ string, r wire.Reign) *wire.Envelope {
		t.Helper()
		env, err := id.Sign(typ, r)
		if err != nil {
			t.Fatal(err)
		}
		return &env
	}
	good := newerReign(w, gw)
	other, leap, older, inName := good, good, good, good
	other.Installation = string(wire.NewID())
	leap.Generation = 1 << 60
	older.Generation = 0
	inName.Gateway = w.s.id.ID()
	rcp, node, foreign := w.ca.Party(t, wire.RoleRCP), w.ca.Party(t, wire.RoleNode), identitytest.NewCA(t).Party(t, wire.RoleGateway)
	expired := w.ca.Expired(t, wire.RoleGateway)
	changed := seal(gw, wire.TypeReign, older)
	changed.Payload, _ = json.Marshal(good)
	for name, env := range map[string]*wire.Envelope{
		"nothing":              {},
		"an RCP's own":         seal(rcp, wire.TypeReign, newerReign(w, rcp)),
		"a node's":             seal(node, wire.TypeReign, newerReign(w, node)),
		"another trust domain": seal(foreign, wire.TypeReign, newerReign(w, foreign)),
		"an expired gateway's": seal(expired, wire.TypeReign, newerReign(w, expired)),
		"another installation": seal(gw, wire.TypeReign, other),
		"another document":     seal(gw, wire.TypeUnlock, good),
		"in another's name":    seal(gw, wire.TypeReign, inName),
		"changed":              changed,
		"beyond all bounds":    seal(gw, wire.TypeReign, leap),
		"older":                seal(gw, wire.TypeReign, older),
	} {
		for _, claimed := range []bool{false, true} {
			r := &reignRCP{held: env}
			if claimed { // a hostile RCP says in its hello what it likes
				mark := good.Mark()
				r.mark = &mark
			}
			if err := r.show(w); errors.Is(err, ErrSuperseded) {
				t.Errorf("%s (claimed: %v) stopped the gateway: %v", name, claimed, err)
			}
		}
	}
	if w.db.Installation().SupersededBy != 0 || len(w.s.twin.newer) != 0 {
		t.Fatal("something was written down")
	}
	mark := good.Mark()
	if err := (&reignRCP{held: seal(gw, wire.TypeReign, good), mark: &mark}).show(w); !errors.Is(err, ErrSuperseded) {
		t.Errorf("the proof does not stop it: %v", err)
	}
}

func TestSupersededGatewayStaysStopped(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	uid := w.db.Installation().UID
	if err := w.db.Supersede(t.Context(), 7, "test"); err != nil {
		t.Fatal(err)
	}
	if err := w.db.Close(); err != nil {
		t.Fatal(err)
	}
	w.open()
	defer func() { _ = w.db.Close() }()
	s := &Server{store: w.db}
	s.twin = newTwin(s)
	if err := s.Run(t.Context()); !errors.Is(err, ErrSuperseded) || !strings.Contains(err.Error(), uid) || !strings.Contains(err.Error(), "generation 7") {
		t.Errorf("it starts: %v", err)
	}
	if n := len(auditOf(t, w.db, "installation.superseded")); n != 1 {
		t.Errorf("%d audit rows", n)
	}
	if err := w.db.RaiseGeneration(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if inst := w.db.Installation(); inst.Generation != 8 || inst.SupersededBy != 0 || inst.Reign == "" || s.twin.stopped() != nil {
		t.Errorf("restored: %+v", inst)
	}
}

func auditOf(t *testing.T, db *store.DB, what string) []*store.AuditEntry {
	t.Helper()
	rows, err := db.AuditLog(t.Context(), store.AuditFilter{What: what, Limit: 10})
	if err != nil {
		t.Fatal(err)
	}
	var out []*store.AuditEntry
	for i := range rows {
		out = append(out, &rows[i])
	}
	return out
}

func TestOrderOfReigns(t *testing.T) {
	t.Parallel()
	now := time.Now()
	rising := []wire.Reign{
		{Generation: 1}, {Generation: 2, RestoredAt: now, Name: "b"}, {Generation: 2, RestoredAt: now, Name: "c"},
		{Generation: 2, RestoredAt: now.Add(time.Second), Name: "a"}, {Generation: 3, RestoredAt: now.Add(-time.Hour), Name: "a"},
	}
	for i, a := range rising {
		for j, b := range rising {
			if a.After(b) != (i > j) || a.Mark().Same(b.Mark()) != (i == j) {
				t.Errorf("%d and %d: after %v", i, j, a.After(b))
			}
		}
	}
}
