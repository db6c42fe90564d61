package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

// site is a gateway with nodes that are connected as far as it knows. What
// their targets do is up to the test.
type site struct {
	*world
	c *api.Client

	mu     sync.Mutex
	serves map[string]func() (targetStream, error) // by node and target
	dials  map[string]int
}

func newSite(t *testing.T, https bool, set ...func(*Config)) *site {
	t.Helper()
	st := &site{world: newWorld(t), serves: map[string]func() (targetStream, error){}, dials: map[string]int{}}
	st.serveAPI(https)
	for _, f := range set {
		f(&st.cfg)
	}
	st.before = func(s *Server) { s.targets.dial = st.dial }
	st.run()
	var err error
	if st.c, err = api.NewClient(api.ClientConfig{URL: st.cfg.Socket}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.c.Close)
	eventually(t, "the API answers", func() bool { _, err := st.c.About(t.Context()); return err == nil })
	return st
}

func (st *site) dial(_ context.Context, node wire.ID, target string) (targetStream, error) {
	st.mu.Lock()
	key := st.s.fleet.nameNow(node) + "/" + target
	st.dials[key]++
	f := st.serves[key]
	st.mu.Unlock()
	if f == nil {
		return nil, ErrNotConnected
	}
	return f()
}

func (st *site) serve(node, target string, f func() (targetStream, error)) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.serves[node+"/"+target] = f
}

func (st *site) dialled(node, target string) int {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.dials[node+"/"+target]
}

// nodes adds nodes that are connected and running.
func (st *site) nodes(names ...string) (ids []wire.ID) {
	st.t.Helper()
	for _, name := range names {
		id := st.addNode(name, map[string]string{"role": "web"})
		if err := st.s.changed(st.t.Context(), id); err != nil {
			st.t.Fatal(err)
		}
		st.connect(id, name)
		ids = append(ids, id)
	}
	return ids
}

func (st *site) connect(id wire.ID, name string) {
	st.s.fleet.linkUp(linkInfo{ID: id, Role: wire.RoleNode, Name: name, Carrier: "h2", Since: time.Now()})
	st.s.fleet.verifiedHello(id, wire.RoleNode, wire.Hello{Party: wire.Party{Role: wire.RoleNode, ID: id}, Versions: wire.OwnVersions,
		Installation: st.db.Installation().UID, State: wire.StateRunning, Name: name}, 0)
}

// offer applies a target and has the nodes say that they have it.
func (st *site) offer(name, spec string, ids ...wire.ID) {
	st.t.Helper()
	applyText(st.t, st.c, fmt.Sprintf("kind: policy\nname: %[1]s\ntype: target\nspec: {%[2]s}\n---\nkind: deployment\nname: %[1]s\nselector: role=web\npolicies: [%[1]s]\n", name, spec), false)
	p, err := st.db.Policy(st.t.Context(), store.DefaultTenant, name)
	if err != nil {
		st.t.Fatal(err)
	}
	for _, id := range ids {
		st.says(id, wire.PolicyStatus{Name: name, Type: wire.PolicyTarget, Digest: p.Digest, State: wire.PolicyApplied})
	}
	eventually(st.t, name+" is in the catalog", func() bool { return len(st.s.targets.usage(name).offered) == len(ids) })
}

// says adds to what a node said of its policies.
func (st *site) says(id wire.ID, ps wire.PolicyStatus) {
	st.update(func(ctx context.Context, tx *store.Tx) error {
		old, err := tx.PolicyStatus(ctx, id)
		if err != nil {
			return err
		}
		all := []wire.PolicyStatus{ps}
		for _, s := range old {
			if s.Policy != ps.Name {
				all = append(all, wire.PolicyStatus{Name: s.Policy, Type: s.Type, Digest: s.Digest, State: s.State})
			}
		}
		return tx.SetPolicyStatus(ctx, id, all)
	})
}

// plain is a TCP connection as a stream. It has a stream's methods only: where a
// TCPConn copies from another by itself, each failure looks like its own.
type plain struct{ targetStream }

// to is a target behind a TCP address.
func to(addr string) func() (targetStream, error) {
	return func() (targetStream, error) {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return nil, err
		}
		return plain{c.(*net.TCPConn)}, nil
	}
}

// refusing is a stream that the node refuses after it was opened, as streams
// are: the first read says so.
func refusing(code tunnel.Code) func() (targetStream, error) {
	return func() (targetStream, error) {
		return &refusedStream{err: &tunnel.RefusedError{Code: code, Reason: "said the node"}, closed: make(chan struct{})}, nil
	}
}

