package h2client

import (
	"errors"
	"fmt"
	"io"
	"time"
)

const (
	// A peer may send maxIdleFrames frames in idleFramesTime that carry nothing:
	// empty DATA, PING, SETTINGS, unknown types (CVE-2019-9512, 9515, 9518).
	maxIdleFrames  = 1000
	idleFramesTime = int64(10 * time.Second)
	// maxContinuations is in how many further frames a header block may come
	// (CVE-2024-27316).
	maxContinuations = 32
	// maxInfos is how many responses with status 1xx may precede the real one.
	maxInfos = 16
	// busyFrame is how large a frame is after which the next is read for without
	// awaiting it first: that would cost a system call for each frame of bulk.
	busyFrame = 1 << 10
	// maxDebug is how much is kept of the words of a GOAWAY.
	maxDebug = 48
)

// readState belongs to the read loop.
type readState struct {
	scratch    [maxDebug]byte
	idle       int   // frames that carried nothing
	idleSince  int64 // when the count began
	haveAnswer bool  // the first frame has come
}

// run is the read loop, the only goroutine that a connection keeps. It never
// waits for anything but the peer's next bytes.
func (c *Conn) run() {
	for rests := true; ; {
		if rests && c.cfg.Await != nil {
			c.cfg.Await()
		}
		h, err := c.readHeader()
		rests = h.length < busyFrame
		if err == nil {
			err = c.readFrame(h)
		}
		if err != nil {
			c.fail(lost(err))
			return
		}
	}
}

func (c *Conn) readHeader() (frameHeader, error) {
	b, err := c.readBytes(frameHeaderLen)
	if err != nil {
		return frameHeader{}, err
	}
	c.lastRead.Store(c.now())
	h := parseFrameHeader(b)
	switch {
	case h.length > maxFrame:
		return h, broken(CodeFrameSize, "frame above the limit")
	case !c.read.haveAnswer && (h.typ != frameSettings || h.has(flagAck)):
		return h, broken(CodeProtocol, "the first frame is not SETTINGS")
	}
	c.read.haveAnswer = true
	return h, nil
}

// readBytes reads n bytes that are good until the next call.
func (c *Conn) readBytes(n int) ([]byte, error) {
	b := c.read.scratch[:n]
	_, err := io.ReadFull(c.nc, b)
	return b, err
}

func (c *Conn) discard(n int) error {
	for n > 0 {
		k := min(n, len(c.read.scratch))
		if _, err := c.readBytes(k); err != nil {
			return err
		}
		n -= k
	}
	return nil
}

func (c *Conn) readFrame(h frameHeader) error {
	switch h.typ {
	case frameData:
		return c.readData(h)
	case frameHeaders:
		return c.readHeaders(h)
	case frameSettings:
		return c.readSettings(h)
	case framePing:
		return c.readPing(h)
	case frameRSTStream:
		return c.readReset(h)
	case frameWindowUpdate:
		return c.readWindowUpdate(h)
	case frameGoAway:
		return c.readGoAway(h)
	case framePushPromise:
		return broken(CodeProtocol, "PUSH_PROMISE, which we have forbidden")
	case frameContinuation:
		return broken(CodeProtocol, "CONTINUATION without HEADERS")
	case framePriority:
		if h.length != 5 || h.id == 0 {
			return broken(CodeFrameSize, "malformed PRIORITY")
		}
	}
	if err := c.idled(); err != nil {
		return err
	}
	return c.discard(h.length)
}

// idled counts a frame that carries nothing.
func (c *Conn) idled() error {
	if now := c.lastRead.Load(); now-c.read.idleSince > idleFramesTime {
		c.read.idle, c.read.idleSince = 0, now
	}
	if c.read.idle++; c.read.idle > maxIdleFrames {
		return broken(CodeEnhanceYourCalm, "a flood of frames that carry nothing")
	}
	return nil
}

// begunLocked tells whether a stream of this number was ever begun.
func (c *Conn) begunLocked(id uint32) bool { return id%2 == 1 && id < c.nextID }

// padding reads how much of a frame is padding; rest is the length without it.
func (c *Conn) padding(h frameHeader) (pad, rest int, err error) {
	if !h.has(flagPadded) {
		return 0, h.length, nil
	}
	if h.length < 1 {
		return 0, 0, broken(CodeFrameSize, "padded frame without a length of padding")
	}
	b, err := c.readBytes(1)
	if err != nil {
		return 0, 0, err
	}
	pad = int(b[0])
	if rest = h.length - 1 - pad; rest < 0 {
		return 0, 0, broken(CodeProtocol, "more padding than frame")
	}
	return pad, rest, nil
}

func (c *Conn) readData(h frameHeader) error {
	pad, n, err := c.padding(h)
	if err != nil {
		return err
	}
	if n == 0 && !h.has(flagEndStream) {
		if err := c.idled(); err != nil {
			return err
		}
	}
	s, err := c.dataBegins(h, n)
	if err != nil {
		return err
	}
	if err := c.fill(s, n); err != nil {
		return err
	}
	if err := c.discard(pad); err != nil {
		return err
	}
	c.mu.Lock()
	if s != nil && h.has(flagEndStream) && !s.gone {
		s.endedLocked()
	}
	queued := len(c.control) > 0
	c.mu.Unlock()
	if queued {
		c.kick()
	}
	return nil
}

