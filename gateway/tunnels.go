package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyport/internal/channel"
	"sallyport/internal/session"
	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

const (
	// maxTunnels bounds the tunnels to all nodes together; those that are
	// idle make room. An idle one takes about 30 KiB here.
	maxTunnels = 1024
	// nodeTunnels bounds those to one node, as RCPs bound its lanes. A tunnel
	// keeps one core busy at most: more than there are cores gain nothing.
	nodeTunnels = 8
	// busyTunnel is the load, in streams and 128 KiB that wait to be sent, at
	// which a node gets another tunnel.
	busyTunnel = 24
	// idleTunnel is how long a tunnel stays open without a stream.
	idleTunnel = time.Minute
	// openLane bounds a lane: its legs and the handshake on it.
	openLane = 3 * time.Second
	// laneless is how long a way that gave no lane is not asked for one again.
	laneless = 5 * time.Minute
	// brokenLane is the age below which a lane that ends is taken for one
	// that does not work.
	brokenLane = 5 * time.Second
	// growPause is the time between two looks whether a node needs another
	// tunnel, growRetry that after one failed.
	growPause = time.Second
	growRetry = time.Minute
	// windowBudget is what the windows of all streams may grow by, in bytes.
	windowBudget = 256 << 20
)

// Kinds of tunnels, as metrics name them.
const (
	kindLane   = "lane"
	kindSealed = "sealed" // a lane whose legs are inside TLS
	kindStream = "stream" // a CONNECT stream through the channels
)

// kinds has the best first: the RCP's CPU time for a byte is about 1 to 3 to 14.
var kinds = []string{kindLane, kindSealed, kindStream}

// quickNo is how long a refusal of a lane may take for the next kind to be
// tried at once: where TCP is cut off, a sealed lane would take as long again.
const quickNo = time.Second

var errNoLane = errors.New("no lane can be had on this way for some minutes")

var errTooManyTunnels = fmt.Errorf("%d tunnels are open and none is idle, the limit", maxTunnels)

// tunnels opens tunnels to nodes when somebody wants a stream to one of their
// targets, keeps them while they are in use, and prefers lanes.
type tunnels struct {
	fleet   *fleet
	connect func(ctx context.Context, link wire.ID, authority string) (net.Conn, error)
	lane    func(ctx context.Context, link, node wire.ID, sealed bool) (net.Conn, error)
	dial    func(ctx context.Context, conn net.Conn, party wire.Party) (*session.Tunnel, error)
	party   func(role wire.Role, id wire.ID) wire.Party
	metrics *tunnelMetrics
	log     *slog.Logger
	most    int // per node

	ctx   context.Context // of tunnels and of what opens them; ended by Run
	end   context.CancelCauseFunc
	tasks sync.WaitGroup

	mu       sync.Mutex
	closed   bool
	total    int
	nodes    map[wire.ID]*tunnelled
	laneless map[laneWay]time.Time // until when
}

// laneWay is a first hop, the node behind it, and a kind of lane.
type laneWay struct {
	link, node wire.ID
	kind       string
}

// tunnelled is a node with tunnels.
type tunnelled struct {
	open    []*openTunnel
	opening chan struct{} // closed when the attempt is over; nil: none runs
	err     error         // of the last attempt
	cuts    int           // how often the node was cut off
	retry   time.Time     // when it may get another one
}

type openTunnel struct {
	*session.Tunnel
	kind   string
	via    wire.ID // the first hop
	opened time.Time
	used   time.Time // under tunnels.mu
}

// broken says of a lane that ended that its way is no good for lanes: the
// handshake went through, and then it was cut at once, or nothing came.
func (t *openTunnel) broken(why error) bool {
	return t.kind != kindStream && (errors.Is(why, tunnel.ErrSilent) || time.Since(t.opened) < brokenLane && !errors.Is(why, tunnel.ErrClosed) && !errors.Is(why, errSessionsClosed))
}

