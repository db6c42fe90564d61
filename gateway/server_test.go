package gateway

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	"sallyport/config"
	"sallyport/gateway/api"
	"sallyport/gateway/bus"
	"sallyport/gateway/store"
	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/session"
	"sallyport/internal/wire"
)

func TestNodeBehindAnRCP(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r, n := w.rcp("dmz"), w.enrolled(w.node("web"))
	n.emit(2500)
	r.hold(n)
	w.run()
	w.state(n.id.ID(), wire.StateRunning)
	eventually(t, "all events are acknowledged", func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		return n.acked == 2500
	})
	got := w.events(n.id.ID())
	if len(got) != 2500 || got[0].Text != "event 1" || got[2499].Text != "event 2500" {
		t.Fatalf("%d events are stored", len(got))
	}
	n.emit(1)
	r.hint(n, "", wire.HintOutbox)
	eventually(t, "the next event arrives", func() bool { return len(w.events(n.id.ID())) == 2501 })
	eventually(t, "the node is running in the database", func() bool {
		row, err := w.db.Node(context.Background(), n.id.ID())
		return err == nil && row.State == wire.StateRunning && row.Program == "test"
	})
	eventually(t, "the rcp is connected in the database", func() bool {
		rec, err := w.db.RCP(context.Background(), "dmz")
		return err == nil && rec.State == api.RCPConnected && rec.Program == "test"
	})
}

// What arrives after the gateway has ended its side of the stream is stored
// without an answer: the node must not keep it for ever.
func TestEventsThatComeLateAreAcknowledgedByTheNextPull(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r, n := w.rcp("dmz"), w.enrolled(w.node("web"))
	n.emit(3)
	n.late = true
	r.hold(n)
	w.run()
	eventually(t, "all events are acknowledged", func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		return n.acked == 3
	})
	if got := w.events(n.id.ID()); len(got) != 3 {
		t.Errorf("%d events are stored", len(got))
	}
}

func TestDownAndUpAgainIsOnePairOfEvents(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r, n := w.rcp("dmz"), w.enrolled(w.node("web"))
	r.hold(n)
	w.run()
	w.state(n.id.ID(), wire.StateRunning)
	r.drop(n)
	w.state(n.id.ID(), wire.StateDown)
	eventually(t, "an event says so", func() bool { return len(w.events(n.id.ID())) == 1 })
	w.restart() // the pair is closed by another process
	r.hold(n)
	w.state(n.id.ID(), wire.StateRunning)
	eventually(t, "the pair is closed", func() bool { return len(w.events(n.id.ID())) == 2 })
	e := w.events(n.id.ID())
	if e[0].Severity != wire.SeverityMajor || e[0].State != api.EventClosed || e[1].Severity != wire.SeverityNormal || e[0].Key != e[1].Key {
		t.Fatalf("events: %+v", e)
	}
}

func TestLostRCPRaisesOneEventAndRecovers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r := w.rcp("dmz")
	var nodes []*fakeNode
	for _, name := range []string{"a", "b", "c"} {
		nodes = append(nodes, w.enrolled(w.node(name)))
	}
	r.hold(nodes...)
	w.run()
	for _, n := range nodes {
		w.state(n.id.ID(), wire.StateRunning)
	}
	r.stop()
	for _, n := range nodes {
		w.state(n.id.ID(), wire.StateUnreachable)
	}
	internal := func() []store.Event { return w.events("") }
	rcpEvents := func() (out []store.Event) {
		for _, e := range internal() {
			if e.NodeID == "" {
				out = append(out, e)
			}
		}
		return out
	}
	eventually(t, "the failure is an event", func() bool { return len(rcpEvents()) == 1 })
	r.listen()
	for _, n := range nodes {
		w.state(n.id.ID(), wire.StateRunning)
		if e := w.events(n.id.ID()); len(e) != 0 {
			t.Fatalf("node %s raised %+v", n.name, e)
		}
	}
	eventually(t, "the recovery is an event", func() bool { return len(rcpEvents()) == 2 })
	if e := rcpEvents(); e[0].Severity != wire.SeverityCritical || e[1].Severity != wire.SeverityNormal || !strings.Contains(e[0].Text, "dmz") {
		t.Fatalf("events: %+v", e)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.resumed == 0 {
		t.Fatal("the peers stream was not resumed, though the rcp kept its memory")
	}
}

