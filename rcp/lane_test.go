package rcp

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport/config"
	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// laneNode is a node that takes lanes and sends back what comes in them.
type laneNode struct {
	id   *identity.Identity
	conn *channel.Conn
	gone chan struct{} // closed legs, by half
	old  bool          // knows bare lanes only

	mu   sync.Mutex
	reqs []wire.LaneRequest
	legs []net.Conn
	wg   sync.WaitGroup
}

func (n *laneNode) requests() []wire.LaneRequest {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]wire.LaneRequest{}, n.reqs...)
}

func (n *laneNode) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case wire.PathSignals:
		b, _ := wire.AppendLine(nil, wire.Signal{ID: n.id.ID(), Boot: "boot", Generation: 1})
		_, _ = w.Write(b)
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	case wire.PathLanes:
		var req wire.LaneRequest
		if err := wire.DecodeJSON(r.Body, wire.MaxLaneBody, &req); err != nil {
			channel.Refuse(w, http.StatusBadRequest, err.Error())
			return
		}
		n.mu.Lock()
		n.reqs = append(n.reqs, req)
		n.mu.Unlock()
		req.Sealed = req.Sealed && !n.old
		leg, err := channel.FromContext(r.Context()).TakeLane(r.Context(), req)
		if err != nil {
			channel.Refuse(w, http.StatusConflict, err.Error())
			return
		}
		n.wg.Go(func() {
			defer leg.Close()
			c, err := leg.Accept(context.Background())
			if err != nil {
				return
			}
			n.mu.Lock()
			n.legs = append(n.legs, c)
			n.mu.Unlock()
			_, _ = io.Copy(c, c)
			_ = c.CloseWrite()
			_, _ = io.Copy(io.Discard, c)
			_ = c.Close()
			n.gone <- struct{}{}
		})
		if !n.old {
			channel.GrantLane(w, req)
		}
	}
}

// laneNode connects one over a carrier.
func (p *plant) laneNode(addr, carrier string) *laneNode {
	p.t.Helper()
	n := &laneNode{id: p.ca.Party(p.t, wire.RoleNode), gone: make(chan struct{}, 100)}
	p.t.Cleanup(func() {
		n.mu.Lock()
		for _, c := range n.legs {
			_ = c.Close()
		}
		n.mu.Unlock()
		n.wg.Wait()
	})
	d := p.dialler(n.id, addr, channel.PeerUpstream)
	d.Carrier = carrier
	c, err := d.Dial(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = c.Serve(context.Background(), n)
	}()
	p.t.Cleanup(func() {
		c.Close(nil)
		<-done
	})
	n.conn = c
	return n
}

// known waits until the relay can lead to a party.
func (r *testRCP) known(t *testing.T, id wire.ID) {
	t.Helper()
	eventually(t, "the RCP knows "+string(id), func() bool { ways, _ := r.table.route(target{id: id}); return len(ways) > 0 })
}

func openLane(t *testing.T, c *channel.Conn, req wire.LaneRequest) (channel.LaneConn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	leg, err := c.OpenLane(ctx, req)
	if err == nil {
		t.Cleanup(func() { _ = leg.Close() })
	}
	return leg, err
}

// echoed sends through a lane, ends that direction, and wants all of it back.
func echoed(t *testing.T, leg channel.LaneConn, size int) {
	t.Helper()
	want := make([]byte, size)
	_, _ = rand.Read(want)
	go func() {
		_, _ = leg.Write(want)
		_ = leg.CloseWrite()
	}()
	_ = leg.SetReadDeadline(time.Now().Add(20 * time.Second))
	got, err := io.ReadAll(leg)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes came back, %v; want the %d that were sent", len(got), err, len(want))
	}
}

func laneStatus(t *testing.T, c *channel.Conn, req wire.LaneRequest) (int, string) {
	t.Helper()
	_, err := openLane(t, c, req)
	if err == nil {
		return http.StatusOK, ""
	}
	var no *channel.RefusedError
	if !errors.As(err, &no) {
		t.Fatalf("lane: %v, want a refusal", err)
	}
	return no.Status, no.Reason
}

