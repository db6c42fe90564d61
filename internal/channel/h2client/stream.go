package h2client

import (
	"context"
	"io"
	"net/http"
)

// Stream is one request and its response. As [http.Response.Body] it is read
// and closed; that of [Conn.Connect] is written too. It holds no buffer but what
// has arrived and is unread. One Read and one Write may run at a time, and Close
// at any.
type Stream struct {
	c  *Conn
	id uint32

	// All below is guarded by the lock of the connection.
	sendWin int
	recvWin int
	credit  int  // read, not yet given back
	sent    bool // END_STREAM: nothing more is sent
	ended   bool // the peer has sent END_STREAM
	gone    bool // neither side sends any more
	tunnel  bool // a CONNECT
	bare    bool // a HEAD: no body, whatever the header says

	answered bool
	infos    int // responses with status 1xx
	status   int
	header   http.Header
	length   int64
	left     int64 // of the body, if Content-Length said so; below 0: no limit

	buf  buffer
	err  error // what Read returns when buf is empty
	werr error // what Write returns
	wait chan struct{}
	news func() // of Notify

	body *sentBody   // that is being sent
	stop func() bool // of the context that cancels it
}

func (s *Stream) waitLocked() <-chan struct{} {
	if s.wait == nil {
		s.wait = make(chan struct{})
	}
	return s.wait
}

func (s *Stream) wakeLocked() {
	if s.wait != nil {
		close(s.wait)
		s.wait = nil
	}
	if s.news != nil && (s.buf.n > 0 || s.err != nil) {
		go s.news()
		s.news = nil
	}
}

// endLocked ends both directions. What has been received can still be read.
func (s *Stream) endLocked(err error) {
	if s.gone {
		return
	}
	s.gone, s.sent = true, true
	if s.err == nil {
		s.err = err
	}
	if s.werr == nil {
		s.werr = err
	}
	delete(s.c.streams, s.id)
	s.c.releaseLocked()
	s.wakeLocked()
	if s.body != nil {
		go s.body.Close() // it may wait for its reader
		s.body = nil
	}
	if s.stop != nil {
		s.stop()
		s.stop = nil
	}
}

// resetLocked ends a stream with RST_STREAM.
func (s *Stream) resetLocked(code ErrCode, err error) {
	if s.gone {
		return
	}
	s.c.control = appendReset(s.c.control, s.id, code)
	s.endLocked(err)
}

// cancel ends a stream that nobody wants any more.
func (s *Stream) cancel(err error) {
	s.c.mu.Lock()
	s.resetLocked(CodeCancel, err)
	s.c.mu.Unlock()
	s.c.kick()
}

// endedLocked is called with END_STREAM of the peer.
func (s *Stream) endedLocked() {
	s.ended = true
	s.err = io.EOF
	if s.left > 0 {
		s.err = io.ErrUnexpectedEOF
	}
	switch {
	case s.sent:
		s.endLocked(nil)
	case s.status > 299: // it does not want the rest of the body
		s.resetLocked(CodeCancel, errWriteEnded)
	}
	s.wakeLocked()
}

// Read implements [io.Reader]. A read of no bytes returns when there is
// something to read, or nothing more will come.
func (s *Stream) Read(p []byte) (int, error) {
	for {
		n, wait, err := s.read(p)
		if wait == nil {
			if n > 0 && s.c.queued() {
				s.c.flush()
			}
			return n, err
		}
		<-wait
	}
}

// TryRead does not wait. Where there is nothing to read it returns what to wait
// for; that also ends for other reasons.
func (s *Stream) TryRead(p []byte) (n int, wait <-chan struct{}, err error) {
	n, wait, err = s.read(p)
	if n > 0 && s.c.queued() {
		s.c.kick()
	}
	return n, wait, err
}

// Notify calls f, once and in a goroutine of its own, when there is something to
// read or nothing more will come: nobody has to wait. Where that is so already it
// does not, and returns false. It is for the one who reads.
func (s *Stream) Notify(f func()) (later bool) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if s.buf.n > 0 || s.err != nil {
		return false
	}
	s.news = f
	return true
}

func (s *Stream) read(p []byte) (n int, wait <-chan struct{}, err error) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	switch {
	case s.buf.n > 0:
		n = s.buf.read(p)
		s.c.takenLocked(s, n)
		return n, nil, nil
	case s.err != nil:
		return 0, nil, s.err
	}
	return 0, s.waitLocked(), nil
}

// Close ends the stream: with RST_STREAM unless both sides are through.
func (s *Stream) Close() error {
	s.c.mu.Lock()
	s.c.takenLocked(nil, s.buf.drop())
	s.resetLocked(CodeCancel, errBodyClosed)
	s.err = errBodyClosed
	s.c.mu.Unlock()
	s.c.kick()
	return nil
}

// Write implements [io.Writer]. It waits for the peer's window, and for the
// connection below; it returns when the last frame was handed to that.
func (s *Stream) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	return s.send(p, false)
}

// CloseWrite tells the peer that nothing more comes.
func (s *Stream) CloseWrite() error {
	_, err := s.send(nil, true)
	return err
}

func (s *Stream) send(p []byte, end bool) (sent int, err error) {
	for {
		if len(p) > 0 {
			if err := s.waitWindow(); err != nil {
				return sent, err
			}
		}
		if err := s.c.lock(patience{ctx: context.Background()}); err != nil {
			return sent, err
		}
		n, done, err := s.sendFrame(p, end)
		s.c.unlock()
		p, sent = p[n:], sent+n
		if done || err != nil {
			return sent, err
		}
	}
}

// waitWindow waits until something can be sent.
func (s *Stream) waitWindow() error {
	for {
		s.c.mu.Lock()
		if s.werr != nil || s.sendWin > 0 && s.c.sendWin > 0 {
			defer s.c.mu.Unlock()
			return s.werr
		}
		wait := s.waitLocked()
		s.c.mu.Unlock()
		<-wait
	}
}

// sendFrame sends what the windows allow, at most one frame. The caller has the
// turn to write. done: that was all of p, and the end if it is one.
func (s *Stream) sendFrame(p []byte, end bool) (n int, done bool, err error) {
	c := s.c
	c.mu.Lock()
	if s.werr != nil {
		defer c.mu.Unlock()
		return 0, false, s.werr
	}
	n = max(min(len(p), maxData, s.sendWin, c.sendWin), 0)
	done = n == len(p)
	if n == 0 && !done {
		c.mu.Unlock()
		return 0, false, nil
	}
	s.sendWin -= n
	c.sendWin -= n
	out := takeOut()
	b := c.controlLocked(*out)
	if end && done {
		s.sent, s.werr = true, errWriteEnded
		if s.ended {
			s.endLocked(nil)
		}
	}
	c.mu.Unlock()
	b = appendData(b, s.id, p[:n], end && done)
	c.write(b)
	putOut(out, b)
	return n, done, c.Err()
}
