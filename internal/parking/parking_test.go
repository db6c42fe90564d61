package parking

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func lot(worlds int) *Lot {
	return New(func() int { return worlds }, func() string { return "" }, func() {}, slog.New(slog.DiscardHandler))
}

// place is a proxy for clients, and a gateway's tunnel to the lot behind it.
type place struct {
	lot  *Lot
	addr string
	tun  *tunnel.Tunnel
}

func newPlace(t *testing.T, worlds int) *place {
	t.Helper()
	l := lot(worlds)
	p, err := Listen("127.0.0.1:0", l, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	up, down := net.Pipe()
	client := tunnel.Client(up, nil, tunnel.Config{})
	server := tunnel.Server(down, nil, func(ctx context.Context, target string, s *tunnel.Stream) {
		id, ok := wire.ParseParkedTarget(target)
		if !ok {
			t.Errorf("target %q", target)
		}
		l.Serve(ctx, id, s)
	}, tunnel.Config{})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{}, 3)
	go func() {
		if err := p.Run(ctx); err != nil {
			t.Errorf("proxy: %v", err)
		}
		ended <- struct{}{}
	}()
	go func() { _ = client.Run(ctx); ended <- struct{}{} }()
	go func() { _ = server.Run(ctx); ended <- struct{}{} }()
	t.Cleanup(func() {
		cancel()
		for range 3 {
			<-ended
		}
	})
	return &place{lot: l, addr: p.Addr().String(), tun: client}
}

// dial sends a client's first bytes.
func (p *place) dial(t *testing.T, text string) (net.Conn, *bufio.Reader) {
	t.Helper()
	c, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	return c, bufio.NewReader(c)
}

// next is the connection that waits.
func (p *place) next(t *testing.T, after int64) wire.Parked {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	list := p.lot.List(ctx, "w", after)
	if len(list) != 1 {
		t.Fatalf("waiting: %+v", list)
	}
	return list[0]
}

func (p *place) fetch(t *testing.T, id wire.ID) *tunnel.Stream {
	t.Helper()
	s, err := p.tun.Open(wire.ParkedTarget(id))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	if err := s.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return s
}

func status(t *testing.T, r *bufio.Reader, want int, text string) {
	t.Helper()
	res, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(io.LimitReader(res.Body, max(res.ContentLength, 0)))
	if err != nil || res.StatusCode != want || !strings.Contains(string(b), text) {
		t.Errorf("%d %q, %v; want %d %q", res.StatusCode, b, err, want, text)
	}
}

func TestConnect(t *testing.T) {
	p := newPlace(t, 1)
	c, r := p.dial(t, "CONNECT ACME.:443 HTTP/1.1\r\nHost: acme:443\r\n\r\nearly")
	w := p.next(t, 0)
	if w.Service != "acme" || w.Source != c.LocalAddr().String() || w.N != 1 {
		t.Errorf("%+v", w)
	}
	s := p.fetch(t, w.ID)
	b := make([]byte, 5)
	if _, err := io.ReadFull(s, b); err != nil || string(b) != "early" {
		t.Fatalf("%q, %v", b, err)
	}
	status(t, r, 200, "")
	// One gateway wins.
	_, err := io.Copy(io.Discard, p.fetch(t, w.ID))
	var no *tunnel.RefusedError
	if !errors.As(err, &no) || no.Code != tunnel.NotFound {
		t.Errorf("the second gateway: %v", err)
	}
	if err := p.lot.Refuse("w", wire.ParkedRefusal{ID: w.ID, Status: 403}); !errors.Is(err, errGone) {
		t.Errorf("refused behind its back: %v", err)
	}
	// Half-close in both directions.
	if _, err := io.WriteString(s, "from the service"); err != nil {
		t.Fatal(err)
	}
	if err := s.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); err != nil || string(b) != "from the service" {
		t.Fatalf("%q, %v", b, err)
	}
	if _, err := io.WriteString(c, "and back"); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(s); err != nil || string(b) != "and back" {
		t.Fatalf("%q, %v", b, err)
	}
}