// value reads a metric: the sum of those with the label value, or of all.
func (r *testRCP) value(t *testing.T, name, label string) (sum float64) {
	t.Helper()
	all, err := r.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			match := label == ""
			for _, l := range m.GetLabel() {
				match = match || l.GetValue() == label
			}
			if match {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

// kinds are the two of lanes, and how the metrics of each begin.
var kinds = map[string]string{"bare": "sallyport_rcp_lane", "sealed": "sallyport_rcp_sealed_lane"}

func TestLane(t *testing.T) {
	for kind, metrics := range kinds {
		for _, carrier := range []string{channel.CarrierH2, channel.CarrierH3} {
			t.Run(kind+" "+carrier, func(t *testing.T) { testLane(t, kind == "sealed", metrics, carrier) })
		}
	}
}

func testLane(t *testing.T, sealed bool, metrics, carrier string) {
	p := newPlant(t)
	r := p.rcp(nil)
	n := p.laneNode(r.addr, carrier)
	r.known(t, n.id.ID())
	d := p.dialler(p.ca.Party(t, wire.RoleGateway), r.addr, channel.PeerDownstream)
	d.Carrier = carrier
	gw, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer gw.Close(nil)
	leg, err := openLane(t, gw, wire.LaneRequest{Node: n.id.ID(), Sealed: sealed})
	if err != nil {
		t.Fatal(err)
	}
	if _, is := leg.(*channel.SealedLeg); is != sealed {
		t.Errorf("the leg is a %T", leg)
	}
	eventually(t, "the lane is counted", func() bool { return r.value(t, metrics+"s", "") == 1 })
	echoed(t, leg, 10<<20)
	<-n.gone
	eventually(t, "the lane has ended", func() bool { return r.value(t, metrics+"s", "") == 0 && r.lanes.count() == 0 })
	for _, dir := range []string{"up", "down"} {
		if got := r.value(t, metrics+"_bytes_total", dir); got != 10<<20 {
			t.Errorf("%v bytes are counted %s", got, dir)
		}
	}
	for _, other := range kinds {
		if got := r.value(t, other+"s_opened_total", ""); got > 0 != (other == metrics) {
			t.Errorf("%s: %v opened", other, got)
		}
	}
	if reqs := n.requests(); len(reqs) != 1 || reqs[0].Node != "" || reqs[0].Hops != 0 || reqs[0].Via != nil {
		t.Errorf("the node was asked %+v", reqs)
	}
	if v := r.value(t, "sallyport_rcp_bytes_total", ""); v != 0 {
		t.Errorf("%v bytes went through streams", v)
	}
}

// The other end hears of the end of one direction while the other goes on, in
// both directions, and of a cut in both at once.
func TestLaneHalfClose(t *testing.T) {
	for kind := range kinds {
		t.Run(kind, func(t *testing.T) { testHalfClose(t, kind == "sealed") })
	}
}

func testHalfClose(t *testing.T, sealed bool) {
	p := newPlant(t)
	r := p.rcp(nil)
	accepted := make(chan channel.LaneConn, 1)
	var waiting sync.WaitGroup
	defer waiting.Wait()
	id := p.ca.Party(t, wire.RoleNode)
	p.nodeWith(id, r.addr, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Path != wire.PathLanes {
			<-req.Context().Done()
			return
		}
		var ask wire.LaneRequest
		_ = wire.DecodeJSON(req.Body, wire.MaxLaneBody, &ask)
		leg, err := channel.FromContext(req.Context()).TakeLane(req.Context(), ask)
		if err != nil {
			t.Error(err)
			return
		}
		channel.GrantLane(w, ask)
		waiting.Go(func() {
			defer leg.Close()
			c, err := leg.Accept(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			accepted <- c
		})
	}))
	r.known(t, id.ID())
	gw := p.gateway(r.addr)
	pair := func() (up, down channel.LaneConn) {
		up, err := openLane(t, gw, wire.LaneRequest{Node: id.ID(), Sealed: sealed})
		if err != nil {
			t.Fatal(err)
		}
		down = <-accepted
		t.Cleanup(func() { _ = down.Close() })
		for _, c := range []net.Conn{up, down} {
			_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		}
		return up, down
	}
	ends := func(from, to channel.LaneConn) {
		t.Helper()
		_, _ = io.WriteString(from, "last words")
		_ = from.CloseWrite()
		if b, err := io.ReadAll(to); err != nil || string(b) != "last words" {
			t.Errorf("got %q, %v", b, err)
		}
		_, _ = io.WriteString(to, "late answer")
		_ = to.CloseWrite()
		if b, err := io.ReadAll(from); err != nil || string(b) != "late answer" {
			t.Errorf("got %q, %v", b, err)
		}
	}
	up, down := pair()
	ends(up, down)
	up, down = pair()
	ends(down, up)
	up, down = pair()
	tcp, bare := down.(*net.TCPConn)
	if !bare {
		tcp = down.(*channel.SealedLeg).NetConn().(*net.TCPConn)
	}
	_ = tcp.SetLinger(0) // a reset
	_ = down.Close()
	if n, err := up.Read(make([]byte, 1)); n > 0 || err == nil {
		t.Errorf("read %d, %v through a lane whose other end was reset", n, err)
	}
}

func TestLaneIsRefused(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(nil)
	n, below := p.laneNode(r.addr, channel.CarrierH2), p.ca.Party(t, wire.RoleRCP)
	r.known(t, n.id.ID())
	p.nodeWith(below, r.addr, http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) { <-req.Context().Done() }))
	r.known(t, below.ID())
	old := p.node(r.addr) // answers everything with 200, and brings no leg
	r.known(t, old.id.ID())
	gw := p.gateway(r.addr)
	four := []wire.ID{wire.NewID(), wire.NewID(), wire.NewID(), wire.NewID()}
	for _, c := range []struct {
		name   string
		req    wire.LaneRequest
		status int
		label  string
	}{
		{"nobody", wire.LaneRequest{}, 400, "malformed"},
		{"an RCP itself", wire.LaneRequest{Node: r.id.ID()}, 400, "malformed"},
		{"an RCP below", wire.LaneRequest{Node: below.ID()}, 400, "malformed"},
		{"no ID", wire.LaneRequest{Node: "127.0.0.1:22"}, 400, "malformed"},
		{"too many hops", wire.LaneRequest{Node: n.id.ID(), Hops: 5}, 400, "malformed"},
		{"unknown", wire.LaneRequest{Node: wire.NewID()}, 404, "not-connected"},
		{"a loop", wire.LaneRequest{Node: n.id.ID(), Hops: 2, Via: []wire.ID{r.id.ID()}}, 508, "loop"},
		{"four passed", wire.LaneRequest{Node: n.id.ID(), Hops: 1, Via: four}, 508, "loop"},
		{"three passed", wire.LaneRequest{Node: n.id.ID(), Hops: 1, Via: four[:3]}, 200, ""},
		{"a node that does not come", wire.LaneRequest{Node: old.id.ID()}, 504, "timeout"},
	} {
		before := r.value(t, "sallyport_rcp_lanes_refused_total", c.label)
		status, reason := laneStatus(t, gw, c.req)
		if status != c.status || c.status != 200 && !strings.HasPrefix(reason, "rcp ") {
			t.Errorf("%s: %d %q, want %d", c.name, status, reason, c.status)
		}
		if c.label != "" && r.value(t, "sallyport_rcp_lanes_refused_total", c.label) != before+1 {
			t.Errorf("%s: not counted as %s", c.name, c.label)
		}
	}
	for _, body := range []string{`{`, `{}`, `{"ticket":"x"}`, `{"node":"` + string(n.id.ID()) + `"}`, `{"ticket":"` + strings.Repeat("A", 43) + `","node":"` + string(n.id.ID()) + `"}`, strings.Repeat(" ", wire.MaxLaneBody+1) + "{}"} {
		if got := send(t, gw, http.MethodPost, wire.PathLanes, []byte(body)); got != 400 {
			t.Errorf("%.60s: %d", body, got)
		}
	}
	r.setDraining(&wire.Drain{Reason: "test"})
	if status, _ := laneStatus(t, gw, wire.LaneRequest{Node: n.id.ID()}); status != 503 {
		t.Errorf("while draining: %d", status)
	}
	if asked := len(n.requests()); asked != 1 {
		t.Errorf("the node was asked %d times", asked)
	}
}