func TestSessionFailsOverToAnotherRCP(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	bad, good := w.rcp("bad"), w.rcp("good")
	n := w.enrolled(w.node("web"))
	bad.hold(n)
	good.hold(n)
	bad.refuse = true
	w.run()
	w.state(n.id.ID(), wire.StateRunning)
	for range 20 {
		a := w.act(n, 0, "true")
		n.exit(n.started(t, "true"), 0)
		if a = w.done(a); a.State != wire.ActionSucceeded {
			t.Fatalf("action is %s: %s", a.State, a.Reason)
		}
		n.mu.Lock()
		clear(n.runs)
		n.mu.Unlock()
	}
	if good.connects(n.id.ID()) == 0 {
		t.Fatal("the good rcp was not used")
	}
	if c := bad.connects(n.id.ID()); c > 3 {
		t.Fatalf("the failing rcp was asked %d times", c)
	}
}

func TestDeadRCPDelaysNoOther(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	stuck, good := w.rcp("stuck"), w.rcp("good")
	stuck.hang = make(chan struct{})
	defer close(stuck.hang)
	var all []*fakeNode
	for i := range 60 {
		n := w.enrolled(w.node("s" + string(rune('a'+i%26)) + string(rune('a'+i/26))))
		stuck.hold(n)
		all = append(all, n)
	}
	n := w.enrolled(w.node("web"))
	good.hold(n)
	w.run()
	began := time.Now()
	w.state(n.id.ID(), wire.StateRunning)
	if d := time.Since(began); d > 14*time.Second { // handshakes that hang are given up after 15
		t.Fatalf("the good node took %v", d)
	}
	if p := w.s.fleet.Presence(all[0].id.ID()); p.State != wire.StatePending {
		t.Fatalf("a node whose sessions hang is %s", p.State)
	}
}

func TestNodeAndRCPThatDialTheGateway(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.cfg.Gateway = config.Gateway{ChannelListen: "127.0.0.1:0"}
	n, behind := w.enrolled(w.node("direct")), w.enrolled(w.node("behind"))
	r := w.rcp("edge")
	r.stop()
	w.update(func(ctx context.Context, tx *store.Tx) error {
		rec, err := tx.RCP(ctx, "edge")
		if err != nil {
			return err
		}
		rec.Address = ""
		return tx.SaveRCP(ctx, rec)
	})
	r.hold(behind)
	w.run()
	eventually(t, "the gateway listens", func() bool { return w.s.ChannelAddr() != nil })
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{}, 2)
	signals := make(chan wire.Signal, 1)
	dial := func(id *identity.Identity, serve func(ctx context.Context, c *channel.Conn)) {
		d := &channel.Dialer{Addr: w.s.ChannelAddr().String(), Peer: channel.PeerUpstream, Identity: id, Carrier: channel.CarrierH2, Log: testLog(t), Backoff: channel.Backoff{}}
		go func() { defer func() { ended <- struct{}{} }(); _ = d.Run(ctx, serve) }()
	}
	defer func() { cancel(); <-ended; <-ended }()
	dial(n.id, func(ctx context.Context, c *channel.Conn) { _ = c.Serve(ctx, directNode{n: n, signals: signals}) })
	dial(r.id, func(ctx context.Context, c *channel.Conn) { _ = c.Serve(ctx, r) })
	w.state(n.id.ID(), wire.StateRunning)
	w.state(behind.id.ID(), wire.StateRunning)
	if p := w.s.fleet.Presence(n.id.ID()); len(p.RCPs) != 0 || len(p.Paths) != 1 || p.Paths[0].RCP != directHop {
		t.Fatalf("direct node: %+v", p)
	}
	n.emit(3)
	signals <- wire.Signal{ID: n.id.ID(), Hints: []string{wire.HintOutbox}}
	eventually(t, "its events arrive", func() bool { return len(w.events(n.id.ID())) == 3 })
	tr, err := w.s.trace(ctx, &store.Node{ID: n.id.ID(), Name: "direct"})
	if err != nil || !tr.OK {
		t.Fatalf("trace: %+v, %v", tr, err)
	}
}

func TestRCPWithoutARecordIsRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.cfg.Gateway = config.Gateway{ChannelListen: "127.0.0.1:0"}
	w.run()
	eventually(t, "the gateway listens", func() bool { return w.s.ChannelAddr() != nil })
	d := &channel.Dialer{Addr: w.s.ChannelAddr().String(), Peer: channel.PeerUpstream, Identity: w.ca.Party(t, wire.RoleRCP), Carrier: channel.CarrierH2, Log: testLog(t)}
	if c, err := d.Dial(context.Background()); err == nil {
		c.Close(nil)
		t.Fatal("an rcp that no record names was let in")
	}
}

func TestConfiguredRCPIsPinnedToWhoAnswersFirst(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r := w.rcp("x")
	w.update(func(ctx context.Context, tx *store.Tx) error { return tx.RemoveRCP(ctx, "x") })
	w.cfg.RCPs = config.Endpoints{{Addr: r.addr}}
	n := w.enrolled(w.node("web"))
	r.hold(n)
	w.run()
	w.state(n.id.ID(), wire.StateRunning)
	rec, err := w.db.RCP(context.Background(), r.addr)
	if err != nil || rec.PartyID != r.id.ID() || rec.Source != store.RCPConfigured {
		t.Fatalf("record: %+v, %v", rec, err)
	}
	// Its key is known from then on: by it it is renewed when its leaf has ended.
	if k, err := w.db.Key(context.Background(), rec.KeyHash); err != nil || k.PartyID != r.id.ID() || !k.NotAfter.Equal(r.id.NotAfter()) {
		t.Errorf("key: %+v, %v", k, err)
	}
	// Another one at the same address is not it.
	r.stop()
	r.id = w.ca.Party(t, wire.RoleRCP)
	r.listen()
	w.state(n.id.ID(), wire.StateUnreachable)
	eventually(t, "the reason is told", func() bool { return w.s.links.lastError(rec) != "" })
}

func TestRemovedRCPIsForgotten(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r, n := w.rcp("dmz"), w.enrolled(w.node("web"))
	r.hold(n)
	w.run()
	w.state(n.id.ID(), wire.StateRunning)
	w.update(func(ctx context.Context, tx *store.Tx) error {
		tx.Wake(bus.RCPs)
		return tx.RemoveRCP(ctx, "dmz")
	})
	w.state(n.id.ID(), wire.StateDown)
	if _, ok := w.s.fleet.hop(r.id.ID()); ok {
		t.Fatal("its link is still there")
	}
}

// A pki directory that was lost is made anew at the next start. Join codes would
// pin a root that no party of this installation trusts.
func TestAnotherAuthorityIsRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run()
	eventually(t, "the gateway has its certificate", func() bool { return w.s.Ready() == nil })
	w.stop()
	w.open()
	s, err := New(w.cfg, Deps{Store: w.db, Bus: w.bus, CA: testIssuer{t, identitytest.NewCA(t)}, Identity: w.s.id, Log: testLog(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.db.Close() })
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := s.Run(ctx); err == nil || !strings.Contains(err.Error(), "put back its pki directory") {
		t.Errorf("it started, or says: %v", err)
	}
}

// An RCP that listens hears of its removal now or never: nobody lets it in
// afterwards, and it takes a new join code only if it knows.
func TestRemovedRCPIsTold(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r, n := w.rcp("dmz"), w.enrolled(w.node("web"))
	r.hold(n)
	w.run()
	w.state(n.id.ID(), wire.StateRunning)
	rec, err := w.db.RCP(context.Background(), "dmz")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.s.enrolment.removeRCP(context.Background(), rec); err != nil {
		t.Fatal(err)
	}
	if !r.id.Revoked(r.id.KeyHash()) {
		t.Error("it does not know that it is revoked")
	}
	w.state(n.id.ID(), wire.StateDown)
	eventually(t, "it is dialled no more", func() bool {
		w.s.links.mu.Lock()
		defer w.s.links.mu.Unlock()
		return len(w.s.links.hops[rec.PartyID]) == 0
	})
}

