package tunnel

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
)

const (
	// batchSize is how much Batch reads and writes at once.
	batchSize = 256 << 10
	// batchCap leaves room for what TLS adds to batchSize bytes.
	batchCap = batchSize + 16<<10
	// recordHeader is the header of a TLS record: type, version, length.
	recordHeader = 5
)

var batches = sync.Pool{New: func() any { b := make([]byte, batchCap); return &b }}

// Batch is the connection below TLS. crypto/tls reads and writes one record of
// at most 16 KiB at a time; Batch makes few large system calls of that. Records
// that a tunnel writes together leave together; a read takes what is there and
// hands it to TLS one whole record at a time, so that TLS has no remainders to
// move about. Its buffers are taken when there is something to move and given
// back when there is not.
//
// On a bare socket, or a connection that is a [Waiter], it never blocks with a
// buffer in its hands; on other connections it batches writes only.
type Batch struct {
	net.Conn
	sock *socket // nil: not a bare socket
	wait Waiter  // nil: no Waiter

	// Reading: by one goroutine.
	beforeRead func() // called before each read of the connection below
	in         *[]byte
	r, w       int
	left       int  // of the record that is being handed over
	resting    bool // see Rest

	mu   sync.Mutex
	out  *[]byte // non-nil: writes are held until Flush
	held []byte
}

// Waiter is a connection that can say when there is something to read, so that
// nobody has to wait for it with a buffer.
type Waiter interface {
	Wait() error
}

// NewBatch puts a Batch on conn.
func NewBatch(conn net.Conn) *Batch {
	b := &Batch{Conn: conn, sock: socketOf(conn)}
	if b.sock == nil {
		b.wait, _ = conn.(Waiter)
	}
	return b
}

// ErrResting is what Read of a resting Batch returns where it would have to
// wait. It is temporary: crypto/tls goes on after it.
var ErrResting net.Error = restingError{}

type restingError struct{}

func (restingError) Error() string   { return "nothing more has arrived yet" }
func (restingError) Timeout() bool   { return true }
func (restingError) Temporary() bool { return true }

// Rest says whether Read may read from the connection below. Where it may not,
// it hands over the whole records that came already, and then returns
// ErrResting. The reader says so.
func (b *Batch) Rest(on bool) { b.resting = on }

// Wait returns when something has arrived, or the connection has ended. On
// connections that cannot wait without a buffer it returns at once. It is for
// the reader.
func (b *Batch) Wait() error {
	if b.sock == nil && b.wait == nil || b.w > b.r {
		return nil
	}
	return b.fill()
}

// Read implements [net.Conn] for one reader at a time.
func (b *Batch) Read(p []byte) (int, error) {
	if b.sock == nil && b.wait == nil {
		if b.resting {
			return 0, ErrResting
		}
		b.looked()
		return b.Conn.Read(p)
	}
	if len(p) == 0 {
		return 0, nil
	}
	if b.left == 0 {
		if b.resting && !b.whole() {
			return 0, ErrResting
		}
		if err := b.record(); err != nil {
			return 0, err
		}
	}
	if b.r == b.w {
		if err := b.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, (*b.in)[b.r:min(b.w, b.r+b.left)])
	b.r, b.left = b.r+n, b.left-n
	if b.r == b.w {
		b.release()
	}
	return n, nil
}

func (b *Batch) looked() {
	if b.beforeRead != nil {
		b.beforeRead()
	}
}

// record finds where the record ends that begins at r. What follows a
// connection's last record is handed over as it is, for TLS to judge.
func (b *Batch) record() error {
	for b.w-b.r < recordHeader {
		if err := b.fill(); err != nil {
			if errors.Is(err, io.EOF) && b.w > b.r {
				b.left = b.w - b.r
				return nil
			}
			return err
		}
	}
	b.left = recordHeader + int(binary.BigEndian.Uint16((*b.in)[b.r+3:]))
	return nil
}

