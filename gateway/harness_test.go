package gateway

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"sallyport/gateway/api"
	"sallyport/gateway/bus"
	"sallyport/gateway/store"
	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/session"
	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

// parallel is how many tests run at a time where the command does not say: they
// wait for timers and for each other's answers far more than they compute.
const parallel = "6"

func TestMain(m *testing.M) {
	flag.Parse()
	if !slices.ContainsFunc(os.Args, func(a string) bool { return strings.HasPrefix(a, "-test.parallel") }) {
		_ = flag.Set("test.parallel", parallel)
	}
	goleak.VerifyTestMain(m,
		goleak.IgnoreTopFunction("database/sql.(*DB).connectionOpener"), // closed with the test's database, which may be a moment later
	)
}

// testIssuer is a CA of identitytest as the gateway sees it.
type testIssuer struct {
	t  testing.TB
	ca *identitytest.CA
}

func (i testIssuer) Issue(context.Context, wire.IssueRequest) ([][]byte, error) {
	return nil, errors.New("not in this test")
}

func (i testIssuer) IssueGateway(_ context.Context, id wire.ID, csr []byte) ([][]byte, error) {
	pub, _, err := identity.ParseCSR(csr)
	if err != nil {
		return nil, err
	}
	return i.ca.IssueKey(i.t, wire.Party{Role: wire.RoleGateway, ID: id, TrustDomain: i.ca.TrustDomain}, pub), nil
}

func (i testIssuer) SignRevocations(_ context.Context, set wire.Revocations, _ int64) (wire.Envelope, error) {
	set.TrustDomain, set.Issued = i.ca.TrustDomain, time.Now().UTC()
	return i.ca.Seal(i.t, wire.TypeRevocations, set), nil
}
func (i testIssuer) Revocations() (wire.Envelope, bool) { return wire.Envelope{}, false }
func (i testIssuer) Root() *x509.Certificate            { return i.ca.Root }
func (i testIssuer) TrustDomain() string                { return i.ca.TrustDomain }

// world is one gateway with a real database, and fakes around it that speak
// real channels on loopback.
type world struct {
	t    *testing.T
	ca   *identitytest.CA
	dir  string
	db   *store.DB
	bus  *bus.Local
	s    *Server
	cfg  Config
	stop func()

	deploys bool          // keep the hook that pushes desired states
	before  func(*Server) // called before Run
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, ca: identitytest.NewCA(t), dir: t.TempDir()}
	w.open()
	return w
}

func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// open opens the database.
func (w *world) open() {
	w.t.Helper()
	w.bus = new(bus.Local)
	db, err := store.Open(context.Background(), store.Config{Path: filepath.Join(w.dir, "sallyport.db"), Log: testLog(w.t), Bus: w.bus})
	if err != nil {
		w.t.Fatal(err)
	}
	w.db = db
}

// run starts the gateway; it ends with the test, or by w.stop.
func (w *world) run() {
	w.t.Helper()
	id, err := identity.Open(filepath.Join(w.dir, "identity"), wire.RoleGateway)
	if err != nil {
		w.t.Fatal(err)
	}
	w.s, err = New(w.cfg, Deps{Store: w.db, Bus: w.bus, CA: testIssuer{w.t, w.ca}, Identity: id, Log: testLog(w.t)})
	if err != nil {
		w.t.Fatal(err)
	}
	w.s.hooks.hop = func(context.Context, wire.ID) error { return nil }
	w.s.hooks.met = nil // what the hooks do is tested beside them
	if w.deploys {
		w.s.hooks.met = append(w.s.hooks.met, w.s.reconcile)
	}
	w.s.fleet.t.grace = time.Second
	w.s.fleet.t.settle = 2 * time.Second
	w.s.room.look = func(context.Context) (int64, int64, error) { return 1 << 40, 1 << 40, nil } // whatever the disk is like
	if w.before != nil {
		w.before(w.s)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.s.Run(ctx) }()
	db := w.db
	w.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				w.t.Errorf("gateway ended with %v", err)
			}
		case <-time.After(20 * time.Second):
			w.t.Error("gateway does not stop")
		}
		if err := db.Close(); err != nil {
			w.t.Error(err)
		}
	})
	w.t.Cleanup(func() { w.stop() })
}

