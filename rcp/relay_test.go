package rcp

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/config"
	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/local"
	"sallyport/internal/lockdir"
	"sallyport/internal/wire"
)

func TestNodeBehindRCP(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(nil)
	gw := p.gateway(r.addr)
	w := p.watch(gw)
	n := p.node(r.addr)
	id := n.id.ID()
	w.until("the node with its digest", func(v view) bool {
		x := v.peers[peerKey{target: target{id: id}}]
		return v.synced && x.Digest == "d1" && x.Role == wire.RoleNode && x.Carrier == "h2" && x.Boot == "boot" && strings.HasPrefix(x.Source, "127.0.0.1:")
	})
	n.signals <- wire.Signal{ID: id, Boot: "boot", Generation: 1, Digest: "d1", Hints: []string{wire.HintOutbox}}
	w.until("the hint", func(v view) bool {
		return slices.Contains(v.peers[peerKey{target: target{id: id}}].Hints, wire.HintOutbox)
	})

	s, err := gw.Connect(t.Context(), wire.ConnectAuthority(id), nil)
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, s, []byte("hello"))
	big := make([]byte, 3<<20)
	_, _ = rand.Read(big)
	roundTrip(t, s, big)
	_ = s.Close()

	if got := n.requests(); !slices.Equal(got, []string{"GET " + wire.PathSignals, "CONNECT " + wire.ConnectAuthority(id)}) {
		t.Errorf("the node was asked %q: want the signals and one CONNECT without headers", got)
	}

	n.conn.Close(nil)
	w.until("the node gone", not(w.has(id)))
	began := time.Now()
	status, reason := connectStatus(t, gw, wire.ConnectAuthority(id), nil)
	if status != http.StatusServiceUnavailable || !strings.Contains(reason, "rcp "+r.id.ID().Short()) || !strings.Contains(reason, "gone") {
		t.Errorf("CONNECT to a node that left: %d %q", status, reason)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("that took %s, want at once", took)
	}
	if status, _ := connectStatus(t, gw, wire.ConnectAuthority(wire.NewID()), nil); status != http.StatusNotFound {
		t.Errorf("CONNECT to nobody: %d", status)
	}
}

func TestBadConnects(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(nil)
	gw := p.gateway(r.addr)
	n := p.node(r.addr)
	w := p.watch(gw)
	w.until("the node", w.has(n.id.ID()))
	to := wire.ConnectAuthority(n.id.ID())
	for _, c := range []struct {
		name, authority string
		h               http.Header
		want            int
	}{
		{"a host", "example.com:443", nil, 400},
		{"an address", "127.0.0.1:22", nil, 400},
		{"another port", string(n.id.ID()) + ":22", nil, 400},
		{"hops above the limit", to, hops(5), 400},
		{"negative hops", to, hops(-1), 400},
		{"hops that are no number", to, http.Header{wire.HeaderHops: {"many"}}, 400},
		{"no hop left", to, hops(0), 508},
		{"a loop", to, hops(3, r.id.ID()), 508},
		{"a fifth RCP", to, hops(1, wire.NewID(), wire.NewID(), wire.NewID(), wire.NewID(), wire.NewID()), 508},
		{"garbage in via", to, http.Header{wire.HeaderVia: {"me"}}, 400},
		{"a pending party that is not there", wire.PendingAuthority(wire.HashSPKI(nil)), nil, 404},
		{"the last hop", to, hops(1), 200},
		{"three RCPs passed", to, hops(1, wire.NewID(), wire.NewID(), wire.NewID()), 200},
	} {
		if status, reason := connectStatus(t, gw, c.authority, c.h); status != c.want || (c.want != 200 && !strings.HasPrefix(reason, "rcp ")) {
			t.Errorf("%s: %d %q, want %d", c.name, status, reason, c.want)
		}
	}
	for _, q := range []struct{ method, path string }{
		{"GET", "/v1/hello"}, {"POST", wire.PathActions}, {"PUT", wire.PathDesired}, {"GET", "/"}, {"POST", wire.PathPeers}, {"GET", wire.PathSignals},
		{"PUT", wire.PathCertificate}, {"GET", wire.PathLanes},
	} {
		if got := put(t, gw, q.method, q.path, struct{}{}); got != 404 && got != 405 {
			t.Errorf("%s %s on the channel: %d, want no such thing", q.method, q.path, got)
		}
	}
	for _, q := range []struct {
		path, body string
		want       int
	}{
		{wire.PathChannels, `{"class":"session"}`, 409}, // it dialled us: it can dial again
		{wire.PathChannels, `{"class":"turbo"}`, 400},
		{wire.PathChannels, `{`, 400},
		{wire.PathDrain, `[]`, 400},
		{wire.PathDrain, `{"deadline_ns":1}`, 204},
	} {
		if got := send(t, gw, http.MethodPost, q.path, []byte(q.body)); got != q.want {
			t.Errorf("POST %s %s: %d, want %d", q.path, q.body, got, q.want)
		}
	}
}