func TestLanesAreOff(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(func(c *Config) { c.Lanes = "off" })
	n := p.laneNode(r.addr, channel.CarrierH2)
	r.known(t, n.id.ID())
	status, reason := laneStatus(t, p.gateway(r.addr), wire.LaneRequest{Node: n.id.ID()})
	if status != 403 || !strings.Contains(reason, "SALLYPORT_RCP_LANES") || len(n.requests()) != 0 {
		t.Errorf("%d %q, the node was asked %v", status, reason, n.requests())
	}
	leg, err := openLane(t, p.gateway(r.addr), wire.LaneRequest{Node: n.id.ID(), Sealed: true})
	if err != nil {
		t.Fatalf("a sealed lane: %v", err)
	}
	echoed(t, leg, 1<<20)
	if got := r.value(t, "sallyport_rcp_lanes_opened_total", ""); got > 0 {
		t.Errorf("%v bare lanes were opened", got)
	}
}

// A node that knows bare lanes only takes a request for a sealed one for
// another of those: it is told from its answer, and its leg is not taken.
func TestOldNodeHasNoSealedLanes(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(nil)
	n := p.laneNode(r.addr, channel.CarrierH2)
	n.old = true
	r.known(t, n.id.ID())
	gw := p.gateway(r.addr)
	began := time.Now()
	if status, reason := laneStatus(t, gw, wire.LaneRequest{Node: n.id.ID(), Sealed: true}); status != 409 || !strings.Contains(reason, "knows no sealed lanes") {
		t.Errorf("%d %q", status, reason)
	}
	if took := time.Since(began); took > laneWithin/2 {
		t.Errorf("it took %s to say so", took)
	}
	<-n.gone // its bare leg was closed
	leg, err := openLane(t, gw, wire.LaneRequest{Node: n.id.ID()})
	if err != nil {
		t.Fatal(err)
	}
	echoed(t, leg, 1<<20)
}