func newTunnels(s *Server, reg prometheus.Registerer) (*tunnels, error) {
	p := &tunnels{fleet: s.fleet, connect: s.links.connect, lane: s.links.lane, party: s.party, log: s.log,
		most:  min(max(2, runtime.GOMAXPROCS(0)), nodeTunnels),
		nodes: make(map[wire.ID]*tunnelled), laneless: make(map[laneWay]time.Time)}
	p.ctx, p.end = context.WithCancelCause(context.Background())
	budget := tunnel.NewBudget(windowBudget)
	p.dial = func(ctx context.Context, conn net.Conn, party wire.Party) (*session.Tunnel, error) {
		return session.DialTunnel(ctx, conn, s.id, party, tunnel.Config{Budget: budget})
	}
	var err error
	p.metrics, err = newTunnelMetrics(reg, p.streams)
	return p, err
}

// dialTarget opens a stream to a target of a node. ctx bounds the opening only.
// Without a live way to the node it fails at once, with ErrNotConnected or
// ErrUnknownNode. What the node says of the target shows in the stream.
func (s *Server) dialTarget(ctx context.Context, node wire.ID, target string) (*tunnel.Stream, error) {
	stream, err := s.tunnels.stream(ctx, node, target)
	if err != nil {
		return nil, fmt.Errorf("target %s of %s: %w", wire.Quotable(target), s.fleet.label(node), err)
	}
	return stream, nil
}