func TestWhoMayAsk(t *testing.T) {
	p := newPlant(t)
	above := p.ca.Party(t, wire.RoleRCP)
	r := p.rcp(func(c *Config) { c.Upstreams = config.Endpoints{{ID: string(above.ID())}} })
	n := p.node(r.addr)
	if c, err := p.up(above, r.addr); err != nil {
		t.Errorf("the configured RCP above: %v", err)
	} else {
		w := p.watch(c)
		w.until("the node", w.has(n.id.ID()))
	}
	for name, id := range map[string]*identity.Identity{
		"a sibling RCP":                         p.ca.Party(t, wire.RoleRCP),
		"a node":                                p.ca.Party(t, wire.RoleNode),
		"the node itself":                       n.id,
		"a gateway of another CA":               newPlant(t).ca.Party(t, wire.RoleGateway),
		"an expired gateway":                    p.ca.Expired(t, wire.RoleGateway),
		"somebody without a signed certificate": p.ca.Pending(t, wire.RoleGateway),
	} {
		if c, err := p.up(id, r.addr); err == nil {
			if status, _ := connectStatus(t, c, wire.ConnectAuthority(n.id.ID()), nil); status == 200 {
				t.Errorf("%s reached a node", name)
			} else if !c.Enrolling() {
				t.Errorf("%s was taken as upstream", name)
			}
		}
	}
	// A gateway has no business below an RCP.
	if c, err := p.dialler(p.ca.Party(t, wire.RoleGateway), r.addr, channel.PeerUpstream).Dial(t.Context()); err == nil {
		c.Close(nil)
		t.Error("a gateway was taken as downstream")
	}
	// A node's own channel is a server: it cannot ask for anything.
	req, err := http.NewRequest(http.MethodGet, "http://peer"+wire.PathPeers, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.conn.RoundTrip(req); !errors.Is(err, channel.ErrWrongSide) {
		t.Errorf("a node asks its RCP: %v", err)
	}
}

func TestSidesOfAPort(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(func(c *Config) {
		c.Listen = config.SideListens{{Addr: "127.0.0.1:0", Side: config.Upstream}, {Addr: "127.0.0.1:0", Side: config.Downstream}}
	})
	gw, node, pending := p.ca.Party(t, wire.RoleGateway), p.ca.Party(t, wire.RoleNode), p.ca.Pending(t, wire.RoleNode)
	for i, addr := range []string{r.addrs[0].String(), r.addrs[1].String()} {
		upstreamSide := i == 0
		if _, err := p.up(gw, addr); (err == nil) != upstreamSide {
			t.Errorf("gateway at port %d: %v", i, err)
		}
		for name, id := range map[string]*identity.Identity{"node": node, "pending": pending} {
			c, err := p.dialler(id, addr, channel.PeerUpstream).Dial(t.Context())
			if (err == nil) == upstreamSide {
				t.Errorf("%s at port %d: %v", name, i, err)
			}
			if err == nil {
				c.Close(nil)
			}
		}
	}
}

func TestLyingNodeIsCut(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(nil)
	gw := p.gateway(r.addr)
	w := p.watch(gw)
	victim := p.node(r.addr)
	w.until("the victim", w.has(victim.id.ID()))
	for name, line := range map[string]string{
		"another's uuid": fmt.Sprintf(`{"id":%q,"boot":"b","generation":9}`, victim.id.ID()),
		"no JSON":        `hello`,
		"a list":         `[]`,
		"a long line":    `{"boot":"` + strings.Repeat("x", wire.MaxSignalLine) + `"}`,
	} {
		liar := p.ca.Party(t, wire.RoleNode)
		c := p.nodeWith(liar, r.addr, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			_, _ = w.Write([]byte(line + "\n"))
			_ = http.NewResponseController(w).Flush()
			<-req.Context().Done()
		}))
		select {
		case <-c.Done():
		case <-time.After(10 * time.Second):
			t.Errorf("%s: the channel still lives", name)
		}
		w.until(name+": the liar gone", not(w.has(liar.ID())))
	}
	if x := p.peer(w, victim.id.ID()); x.Boot != "boot" || x.Generation != 1 {
		t.Errorf("the victim is now %+v", x)
	}
	s, err := gw.Connect(t.Context(), wire.ConnectAuthority(victim.id.ID()), nil)
	if err != nil {
		t.Fatalf("the victim: %v", err)
	}
	roundTrip(t, s, []byte("still here"))
	_ = s.Close()
}

