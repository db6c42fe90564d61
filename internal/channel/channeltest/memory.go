package channeltest

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// Network is a listener in memory and the dialler to it. Its connections have
// buffers, as TCP has, and work in a synctest bubble.
type Network struct {
	accept chan net.Conn
	once   sync.Once
	closed chan struct{}

	mu  sync.Mutex
	cut bool
	all []*memConn
}

// NewNetwork makes a network with one place to dial.
func NewNetwork() *Network {
	return &Network{accept: make(chan net.Conn), closed: make(chan struct{})}
}

// DialContext is for channel.Dialer.
func (n *Network) DialContext(ctx context.Context, _, _ string) (net.Conn, error) {
	n.mu.Lock()
	cut := n.cut
	n.mu.Unlock()
	if cut {
		return nil, errors.New("memory network is cut")
	}
	a, b := newMemPair()
	select {
	case n.accept <- b:
		n.mu.Lock()
		defer n.mu.Unlock()
		n.all = append(n.all, a, b)
		return a, nil
	case <-n.closed:
		return nil, errors.New("connection refused")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Cut makes dialling fail until it is called with false.
func (n *Network) Cut(cut bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut = cut
}

// Blackhole swallows everything that is written from now on to the
// connections that exist, without closing them: a path that died.
func (n *Network) Blackhole() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.all {
		c.out.swallow()
	}
}

// Accept is for channel.ListenConfig.Listener.
func (n *Network) Accept() (net.Conn, error) {
	select {
	case c := <-n.accept:
		return c, nil
	case <-n.closed:
		return nil, net.ErrClosed
	}
}

// Close ends Accept.
func (n *Network) Close() error {
	n.once.Do(func() { close(n.closed) })
	return nil
}

// Addr is a name.
func (n *Network) Addr() net.Addr { return memAddr{} }

type memAddr struct{}

func (memAddr) Network() string { return "memory" }
func (memAddr) String() string  { return "memory" }

// memBuffer is what one end of a memory connection has sent and the other not
// yet read, in bytes.
const memBuffer = 256 << 10

type memHalf struct {
	mu      sync.Mutex
	data    []byte
	shut    bool // by the writer: EOF after data
	broken  bool // by the reader: writes fail
	lost    bool
	change  chan struct{} // closed and renewed at every change
	readBy  time.Time
	writeBy time.Time
	rd, wr  *time.Timer
}

func newMemHalf() *memHalf { return &memHalf{change: make(chan struct{})} }

func (h *memHalf) wake() {
	close(h.change)
	h.change = make(chan struct{})
}

func (h *memHalf) swallow() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lost = true
	h.wake()
}

// do runs step with the lock held until it says that it is done.
func (h *memHalf) do(step func() bool) {
	h.mu.Lock()
	for !step() {
		c := h.change
		h.mu.Unlock()
		<-c
		h.mu.Lock()
	}
	h.mu.Unlock()
}

func passed(t time.Time) bool { return !t.IsZero() && !time.Now().Before(t) }

func (h *memHalf) read(p []byte) (n int, err error) {
	h.do(func() bool {
		switch {
		case h.broken:
			err = net.ErrClosed
		case passed(h.readBy):
			err = os.ErrDeadlineExceeded
		case len(h.data) > 0:
			n = copy(p, h.data)
			h.data = h.data[n:]
			h.wake()
		case h.shut:
			err = io.EOF
		default:
			return len(p) == 0
		}
		return true
	})
	return n, err
}

func (h *memHalf) write(p []byte) (n int, err error) {
	h.do(func() bool {
		switch {
		case h.shut:
			err = net.ErrClosed
		case h.broken:
			err = io.ErrClosedPipe
		case passed(h.writeBy):
			err = os.ErrDeadlineExceeded
		case h.lost:
			n = len(p)
		default:
			k := min(len(p)-n, memBuffer-len(h.data))
			h.data = append(h.data, p[n:n+k]...)
			n += k
			if k > 0 {
				h.wake()
			}
			return n == len(p)
		}
		return true
	})
	return n, err
}

func (h *memHalf) deadline(at *time.Time, timer **time.Timer, t time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if *timer != nil {
		(*timer).Stop()
	}
	*at = t
	if !t.IsZero() {
		*timer = time.AfterFunc(time.Until(t), func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.wake()
		})
	}
	h.wake()
}

func (h *memHalf) end(flag *bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	*flag = true
	for _, t := range []*time.Timer{h.rd, h.wr} {
		if t != nil {
			t.Stop()
		}
	}
	h.wake()
}

type memConn struct{ in, out *memHalf }

func newMemPair() (a, b *memConn) {
	x, y := newMemHalf(), newMemHalf()
	return &memConn{in: x, out: y}, &memConn{in: y, out: x}
}

func (c *memConn) Read(p []byte) (int, error)  { return c.in.read(p) }
func (c *memConn) Write(p []byte) (int, error) { return c.out.write(p) }

func (c *memConn) Close() error {
	if !c.out.lost {
		c.out.end(&c.out.shut)
	}
	c.in.end(&c.in.broken)
	return nil
}

func (c *memConn) LocalAddr() net.Addr  { return memAddr{} }
func (c *memConn) RemoteAddr() net.Addr { return memAddr{} }

func (c *memConn) SetReadDeadline(t time.Time) error {
	c.in.deadline(&c.in.readBy, &c.in.rd, t)
	return nil
}

func (c *memConn) SetWriteDeadline(t time.Time) error {
	c.out.deadline(&c.out.writeBy, &c.out.wr, t)
	return nil
}

func (c *memConn) SetDeadline(t time.Time) error {
	_ = c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}
