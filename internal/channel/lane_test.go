package channel_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/wire"
)

// leg is what a downstream party made of a request for a lane.
type leg struct {
	conn channel.LaneConn
	err  error
}

// lanes is a downstream party that takes every lane.
type lanes struct {
	legs chan leg
	mu   sync.Mutex
	reqs []wire.LaneRequest
	hold chan struct{} // if set: the answer waits for it
}

func newLanes() *lanes { return &lanes{legs: make(chan leg, 16)} }

func (l *lanes) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var req wire.LaneRequest
	if r.Method != http.MethodPost || r.URL.Path != wire.PathLanes {
		return
	}
	if err := wire.DecodeJSON(r.Body, wire.MaxLaneBody, &req); err != nil || req.Validate() != nil {
		channel.Refuse(w, http.StatusBadRequest, "bad lane request")
		return
	}
	g, err := channel.FromContext(r.Context()).TakeLane(r.Context(), req)
	l.mu.Lock()
	l.reqs = append(l.reqs, req) // when its ticket is expected
	l.mu.Unlock()
	if err != nil {
		l.legs <- leg{nil, err}
		channel.Refuse(w, http.StatusConflict, err.Error())
		return
	}
	go func() {
		defer g.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
		defer cancel()
		conn, err := g.Accept(ctx)
		l.legs <- leg{conn, err}
	}()
	if l.hold != nil {
		<-l.hold
	}
	channel.GrantLane(w, req)
}

func (l *lanes) next(t *testing.T) leg {
	t.Helper()
	select {
	case g := <-l.legs:
		if g.conn != nil {
			t.Cleanup(func() { _ = g.conn.Close() })
		}
		return g
	case <-time.After(20 * time.Second):
		t.Fatal("the downstream party got no leg")
		return leg{}
	}
}

// bare are the variants that have TCP beside them.
func bare(t *testing.T, f func(t *testing.T, v variant)) {
	each(t, func(t *testing.T, v variant) {
		if v.carrier == "pipe" {
			t.Skip("no TCP in memory")
		}
		f(t, v)
	})
}

func TestLane(t *testing.T) {
	bare(t, func(t *testing.T, v variant) {
		l := newLanes()
		p := newPlant(t, v, l)
		up := p.connect(t)
		for range 3 {
			node := wire.NewID()
			a, err := up.OpenLane(t.Context(), wire.LaneRequest{Node: node, Hops: 2})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = a.Close() }()
			g := l.next(t)
			if g.err != nil {
				t.Fatal(g.err)
			}
			if req := l.reqs[len(l.reqs)-1]; req.Node != node || req.Hops != 2 {
				t.Errorf("asked %+v", req)
			}
			joined(t, a, g.conn)
			joined(t, g.conn, a)
		}
		if l.reqs[0].Ticket == l.reqs[1].Ticket || l.reqs[1].Ticket == l.reqs[2].Ticket {
			t.Error("a ticket was used for two lanes")
		}
		if host, _, _ := net.SplitHostPort(up.RemoteAddr()); up.Streams() != 0 || host != "127.0.0.1" {
			t.Errorf("%d streams, %s", up.Streams(), host)
		}
	})
}

// joined asserts that the first byte at to is the first that from wrote, and
// that the end of one direction passes while the other stays.
func joined(t *testing.T, from, to channel.LaneConn) {
	t.Helper()
	want := bytes.Repeat([]byte("S\x16 first bytes "), 5000)
	go func() {
		_, _ = from.Write(want)
		_ = from.CloseWrite()
	}()
	_ = to.SetReadDeadline(time.Now().Add(10 * time.Second))
	got, err := io.ReadAll(to)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %d bytes, %v; want %d", len(got), err, len(want))
	}
}

// A leg is dialled where the channel goes, whatever name led there, and the
// channel is nothing that it needs further.
func TestLaneOutlivesItsChannel(t *testing.T) {
	bare(t, func(t *testing.T, v variant) {
		l := newLanes()
		p := newPlant(t, v, l)
		up := p.connect(t)
		a, err := up.OpenLane(t.Context(), wire.LaneRequest{})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = a.Close() }()
		g := l.next(t)
		up.Close(nil)
		<-up.Done()
		joined(t, a, g.conn)
	})
}

