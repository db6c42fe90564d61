package gateway

import (
	"context"
	"errors"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/config"
	"sallyport/internal/channel"
	"sallyport/internal/session"
	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

// fakeLanes takes lanes as a node does.
type fakeLanes struct {
	ctx    context.Context
	broken bool         // cut as soon as a stream comes
	status atomic.Int64 // that bare lanes get; 0: they are taken
	old    bool         // knows no sealed lanes, and takes them for bare ones
	taken  atomic.Int64
	sealed atomic.Int64
	wg     sync.WaitGroup
}

func (l *fakeLanes) take(w http.ResponseWriter, r *http.Request, n *fakeNode) {
	var ask wire.LaneRequest
	if err := wire.DecodeJSON(r.Body, wire.MaxLaneBody, &ask); err != nil || ask.Node != "" {
		channel.Refuse(w, http.StatusBadRequest, "no request for a lane to this node")
		return
	}
	if status := int(l.status.Load()); status > 0 && !ask.Sealed {
		channel.Refuse(w, status, "no bare lanes")
		return
	}
	if ask.Sealed {
		l.sealed.Add(1)
	}
	if l.old {
		ask.Sealed = false
	}
	leg, err := channel.FromContext(r.Context()).TakeLane(r.Context(), ask)
	if err != nil {
		channel.Refuse(w, http.StatusServiceUnavailable, err.Error())
		return
	}
	l.wg.Go(func() {
		defer leg.Close()
		conn, err := leg.Accept(l.ctx)
		if err != nil {
			return
		}
		l.taken.Add(1)
		targets := n.targets
		if l.broken {
			targets = func(context.Context, string, *tunnel.Stream) { _ = conn.Close() }
		}
		_ = session.ServeLane(l.ctx, conn, n.id, targets)
	})
	channel.GrantLane(w, ask)
}

// echoTarget answers a stream with the target's name and what came.
func echoTarget(_ context.Context, target string, s *tunnel.Stream) {
	if target == "none" {
		s.Refuse(tunnel.NotFound, "there is no such target")
		return
	}
	_, _ = io.WriteString(s, target+":")
	_, _ = io.Copy(s, s)
	_ = s.CloseWrite()
}

// ask sends text to a target and returns all of its answer.
func (w *world) ask(id wire.ID, target, text string) (string, error) {
	w.t.Helper()
	s, err := w.s.dialTarget(w.t.Context(), id, target)
	if err != nil {
		return "", err
	}
	defer func() { _ = s.Close() }()
	if _, err := io.WriteString(s, text); err != nil {
		return "", err
	}
	if err := s.CloseWrite(); err != nil {
		return "", err
	}
	b, err := io.ReadAll(s)
	return string(b), err
}

func (w *world) openTunnels() (kinds []string) {
	w.s.tunnels.mu.Lock()
	defer w.s.tunnels.mu.Unlock()
	for _, n := range w.s.tunnels.nodes {
		for _, t := range n.open {
			kinds = append(kinds, t.kind)
		}
	}
	return kinds
}

func TestTargetsOverConnectStreams(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r := w.rcp("dmz")
	n := w.enrolled(w.node("web"))
	n.targets = echoTarget
	r.hold(n)
	w.run()
	w.state(n.id.ID(), wire.StateRunning)
	before := r.connects(n.id.ID())
	for range 5 {
		if got, err := w.ask(n.id.ID(), "db", "hello"); err != nil || got != "db:hello" {
			t.Fatalf("got %q, %v", got, err)
		}
	}
	if got := r.connects(n.id.ID()) - before; got != 1 {
		t.Errorf("5 streams took %d tunnels", got)
	}
	// This RCP knows no lanes: it was asked once, and is not asked again soon.
	r.mu.Lock()
	asked := 0
	for _, line := range r.requests {
		if line == "POST "+wire.PathLanes {
			asked++
		}
	}
	r.mu.Unlock()
	if asked != 1 {
		t.Errorf("the RCP was asked for %d lanes", asked)
	}
	if kinds := w.openTunnels(); len(kinds) != 1 || kinds[0] != kindStream {
		t.Errorf("tunnels: %v", kinds)
	}
	var refused *tunnel.RefusedError
	if _, err := w.ask(n.id.ID(), "none", "hello"); !errors.As(err, &refused) || refused.Code != tunnel.NotFound {
		t.Errorf("a target that is not there gave %v", err)
	}

	// A stream ends when its node is revoked, and no other comes.
	s, err := w.s.dialTarget(t.Context(), n.id.ID(), "db")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	if _, err := io.WriteString(s, "x"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(s, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	w.s.cutParty(n.id.ID())
	if _, err := s.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("a cut stream gave %v", err)
	}
	eventually(t, "the tunnel is gone", func() bool { return len(w.openTunnels()) == 0 })
}

func TestTargetOfAnAbsentNodeFailsAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n := w.enrolled(w.node("web"))
	w.run()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	eventually(t, "the fleet knows the node", func() bool {
		_, err := w.s.dialTarget(ctx, n.id.ID(), "db")
		return errors.Is(err, ErrNotConnected)
	})
	if _, err := w.s.dialTarget(ctx, wire.NewID(), "db"); !errors.Is(err, ErrUnknownNode) {
		t.Errorf("an unknown node gave %v", err)
	}
	if ctx.Err() != nil {
		t.Error("it took long to say so")
	}
}

func TestTargetsOfADirectNodeOverALane(t *testing.T) {
	t.Parallel()
	w, n, _ := worldWithLanes(t, &fakeLanes{})
	for range 3 {
		if got, err := w.ask(n.id.ID(), "db", "hello"); err != nil || got != "db:hello" {
			t.Fatalf("got %q, %v", got, err)
		}
	}
	if kinds := w.openTunnels(); len(kinds) != 1 || kinds[0] != kindLane {
		t.Errorf("tunnels: %v", kinds)
	}
}

// Where there are no bare lanes a sealed one is next, and streams come last:
// where the other side knows no sealed lanes, or has no lanes at all.
func TestKindsOfTunnels(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		status int64
		old    bool
		want   string
		sealed int64 // requests
	}{
		{"off", http.StatusForbidden, false, kindSealed, 1},
		{"impossible", http.StatusConflict, false, kindSealed, 1},
		{"too many", http.StatusTooManyRequests, false, kindStream, 0},
		{"old", http.StatusForbidden, true, kindStream, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			lanes := &fakeLanes{old: c.old}
			lanes.status.Store(c.status)
			w, n, _ := worldWithLanes(t, lanes)
			for range 5 {
				if got, err := w.ask(n.id.ID(), "db", "hello"); err != nil || got != "db:hello" {
					t.Fatalf("got %q, %v", got, err)
				}
			}
			if kinds := w.openTunnels(); len(kinds) != 1 || kinds[0] != c.want || lanes.sealed.Load() != c.sealed {
				t.Errorf("tunnels: %v, after %d requests for sealed lanes", kinds, lanes.sealed.Load())
			}
		})
	}
}

