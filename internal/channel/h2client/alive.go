package h2client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// look is what the one timer of a connection does. It is not moved by every
// frame: it looks when the last one came, and sleeps for what is left.
func (c *Conn) look() {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	now, every := c.now(), int64(c.cfg.KeepAlive)
	read := c.lastRead.Load()
	if read >= c.aliveAt {
		c.aliveAt = 0
	}
	var dead error
	if w := c.writeSince.Load(); w != 0 && now-w >= 2*every {
		dead = ErrStuck
	} else if c.aliveAt != 0 && now-c.aliveAt >= every {
		dead = ErrSilent
	}
	if dead != nil {
		c.mu.Unlock()
		c.fail(dead)
		return
	}
	next := read + every - now
	if c.aliveAt != 0 {
		next = c.aliveAt + every - now
	} else if next <= every/16 { // the answer to the last PING, for one: not worth another look
		c.aliveAt, next = now, every
		c.pinged++
		c.control = appendPing(c.control, 0, c.pinged)
	}
	c.timer.Reset(time.Duration(next))
	c.mu.Unlock()
	c.flush()
}

// Ping sends a PING and waits for the answer.
func (c *Conn) Ping(ctx context.Context) error {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return c.Err()
	}
	c.pinged++
	id, answer := c.pinged, make(chan struct{})
	if c.pings == nil {
		c.pings = map[uint64]chan struct{}{}
	}
	c.pings[id] = answer
	c.control = appendPing(c.control, 0, id)
	c.mu.Unlock()
	c.kick()
	select {
	case <-answer:
		return nil
	case <-c.done:
		return c.Err()
	case <-ctx.Done():
	}
	c.mu.Lock()
	delete(c.pings, id)
	c.mu.Unlock()
	return context.Cause(ctx)
}

// pong wakes who waits for the answer to a PING.
func (c *Conn) pong(id uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if answer, ok := c.pings[id]; ok {
		close(answer)
		delete(c.pings, id)
	}
}

// notEOF makes sure that the end of a connection is not taken for that of a stream.
func notEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func lost(err error) error {
	if e := (*ConnError)(nil); errors.As(err, &e) {
		return err
	}
	return fmt.Errorf("HTTP/2 connection: %w", notEOF(err))
}
