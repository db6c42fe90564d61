package h2client

import (
	"encoding/binary"
	"fmt"
	"strings"
)

func (c *Conn) readSettings(h frameHeader) error {
	switch {
	case h.id != 0:
		return broken(CodeProtocol, "SETTINGS on a stream")
	case h.has(flagAck) && h.length != 0, h.length%6 != 0:
		return broken(CodeFrameSize, "malformed SETTINGS")
	}
	if err := c.idled(); err != nil || h.has(flagAck) {
		return err
	}
	window := -1
	for range h.length / 6 {
		b, err := c.readBytes(6)
		if err != nil {
			return err
		}
		id, v := binary.BigEndian.Uint16(b), binary.BigEndian.Uint32(b[2:])
		if err := c.setting(id, v); err != nil {
			return err
		}
		if id == settingInitialWindowSize {
			window = int(v)
		}
	}
	c.mu.Lock()
	// Once for a frame, in which it may stand 2,730 times: it is work for all streams.
	if window >= 0 {
		if err := c.resizeLocked(window); err != nil {
			c.mu.Unlock()
			return err
		}
	}
	first := !c.settled
	if first {
		c.settled = true
		if !c.limited {
			c.maxStreams = maxStreamID
		}
	}
	c.admitLocked()
	c.control = frameHeader{typ: frameSettings, flags: flagAck}.append(c.control)
	err := c.ackLocked()
	c.mu.Unlock()
	// That we have understood the peer's first settings can go along with the
	// second request, as the preface went with the first one.
	if !first || !c.cfg.Late {
		c.kick()
	}
	return err
}

func (c *Conn) setting(id uint16, v uint32) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch id {
	case settingEnablePush:
		if v != 0 { // RFC 9113 section 6.5.2: of a server
			return broken(CodeProtocol, "SETTINGS_ENABLE_PUSH")
		}
	case settingMaxConcurrentStreams:
		c.limited = true
		c.maxStreams = int(min(v, maxStreamID))
	case settingInitialWindowSize:
		if v > maxWindow {
			return broken(CodeFlowControl, "SETTINGS_INITIAL_WINDOW_SIZE above the limit")
		}
	case settingMaxFrameSize: // we send none above the least that it may ask for
		if v < maxFrame || v > 1<<24-1 {
			return broken(CodeProtocol, "SETTINGS_MAX_FRAME_SIZE out of bounds")
		}
	case settingMaxHeaderListSize:
		c.maxHeader = int(min(v, maxStreamID))
	}
	return nil
}

// resizeLocked changes the windows of all streams (RFC 9113 section 6.9.2),
// which may become negative.
func (c *Conn) resizeLocked(size int) error {
	by := size - c.sendWindow
	if by == 0 {
		return nil
	}
	c.sendWindow = size
	for _, s := range c.streams {
		if s.sendWin += by; s.sendWin > maxWindow {
			return broken(CodeFlowControl, "SETTINGS_INITIAL_WINDOW_SIZE makes a window too large")
		}
		s.wakeLocked()
	}
	return nil
}

func (c *Conn) readPing(h frameHeader) error {
	if h.length != 8 || h.id != 0 {
		return broken(CodeFrameSize, "malformed PING")
	}
	b, err := c.readBytes(8)
	if err != nil {
		return err
	}
	id := binary.BigEndian.Uint64(b)
	if err := c.idled(); err != nil {
		return err
	}
	if h.has(flagAck) {
		c.pong(id)
		return nil
	}
	c.mu.Lock()
	c.control = appendPing(c.control, flagAck, id)
	err = c.ackLocked()
	c.mu.Unlock()
	c.kick()
	return err
}

func (c *Conn) readReset(h frameHeader) error {
	if h.length != 4 {
		return broken(CodeFrameSize, "malformed RST_STREAM")
	}
	b, err := c.readBytes(4)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.begunLocked(h.id) {
		return broken(CodeProtocol, "RST_STREAM for a stream that was not begun")
	}
	// With NO_ERROR after its end the server says that it does not want the rest
	// of the request (RFC 9113 section 8.1): the response stands.
	if s := c.streams[h.id]; s != nil {
		s.endLocked(&StreamError{Code: ErrCode(binary.BigEndian.Uint32(b)), Remote: true})
	}
	return nil
}

func (c *Conn) readWindowUpdate(h frameHeader) error {
	if h.length != 4 {
		return broken(CodeFrameSize, "malformed WINDOW_UPDATE")
	}
	b, err := c.readBytes(4)
	if err != nil {
		return err
	}
	n := int(binary.BigEndian.Uint32(b) & maxWindow)
	c.mu.Lock()
	defer c.mu.Unlock()
	if h.id == 0 {
		switch {
		case n == 0:
			return broken(CodeProtocol, "WINDOW_UPDATE by nothing")
		case c.sendWin+n > maxWindow:
			return broken(CodeFlowControl, "WINDOW_UPDATE above the limit")
		case c.sendWin <= 0:
			for _, s := range c.streams {
				s.wakeLocked()
			}
		}
		c.sendWin += n
		return nil
	}
	if !c.begunLocked(h.id) {
		return broken(CodeProtocol, "WINDOW_UPDATE for a stream that was not begun")
	}
	s := c.streams[h.id]
	if s == nil {
		return nil
	}
	var code ErrCode
	var why string
	switch {
	case n == 0:
		code, why = CodeProtocol, "WINDOW_UPDATE by nothing"
	case s.sendWin+n > maxWindow:
		code, why = CodeFlowControl, "WINDOW_UPDATE above the limit"
	default:
		s.sendWin += n
		s.wakeLocked()
		return nil
	}
	s.resetLocked(code, &StreamError{Code: code, Reason: why})
	c.kick()
	return nil
}

func (c *Conn) readGoAway(h frameHeader) error {
	if h.length < 8 || h.id != 0 {
		return broken(CodeFrameSize, "malformed GOAWAY")
	}
	b, err := c.readBytes(8)
	if err != nil {
		return err
	}
	last, code := binary.BigEndian.Uint32(b)&maxStreamID, ErrCode(binary.BigEndian.Uint32(b[4:]))
	more := h.length - 8
	words, err := c.readBytes(min(more, maxDebug))
	if err != nil {
		return err
	}
	reason := strings.ToValidUTF8(string(words), "?")
	if err := c.discard(more - len(words)); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if last > c.lastID {
		return broken(CodeProtocol, "GOAWAY takes streams back that it had given up")
	}
	if c.lastID, c.goAway = last, ErrGoingAway; code != CodeNo {
		c.goAway = fmt.Errorf("%w: %w", ErrGoingAway, &ConnError{Code: code, Remote: true, Reason: reason})
	}
	for id, s := range c.streams {
		if id > last {
			s.endLocked(c.goAway)
		}
	}
	c.admitLocked()
	if c.open == 0 {
		go c.fail(c.goAway)
	}
	return c.idled()
}
