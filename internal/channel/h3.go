package channel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/quicvarint"
)

// h3 carries a channel over HTTP/3. With the listener as HTTP client the
// request streams are server-initiated, which RFC 9114 does not know: both ends
// are ours, and the ALPN says so.
type h3 struct {
	conn   *quic.Conn
	limits Limits
	log    *slog.Logger
	client *http3.ClientConn   // of a downstream peer
	first  *quic.ReceiveStream // of an upstream peer: accepted while dialling
}

// quicConfig bounds a QUIC connection as Limits says.
func quicConfig(lim Limits) *quic.Config {
	return &quic.Config{
		// quic-go gives up after twice this time (and sooner without any answer).
		HandshakeIdleTimeout: lim.HandshakeTimeout / 2,
		// The idle time runs from the first packet that was sent into the
		// silence (RFC 9000 section 10.1), and quic-go sends one after half of
		// it: a peer is dead after one and a half times this value.
		MaxIdleTimeout:                 2 * lim.KeepAlive * 2 / 3,
		KeepAlivePeriod:                lim.KeepAlive,
		InitialStreamReceiveWindow:     uint64(lim.StreamWindow),
		MaxStreamReceiveWindow:         uint64(lim.StreamWindow),
		InitialConnectionReceiveWindow: uint64(lim.connWindow()),
		MaxConnectionReceiveWindow:     uint64(lim.connWindow()),
		MaxIncomingStreams:             int64(lim.Streams),
		MaxIncomingUniStreams:          8, // control and QPACK, RFC 9114 section 6.2
		Allow0RTT:                      false,
	}
}

// newH3 takes over a QUIC connection whose handshake is done.
func newH3(conn *quic.Conn, dir Direction, lim Limits, log *slog.Logger) *h3 {
	t := &h3{conn: conn, limits: lim, log: log}
	if dir == PeerDownstream {
		tr := &http3.Transport{MaxResponseHeaderBytes: lim.MaxHeader, DisableCompression: true, Logger: log}
		t.client = tr.NewClientConn(conn)
	}
	return t
}

// watch calls ended once, when the connection is closed by whatever cause. A
// downstream peer that opens request streams breaks the protocol and is cut.
func (t *h3) watch(ended func(error)) {
	context.AfterFunc(t.conn.Context(), func() { ended(quicCause(t.conn)) })
	if t.client == nil {
		return
	}
	go func() { // ends with the connection
		if _, err := t.conn.AcceptStream(t.conn.Context()); err == nil {
			_ = t.conn.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeStreamCreationError), "requests flow outward only")
		}
	}()
}

// knock is a stream that RFC 9114 section 6.2.3 reserves for no meaning at all.
var knock = append(quicvarint.Append(nil, 0x21), make([]byte, 40)...)

// keepAlive keeps the connection that we dialled alive, a little before quic-go
// would. Its PING makes a packet of less than 43 bytes, to which no listener that
// was started again answers with a stateless reset (RFC 9000 section 10.3): its
// peers would wait for silence, up to twice as long.
func (t *h3) keepAlive() {
	every := t.limits.KeepAlive * 15 / 16
	if every <= 0 || t.conn.Context().Err() != nil {
		return
	}
	time.AfterFunc(every, func() {
		if str, err := t.conn.OpenUniStream(); err == nil {
			_, _ = str.Write(knock)
			_ = str.Close()
		}
		t.keepAlive()
	})
}

// quicCause is why a connection ended.
func quicCause(conn *quic.Conn) error {
	err := context.Cause(conn.Context())
	var app *quic.ApplicationError
	var idle *quic.IdleTimeoutError
	var reset *quic.StatelessResetError
	switch {
	case errors.As(err, &app) && app.Remote && app.ErrorCode == quic.ApplicationErrorCode(http3.ErrCodeNoError):
		return ErrPeerGone
	case errors.As(err, &idle):
		return fmt.Errorf("%w: it does not answer keep-alives", ErrPeerGone)
	case errors.As(err, &reset):
		return fmt.Errorf("%w: its program was started again: %w", ErrPeerGone, err)
	}
	return fmt.Errorf("%w: %w", ErrPeerGone, err)
}

