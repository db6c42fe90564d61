package channel

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"sallyport/internal/wire"
)

var (
	errUnknownTicket = errors.New("unknown, used or expired lane ticket")
	errTicketExpired = errors.New("nobody came with the lane's ticket in time")
	errTicketTwice   = errors.New("the lane's ticket is expected already")
	errOtherLeg      = errors.New("the lane's ticket is for another kind of leg")
	errTicketFlood   = errors.New("too many lane tickets are expected")
)

// legs are the tickets that a port expects, by their hash: how long a look-up
// takes says nothing about the ticket.
type legs struct {
	mu       sync.Mutex
	expected map[[sha256.Size]byte]*Leg
}

func newLegs() *legs { return &legs{expected: map[[sha256.Size]byte]*Leg{}} }

// Leg is a leg of a lane that is there, or expected.
type Leg struct {
	c      *Conn
	legs   *legs // nil: it is there
	key    [sha256.Size]byte
	sealed bool          // it must come inside TLS
	came   chan LaneConn // holds the leg
	over   chan struct{} // closed when the ticket is good no more and the leg is not there
	timer  *time.Timer   // of the ticket

	mu     sync.Mutex
	closed bool
}

func newLeg(c *Conn, l *legs) *Leg {
	return &Leg{c: c, legs: l, came: make(chan LaneConn, 1), over: make(chan struct{})}
}

// offer expects a ticket until it is presented, for ticketLife, and while c lives.
func (l *legs) offer(c *Conn, t wire.Ticket, sealed bool) (*Leg, error) {
	g := newLeg(c, l)
	g.sealed = sealed
	g.key = sha256.Sum256(t[:])
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.expected[g.key] != nil {
		return nil, errTicketTwice
	}
	if len(l.expected) >= maxTickets {
		return nil, errTicketFlood
	}
	l.expected[g.key] = g
	g.timer = time.AfterFunc(ticketLife, g.Close)
	return g, nil
}

// none tells whether no ticket is expected.
func (l *legs) none() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.expected) == 0
}

// take forgets a ticket and returns the leg that it is for. It is the only one
// who does, so a ticket is good once.
func (l *legs) take(ticket []byte) *Leg {
	key := sha256.Sum256(ticket)
	l.mu.Lock()
	defer l.mu.Unlock()
	g := l.expected[key]
	delete(l.expected, key)
	return g
}

// present hands a connection to whoever expects its ticket. by is who presents
// it, nil on a bare leg. A ticket that comes the wrong way is used up too.
func (l *legs) present(ticket []byte, conn LaneConn, by *wire.Party) error {
	g := l.take(ticket)
	switch {
	case g == nil || g.c.Err() != nil:
		return errUnknownTicket
	case g.sealed != (by != nil):
		return errOtherLeg
	case by != nil && *by != g.c.peer.Party:
		return fmt.Errorf("%w: %s presents the ticket of %s", errUnknownTicket, *by, g.c.peer.Party)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return errUnknownTicket
	}
	g.came <- conn
	return nil
}

// Accept waits for the leg: until ctx ends, the channel ends, or the ticket
// expires. The caller owns it then.
func (g *Leg) Accept(ctx context.Context) (LaneConn, error) {
	var err error
	select {
	case conn := <-g.came:
		g.Close()
		return conn, nil
	case <-g.over:
		err = errTicketExpired
	case <-g.c.Done():
		err = g.c.live()
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	g.Close()
	return nil, fmt.Errorf("wait for the leg of %s: %w", g.c.peer, err)
}

// Close makes the ticket worthless, and closes a leg that was not accepted.
func (g *Leg) Close() {
	if g.legs != nil {
		g.legs.mu.Lock()
		g.timer.Stop()
		if g.legs.expected[g.key] == g {
			delete(g.legs.expected, g.key)
		}
		g.legs.mu.Unlock()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.closed {
		g.closed = true
		close(g.over)
	}
	select {
	case conn := <-g.came:
		_ = conn.Close()
	default:
	}
}

// lane takes a connection that began with the first byte of lanePreface. The
// rest must come soon, and nothing is read beyond it. A port that expects no
// ticket does not even look. stop ends whatever may still touch the connection
// when ctx ends.
func (l *Listener) lane(ctx context.Context, raw net.Conn, first []byte, stop func() bool) error {
	tcp, ok := raw.(*net.TCPConn)
	if !ok || l.legs.none() {
		return errUnknownTicket
	}
	if err := tcp.SetReadDeadline(time.Now().Add(l.limits.PrefaceTimeout)); err != nil || ctx.Err() != nil {
		return errors.Join(err, ctx.Err())
	}
	var preface [len(lanePreface) + len(wire.Ticket{})]byte
	n := copy(preface[:], first)
	if _, err := io.ReadFull(tcp, preface[n:]); err != nil {
		return fmt.Errorf("lane preface: %w", err)
	}
	if string(preface[:len(lanePreface)]) != lanePreface {
		return errors.New("lane preface: not ours")
	}
	if !stop() {
		return ctx.Err()
	}
	if err := errors.Join(tcp.SetDeadline(time.Time{}), tcp.SetKeepAliveConfig(laneKeepAlive)); err != nil {
		return err
	}
	return l.legs.present(preface[len(lanePreface):], tcp, nil)
}