type refusedStream struct {
	err    error
	once   sync.Once
	closed chan struct{}
}

func (s *refusedStream) Read([]byte) (int, error) { return 0, s.err }
func (s *refusedStream) Write(p []byte) (int, error) {
	return len(p), nil
}
func (s *refusedStream) Close() error                     { s.once.Do(func() { close(s.closed) }); return nil }
func (s *refusedStream) CloseWrite() error                { return nil }
func (s *refusedStream) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (s *refusedStream) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (s *refusedStream) SetDeadline(time.Time) error      { return nil }
func (s *refusedStream) SetReadDeadline(time.Time) error  { return nil }
func (s *refusedStream) SetWriteDeadline(time.Time) error { return nil }

// web starts an HTTP server and returns its address.
func web(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return srv.Listener.Addr().String()
}

// peer starts a TCP server that hands each connection to f and returns its
// address.
func peer(t *testing.T, f func(c *net.TCPConn)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		_ = ln.Close()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				f(c.(*net.TCPConn))
			})
		}
	})
	return ln.Addr().String()
}

func TestCatalogFollowsWhatNodesSay(t *testing.T) {
	t.Parallel()
	st := newSite(t, false)
	ids := st.nodes("a", "b")
	st.offer("web", "url: 'http://127.0.0.1:80'", ids...)
	pick := func(node wire.ID, tried ...wire.ID) (wire.ID, error) {
		ch, err := st.s.targets.pick("web", node, tried...)
		if err == nil {
			ch.done()
		}
		return ch.node, err
	}
	if _, err := pick(""); err != nil {
		t.Fatal(err)
	}
	st.says(ids[0], wire.PolicyStatus{Name: "web", Type: wire.PolicyTarget, State: wire.PolicyFailed, Error: "not allowed"})
	eventually(t, "only b offers it", func() bool { return len(st.s.targets.usage("web").offered) == 1 })
	if id, err := pick(""); id != ids[1] || err != nil {
		t.Errorf("%s, %v", id, err)
	}
	if _, err := pick(ids[0]); !errors.Is(err, errNotOffered) {
		t.Errorf("a failed there: %v", err)
	}
	if _, err := pick("", ids[1]); !errors.Is(err, errExhausted) {
		t.Errorf("all tried: %v", err)
	}
	d, err := st.c.Target(t.Context(), "web")
	if err != nil || d.Nodes != 2 || d.Offered != 1 || d.Connected != 1 || d.State != api.TargetReady || len(d.On) != 2 || d.On[0].Error != "not allowed" {
		t.Errorf("%+v, %v", d, err)
	}
	st.s.fleet.linkDown(ids[1], "gone")
	if _, err := pick(""); !errors.Is(err, ErrNotConnected) {
		t.Errorf("nobody is connected: %v", err)
	}
	if _, err := st.c.DeleteDeployment(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nobody is to offer it", func() bool { return len(st.s.targets.usage("web").wanted) == 0 })
	if _, err := pick(""); !errors.Is(err, errNoTarget) {
		t.Errorf("undeployed: %v", err)
	}
	all, err := st.c.Targets(t.Context())
	if err != nil || len(all) != 3 || all[0].Name != "echo" || all[1].Name != "ping" || all[2].State != api.TargetUnused {
		t.Errorf("%+v, %v", all, err)
	}
}

func TestPickPrefersTheLeastBusyNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		c := newCatalog(b.f, nil, slog.New(slog.DiscardHandler))
		ids := make([]wire.ID, 5)
		for i := range ids {
			ids[i] = b.node(fmt.Sprint("n", i), wire.StateDown)
			b.f.linkUp(linkInfo{ID: ids[i], Role: wire.RoleNode, Since: time.Now()})
			b.f.verifiedHello(ids[i], wire.RoleNode, wire.Hello{Versions: wire.OwnVersions, Installation: "inst", State: wire.StateRunning}, 0)
		}
		specs := map[wire.ID]*wire.TargetSpec{}
		for _, id := range ids {
			specs[id] = &wire.TargetSpec{Address: "db:1"}
		}
		c.offers["web"] = &offer{nodes: ids, specs: specs}
		var open []choice
		seen := map[wire.ID]int{}
		take := func() wire.ID {
			t.Helper()
			ch, err := c.pick("web", "")
			if err != nil {
				t.Fatal(err)
			}
			open = append(open, ch)
			seen[ch.node]++
			return ch.node
		}
		for range 10 {
			take()
		}
		for _, id := range ids {
			if seen[id] != 2 {
				t.Errorf("%d of ten went to %s", seen[id], id)
			}
		}
		for _, ch := range open {
			ch.done()
			ch.done() // once counts
		}
		if len(c.streams) != 0 {
			t.Errorf("left over: %v", c.streams)
		}
		c.failed(ids[0], "web")
		c.failed(ids[1], "")
		for range 30 {
			if id := take(); id == ids[0] || id == ids[1] {
				t.Fatal("a node that failed was picked while others are there")
			}
		}
		if ch, err := c.pick("other", ""); !errors.Is(err, errNoTarget) {
			t.Errorf("%+v %v", ch, err)
		}
		time.Sleep(shunTime)
		if id := take(); id != ids[0] && id != ids[1] {
			t.Error("after a while the idle node is picked again")
		}
		c.failed(ids[0], "web") // once more: it is left alone for longer
		c.failed(ids[0], "web") // which counts once
		if left := time.Until(c.avoided(ids[0], "web")); left != 2*shunTime {
			t.Errorf("left alone for %v", left)
		}
		c.worked(ids[0], "web")
		if !c.avoided(ids[0], "web").IsZero() {
			t.Error("it worked")
		}
		// One that is locked carries nothing, one that drains if there is no other.
		b.f.verifiedHello(ids[2], wire.RoleNode, wire.Hello{Versions: wire.OwnVersions, Installation: "other", State: wire.StateRunning}, 0)
		b.f.verifiedHello(ids[3], wire.RoleNode, wire.Hello{Versions: wire.OwnVersions, Installation: "inst", State: wire.StateDraining}, 0)
		if got := b.f.candidates(ids, nil); len(got) != 4 {
			t.Errorf("%d candidates", len(got))
		}
		if _, err := c.pick("web", ids[2]); !errors.Is(err, ErrNotConnected) {
			t.Errorf("a locked node: %v", err)
		}
		if ch, err := c.pick("web", "", ids[0], ids[1], ids[4]); err != nil || ch.node != ids[3] {
			t.Errorf("a draining node: %v", err)
		}
		if ch, err := c.pick(wire.TargetPing, ""); err != nil || ch.spec != nil {
			t.Errorf("built in: %v", err)
		}
		if id, ok := c.node("n4"); !ok || id != ids[4] {
			t.Error("by name")
		}
		if id, ok := c.node(string(ids[4])); !ok || id != ids[4] {
			t.Error("by id")
		}
		if _, ok := c.node("n"); ok {
			t.Error("a beginning is not a name")
		}
	})
}