// What keeps an RCP that waits for its enrolment away is shown with it.
func TestPendingRCPShowsWhyItIsNotReached(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run()
	w.update(func(ctx context.Context, tx *store.Tx) error {
		return tx.AddRCP(ctx, &store.RCP{Name: "typo", Address: "127.0.0.1:1", Source: store.RCPAdded, State: api.RCPPending, StateReason: "waiting for it to enrol"})
	})
	view := func() api.RCP {
		rec, err := w.db.RCP(context.Background(), "typo")
		if err != nil {
			t.Fatal(err)
		}
		return (&rest{s: w.s}).rcpView(rec, nil)
	}
	eventually(t, "the reason is told", func() bool { return strings.Contains(view().LastError, "127.0.0.1:1") })
	if err := w.s.links.reload(context.Background()); err != nil {
		t.Fatal(err)
	}
	if v := view(); !strings.Contains(v.LastError, "127.0.0.1:1") || v.StateReason != "waiting for it to enrol" {
		t.Errorf("after the records were read anew: %+v", v)
	}
}

// An RCP that was granted, and was never there, is what its record says: also after
// its certificate went into a file (PK-07).
func TestGrantedRCPIsWhatItsRecordSays(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run()
	w.update(func(ctx context.Context, tx *store.Tx) error {
		return tx.AddRCP(ctx, &store.RCP{Name: "far", PartyID: wire.NewID(), KeyHash: wire.HashSPKI([]byte("far")), Source: store.RCPAdded})
	})
	for _, want := range []store.RCP{{State: api.RCPPending, StateReason: "granted"}, {State: api.RCPConnecting, StateReason: "exported to a file"}} {
		w.update(func(ctx context.Context, tx *store.Tx) error {
			return tx.SetRCPState(ctx, "far", want.State, want.StateReason)
		})
		if err := w.s.links.reload(t.Context()); err != nil {
			t.Fatal(err)
		}
		rec, err := w.db.RCP(t.Context(), "far")
		if err != nil {
			t.Fatal(err)
		}
		if v := (&rest{s: w.s}).rcpView(rec, nil); v.State != want.State || v.StateReason != want.StateReason {
			t.Errorf("shown as %s, %q; want %s, %q", v.State, v.StateReason, want.State, want.StateReason)
		}
	}
}

// An RCP that waits for an operator says so, whatever dialling it meets meanwhile
// (PK-12). One that is connected is not the party that asks under its name, and one
// that is away need not be.
func TestRCPThatWaitsForAnOperatorSaysSo(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	id := wire.NewID()
	w.update(func(ctx context.Context, tx *store.Tx) error {
		for _, p := range []*store.RCP{{Name: "by-name", State: api.RCPPending}, {Name: "by-id", PartyID: id, KeyHash: wire.HashSPKI([]byte("q2")), State: api.RCPFailed}, {Name: "away", PartyID: wire.NewID(), State: api.RCPFailed}, {Name: "other", State: api.RCPPending}, {Name: "there", State: api.RCPConnected}} {
			p.Source = store.RCPAdded
			if err := tx.AddRCP(ctx, p); err != nil {
				return err
			}
		}
		for _, q := range []*store.Request{
			{ID: "q1", Role: wire.RoleRCP, Name: "by-name", PartyID: wire.NewID(), State: api.RequestPending, Reason: "uuid-in-use", JoinID: "code"},
			{ID: "q2", Role: wire.RoleRCP, PartyID: id, State: api.RequestPending, Reason: "certificate-lapsed"},
			{ID: "q6", Role: wire.RoleRCP, Name: "away", PartyID: wire.NewID(), State: api.RequestPending, Reason: "name-in-use"},
			{ID: "q3", Role: wire.RoleNode, Name: "other", PartyID: wire.NewID(), State: api.RequestPending},
			{ID: "q4", Role: wire.RoleRCP, Name: "other", PartyID: wire.NewID(), State: api.RequestDenied},
			{ID: "q5", Role: wire.RoleRCP, Name: "there", PartyID: wire.NewID(), State: api.RequestPending},
		} {
			q.KeyHash, q.CSR = wire.HashSPKI([]byte(q.ID)), []byte{1}
			if err := tx.AddRequest(ctx, q); err != nil {
				return err
			}
		}
		return nil
	})
	w.run()
	l, err := (&rest{s: w.s}).listRCPs(t.Context(), &Page{Limit: 50})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"by-name": "q1", "by-id": "q2", "away": "q6", "other": "", "there": ""}
	for _, r := range l.Body.Items {
		if q, ours := want[r.Name]; !ours || r.Request != q || q != "" && (r.State == api.RCPPending) != (r.Name != "away") || q != "" && !strings.Contains(r.StateReason, "request grant --fingerprint "+wire.HashSPKI([]byte(q)).Fingerprint()+" "+q) {
			t.Errorf("%+v", r)
		}
		delete(want, r.Name)
	}
	if len(want) > 0 {
		t.Errorf("not listed: %v", want)
	}
}

