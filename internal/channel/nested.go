package channel

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"

	"sallyport/internal/channel/h2client"
)

// Nested HTTP/2 has few streams and no keep-alive of its own: the channels
// below it have theirs, and an idle session must cost nothing.
var nestedLimits = Limits{Streams: 64, StreamWindow: 256 << 10, KeepAlive: -1, HeaderTimeout: -1}.withDefaults()

// ClientConn is an HTTP/2 client on one connection of any kind.
type ClientConn struct {
	cc   *h2client.Conn
	conn *watchedConn
}

// Client makes an HTTP/2 client of conn, which it owns from then on: for
// [sallyport/internal/session]. It says nothing before the first request.
// Closing it, or the end of conn, closes Done.
func Client(conn net.Conn) (*ClientConn, error) {
	c := &ClientConn{conn: &watchedConn{Conn: conn}}
	cc, err := newH2Client(c.conn, nestedLimits, true)
	if err != nil {
		_ = c.conn.Close()
		return nil, fmt.Errorf("HTTP/2: %w", err)
	}
	c.cc = cc
	return c, nil
}

// RoundTrip sends a request; host and scheme of its URL are ignored.
func (c *ClientConn) RoundTrip(req *http.Request) (*http.Response, error) {
	res, err := c.cc.RoundTrip(req)
	if err != nil {
		select {
		case <-c.Done():
			return nil, c.conn.cause()
		default:
		}
	}
	return res, err
}

// Done is closed when the connection has ended.
func (c *ClientConn) Done() <-chan struct{} { return c.cc.Done() }

// Close ends the connection and what runs on it.
func (c *ClientConn) Close() error { return c.cc.Close() }

var _ interface {
	http.RoundTripper
	io.Closer
} = (*ClientConn)(nil)

// Serve answers HTTP/2 requests on conn until it ends or ctx is done, and
// returns when every handler has: for [sallyport/internal/session]. It closes conn.
func Serve(ctx context.Context, conn net.Conn, h http.Handler) error {
	w := &watchedConn{Conn: conn}
	stop := context.AfterFunc(ctx, func() { _ = w.Close() })
	defer stop()
	g := &countingHandler{next: h}
	serveH2(ctx, w, g, nestedLimits, slog.New(slog.DiscardHandler))
	g.wait()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return w.cause()
}
