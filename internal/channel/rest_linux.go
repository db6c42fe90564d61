package channel

import (
	"crypto/tls"
	"encoding/binary"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// restingConn is a TLS connection whose reader can wait on little stack.
//
// A goroutine that waits inside crypto/tls keeps a stack of 8 KiB for as long as
// it waits; one that waits in Await keeps half of that once the collector has
// seen it. Await must not wait where TLS holds bytes that it has read ahead:
// restingConn follows the records below, and counts what can be in them.
type restingConn struct {
	net.Conn // *tls.Conn
	below    *peekedConn
	raw      syscall.RawConn
	ready    func(fd uintptr) bool
}

// resting takes over a connection whose handshake is done, on the side that is
// dialled: nothing was read beyond the record that ended it.
func resting(conn *tls.Conn, below *peekedConn) net.Conn {
	tcp, ok := below.Conn.(*net.TCPConn)
	if !ok {
		return conn
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return conn
	}
	below.ahead = &ahead{}
	return &restingConn{Conn: conn, below: below, raw: raw, ready: readable}
}

// readable tells whether a read would return at once: with bytes, the end, or
// an error.
func readable(fd uintptr) bool {
	var one [1]byte
	for {
		_, _, err := unix.Recvfrom(int(fd), one[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		if err != unix.EINTR {
			return err != unix.EAGAIN
		}
	}
}

// unread tells whether something has arrived that nobody has read yet. Somebody may
// wait in Read.
func unread(c net.Conn) (yes bool) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	_ = raw.Control(func(fd uintptr) { yes = readable(fd) })
	return yes
}

func (c *restingConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.below.ahead.plain -= n
	return n, err
}

// Await returns when a Read may have something to return. It belongs to the
// one who reads.
func (c *restingConn) Await() {
	if c.below.ahead.plain <= 0 {
		_ = c.raw.Read(c.ready) // what is wrong, the next Read says
	}
}

// NetConn is that of tls.Conn.
func (c *restingConn) NetConn() net.Conn { return c.below }

// sealing is what a record of TLS 1.3 adds to its content at least: one byte of
// type and 16 of authentication (RFC 8446 section 5.2).
const sealing = 17

// ahead follows the records that crypto/tls reads. It reads only when it has
// handed out all of the records before: what those that the read completes can
// hold is what it may have for us, at most. Padding, tickets and key updates make
// it less, and then the next read comes before the next wait.
type ahead struct {
	plain int // bytes

	header [5]byte // of a record: type, version, length
	n      int     // of the header, so far
	size   int     // of the record
	left   int     // of that, to come
}

func (a *ahead) took(b []byte) {
	a.plain = 0
	for len(b) > 0 {
		if a.left == 0 {
			k := copy(a.header[a.n:], b)
			b = b[k:]
			if a.n += k; a.n < len(a.header) {
				return
			}
			a.n, a.size = 0, int(binary.BigEndian.Uint16(a.header[3:]))
			a.left = a.size
			continue
		}
		k := min(a.left, len(b))
		b = b[k:]
		if a.left -= k; a.left == 0 {
			a.plain += max(0, a.size-sealing)
		}
	}
}