// Who hangs on the RCP may not ask it for anything, a lane least of all.
func TestNodeCannotAskForLanes(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(nil)
	n, other := p.laneNode(r.addr, channel.CarrierH2), p.laneNode(r.addr, channel.CarrierH2)
	r.known(t, n.id.ID())
	if _, err := n.conn.OpenLane(t.Context(), wire.LaneRequest{Node: other.id.ID()}); !errors.Is(err, channel.ErrWrongSide) {
		t.Errorf("got %v", err)
	}
	if _, err := p.up(n.id, r.addr); err == nil {
		t.Error("a node may dial as upstream")
	}
}

func TestLanesPerNodeAreLimited(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(nil)
	n, other := p.laneNode(r.addr, channel.CarrierH2), p.laneNode(r.addr, channel.CarrierH2)
	r.known(t, n.id.ID())
	r.known(t, other.id.ID())
	gw := p.gateway(r.addr)
	var legs []channel.LaneConn
	for range maxLanesPerNode {
		leg, err := openLane(t, gw, wire.LaneRequest{Node: n.id.ID()})
		if err != nil {
			t.Fatal(err)
		}
		legs = append(legs, leg)
	}
	if status, reason := laneStatus(t, gw, wire.LaneRequest{Node: n.id.ID()}); status != 429 || !strings.Contains(reason, "8 lanes") {
		t.Errorf("one too many: %d %q", status, reason)
	}
	if status, _ := laneStatus(t, gw, wire.LaneRequest{Node: other.id.ID()}); status != 200 {
		t.Errorf("another node: %d", status)
	}
	_ = legs[0].Close()
	eventually(t, "the place is free", func() bool { return r.lanes.count() < maxLanesPerNode+1 })
	if status, _ := laneStatus(t, gw, wire.LaneRequest{Node: n.id.ID()}); status != 200 {
		t.Errorf("after one has ended: %d", status)
	}
}

func TestLanesInTotalAreLimited(t *testing.T) {
	l := newLanes()
	var all []func()
	for i := range maxLanes {
		leave, err := l.enter(wire.NewID(), i < maxSealed)
		if err != nil {
			t.Fatal(err)
		}
		if i == maxSealed {
			if _, err := l.enter(wire.NewID(), true); !errors.Is(err, errLaneSealed) {
				t.Errorf("one sealed lane too many: %v", err)
			}
		}
		all = append(all, leave)
	}
	if _, err := l.enter(wire.NewID(), false); !errors.Is(err, errLaneTotal) {
		t.Errorf("got %v", err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); l.wait(t.Context()) }()
	for _, leave := range all {
		leave()
		leave()
	}
	<-ended
	if l.n != 0 || l.sealed != 0 || len(l.perNode) != 0 {
		t.Errorf("%d places, %d nodes are left", l.n, len(l.perNode))
	}
	l.wait(t.Context())
}

