package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// firstWindow is what a peer may send on a stream before anybody reads.
	firstWindow = 256 << 10
	// maxWindow is what that may grow to, where the reader is faster than
	// the way is long: 4 MiB are 1 Gbit/s at 32 ms.
	maxWindow = 4 << 20
	// smallWrite is copied into the queue under the tunnel's lock.
	smallWrite = 4<<10 - headerLen
)

// Stream is a connection to a target through a tunnel: a [net.Conn] with
// CloseWrite. Where the target's side refused or cut it, Read and Write return
// a *RefusedError; what arrived before can still be read.
//
// A Write returns when its bytes are queued; what is queued is still sent after
// Close.
type Stream struct {
	t         *Tunnel
	id        uint32 // given when announced
	target    string
	announced atomic.Bool
	cancel    context.CancelFunc // of the handler; nil at the client

	// Sending: under t.mu.
	out      sync.Cond // there is credit or room again
	credit   int64
	queued   int
	blocked  bool // the peer was told that the credit is used up
	sentEnd  bool
	gotEnd   bool
	sendErr  error
	writeBy  deadline
	whenOver func()

	// Receiving: under mu.
	mu       sync.Mutex
	arrived  sync.Cond
	in       blockList
	granted  int64 // bytes that the peer may still send
	window   int64
	taken    int64 // bytes read since the peer was last given more
	hungry   bool  // the peer was held up by the window
	recvErr  error // once in is empty; io.EOF after the peer's end
	closed   bool
	readBy   deadline
	told     bool // of the tunnel's reading goroutine
	reserved int64
}

var _ interface {
	net.Conn
	io.ReaderFrom
	io.WriterTo
	CloseWrite() error
} = (*Stream)(nil)

func newStream(t *Tunnel, target string) *Stream {
	s := &Stream{t: t, target: target, credit: firstWindow, granted: firstWindow, window: firstWindow}
	s.out.L = &t.mu
	s.arrived.L = &s.mu
	s.writeBy.cond = &s.out
	s.readBy.cond = &s.arrived
	return s
}

// Read implements [net.Conn].
func (s *Stream) Read(p []byte) (int, error) {
	s.announce()
	s.mu.Lock()
	if err := s.awaitLocked(len(p)); err != nil {
		s.mu.Unlock()
		return 0, err
	}
	n := 0
	for n < len(p) && s.in.head != nil {
		b := s.in.head
		k := copy(p[n:], b.bytes())
		b.r, s.in.n, n = b.r+k, s.in.n-k, n+k
		if b.r == b.w {
			s.in.pop().put()
		}
	}
	more := s.tookLocked(n)
	s.mu.Unlock()
	if more > 0 {
		s.t.window(s.id, more)
	}
	return n, nil
}

// awaitLocked waits until there is something to read.
func (s *Stream) awaitLocked(want int) error {
	for {
		switch {
		case s.closed:
			return net.ErrClosed
		case s.readBy.passed:
			return os.ErrDeadlineExceeded
		case s.in.n > 0 || want == 0:
			return nil
		case s.recvErr != nil:
			return s.recvErr
		}
		s.arrived.Wait()
	}
}

// tookLocked accounts for n bytes that were read, and returns how many more
// the peer is to be allowed to send.
func (s *Stream) tookLocked(n int) (more int64) {
	s.taken += int64(n)
	if s.recvErr != nil {
		return 0
	}
	s.growLocked()
	if s.taken < s.window/2 {
		return 0
	}
	more, s.taken = s.taken, 0
	s.granted += more
	return more
}

// growLocked widens the window where nothing else holds the peer up: it ran
// out of credit and the reader has emptied what came.
func (s *Stream) growLocked() {
	if !s.hungry || s.in.n > 0 {
		return
	}
	s.hungry = false
	if s.window < maxWindow && s.t.cfg.Budget.take(s.window) {
		s.reserved += s.window
		s.taken += s.window
		s.window *= 2
	}
}

// expect checks that a peer may send n bytes of data now.
func (s *Stream) expect(n int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if errors.Is(s.recvErr, io.EOF) {
		return fmt.Errorf("%w: data after the end of stream %d", errFrame, s.id)
	}
	if s.granted -= int64(n); s.granted < 0 {
		return fmt.Errorf("%w: more data on stream %d than its window", errFrame, s.id)
	}
	return nil
}

// copyIn takes data over from the tunnel.
func (s *Stream) copyIn(p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	for len(p) > 0 {
		b := s.in.tail
		if b == nil || b.room() == 0 {
			b = getBlockFor(max(len(p), s.in.n)) // as much again: few blocks, and little of them empty
			s.in.push(b)
		}
		n := copy(b.buf[b.w:], p)
		b.w, s.in.n, p = b.w+n, s.in.n+n, p[n:]
	}
}

// putIn takes a block with data over.
func (s *Stream) putIn(b *block) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		b.put()
		return
	}
	s.in.push(b)
}

