package channel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

// LaneConn is a leg of a lane: a bare *net.TCPConn, or a *SealedLeg.
type LaneConn interface {
	net.Conn
	CloseWrite() error // ends our direction alone
}

// sealedPiece is how much a SealedLeg writes at once, in bytes: 16 records.
const sealedPiece = 256 << 10

// maxPlaintext is what one TLS record carries at most (RFC 8446 section 5.1).
const maxPlaintext = 16 << 10

// plaintexts are what Pass has between two legs.
var plaintexts = sync.Pool{New: func() any { b := make([]byte, 4*maxPlaintext); return &b }}

// SealedLeg is a leg of a lane inside mTLS of its own, for where a bare one may
// not be, or cannot: it looks like a channel to whatever stands in the way, and
// passes HTTP proxies. Its TLS ends at the port like that of a channel, and is
// there so that no ticket and no stranger is on it; what it carries has its own.
//
// There is one reader and one writer at a time.
type SealedLeg struct {
	net.Conn // the connection below: addresses, deadlines, Close
	tls      *tls.Conn
	below    *tunnel.Batch
	more     bool // of the reader: TLS may hold bytes that Read had no room for

	mu     sync.Mutex // of Write
	broken error      // a record was cut short
}

// Read returns what has arrived, not one record alone.
func (s *SealedLeg) Read(p []byte) (int, error) {
	n, err := s.tls.Read(p)
	if err != nil {
		return n, endOfLeg(err)
	}
	if len(p)-n >= maxPlaintext {
		s.below.Rest(true)
		for len(p)-n >= maxPlaintext && err == nil {
			var k int
			k, err = s.tls.Read(p[n:])
			n += k
		}
		s.below.Rest(false)
	}
	s.more = n == len(p)
	return n, nil // an error of TLS other than tunnel.ErrResting comes again
}

// endOfLeg takes the end of the connection below for that of the direction, as
// that of a bare leg is: TLS inside the lane knows what is missing.
func endOfLeg(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return io.EOF
	}
	return err
}

// Wait returns when there is something to read, without a buffer.
func (s *SealedLeg) Wait() error {
	if s.more {
		return nil
	}
	return endOfLeg(s.below.Wait())
}

// Write sends p in as few system calls as sealedPiece allows.
func (s *SealedLeg) Write(p []byte) (written int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(p) > 0 && s.broken == nil {
		s.below.Hold()
		n, err := s.tls.Write(p[:min(len(p), sealedPiece)])
		_, ferr := s.below.Flush(true)
		if s.broken = errors.Join(err, ferr); s.broken == nil {
			p, written = p[n:], written+n
		}
	}
	return written, s.broken
}

// CloseWrite ends our direction by the end of the connection below: the other
// side goes on, and nothing waits for a reader.
func (s *SealedLeg) CloseWrite() error {
	if c, ok := s.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return s.Close()
}

// NetConn is the connection below.
func (s *SealedLeg) NetConn() net.Conn { return s.Conn }

// Pass hands on to another leg what has arrived at this one, and waits if
// nothing has: without a buffer, as lanes are many and most of them idle. It
// goes a few records at a time, so that what is opened is sealed while it is in
// the processor's cache, and writes once. It returns io.EOF at the end.
func (s *SealedLeg) Pass(to *SealedLeg) (moved int64, err error) {
	if err := s.Wait(); err != nil {
		return 0, err
	}
	buf := plaintexts.Get().(*[]byte)
	defer plaintexts.Put(buf)
	n, err := s.tls.Read(*buf)
	if n == 0 {
		return 0, endOfLeg(err)
	}
	to.mu.Lock()
	defer to.mu.Unlock()
	to.below.Hold()
	s.below.Rest(true)
	for n > 0 && to.broken == nil {
		for err == nil && len(*buf)-n >= maxPlaintext {
			var k int
			k, err = s.tls.Read((*buf)[n:]) // an error other than tunnel.ErrResting comes again
			n += k
		}
		_, to.broken = to.tls.Write((*buf)[:n])
		moved += int64(n)
		if n = 0; err == nil {
			n, err = s.tls.Read(*buf)
		}
	}
	s.below.Rest(false)
	_, ferr := to.below.Flush(true)
	to.broken = errors.Join(to.broken, ferr)
	return moved, to.broken
}

