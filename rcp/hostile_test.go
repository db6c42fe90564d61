package rcp

import (
	"context"
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/config"
	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// testRelay is a relay without channels, for what parses peers' words.
func testRelay(t testing.TB) *Relay {
	r, err := New(Config{RCP: config.RCP{PendingMax: 10, PendingPerSource: 10}}, quiet, prometheusRegistry())
	if err != nil {
		t.Fatal(err)
	}
	if r.id, err = identity.Open(t.TempDir(), wire.RoleRCP); err != nil {
		t.Fatal(err)
	}
	return r
}

// FuzzPeersOfAnRCP: whatever an RCP below says, nothing in our table changes
// but what is behind it, and what we say of it fits into a line.
func FuzzPeersOfAnRCP(f *testing.F) {
	below, honest, other := wire.NewID(), wire.NewID(), wire.NewID()
	for _, l := range []wire.PeersLine{
		{Hello: &wire.PeersHello{ID: below, Epoch: "e", Snapshot: true}},
		{Peer: &wire.Peer{Role: wire.RoleNode, ID: honest}, Pos: 1},
		{Peer: &wire.Peer{Pending: wire.HashSPKI(nil), Path: []wire.ID{other}}, Pos: 2},
		{Gone: &wire.Gone{ID: honest}, Pos: 3},
		{Synced: true, Pos: 3},
		{Draining: &wire.Drain{}},
	} {
		b, err := wire.AppendLine(nil, l)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(b))
	}
	f.Add(`{"peer":{"role":"node","id":"` + string(honest) + `","path":["` + string(below) + `"]}}`)
	r := testRelay(f)
	if err := r.table.put(wire.Peer{Role: wire.RoleNode, ID: honest, Digest: "mine"}); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text string) {
		a, err := r.roster.join(t.Context(), newFake(rcpPeer(below), "10.0.0.1:1"))
		if err != nil {
			t.Fatal(err)
		}
		m := r.mirrors.take(below)
		m.a = a
		defer func() {
			r.mirrors.release(m)
			r.roster.leave(a, "end")
			for k := range r.table.truth() {
				if k.id != honest || k.path != "" {
					t.Fatalf("%+v is left behind", k)
				}
			}
		}()
		lines := wire.NewLineReader(strings.NewReader(text), wire.MaxPeersLine)
		for {
			var l wire.PeersLine
			if lines.Next(&l) != nil || m.apply(l) != nil {
				break
			}
		}
		for k, p := range r.table.truth() {
			direct := k.path == "" && (k.id == honest && p.Digest == "mine" || k.id == below)
			if !direct && !strings.HasPrefix(k.path, string(below)) {
				t.Fatalf("%+v is not behind the RCP that spoke", k)
			}
			if b, err := wire.AppendLine(nil, wire.PeersLine{Peer: &p, Pos: 1 << 60}); err != nil || len(b) > wire.MaxPeersLine {
				t.Fatalf("a line of %d bytes, %v", len(b), err)
			}
		}
	})
}

func FuzzConnect(f *testing.F) {
	r := testRelay(f)
	f.Add(wire.ConnectAuthority(wire.NewID()), "3", string(wire.NewID()))
	f.Add(wire.PendingAuthority(wire.HashSPKI(nil)), "", "")
	f.Add("[::1]:443", "-1", ",,")
	f.Fuzz(func(t *testing.T, host, hops, via string) {
		req := &http.Request{Method: http.MethodConnect, Host: host, Header: http.Header{wire.HeaderHops: {hops}, wire.HeaderVia: {via}}}
		j, no := r.parseJourney(req)
		if no != nil {
			if no.status/100 != 4 && no.status != http.StatusLoopDetected {
				t.Fatalf("refused with %d", no.status)
			}
			w := httptest.NewRecorder()
			channel.Refuse(w, no.status, printable(no.reason, 500))
			return
		}
		if (j.to.id == "") == (j.to.key == "") || j.hops < 1 || j.hops > wire.MaxHops || len(j.via) > wire.MaxHops {
			t.Fatalf("accepted %+v", j)
		}
		h, no := r.headerFor(j, wire.Peer{Path: []wire.ID{wire.NewID()}})
		if no == nil {
			next := testJourney(r, host, h)
			if len(next.via) != len(j.via)+1 || next.hops != j.hops-1 {
				t.Fatalf("%+v became %+v", j, next)
			}
		}
	})
}

// testJourney reads what the next RCP would read.
func testJourney(r *Relay, host string, h http.Header) journey {
	j, _ := (&Relay{id: r.id}).parseJourney(&http.Request{Method: http.MethodConnect, Host: host, Header: h})
	return j
}

func TestFloodOfPendingParties(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(func(c *Config) { c.PendingPerSource = 5 })
	gw := p.gateway(r.addr)
	w := p.watch(gw)
	pendingOf := func(v view) (n int) {
		for k := range v.peers {
			if k.key != "" {
				n++
			}
		}
		return n
	}
	var conns []*channel.Conn
	for range 12 {
		conns = append(conns, p.nodeWith(p.ca.Pending(t, wire.RoleNode), r.addr, http.NotFoundHandler()))
	}
	eventually(t, "seven of twelve cut", func() bool {
		alive := 0
		for _, c := range conns {
			if c.Err() == nil {
				alive++
			}
		}
		return alive == 5
	})
	w.until("five wait", func(v view) bool { return pendingOf(v) == 5 })
	n := p.node(r.addr) // a certified node behind the same address has no part in it
	w.until("the node", w.has(n.id.ID()))
	for _, c := range conns {
		c.Close(nil)
	}
	w.until("nobody waits", func(v view) bool { return pendingOf(v) == 0 })
	late := p.ca.Pending(t, wire.RoleNode)
	p.nodeWith(late, r.addr, http.NotFoundHandler())
	w.until("there is room again", func(v view) bool { return pendingOf(v) == 1 })
	if status, _ := connectStatus(t, gw, wire.PendingAuthority(late.KeyHash()), nil); status != http.StatusBadGateway {
		t.Errorf("CONNECT to a pending party that refuses: %d, want 502", status)
	}
}

