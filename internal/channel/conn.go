package channel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// Conditions that callers tell apart.
var (
	ErrClosed       = errors.New("channel is closed")
	ErrPeerGone     = errors.New("peer closed the channel")
	ErrExpired      = errors.New("certificate that opened the channel is over, or has not begun, by the clock of this host")
	ErrReplaced     = errors.New("channel was replaced by a newer one")
	ErrDraining     = errors.New("channel is draining")
	ErrWrongPeer    = errors.New("another party answers at this address")
	ErrWrongSide    = errors.New("wrong side of the channel")
	ErrNotAdmitted  = errors.New("not admitted")
	ErrNoTransport  = errors.New("no such carrier")
	ErrTooManyPeers = errors.New("too many pending parties")
)

// transport is what a carrier provides for one connection.
type transport interface {
	// serve answers requests until the connection ends.
	serve(ctx context.Context, h http.Handler) error
	// RoundTrip waits for response headers for as long as the limits say.
	RoundTrip(*http.Request) (*http.Response, error)
	// connect sends a request without a body, whose context bounds the opening
	// only. The response's body is a duplex.
	connect(*http.Request) (*http.Response, error)
	// close ends the connection at once; it may be called more than once.
	close()
	rtt() time.Duration
}

// duplex is the client's end of a CONNECT stream. Reads of no bytes wait.
type duplex interface {
	io.ReadWriteCloser // Close ends both directions at once
	CloseWrite() error
}

// Conn is one live, verified connection. All methods are safe for concurrent use.
type Conn struct {
	id      *identity.Identity // ours
	peer    identity.Peer
	dir     Direction
	proto   *protocol
	dialled bool
	resumed bool
	local   net.Addr
	remote  net.Addr
	since   time.Time
	begins  time.Time // before which the clock shows that it is wrong; zero: never
	expires time.Time // zero: never
	limits  Limits
	t       transport
	legs    *legs    // of the port that accepted it; nil: we dialled
	dialLeg dialFunc // nil: they dialled, or an HTTP proxy stands in the way
	dialler *Dialer  // nil: they dialled

	class    atomic.Pointer[string]
	named    atomic.Bool // class was told to, or by, the peer
	streams  atomic.Int64
	drainReq chan struct{}
	outlived bool        // its peer's intermediate was given up; of registry.watch
	drained  atomic.Bool // takes no more
	drainOne sync.Once

	mu     sync.Mutex
	err    error
	done   chan struct{}
	expiry *time.Timer
	idle   chan struct{} // closed when streams falls to 0; made on demand
	tails  tails         // closed streams that still hand over their last bytes
	last   func()        // of Stay
	after  func()        // comes when it has ended
}

// newConn makes a Conn; attach gives it its transport.
func newConn(id *identity.Identity, p *protocol, v verified, dialled bool, local, remote net.Addr, lim Limits) *Conn {
	c := &Conn{id: id, peer: v.peer, dir: v.dir, proto: p, dialled: dialled, resumed: v.resumed, begins: v.begins, local: local, remote: remote,
		since: time.Now(), limits: lim.forClass(p.class), done: make(chan struct{}), drainReq: make(chan struct{})}
	c.class.Store(&p.class)
	return c
}

// attach completes a Conn. It ends at expires, on our monotonic clock,
// or soon after if the other clock comes there first.
func (c *Conn) attach(t transport, expires time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = t
	if c.expires = expires; !expires.IsZero() {
		c.expiry = time.AfterFunc(time.Until(expires), func() { c.Close(ErrExpired) })
	}
}

// Peer is the verified party at the other end.
func (c *Conn) Peer() identity.Peer { return c.peer }

// Direction says where the peer is.
func (c *Conn) Direction() Direction { return c.dir }

// Carrier is "h2" or "h3".
func (c *Conn) Carrier() string { return c.proto.carrier }

// Dialled tells whether we dialled.
func (c *Conn) Dialled() bool { return c.dialled }

// Resumed tells whether a TLS ticket saved the full handshake.
func (c *Conn) Resumed() bool { return c.resumed }

// RemoteAddr is the peer's address as we see it.
func (c *Conn) RemoteAddr() string { return c.remote.String() }

// Since is when the handshake ended.
func (c *Conn) Since() time.Time { return c.since }

// Enrolling tells whether this is an enrolment connection: one side has no
// valid certificate. The peer is pending when it is downstream.
func (c *Conn) Enrolling() bool { return c.proto.enroll }

// Expires is when the connection ends at the latest: the NotAfter of the leaf
// that opened it, whichever of the two comes first. Zero on enrolment.
func (c *Conn) Expires() time.Time { return c.expires }

// outOfTime tells whether one of the leaves that opened the connection is not
// valid by the clock.
func (c *Conn) outOfTime(now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return now.Before(c.begins) || !c.expires.IsZero() && now.After(c.expires)
}

// RTT is the round trip that the carrier measured last; 0 if it knows none.
func (c *Conn) RTT() time.Duration { return c.t.rtt() }