// Chained: an RCP dials the one below, or is dialled by it.
func TestLaneThroughTwo(t *testing.T) {
	for _, dials := range []string{"upper", "lower"} {
		t.Run(dials+" RCP dials", func(t *testing.T) {
			p := newPlant(t)
			var upper, lower *testRCP
			if dials == "upper" {
				data, id := p.certified()
				lower = p.rcp(func(c *Config) { c.Upstreams = config.Endpoints{{ID: string(id)}} })
				upper = p.start(data, func(c *Config) { c.Downstreams = config.Endpoints{{Addr: lower.addr}} })
			} else {
				upper = p.rcp(nil)
				lower = p.rcp(func(c *Config) { c.Upstreams = config.Endpoints{{Addr: upper.addr}} })
			}
			n := p.laneNode(lower.addr, channel.CarrierH2)
			upper.known(t, n.id.ID())
			gw := p.gateway(upper.addr)
			leg, err := openLane(t, gw, wire.LaneRequest{Node: n.id.ID(), Sealed: true})
			if err != nil {
				t.Fatal(err)
			}
			echoed(t, leg, 1<<20)
			if leg, err = openLane(t, gw, wire.LaneRequest{Node: n.id.ID()}); err != nil {
				t.Fatal(err)
			}
			echoed(t, leg, 1<<20)
			if reqs := n.requests(); len(reqs) != 2 || !reqs[0].Sealed || reqs[1].Sealed || reqs[0].Node != "" || reqs[0].Via != nil {
				t.Errorf("the node was asked %+v", reqs)
			}
			if status, _ := laneStatus(t, gw, wire.LaneRequest{Node: n.id.ID(), Hops: 1}); status != 508 {
				t.Errorf("with one hop left: %d", status)
			}
			if status, _ := laneStatus(t, gw, wire.LaneRequest{Node: n.id.ID(), Via: []wire.ID{lower.id.ID()}}); status != 508 {
				t.Errorf("back where it came from: %d", status)
			}
			n.conn.Close(nil)
			eventually(t, "the node is gone", func() bool { ways, _ := upper.table.route(target{id: n.id.ID()}); return len(ways) == 0 })
			if status, _ := laneStatus(t, gw, wire.LaneRequest{Node: n.id.ID()}); status != 503 {
				t.Errorf("a node that went: %d", status)
			}
		})
	}
}

// The other way round at both ends: the RCP dials the gateway, and a node that
// listens.
func TestLaneOfAnRCPThatDials(t *testing.T) {
	p := newPlant(t)
	gateway, node := p.ca.Party(t, wire.RoleGateway), p.ca.Party(t, wire.RoleNode)
	above := make(chan *channel.Conn, 1)
	n := &laneNode{id: node, gone: make(chan struct{}, 100)}
	gwAddr := p.port(gateway, func(_ context.Context, c *channel.Conn) { above <- c; <-c.Done() })
	nodeAddr := p.port(node, func(ctx context.Context, c *channel.Conn) { _ = c.Serve(ctx, n) })
	r := p.rcp(func(c *Config) {
		c.Upstreams, c.Downstreams = config.Endpoints{{Addr: gwAddr}}, config.Endpoints{{Addr: nodeAddr}}
	})
	r.known(t, node.ID())
	gw := <-above
	for _, sealed := range []bool{false, true} {
		leg, err := openLane(t, gw, wire.LaneRequest{Node: node.ID(), Sealed: sealed})
		if err != nil {
			t.Fatal(err)
		}
		echoed(t, leg, 1<<20)
		<-n.gone
	}
	n.wg.Wait()
}

// port listens for a party.
func (p *plant) port(id *identity.Identity, f func(context.Context, *channel.Conn)) string {
	p.t.Helper()
	ln, err := channel.Listen(channel.ListenConfig{Addr: "127.0.0.1:0", Identity: id, AllowUpstream: true, AllowDownstream: true, Log: quiet})
	if err != nil {
		p.t.Fatal(err)
	}
	p.background(func(ctx context.Context) { _ = ln.Run(ctx, f) })
	return ln.Addr().String()
}

// ended wants an end of a lane to be closed by the relay.
func ended(t *testing.T, c net.Conn) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
	_, err := io.Copy(io.Discard, c)
	var n net.Error
	if errors.As(err, &n) && n.Timeout() {
		t.Error("the lane is still open")
	}
}