func TestLaneIsForTheUpstreamSideOnly(t *testing.T) {
	l := newLanes()
	p := newPlant(t, variant{"h2", true}, l)
	up := p.connect(t)
	if _, err := up.TakeLane(t.Context(), wire.LaneRequest{Ticket: wire.NewTicket()}); !errors.Is(err, channel.ErrWrongSide) {
		t.Errorf("the upstream side takes a lane: %v", err)
	}
	done := make(chan error, 1)
	p2 := newPlant(t, variant{"h2", false}, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, err := channel.FromContext(r.Context()).OpenLane(r.Context(), wire.LaneRequest{})
		done <- err
	}))
	if res, err := request(t.Context(), t, p2.connect(t), http.MethodGet, "/", nil); err == nil {
		_ = res.Body.Close()
	}
	if err := <-done; !errors.Is(err, channel.ErrWrongSide) {
		t.Errorf("the downstream side opens a lane: %v", err)
	}
}

func TestLaneIsRefused(t *testing.T) {
	bare(t, func(t *testing.T, v variant) {
		p := newPlant(t, v, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			channel.Refuse(w, http.StatusForbidden, "lanes are off")
		}))
		_, err := p.connect(t).OpenLane(t.Context(), wire.LaneRequest{})
		var no *channel.RefusedError
		if !errors.As(err, &no) || no.Status != http.StatusForbidden || no.Reason != "lanes are off" {
			t.Errorf("got %v", err)
		}
	})
}

// Whoever dialled cannot reach TCP: a memory network, a proxy, or a firewall
// that lets QUIC through and nothing else.
func TestNoLaneCanBeHad(t *testing.T) {
	for name, refuse := range map[string]func(t *testing.T, p *plant) *channel.Dialer{
		"no TCP": func(t *testing.T, p *plant) *channel.Dialer { return p.dialler(t) },
		"HTTP proxy": func(t *testing.T, p *plant) *channel.Dialer {
			proxy := newProxy(t)
			d := p.dialler(t)
			d.Proxy = func(*url.URL) (*url.URL, error) { return proxy, nil }
			return d
		},
		"QUIC only": func(t *testing.T, p *plant) *channel.Dialer {
			d := p.dialler(t)
			d.Carrier = channel.CarrierH3
			return d
		},
	} {
		for _, ordinary := range []bool{true, false} {
			t.Run(name, func(t *testing.T) {
				l := newLanes()
				carrier := map[string]string{"no TCP": "pipe", "HTTP proxy": "h2", "QUIC only": "h3"}[name]
				p := newPlant(t, variant{carrier, ordinary}, l)
				p.listen(t)
				c, err := refuse(t, p).Dial(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close(nil)
				if name == "QUIC only" {
					channel.BlockTCP(c)
				}
				up := c
				if !ordinary {
					served := make(chan struct{})
					go func() { defer close(served); p.serve(context.Background(), c) }()
					defer func() { c.Close(nil); <-served }()
					up = <-p.accepted
				}
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				_, err = up.OpenLane(ctx, wire.LaneRequest{})
				switch {
				case ordinary && !errors.Is(err, channel.ErrNoLane):
					t.Errorf("got %v", err)
				case !ordinary:
					var no *channel.RefusedError
					if !errors.As(err, &no) || no.Status != http.StatusConflict {
						t.Errorf("got %v", err)
					}
					if g := l.next(t); !errors.Is(g.err, channel.ErrNoLane) {
						t.Errorf("the party that dialled says %v", g.err)
					}
				case name == "HTTP proxy" && len(l.reqs) > 0:
					t.Error("a lane was asked for that cannot come")
				}
			})
		}
	}
}

// stranger presents a preface, and tells what came back: nothing but the end
// if it was refused.
func stranger(t *testing.T, addr, preface string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if _, err := io.WriteString(c, preface); err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

func closed(t *testing.T, c net.Conn, within time.Duration) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(within))
	b, err := io.ReadAll(c)
	if len(b) != 0 || isTimeout(err) {
		t.Errorf("answered %q, %v; want it closed", b, err)
	}
}

// expecting is a port with one ticket that nobody has presented yet.
func expecting(t *testing.T, v variant, lim channel.Limits) (p *plant, up *channel.Conn, l *lanes, ticket func() string) {
	return expectingLane(t, v, lim, wire.LaneRequest{})
}

func expectingLane(t *testing.T, v variant, lim channel.Limits, req wire.LaneRequest) (p *plant, up *channel.Conn, l *lanes, ticket func() string) {
	t.Helper()
	l = newLanes()
	l.hold = make(chan struct{})
	p = newPlant(t, v, l)
	p.limits = lim
	up = p.connect(t)
	ended := make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(ended)
		if c, err := up.OpenLane(ctx, req); err == nil { // its leg waits for the answer, which is held back
			_ = c.Close()
		}
	}()
	t.Cleanup(func() {
		close(l.hold)
		cancel()
		<-ended
	})
	deadline := time.Now().Add(10 * time.Second)
	for {
		l.mu.Lock()
		n := len(l.reqs)
		l.mu.Unlock()
		if n > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nobody was asked for a lane")
		}
		<-time.After(time.Millisecond)
	}
	return p, up, l, func() string { return "SPLANE1\n" + string(l.reqs[0].Ticket[:]) }
}

