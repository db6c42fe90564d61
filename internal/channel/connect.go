package channel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"time"

	"sallyport/internal/wire"
)

// RefusedError says that a peer refused a CONNECT.
type RefusedError struct {
	Status int    // HTTP status
	Reason string // of the hop that refused; from a peer, so for people only
}

func (e *RefusedError) Error() string {
	if e.Reason == "" {
		return fmt.Sprintf("refused with status %d %s", e.Status, http.StatusText(e.Status))
	}
	return fmt.Sprintf("refused with status %d: %s", e.Status, e.Reason)
}

// Connect opens a stream to authority through a downstream peer. ctx bounds
// the opening only. A refusal is a *RefusedError.
func (c *Conn) Connect(ctx context.Context, authority string, h http.Header) (net.Conn, error) {
	if c.Draining() {
		return nil, fmt.Errorf("connect %s through %s: %w", authority, c.peer, ErrDraining)
	}
	life, cut := context.WithCancel(context.WithoutCancel(ctx))
	opening := context.AfterFunc(ctx, cut)
	pr, pw := io.Pipe()
	res, err := c.connect(life, authority, h, recordBody{pr})
	if err == nil && !opening() {
		_ = res.Body.Close()
		err = ctx.Err()
	}
	if err != nil {
		opening()
		cut()
		_ = pr.CloseWithError(net.ErrClosed)
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("connect %s: %w", authority, err)
	}
	end := func(s *stream) {
		c.tails.Go(func() {
			defer cut()
			soon, cancel := context.WithTimeout(life, linger)
			defer cancel()
			peerEnded := s.discard(soon)
			if s.drainWrite(soon) && pw.Close() == nil { // the peer reads the end of the stream
				<-peerEnded
			}
			cut()
			_ = pw.CloseWithError(net.ErrClosed)
			_ = res.Body.Close()
			s.release()
		})
	}
	return newStream(res.Body, pw, c.local, streamAddr(authority), end), nil
}

// connect sends a CONNECT whose stream is (body, response body).
func (c *Conn) connect(ctx context.Context, authority string, h http.Header, body io.ReadCloser) (*http.Response, error) {
	if h = h.Clone(); h == nil {
		h = http.Header{}
	}
	req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Scheme: "https", Host: authority}, Host: authority,
		Header: h, Body: body, ContentLength: -1} // with a Proto, http3 would take it for an extended CONNECT
	res, err := c.RoundTrip(req.WithContext(ctx))
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		_ = res.Body.Close()
		return nil, &RefusedError{Status: res.StatusCode, Reason: headerText(res.Header.Get(wire.HeaderError))}
	}
	return res, nil
}

// AcceptConnect answers a CONNECT with 200 and returns its stream. The handler
// must close the stream before it returns; Close waits, at most a few seconds,
// until the last bytes are on their way.
func AcceptConnect(w http.ResponseWriter, r *http.Request) (net.Conn, error) {
	if r.Method != http.MethodConnect {
		return nil, fmt.Errorf("accept stream: method is %s, want CONNECT", wire.Quotable(r.Method))
	}
	rc := http.NewResponseController(w)
	w.WriteHeader(http.StatusOK)
	if err := rc.Flush(); err != nil {
		return nil, fmt.Errorf("accept stream %s: %w", wire.Quotable(r.Host), err)
	}
	local, remote := net.Addr(streamAddr(wire.Quotable(r.Host))), net.Addr(streamAddr(r.RemoteAddr))
	if c := FromContext(r.Context()); c != nil {
		remote = c.remote
	}
	// The writer of a finished handler must not be touched: Close returns
	// only when no call is left, and unblocks those that are by deadlines
	// in the past, which end the stream for good.
	end := func(s *stream) {
		soon, cancel := context.WithTimeout(r.Context(), linger)
		defer cancel()
		s.discard(soon)
		if !s.drainWrite(soon) {
			_ = rc.SetWriteDeadline(time.Unix(1, 0))
		}
		cancel()
		_ = rc.SetReadDeadline(time.Unix(1, 0))
		s.release()
	}
	s := newStream(r.Body, flushWriter{w, rc}, local, remote, end)
	return &handlerConn{s}, nil
}

// handlerConn makes every Close wait for the first.
type handlerConn struct{ *stream }

func (c *handlerConn) Close() error {
	_ = c.stream.Close()
	<-c.ended
	return nil
}

type flushWriter struct {
	w  io.Writer
	rc *http.ResponseController
}

func (f flushWriter) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	if err != nil {
		return n, err
	}
	return n, f.rc.Flush()
}

// Forward joins the CONNECT request that a handler is serving with a new
// stream to authority through next, and returns when both have ended. It is
// what a relay does instead of copying between two streams: no goroutine of its
// own, and a buffer only while bytes move. header goes with the request.
//
// An error with no byte sent to w was not answered yet: the caller refuses. A
// refusal of the next hop is a *RefusedError. After 200 was sent, answered is
// true and the error, if any, says how the stream was cut.
func Forward(w http.ResponseWriter, r *http.Request, next *Conn, authority string, header http.Header) (answered bool, err error) {
	if next.Draining() {
		return false, fmt.Errorf("connect %s through %s: %w", authority, next.peer, ErrDraining)
	}
	ctx, cut := context.WithCancel(r.Context())
	defer cut()
	rc := http.NewResponseController(w)
	body := &lentBody{r: r.Body, unblock: func() { _ = rc.SetReadDeadline(time.Unix(1, 0)) }}
	defer body.takeBack()
	res, err := next.connect(ctx, authority, header, body)
	if err != nil {
		return false, fmt.Errorf("connect %s: %w", authority, err)
	}
	defer func() { cut(); _ = res.Body.Close() }()
	w.WriteHeader(http.StatusOK)
	if err := rc.Flush(); err != nil {
		return true, err
	}
	for {
		if _, err := res.Body.Read(nil); err != nil { // waits without a buffer
			return true, eofIsNil(err)
		}
		chunk := chunks.Get().(*[]byte)
		n, err := res.Body.Read(*chunk)
		if n > 0 {
			_, werr := w.Write((*chunk)[:n])
			if werr == nil {
				werr = rc.Flush()
			}
			err = errors.Join(err, werr)
		}
		chunks.Put(chunk)
		if err != nil {
			return true, eofIsNil(err)
		}
	}
}

// recordPayload is what a DATA frame may hold to fill one TLS record with its
// header of 9 bytes. A frame of 16 KiB takes two records, the second one of 9
// bytes, and each is sealed, written and read by itself.
const recordPayload = 16<<10 - 9

// recordBody is a request body that is read in pieces of one TLS record.
type recordBody struct{ io.ReadCloser }

func (b recordBody) Read(p []byte) (int, error) {
	return b.ReadCloser.Read(p[:min(len(p), recordPayload)])
}

func eofIsNil(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// lentBody is a handler's request body in the hands of a client transport,
// whose goroutine may outlive the response. takeBack waits for it.
type lentBody struct {
	r       io.Reader
	unblock func()

	mu   sync.Mutex // held while reading
	gone bool
	once sync.Once
}

func (b *lentBody) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.gone {
		return 0, net.ErrClosed
	}
	n, err := b.r.Read(p[:min(len(p), recordPayload)])
	if errors.Is(err, os.ErrDeadlineExceeded) { // our own doing
		err = net.ErrClosed
	}
	return n, err
}

func (b *lentBody) Close() error {
	b.once.Do(b.unblock)
	return nil
}

func (b *lentBody) takeBack() {
	b.once.Do(b.unblock)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.gone = true
}
