package channel

import (
	"context"
	"errors"
	"net"
)

// BlockTCP makes a connection that we dialled like one through a firewall that
// lets only UDP pass.
func BlockTCP(c *Conn) {
	c.dialLeg = func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("connection refused") }
}

// PendingCount is the number of enrolment connections.
func (l *Listener) PendingCount() int { return l.pending.count() }