func TestTicketIsGoodOnce(t *testing.T) {
	p, _, l, ticket := expecting(t, variant{"h2", true}, channel.Limits{})
	addr := p.listener.Addr().String()
	wrong := wire.NewTicket()
	closed(t, stranger(t, addr, "SPLANE1\n"+string(wrong[:])), 5*time.Second)
	closed(t, stranger(t, addr, "SPLANE1\n"+base64.RawURLEncoding.EncodeToString(wrong[:])), 5*time.Second)
	closed(t, stranger(t, addr, "SPLANE2\n"+ticket()[8:]), 5*time.Second)
	closed(t, stranger(t, addr, "S"+strings.Repeat("x", 100)), 5*time.Second)
	thief := stranger(t, addr, ticket()+"hello") // a stolen ticket is as good as its owner's: TLS inside the lane tells them apart
	g := l.next(t)
	if g.err != nil {
		t.Fatal(g.err)
	}
	b := make([]byte, 5)
	if _, err := io.ReadFull(g.conn, b); err != nil || string(b) != "hello" {
		t.Errorf("got %q, %v", b, err)
	}
	closed(t, stranger(t, addr, ticket()), 5*time.Second) // replayed
	_ = thief.Close()
	works(t, p)
}

func TestTicketDiesWithItsChannel(t *testing.T) {
	bare(t, func(t *testing.T, v variant) {
		if !v.ordinary {
			t.Skip("the same code: whoever accepted the channel expects the ticket")
		}
		p, up, l, ticket := expecting(t, v, channel.Limits{})
		up.Close(nil)
		if g := l.next(t); g.err == nil {
			t.Error("a leg without its channel")
		}
		closed(t, stranger(t, p.listener.Addr().String(), ticket()), 5*time.Second)
	})
}

func TestSlowPreface(t *testing.T) {
	lim := channel.Limits{PrefaceTimeout: 100 * time.Millisecond, Handshakes: 8, HandshakesPerSource: 4}
	p, _, _, ticket := expecting(t, variant{"h2", true}, lim)
	addr := p.listener.Addr().String()
	began := time.Now()
	slow := stranger(t, addr, ticket()[:39])
	closed(t, slow, 5*time.Second)
	if took := time.Since(began); took < 90*time.Millisecond || took > 4*time.Second {
		t.Errorf("39 of 40 bytes were waited for %s", took)
	}
	works(t, p)
}

// Prefaces count as handshakes: those that never end hold no more places than there
// are, and give way when a party comes, though it comes from their address.
func TestPrefacesGiveWay(t *testing.T) {
	lim := channel.Limits{PrefaceTimeout: 30 * time.Second, Handshakes: 8, HandshakesPerSource: 8}
	p, _, _, ticket := expecting(t, variant{"h2", true}, lim)
	addr := p.listener.Addr().String()
	var held []*net.TCPConn
	for range 8 {
		held = append(held, stranger(t, addr, ticket()[:10]))
	}
	for deadline := time.Now().Add(10 * time.Second); ; { // turned away until one of them has had its time
		c, err := p.dialler(t).Dial(t.Context())
		if err == nil {
			c.Close(nil)
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	gone := 0
	for _, c := range held {
		_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if _, err := c.Read(make([]byte, 1)); !isTimeout(err) {
			gone++
		}
	}
	if gone == 0 || gone == len(held) {
		t.Errorf("%d of %d gave way", gone, len(held))
	}
}

// A port that expects nothing does not wait for a preface at all, and one that
// shuts down does not wait for its end.
func TestPrefaceWithoutTicket(t *testing.T) {
	p := newPlant(t, variant{"h2", true}, ok)
	p.limits = channel.Limits{PrefaceTimeout: time.Minute, HandshakeTimeout: time.Minute}
	p.listen(t)
	closed(t, stranger(t, p.listener.Addr().String(), "SPLANE1\n"), 5*time.Second)
	works(t, p)

	busy, _, _, ticket := expecting(t, variant{"h2", true}, channel.Limits{PrefaceTimeout: time.Minute, HandshakeTimeout: time.Minute})
	_ = stranger(t, busy.listener.Addr().String(), ticket()[:20]) // cleaned up after the listener, which must not wait
}