func (p *plant) peer(w *watcher, id wire.ID) wire.Peer {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.v.peers[peerKey{target: target{id: id}}]
}

// A node whose stream of signals ends, or was refused, is asked for another, and a line
// may come in pieces.
func TestSignalsAreAskedForAgain(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(nil)
	w := p.watch(p.gateway(r.addr))
	id := p.ca.Party(t, wire.RoleNode)
	var asked atomic.Int32
	second := make(chan struct{})
	p.nodeWith(id, r.addr, http.HandlerFunc(func(rw http.ResponseWriter, req *http.Request) {
		line := func(digest string) string {
			return fmt.Sprintf(`{"id":%q,"boot":"b","generation":1,"digest":%q}`+"\n", id.ID(), digest)
		}
		write := func(text string) {
			_, _ = io.WriteString(rw, text)
			_ = http.NewResponseController(rw).Flush()
		}
		switch asked.Add(1) {
		case 1:
			write(line("first"))
		case 2:
			rw.WriteHeader(http.StatusServiceUnavailable)
		default:
			write("")
			<-second
			text := line("last")
			write(text[:10])
			write(text[10:20])
			write(text[20:])
			<-req.Context().Done()
		}
	}))
	says := func(digest string) func(view) bool {
		return func(v view) bool { return v.peers[peerKey{target: target{id: id.ID()}}].Digest == digest }
	}
	w.until("its first signal", says("first"))
	close(second)
	w.until("what it says on the third stream", says("last"))
	if n := asked.Load(); n != 3 {
		t.Errorf("asked %d times", n)
	}
}

func TestFloodOfSignalsIsSlowedDown(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(nil)
	gw := p.gateway(r.addr)
	w := p.watch(gw)
	n := p.node(r.addr)
	w.until("the node", w.has(n.id.ID()))
	at := func() int64 {
		r.table.mu.Lock()
		defer r.table.mu.Unlock()
		return r.table.pos
	}
	before := at()
	for range 9000 {
		n.signals <- wire.Signal{ID: n.id.ID(), Boot: "boot", Generation: 1, Digest: "flood"}
	}
	began := time.Now()
	w.until("some of it", func(v view) bool { return v.peers[peerKey{target: target{id: n.id.ID()}}].Digest == "flood" })
	other := p.node(r.addr)
	w.until("another node, meanwhile", w.has(other.id.ID()))
	taken := at() - before
	if limit := int64(signalBurst + 5 + signalRate*(1+time.Since(began).Seconds())); taken > limit {
		t.Errorf("%d changes from a flood, want at most %d", taken, limit)
	}
}

