package channel

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/wire"
)

func liveConn() *Conn { return &Conn{done: make(chan struct{})} }

// tcpPair is two ends of a TCP connection.
func tcpPair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	if a, err = net.DialTCP("tcp", nil, ln.Addr().(*net.TCPAddr)); err != nil {
		t.Fatal(err)
	}
	if b, err = ln.AcceptTCP(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = a.Close(), b.Close() })
	return a, b
}

func TestTicketExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, c, ticket := newLegs(), liveConn(), wire.NewTicket()
		began := time.Now()
		g, err := l.offer(c, ticket, false)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.offer(c, ticket, false); !errors.Is(err, errTicketTwice) {
			t.Errorf("the same ticket once more: %v", err)
		}
		if _, err = g.Accept(t.Context()); !errors.Is(err, errTicketExpired) {
			t.Errorf("got %v", err)
		}
		if took := time.Since(began); took != ticketLife {
			t.Errorf("the ticket was good for %s", took)
		}
		if err := l.present(ticket[:], nil, nil); !errors.Is(err, errUnknownTicket) || !l.none() {
			t.Errorf("an expired ticket: %v, %d left", err, len(l.expected))
		}
		// Nobody has to wait for it: it goes by itself.
		if _, err = l.offer(c, wire.NewTicket(), false); err != nil {
			t.Fatal(err)
		}
		time.Sleep(ticketLife)
		synctest.Wait()
		if !l.none() {
			t.Error("a ticket that nobody waits for stays")
		}
	})
}

func TestTicketIsGivenUp(t *testing.T) {
	l, c := newLegs(), liveConn()
	ctx, cancel := context.WithCancelCause(t.Context())
	ticket := wire.NewTicket()
	g, err := l.offer(c, ticket, false)
	if err != nil {
		t.Fatal(err)
	}
	cancel(io.ErrShortBuffer)
	if _, err := g.Accept(ctx); !errors.Is(err, io.ErrShortBuffer) || !l.none() {
		t.Errorf("got %v", err)
	}
	// One that came while its owner went is closed, once it is clear that
	// nobody takes it.
	a, b := tcpPair(t)
	if g, err = l.offer(c, ticket, false); err != nil {
		t.Fatal(err)
	}
	if err := l.present(ticket[:], b, nil); err != nil {
		t.Fatal(err)
	}
	g.Close()
	g.Close()
	if n, err := a.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("read %d, %v from a leg that nobody took", n, err)
	}
	// And one whose channel went is not handed over at all.
	if _, err = l.offer(c, ticket, false); err != nil {
		t.Fatal(err)
	}
	c.err = ErrClosed
	if err := l.present(ticket[:], b, nil); !errors.Is(err, errUnknownTicket) {
		t.Errorf("ticket of a dead channel: %v", err)
	}
	if _, err = c.offerLane(wire.LaneRequest{Ticket: ticket}); !errors.Is(err, ErrClosed) {
		t.Errorf("a dead channel expects a ticket: %v", err)
	}
}

func TestTicketsAreBounded(t *testing.T) {
	l, c := newLegs(), liveConn()
	var all []*Leg
	for range maxTickets {
		g, err := l.offer(c, wire.NewTicket(), false)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, g)
	}
	if _, err := l.offer(c, wire.NewTicket(), false); !errors.Is(err, errTicketFlood) {
		t.Errorf("got %v", err)
	}
	for _, g := range all {
		g.Close()
	}
	if !l.none() {
		t.Errorf("%d tickets are left", len(l.expected))
	}
}
