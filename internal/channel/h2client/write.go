package h2client

import (
	"fmt"
	"sync"
)

// outs are buffers in which frames are put together: control frames, a header
// block and a frame of data, in the usual case.
var outs = sync.Pool{New: func() any { b := make([]byte, 0, maxFrame+1<<10); return &b }}

func takeOut() *[]byte { return outs.Get().(*[]byte) }

// putOut gives a buffer back that has become b.
func putOut(out *[]byte, b []byte) {
	if cap(b) <= 2*maxFrame {
		*out = b[:0]
		outs.Put(out)
	}
}

const (
	// maxControl is how many bytes of control frames may wait for a peer that
	// does not read. What we owe it for its own frames is maxAcks; the rest is at
	// most a few frames for each stream.
	maxControl = 128 << 10
	// maxAcks is how many answers to PING and SETTINGS may wait (CVE-2019-9512, 9515).
	maxAcks = 64
)

// lock takes the turn to write.
func (c *Conn) lock(p patience) error {
	select {
	case <-c.turn:
		return nil
	default:
	}
	select {
	case <-c.turn:
		return nil
	case <-c.done:
		return c.Err()
	case <-p.ctx.Done():
	case <-p.late:
	}
	return p.over()
}

// unlock sends what was queued meanwhile, and gives the turn back.
func (c *Conn) unlock() {
	for {
		c.mu.Lock()
		b := c.control
		if len(b) == 0 {
			c.turn <- struct{}{}
			c.mu.Unlock()
			return
		}
		c.control, c.acks = nil, 0
		c.mu.Unlock()
		c.write(b)
	}
}

// flush sends what is queued, unless somebody is writing, who will.
func (c *Conn) flush() {
	select {
	case <-c.turn:
		c.unlock()
	default:
	}
}

func (c *Conn) queued() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.control) > 0
}

// kick is flush for those who must not wait for the peer to read.
func (c *Conn) kick() {
	select {
	case <-c.turn:
		go c.unlock() // ends with the write, which ends with the connection
	default:
	}
}

// write is called by whoever has the turn.
func (c *Conn) write(b []byte) {
	c.writeSince.Store(c.now())
	_, err := c.nc.Write(b)
	c.writeSince.Store(0)
	if err != nil {
		c.fail(fmt.Errorf("HTTP/2 connection: %w", notEOF(err)))
	}
}

// controlLocked appends the frames that are queued.
func (c *Conn) controlLocked(b []byte) []byte {
	b = append(b, c.control...)
	c.control, c.acks = nil, 0
	return b
}

// ackLocked counts an answer that the peer has made us queue.
func (c *Conn) ackLocked() error {
	if c.acks++; c.acks > maxAcks || len(c.control) > maxControl {
		return broken(CodeEnhanceYourCalm, "it asks for answers and does not read them")
	}
	return nil
}

// takenLocked gives window back for n bytes that nobody holds any more: for the
// connection, and for the stream if there is more to come on it. That is done in
// large steps, which leave room for all streams to be full and unread at once.
func (c *Conn) takenLocked(s *Stream, n int) {
	if c.err != nil {
		return
	}
	if c.credit += n; c.credit >= min(c.cfg.ConnWindow/2, 4*c.cfg.StreamWindow) {
		c.control = appendWindowUpdate(c.control, 0, c.credit)
		c.recvWin += c.credit
		c.credit = 0
	}
	if s == nil || s.gone || s.ended {
		return
	}
	if s.credit += n; s.credit >= (c.cfg.StreamWindow+1)/2 {
		c.control = appendWindowUpdate(c.control, s.id, s.credit)
		s.recvWin += s.credit
		s.credit = 0
	}
}
