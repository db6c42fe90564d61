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
	"sync/atomic"

	"sallyport/internal/wire"
)

// ErrHeaderTimeout says that a peer accepted a request and did not answer.
var ErrHeaderTimeout = errors.New("no answer within the time limit")

// RoundTrip sends a request to a downstream peer. Scheme and host of the URL
// are ignored ("http://peer/v1/…"). The peer must send response headers within
// Limits.HeaderTimeout; the body may last as long as it likes.
func (c *Conn) RoundTrip(req *http.Request) (*http.Response, error) {
	return c.exchange(req, false)
}

func (c *Conn) exchange(req *http.Request, connect bool) (*http.Response, error) {
	if c.dir != PeerDownstream {
		return nil, fmt.Errorf("request to %s: %w: it is upstream", c.peer, ErrWrongSide)
	}
	if err := c.live(); err != nil {
		return nil, err
	}
	if c.named.CompareAndSwap(false, true) {
		named := *req
		if named.Header = req.Header.Clone(); named.Header == nil {
			named.Header = http.Header{}
		}
		named.Header.Set(wire.HeaderClass, c.Class())
		req = &named
	}
	send := c.t.RoundTrip
	if connect {
		send = c.t.connect
	}
	c.streamBegins()
	res, err := send(req)
	if err != nil {
		c.streamEnds()
		if gone := c.live(); gone != nil {
			return nil, gone
		}
		return nil, fmt.Errorf("%s: %w", c.peer, err)
	}
	body := &responseBody{ReadCloser: res.Body, conn: c, left: -1}
	if c.Enrolling() && !connect && req.Method != http.MethodConnect {
		body.left = wire.MaxEnrollBody
	}
	res.Body = body
	return res, nil
}

// responseBody ends its stream when closed, and holds a limit.
type responseBody struct {
	io.ReadCloser
	conn *Conn
	shut atomic.Bool
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

// Notify calls f, once and in a goroutine of its own, when a Read has something to
// return. Where it has already, or the carrier cannot tell, it does not and returns
// false: a Read tells. It is for bodies that come in small pieces over a very
// long time.
func (b *responseBody) Notify(f func()) (later bool) {
	n, ok := b.ReadCloser.(interface{ Notify(func()) bool })
	return ok && n.Notify(f)
}

func (b *responseBody) Close() error {
	err := b.ReadCloser.Close()
	if b.shut.CompareAndSwap(false, true) {
		b.conn.streamEnds()
	}
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