// confirm waits until the other side has verified us and speaks: after the
// handshake alone a dialler does not know (RFC 8446 section 2).
func (t *h3) confirm(ctx context.Context) error {
	if t.client != nil {
		select {
		case <-t.client.ReceivedSettings():
			return nil
		case <-t.conn.Context().Done():
			return context.Cause(t.conn.Context())
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	str, err := t.conn.AcceptUniStream(ctx)
	if err != nil {
		return err
	}
	t.first = str
	return nil
}

func (t *h3) RoundTrip(req *http.Request) (*http.Response, error) {
	if t.client == nil {
		return nil, ErrWrongSide
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	timer := time.AfterFunc(t.limits.HeaderTimeout, func() { cancel(ErrHeaderTimeout) })
	out := req.Clone(ctx)
	if req.Method != http.MethodConnect {
		out.URL.Scheme, out.URL.Host, out.Host = "https", "peer", "peer"
	}
	res, err := t.client.RoundTrip(out)
	if !timer.Stop() && err == nil {
		_ = res.Body.Close()
		err = ErrHeaderTimeout
	}
	if err != nil {
		if cause := context.Cause(ctx); cause != nil && req.Context().Err() == nil {
			err = cause
		}
		cancel(nil)
		return nil, err
	}
	res.Body = &endedBody{res.Body, cancel}
	return res, nil
}

// endedBody ends the context of its request.
type endedBody struct {
	io.ReadCloser
	cancel context.CancelCauseFunc
}

func (b *endedBody) Close() error {
	defer b.cancel(nil)
	return b.ReadCloser.Close()
}

// connect uses the request's stream itself: nothing copies to it or from it.
func (t *h3) connect(req *http.Request) (*http.Response, error) {
	if t.client == nil {
		return nil, ErrWrongSide
	}
	ctx, cancel := context.WithTimeoutCause(req.Context(), t.limits.HeaderTimeout, ErrHeaderTimeout)
	defer cancel()
	str, err := t.client.OpenRequestStream(ctx)
	if err != nil {
		return nil, orCause(ctx, err)
	}
	tunnel := h3Tunnel{str}
	opening := context.AfterFunc(ctx, tunnel.cut)
	res, err := tunnel.open(req)
	if !opening() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		tunnel.cut()
		return nil, orCause(ctx, err)
	}
	res.Body = tunnel
	return res, nil
}

func orCause(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// h3Tunnel is the duplex of a CONNECT.
type h3Tunnel struct{ *http3.RequestStream }

// maxInformational is how many responses with status 1xx may precede the real one.
const maxInformational = 5

func (s h3Tunnel) open(req *http.Request) (*http.Response, error) {
	if err := s.SendRequestHeader(req); err != nil {
		return nil, err
	}
	for range maxInformational {
		res, err := s.ReadResponse()
		if err != nil || res.StatusCode/100 != 1 {
			return res, err
		}
	}
	return nil, errors.New("too many informational responses")
}

func (s h3Tunnel) cut() {
	s.CancelRead(quic.StreamErrorCode(http3.ErrCodeRequestCanceled))
	s.CancelWrite(quic.StreamErrorCode(http3.ErrCodeRequestCanceled))
}

// CloseWrite ends the sending direction, which is what quic-go calls Close.
func (s h3Tunnel) CloseWrite() error { return s.RequestStream.Close() }

func (s h3Tunnel) Close() error {
	s.cut()
	return nil
}

// serve runs the accept loops itself: the dialler may hold the first stream,
// and http3.Server has a shutdown that would cut reversed streams.
func (t *h3) serve(ctx context.Context, h http.Handler) error {
	srv := &http3.Server{
		Handler:        h,
		MaxHeaderBytes: t.limits.MaxHeader,
		Logger:         t.log,
		ConnContext: func(conn context.Context, _ *quic.Conn) context.Context {
			return mergedContext{Context: conn, values: ctx}
		},
	}
	raw, err := srv.NewRawServerConn(t.conn)
	if err != nil {
		t.close()
		return err
	}
	var wg sync.WaitGroup
	if t.first != nil {
		wg.Go(func() { raw.HandleUnidirectionalStream(t.first) })
	}
	wg.Go(func() {
		for {
			str, err := t.conn.AcceptUniStream(t.conn.Context())
			if err != nil {
				return
			}
			wg.Go(func() { raw.HandleUnidirectionalStream(str) })
		}
	})
	for {
		str, err := t.conn.AcceptStream(t.conn.Context())
		if err != nil {
			break
		}
		wg.Go(func() { raw.HandleRequestStream(str) })
	}
	t.close()
	wg.Wait()
	return quicCause(t.conn)
}

// mergedContext ends with the connection and has the values of the server too.
type mergedContext struct {
	context.Context
	values context.Context
}

func (m mergedContext) Value(key any) any {
	if v := m.Context.Value(key); v != nil {
		return v
	}
	return m.values.Value(key)
}

func (t *h3) close() {
	_ = t.conn.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeNoError), "")
}

func (t *h3) rtt() time.Duration { return t.conn.ConnectionStats().SmoothedRTT }