// restart stops the gateway and starts another on the same directory.
func (w *world) restart() {
	w.t.Helper()
	w.stop()
	w.open()
	w.run()
}

func (w *world) update(f func(ctx context.Context, tx *store.Tx) error) {
	w.t.Helper()
	if err := w.db.Update(context.Background(), f); err != nil {
		w.t.Fatal(err)
	}
}

// eventually waits for a condition.
// waitLimit bounds the wait for what takes a second on a machine that is not
// busy with six tests and their race detectors.
const waitLimit = 40 * time.Second

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(waitLimit)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not in time: %s", what)
		}
	}
}

func (w *world) state(id wire.ID, want wire.NodeState) {
	w.t.Helper()
	deadline := time.Now().Add(waitLimit)
	for {
		p := w.s.fleet.Presence(id)
		if p.State == want {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("%s is %s (%s), want %s", p.Name, p.State, p.Reason, want)
		}
		<-time.After(5 * time.Millisecond)
	}
}

// fakeNode answers sessions as a node does, without being one.
type fakeNode struct {
	id   *identity.Identity
	name string
	mux  *http.ServeMux

	targets tunnel.Handler

	mu       sync.Mutex
	hello    wire.Hello
	held     wire.Nonce // the last one brought; zero: too old to know
	hellos   int
	confined bool // as it was told
	spool    string
	events   []wire.Event
	acked    int64
	pulls    int
	late     bool // send the events only after the gateway has ended its side, once
	runs     map[wire.ID]*fakeRun
	cutAfter int64 // end the answer to an action after this frame, once
	cancels  int
	deaf     bool // to cancels
}

// fakeRun is one action that a node was asked for.
type fakeRun struct {
	action wire.Action
	starts int
	frames []wire.ActionFrame
	more   chan struct{} // closed when frames changed
}

func (w *world) node(name string) *fakeNode {
	w.t.Helper()
	n := &fakeNode{id: w.ca.Party(w.t, wire.RoleNode, identitytest.Name(name, store.DefaultTenant)), name: name, mux: http.NewServeMux(),
		spool: "spool-" + name, runs: map[wire.ID]*fakeRun{}, held: wire.NewNonce()}
	party, _ := n.id.Party()
	n.hello = wire.Hello{Party: party, Boot: "b1", Program: "test", Versions: wire.OwnVersions, Name: name, Mode: "managed", State: wire.StateRunning,
		Installation: w.db.Installation().UID, NotAfter: n.id.NotAfter(), RenewAfter: n.id.RenewAfter(), Salt: "s"}
	n.mux.HandleFunc("GET "+wire.PathHello, n.getHello)
	n.mux.HandleFunc("POST "+wire.PathOutbox, n.outbox)
	n.mux.HandleFunc("POST "+wire.PathActions, n.action)
	n.mux.HandleFunc("DELETE "+wire.PathActionID+"{id}", n.cancelAction)
	n.mux.HandleFunc("POST "+wire.PathEcho, func(rw http.ResponseWriter, r *http.Request) { _, _ = io.Copy(rw, r.Body) })
	return n
}

// enrolled adds the node's row.
func (w *world) enrolled(n *fakeNode) *fakeNode {
	w.t.Helper()
	w.update(func(ctx context.Context, tx *store.Tx) error {
		return tx.AddNode(ctx, &store.Node{ID: n.id.ID(), Name: n.name, State: wire.StatePending, KeyHash: n.id.KeyHash()})
	})
	if w.s != nil {
		if err := w.s.nodeChanged(context.Background(), n.id.ID()); err != nil {
			w.t.Fatal(err)
		}
	}
	return n
}

func (n *fakeNode) getHello(rw http.ResponseWriter, r *http.Request) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hellos++
	n.confined = r.Header.Get(wire.HeaderQuarantined) == "1"
	previous := n.held
	if brought, err := wire.ParseNonce(r.Header.Get(wire.HeaderNonce)); err == nil && !n.held.IsZero() {
		n.held = brought
		if r.Header.Get(wire.HeaderMark) != "" {
			n.hello.Boot = wire.MarkBoot(n.hello.Boot, brought)
		}
	}
	h := n.hello
	h.Previous = previous
	h.Time = time.Now()
	h.Outbox = n.stateLocked()
	_ = json.NewEncoder(rw).Encode(h)
}

