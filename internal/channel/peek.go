package channel

import (
	"encoding/binary"
	"io"
	"net"
)

// peekedConn gives back bytes that were read to see what comes.
type peekedConn struct {
	net.Conn
	head  []byte
	exact *records // nil: reads are not limited
	guest *guest   // of a handshake that goes on
	ahead *ahead   // nil: nobody asks
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
	if p.exact == nil {
		n, err := p.read(b)
		if p.ahead != nil {
			p.ahead.took(b[:n])
		}
		return n, err
	}
	p.guest.waits()
	n, err := p.read(b[:min(len(b), p.exact.rest())])
	p.guest.works()
	p.exact.took(b[:n])
	return n, err
}

func (p *peekedConn) read(b []byte) (int, error) {
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

// records follows the records of TLS, so that nothing is read beyond one:
// crypto/tls reads ahead, and what it holds could not be given to anybody else.
type records struct {
	header [5]byte // type, version, length
	n      int     // of the header, so far
	left   int     // of the record
}

// rest is how much may be read at once.
func (r *records) rest() int {
	if r.left > 0 {
		return r.left
	}
	return len(r.header) - r.n
}

func (r *records) took(b []byte) {
	if r.left > 0 {
		r.left -= len(b)
		return
	}
	if r.n += copy(r.header[r.n:], b); r.n == len(r.header) {
		r.n, r.left = 0, int(binary.BigEndian.Uint16(r.header[3:]))
	}
}
