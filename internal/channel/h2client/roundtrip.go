package h2client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// maxSmall is the largest body that is sent with the header, by the goroutine
// that asks.
const maxSmall = maxFrame - 1

var errBodyLength = errors.New("the request's body has not the length that was declared")

// RoundTrip implements [http.RoundTripper]. Scheme and host of the URL are
// ignored. The request's context ends the stream whenever it ends; if it never
// does, that costs nothing.
func (c *Conn) RoundTrip(req *http.Request) (*http.Response, error) {
	s, res, err := c.roundTrip(req, false)
	if err != nil {
		return nil, err
	}
	if ctx := req.Context(); ctx.Done() != nil && res.Body == io.ReadCloser(s) {
		stop := context.AfterFunc(ctx, func() { s.cancel(ctx.Err()) })
		c.mu.Lock()
		if s.gone {
			stop()
		} else {
			s.stop = stop
		}
		c.mu.Unlock()
	}
	return res, nil
}

// Connect sends a request without a body whose stream stays open for writing:
// a CONNECT. The request's context bounds the opening only. The response is not
// looked at; the stream is its body.
func (c *Conn) Connect(req *http.Request) (*Stream, *http.Response, error) {
	s, res, err := c.roundTrip(req, true)
	if err == nil {
		res.Body = s
	}
	return s, res, err
}

func (c *Conn) roundTrip(req *http.Request, tunnel bool) (*Stream, *http.Response, error) {
	p := patience{ctx: req.Context()}
	if c.cfg.HeaderTimeout > 0 {
		t := time.NewTimer(c.cfg.HeaderTimeout)
		defer t.Stop()
		p.late = t.C
	}
	body := &sentBody{ReadCloser: req.Body, length: req.ContentLength}
	switch {
	case tunnel, req.Body == nil, req.Body == http.NoBody:
		body.length, body.done = 0, true
	case req.ContentLength == 0:
		body.length = -1
	}
	if err := body.readSmall(req); err != nil {
		body.Close()
		return nil, nil, err
	}
	s, err := c.send(p, req, body, tunnel)
	if err != nil {
		body.Close()
		return nil, nil, err
	}
	res, err := s.response(p, req)
	return s, res, err
}

// send begins the stream, and a goroutine if the body does not go along.
func (c *Conn) send(p patience, req *http.Request, body *sentBody, tunnel bool) (*Stream, error) {
	length := body.length
	if tunnel {
		length = -1
	}
	e, err := encode(req, c.cfg.Authority, length, c.cfg.MaxHeader)
	if err != nil {
		return nil, err
	}
	s, sent, err := c.begin(p, req.Method, e, body.small(), body.done && !tunnel)
	e.release()
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	streaming := !s.sent && !s.gone && !tunnel
	if streaming {
		s.body = body
	}
	c.mu.Unlock()
	if !streaming {
		body.Close()
		body.release()
		return s, nil
	}
	if body.first != nil {
		body.first.r += sent
	}
	go s.sendBody(body) // ends with the stream, which closes the body
	return s, nil
}

// response waits for the response.
func (s *Stream) response(p patience, req *http.Request) (*http.Response, error) {
	for late := false; ; {
		s.c.mu.Lock()
		if s.answered {
			res := s.responseLocked(req)
			s.c.mu.Unlock()
			return res, nil
		}
		if s.err != nil {
			defer s.c.mu.Unlock()
			return nil, s.err
		}
		wait := s.waitLocked()
		s.c.mu.Unlock()
		if late {
			_ = s.Close() // with what comes meanwhile: nobody reads it
			return nil, p.over()
		}
		select {
		case <-wait:
		case <-p.ctx.Done():
			late = true
		case <-p.late:
			late = true
		}
	}
}

func (s *Stream) responseLocked(req *http.Request) *http.Response {
	res := &http.Response{
		Status:     strconv.Itoa(s.status) + " " + http.StatusText(s.status),
		StatusCode: s.status,
		Proto:      "HTTP/2.0",
		ProtoMajor: 2,
		Header:     s.header, ContentLength: s.length,
		Request: req, Body: s,
	}
	s.header = nil
	if s.ended && s.buf.n == 0 && errors.Is(s.err, io.EOF) {
		res.Body = http.NoBody
		if s.length < 0 {
			res.ContentLength = 0
		}
	}
	return res
}

// sentBody is the body of a request.
type sentBody struct {
	io.ReadCloser
	length int64  // -1: not known
	done   bool   // first is all of it
	first  *piece // read before the stream was begun
	once   sync.Once
}

// Close closes the body once, whoever comes first.
func (b *sentBody) Close() {
	b.once.Do(func() {
		if b.ReadCloser != nil {
			_ = b.ReadCloser.Close()
		}
	})
}

// readSmall reads a small body that is in memory: GetBody says that it is.
func (b *sentBody) readSmall(req *http.Request) error {
	if b.done || req.GetBody == nil || b.length < 0 || b.length > maxSmall {
		return nil
	}
	b.first = takePiece(int(b.length) + 1)
	n, err := io.ReadFull(b.ReadCloser, b.first.b[:b.length+1])
	b.first.w = n
	switch {
	case err == nil, (errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)) && int64(n) != b.length:
		return errBodyLength
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		b.done = true
		return nil
	}
	return fmt.Errorf("read the request's body: %w", err)
}

func (b *sentBody) small() []byte {
	if b.first == nil {
		return nil
	}
	return b.first.b[b.first.r:b.first.w]
}

func (b *sentBody) release() {
	if b.first != nil {
		b.first.release()
		b.first = nil
	}
}

// sendBody sends what did not go along with the header.
func (s *Stream) sendBody(body *sentBody) {
	err := s.copyBody(body)
	s.c.mu.Lock()
	s.body = nil
	s.c.mu.Unlock()
	body.Close()
	body.release()
	if err != nil {
		s.cancel(err)
	}
}

// copyBody takes a buffer only when there is something to send, as far as the
// body knows to wait for that in a read of no bytes.
func (s *Stream) copyBody(body *sentBody) error {
	if body.done {
		_, err := s.send(body.small(), true)
		return err
	}
	total := int64(0)
	for {
		_, err := body.Read(nil)
		var p *piece
		n := 0
		if err == nil {
			p = takePiece(maxFrame)
			n, err = body.Read(p.b[:maxData])
			total += int64(n)
		}
		end := errors.Is(err, io.EOF)
		switch {
		case body.length >= 0 && (total > body.length || end && total < body.length):
			err = errBodyLength
		case end, err == nil && n > 0:
			_, err = s.send(p.bytes(n), end)
		}
		if p != nil {
			p.release()
		}
		if end || err != nil {
			return err
		}
	}
}

func (p *piece) bytes(n int) []byte {
	if p == nil {
		return nil
	}
	return p.b[:n]
}