func (n *fakeNode) stateLocked() wire.OutboxState {
	st := wire.OutboxState{Spool: n.spool, First: n.acked + 1, Next: 1}
	if len(n.events) > 0 {
		st.Next = n.events[len(n.events)-1].Seq + 1
	}
	st.Depth = st.Next - 1 - n.acked
	return st
}

// emit puts events into the spool.
func (n *fakeNode) emit(count int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for range count {
		seq := int64(len(n.events) + 1)
		n.events = append(n.events, wire.Event{ID: wire.NewID(), Seq: seq, Time: time.Now().UTC(), Severity: wire.SeverityMinor, Text: fmt.Sprintf("event %d", seq)})
	}
}

func (n *fakeNode) outbox(rw http.ResponseWriter, r *http.Request) {
	rc := http.NewResponseController(rw)
	_ = rc.EnableFullDuplex()
	send := func(up wire.OutboxUp) error {
		b, _ := wire.AppendLine(nil, up)
		if _, err := rw.Write(b); err != nil {
			return err
		}
		return rc.Flush()
	}
	n.mu.Lock()
	n.pulls++
	st := n.stateLocked()
	n.mu.Unlock()
	if send(wire.OutboxUp{State: &st}) != nil {
		return
	}
	lines := wire.NewLineReader(r.Body, wire.MaxFrameLine)
	var first wire.OutboxDown
	if lines.Next(&first) != nil || first.Watermark == nil || first.Watermark.Spool != st.Spool {
		return
	}
	n.mu.Lock()
	if first.Watermark.Seq >= st.Next { // we were turned back: what is not acknowledged goes into a new spool
		n.spool += "+"
		n.events = slices.Clone(n.events[n.acked:])
		for i := range n.events {
			n.events[i].Seq = int64(i + 1)
		}
		n.acked, first.Watermark.Seq = 0, 0
		st = n.stateLocked()
		if send(wire.OutboxUp{State: &st}) != nil {
			n.mu.Unlock()
			return
		}
	}
	todo := slices.Clone(n.events[min(int(first.Watermark.Seq), len(n.events)):])
	n.acked = max(n.acked, first.Watermark.Seq)
	late := n.late
	n.late = false
	n.mu.Unlock()
	if late {
		var d wire.OutboxDown
		for lines.Next(&d) == nil {
		}
	}
	var sending sync.WaitGroup
	defer sending.Wait()
	sending.Go(func() {
		for _, e := range todo {
			if r.Context().Err() != nil || send(wire.OutboxUp{Event: &e}) != nil {
				return
			}
		}
	})
	for {
		var d wire.OutboxDown
		if lines.Next(&d) != nil {
			return
		}
		if d.Ack != nil {
			n.mu.Lock()
			n.acked = max(n.acked, d.Ack.Seq)
			n.mu.Unlock()
		}
	}
}

func (n *fakeNode) action(rw http.ResponseWriter, r *http.Request) {
	var env wire.Envelope
	var a wire.Action
	if err := wire.DecodeJSON(r.Body, wire.MaxActionBody, &env); err != nil {
		http.Error(rw, err.Error(), http.StatusBadRequest)
		return
	}
	if _, err := n.id.VerifyEnvelope(env, wire.TypeAction, wire.RoleGateway, &a); err != nil {
		http.Error(rw, err.Error(), http.StatusForbidden)
		return
	}
	if a.Command[0] == "forbidden" {
		channel.Refuse(rw, http.StatusForbidden, "forbidden is not in SALLYPORT_NODE_ALLOW_COMMANDS")
		return
	}
	n.mu.Lock()
	run := n.runs[a.ID]
	if run == nil {
		if r.URL.Query().Get(wire.QueryAttach) == "1" {
			n.mu.Unlock()
			channel.Refuse(rw, http.StatusNotFound, "no such run")
			return
		}
		run = &fakeRun{action: a, more: make(chan struct{})}
		n.runs[a.ID] = run
		run.starts++
	}
	n.mu.Unlock()
	after, _ := strconv.ParseInt(r.URL.Query().Get("after"), 10, 64)
	rc := http.NewResponseController(rw)
	rw.WriteHeader(http.StatusOK)
	_ = rc.Flush()
	for {
		n.mu.Lock()
		frames, more := slices.Clone(run.frames), run.more
		cut := n.cutAfter
		n.mu.Unlock()
		for _, f := range frames {
			if f.N <= after {
				continue
			}
			after = f.N
			b, _ := wire.AppendLine(nil, f)
			_, _ = rw.Write(b)
			_ = rc.Flush()
			if f.Result != nil {
				return
			}
			if f.N == cut {
				n.mu.Lock()
				n.cutAfter = 0
				n.mu.Unlock()
				panic(http.ErrAbortHandler)
			}
		}
		select {
		case <-more:
		case <-r.Context().Done():
			return
		}
	}
}

