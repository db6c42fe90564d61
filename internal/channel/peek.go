package channel

import (
	"io"
	"net"
)

// peekedConn gives back bytes that were read to see what comes.
type peekedConn struct {
	net.Conn
	head []byte
}

// peek reads the first bytes of c, at least one and at most n.
func peek(c net.Conn, n int) (*peekedConn, error) {
	head := make([]byte, n)
	got, err := io.ReadAtLeast(c, head, 1)
	if err != nil {
		return nil, err
	}
	return &peekedConn{Conn: c, head: head[:got]}, nil
}

func (p *peekedConn) Read(b []byte) (int, error) {
	if len(p.head) == 0 {
		return p.Conn.Read(b)
	}
	n := copy(b, p.head)
	if p.head = p.head[n:]; len(p.head) == 0 {
		p.head = nil
	}
	return n, nil
}

// NetConn returns the connection below, as that of tls.Conn does.
func (p *peekedConn) NetConn() net.Conn { return p.Conn }