func TestAbsoluteForm(t *testing.T) {
	p := newPlace(t, 1)
	for i, c := range []struct{ request, want string }{
		{"GET http://files/a?b=c HTTP/1.1\r\nHost: other\r\nProxy-Connection: keep-alive\r\nProxy-Authorization: Basic x\r\nX-A: 1\r\nConnection: X-A, keep-alive\r\n\r\n",
			"GET /a?b=c HTTP/1.1\r\nHost: files\r\nConnection: close\r\n\r\n"},
		{"POST http://files HTTP/1.1\r\nHost: files\r\nContent-Length: 3\r\n\r\nabc",
			"POST / HTTP/1.1\r\nHost: files\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc"},
		{"POST http://files/ HTTP/1.1\r\nHost: files\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
			"POST / HTTP/1.1\r\nHost: files\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"},
		{"GET http://files/ws HTTP/1.1\r\nHost: files\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
			"GET /ws HTTP/1.1\r\nHost: files\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"},
	} {
		conn, r := p.dial(t, c.request)
		s := p.fetch(t, p.next(t, int64(i)).ID)
		b := make([]byte, len(c.want))
		if n, err := io.ReadFull(s, b); err != nil || string(b) != c.want {
			t.Fatalf("%q, %v; want %q", b[:n], err, c.want)
		}
		if _, err := io.WriteString(s, "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		status(t, r, 204, "")
		_ = conn.Close()
	}
}

func TestRefusals(t *testing.T) {
	p := newPlace(t, 2)
	_, r := p.dial(t, "CONNECT acme:443 HTTP/1.1\r\nHost: acme:443\r\n\r\n")
	w := p.next(t, 0)
	for _, v := range []struct {
		world string
		n     int
	}{{"a", 1}, {"a", 1}, {"b", 0}} {
		if err := p.lot.Refuse(v.world, wire.ParkedRefusal{ID: w.ID, Status: 403, Reason: "no such service"}); err != nil {
			t.Fatal(err)
		}
		if p.lot.Waits(v.world) {
			t.Errorf("still waits for %s, who refused", v.world)
		}
		if n, _, _, _ := p.lot.Figures(); n != int64(v.n) {
			t.Errorf("%d wait after %s refused", n, v.world)
		}
	}
	status(t, r, 403, "no such service")
	_, r = p.dial(t, "GET http://acme/ HTTP/1.1\r\nHost: acme\r\n\r\n")
	if err := p.lot.Refuse("a", wire.ParkedRefusal{ID: p.next(t, 1).ID, Status: 502, Reason: "cannot reach it"}); err != nil {
		t.Fatal(err)
	}
	status(t, r, 502, "cannot reach it")
	for _, request := range []string{
		"GET / HTTP/1.1\r\nHost: acme\r\n\r\n", "GET https://acme/ HTTP/1.1\r\nHost: acme\r\n\r\n", "CONNECT [::1]:80 HTTP/1.1\r\nHost: [::1]:80\r\n\r\n",
		"GET http://a_b/ HTTP/1.1\r\nHost: a\r\n\r\n", "GET http://" + strings.Repeat("a", 300) + "/ HTTP/1.1\r\nHost: a\r\n\r\n",
	} {
		_, r := p.dial(t, request)
		status(t, r, 400, "sallyport proxy")
	}
	if err := p.lot.Refuse("a", wire.ParkedRefusal{ID: w.ID, Status: 200}); err == nil {
		t.Error("a refusal with status 200")
	}
}

func TestNobodyAccepts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := lot(1)
		req := httptest.NewRequest("CONNECT", "acme:443", nil)
		req.RemoteAddr = "10.0.0.1:5"
		rec := httptest.NewRecorder()
		l.ServeHTTP(rec, req)
		if rec.Code != 504 || l.Waits("") {
			t.Errorf("%d", rec.Code)
		}
		// A client that leaves waits no more.
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			l.ServeHTTP(httptest.NewRecorder(), req.WithContext(ctx))
		}()
		synctest.Wait()
		if !l.Waits("") {
			t.Error("does not wait")
		}
		cancel()
		<-done
		if l.Waits("") || len(l.perSource) != 0 {
			t.Error("waits although it left")
		}
	})
}