func (n *fakeNode) cancelAction(_ http.ResponseWriter, r *http.Request) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cancels++
	if run := n.runs[wire.ID(r.PathValue("id"))]; run != nil && !n.deaf {
		run.add(wire.ActionFrame{Result: &wire.ActionResult{State: wire.ActionCancelled, ExitCode: 143, Signal: 15, Started: time.Now(), Ended: time.Now()}})
	}
}

func (f *fakeRun) add(fr wire.ActionFrame) {
	fr.N = int64(len(f.frames) + 1)
	f.frames = append(f.frames, fr)
	close(f.more)
	f.more = make(chan struct{})
}

// started waits for the run of a command and returns it.
func (n *fakeNode) started(t testing.TB, command string) *fakeRun {
	t.Helper()
	var run *fakeRun
	eventually(t, "the node is asked to run "+command, func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		for _, r := range n.runs {
			if r.action.Command[0] == command {
				run = r
			}
		}
		return run != nil
	})
	return run
}

func (n *fakeNode) output(r *fakeRun, text string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r.add(wire.ActionFrame{Stream: "stdout", Data: []byte(text)})
}

func (n *fakeNode) exit(r *fakeRun, code int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	state := wire.ActionSucceeded
	if code != 0 {
		state = wire.ActionFailed
	}
	r.add(wire.ActionFrame{Result: &wire.ActionResult{State: state, ExitCode: code, Started: time.Now(), Ended: time.Now()}})
}

// fakeRCP is an RCP that says what the test tells it to say.
type fakeRCP struct {
	t    *testing.T
	name string
	id   *identity.Identity
	addr string
	stop func()

	mu       sync.Mutex
	nodes    map[wire.ID]*fakeNode
	lines    []wire.PeersLine // since the beginning
	raw      []string         // instead, if set
	changed  chan struct{}
	epoch    string
	asked    map[string]int // CONNECTs by authority
	kept     map[string]int // of these, those that are to keep a party's place
	refuse   bool           // every CONNECT
	hang     chan struct{}  // CONNECTs wait for it, if set
	helloID  wire.ID        // lies about itself
	streams  int            // peers streams
	resumed  int            // of these from a position
	requests []string       // method and path of everything else
}

// rcp starts a fake RCP and makes its record.
func (w *world) rcp(name string) *fakeRCP {
	w.t.Helper()
	r := &fakeRCP{t: w.t, name: name, id: w.ca.Party(w.t, wire.RoleRCP), nodes: map[wire.ID]*fakeNode{}, changed: make(chan struct{}),
		epoch: "epoch-1", asked: map[string]int{}, kept: map[string]int{}, addr: "127.0.0.1:0"}
	r.helloID = r.id.ID()
	r.listen()
	w.update(func(ctx context.Context, tx *store.Tx) error {
		return tx.AddRCP(ctx, &store.RCP{Name: name, PartyID: r.id.ID(), Address: r.addr, Source: store.RCPAdded, State: api.RCPConnecting, KeyHash: r.id.KeyHash()})
	})
	return r
}

func (r *fakeRCP) listen() {
	r.t.Helper()
	l, err := channel.Listen(channel.ListenConfig{Addr: r.addr, Identity: r.id, AllowUpstream: true, Log: testLog(r.t)})
	if err != nil {
		r.t.Fatal(err)
	}
	r.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = l.Run(ctx, func(ctx context.Context, c *channel.Conn) { _ = c.Serve(ctx, r) })
	}()
	r.stop = sync.OnceFunc(func() { cancel(); <-ended })
	r.t.Cleanup(func() { r.stop() })
}

// hold makes the RCP hold and report a node.
func (r *fakeRCP) hold(nodes ...*fakeNode) {
	for _, n := range nodes {
		r.mu.Lock()
		r.nodes[n.id.ID()] = n
		r.mu.Unlock()
		r.say(wire.PeersLine{Peer: &wire.Peer{Role: wire.RoleNode, ID: n.id.ID(), Carrier: "h2", Source: "192.0.2.7:1234", Since: time.Now()}})
	}
}

