package rcp

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"sallyport/config"
	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var quiet = slog.New(slog.DiscardHandler)

// plant is a trust domain with RCPs, gateways and nodes on loopback.
type plant struct {
	t  *testing.T
	ca *identitytest.CA
}

func newPlant(t *testing.T) *plant { return &plant{t: t, ca: identitytest.NewCA(t)} }

// testRCP is a running relay.
type testRCP struct {
	*Relay
	addr string
	data string
	stop func()
	cfg  Config
}

// rcp starts a certified relay; change may alter its configuration.
func (p *plant) rcp(change func(*Config)) *testRCP {
	p.t.Helper()
	data, _ := p.certified()
	return p.start(data, change)
}

// certified makes the data directory of a relay with a certificate.
func (p *plant) certified() (data string, _ wire.ID) {
	p.t.Helper()
	data = p.t.TempDir()
	id, err := identity.Open(filepath.Join(data, "rcp", "identity"), wire.RoleRCP)
	if err != nil {
		p.t.Fatal(err)
	}
	if err := id.Pin(wire.KeyOf(p.ca.Root), p.ca.TrustDomain); err != nil {
		p.t.Fatal(err)
	}
	p.ca.Certify(p.t, id)
	return data, id.ID()
}

func (p *plant) start(data string, change func(*Config)) *testRCP {
	p.t.Helper()
	cfg := Config{Version: "test", RCP: config.RCP{
		Common: config.Common{Data: data}, Listen: config.SideListens{{Addr: "127.0.0.1:0"}},
		Carrier: config.CarrierH2, PendingMax: 100, PendingPerSource: 100,
	}}
	if change != nil {
		change(&cfg)
	}
	r, err := New(cfg, quiet, prometheus.NewRegistry())
	if err != nil {
		p.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	var once sync.Once
	stop := func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				p.t.Errorf("Run: %v", err)
			}
		})
	}
	p.t.Cleanup(stop)
	wait, cancelWait := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancelWait()
	addrs, err := r.Addrs(wait)
	if err != nil {
		cancel()
		p.t.Fatalf("relay does not listen: %v, %v", err, <-done)
	}
	return &testRCP{Relay: r, addr: addrs[0].String(), data: data, stop: stop, cfg: cfg}
}

func (p *plant) dialler(id *identity.Identity, addr string, peer channel.Direction) *channel.Dialer {
	return &channel.Dialer{Addr: addr, Peer: peer, Identity: id, Carrier: channel.CarrierH2, Log: quiet}
}

// up dials as somebody who asks.
func (p *plant) up(id *identity.Identity, addr string) (*channel.Conn, error) {
	c, err := p.dialler(id, addr, channel.PeerDownstream).Dial(p.t.Context())
	if err == nil {
		p.t.Cleanup(func() { c.Close(nil) })
	}
	return c, err
}

func (p *plant) gateway(addr string) *channel.Conn {
	p.t.Helper()
	c, err := p.up(p.ca.Party(p.t, wire.RoleGateway), addr)
	if err != nil {
		p.t.Fatal(err)
	}
	return c
}

// testNode dials a relay and answers it.
type testNode struct {
	id      *identity.Identity
	conn    *channel.Conn
	signals chan wire.Signal // what the node says next

	mu   sync.Mutex
	seen []string // requests
}

func (n *testNode) requests() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]string{}, n.seen...)
}

func (n *testNode) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n.mu.Lock()
	what := r.Method + " " + r.URL.Path
	if r.Method == http.MethodConnect {
		what = r.Method + " " + r.Host
		for k := range r.Header {
			what += " " + k
		}
	}
	n.seen = append(n.seen, what)
	n.mu.Unlock()
	switch {
	case r.Method == http.MethodConnect:
		c, err := channel.AcceptConnect(w, r)
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		_, _ = io.Copy(c, c)
	case r.URL.Path == wire.PathSignals:
		enc := json.NewEncoder(w)
		_ = http.NewResponseController(w).Flush()
		for {
			select {
			case s := <-n.signals:
				if enc.Encode(s) != nil || http.NewResponseController(w).Flush() != nil {
					return
				}
			case <-r.Context().Done():
				return
			}
		}
	}
}

func (p *plant) nodeWith(id *identity.Identity, addr string, h http.Handler) *channel.Conn {
	p.t.Helper()
	c, err := p.dialler(id, addr, channel.PeerUpstream).Dial(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = c.Serve(context.Background(), h)
	}()
	p.t.Cleanup(func() {
		c.Close(nil)
		<-done
	})
	return c
}

