package channel

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"sallyport/internal/wire"
)

// A lane's leg is a TCP connection beside a channel, between the same two
// ports: whoever dialled the channel dials the leg, to the address that the
// channel goes to, and begins it with 40 bytes: lanePreface and the ticket that
// the upstream side has sent over the channel. From then on it is bare: no TLS
// of ours, nothing buffered, nothing wrapped, so that the kernel can splice it.
//
// Where that cannot be, or may not, a sealed leg takes its place: see SealedLeg.
// A lane is sealed on all legs or on none.
const lanePreface = "SPLANE1\n"

const (
	// laneDialTime is how long the TCP connection of a leg may take.
	laneDialTime = 3 * time.Second
	// ticketLife is how long a ticket is good.
	ticketLife = 10 * time.Second
	// maxTickets is how many a port expects at once.
	maxTickets = 4096
)

// laneKeepAlive notices a dead path as fast as the channels do.
var laneKeepAlive = net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3}

// ErrNoLane says that there can be no lane beside this channel: an HTTP proxy
// stands in the way, or TCP does not reach the address that QUIC reaches. It
// stays so for a while.
var ErrNoLane = errors.New("no lane can be had")

// OpenLane asks a downstream peer for a leg of a lane to req.Node (to the peer
// itself when empty), and returns it once all legs further down are there. It
// makes the ticket. A refusal is a *RefusedError. ctx bounds all of it.
func (c *Conn) OpenLane(ctx context.Context, req wire.LaneRequest) (LaneConn, error) {
	leg, err := c.openLane(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("lane through %s: %w", c.peer, err)
	}
	return leg, nil
}

func (c *Conn) openLane(ctx context.Context, req wire.LaneRequest) (LaneConn, error) {
	switch {
	case c.dir != PeerDownstream || c.Enrolling():
		return nil, ErrWrongSide
	case c.Draining():
		return nil, ErrDraining
	case c.dialled && c.dialLeg == nil && !req.Sealed:
		return nil, errProxied
	}
	req.Ticket = wire.NewTicket()
	if c.dialled {
		if err := c.askForLane(ctx, req); err != nil {
			return nil, err
		}
		return c.dialLane(ctx, req)
	}
	leg, err := c.offerLane(req)
	if err != nil {
		return nil, err
	}
	defer leg.Close()
	if err := c.askForLane(ctx, req); err != nil {
		return nil, err
	}
	return leg.Accept(ctx)
}

func (c *Conn) askForLane(ctx context.Context, req wire.LaneRequest) error {
	b, err := json.Marshal(req)
	if err != nil {
		return err
	}
	post := (&http.Request{Method: http.MethodPost, URL: &url.URL{Path: wire.PathLanes}, Header: http.Header{"Content-Type": {"application/json"}},
		Body: io.NopCloser(bytes.NewReader(b)), ContentLength: int64(len(b))}).WithContext(ctx)
	res, err := c.RoundTrip(post)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return err
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode/100 != 2 {
		return &RefusedError{Status: res.StatusCode, Reason: headerText(res.Header.Get(wire.HeaderError))}
	}
	if req.Sealed && res.Header.Get(wire.HeaderLane) != wire.LaneSealed {
		return fmt.Errorf("%w: %s knows no sealed lanes yet", ErrNoLane, c.peer)
	}
	return nil
}

// GrantLane answers a request for a lane whose legs further down are there.
func GrantLane(w http.ResponseWriter, req wire.LaneRequest) {
	if req.Sealed {
		w.Header().Set(wire.HeaderLane, wire.LaneSealed)
	}
	w.WriteHeader(http.StatusOK)
}

// TakeLane begins our leg of a lane that an upstream peer asks for: when we
// dialled the channel it dials the leg, and is done when that is there; else
// the ticket is expected on our port from now on. The caller closes the Leg.
func (c *Conn) TakeLane(ctx context.Context, req wire.LaneRequest) (*Leg, error) {
	if c.dir != PeerUpstream || c.Enrolling() {
		return nil, fmt.Errorf("lane for %s: %w", c.peer, ErrWrongSide)
	}
	if !c.dialled {
		return c.offerLane(req)
	}
	conn, err := c.dialLane(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("lane for %s: %w", c.peer, err)
	}
	leg := newLeg(c, nil)
	leg.came <- conn
	return leg, nil
}

var errProxied = fmt.Errorf("%w: the channel goes through an HTTP proxy", ErrNoLane)

// dialLane connects to where the channel goes, and presents the ticket.
func (c *Conn) dialLane(ctx context.Context, req wire.LaneRequest) (LaneConn, error) {
	if c.dialLeg == nil && !req.Sealed {
		return nil, errProxied
	}
	if err := c.live(); err != nil {
		return nil, err
	}
	within, cancel := context.WithTimeout(ctx, laneDialTime)
	defer cancel()
	dial := c.dialBare
	if req.Sealed {
		dial = c.dialSealed
	}
	conn, err := dial(within, req.Ticket)
	if err != nil && ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return conn, err
}

func (c *Conn) dialSealed(ctx context.Context, t wire.Ticket) (LaneConn, error) {
	leg, err := c.dialler.dialSealed(ctx, c, t)
	if err != nil {
		return nil, fmt.Errorf("%w: sealed, beside %s: %w", ErrNoLane, c.Carrier(), err)
	}
	return leg, nil
}

func (c *Conn) dialBare(ctx context.Context, t wire.Ticket) (LaneConn, error) {
	conn, err := c.dialLeg(ctx, "tcp", c.remote.String())
	if err != nil {
		return nil, fmt.Errorf("%w: dial TCP beside %s: %w", ErrNoLane, c.Carrier(), err)
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		_ = conn.Close()
		return nil, fmt.Errorf("%w: this network has no TCP", ErrNoLane)
	}
	err = errors.Join(tcp.SetKeepAliveConfig(laneKeepAlive), tcp.SetWriteDeadline(time.Now().Add(laneDialTime)))
	if err == nil { // it fits into the empty send buffer: this does not block
		_, err = tcp.Write(append([]byte(lanePreface), t[:]...))
	}
	if err = errors.Join(err, tcp.SetWriteDeadline(time.Time{})); err != nil {
		_ = tcp.Close()
		return nil, fmt.Errorf("present the ticket: %w", err)
	}
	return tcp, nil
}

// offerLane makes our port expect a ticket on behalf of this channel.
func (c *Conn) offerLane(req wire.LaneRequest) (*Leg, error) {
	if err := c.live(); err != nil {
		return nil, err
	}
	if c.legs == nil {
		return nil, fmt.Errorf("%w: %s was not accepted on a port", ErrNoLane, c.peer)
	}
	return c.legs.offer(c, req.Ticket, req.Sealed)
}