// drop makes it lose a node.
func (r *fakeRCP) drop(n *fakeNode) {
	r.mu.Lock()
	delete(r.nodes, n.id.ID())
	r.mu.Unlock()
	r.say(wire.PeersLine{Gone: &wire.Gone{ID: n.id.ID(), Reason: "closed by the node"}})
}

// hint makes it pass on a signal.
func (r *fakeRCP) hint(n *fakeNode, digest string, hints ...string) {
	r.say(wire.PeersLine{Peer: &wire.Peer{Role: wire.RoleNode, ID: n.id.ID(), Carrier: "h2", Since: time.Now(), Digest: digest, Hints: hints}})
}

func (r *fakeRCP) say(l wire.PeersLine) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l.Pos = int64(len(r.lines) + 1)
	r.lines = append(r.lines, l)
	close(r.changed)
	r.changed = make(chan struct{})
}

func (r *fakeRCP) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	switch {
	case req.Method == http.MethodConnect:
		r.connect(w, req)
	case req.URL.Path == wire.PathPeers:
		r.peers(w, req)
	default:
		r.mu.Lock()
		r.requests = append(r.requests, req.Method+" "+req.URL.Path)
		r.mu.Unlock()
		channel.Refuse(w, http.StatusNotFound, "nothing here")
	}
}

func (r *fakeRCP) peers(w http.ResponseWriter, req *http.Request) {
	rc := http.NewResponseController(w)
	r.mu.Lock()
	r.streams++
	pos, _ := strconv.Atoi(req.URL.Query().Get("pos"))
	resumed := pos > 0 && req.URL.Query().Get("epoch") == r.epoch
	if resumed {
		r.resumed++
	} else {
		pos = 0
	}
	hello := wire.PeersLine{Hello: &wire.PeersHello{ID: r.helloID, Epoch: r.epoch, Versions: wire.OwnVersions, Snapshot: !resumed}}
	raw := r.raw
	r.mu.Unlock()
	send := func(l wire.PeersLine) bool {
		b, _ := wire.AppendLine(nil, l)
		_, err := w.Write(b)
		return err == nil && rc.Flush() == nil
	}
	if !send(hello) {
		return
	}
	for _, s := range raw {
		if _, err := io.WriteString(w, s+"\n"); err != nil {
			return
		}
	}
	_ = rc.Flush()
	synced := resumed
	for {
		r.mu.Lock()
		lines, changed := r.lines[min(pos, len(r.lines)):], r.changed
		r.mu.Unlock()
		for _, l := range lines {
			if !send(l) {
				return
			}
		}
		pos += len(lines)
		if !synced {
			synced = true
			if !send(wire.PeersLine{Synced: true, Pos: int64(pos)}) {
				return
			}
		}
		select {
		case <-changed:
		case <-time.After(15 * time.Second):
			if !send(wire.PeersLine{Pos: int64(pos)}) {
				return
			}
		case <-req.Context().Done():
			return
		}
	}
}

func (r *fakeRCP) connect(w http.ResponseWriter, req *http.Request) {
	id, _, err := wire.ParseAuthority(req.Host)
	if err != nil {
		channel.Refuse(w, http.StatusBadRequest, err.Error())
		return
	}
	r.mu.Lock()
	r.asked[req.Host]++
	if req.Header.Get(wire.HeaderRequested) != "" {
		r.kept[req.Host]++
	}
	n, refuse, hang := r.nodes[id], r.refuse, r.hang
	r.mu.Unlock()
	if hang != nil {
		select {
		case <-hang:
		case <-req.Context().Done():
			return
		}
	}
	var serve func(net.Conn)
	switch {
	case refuse:
	case id == r.id.ID():
		serve = func(c net.Conn) { _ = session.Serve(req.Context(), c, r.id, r.self()) }
	case n != nil:
		serve = func(c net.Conn) { _ = session.Handlers{API: n.mux, Targets: n.targets}.Serve(req.Context(), c, n.id) }
	}
	if serve == nil {
		channel.Refuse(w, http.StatusNotFound, "party "+string(id)+" is not connected here")
		return
	}
	stream, err := channel.AcceptConnect(w, req)
	if err != nil {
		return
	}
	defer func() { _ = stream.Close() }()
	serve(stream)
}

