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
