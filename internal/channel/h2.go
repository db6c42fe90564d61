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
)

// h2 carries a channel over HTTP/2. As a client it holds the http2.ClientConn;
// as a server only the connection, until serve is called.
type h2 struct {
	conn   *watchedConn
	client *http2.ClientConn // of a downstream peer
	limits Limits
	log    *slog.Logger
}

// newH2 takes over conn. ended is called once, when the connection is closed
// by whatever cause.
func newH2(conn net.Conn, dir Direction, lim Limits, log *slog.Logger, ended func(error)) (*h2, error) {
	t := &h2{conn: &watchedConn{Conn: conn, ended: ended}, limits: lim, log: log}
	if dir == PeerDownstream {
		cc, err := newH2Client(t.conn, lim)
		if err != nil {
			return nil, err
		}
		t.client = cc
	}
	return t, nil
}

// newH2Client makes an HTTP/2 client of a connection. It writes the preface.
func newH2Client(conn net.Conn, lim Limits) (*http2.ClientConn, error) {
	t, err := h2Transport(lim)
	if err != nil {
		return nil, err
	}
	return t.NewClientConn(conn)
}

// h2Transports holds one http2.Transport for each set of limits: it is nothing
// but their configuration, and some KiB large.
var h2Transports sync.Map

func h2Transport(lim Limits) (*http2.Transport, error) {
	if t, ok := h2Transports.Load(lim); ok {
		return t.(*http2.Transport), nil
	}
	t, err := http2.ConfigureTransports(&http.Transport{
		DisableCompression: true,
		HTTP2: &http.HTTP2Config{ // the windows cannot be set anywhere else
			MaxReceiveBufferPerStream:     lim.StreamWindow,
			MaxReceiveBufferPerConnection: lim.connWindow(),
		},
	})
	if err != nil {
		return nil, err
	}
	t.DisableCompression = true
	t.StrictMaxConcurrentStreams = true // wait for a slot instead of failing
	t.MaxHeaderListSize = uint32(lim.MaxHeader)
	t.MaxReadFrameSize = h2FrameSize
	if lim.KeepAlive > 0 {
		t.ReadIdleTimeout, t.PingTimeout, t.WriteByteTimeout = lim.KeepAlive, lim.KeepAlive, 2*lim.KeepAlive
	}
	first, _ := h2Transports.LoadOrStore(lim, t)
	return first.(*http2.Transport), nil
}

// h2FrameSize is the smallest that RFC 9113 section 6.5.2 allows: frames bound
// the buffer that the other side's client holds for each open request body.
const h2FrameSize = 16 << 10

func (t *h2) RoundTrip(req *http.Request) (*http.Response, error) {
	if t.client == nil {
		return nil, ErrWrongSide
	}
	return t.client.RoundTrip(req)
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
		srv.ReadIdleTimeout, srv.PingTimeout, srv.WriteByteTimeout = lim.KeepAlive, lim.KeepAlive, 2*lim.KeepAlive
	}
	if err := http2.ConfigureServer(base, srv); err != nil {
		_ = conn.Close()
		return
	}
	srv.ServeConn(conn, &http2.ServeConnOpts{Context: ctx, BaseConfig: base, Handler: h})
	_ = conn.Close()
}

func (t *h2) close() { _ = t.conn.Close() }

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
		if errors.Is(err, io.EOF) {
			err = ErrPeerGone
		} else {
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