// A tunnel over a stream gives way to a sealed lane, and that to a bare one,
// once they may be had again.
func TestTunnelsGetBetter(t *testing.T) {
	t.Parallel()
	lanes := &fakeLanes{}
	lanes.status.Store(http.StatusTooManyRequests)
	w, n, _ := worldWithLanes(t, lanes)
	better := func(kind string) {
		t.Helper()
		w.s.tunnels.sweep(time.Now().Add(2 * laneless))
		eventually(t, "a tunnel of kind "+kind, func() bool {
			w.s.tunnels.mu.Lock()
			if of := w.s.tunnels.nodes[n.id.ID()]; of != nil {
				of.retry = time.Time{}
			}
			w.s.tunnels.mu.Unlock()
			if got, err := w.ask(n.id.ID(), "db", "hello"); err != nil || got != "db:hello" {
				t.Fatalf("got %q, %v", got, err)
			}
			return slices.Contains(w.openTunnels(), kind)
		})
	}
	better(kindStream)
	lanes.status.Store(http.StatusForbidden)
	better(kindSealed)
	lanes.status.Store(0)
	better(kindLane)
}

// Lanes that are cut as soon as they carry something are given up for streams.
func TestBrokenLanesAreGivenUp(t *testing.T) {
	t.Parallel()
	w, n, lanes := worldWithLanes(t, &fakeLanes{broken: true})
	for range 2 { // a bare one, and a sealed one
		if got, err := w.ask(n.id.ID(), "db", "hello"); err == nil {
			t.Fatalf("got %q over a lane that is cut", got)
		}
		eventually(t, "the lane is gone", func() bool { return len(w.openTunnels()) == 0 })
	}
	for range 3 {
		if got, err := w.ask(n.id.ID(), "db", "hello"); err != nil || got != "db:hello" {
			t.Fatalf("got %q, %v", got, err)
		}
	}
	if kinds := w.openTunnels(); len(kinds) != 1 || kinds[0] != kindStream || lanes.taken.Load() != 2 || lanes.sealed.Load() != 1 {
		t.Errorf("tunnels: %v, after %d lanes", kinds, lanes.taken.Load())
	}
}