func (p *tunnels) stream(ctx context.Context, node wire.ID, target string) (*tunnel.Stream, error) {
	for {
		t, wait, err := p.pick(node)
		if err != nil {
			return nil, err
		}
		if t != nil {
			s, err := t.Open(target)
			if err == nil || t.Err() == nil {
				return s, err
			}
			continue // it ended this moment: pick another
		}
		select {
		case <-wait.over:
			if err := wait.result(); err != nil {
				return nil, err
			}
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// opening is an attempt to open a tunnel that several may wait for.
type opening struct {
	over   chan struct{}
	result func() error
}

// pick returns the least busy tunnel to a node, or what to wait for. It sees
// to it that a busy node gets another tunnel.
func (p *tunnels) pick(node wire.ID) (*openTunnel, opening, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, opening{}, errSessionsClosed
	}
	n := p.nodes[node]
	if n == nil {
		n = &tunnelled{}
	}
	best, load := n.leastBusy()
	if best == nil && n.opening == nil {
		routes, err := p.fleet.routes(node)
		if err != nil {
			return nil, opening{}, err
		}
		if err := p.makeRoomLocked(); err != nil {
			return nil, opening{}, err
		}
		p.nodes[node] = n
		p.openLocked(node, n, routes, kinds)
	}
	if best == nil {
		return nil, opening{n.opening, func() error {
			p.mu.Lock()
			defer p.mu.Unlock()
			return n.err
		}}, nil
	}
	best.used = time.Now()
	if n.opening == nil && time.Now().After(n.retry) {
		n.retry = time.Now().Add(growPause)
		p.growLocked(node, n, best, load)
	}
	return best, opening{}, nil
}

// growLocked gives a node another tunnel where those that it has are busy, or
// one of a better kind where that may be had by now.
func (p *tunnels) growLocked(node wire.ID, n *tunnelled, best *openTunnel, load int) {
	rank := slices.Index(kinds, best.kind)
	better := kinds[:rank]
	busy := load >= busyTunnel && len(n.open) < p.most
	if p.total >= maxTunnels || !busy && len(better) == 0 {
		return
	}
	routes, err := p.fleet.routes(node)
	if err != nil {
		return
	}
	switch {
	case busy:
		p.openLocked(node, n, routes, kinds[:rank+1])
	case slices.ContainsFunc(routes, func(r route) bool {
		return slices.ContainsFunc(better, func(kind string) bool { return p.mayHaveLaneLocked(laneWay{r.link, node, kind}) })
	}):
		p.openLocked(node, n, routes, better)
	}
}

// leastBusy is of the best kind that there is.
func (n *tunnelled) leastBusy() (best *openTunnel, load int) {
	rank := len(kinds)
	for _, t := range n.open {
		if t.Err() != nil {
			continue
		}
		k, l := slices.Index(kinds, t.kind), t.Load()
		if k < rank || k == rank && l < load {
			best, rank, load = t, k, l
		}
	}
	return best, load
}

// makeRoomLocked closes the tunnel that was idle longest if there are too many.
func (p *tunnels) makeRoomLocked() error {
	if p.total < maxTunnels {
		return nil
	}
	var oldest *openTunnel
	for _, n := range p.nodes {
		for _, t := range n.open {
			if t.Streams() == 0 && (oldest == nil || t.used.Before(oldest.used)) {
				oldest = t
			}
		}
	}
	if oldest == nil {
		return errTooManyTunnels
	}
	return oldest.Close()
}

// openLocked opens a tunnel of the first kind that works to a node, in the
// background.
func (p *tunnels) openLocked(node wire.ID, n *tunnelled, routes []route, kinds []string) {
	over, cuts := make(chan struct{}), n.cuts
	n.opening, n.err = over, nil
	p.total++ // kept by the tunnel
	p.tasks.Go(func() {
		t, err := p.open(node, byFirstHop(routes, ""), kinds)
		p.mu.Lock()
		defer p.mu.Unlock()
		defer close(over)
		n.opening = nil
		switch {
		case err != nil:
		case p.closed:
			err = errSessionsClosed
		case n.cuts != cuts:
			err = ErrNotConnected
		}
		if n.err = err; err != nil {
			if t != nil {
				_ = t.Close()
			}
			p.total--
			n.retry = time.Now().Add(growRetry)
			p.forgetLocked(node, n)
			return
		}
		n.open = append(n.open, t)
		p.metrics.open.WithLabelValues(t.kind).Inc()
		p.tasks.Go(func() { p.run(node, n, t) })
	})
}

// run moves a tunnel's bytes to its end.
func (p *tunnels) run(node wire.ID, n *tunnelled, t *openTunnel) {
	err := t.Run(p.ctx)
	p.log.Debug("tunnel ended", "node", node, "kind", t.kind, "reason", err)
	p.metrics.open.WithLabelValues(t.kind).Dec()
	p.mu.Lock()
	defer p.mu.Unlock()
	if t.broken(err) {
		p.laneless[laneWay{t.via, node, t.kind}] = time.Now().Add(laneless)
	}
	p.total--
	n.open = slices.DeleteFunc(n.open, func(o *openTunnel) bool { return o == t })
	p.forgetLocked(node, n)
}

func (p *tunnels) forgetLocked(node wire.ID, n *tunnelled) {
	if len(n.open) == 0 && n.opening == nil && p.nodes[node] == n {
		delete(p.nodes, node)
	}
}

// open opens a tunnel by the best way that works, of the first kind that does.
func (p *tunnels) open(node wire.ID, routes []route, kinds []string) (*openTunnel, error) {
	ctx, cancel := context.WithTimeout(p.ctx, openAll)
	defer cancel()
	var errs []error
	for _, r := range routes {
		t, err := p.openBy(ctx, node, r, kinds)
		if err == nil {
			p.metrics.opened.WithLabelValues(t.kind, "ok").Inc()
			return t, nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", r.name, err))
		if ctx.Err() != nil {
			break
		}
	}
	return nil, fmt.Errorf("open a tunnel: %w", errors.Join(errs...))
}

func (p *tunnels) openBy(ctx context.Context, node wire.ID, r route, kinds []string) (*openTunnel, error) {
	mayStream := slices.Contains(kinds, kindStream)
	var noLane error
	var failed []laneWay
	slow, never := false, false
	for _, kind := range kinds {
		way := laneWay{r.link, node, kind}
		if kind == kindStream || slow && mayStream || !p.mayHaveLane(way) {
			continue
		}
		if never {
			failed = append(failed, way)
			continue
		}
		began := time.Now()
		t, err := p.over(ctx, openLane, node, r, kind)
		if err == nil {
			p.markLaneless(failed)
			return t, nil
		}
		slow, never = time.Since(began) > quickNo, noKind(err)
		p.metrics.opened.WithLabelValues(kind, "failed").Inc()
		p.log.Debug("no lane", "node", node, "kind", kind, "via", r.name, "error", err)
		noLane, failed = errors.Join(noLane, err), append(failed, way)
	}
	if !mayStream { // beside a tunnel that works
		p.markLaneless(failed)
		return nil, cmp.Or(noLane, errNoLane)
	}
	t, err := p.over(ctx, openWay, node, r, kindStream)
	if ctx.Err() == nil || err == nil {
		p.fleet.tried(node, r, err)
	}
	if err != nil {
		p.metrics.opened.WithLabelValues(kindStream, "failed").Inc()
		return nil, errors.Join(noLane, err)
	}
	p.markLaneless(failed)
	return t, nil
}

// noKind says of the refusal of a lane that one of another kind would be
// refused as well: it is not its kind that is off, or impossible.
func noKind(err error) bool {
	var no *channel.RefusedError
	return errors.As(err, &no) && no.Status != http.StatusForbidden && no.Status != http.StatusConflict
}

// markLaneless notes kinds that did not work where another one did: it is they
// that do not work, not the way.
func (p *tunnels) markLaneless(failed []laneWay) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, way := range failed {
		p.laneless[way] = time.Now().Add(laneless)
	}
}

func (p *tunnels) mayHaveLane(way laneWay) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mayHaveLaneLocked(way)
}

func (p *tunnels) mayHaveLaneLocked(way laneWay) bool { return time.Now().After(p.laneless[way]) }

// over opens a tunnel of one kind by one way.
func (p *tunnels) over(ctx context.Context, within time.Duration, node wire.ID, r route, kind string) (*openTunnel, error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	var conn net.Conn
	var err error
	if kind != kindStream {
		conn, err = p.lane(ctx, r.link, node, kind == kindSealed)
	} else {
		conn, err = p.connect(ctx, r.link, wire.ConnectAuthority(node))
	}
	if err != nil {
		return nil, err
	}
	t, err := p.dial(ctx, conn, p.party(p.fleet.roleOf(node), node))
	if err != nil {
		return nil, err
	}
	return &openTunnel{Tunnel: t, kind: kind, via: r.link, opened: time.Now(), used: time.Now()}, nil
}

// cut ends at once what runs to a party or, if it is a first hop, through it.
func (p *tunnels) cut(id wire.ID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := p.nodes[id]; n != nil {
		n.cuts++
	}
	for node, n := range p.nodes {
		for _, t := range n.open {
			if node == id || t.via == id {
				_ = t.Close()
			}
		}
	}
}

// Run closes tunnels that nobody uses, until ctx ends; then it closes all, and
// returns when they are.
func (p *tunnels) Run(ctx context.Context) error {
	sweep := time.NewTicker(idleTunnel / 4)
	defer sweep.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case now := <-sweep.C:
			p.sweep(now)
		}
	}
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.end(errSessionsClosed)
	p.tasks.Wait()
	return nil
}