// peerEnded: the peer sends no more.
func (s *Stream) peerEnded() error {
	s.mu.Lock()
	if s.recvErr != nil {
		s.mu.Unlock()
		return fmt.Errorf("%w: stream %d ends twice", errFrame, s.id)
	}
	s.recvErr = io.EOF
	s.arrived.Broadcast()
	s.mu.Unlock()
	s.t.mu.Lock()
	defer s.t.mu.Unlock()
	s.gotEnd = true
	s.removeIfOverLocked()
	return nil
}

// peerClosed: the peer neither sends nor reads any more.
func (s *Stream) peerClosed() {
	s.t.mu.Lock()
	s.stopLocked(ErrStopped)
	s.t.mu.Unlock()
	s.ended(io.EOF)
}

// wasReset: the peer refused or cut the stream.
func (s *Stream) wasReset(e *RefusedError) {
	s.t.mu.Lock()
	s.stopLocked(e)
	s.t.mu.Unlock()
	s.ended(e)
}

// moreCredit: the peer has room for n more bytes.
func (s *Stream) moreCredit(n int64) error {
	s.t.mu.Lock()
	defer s.t.mu.Unlock()
	if s.credit += n; s.credit > 1<<31 {
		return fmt.Errorf("%w: window of stream %d of more than 2 GiB", errFrame, s.id)
	}
	s.blocked = false
	s.out.Broadcast()
	return nil
}

// peerBlocked: the peer would send more if it could.
func (s *Stream) peerBlocked() {
	s.mu.Lock()
	s.hungry = s.recvErr == nil && !s.closed
	more := int64(0)
	if s.hungry {
		more = s.tookLocked(0)
	}
	s.mu.Unlock()
	if more > 0 {
		s.t.window(s.id, more)
	}
}

// stopLocked ends sending and takes the stream out of the tunnel.
func (s *Stream) stopLocked(err error) {
	if s.sendErr == nil {
		s.sendErr = err
	}
	if s.whenOver != nil {
		go s.whenOver()
		s.whenOver = nil
	}
	s.out.Broadcast()
	delete(s.t.fresh, s)
	s.dropLocked()
}

// onStop has f called when sending has ended otherwise than by CloseWrite.
func (s *Stream) onStop(f func()) {
	s.t.mu.Lock()
	defer s.t.mu.Unlock()
	if s.sendErr != nil && f != nil {
		go f()
		return
	}
	s.whenOver = f
}

// stopped returns why sending has ended otherwise than by CloseWrite.
func (s *Stream) stopped() error {
	s.t.mu.Lock()
	defer s.t.mu.Unlock()
	return s.sendErr
}

func (s *Stream) dropLocked() {
	if s.t.streams[s.id] == s {
		delete(s.t.streams, s.id)
	}
	if s.cancel != nil {
		s.cancel()
	}
}

func (s *Stream) removeIfOverLocked() {
	if s.sentEnd && s.gotEnd {
		delete(s.t.streams, s.id)
	}
}

// ended ends receiving: err is what comes after that which is there.
func (s *Stream) ended(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.recvErr == nil {
		s.recvErr = err
	}
	s.arrived.Broadcast()
	s.returnBudgetLocked()
}

func (s *Stream) returnBudgetLocked() {
	s.t.cfg.Budget.give(s.reserved)
	s.reserved = 0
}

// announce tells the server of the stream, once. It lets others run first: a
// first Write that is about to happen takes the news along.
func (s *Stream) announce() {
	if s.announced.Load() {
		return
	}
	runtime.Gosched()
	if s.announced.Load() {
		return
	}
	s.t.mu.Lock()
	s.t.announceLocked(s)
	s.t.pushUnlock()
}

// reserve waits until something may be sent and returns how many of n bytes.
func (s *Stream) reserve(n int) (int, error) {
	t := s.t
	t.mu.Lock()
	for {
		switch {
		case s.sendErr != nil:
			defer t.mu.Unlock()
			return 0, s.sendErr
		case s.sentEnd:
			t.mu.Unlock()
			return 0, net.ErrClosed
		case s.writeBy.passed:
			t.mu.Unlock()
			return 0, os.ErrDeadlineExceeded
		case s.credit > 0 && s.queued < perStream:
			n = min(n, int(s.credit))
			s.credit -= int64(n)
			s.queued += n
			t.mu.Unlock()
			return n, nil
		}
		if s.credit == 0 && !s.blocked {
			s.blocked = true
			t.announceLocked(s)
			t.frameLocked(header{kindBlocked, s.id, 0}) // in order: it must not overtake the open frame
			t.pushUnlock()
			t.mu.Lock()
			continue
		}
		s.out.Wait()
	}
}

// unreserve gives back what was reserved and not used.
func (s *Stream) unreserve(n int) {
	if n == 0 {
		return
	}
	s.t.mu.Lock()
	defer s.t.mu.Unlock()
	s.credit += int64(n)
	s.queued -= n
	s.out.Broadcast()
}

// writtenLocked: n bytes have left the queue.
func (s *Stream) writtenLocked(n int) {
	full := s.queued >= perStream
	s.queued -= n
	if full {
		s.out.Broadcast()
	}
}