func TestSlowReaderStallsNobody(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(nil)
	gw, other := p.gateway(r.addr), p.gateway(r.addr)
	// A gateway that asks for the peers and never reads them.
	req, err := http.NewRequest(http.MethodGet, "http://peer"+wire.PathPeers, nil)
	if err != nil {
		t.Fatal(err)
	}
	stuck, err := gw.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stuck.Body.Close() }()
	w := p.watch(other)
	n := p.node(r.addr)
	w.until("the node", w.has(n.id.ID()))
	for i := range 20_000 { // far more than a window holds
		if err := r.table.put(wire.Peer{Role: wire.RoleNode, ID: wire.NewID(), Digest: fmt.Sprint(i)}); err != nil {
			t.Fatal(err)
		}
	}
	w.until("all of it at the other gateway", func(v view) bool { return len(v.peers) == 20_001 })
	// And a stream that nobody reads, on the same channel and node.
	full, err := gw.Connect(t.Context(), wire.ConnectAuthority(n.id.ID()), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = full.Close() }()
	_ = full.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
	_, _ = full.Write(make([]byte, 8<<20))
	s, err := gw.Connect(t.Context(), wire.ConnectAuthority(n.id.ID()), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	roundTrip(t, s, bytes.Repeat([]byte("x"), 100_000))
}

// A full disk keeps nobody in: the set counts at once, and is asked for again.
func TestRevocationThatCannotBeWrittenCuts(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(nil)
	gw := p.gateway(r.addr)
	bad := p.node(r.addr)
	obstacle := filepath.Join(r.data, "rcp", "identity", "revocations.json") // no file takes the place of a directory
	if err := os.Mkdir(obstacle, 0o700); err != nil {
		t.Fatal(err)
	}
	set := p.ca.Revoke(t, 5, bad.id.KeyHash())
	if got := put(t, gw, http.MethodPut, wire.PathRevocations, set); got != 422 {
		t.Errorf("the set: %d", got)
	}
	select {
	case <-bad.conn.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the revoked node's channel lives on")
	}
	if number, _ := r.id.Revocations(); number != 0 {
		t.Errorf("it says that it holds set %d", number)
	}
	if got := put(t, gw, http.MethodPut, wire.PathRevocations, p.ca.Revoke(t, 4)); got != 409 {
		t.Errorf("a lower number: %d, want 409", got)
	}
	if err := os.Remove(obstacle); err != nil {
		t.Fatal(err)
	}
	if got := put(t, gw, http.MethodPut, wire.PathRevocations, set); got != 204 {
		t.Errorf("the same set again: %d", got)
	}
	if number, _ := r.id.Revocations(); number != 5 || !r.id.Revoked(bad.id.KeyHash()) {
		t.Errorf("held: %d", number)
	}
}

func TestRevocationCutsAndLasts(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(nil)
	gw := p.gateway(r.addr)
	w := p.watch(gw)
	bad, good := p.node(r.addr), p.node(r.addr)
	w.until("both nodes", func(v view) bool { return w.has(bad.id.ID())(v) && w.has(good.id.ID())(v) })

	if got := put(t, gw, http.MethodPut, wire.PathRevocations, newPlant(t).ca.Revoke(t, 9, good.id.KeyHash())); got != 422 {
		t.Errorf("a set of another CA: %d", got)
	}
	set := p.ca.Revoke(t, 5, bad.id.KeyHash())
	if got := put(t, gw, http.MethodPut, wire.PathRevocations, set); got != 204 {
		t.Fatalf("the set: %d", got)
	}
	select {
	case <-bad.conn.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the revoked node's channel lives on")
	}
	w.until("the revoked node gone", not(w.has(bad.id.ID())))
	if got := put(t, gw, http.MethodPut, wire.PathRevocations, p.ca.Revoke(t, 4)); got != 409 {
		t.Errorf("a lower number: %d, want 409", got)
	}
	if got := put(t, gw, http.MethodPut, wire.PathRevocations, set); got != 204 {
		t.Errorf("the same set again: %d", got)
	}
	refusedNow := func(addr string) {
		t.Helper()
		c, err := p.dialler(bad.id, addr, channel.PeerUpstream).Dial(t.Context())
		if err == nil {
			c.Close(nil)
			t.Error("the revoked node was taken again")
		}
	}
	refusedNow(r.addr)
	if good.conn.Err() != nil {
		t.Errorf("the other node: %v", good.conn.Err())
	}
	r.stop()
	again := p.start(r.data, nil) // and no gateway is there
	refusedNow(again.addr)
	p.node(again.addr)
}