// dataBegins takes the frame out of the windows, padding included, and finds
// the stream. It returns none for data that nobody wants any more.
func (c *Conn) dataBegins(h frameHeader, n int) (*Stream, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.begunLocked(h.id) {
		return nil, broken(CodeProtocol, "DATA for a stream that was not begun")
	}
	if c.recvWin -= h.length; c.recvWin < 0 {
		return nil, broken(CodeFlowControl, "more data than the connection's window")
	}
	s := c.streams[h.id]
	var why string
	code := CodeProtocol
	switch {
	case s == nil:
	case s.ended:
		code, why = CodeStreamClosed, "DATA after its end"
	case !s.answered:
		why = "DATA before the response"
	case h.length > s.recvWin:
		code, why = CodeFlowControl, "more data than the stream's window"
	case s.left >= 0 && int64(n) > s.left:
		why = "more data than Content-Length"
	default:
		s.recvWin -= h.length
		if s.left >= 0 {
			s.left -= int64(n)
		}
		c.takenLocked(s, h.length-n)
		return s, nil
	}
	if s != nil {
		s.resetLocked(code, &StreamError{Code: code, Reason: why})
	}
	c.takenLocked(nil, h.length)
	return nil, nil
}

// fill reads n bytes into the stream's buffer; without a stream, or once that
// was closed, nowhere. What has arrived is there for the reader at once.
func (c *Conn) fill(s *Stream, n int) error {
	if s == nil {
		return c.discard(n)
	}
	for n > 0 {
		c.mu.Lock()
		if s.buf.dropped {
			c.takenLocked(nil, n)
			c.mu.Unlock()
			return c.discard(n)
		}
		room := s.buf.room(n)
		c.mu.Unlock()
		k, err := c.nc.Read(room)
		c.mu.Lock()
		s.buf.filled(k)
		if s.buf.dropped {
			c.takenLocked(nil, s.buf.drop())
		}
		if k > 0 {
			s.wakeLocked()
		}
		c.mu.Unlock()
		if n -= k; err != nil && n > 0 {
			return err
		}
	}
	return nil
}

func (c *Conn) readHeaders(h frameHeader) error {
	pad, n, err := c.padding(h)
	if err != nil {
		return err
	}
	if h.has(flagPriority) {
		if n -= 5; n < 0 {
			return broken(CodeFrameSize, "malformed HEADERS")
		}
		if _, err := c.readBytes(5); err != nil {
			return err
		}
	}
	p := takePiece(n)
	defer p.release()
	block := p.b[:n]
	if _, err := io.ReadFull(c.nc, block); err != nil {
		return err
	}
	if err := c.discard(pad); err != nil {
		return err
	}
	if !h.has(flagEndHeaders) {
		if block, err = c.readContinuations(h.id, block); err != nil {
			return err
		}
	}
	return c.headers(h, block)
}

// readContinuations reads the rest of a header block. It may be twice as large
// as what it stands for, which no sane encoder makes of it.
func (c *Conn) readContinuations(id uint32, block []byte) ([]byte, error) {
	block = append([]byte(nil), block...)
	for range maxContinuations {
		h, err := c.readHeader()
		if err != nil {
			return nil, err
		}
		if h.typ != frameContinuation || h.id != id {
			return nil, broken(CodeProtocol, "a header block without its end")
		}
		if len(block)+h.length > 2*c.cfg.MaxHeader {
			return nil, broken(CodeEnhanceYourCalm, "header block above the limit")
		}
		p := takePiece(h.length)
		_, err = io.ReadFull(c.nc, p.b[:h.length])
		block = append(block, p.b[:h.length]...)
		p.release()
		if err != nil || h.has(flagEndHeaders) {
			return block, err
		}
	}
	return nil, broken(CodeEnhanceYourCalm, "header block in too many frames")
}

// headers takes the header block of a response, or its trailers, in.
func (c *Conn) headers(h frameHeader, block []byte) error {
	c.mu.Lock()
	begun, s := c.begunLocked(h.id), c.streams[h.id]
	trailers := s != nil && s.answered
	c.mu.Unlock()
	switch {
	case !begun:
		return broken(CodeProtocol, "HEADERS for a stream that was not begun")
	case s == nil: // it was reset; without a table nothing has to be kept up with
		return nil
	}
	status, header, length, err := decode(block, c.cfg.MaxHeader, trailers)
	if err != nil && !errors.Is(err, errBlock) && !errors.Is(err, ErrTooLarge) {
		return broken(CodeCompression, err.Error())
	}
	end := h.has(flagEndStream)
	c.mu.Lock()
	defer func() {
		queued := len(c.control) > 0
		c.mu.Unlock()
		if queued {
			c.kick()
		}
	}()
	reset := func(code ErrCode, why string) error {
		s.resetLocked(code, &StreamError{Code: code, Reason: why})
		return nil
	}
	switch {
	case s.gone:
		return nil
	case s.ended:
		return reset(CodeStreamClosed, "HEADERS after its end")
	case errors.Is(err, ErrTooLarge):
		s.resetLocked(CodeCancel, err)
		return nil
	case err != nil:
		s.resetLocked(CodeProtocol, err)
		return nil
	case trailers && !end:
		return reset(CodeProtocol, "HEADERS in the middle of a response")
	case trailers:
		s.endedLocked()
		return nil
	case status < 200:
		if s.infos++; end || status == 101 || s.infos > maxInfos {
			return reset(CodeProtocol, fmt.Sprintf("malformed response with status %d", status))
		}
		return c.idled()
	}
	s.answered, s.status, s.header, s.length = true, status, header, length
	switch {
	case s.tunnel && status < 300:
		s.length = -1
	case s.bare, status == 204, status == 304:
		s.left = 0
	default:
		s.left = length
	}
	if end {
		s.endedLocked()
	}
	s.wakeLocked()
	return nil
}
