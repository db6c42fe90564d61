package channel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// linger is how long a closed stream may take to hand its last bytes over, and
// then for the other side to end too, before it is cut.
const linger = 5 * time.Second

// chunkSize is the largest piece in which a stream moves data: two DATA frames.
const chunkSize = 2 * recordPayload

var chunks = sync.Pool{New: func() any { b := make([]byte, chunkSize); return &b }}

// stream makes a [net.Conn] of the two halves of a CONNECT. HTTP bodies know no
// deadline that one can recover from, so the blocking calls run in goroutines
// that live only while a call is in flight; an idle stream holds no buffer.
//
// At most one Read of body and one Write of w run at a time.
type stream struct {
	body          io.Reader // zero-length reads wait for data
	poll          poller    // body, if it is one: then no goroutine reads
	w             io.Writer // writes and flushes
	local, remote net.Addr
	readBy        deadline
	writeBy       deadline
	turn          chan struct{} // holds one token: whose turn it is to write

	once   sync.Once
	closed chan struct{}
	ended  chan struct{}  // closed when Close has done all that it does
	end    func(*stream)  // the part of Close that differs between the two ends
	calls  sync.WaitGroup // fill and flush

	mu      sync.Mutex
	reading chan struct{} // closed when the read in flight has ended; nil: none
	chunk   *[]byte       // of pending
	pending []byte        // read, not yet taken
	readErr error
	writing chan struct{} // likewise for the write in flight
	wrote   error         // of the last write
}

// poller is a body that can tell what to wait for.
type poller interface {
	TryRead(p []byte) (n int, wait <-chan struct{}, err error)
}

func newStream(body io.Reader, w io.Writer, local, remote net.Addr, end func(*stream)) *stream {
	s := &stream{body: body, w: w, local: local, remote: remote, end: end,
		turn: make(chan struct{}, 1), closed: make(chan struct{}), ended: make(chan struct{})}
	s.turn <- struct{}{}
	return s
}

func (s *stream) Read(p []byte) (int, error) {
	for {
		if s.readBy.exceeded() && !s.isClosed() {
			return 0, os.ErrDeadlineExceeded
		}
		n, wait, err := s.take(p)
		if wait == nil {
			return n, err
		}
		select {
		case <-wait:
		case <-s.closed:
		case <-s.readBy.wait():
		}
	}
}

// take returns what is there; else it makes sure that a read is in flight and
// returns what to wait for.
func (s *stream) take(p []byte) (n int, wait <-chan struct{}, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.isClosed():
		return 0, nil, net.ErrClosed
	case len(s.pending) > 0:
		n = copy(p, s.pending)
		if s.pending = s.pending[n:]; len(s.pending) == 0 {
			s.dropLocked()
		}
		return n, nil, nil
	case s.readErr != nil:
		return 0, nil, s.readErr
	case len(p) == 0:
		return 0, nil, nil
	case s.poll != nil:
		n, wait, err = s.poll.TryRead(p)
		s.readErr = outerError(err)
		return n, wait, s.readErr
	}
	return 0, s.fillLocked(), nil
}

func (s *stream) dropLocked() {
	s.pending = nil
	if s.chunk != nil {
		chunks.Put(s.chunk)
		s.chunk = nil
	}
}

func (s *stream) fillLocked() <-chan struct{} {
	if s.reading == nil {
		s.reading = make(chan struct{})
		s.calls.Go(s.fill)
	}
	return s.reading
}

