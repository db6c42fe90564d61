package gateway

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/config"
	"sallyport/internal/parking"
	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

// proxied gives a fake node a proxy for local clients, and returns its address.
func proxied(t *testing.T, n *fakeNode, wake func()) (lot *parking.Lot, addr string) {
	t.Helper()
	lot = parking.New(func() int { return 1 }, func() string { return "" }, wake, testLog(t))
	n.mux.Handle(wire.PathParked, lot.API(""))
	n.targets = func(ctx context.Context, target string, s *tunnel.Stream) {
		if id, ok := wire.ParseParkedTarget(target); ok {
			lot.Serve(ctx, id, s)
		}
	}
	p, err := parking.Listen("127.0.0.1:0", lot, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return lot, p.Addr().String()
}

// connectTo asks a proxy for a service.
func connectTo(t *testing.T, proxy, service string) (net.Conn, *bufio.Reader, int) {
	t.Helper()
	c, err := net.Dial("tcp", proxy)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(40 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, "CONNECT "+service+" HTTP/1.1\r\nHost: "+service+"\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(c)
	res, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	if err != nil {
		t.Fatal(err)
	}
	return c, r, res.StatusCode
}

func TestAccept(t *testing.T) {
	t.Parallel()
	var dials atomic.Int64
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		dials.Add(1)
		_, _ = io.WriteString(w, "hello")
	}))
	defer srv.Close()
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := gone.Close(); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	w.cfg.Accept = config.Services{{Name: "files", Addr: srv.Listener.Addr().String()}, {Name: "down", Addr: gone.Addr().String()}}
	r := w.rcp("dmz-1")
	n := w.enrolled(w.node("web-1"))
	w.run()
	r.hold(n)
	w.state(n.id.ID(), wire.StateRunning)
	_, proxy := proxied(t, n, func() { r.hint(n, "", wire.HintParked) })

	for range 3 { // the second and the third without another session
		c, br, status := connectTo(t, proxy, "files:443")
		if status != 200 {
			t.Fatalf("status %d", status)
		}
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: files\r\nConnection: close\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		res, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(res.Body); err != nil || string(b) != "hello" {
			t.Errorf("%q, %v", b, err)
		}
		_ = res.Body.Close()
		_ = c.Close()
	}
	for service, want := range map[string]int{"down:443": 502, "other:443": 403, srv.Listener.Addr().String(): 403} {
		if _, _, status := connectTo(t, proxy, service); status != want {
			t.Errorf("%s: status %d, want %d", service, status, want)
		}
	}
	if n := dials.Load(); n != 3 {
		t.Errorf("the service was asked %d times", n)
	}
	eventually(t, "all that was accepted has ended", func() bool {
		w.s.acceptor.mu.Lock()
		defer w.s.acceptor.mu.Unlock()
		return w.s.acceptor.open == 0 && len(w.s.acceptor.busy) == 0 && len(w.s.acceptor.byParty) == 0
	})
}

// TestAcceptNothing: without services no hint makes the gateway ask anything.
func TestAcceptNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r := w.rcp("dmz-1")
	n := w.enrolled(w.node("web-1"))
	var asked atomic.Int64
	n.mux.HandleFunc(wire.PathParked, func(http.ResponseWriter, *http.Request) { asked.Add(1) })
	w.run()
	r.hold(n)
	w.state(n.id.ID(), wire.StateRunning)
	r.hint(n, "other", wire.HintParked) // the digest brings a visit, the hint nothing
	eventually(t, "the hint arrived", func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		return n.hellos > 1
	})
	if asked.Load() != 0 || len(w.s.fleet.connected(wire.RoleNode)) != 1 {
		t.Errorf("asked %d times", asked.Load())
	}
}

// TestAcceptLiar: a node that makes up what is parked gets no connection that
// stays, and cannot make the gateway dial anything but its services.
func TestAcceptLiar(t *testing.T) {
	t.Parallel()
	var dials atomic.Int64
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			dials.Add(1)
			_ = c.Close()
		}
	}()
	defer func() { _ = ln.Close(); <-done }()
	w := newWorld(t)
	w.cfg.Accept = config.Services{{Name: "files", Addr: ln.Addr().String()}}
	r := w.rcp("dmz-1")
	n := w.enrolled(w.node("web-1"))
	n.targets = func(_ context.Context, _ string, s *tunnel.Stream) { s.Refuse(tunnel.NotFound, "nobody waits") }
	same := wire.NewID()
	var asked, refusals atomic.Int64
	n.mux.HandleFunc(wire.PathParked, func(rw http.ResponseWriter, req *http.Request) {
		if req.Method == http.MethodPost {
			refusals.Add(1)
			http.Error(rw, "no", http.StatusNotFound)
			return
		}
		asked.Add(1)
		_ = json.NewEncoder(rw).Encode(wire.ParkedList{Parked: []wire.Parked{
			{ID: "../../x", N: 1, Service: "files"}, {ID: same, N: 2, Service: "FILES"}, {ID: wire.NewID(), N: 3, Service: "169.254.169.254"},
			{ID: wire.NewID(), N: 4, Service: "files"}, {ID: wire.NewID(), N: 4, Service: "files"},
		}})
	})
	w.run()
	r.hold(n)
	w.state(n.id.ID(), wire.StateRunning)
	r.hint(n, "", wire.HintParked)
	eventually(t, "all is refused", func() bool { return refusals.Load() == 2 && dials.Load() == 1 })
	eventually(t, "nothing is open", func() bool {
		w.s.acceptor.mu.Lock()
		defer w.s.acceptor.mu.Unlock()
		return w.s.acceptor.open == 0 && len(w.s.acceptor.asked) == 0
	})
	if asked.Load() != 1 {
		t.Errorf("asked %d times although the list repeats", asked.Load())
	}
}

// TestAcceptBesideAHostileRCP: one that hints that connections wait at all of its
// nodes, and lets no session with them through, delays nobody behind another.
func TestAcceptBesideAHostileRCP(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	w := newWorld(t)
	w.cfg.Accept = config.Services{{Name: "files", Addr: ln.Addr().String()}}
	evil, good := w.rcp("evil"), w.rcp("dmz-1")
	evil.hang = make(chan struct{})
	defer close(evil.hang)
	n := w.enrolled(w.node("web-1"))
	var held []*fakeNode
	for i := range maxVisits + 4 {
		held = append(held, w.enrolled(w.node(fmt.Sprintf("held-%d", i))))
	}
	w.run()
	good.hold(n)
	w.state(n.id.ID(), wire.StateRunning)
	_, proxy := proxied(t, n, func() { good.hint(n, "", wire.HintParked) })
	for _, h := range held {
		evil.hint(h, "", wire.HintParked)
	}
	eventually(t, "the gateway asks as many of them as it may", func() bool {
		w.s.acceptor.mu.Lock()
		defer w.s.acceptor.mu.Unlock()
		return len(w.s.acceptor.asked) == maxVisits
	})
	began := time.Now()
	if _, _, status := connectTo(t, proxy, "files:443"); status != http.StatusOK {
		t.Errorf("status %d after %s", status, time.Since(began))
	}
}