// sendBlock queues a block that begins with room for a header, followed by n
// bytes that were reserved.
func (s *Stream) sendBlock(b *block, n int) error {
	t := s.t
	t.mu.Lock()
	if s.sendErr != nil || s.sentEnd {
		err := s.sendErr
		s.queued -= n
		t.mu.Unlock()
		b.put()
		if err == nil {
			err = net.ErrClosed
		}
		return err
	}
	t.announceLocked(s)
	putHeader(b.buf, header{kindData, s.id, n})
	b.w = headerLen + n
	b.own(s, n)
	t.queue.push(b)
	t.pushUnlock()
	return nil
}

// sendSmall queues a copy of p, which was reserved.
func (s *Stream) sendSmall(p []byte) error {
	t := s.t
	t.mu.Lock()
	defer t.pushUnlock()
	if s.sendErr != nil || s.sentEnd {
		s.queued -= len(p)
		if s.sendErr != nil {
			return s.sendErr
		}
		return net.ErrClosed
	}
	t.announceLocked(s)
	copy(t.frameLocked(header{kindData, s.id, len(p)}), p)
	t.queue.tail.own(s, len(p))
	return nil
}

// Write implements [net.Conn].
func (s *Stream) Write(p []byte) (written int, err error) {
	for len(p) > 0 {
		n, err := s.reserve(min(len(p), MaxPayload))
		if err != nil {
			return written, err
		}
		if n <= smallWrite {
			err = s.sendSmall(p[:n])
		} else {
			b := getBlockFor(headerLen + n)
			copy(b.buf[headerLen:], p[:n])
			err = s.sendBlock(b, n)
		}
		if err != nil {
			return written, err
		}
		written, p = written+n, p[n:]
	}
	return written, nil
}

// CloseWrite ends our direction; reading goes on.
func (s *Stream) CloseWrite() error {
	t := s.t
	t.mu.Lock()
	defer t.pushUnlock()
	switch {
	case s.sendErr != nil:
		return s.sendErr
	case s.sentEnd:
		return nil
	}
	t.announceLocked(s)
	s.sentEnd = true
	t.frameLocked(header{kindEnd, s.id, 0})
	s.out.Broadcast()
	s.removeIfOverLocked()
	return nil
}

// Close ends both directions. What was written is still sent; what arrived and
// was not read is dropped.
func (s *Stream) Close() error {
	s.closeRead()
	t := s.t
	t.mu.Lock()
	defer t.pushUnlock()
	if s.sendErr == nil && s.announced.Load() && !(s.sentEnd && s.gotEnd) {
		k := kindClose
		if s.gotEnd {
			k = kindEnd
		}
		t.frameLocked(header{k, s.id, 0})
	}
	s.stopLocked(net.ErrClosed)
	return nil
}

// Refuse ends the stream at once, in both directions, and tells the other end
// why. Either end may call it, before data or after.
func (s *Stream) Refuse(code Code, reason string) {
	t := s.t
	t.mu.Lock()
	if s.sendErr == nil && s.announced.Load() && !(s.sentEnd && s.gotEnd) {
		t.resetLocked(s.id, &RefusedError{Code: code, Reason: reason})
	}
	s.stopLocked(net.ErrClosed)
	t.pushUnlock()
	s.closeRead()
}

func (s *Stream) closeRead() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.in.drop()
	s.arrived.Broadcast()
	s.returnBudgetLocked()
	s.readBy.stop()
}

// LocalAddr implements [net.Conn].
func (s *Stream) LocalAddr() net.Addr { return s.t.conn.LocalAddr() }

// RemoteAddr implements [net.Conn]: it is the target's name.
func (s *Stream) RemoteAddr() net.Addr { return targetAddr(s.target) }

type targetAddr string

func (targetAddr) Network() string  { return "sallyport" }
func (a targetAddr) String() string { return string(a) }

// SetDeadline implements [net.Conn].
func (s *Stream) SetDeadline(t time.Time) error {
	s.readBy.set(t)
	s.writeBy.set(t)
	return nil
}

// SetReadDeadline implements [net.Conn].
func (s *Stream) SetReadDeadline(t time.Time) error {
	s.readBy.set(t)
	return nil
}

// SetWriteDeadline implements [net.Conn].
func (s *Stream) SetWriteDeadline(t time.Time) error {
	s.writeBy.set(t)
	return nil
}

// deadline wakes those who wait on cond when it passes; cond.L guards it.
type deadline struct {
	cond   *sync.Cond
	passed bool
	timer  *time.Timer
}

func (d *deadline) set(at time.Time) {
	d.cond.L.Lock()
	defer d.cond.L.Unlock()
	d.stop()
	d.passed = false
	if at.IsZero() {
		return
	}
	wait := time.Until(at)
	if wait <= 0 {
		d.passed = true
		d.cond.Broadcast()
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(wait, func() {
		d.cond.L.Lock()
		defer d.cond.L.Unlock()
		if d.timer == timer { // else it was moved meanwhile
			d.passed = true
			d.cond.Broadcast()
		}
	})
	d.timer = timer
}

// stop is called with cond.L held.
func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
}