// dialSealed makes a leg beside c inside TLS: to the very address of the
// channel, or through the HTTP proxy that the channel went through. Whoever
// answers must be the party of the channel.
func (d *Dialer) dialSealed(ctx context.Context, c *Conn, t wire.Ticket) (*SealedLeg, error) {
	p := laneProtocol(c.dir)
	conf, err := d.tls.config(p, c.dir)
	if err != nil {
		return nil, err
	}
	raw, err := c.dialBeside(ctx, d)
	if err != nil {
		return nil, err
	}
	leg, err := d.sealLeg(ctx, raw, c, p, conf, t)
	if err != nil {
		_ = raw.Close()
		return nil, err
	}
	return leg, nil
}

// dialBeside connects to where the channel goes.
func (c *Conn) dialBeside(ctx context.Context, d *Dialer) (net.Conn, error) {
	if c.dialLeg != nil {
		return c.dialLeg(ctx, "tcp", c.remote.String())
	}
	conn, _, err := d.dialTCP(ctx)
	return conn, err
}

func (d *Dialer) sealLeg(ctx context.Context, raw net.Conn, c *Conn, p *protocol, conf *tls.Config, t wire.Ticket) (*SealedLeg, error) {
	unblock := context.AfterFunc(ctx, func() { _ = raw.SetDeadline(time.Unix(1, 0)) })
	defer unblock()
	conf.DynamicRecordSizingDisabled = true
	below := tunnel.NewBatch(raw)
	conn := tls.Client(below, conf)
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, handshakeError(ctx, err)
	}
	v, err := d.tls.verify(p, c.dir, conn.ConnectionState())
	switch {
	case err != nil:
		return nil, err
	case v.peer.Party != c.peer.Party:
		return nil, fmt.Errorf("%w: %s, and the channel is with %s (is there a balancer before several?)", ErrWrongPeer, v.peer.Party, c.peer.Party)
	}
	if _, err := conn.Write(t[:]); err != nil {
		return nil, fmt.Errorf("present the ticket: %w", err)
	}
	if !unblock() {
		return nil, context.Cause(ctx)
	}
	return newSealedLeg(raw, conn, below)
}

func newSealedLeg(raw net.Conn, conn *tls.Conn, below *tunnel.Batch) (*SealedLeg, error) {
	if tcp, ok := raw.(*net.TCPConn); ok {
		if err := tcp.SetKeepAliveConfig(laneKeepAlive); err != nil {
			return nil, err
		}
	}
	return &SealedLeg{Conn: raw, tls: conn, below: below}, nil
}

// sealedLane takes a connection whose handshake said that it is a leg of a
// lane: the ticket must come soon, from the party of the channel that it
// belongs to. first is the connection below conn, which is at a record's end.
func (l *Listener) sealedLane(ctx context.Context, raw net.Conn, first *peekedConn, conn *tls.Conn, v verified, stop func() bool) error {
	if l.legs.none() {
		return errUnknownTicket
	}
	if err := raw.SetReadDeadline(time.Now().Add(l.limits.PrefaceTimeout)); err != nil || ctx.Err() != nil {
		return errors.Join(err, ctx.Err())
	}
	below := tunnel.NewBatch(raw)
	first.Conn = below
	var t wire.Ticket
	if _, err := io.ReadFull(conn, t[:]); err != nil {
		return fmt.Errorf("lane ticket of %s: %w", v.peer, err)
	}
	if !stop() {
		return ctx.Err()
	}
	if err := raw.SetDeadline(time.Time{}); err != nil {
		return err
	}
	leg, err := newSealedLeg(raw, conn, below)
	if err != nil {
		return err
	}
	return l.legs.present(t[:], leg, &v.peer.Party)
}
