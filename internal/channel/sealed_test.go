package channel_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"testing"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

var sealedLane = wire.LaneRequest{Sealed: true}

// sealedPair is a sealed lane's leg: both of its ends.
func sealedPair(t testing.TB, up *channel.Conn, l *lanes) (upper, lower *channel.SealedLeg) {
	t.Helper()
	a, err := up.OpenLane(t.Context(), sealedLane)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Close() })
	g := <-l.legs
	if g.err != nil {
		t.Fatal(g.err)
	}
	t.Cleanup(func() { _ = g.conn.Close() })
	return a.(*channel.SealedLeg), g.conn.(*channel.SealedLeg)
}

func TestSealedLane(t *testing.T) {
	bare(t, func(t *testing.T, v variant) {
		l := newLanes()
		up := newPlant(t, v, l).connect(t)
		for range 3 {
			a, b := sealedPair(t, up, l)
			joined(t, a, b)
			joined(t, b, a)
		}
		a, b := sealedPair(t, up, l)
		joined(t, b, a)
		joined(t, a, b)
		a, b = sealedPair(t, up, l)
		_ = b.Close()
		if n, err := a.Read(make([]byte, 1)); n > 0 || err == nil {
			t.Errorf("read %d, %v from a leg whose other end was closed", n, err)
		}
	})
}

// An HTTP proxy does not stand in the way of sealed legs.
func TestSealedLaneThroughProxy(t *testing.T) {
	for _, ordinary := range []bool{true, false} {
		v := variant{"h2", ordinary}
		t.Run(v.String(), func(t *testing.T) {
			l := newLanes()
			p := newPlant(t, v, l)
			proxy := newProxy(t)
			p.listen(t)
			d := p.dialler(t)
			d.Proxy = func(*url.URL) (*url.URL, error) { return proxy, nil }
			c, err := d.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close(nil)
			up := c
			if !ordinary {
				served := make(chan struct{})
				go func() { defer close(served); p.serve(context.Background(), c) }()
				defer func() { c.Close(nil); <-served }()
				up = <-p.accepted
			}
			if _, err := up.OpenLane(t.Context(), wire.LaneRequest{}); err == nil {
				t.Error("a bare lane through a proxy")
			}
			if !ordinary {
				<-l.legs // the refusal
			}
			a, b := sealedPair(t, up, l)
			joined(t, a, b)
		})
	}
}

// Who knows bare lanes only answers without saying that it sealed anything.
func TestSealedLaneOfAnOldPeer(t *testing.T) {
	p := newPlant(t, variant{"h2", true}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var req wire.LaneRequest
		_ = wire.DecodeJSON(r.Body, wire.MaxLaneBody, &req)
		leg, err := channel.FromContext(r.Context()).TakeLane(r.Context(), wire.LaneRequest{Ticket: req.Ticket})
		if err != nil {
			channel.Refuse(w, http.StatusConflict, err.Error())
			return
		}
		leg.Close()
	}))
	if _, err := p.connect(t).OpenLane(t.Context(), sealedLane); !errors.Is(err, channel.ErrNoLane) {
		t.Errorf("got %v", err)
	}
}

// present dials a port as a sealed leg of id and presents a ticket, of which
// ticket has what follows the preface.
func present(t *testing.T, id *identity.Identity, addr, alpn, ticket string) (*tls.Conn, error) {
	t.Helper()
	cert, err := id.BriefCertificate()
	if err != nil {
		t.Fatal(err)
	}
	c, err := tls.Dial("tcp", addr, &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{alpn}, ServerName: id.TrustDomain(), RootCAs: id.Roots(),
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }})
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	_, err = io.WriteString(c, ticket[8:])
	return c, err
}

func refused(t *testing.T, c net.Conn, err error) {
	t.Helper()
	if err != nil {
		return
	}
	if b, err := io.ReadAll(c); len(b) > 0 || isTimeout(err) {
		t.Errorf("answered %q, %v; want it closed", b, err)
	}
}

// A sealed leg's ticket is worth nothing to anybody but the party of its
// channel, and nothing in the clear.
func TestSealedTicketIsItsOwners(t *testing.T) {
	for name, steal := range map[string]func(t *testing.T, p *plant, addr, ticket string){
		"another gateway": func(t *testing.T, p *plant, addr, ticket string) {
			c, err := present(t, p.ca.Party(t, wire.RoleGateway), addr, channel.ALPNUpLane, ticket)
			refused(t, c, err)
		},
		"a node": func(t *testing.T, p *plant, addr, ticket string) {
			c, err := present(t, p.ca.Party(t, wire.RoleNode), addr, channel.ALPNDownLane, ticket)
			refused(t, c, err)
		},
		"a node as upstream": func(t *testing.T, p *plant, addr, ticket string) {
			c, err := present(t, p.ca.Party(t, wire.RoleNode), addr, channel.ALPNUpLane, ticket)
			refused(t, c, err)
			if _, err = present(t, p.up, addr, channel.ALPNUpLane, ticket); err == nil {
				return // the handshake of the node failed: the ticket is still good
			}
			t.Error(err)
		},
		"in the clear": func(t *testing.T, _ *plant, addr, ticket string) {
			closed(t, stranger(t, addr, ticket), 5*time.Second)
		},
	} {
		t.Run(name, func(t *testing.T) {
			p, _, l, ticket := expectingLane(t, variant{"h2", true}, channel.Limits{}, sealedLane)
			addr := p.listener.Addr().String()
			steal(t, p, addr, ticket())
			if name == "a node as upstream" {
				if g := l.next(t); g.err != nil {
					t.Error(g.err)
				}
			}
			c, err := present(t, p.up, addr, channel.ALPNUpLane, ticket()) // used up
			refused(t, c, err)
			works(t, p)
		})
	}
}

