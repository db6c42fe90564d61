package h2client

import (
	"context"
	"net/http"
	"time"
)

// patience is how long somebody waits.
type patience struct {
	ctx  context.Context
	late <-chan time.Time
}

// over is why he does not wait any more.
func (p patience) over() error {
	if err := p.ctx.Err(); err != nil {
		return err
	}
	return ErrNoAnswer
}

// acquire waits until one more stream may be opened: the peer says how many,
// and above that requests wait in the order in which they came.
func (c *Conn) acquire(p patience) error {
	c.mu.Lock()
	if err := c.usableLocked(); err != nil || len(c.waiting) == 0 && c.open < c.maxStreams {
		if err == nil {
			c.open++
		}
		c.mu.Unlock()
		return err
	}
	turn := make(chan struct{})
	c.waiting = append(c.waiting, turn)
	c.mu.Unlock()
	select {
	case <-turn:
	case <-p.ctx.Done():
	case <-p.late:
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, w := range c.waiting {
		if w == turn { // the context has ended first
			c.waiting = append(c.waiting[:i], c.waiting[i+1:]...)
			return p.over()
		}
	}
	if err := c.usableLocked(); err != nil { // it gives the slot back that it may have got
		c.releaseLocked()
		return err
	}
	return nil // admitLocked has counted it
}

// usableLocked returns why no new stream can be opened.
func (c *Conn) usableLocked() error {
	switch {
	case c.err != nil:
		return c.err
	case c.goAway != nil:
		return c.goAway
	case c.nextID > maxStreamID:
		return errUsedUp
	}
	return nil
}

// admitLocked lets in those that wait.
func (c *Conn) admitLocked() {
	for len(c.waiting) > 0 && (c.open < c.maxStreams || c.goAway != nil || c.nextID > maxStreamID) {
		c.open++
		close(c.waiting[0])
		c.waiting = c.waiting[1:]
	}
	if len(c.waiting) == 0 {
		c.waiting = nil
	}
}

// releaseLocked gives a stream's slot back. A connection that takes no more
// ends with its last stream.
func (c *Conn) releaseLocked() {
	if c.err != nil {
		return
	}
	c.open--
	c.admitLocked()
	if c.open == 0 && (c.goAway != nil || c.nextID > maxStreamID) {
		go c.fail(c.usableLocked())
	}
}

// begin opens a stream with a request's header block. first is what of the
// body goes along, as far as the windows allow; end says that it is all of it.
func (c *Conn) begin(p patience, method string, e *encoder, first []byte, end bool) (s *Stream, sent int, err error) {
	if err := c.acquire(p); err != nil {
		return nil, 0, err
	}
	if err = c.lock(p); err == nil {
		defer c.unlock()
	}
	c.mu.Lock()
	if err == nil {
		s, err = c.addLocked(method, e.size)
	}
	if err != nil {
		c.releaseLocked()
		c.mu.Unlock()
		return nil, 0, err
	}
	sent = max(min(len(first), s.sendWin, c.sendWin, maxFrame), 0)
	s.sendWin -= sent
	c.sendWin -= sent
	if end = end && sent == len(first); end {
		s.sent, s.werr = true, errWriteEnded
	}
	out := takeOut()
	b := c.controlLocked(*out)
	block := e.buf.Bytes()
	if !c.spoken {
		c.spoken = true
		block = append([]byte{tableSizeZero}, block...)
	}
	c.mu.Unlock()
	b = appendHeaders(b, s.id, block, end && sent == 0)
	if sent > 0 {
		b = appendData(b, s.id, first[:sent], end)
	}
	c.write(b)
	putOut(out, b)
	return s, sent, nil
}

// addLocked makes a stream of the slot that its caller has.
func (c *Conn) addLocked(method string, headerSize int) (*Stream, error) {
	if err := c.usableLocked(); err != nil {
		return nil, err
	}
	if headerSize > c.maxHeader {
		return nil, errListSize(headerSize, c.maxHeader)
	}
	s := &Stream{c: c, id: c.nextID, sendWin: c.sendWindow, recvWin: c.cfg.StreamWindow, left: -1,
		tunnel: method == http.MethodConnect, bare: method == http.MethodHead}
	c.nextID += 2
	c.streams[s.id] = s
	return s, nil
}