func (r *fakeRCP) self() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+wire.PathHello, func(w http.ResponseWriter, _ *http.Request) {
		party, _ := r.id.Party()
		_ = json.NewEncoder(w).Encode(wire.Hello{Party: party, Program: "test", Versions: wire.OwnVersions, State: wire.StateRunning, Time: time.Now(), NotAfter: r.id.NotAfter()})
	})
	mux.HandleFunc("PUT "+wire.PathRevocations, func(w http.ResponseWriter, req *http.Request) {
		var env wire.Envelope
		err := wire.DecodeJSON(req.Body, wire.MaxRevocations, &env)
		if err == nil {
			_, err = r.id.ApplyRevocations(env)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusUnprocessableEntity)
		}
	})
	return mux
}

func (r *fakeRCP) connects(id wire.ID) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.asked[wire.ConnectAuthority(id)]
}

// events returns the events of a node, oldest first.
func (w *world) events(id wire.ID) []store.Event {
	w.t.Helper()
	out, err := w.db.Events(context.Background(), store.EventFilter{NodeID: id, Ascending: true, Merged: true, Limit: 100_000})
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

// act runs a command on a node as the API does.
func (w *world) act(n *fakeNode, ttl time.Duration, command ...string) *store.Action {
	w.t.Helper()
	return w.batch(n, ttl, command)[0]
}

// batch runs commands on a node that were asked for together.
func (w *world) batch(n *fakeNode, ttl time.Duration, commands ...[]string) (actions []*store.Action) {
	w.t.Helper()
	batch := "b-" + string(wire.NewID())
	for _, c := range commands {
		actions = append(actions, &store.Action{ID: wire.NewID(), Batch: batch, Tenant: store.DefaultTenant, NodeID: n.id.ID(), NodeName: n.name, Command: c, TTL: ttl})
	}
	w.update(func(ctx context.Context, tx *store.Tx) error { return tx.AddActions(ctx, actions) })
	var copies []*store.Action
	for _, a := range actions {
		copied := *a
		copies = append(copies, &copied)
	}
	if err := w.s.runAction(context.Background(), copies); err != nil {
		w.t.Fatal(err)
	}
	return actions
}

// done waits for the end of an action.
func (w *world) done(a *store.Action) *store.Action {
	w.t.Helper()
	var now *store.Action
	eventually(w.t, "the action ends", func() bool {
		var err error
		if now, err = w.db.Action(context.Background(), a.ID); err != nil {
			w.t.Fatal(err)
		}
		return !now.Open()
	})
	return now
}

// directNode is a node that hangs on the gateway itself.
type directNode struct {
	n       *fakeNode
	signals chan wire.Signal
	lanes   *fakeLanes // nil: refused
}

func (d directNode) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodConnect {
		stream, err := channel.AcceptConnect(w, r)
		if err != nil {
			return
		}
		defer func() { _ = stream.Close() }()
		_ = session.Handlers{API: d.n.mux, Targets: d.n.targets}.Serve(r.Context(), stream, d.n.id)
		return
	}
	if r.URL.Path == wire.PathLanes && d.lanes != nil {
		d.lanes.take(w, r, d.n)
		return
	}
	if r.URL.Path != wire.PathSignals {
		channel.Refuse(w, http.StatusNotFound, "nothing here")
		return
	}
	rc := http.NewResponseController(w)
	w.WriteHeader(http.StatusOK)
	_ = rc.Flush()
	for {
		select {
		case s := <-d.signals:
			b, _ := wire.AppendLine(nil, s)
			if _, err := w.Write(b); err != nil || rc.Flush() != nil {
				return
			}
		case <-r.Context().Done():
			return
		}
	}
}

// nopSession is an open session with nobody.
type nopSession struct{}

func (nopSession) RoundTrip(*http.Request) (*http.Response, error) {
	return nil, errors.New("nobody there")
}
func (nopSession) Close() error          { return nil }
func (nopSession) Done() <-chan struct{} { return nil }

// muteSession is an open session with a party that never answers.
type muteSession struct{ nopSession }

func (muteSession) RoundTrip(r *http.Request) (*http.Response, error) {
	<-r.Context().Done()
	return nil, r.Context().Err()
}