// A bare leg's ticket is no good inside TLS.
func TestBareTicketIsNotSealed(t *testing.T) {
	p, _, _, ticket := expecting(t, variant{"h2", true}, channel.Limits{})
	addr := p.listener.Addr().String()
	c, err := present(t, p.up, addr, channel.ALPNUpLane, ticket())
	refused(t, c, err)
	closed(t, stranger(t, addr, ticket()), 5*time.Second)
	works(t, p)
}

// The ticket must come soon here, too.
func TestSlowSealedTicket(t *testing.T) {
	p, _, _, ticket := expectingLane(t, variant{"h2", true}, channel.Limits{PrefaceTimeout: 100 * time.Millisecond}, sealedLane)
	c, err := present(t, p.up, p.listener.Addr().String(), channel.ALPNUpLane, ticket()[:39])
	refused(t, c, err)
	works(t, p)
}

// Two lanes that are joined as a relay joins them carry pieces of all sizes,
// both directions at once: nothing is lost, and no end waits for the other.
func TestSealedLegsAreJoined(t *testing.T) {
	l := newLanes()
	up := newPlant(t, variant{"h2", true}, l).connect(t)
	a, near := sealedPair(t, up, l)
	far, b := sealedPair(t, up, l)
	const size = 8 << 20
	var wg sync.WaitGroup
	for _, ends := range [][2]*channel.SealedLeg{{a, b}, {b, a}} {
		want := make([]byte, size)
		_, _ = rand.Read(want)
		wg.Go(func() {
			for rest, n := want, 1; len(rest) > 0; n = (n*7 + 1) % (600 << 10) {
				k := min(n+1, len(rest))
				if _, err := ends[0].Write(rest[:k]); err != nil {
					t.Error(err)
					return
				}
				rest = rest[k:]
			}
			_ = ends[0].CloseWrite()
		})
		wg.Go(func() {
			if got, err := io.ReadAll(ends[1]); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes of %d arrived, %v", len(got), size, err)
			}
		})
	}
	for _, ends := range [][2]*channel.SealedLeg{{near, far}, {far, near}} {
		wg.Go(func() {
			var moved int64
			for {
				n, err := ends[0].Pass(ends[1])
				if moved += n; err != nil {
					if !errors.Is(err, io.EOF) || moved != size {
						t.Errorf("%d bytes passed, %v", moved, err)
					}
					break
				}
			}
			_ = ends[1].CloseWrite()
		})
	}
	wg.Wait()
}

// What is small arrives at once, also where the reader asks for little.
func TestSealedLegIsPrompt(t *testing.T) {
	l := newLanes()
	a, b := sealedPair(t, newPlant(t, variant{"h2", false}, l).connect(t), l)
	for _, c := range []net.Conn{a, b} {
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	}
	small := make([]byte, 3)
	for i := range 50 {
		word := bytes.Repeat([]byte{byte(i)}, 7)
		if _, err := a.Write(word); err != nil {
			t.Fatal(err)
		}
		var got []byte
		for len(got) < len(word) {
			if err := b.Wait(); err != nil {
				t.Fatal(err)
			}
			n, err := b.Read(small)
			if got = append(got, small[:n]...); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(got, word) {
			t.Errorf("got %q", got)
		}
		if _, err := b.Write(got); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(a, make([]byte, len(got))); err != nil {
			t.Fatal(err)
		}
	}
}

// Close ends at once what waits in a leg, whether it reads, or writes to one
// who does not read.
func TestSealedLegCloses(t *testing.T) {
	l := newLanes()
	a, _ := sealedPair(t, newPlant(t, variant{"h2", true}, l).connect(t), l)
	ended := make(chan error, 3)
	writing := make(chan struct{})
	go func() {
		chunk := make([]byte, 1<<20)
		_, err := a.Write(chunk)
		close(writing)
		for err == nil {
			_, err = a.Write(chunk)
		}
		ended <- err
	}()
	go func() {
		_, err := a.Read(make([]byte, 1))
		ended <- err
	}()
	<-writing
	began := time.Now()
	_ = a.Close()
	for range 2 {
		if err := <-ended; err == nil {
			t.Error("it went on")
		}
	}
	if took := time.Since(began); took > 4*time.Second { // crypto/tls waits 5 s with its last words
		t.Errorf("it took %s", took)
	}
}