// TestClosed: whoever asks a closed lot again and again does not fill the log.
func TestClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		why := "this node is drained"
		l := New(func() int { return 1 }, func() string { return why }, func() {}, slog.New(slog.NewTextHandler(&log, nil)))
		ask := func(times int, lines ...string) {
			t.Helper()
			log.Reset()
			for range times {
				r := httptest.NewRequest(http.MethodGet, "http://acme/", nil)
				w := httptest.NewRecorder()
				if l.ServeHTTP(w, r); w.Code != http.StatusServiceUnavailable || !strings.Contains(w.Body.String(), why) {
					t.Fatalf("%d %s", w.Code, w.Body)
				}
			}
			got := strings.SplitAfter(log.String(), "\n")
			if got = got[:len(got)-1]; len(got) != len(lines) {
				t.Fatalf("%d lines, want %d: %q", len(got), len(lines), got)
			}
			for i, line := range got {
				if !strings.Contains(line, lines[i]) {
					t.Errorf("%q does not hold %q", line, lines[i])
				}
			}
		}
		ask(100, "drained\" times=1")
		time.Sleep(sayAgain)
		ask(100, "drained\" times=100")
		why = "this node is revoked"
		ask(100, "revoked\" times=100")
		if _, _, _, refused := l.Figures(); refused != 300 {
			t.Errorf("refused %d", refused)
		}
	})
}

func TestLimits(t *testing.T) {
	l := lot(1)
	var leave []func()
	park := func(addr string) error {
		_, f, err := l.park("acme", netip.MustParseAddrPort(addr))
		if err == nil {
			leave = append(leave, f)
		}
		return err
	}
	for i := range maxPerSource {
		if err := park(fmt.Sprintf("[2001:db8::%x]:1", i+1)); err != nil {
			t.Fatal(err)
		}
	}
	if err := park("[2001:db8::ffff:1]:1"); err == nil || !strings.Contains(err.Error(), "this source") {
		t.Errorf("one more of a /64: %v", err)
	}
	for i := range maxParked - maxPerSource {
		if err := park(fmt.Sprintf("10.0.%d.%d:1", i/200, i%200)); err != nil {
			t.Fatal(err)
		}
	}
	if err := park("192.0.2.1:1"); err == nil {
		t.Error("one more in all")
	}
	if got := len(l.List(t.Context(), "", 0)); got != maxParked {
		t.Errorf("%d are listed", got)
	}
	for _, f := range leave {
		f()
		f() // twice is once
	}
	if len(l.waiting) != 0 || len(l.perSource) != 0 {
		t.Errorf("%d and %d are left", len(l.waiting), len(l.perSource))
	}
}

func TestAPI(t *testing.T) {
	l := lot(1)
	ask := func(h http.Handler, method, target, body string) *httptest.ResponseRecorder {
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequest(method, target, strings.NewReader(body)))
		return rec
	}
	var none *Lot
	if rec := ask(none.API("w"), "GET", wire.PathParked, ""); rec.Code != 404 {
		t.Errorf("no proxy: %d", rec.Code)
	}
	var list wire.ParkedList
	rec := ask(l.API("w"), "GET", wire.PathParked, "")
	if err := json.Unmarshal(rec.Body.Bytes(), &list); err != nil || list.Parked == nil || len(list.Parked) != 0 {
		t.Errorf("%s, %v", rec.Body, err)
	}
	p, leave, err := l.park("acme", netip.MustParseAddrPort("10.0.0.1:1"))
	if err != nil {
		t.Fatal(err)
	}
	defer leave()
	rec = ask(l.API("w"), "GET", wire.PathParked+"?after=0&wait=10s", "")
	if err := json.Unmarshal(rec.Body.Bytes(), &list); err != nil || len(list.Parked) != 1 || list.Parked[0].ID != p.ID {
		t.Errorf("%s, %v", rec.Body, err)
	}
	for _, c := range []struct {
		method, target, body string
		want                 int
	}{
		{"GET", "?after=x", "", 400}, {"GET", "?wait=x", "", 400}, {"PUT", "", "", 405}, {"POST", "", "{", 400},
		{"POST", "", `{"id":"` + string(p.ID) + `","status":500}`, 400},
		{"POST", "", `{"id":"` + string(wire.NewID()) + `","status":403}`, 404},
		{"POST", "", `{"id":"` + string(p.ID) + `","status":403}`, 204},
		{"POST", "", `{"id":"` + string(p.ID) + `","status":403}`, 404},
	} {
		if rec := ask(l.API("w"), c.method, wire.PathParked+c.target, c.body); rec.Code != c.want {
			t.Errorf("%s %s %s: %d, want %d", c.method, c.target, c.body, rec.Code, c.want)
		}
	}
}