// whole tells whether all of the record is there that begins at r.
func (b *Batch) whole() bool {
	return b.w-b.r >= recordHeader && b.w-b.r >= recordHeader+int(binary.BigEndian.Uint16((*b.in)[b.r+3:]))
}

// fill reads at least one byte.
func (b *Batch) fill() error {
	b.looked()
	if b.in != nil && b.r > 0 {
		b.w = copy(*b.in, (*b.in)[b.r:b.w])
		b.r = 0
	}
	var n int
	var err error
	if b.sock != nil {
		b.in, n, err = b.sock.read(b.in, b.w)
	} else {
		n, err = b.readWaiter()
	}
	b.w += n
	return err
}

// readWaiter waits without a buffer if none is needed yet.
func (b *Batch) readWaiter() (int, error) {
	if b.in == nil {
		if err := b.wait.Wait(); err != nil {
			return 0, err
		}
		b.in = batches.Get().(*[]byte)
	}
	n, err := b.Conn.Read((*b.in)[b.w:batchSize])
	if n > 0 {
		err = nil // it comes again
	}
	if b.w+n == 0 {
		b.release()
	}
	return n, err
}

func (b *Batch) release() {
	batches.Put(b.in)
	b.in, b.r, b.w = nil, 0, 0
}

// Write implements [net.Conn].
func (b *Batch) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.out == nil {
		return b.Conn.Write(p)
	}
	b.held = append(b.held, p...)
	return len(p), nil
}

// Hold keeps what is written from now on until Flush. What is held between the
// two should not exceed 256 KiB before TLS.
func (b *Batch) Hold() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.out == nil {
		b.out = batches.Get().(*[]byte)
		b.held = (*b.out)[:0]
	}
}

// Flush writes what is held. If it may not wait and the socket takes no more,
// it returns false and what is left stays held.
func (b *Batch) Flush(wait bool) (done bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.out == nil {
		return true, nil
	}
	if b.sock != nil {
		b.held, err = b.sock.write(b.held, wait)
	} else {
		_, err = b.Conn.Write(b.held)
		b.held = nil
	}
	if len(b.held) > 0 && err == nil {
		return false, nil
	}
	batches.Put(b.out)
	b.out, b.held = nil, nil
	return true, err
}

// socket is the file descriptor of a bare socket.
type socket struct {
	raw syscall.RawConn

	// Of the read in flight.
	readInto func(fd uintptr) bool
	in       *[]byte
	from, n  int
	readErr  error

	// Of the write in flight.
	writeFrom func(fd uintptr) bool
	out       []byte
	wait      bool
	writeErr  error
}

// socketOf returns nil unless conn is a bare socket: a wrapper that passes
// SyscallConn on would be bypassed.
func socketOf(conn net.Conn) *socket {
	var sc syscall.Conn
	switch c := conn.(type) {
	case *net.TCPConn:
		sc = c
	case *net.UnixConn:
		sc = c
	default:
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil || !rawIO {
		return nil
	}
	s := &socket{raw: raw}
	s.readInto, s.writeFrom = s.tryRead, s.tryWrite
	return s
}

// read reads into buf from offset from, and takes a buffer from the pool if
// buf is nil, once there is something to read. It returns the buffer.
func (s *socket) read(buf *[]byte, from int) (*[]byte, int, error) {
	s.in, s.from, s.n, s.readErr = buf, from, 0, nil
	err := s.raw.Read(s.readInto)
	buf, s.in = s.in, nil
	if err == nil {
		err = s.readErr
	}
	return buf, s.n, err
}

// write writes p and returns what is left of it.
func (s *socket) write(p []byte, wait bool) ([]byte, error) {
	s.out, s.wait, s.writeErr = p, wait, nil
	err := s.raw.Write(s.writeFrom)
	p, s.out = s.out, nil
	if err == nil {
		err = s.writeErr
	}
	return p, err
}