func TestTwoRCPsInAChain(t *testing.T) {
	p := newPlant(t)
	top := p.rcp(nil)
	low := p.rcp(func(c *Config) { c.Upstreams = config.Endpoints{{Addr: top.addr, ID: string(top.id.ID())}} })
	gw := p.gateway(top.addr)
	w := p.watch(gw)
	n := p.node(low.addr)
	pend := p.ca.Pending(t, wire.RoleNode)
	p.nodeWith(pend, low.addr, http.NotFoundHandler())
	lowID, id := low.id.ID(), n.id.ID()
	w.until("the RCP below, the node behind it, and who waits there", func(v view) bool {
		_, waiting := v.peers[keyOf(target{key: pend.KeyHash()}, []wire.ID{lowID})]
		return w.has(lowID)(v) && w.has(id, lowID)(v) && waiting
	})
	s, err := gw.Connect(t.Context(), wire.ConnectAuthority(id), hops(wire.MaxHops))
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, s, []byte("through two"))
	_ = s.Close()
	for _, q := range n.requests() {
		if strings.HasPrefix(q, "CONNECT") && q != "CONNECT "+wire.ConnectAuthority(id) {
			t.Errorf("the node was asked %q", q)
		}
	}
	if status, reason := connectStatus(t, gw, wire.ConnectAuthority(id), hops(1)); status != 508 || !strings.Contains(reason, "limit") {
		t.Errorf("with one hop left: %d %q", status, reason)
	}
	if status, _ := connectStatus(t, gw, wire.ConnectAuthority(id), hops(3, lowID)); status != 508 {
		t.Errorf("back to an RCP that was passed: %d", status)
	}

	// A set that reaches the upper one reaches the lower one.
	other := p.node(low.addr)
	w.until("another node", w.has(other.id.ID(), lowID))
	if got := put(t, gw, http.MethodPut, wire.PathRevocations, p.ca.Revoke(t, 1, other.id.KeyHash())); got != 204 {
		t.Fatalf("revocations: %d", got)
	}
	w.until("the revoked node below gone", not(w.has(other.id.ID(), lowID)))

	n.conn.Close(nil)
	w.until("the node gone", not(w.has(id, lowID)))
	status, reason := connectStatus(t, gw, wire.ConnectAuthority(id), nil)
	if status != 503 || !strings.Contains(reason, "gone") {
		t.Errorf("to a node that left below: %d %q", status, reason)
	}
	low.stop()
	w.until("everything behind the lower RCP gone", func(v view) bool { return len(v.peers) == 0 })
}