// fill reads once. It takes a buffer only when there is something to read.
func (s *stream) fill() {
	_, err := s.body.Read(nil)
	var chunk *[]byte
	var n int
	if err == nil {
		chunk = chunks.Get().(*[]byte)
		n, err = s.body.Read(*chunk)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if n > 0 {
		s.chunk, s.pending = chunk, (*chunk)[:n]
	} else if chunk != nil {
		chunks.Put(chunk)
	}
	s.readErr = outerError(err)
	close(s.reading)
	s.reading = nil
}

// outerError hides the type of an error of the carrier, not its meaning. The
// HTTP/2 of a session inside the stream would take an http2.StreamError, which
// it looks for by type, for one about a stream of its own, and read on for ever.
func outerError(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	return fmt.Errorf("stream: %w", err)
}

// Write returns when the last piece of p is on its way, at most chunkSize
// bytes of which may still wait for the peer's window. An error of that piece
// is returned by the next call.
func (s *stream) Write(p []byte) (int, error) {
	if err := s.wait(s.turn); err != nil {
		return 0, err
	}
	defer func() { s.turn <- struct{}{} }()
	written := 0
	for {
		if s.writeBy.exceeded() && !s.isClosed() {
			return written, os.ErrDeadlineExceeded
		}
		s.mu.Lock()
		if s.isClosed() {
			s.mu.Unlock()
			return written, net.ErrClosed
		}
		if s.wrote != nil {
			defer s.mu.Unlock()
			return written, s.wrote
		}
		busy := s.writing
		if busy == nil {
			if len(p) == 0 {
				s.mu.Unlock()
				return written, nil
			}
			chunk := chunks.Get().(*[]byte)
			n := copy(*chunk, p)
			p, written = p[n:], written+n
			s.writing = make(chan struct{})
			s.calls.Go(func() { s.flush(chunk, n) })
		}
		s.mu.Unlock()
		switch {
		case len(p) == 0:
			return written, nil
		case busy != nil:
			if err := s.wait(busy); err != nil {
				return written, err
			}
		}
	}
}

func (s *stream) flush(chunk *[]byte, n int) {
	_, err := s.w.Write((*chunk)[:n])
	chunks.Put(chunk)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wrote = outerError(err)
	close(s.writing)
	s.writing = nil
}

// wait waits for c, the write deadline or the end of the stream.
func (s *stream) wait(c <-chan struct{}) error {
	if s.writeBy.exceeded() {
		return os.ErrDeadlineExceeded
	}
	select {
	case <-c:
		return nil
	case <-s.closed:
		return net.ErrClosed
	case <-s.writeBy.wait():
		return os.ErrDeadlineExceeded
	}
}

func (s *stream) isClosed() bool {
	select {
	case <-s.closed:
		return true
	default:
		return false
	}
}

// Close ends both directions; bytes that were written are handed over first.
func (s *stream) Close() error {
	s.once.Do(func() {
		s.mu.Lock() // no call starts after this
		close(s.closed)
		s.mu.Unlock()
		s.readBy.stop()
		s.writeBy.stop()
		s.end(s)
	})
	return nil
}

// drainWrite waits for the write in flight and tells whether it succeeded.
func (s *stream) drainWrite(ctx context.Context) bool {
	for {
		s.mu.Lock()
		busy, err := s.writing, s.wrote
		s.mu.Unlock()
		if err != nil {
			return false
		}
		if busy == nil {
			return true
		}
		select {
		case <-busy:
		case <-ctx.Done():
			return false
		}
	}
}

// discard reads to the peer's end in the background, so that a peer that wants
// to be rid of its bytes before it reads ours is not waited for in vain.
func (s *stream) discard(ctx context.Context) (ended <-chan struct{}) {
	done := make(chan struct{})
	s.calls.Go(func() {
		defer close(done)
		s.drainRead(ctx)
	})
	return done
}

// drainRead discards until the peer ends too.
func (s *stream) drainRead(ctx context.Context) {
	if s.poll != nil {
		s.drainPoll(ctx)
		return
	}
	for {
		s.mu.Lock()
		s.dropLocked()
		if s.readErr != nil {
			s.mu.Unlock()
			return
		}
		busy := s.fillLocked()
		s.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return
		}
	}
}

func (s *stream) drainPoll(ctx context.Context) {
	var wait <-chan struct{}
	for err := error(nil); err == nil; {
		chunk := chunks.Get().(*[]byte)
		for wait = nil; err == nil && wait == nil; {
			s.mu.Lock()
			_, wait, err = s.poll.TryRead(*chunk)
			s.mu.Unlock()
		}
		chunks.Put(chunk)
		if err != nil {
			return
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return
		}
	}
}

// release waits for the calls in flight, which the caller has unblocked, and
// gives the buffer back.
func (s *stream) release() {
	s.calls.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropLocked()
	close(s.ended)
}

func (s *stream) LocalAddr() net.Addr  { return s.local }
func (s *stream) RemoteAddr() net.Addr { return s.remote }

func (s *stream) SetDeadline(t time.Time) error {
	if s.isClosed() {
		return net.ErrClosed
	}
	s.readBy.set(t)
	s.writeBy.set(t)
	return nil
}

func (s *stream) SetReadDeadline(t time.Time) error {
	if s.isClosed() {
		return net.ErrClosed
	}
	s.readBy.set(t)
	return nil
}

func (s *stream) SetWriteDeadline(t time.Time) error {
	if s.isClosed() {
		return net.ErrClosed
	}
	s.writeBy.set(t)
	return nil
}

// streamAddr names the end of a stream: the authority that was asked for.
type streamAddr string

func (streamAddr) Network() string  { return "sallyport" }
func (a streamAddr) String() string { return string(a) }
