package tunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// readAhead holds any frame but one with data, and small ones of those. The
// rest of a large one is read straight into the block that its reader gets.
const readAhead = 2 << 10

// reader takes frames from the connection: the tunnel's reading goroutine. It
// never waits for a stream's reader; what he has not taken is bounded by the
// window that he gave.
type reader struct {
	t     *Tunnel
	buf   [readAhead]byte
	r, w  int
	ready []*Stream // have something to read that their readers were not told of
}

func (in *reader) loop() error {
	defer in.wakeReaders()
	for {
		if err := in.need(headerLen); err != nil {
			return fmt.Errorf("read: %w", err)
		}
		h, err := parseHeader(in.buf[in.r:in.w])
		if err != nil {
			return err
		}
		in.r += headerLen
		if h.kind == kindData {
			err = in.data(h)
		} else {
			err = in.frame(h)
		}
		if err != nil {
			return err
		}
	}
}

// frame handles a frame without data.
func (in *reader) frame(h header) error {
	if err := in.need(h.n); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	payload := in.buf[in.r : in.r+h.n]
	in.r += h.n
	t := in.t
	switch h.kind {
	case kindOpen:
		return t.accept(h.id, string(payload))
	case kindPing:
		t.mu.Lock()
		t.pong = true
		copy(t.echo[:], payload)
		t.pushUnlock()
		return nil
	case kindPong:
		return nil
	}
	s, err := t.stream(h.id)
	if err != nil {
		return err
	}
	if h.kind == kindReset { // checked although the stream may be over
		e, err := parseReset(payload)
		if err != nil || s == nil {
			return err
		}
		s.wasReset(e)
		return nil
	}
	if s == nil {
		return nil
	}
	switch h.kind {
	case kindEnd:
		return s.peerEnded()
	case kindClose:
		s.peerClosed()
	case kindWindow:
		return s.moreCredit(int64(binary.BigEndian.Uint32(payload)))
	case kindBlocked:
		s.peerBlocked()
	}
	return nil
}

// data hands the payload of a data frame to its stream.
func (in *reader) data(h header) error {
	s, err := in.t.stream(h.id)
	if err != nil {
		return err
	}
	if s != nil {
		if err := s.expect(h.n); err != nil {
			return err
		}
	}
	if in.w-in.r >= h.n {
		if s != nil {
			s.copyIn(in.buf[in.r : in.r+h.n])
			in.tell(s)
		}
		in.r += h.n
		return nil
	}
	b := getBlockFor(h.n)
	b.w = copy(b.buf, in.buf[in.r:in.w])
	in.r, in.w = 0, 0
	for b.w < h.n {
		n, err := in.read(b.buf[b.w:h.n])
		b.w += n
		if err != nil {
			b.put()
			return fmt.Errorf("read: %w", unexpected(err))
		}
	}
	if s == nil {
		b.put()
		return nil
	}
	// A block goes to the stream as it is when it is well filled; else a
	// peer could make us hold far more memory than its window.
	if b.w >= len(b.buf)/2 {
		s.putIn(b)
	} else {
		s.copyIn(b.bytes())
		b.put()
	}
	in.tell(s)
	return nil
}

// need reads until n bytes are there, of which n is at most readAhead.
func (in *reader) need(n int) error {
	if in.w-in.r >= n {
		return nil
	}
	in.w = copy(in.buf[:], in.buf[in.r:in.w])
	in.r = 0
	for in.w < n {
		k, err := in.read(in.buf[in.w:])
		in.w += k
		if err != nil {
			if in.w > 0 || n != headerLen {
				err = unexpected(err)
			}
			return err
		}
	}
	return nil
}

func (in *reader) read(p []byte) (int, error) {
	if in.t.below == nil {
		in.wakeReaders()
	}
	n, err := in.t.conn.Read(p)
	if n > 0 {
		in.t.heard.Store(true)
	}
	return n, err
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// tell notes that the stream's reader is to be told. He is told when all that
// is there has been looked at, so that he finds as much as possible at once.
func (in *reader) tell(s *Stream) {
	if !s.told {
		s.told = true
		in.ready = append(in.ready, s)
	}
}

// wakeReaders is called before each read that may wait.
func (in *reader) wakeReaders() {
	for i, s := range in.ready {
		s.told = false
		s.arrived.Broadcast()
		in.ready[i] = nil
	}
	in.ready = in.ready[:0]
}