func TestFiveRCPsAreOneTooMany(t *testing.T) {
	p := newPlant(t)
	chain := []*testRCP{p.rcp(nil)}
	for range 4 {
		above := chain[len(chain)-1]
		chain = append(chain, p.rcp(func(c *Config) { c.Upstreams = config.Endpoints{{Addr: above.addr}} }))
	}
	w := p.watch(p.gateway(chain[0].addr))
	gw := p.gateway(chain[0].addr)
	path := func(n int) (ids []wire.ID) {
		for _, r := range chain[1 : n+1] {
			ids = append(ids, r.id.ID())
		}
		return ids
	}
	fourth, fifth := p.node(chain[3].addr), p.node(chain[4].addr)
	w.until("the node behind four", w.has(fourth.id.ID(), path(3)...))
	eventually(t, "the node behind five, as far up as it is told", func() bool {
		ways, _ := chain[1].table.route(target{id: fifth.id.ID()})
		return len(ways) == 1
	})
	if status, reason := connectStatus(t, gw, wire.ConnectAuthority(fourth.id.ID()), nil); status != 200 {
		t.Errorf("through four: %d %s", status, reason)
	}
	status, reason := connectStatus(t, p.gateway(chain[1].addr), wire.ConnectAuthority(fifth.id.ID()), hops(3))
	if status != 508 || strings.Count(reason, "rcp ") < 3 {
		t.Errorf("through five: %d %q, want 508 with the hops that it passed", status, reason)
	}
	if status, _ := connectStatus(t, gw, wire.ConnectAuthority(fifth.id.ID()), nil); status == 200 {
		t.Error("a node behind five RCPs was reached")
	}
	if w.mu.Lock(); w.has(fifth.id.ID(), path(4)...)(w.v) {
		t.Error("a node behind five RCPs is published")
	}
	w.mu.Unlock()
}

func TestRCPThatClaimsAnythingOfItsPeers(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(nil)
	gw := p.gateway(r.addr)
	w := p.watch(gw)
	honest := p.node(r.addr)
	w.until("the honest node", w.has(honest.id.ID()))
	liar := p.ca.Party(t, wire.RoleRCP)
	far := wire.NewID()
	lines := []wire.PeersLine{
		{Hello: &wire.PeersHello{ID: liar.ID(), Epoch: "e", Boot: "b", Generation: 1, Snapshot: true}},
		{Peer: &wire.Peer{Role: wire.RoleNode, ID: honest.id.ID(), Digest: "stolen"}, Pos: 1},
		{Gone: &wire.Gone{ID: honest.id.ID(), Path: nil}, Pos: 2},
		{Peer: &wire.Peer{Role: wire.RoleNode, ID: wire.NewID(), Path: []wire.ID{r.id.ID()}}, Pos: 3},                                // a loop
		{Peer: &wire.Peer{Role: wire.RoleRCP, ID: r.id.ID()}, Pos: 4},                                                                // we hang on it?
		{Peer: &wire.Peer{Role: wire.RoleNode, ID: wire.NewID(), Path: []wire.ID{wire.NewID(), wire.NewID(), wire.NewID()}}, Pos: 5}, // too far
		{Peer: &wire.Peer{Role: wire.RoleNode, ID: far, Source: "evil\r\nsource", Hints: []string{wire.HintOutbox}}, Pos: 6},
		{Synced: true, Pos: 6},
	}
	serve := func(extra ...wire.PeersLine) *channel.Conn {
		return p.nodeWith(liar, r.addr, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.URL.Path != wire.PathPeers {
				return
			}
			var b []byte
			for _, l := range append(slices.Clone(lines), extra...) {
				b, _ = wire.AppendLine(b, l)
			}
			_, _ = w.Write(b)
			_ = http.NewResponseController(w).Flush()
			<-req.Context().Done()
		}))
	}
	first := serve()
	w.until("what it may say", w.has(far, liar.ID()))
	w.mu.Lock()
	if x := w.v.peers[keyOf(target{id: far}, []wire.ID{liar.ID()})]; strings.ContainsAny(x.Source, "\r\n") {
		t.Errorf("source %q", x.Source)
	}
	if !w.has(honest.id.ID())(w.v) || w.v.peers[peerKey{target: target{id: honest.id.ID()}}].Digest != "d1" {
		t.Error("the honest node was taken away, or changed")
	}
	if len(w.v.peers) != 3 { // honest, liar, far
		t.Errorf("peers %v", w.v.peers)
	}
	w.mu.Unlock()
	if status, reason := connectStatus(t, gw, wire.ConnectAuthority(honest.id.ID()), nil); status != 200 {
		t.Errorf("the honest node: %d %s", status, reason)
	}
	first.Close(nil) // one channel of an RCP tells at a time
	for name, l := range map[string]wire.PeersLine{
		"a gateway below":  {Peer: &wire.Peer{Role: wire.RoleGateway, ID: wire.NewID()}},
		"no uuid":          {Peer: &wire.Peer{Role: wire.RoleNode, ID: "x"}},
		"pending and more": {Peer: &wire.Peer{Role: wire.RoleNode, ID: wire.NewID(), Pending: wire.HashSPKI(nil)}},
		"another's hello":  {Hello: &wire.PeersHello{ID: honest.id.ID()}},
	} {
		c := serve(l)
		select {
		case <-c.Done():
		case <-time.After(10 * time.Second):
			t.Errorf("%s: the channel still lives", name)
		}
	}
}

