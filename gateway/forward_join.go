package gateway

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/internal/tunnel"
)

const (
	// joinBuffer is the size of one read. Two are in use per connection while
	// bytes flow, and none while it is idle.
	joinBuffer = 128 << 10
	// maxEarly bounds what is kept of a client's bytes until the target has
	// answered, for the case that another node has to take over.
	maxEarly = 64 << 10
)

var joinBuffers = sync.Pool{New: func() any { return new([joinBuffer]byte) }}

// joining is one client's connection while it is joined with a stream, or with
// one after another.
type joining struct {
	client *net.TCPConn
	toward atomic.Int64 // bytes that the client sent
	back   atomic.Int64 // bytes that it got

	answered atomic.Bool // the target sent something, or ended its direction
	sent     atomic.Bool // the client ended its direction, and the target was told
	early    []byte      // all that the client sent
	lost     bool        // it was more than maxEarly
	ended    bool        // the client ended its direction
}

// clientError is an error of the client's connection, not of the stream.
type clientError struct{ error }

func (e clientError) Unwrap() error { return e.error }

// again says whether what was sent can be sent once more, by another stream.
func (j *joining) again() bool { return !j.answered.Load() && !j.lost }

// untouched says that the client has not sent anything yet.
func (j *joining) untouched() bool { return j.again() && len(j.early) == 0 && !j.ended }

// run copies both ways until both directions ended, each by itself, or one
// broke. It closes the stream, never the client. The error of what broke first
// counts.
func (j *joining) run(stream targetStream) error {
	defer func() { _ = stream.Close() }() // it is over, or broken
	var left atomic.Bool                  // the client's connection broke, or ours to it
	var upErr error
	up := make(chan struct{})
	go func() {
		defer close(up)
		upErr = j.up(stream)
		var ours clientError
		if errors.As(upErr, &ours) {
			left.Store(true)
			abort(stream) // the way back is of no more use either
		}
	}()
	err := j.down(stream)
	if err == nil {
		// The target ended its direction in order; whether it read what came
		// to it after that is its own affair.
		<-up
		if _, ok := errors.AsType[clientError](upErr); ok {
			return upErr
		}
		return nil
	}
	if left.Load() {
		<-up
		return upErr
	}
	abort(stream)
	_ = j.client.SetReadDeadline(time.Unix(1, 0)) // wakes up; the connection is gone if it fails
	<-up
	_ = j.client.SetReadDeadline(time.Time{})
	return err
}

// abort ends a stream so that the target sees a reset, not an end in order.
func abort(stream targetStream) {
	if s, ok := stream.(interface {
		Refuse(code tunnel.Code, reason string)
	}); ok {
		s.Refuse(tunnel.Reset, "")
	}
	_ = stream.Close()
}

func (j *joining) up(stream targetStream) error {
	if len(j.early) > 0 {
		if _, err := stream.Write(j.early); err != nil {
			return err
		}
	}
	from, direct := stream.(io.ReaderFrom) // it reads straight into what it sends
	for !j.ended {
		if direct && (j.lost || j.answered.Load()) {
			j.early, j.lost = nil, true
			n, err := from.ReadFrom(j.client)
			j.toward.Add(n)
			if err != nil {
				return j.side(err)
			}
			j.ended = true
			break
		}
		if err := j.upOnce(stream); err != nil {
			return err
		}
	}
	err := stream.CloseWrite()
	j.sent.Store(err == nil)
	return err
}

// side tells errors of the client's connection from those of the stream.
func (j *joining) side(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Addr != nil && (op.Addr.String() == j.client.RemoteAddr().String() || op.Addr.String() == j.client.LocalAddr().String()) {
		return clientError{err}
	}
	return err
}

// upOnce moves what one read gives.
func (j *joining) upOnce(stream targetStream) error {
	buf, n, err := j.read()
	if buf != nil {
		defer joinBuffers.Put(buf)
	}
	if err != nil {
		return clientError{err}
	}
	if n == 0 {
		j.ended = true
		return nil
	}
	j.keep(buf[:n])
	j.toward.Add(int64(n))
	_, err = stream.Write(buf[:n])
	return err
}

// read waits for the client with no buffer in hand: a connection that is idle
// costs none. Nothing read is the end of its direction.
func (j *joining) read() (buf *[joinBuffer]byte, n int, err error) {
	raw, err := j.client.SyscallConn()
	if err != nil {
		return nil, 0, err
	}
	var readErr error
	err = raw.Read(func(fd uintptr) bool {
		buf = joinBuffers.Get().(*[joinBuffer]byte)
		for {
			n, readErr = unix.Read(int(fd), buf[:])
			switch readErr {
			case unix.EINTR:
				continue
			case unix.EAGAIN:
				joinBuffers.Put(buf)
				buf = nil
				return false
			}
			return true
		}
	})
	if err == nil {
		err = readErr
	}
	return buf, max(n, 0), err
}

// keep holds on to what may have to be sent again.
func (j *joining) keep(b []byte) {
	switch {
	case j.lost:
	case j.answered.Load(), len(j.early)+len(b) > maxEarly:
		j.early, j.lost = nil, true
	default:
		j.early = append(j.early, b...)
	}
}

func (j *joining) down(stream targetStream) error {
	to, direct := stream.(io.WriterTo) // it writes straight from what arrived
	for {
		if direct && j.answered.Load() {
			n, err := to.WriteTo(j.client)
			j.back.Add(n)
			if err != nil {
				return j.side(err)
			}
			return j.endDown()
		}
		end, err := j.downOnce(stream)
		if err != nil {
			return err
		}
		if end {
			return j.endDown()
		}
	}
}

func (j *joining) downOnce(stream targetStream) (end bool, err error) {
	// The first read waits for the target: not with a large buffer in hand.
	var first [1 << 10]byte
	buf := first[:]
	if j.answered.Load() {
		b := joinBuffers.Get().(*[joinBuffer]byte)
		defer joinBuffers.Put(b)
		buf = b[:]
	}
	n, err := stream.Read(buf)
	if n > 0 {
		j.answered.Store(true)
		written, err := j.client.Write(buf[:n])
		j.back.Add(int64(written))
		if err != nil {
			return false, clientError{err}
		}
	}
	if errors.Is(err, io.EOF) {
		return true, nil
	}
	return false, err
}

// endDown passes the end of the target's direction on. Where the client's has
// ended too, closing the connection does that with one call less.
func (j *joining) endDown() error {
	j.answered.Store(true)
	if j.sent.Load() {
		return nil
	}
	if err := j.client.CloseWrite(); err != nil {
		return clientError{err}
	}
	return nil
}