// worldWithLanes is a gateway with a node that dials it and takes lanes.
func worldWithLanes(t *testing.T, lanes *fakeLanes) (*world, *fakeNode, *fakeLanes) {
	t.Helper()
	w := newWorld(t)
	w.cfg.Gateway = config.Gateway{ChannelListen: "127.0.0.1:0"}
	n := w.enrolled(w.node("direct"))
	n.targets = echoTarget
	w.run()
	eventually(t, "the gateway listens", func() bool { return w.s.ChannelAddr() != nil })
	ctx, cancel := context.WithCancel(context.Background())
	lanes.ctx = ctx
	d := &channel.Dialer{Addr: w.s.ChannelAddr().String(), Peer: channel.PeerUpstream, Identity: n.id, Carrier: channel.CarrierH2, Log: testLog(t)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = d.Run(ctx, func(ctx context.Context, c *channel.Conn) { _ = c.Serve(ctx, directNode{n: n, lanes: lanes}) })
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
		lanes.wg.Wait()
	})
	w.state(n.id.ID(), wire.StateRunning)
	return w, n, lanes
}

func TestTunnelsCloseWhenIdle(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r := w.rcp("dmz")
	n := w.enrolled(w.node("web"))
	n.targets = echoTarget
	r.hold(n)
	w.run()
	w.state(n.id.ID(), wire.StateRunning)
	s, err := w.s.dialTarget(t.Context(), n.id.ID(), "db")
	if err != nil {
		t.Fatal(err)
	}
	w.s.tunnels.sweep(time.Now().Add(2 * idleTunnel)) // in use
	if len(w.openTunnels()) != 1 {
		t.Fatal("a tunnel with a stream was closed")
	}
	_ = s.Close()
	w.s.tunnels.sweep(time.Now().Add(4 * idleTunnel))
	eventually(t, "the idle tunnel is closed", func() bool { return len(w.openTunnels()) == 0 })
	if got, err := w.ask(n.id.ID(), "db", "again"); err != nil || got != "db:again" {
		t.Fatalf("got %q, %v", got, err)
	}
}

func TestBusyNodeGetsMoreTunnels(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r := w.rcp("dmz")
	n := w.enrolled(w.node("web"))
	n.targets = echoTarget
	r.hold(n)
	w.run()
	w.state(n.id.ID(), wire.StateRunning)
	var streams []*tunnel.Stream
	defer func() {
		for _, s := range streams {
			_ = s.Close()
		}
	}()
	eventually(t, "a second tunnel", func() bool {
		s, err := w.s.dialTarget(t.Context(), n.id.ID(), "db")
		if err != nil {
			t.Fatal(err)
		}
		streams = append(streams, s)
		return len(w.openTunnels()) > 1
	})
	if len(streams) <= busyTunnel {
		t.Errorf("%d streams had a second tunnel", len(streams))
	}
	if got := w.s.tunnels.streams(); got != len(streams) {
		t.Errorf("%d streams are counted, not %d", got, len(streams))
	}
}