func TestLimitOfOneTarget(t *testing.T) {
	t.Parallel()
	c := newCatalog(nil, nil, nil)
	var leave []func()
	for range 3 {
		l, ok := c.enter("web", 3)
		if !ok {
			t.Fatal("refused too early")
		}
		leave = append(leave, l)
	}
	if _, ok := c.enter("web", 3); ok {
		t.Error("the limit does not hold")
	}
	if _, ok := c.enter("db", 3); !ok {
		t.Error("another target is another matter")
	}
	leave[0]()
	leave[0]()
	if _, ok := c.enter("web", 3); !ok {
		t.Error("there is room again")
	}
	if _, ok := c.enter("web", 3); ok {
		t.Error("leaving twice counts once")
	}
}

// BenchmarkPick is the choice of a node among ten thousand.
func BenchmarkPick(b *testing.B) {
	f := newFleet(defaultTimings, "inst")
	c := newCatalog(f, nil, nil)
	o := &offer{specs: map[wire.ID]*wire.TargetSpec{}}
	for i := range 10_000 {
		id := wire.NewID()
		f.learn(record{ID: id, Role: wire.RoleNode, Name: fmt.Sprint("n", i), State: wire.StateRunning})
		f.linkUp(linkInfo{ID: id, Role: wire.RoleNode, Since: time.Now()})
		o.nodes = append(o.nodes, id)
	}
	c.offers["web"] = o
	b.ReportAllocs()
	for b.Loop() {
		ch, err := c.pick("web", "")
		if err != nil {
			b.Fatal(err)
		}
		ch.done()
	}
}

func readAll(t *testing.T, r io.Reader) string {
	t.Helper()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Errorf("after %d bytes: %v", len(b), err)
	}
	return strings.TrimSuffix(string(b), "\n")
}