// Who drains a party is shown that it drains, and not how it was before.
func TestDrainIsShownAtOnce(t *testing.T) {
	t.Parallel()
	w, _, n := running(t)
	n.mux.HandleFunc(wire.PathDrain, func(_ http.ResponseWriter, req *http.Request) {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.hello.State = wire.StateRunning
		if req.Method == http.MethodPost {
			n.hello.State = wire.StateDraining
		}
	})
	row, err := w.s.store.Node(t.Context(), n.id.ID())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		drain *wire.Drain
		want  wire.NodeState
	}{{&wire.Drain{}, wire.StateDraining}, {nil, wire.StateRunning}} {
		if err := w.s.drainNode(t.Context(), row, c.drain); err != nil {
			t.Fatal(err)
		}
		w.s.seenDraining(t.Context(), row.ID, c.drain != nil)
		if got := w.s.fleet.Presence(row.ID).State; got != c.want {
			t.Errorf("%s: it is shown as %s", drainVerb(c.drain), got)
		}
	}
}

// An RCP that never came and that nobody dials is not looked for at a firewall.
func TestDoctorOfAnRCPThatNeverCame(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run()
	w.update(func(ctx context.Context, tx *store.Tx) error {
		return tx.AddRCP(ctx, &store.RCP{Name: "later", Source: store.RCPAdded, State: api.RCPPending, StateReason: "waiting for it to enrol"})
	})
	for _, c := range w.s.Doctor(t.Context()) {
		if c.Check == "rcp later" {
			if c.OK || c.Detail != "waiting for it to enrol" || !strings.Contains(c.Fix, "sallyport rcp join later") || strings.Contains(c.Fix, "firewall") {
				t.Errorf("%+v", c)
			}
			return
		}
	}
	t.Error("the doctor does not know it")
}

func TestTraceOfALiveAndOfADeadNode(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r, n := w.rcp("dmz"), w.enrolled(w.node("web"))
	r.hold(n)
	w.run()
	w.state(n.id.ID(), wire.StateRunning)
	row := &store.Node{ID: n.id.ID(), Name: "web"}
	tr, err := w.s.trace(context.Background(), row)
	if err != nil || !tr.OK || len(tr.Hops) != 3 {
		t.Fatalf("trace: %+v, %v", tr, err)
	}
	first, second, last := tr.Hops[0], tr.Hops[1], tr.Hops[2]
	if first.To != "dmz" || first.Dialler != "gateway" || first.Source != verified || first.Carrier == "" || first.Address == "" {
		t.Errorf("first hop: %+v", first)
	}
	if second.From != "dmz" || second.Dialler != "web" || second.Address != "192.0.2.7:1234" || second.Source != "reported by rcp dmz" {
		t.Errorf("second hop: %+v", second)
	}
	if last.Kind != "session" || last.RTT <= 0 || !strings.Contains(tr.Verdict, "answers end to end") {
		t.Errorf("session: %+v, verdict %q", last, tr.Verdict)
	}

	r.mu.Lock()
	r.refuse = true
	r.mu.Unlock()
	w.s.sessions.cut(n.id.ID())
	if tr, err = w.s.trace(context.Background(), row); err != nil || tr.OK || !strings.Contains(tr.Verdict, "refused on the way") {
		t.Fatalf("trace: %+v, %v", tr, err)
	}
	r.drop(n)
	w.state(n.id.ID(), wire.StateDown)
	if tr, err = w.s.trace(context.Background(), row); err != nil || tr.OK || !strings.Contains(tr.Verdict, "closed by the node") || len(tr.Hops) == 0 {
		t.Fatalf("trace: %+v, %v", tr, err)
	}
	r.stop()
	w.state(r.id.ID(), wire.StateDown)
	if tr, err = w.s.trace(context.Background(), row); err != nil || tr.Hops[0].State != hopCut || tr.Hops[0].Error == "" {
		t.Fatalf("trace: %+v, %v", tr, err)
	}
}