// node connects an honest node: its first signal is sent.
func (p *plant) node(addr string) *testNode {
	p.t.Helper()
	n := &testNode{id: p.ca.Party(p.t, wire.RoleNode), signals: make(chan wire.Signal, 10_000)}
	n.signals <- wire.Signal{ID: n.id.ID(), Boot: "boot", Generation: 1, Digest: "d1"}
	n.conn = p.nodeWith(n.id, addr, n)
	return n
}

// watcher follows a peers stream.
type watcher struct {
	t  *testing.T
	mu sync.Mutex
	v  view
	on chan struct{}
}

func (p *plant) watch(c *channel.Conn) *watcher {
	p.t.Helper()
	req, err := http.NewRequest(http.MethodGet, "http://peer"+wire.PathPeers, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	resp, err := c.RoundTrip(req)
	if err != nil {
		p.t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		p.t.Fatalf("GET /v1/peers: %s", resp.Status)
	}
	w := &watcher{t: p.t, on: make(chan struct{}, 1)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		lines := wire.NewLineReader(resp.Body, wire.MaxPeersLine)
		for {
			var l wire.PeersLine
			if lines.Next(&l) != nil {
				return
			}
			w.mu.Lock()
			w.v.apply(l)
			w.mu.Unlock()
			select {
			case w.on <- struct{}{}:
			default:
			}
		}
	}()
	p.t.Cleanup(func() {
		c.Close(nil)
		_ = resp.Body.Close()
		<-done
	})
	return w
}

// until waits for a view.
func (w *watcher) until(what string, ok func(view) bool) {
	w.t.Helper()
	limit := time.After(15 * time.Second)
	for {
		w.mu.Lock()
		good := ok(w.v)
		w.mu.Unlock()
		if good {
			return
		}
		select {
		case <-w.on:
		case <-limit:
			w.mu.Lock()
			defer w.mu.Unlock()
			w.t.Fatalf("never: %s; the view is %+v", what, w.v)
		}
	}
}

func (w *watcher) has(id wire.ID, path ...wire.ID) func(view) bool {
	return func(v view) bool { _, ok := v.peers[keyOf(target{id: id}, path)]; return ok }
}

func not(f func(view) bool) func(view) bool { return func(v view) bool { return !f(v) } }

// eventually waits for a condition that no channel announces.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(15 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("never: %s", what)
		}
	}
}

// status is that of a refused CONNECT; 200 when it was not.
func connectStatus(t *testing.T, c *channel.Conn, authority string, h http.Header) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	s, err := c.Connect(ctx, authority, h)
	if err == nil {
		_ = s.Close()
		return http.StatusOK, ""
	}
	var no *channel.RefusedError
	if !errors.As(err, &no) {
		t.Fatalf("CONNECT %s: %v, want a refusal", authority, err)
	}
	return no.Status, no.Reason
}

// roundTrip sends a message through a stream and wants it back.
func roundTrip(t *testing.T, s net.Conn, msg []byte) {
	t.Helper()
	failed := make(chan error, 1)
	go func() {
		_, err := s.Write(msg)
		failed <- err
	}()
	got := make([]byte, len(msg))
	if err := s.SetReadDeadline(time.Now().Add(15 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(s, got); err != nil {
		t.Fatalf("read: %v", err)
	}
	if err := <-failed; err != nil {
		t.Fatalf("write: %v", err)
	}
	if string(got) != string(msg) {
		t.Fatal("the bytes came back changed")
	}
}

func put(t *testing.T, c *channel.Conn, method, path string, v any) int {
	t.Helper()
	b, err := wire.AppendLine(nil, v)
	if err != nil {
		t.Fatal(err)
	}
	return send(t, c, method, path, b)
}

func send(t *testing.T, c *channel.Conn, method, path string, body []byte) int {
	t.Helper()
	req, err := http.NewRequest(method, "http://peer"+path, &sized{b: body})
	if err != nil {
		t.Fatal(err)
	}
	req.ContentLength = int64(len(body))
	resp, err := c.RoundTrip(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	_ = resp.Body.Close()
	return resp.StatusCode
}

type sized struct{ b []byte }

func (e *sized) Read(p []byte) (int, error) {
	if len(e.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p, e.b)
	e.b = e.b[n:]
	return n, nil
}

func hops(n int, via ...wire.ID) http.Header {
	h := http.Header{wire.HeaderHops: {strconv.Itoa(n)}}
	if len(via) > 0 {
		h.Set(wire.HeaderVia, keyOf(target{}, via).path)
	}
	return h
}

func prometheusRegistry() *prometheus.Registry { return prometheus.NewRegistry() }

// background runs f until the test ends.
func (p *plant) background(f func(context.Context)) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(ctx)
	}()
	p.t.Cleanup(func() {
		cancel()
		<-done
	})
}