func (p *tunnels) sweep(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, n := range p.nodes {
		for _, t := range n.open {
			if t.Streams() > 0 {
				t.used = now
			} else if now.Sub(t.used) >= idleTunnel {
				_ = t.Close()
			}
		}
	}
	maps.DeleteFunc(p.laneless, func(_ laneWay, until time.Time) bool { return now.After(until) })
}

// streams is how many streams run in all tunnels.
func (p *tunnels) streams() (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, node := range p.nodes {
		for _, t := range node.open {
			n += t.Streams()
		}
	}
	return n
}

// tunnelMetrics are what the tunnels count.
type tunnelMetrics struct {
	open   *prometheus.GaugeVec
	opened *prometheus.CounterVec
}

func newTunnelMetrics(reg prometheus.Registerer, streams func() int) (*tunnelMetrics, error) {
	m := &tunnelMetrics{
		open:   prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "sallyport_gateway_tunnels", Help: "Tunnels to nodes that are open, by what they run over."}, []string{"kind"}),
		opened: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sallyport_gateway_tunnels_opened_total", Help: "Attempts to open a tunnel, by what it should run over and by result."}, []string{"kind", "result"}),
	}
	if reg == nil {
		return m, nil
	}
	running := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "sallyport_gateway_target_streams", Help: "Streams to targets that are open in tunnels."},
		func() float64 { return float64(streams()) })
	for _, c := range []prometheus.Collector{m.open, m.opened, running} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}