// Streams is the number of requests and CONNECT streams that are open.
func (c *Conn) Streams() int { return int(c.streams.Load()) }

// Class is admin, session or bulk.
func (c *Conn) Class() string { return *c.class.Load() }

// SetClass changes the class, which the next request to a downstream peer that
// was not told yet carries in Sallyport-Class. Bulk is fixed by the ALPN.
func (c *Conn) SetClass(class string) {
	if c.proto.class == ClassBulk || class == ClassBulk || class == "" || class == c.Class() {
		return
	}
	c.class.Store(&class)
	c.named.Store(false)
}

// Done is closed when the connection has ended.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Err says why the connection ended; nil while it lives.
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close ends the connection at once; nil means ErrClosed. Only the first call counts.
func (c *Conn) Close(cause error) {
	if cause == nil {
		cause = ErrClosed
	}
	c.mu.Lock()
	t := c.t
	if c.err == nil {
		c.err = cause
		close(c.done)
		if c.expiry != nil {
			c.expiry.Stop()
		}
		if c.after != nil {
			go c.after()
		}
	}
	c.mu.Unlock()
	if t != nil {
		t.close()
	}
}

// Stay is for the one who serves a connection that its port accepted: it has the
// connection go on when he returns. When that has ended, end is called in a goroutine
// of its own, and must have stopped what he began when it returns. Until then no
// goroutine waits, which of thousands of connections at rest is what their memory
// is made of. False: he has to serve it until it ends, as any other.
func (c *Conn) Stay(end func()) bool {
	if c.legs == nil || c.dir != PeerDownstream || c.proto.carrier != CarrierH2 {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last = end
	return true
}

// stayed returns what Stay was given; nil: it was not called.
func (c *Conn) stayed() func() {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last
}

// ended has f called, in a goroutine of its own, when the connection has ended.
func (c *Conn) ended(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		go f()
		return
	}
	c.after = f
}

// live returns why a new request cannot start.
func (c *Conn) live() error {
	if err := c.Err(); err != nil {
		return fmt.Errorf("%s: %w", c.peer, err)
	}
	return nil
}

// DrainRequested is closed when the peer has asked to be replaced, with
// POST /v1/drain, or when [Conn.Drain] began.
func (c *Conn) DrainRequested() <-chan struct{} { return c.drainReq }

func (c *Conn) requestDrain() { c.drainOne.Do(func() { close(c.drainReq) }) }

// Draining tells whether the connection should get no new streams.
func (c *Conn) Draining() bool {
	select {
	case <-c.drainReq:
		return true
	default:
		return false
	}
}

// Drain ends the connection gently: a downstream peer is told (POST
// /v1/drain), no new stream starts, and when the last one has ended, or after
// d.Deadline, the connection is closed. An upstream peer is told by the owner
// of the peers or signals stream, which carries a draining line; new CONNECT
// requests are refused with 503 meanwhile. Neither carrier's own farewell is
// used: both cut running streams.
func (c *Conn) Drain(ctx context.Context, d wire.Drain) error {
	if c.dir == PeerDownstream {
		if err := c.postDrain(ctx, d); err != nil {
			c.Close(ErrDraining)
			return fmt.Errorf("drain %s: %w", c.peer, err)
		}
	}
	c.drained.Store(true)
	c.requestDrain()
	ctx, cancel := context.WithTimeout(ctx, d.Deadline)
	defer cancel()
	err := c.waitIdle(ctx)
	if err == nil {
		c.settle(ctx)
	}
	c.Close(ErrDraining)
	return err
}

// settle gives the answers of handlers that have just returned the time to
// reach the wire: neither carrier tells when they have.
func (c *Conn) settle(ctx context.Context) {
	if c.dir != PeerUpstream {
		return
	}
	t := time.NewTimer(500 * time.Millisecond)
	defer t.Stop()
	select {
	case <-t.C:
	case <-c.done:
	case <-ctx.Done():
	}
}

// retire closes a replaced connection when its streams have ended, at the
// latest after grace.
func (c *Conn) retire(ctx context.Context, grace time.Duration) {
	c.requestDrain()
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	if c.waitIdle(ctx) == nil {
		c.settle(ctx)
	}
	c.Close(ErrReplaced)
}

// waitIdle waits until no stream is open.
func (c *Conn) waitIdle(ctx context.Context) error {
	for {
		c.mu.Lock()
		if c.streams.Load() == 0 {
			c.mu.Unlock()
			return nil
		}
		if c.idle == nil {
			c.idle = make(chan struct{})
		}
		idle := c.idle
		c.mu.Unlock()
		select {
		case <-idle:
		case <-c.done:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("%d streams of %s are still open: %w", c.Streams(), c.peer, ctx.Err())
		}
	}
}

func (c *Conn) streamBegins() { c.streams.Add(1) }

func (c *Conn) streamEnds() {
	if c.streams.Add(-1) > 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.idle != nil && c.streams.Load() == 0 {
		close(c.idle)
		c.idle = nil
	}
}