// An RCP that was removed while it was away does not know it. The one above it
// refuses it, and with a new join code it takes that for an answer.
func TestRemovedRCPBelowAnotherEnrolsAgain(t *testing.T) {
	p := newPlant(t)
	above := p.rcp(nil)
	data, _ := p.certified()
	below := p.start(data, func(c *Config) { c.Upstreams = config.Endpoints{{Addr: above.addr, ID: string(above.id.ID())}} })
	old := below.id.KeyHash()
	eventually(t, "it is connected", func() bool { return len(above.roster.channels(target{id: below.id.ID()})) > 0 })
	if _, err := above.id.ApplyRevocations(p.ca.Revoke(t, 1, old)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is refused", func() bool { return below.applicant.Status().Reason != "" })
	if below.id.KeyHash() != old {
		t.Fatal("it gave its key up without a code")
	}
	code, err := (wire.JoinCode{TrustDomain: below.id.TrustDomain(), Root: wire.KeyOf(p.ca.Root), Role: wire.RoleRCP}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	if err := local.NewClient(local.SocketPath(below.data, wire.RoleRCP)).Join(t.Context(), code); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it waits above with a new key", func() bool {
		return below.id.KeyHash() != old && len(above.roster.channels(target{key: below.id.KeyHash()})) > 0
	})
}

func TestDiallerlessRCP(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(func(c *Config) { c.Upstreams = config.Endpoints{{ID: string(wire.NewID())}} }) // a bare UUID gives no target
	if len(r.diallers) != 0 {
		t.Fatalf("diallers %v without dial targets", r.diallers.targets())
	}
	c := local.NewClient(local.SocketPath(r.data, wire.RoleRCP))
	// Not even a join code with addresses makes one.
	code, err := (wire.JoinCode{TrustDomain: r.id.TrustDomain(), Root: wire.KeyOf(p.ca.Root), Role: wire.RoleRCP, Addresses: []string{"127.0.0.1:1"}}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Join(t.Context(), code); err != nil {
		t.Fatal(err)
	}
	st, err := c.Status(t.Context())
	if err != nil || len(st.DialTargets) != 0 || st.State != "running" || st.Role != wire.RoleRCP || st.ID != r.id.ID() || st.Fingerprint != r.id.Fingerprint() {
		t.Errorf("status %+v, %v", st, err)
	}
	checks, err := c.Doctor(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(checks, func(c local.Check) bool { return c.Check == "dialler" })
	if i < 0 || !checks[i].OK || !strings.Contains(checks[i].Detail, "no dialler") {
		t.Errorf("doctor says %+v", checks)
	}

	up := p.rcp(func(c *Config) { c.Upstreams = config.Endpoints{{Addr: r.addr}} })
	if got := up.diallers.targets(); len(got) != 1 || !strings.HasPrefix(got[0], r.addr) {
		t.Errorf("targets %v", got)
	}
}

func TestSecondStartIsRefused(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(nil)
	second, err := New(r.cfg, quiet, prometheusRegistry())
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Run(t.Context()); !errors.Is(err, lockdir.ErrLocked) {
		t.Errorf("second start: %v, want ErrLocked", err)
	}
}
