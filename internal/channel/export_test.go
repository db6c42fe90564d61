package channel

import (
	"context"
	"errors"
	"net"
	"time"
)

// BlockTCP makes a connection that we dialled like one through a firewall that
// lets only UDP pass.
func BlockTCP(c *Conn) {
	c.dialLeg = func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("connection refused") }
}

// PendingCount is the number of enrolment connections.
func (l *Listener) PendingCount() int { return l.pending.count() }

// Sleep makes a connection look as if the host had slept until after the end of
// its leaf: its timers know nothing of that.
func Sleep(c *Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.expiry.Stop()
	c.expires = time.Now().Add(-time.Second)
}

// SetBack makes a connection look as if the clock had been set back to before its
// leaf.
func SetBack(c *Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.begins = time.Now().Add(time.Hour)
}