func TestLaneIsCutByRevocation(t *testing.T) {
	for _, who := range []string{"node", "gateway"} {
		t.Run(who, func(t *testing.T) {
			sealed := who == "node"
			p := newPlant(t)
			r := p.rcp(nil)
			n, other := p.laneNode(r.addr, channel.CarrierH2), p.laneNode(r.addr, channel.CarrierH2)
			r.known(t, n.id.ID())
			r.known(t, other.id.ID())
			bad := p.ca.Party(t, wire.RoleGateway)
			gw, err := p.up(bad, r.addr)
			if err != nil {
				t.Fatal(err)
			}
			good := p.gateway(r.addr)
			leg, err := openLane(t, gw, wire.LaneRequest{Node: n.id.ID(), Sealed: sealed})
			if err != nil {
				t.Fatal(err)
			}
			// Nobody reads what it sends: what it waits in does not delay its end.
			go func() { _, _ = io.Copy(leg, rand.Reader) }()
			spared, err := openLane(t, good, wire.LaneRequest{Node: other.id.ID()})
			if err != nil {
				t.Fatal(err)
			}
			eventually(t, "both lanes are open", func() bool { return r.lanes.count() == 2 })
			key := n.id.KeyHash()
			if who == "gateway" {
				key = bad.KeyHash()
			}
			if got := put(t, good, http.MethodPut, wire.PathRevocations, p.ca.Revoke(t, 1, key)); got != 204 {
				t.Fatalf("revocation: %d", got)
			}
			began := time.Now()
			<-n.gone
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("the lane was cut after %s", took)
			}
			ended(t, leg)
			echoed(t, spared, 1<<20)
		})
	}
}

func TestLaneIsCutAtShutdown(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(nil)
	n := p.laneNode(r.addr, channel.CarrierH2)
	r.known(t, n.id.ID())
	leg, err := openLane(t, p.gateway(r.addr), wire.LaneRequest{Node: n.id.ID()})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the lane is open", func() bool { return r.value(t, "sallyport_rcp_lanes", "") == 1 })
	began := time.Now()
	r.stop()
	ended(t, leg)
	<-n.gone
	if took := time.Since(began); took > drainGrace+5*time.Second {
		t.Errorf("it took %s", took)
	}
}

// A lane lives on while one of its parties comes back, and not much longer when
// it does not.
func TestLaneWithoutChannel(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(nil)
	gone := make(chan struct{})
	back := make(chan struct{})
	up, down := tcpPipe(t), tcpPipe(t)
	l := &lane{r: r.Relay, cutting: make(chan error, 1), orphan: 50 * time.Millisecond, linger: time.Hour,
		up:   end{conn: closable(back), peer: identity.Peer{Party: wire.Party{Role: wire.RoleGateway, ID: wire.NewID()}}},
		down: end{conn: closable(gone), peer: identity.Peer{Party: wire.Party{Role: wire.RoleNode, ID: wire.NewID()}}}}
	result := make(chan error, 1)
	go func() {
		_, _, err := l.join(context.Background(), up[0], down[0])
		result <- err
	}()
	gw := p.gateway(r.addr)
	eventually(t, "the gateway is there", func() bool { return len(r.upstreams.all()) == 1 })
	l2 := l.up
	l2.peer = gw.Peer() // the RCP itself: no channel of that party
	if r.channelOf(l2) != nil {
		t.Error("a channel of a party that has none")
	}
	l2.peer = r.upstreams.all()[0].Peer()
	if r.channelOf(l2) == nil {
		t.Error("the gateway's channel is not found")
	}
	close(gone)
	if err := <-result; !errors.Is(err, errLaneOrphan) {
		t.Errorf("got %v", err)
	}
	ended(t, up[1])
	ended(t, down[1])
}

// An end that closed while the other says nothing and keeps its own open gives
// the place free all the same.
func TestLaneThatIsHalfClosed(t *testing.T) {
	r := newPlant(t).rcp(nil)
	up, down := tcpPipe(t), tcpPipe(t)
	l := &lane{r: r.Relay, cutting: make(chan error, 1), orphan: time.Hour, linger: 100 * time.Millisecond,
		up: end{conn: closable(nil)}, down: end{conn: closable(nil)}}
	result := make(chan error, 1)
	go func() {
		_, _, err := l.join(context.Background(), up[0], down[0])
		result <- err
	}()
	_ = down[1].Close()
	if err := <-result; !errors.Is(err, errLaneHalf) {
		t.Errorf("got %v", err)
	}
	ended(t, up[1])
}

type closable chan struct{}

func (c closable) Done() <-chan struct{} { return c }

// tcpPipe is two ends of a TCP connection.
func tcpPipe(t *testing.T) (ends [2]*net.TCPConn) {
	t.Helper()
	ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	if ends[0], err = net.DialTCP("tcp", nil, ln.Addr().(*net.TCPAddr)); err != nil {
		t.Fatal(err)
	}
	if ends[1], err = ln.AcceptTCP(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = ends[0].Close(), ends[1].Close() })
	return ends
}
