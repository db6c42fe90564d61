package channel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/net/http2"

	"sallyport/internal/channel/h2client"
)

// h2 carries a channel over HTTP/2. As a client it holds the client of one
// connection; as a server only the connection, until serve is called.
type h2 struct {
	conn   *watchedConn
	client *h2client.Conn // of a downstream peer
	limits Limits
	log    *slog.Logger
}

// newH2 takes over conn. ended is called once, when the connection is closed
// by whatever cause.
func newH2(conn net.Conn, dir Direction, lim Limits, log *slog.Logger, ended func(error)) (*h2, error) {
	t := &h2{conn: &watchedConn{Conn: conn, ended: ended}, limits: lim, log: log}
	if dir == PeerDownstream {
		cc, err := newH2Client(t.conn, lim, false)
		if err != nil {
			return nil, err
		}
		t.client = cc
	}
	return t, nil
}

// newH2Client makes an HTTP/2 client of a connection. It writes the preface, late
// or not.
func newH2Client(conn *watchedConn, lim Limits, late bool) (*h2client.Conn, error) {
	var await func()
	if c, ok := conn.Conn.(interface{ Await() }); ok {
		await = c.Await
	}
	return h2client.New(conn, h2client.Config{
		Await:         await,
		StreamWindow:  lim.StreamWindow,
		ConnWindow:    lim.connWindow(),
		MaxHeader:     lim.MaxHeader,
		KeepAlive:     lim.KeepAlive,
		HeaderTimeout: lim.HeaderTimeout,
		Authority:     "peer",
		Late:          late,
		Ended:         conn.note, // more than a Read or Write knows
	})
}

// h2FrameSize is the smallest that RFC 9113 section 6.5.2 allows: frames bound
// the buffer that a client holds for each request body.
const h2FrameSize = 16 << 10

func (t *h2) RoundTrip(req *http.Request) (*http.Response, error) {
	if t.client == nil {
		return nil, ErrWrongSide
	}
	res, err := t.client.RoundTrip(req)
	return res, h2Error(err)
}

func (t *h2) connect(req *http.Request) (*http.Response, error) {
	if t.client == nil {
		return nil, ErrWrongSide
	}
	_, res, err := t.client.Connect(req)
	return res, h2Error(err)
}

func h2Error(err error) error {
	if errors.Is(err, h2client.ErrNoAnswer) {
		return ErrHeaderTimeout
	}
	return err
}

func (t *h2) serve(ctx context.Context, h http.Handler) error {
	serveH2(ctx, t.conn, h, t.limits, t.log)
	return t.conn.cause()
}

// serveH2 answers requests on conn until it ends.
func serveH2(ctx context.Context, conn net.Conn, h http.Handler, lim Limits, log *slog.Logger) {
	base := &http.Server{
		Handler:        h,
		MaxHeaderBytes: lim.MaxHeader,
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	srv := &http2.Server{
		MaxConcurrentStreams:         uint32(lim.Streams),
		MaxReadFrameSize:             h2FrameSize,
		MaxUploadBufferPerStream:     int32(lim.StreamWindow),
		MaxUploadBufferPerConnection: int32(lim.connWindow()),
	}
	if lim.KeepAlive > 0 {
		// The client's PINGs come first, and prove to us too that it is there:
		// ours beside them would be half of what thousands of idle channels cost.
		srv.ReadIdleTimeout, srv.PingTimeout, srv.WriteByteTimeout = lim.KeepAlive*3/2, lim.KeepAlive/2, 2*lim.KeepAlive
	}
	if err := http2.ConfigureServer(base, srv); err != nil {
		_ = conn.Close()
		return
	}
	srv.ServeConn(conn, &http2.ServeConnOpts{Context: ctx, BaseConfig: base, Handler: h})
	_ = conn.Close()
}

func (t *h2) close() {
	if t.client != nil {
		_ = t.client.Close()
	}
	_ = t.conn.Close()
}

func (t *h2) rtt() time.Duration { return tcpRTT(t.conn.Conn) }

// watchedConn tells when a connection ends, and why.
type watchedConn struct {
	net.Conn
	ended func(error)

	mu     sync.Mutex
	err    error
	closed bool
}

func (w *watchedConn) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if err != nil {
		w.note(err)
	}
	return n, err
}

func (w *watchedConn) Write(p []byte) (int, error) {
	n, err := w.Conn.Write(p)
	if err != nil {
		w.note(err)
	}
	return n, err
}

// note keeps the first reason.
func (w *watchedConn) note(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil && !w.closed {
		switch {
		case errors.Is(err, h2client.ErrClosed):
			err = ErrClosed
		case errors.Is(err, io.EOF):
			err = ErrPeerGone
		default:
			err = fmt.Errorf("%w: %w", ErrPeerGone, err)
		}
		w.err = err
	}
}

// cause is why the connection ended. Closed from our side without a reason
// means that HTTP/2 gave up: keep-alive unanswered, or a protocol error.
func (w *watchedConn) cause() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		return fmt.Errorf("%w: it does not answer keep-alives, or broke the protocol", ErrPeerGone)
	}
	return w.err
}

func (w *watchedConn) Close() error {
	w.mu.Lock()
	first := !w.closed
	w.closed = true
	w.mu.Unlock()
	if !first {
		return nil
	}
	err := w.Conn.Close()
	if w.ended != nil {
		w.ended(w.cause())
	}
	return err
}
