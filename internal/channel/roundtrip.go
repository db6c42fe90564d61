package channel

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync"
	"time"

	"sallyport/internal/wire"
)

// ErrHeaderTimeout says that a peer accepted a request and did not answer.
var ErrHeaderTimeout = errors.New("no answer within the time limit")

// RoundTrip sends a request to a downstream peer. Scheme and host of the URL
// are ignored ("http://peer/v1/…"). The peer must send response headers within
// Limits.HeaderTimeout; the body may last as long as it likes.
func (c *Conn) RoundTrip(req *http.Request) (*http.Response, error) {
	if c.dir != PeerDownstream {
		return nil, fmt.Errorf("request to %s: %w: it is upstream", c.peer, ErrWrongSide)
	}
	if err := c.live(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	timer := time.AfterFunc(c.limits.HeaderTimeout, func() { cancel(ErrHeaderTimeout) })
	out := req.Clone(ctx)
	if req.Method != http.MethodConnect {
		out.URL.Scheme, out.URL.Host, out.Host = "https", "peer", "peer"
	}
	if c.named.CompareAndSwap(false, true) {
		out.Header.Set(wire.HeaderClass, c.Class())
	}
	c.streamBegins()
	res, err := c.t.RoundTrip(out)
	if !timer.Stop() && err == nil {
		_ = res.Body.Close()
		err = ErrHeaderTimeout
	}
	if err != nil {
		c.streamEnds()
		if cause := context.Cause(ctx); cause != nil && req.Context().Err() == nil {
			err = cause
		}
		cancel(nil)
		if gone := c.live(); gone != nil {
			return nil, gone
		}
		return nil, fmt.Errorf("%s: %w", c.peer, err)
	}
	body := &responseBody{ReadCloser: res.Body, end: func() { cancel(nil); c.streamEnds() }, left: -1}
	if c.Enrolling() && req.Method != http.MethodConnect {
		body.left = wire.MaxEnrollBody
	}
	res.Body = body
	return res, nil
}

// responseBody ends its stream when closed, and holds a limit.
type responseBody struct {
	io.ReadCloser
	once sync.Once
	end  func()
	left int64 // bytes that may still come; below 0: no limit
}

func (b *responseBody) Read(p []byte) (int, error) {
	if b.left < 0 {
		return b.ReadCloser.Read(p)
	}
	if int64(len(p)) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.ReadCloser.Read(p)
	if int64(n) > b.left {
		return int(b.left), fmt.Errorf("response: %w (%d bytes)", wire.ErrTooLarge, wire.MaxEnrollBody)
	}
	b.left -= int64(n)
	return n, err
}

func (b *responseBody) Close() error {
	err := b.ReadCloser.Close()
	b.once.Do(b.end)
	return err
}

// postDrain asks a downstream peer to be replaced.
func (c *Conn) postDrain(ctx context.Context, d wire.Drain) error {
	b, err := json.Marshal(d)
	if err != nil {
		return err
	}
	req := (&http.Request{Method: http.MethodPost, URL: &url.URL{Path: wire.PathDrain}, Header: http.Header{"Content-Type": {"application/json"}},
		Body: io.NopCloser(bytes.NewReader(b)), ContentLength: int64(len(b))}).WithContext(ctx)
	res, err := c.RoundTrip(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode >= 300 {
		return fmt.Errorf("refused with status %d", res.StatusCode)
	}
	return nil
}