// TestGatewayKeepsThePlaceOfARequest: what a gateway says of a pending party's request
// reaches the RCP where it waits, through another one.
func TestGatewayKeepsThePlaceOfARequest(t *testing.T) {
	p := newPlant(t)
	upper := p.rcp(nil)
	lower := p.rcp(func(c *Config) { c.Upstreams = config.Endpoints{{Addr: upper.addr}} })
	gw := p.gateway(upper.addr)
	w := p.watch(gw)
	waits := p.ca.Pending(t, wire.RoleNode)
	p.nodeWith(waits, lower.addr, http.NotFoundHandler())
	w.until("the party behind both", func(v view) bool {
		for k := range v.peers {
			if k.key == waits.KeyHash() {
				return true
			}
		}
		return false
	})
	kept := func() bool {
		all := lower.roster.channels(target{key: waits.KeyHash()})
		lower.roster.mu.Lock()
		defer lower.roster.mu.Unlock()
		return len(all) == 1 && all[0].requested
	}
	connectStatus(t, gw, wire.PendingAuthority(waits.KeyHash()), nil)
	if kept() {
		t.Error("a place is kept for who has no request")
	}
	connectStatus(t, gw, wire.PendingAuthority(waits.KeyHash()), http.Header{wire.HeaderRequested: {"1"}})
	if !kept() {
		t.Error("no place is kept")
	}
}

// TestOneMeanNodeDelaysNoOther: a node that never answers its CONNECT, and one
// that never answers anything, hold up nobody.
func TestOneMeanNodeDelaysNoOther(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(nil)
	gw := p.gateway(r.addr)
	w := p.watch(gw)
	mute := p.ca.Party(t, wire.RoleNode)
	p.nodeWith(mute, r.addr, http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) { <-req.Context().Done() }))
	good := p.node(r.addr)
	w.until("both", func(v view) bool { return w.has(mute.ID())(v) && w.has(good.id.ID())(v) })
	var ends []func()
	for range 50 {
		done := make(chan struct{})
		go func() {
			defer close(done)
			if s, err := gw.Connect(t.Context(), wire.ConnectAuthority(mute.ID()), nil); err == nil {
				_ = s.Close()
			}
		}()
		ends = append(ends, func() { <-done })
	}
	began := time.Now()
	s, err := gw.Connect(t.Context(), wire.ConnectAuthority(good.id.ID()), nil)
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, s, []byte("quick"))
	_ = s.Close()
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("the good node took %s", took)
	}
	gw.Close(nil)
	for _, end := range ends {
		end()
	}
}

// TestOnlyOnePlaceDials reads our own source: a channel.Dialer is made in
// dial.go alone, and nothing here dials, resolves or asks by other means.
func TestOnlyOnePlaceDials(t *testing.T) {
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	made := 0
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			pkg, ok := sel.X.(*ast.Ident)
			if !ok {
				return true
			}
			what := pkg.Name + "." + sel.Sel.Name
			switch {
			case what == "channel.Dialer" && name == "dial.go":
				made++
			case what == "channel.Dialer",
				pkg.Name == "net" && (strings.HasPrefix(sel.Sel.Name, "Dial") || strings.HasPrefix(sel.Sel.Name, "Lookup") || strings.HasPrefix(sel.Sel.Name, "Resolve")),
				pkg.Name == "http" && (sel.Sel.Name == "Client" || sel.Sel.Name == "DefaultClient" || sel.Sel.Name == "DefaultTransport" || sel.Sel.Name == "Transport" || sel.Sel.Name == "Get" || sel.Sel.Name == "Post"),
				pkg.Name == "tls" && strings.HasPrefix(sel.Sel.Name, "Dial"):
				t.Errorf("%s uses %s", name, what)
			}
			return true
		})
	}
	if made == 0 {
		t.Error("no channel.Dialer is made in dial.go: this test looks in the wrong place")
	}
}

func TestRCPDialsWhoMayOnlyListen(t *testing.T) {
	p := newPlant(t)
	// A node that only listens, without a certificate first.
	node := p.ca.Pending(t, wire.RoleNode)
	ln, err := channel.Listen(channel.ListenConfig{
		Addr: "127.0.0.1:0", Identity: node, AllowUpstream: true, AllowEnroll: true, Carriers: []string{channel.CarrierH2}, Log: quiet,
	})
	if err != nil {
		t.Fatal(err)
	}
	n := &testNode{id: node, signals: make(chan wire.Signal, 1)}
	n.signals <- wire.Signal{ID: node.ID(), Boot: "boot", Generation: 1}
	p.background(func(ctx context.Context) {
		_ = ln.Run(ctx, func(ctx context.Context, c *channel.Conn) { _ = c.Serve(ctx, n) })
	})

	r := p.rcp(func(c *Config) { c.Downstreams = config.Endpoints{{Addr: ln.Addr().String()}} })
	w := p.watch(p.gateway(r.addr))
	w.until("it waits for a certificate", func(v view) bool {
		x, ok := v.peers[peerKey{target: target{key: node.KeyHash()}}]
		return ok && x.Dialled
	})
	p.ca.Certify(t, node)
	for _, c := range ln.Conns() {
		c.Close(nil) // as a node does when its request was decided
	}
	w.until("it is a node", func(v view) bool { return v.peers[peerKey{target: target{id: node.ID()}}].Dialled })
}
