//go:build !linux

package channel

import (
	"crypto/tls"
	"net"
)

type ahead struct{}

func (*ahead) took([]byte) {}

func unread(net.Conn) bool { return false }

func resting(conn *tls.Conn, _ *peekedConn) net.Conn { return conn }