func TestSessionsAreKeptWarmAndResumed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r, n := w.rcp("dmz"), w.enrolled(w.node("web"))
	r.hold(n)
	w.run()
	w.state(n.id.ID(), wire.StateRunning)
	before := r.connects(n.id.ID())
	party := w.s.party(wire.RoleNode, n.id.ID())
	hello := func() {
		t.Helper()
		err := w.s.sessions.Do(context.Background(), party, func(ctx context.Context, c *conversation) error {
			_, _, err := c.Hello(ctx)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for range 10 {
		hello()
	}
	if c := r.connects(n.id.ID()); c != before {
		t.Fatalf("%d more streams were opened for a warm session", c-before)
	}
	w.s.sessions.mu.Lock()
	warm := w.s.sessions.warm[n.id.ID()]
	_ = warm.rt.Close() // dies unnoticed
	w.s.sessions.mu.Unlock()
	hello()
	if c := r.connects(n.id.ID()); c != before+1 {
		t.Fatalf("%d streams after the session died, want one more than %d", c, before)
	}
	w.s.sessions.mu.Lock()
	rt := w.s.sessions.warm[n.id.ID()].rt
	w.s.sessions.mu.Unlock()
	if s, ok := rt.(*session.Session); !ok || !s.Resumed() {
		t.Fatal("the session was not resumed")
	}
}

func TestWarmSessionsAreBounded(t *testing.T) {
	t.Parallel()
	f := newBench(t).f
	m, err := newMetrics(nil, f)
	if err != nil {
		t.Fatal(err)
	}
	s := newSessions(f, m, 0, nil, nil)
	var all []*conversation
	for i := range defaultWarm + 50 {
		s.mu.Lock()
		c := &conversation{party: wire.Party{ID: wire.NewID()}, rt: nopSession{}}
		if i < 10 {
			s.useLocked(c)
		} else {
			s.restLocked(c)
		}
		s.keepLocked(c)
		s.unlock()
		all = append(all, c)
	}
	if len(s.warm) != defaultWarm {
		t.Fatalf("%d sessions are warm", len(s.warm))
	}
	for i, c := range all {
		if warm, want := s.warm[c.party.ID] == c, i < 10 || i >= 60; warm != want {
			t.Errorf("session %d is warm: %v, want %v: those in use stay, and those that were used last", i, warm, want)
		}
	}
}

// stuckSession is one whose stream takes nothing more.
type stuckSession struct {
	nopSession
	closing, free chan struct{}
}

func (s stuckSession) Close() error {
	close(s.closing)
	<-s.free
	return nil
}

func TestSessionThatIsSlowToCloseDelaysNoOther(t *testing.T) {
	t.Parallel()
	f := newBench(t).f
	m, err := newMetrics(nil, f)
	if err != nil {
		t.Fatal(err)
	}
	s := newSessions(f, m, 0, nil, nil)
	stuck := stuckSession{closing: make(chan struct{}), free: make(chan struct{})}
	bad := &conversation{party: wire.Party{ID: wire.NewID()}, rt: stuck}
	good := &conversation{party: wire.Party{ID: wire.NewID()}, rt: nopSession{}}
	s.warm[bad.party.ID], s.warm[good.party.ID] = bad, good
	cut := make(chan struct{})
	go func() { defer close(cut); s.cut(bad.party.ID) }()
	<-stuck.closing
	got := make(chan error, 1)
	go func() {
		got <- s.Do(t.Context(), good.party, func(context.Context, *conversation) error { return nil })
	}()
	select {
	case err := <-got:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("a session waits for another one's end")
	}
	close(stuck.free)
	<-cut
}

func TestWrongClockIsAnEvent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n := w.enrolled(w.node("web"))
	w.run()
	id := n.id.ID()
	eventually(t, "the fleet is loaded", func() bool { return w.s.fleet.Presence(id).Known })
	task := task{id: id, role: wire.RoleNode, name: "web", known: true}
	for _, skew := range []time.Duration{time.Second, -2 * time.Minute, -3 * time.Minute, 5 * time.Second, 0} {
		h := n.hello
		if _, err := w.s.heard(context.Background(), task, &h, skew); err != nil {
			t.Fatal(err)
		}
	}
	e := w.events(id)
	if len(e) != 2 || e[0].Key != keyClockSkew || e[0].Severity != wire.SeverityWarning || !strings.Contains(e[0].Text, "-2m0s") || e[1].Severity != wire.SeverityNormal {
		t.Fatalf("events: %+v", e)
	}
}

func TestSnapshotRevertedNodeStartsANewSpool(t *testing.T) {
	t.Parallel()
	w, r, n := running(t)
	id := n.id.ID()
	n.emit(5)
	r.hint(n, "", wire.HintOutbox)
	eventually(t, "events arrive", func() bool { n.mu.Lock(); defer n.mu.Unlock(); return n.acked == 5 })
	n.mu.Lock() // back to when two events were acknowledged, and on from there
	n.events, n.acked = n.events[:2], 2
	n.mu.Unlock()
	n.emit(2)
	r.hint(n, "x", wire.HintOutbox)
	eventually(t, "what happened since arrives too", func() bool { return len(w.events(id)) == 7 })
	spools := map[string]int{}
	for _, e := range w.events(id) {
		spools[e.Spool]++
	}
	if len(spools) != 2 || spools["spool-web"] != 5 || spools["spool-web+"] != 2 {
		t.Fatalf("events by spool: %v", spools)
	}
}

func TestNodeWithoutARowIsLockedAndItsEventsAreKept(t *testing.T) {
	t.Parallel()
	w := newWorld(t) // the database was wiped
	r, n := w.rcp("dmz"), w.node("lonely")
	n.emit(3)
	r.hold(n)
	w.run()
	w.state(n.id.ID(), wire.StateLocked)
	if s := w.s.fleet.strangers(); len(s) != 1 || s[0].Name != "lonely" || !strings.Contains(s[0].Reason, "unknown") {
		t.Fatalf("strangers: %+v", s)
	}
	reported := func() (own int) {
		for _, e := range w.events(n.id.ID()) {
			if e.Spool == "spool-lonely" {
				own++
			}
		}
		return own
	}
	eventually(t, "its events are kept", func() bool { return reported() == 3 })
	if nodes, err := w.db.Nodes(context.Background()); err != nil || len(nodes) != 0 {
		t.Fatalf("it was adopted: %v, %v", nodes, err)
	}
	// It may be one that enrolled after the backup, and that nobody wants.
	out, err := (&rest{s: w.s}).revokeNode(context.Background(), &ByRef{Ref: string(n.id.ID())})
	if err != nil || out.Body.Revocations == 0 || !w.s.id.Revoked(n.id.KeyHash()) {
		t.Errorf("revoked: %+v, %v", out, err)
	}
}

func TestProofGoesByAnotherRCP(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two, n := w.rcp("one"), w.rcp("two"), w.enrolled(w.node("web"))
	one.hold(n)
	two.hold(n)
	w.run()
	w.state(n.id.ID(), wire.StateRunning)
	eventually(t, "both are connected", func() bool { return len(w.s.fleet.Presence(n.id.ID()).RCPs) == 2 })
	for range 4 {
		again, _ := w.s.visit(context.Background(), task{id: n.id.ID(), role: wire.RoleNode, name: "web", known: true, wants: wantProve})
		if again != 0 {
			t.Fatal("the visit failed")
		}
	}
	if a, b := one.connects(n.id.ID()), two.connects(n.id.ID()); a < 2 || b < 2 {
		t.Fatalf("%d streams by one, %d by two", a, b)
	}
}

// TestOwnCertificateOfAClockThatWasAhead: a gateway whose clock was put right
// would else be refused by everybody until that day comes.
func TestOwnCertificateOfAClockThatWasAhead(t *testing.T) {
	w := newWorld(t)
	w.run()
	eventually(t, "the gateway has its certificate", func() bool { return w.s.Ready() == nil })
	w.ca.Worn(t, w.s.id, identitytest.NotBefore(time.Now().Add(362*24*time.Hour)), identitytest.NotAfter(time.Now().Add(379*24*time.Hour)))
	w.restart()
	eventually(t, "it has another", func() bool { return !w.s.id.OutOfTime() })
}
