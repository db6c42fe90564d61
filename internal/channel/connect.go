package channel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
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
	str, err := c.connect(ctx, authority, h)
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("connect %s: %w", authority, err)
	}
	end := func(s *stream) {
		c.tails.Go(func() {
			soon, cancel := context.WithTimeout(context.Background(), linger)
			defer cancel()
			peerEnded := s.discard(soon)
			if s.drainWrite(soon) && str.CloseWrite() == nil { // the peer reads the end of the stream
				<-peerEnded
			}
			_ = str.Close()
			s.release()
		})
	}
	s := newStream(str, str, c.local, streamAddr(authority), end)
	s.poll, _ = str.d.(poller)
	return s, nil
}

// connect sends a CONNECT. ctx bounds the opening only.
func (c *Conn) connect(ctx context.Context, authority string, h http.Header) (*connectStream, error) {
	if h == nil {
		h = http.Header{}
	}
	req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Scheme: "https", Host: authority}, Host: authority,
		Header: h} // with a Proto, http3 would take it for an extended CONNECT
	res, err := c.exchange(req.WithContext(ctx), true)
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		_ = res.Body.Close()
		return nil, &RefusedError{Status: res.StatusCode, Reason: headerText(res.Header.Get(wire.HeaderError))}
	}
	body := res.Body.(*responseBody)
	return &connectStream{body, body.ReadCloser.(duplex)}, nil
}

// connectStream is a duplex whose connection counts it.
type connectStream struct {
	*responseBody
	d duplex
}

// Write makes DATA frames that fill one TLS record each.
func (s *connectStream) Write(p []byte) (n int, err error) {
	for err == nil && len(p) > 0 {
		var k int
		k, err = s.d.Write(p[:min(len(p), recordPayload)])
		p, n = p[k:], n+k
	}
	return n, err
}

func (s *connectStream) CloseWrite() error { return s.d.CloseWrite() }

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
// what a relay does instead of copying between two streams: one goroutine beside
// the handler's, and a buffer only while bytes move. header goes with the request.
//
// An error with no byte sent to w was not answered yet: the caller refuses. A
// refusal of the next hop is a *RefusedError. After 200 was sent, answered is
// true and the error, if any, says how the stream was cut.
func Forward(w http.ResponseWriter, r *http.Request, next *Conn, authority string, header http.Header) (answered bool, err error) {
	if next.Draining() {
		return false, fmt.Errorf("connect %s through %s: %w", authority, next.peer, ErrDraining)
	}
	str, err := next.connect(r.Context(), authority, header)
	if err != nil {
		return false, fmt.Errorf("connect %s: %w", authority, err)
	}
	defer func() { _ = str.Close() }()
	rc := http.NewResponseController(w)
	w.WriteHeader(http.StatusOK)
	if err := rc.Flush(); err != nil {
		return true, err
	}
	body := &lentBody{r: r.Body, unblock: func() { _ = rc.SetReadDeadline(time.Unix(1, 0)) }, ended: make(chan struct{})}
	defer body.takeBack()
	if !next.tails.TryGo(func() { body.copyTo(r.Context(), str) }) {
		return true, ErrClosed
	}
	for {
		if _, err := str.Read(nil); err != nil { // waits without a buffer
			return true, eofIsNil(err)
		}
		chunk := chunks.Get().(*[]byte)
		n, err := str.Read(*chunk)
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

func eofIsNil(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// lentBody is a handler's request body in the hands of the goroutine that
// copies it, which may wait for the next hop when the handler has returned.
// takeBack waits for what it does with the body, not for that.
type lentBody struct {
	r       io.Reader
	unblock func()
	ended   chan struct{} // closed by takeBack

	mu   sync.Mutex // held while reading
	gone bool
}

// copyTo copies to the end of the body and hands that on. It cuts the stream
// when the body fails, or the request ends otherwise.
func (b *lentBody) copyTo(request context.Context, str *connectStream) {
	for {
		chunk, n, err := b.read()
		if n > 0 {
			if _, werr := str.Write((*chunk)[:n]); werr != nil {
				err = werr
			}
		}
		if chunk != nil {
			chunks.Put(chunk)
		}
		switch {
		case err == nil:
		case errors.Is(err, io.EOF) && str.CloseWrite() == nil:
			select {
			case <-request.Done():
				_ = str.Close()
			case <-b.ended:
			}
			return
		default:
			_ = str.Close()
			return
		}
	}
}

// read takes a buffer when there is something to read.
func (b *lentBody) read() (chunk *[]byte, n int, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.gone {
		return nil, 0, net.ErrClosed
	}
	if _, err = b.r.Read(nil); err != nil {
		return nil, 0, err
	}
	chunk = chunks.Get().(*[]byte)
	n, err = b.r.Read(*chunk)
	return chunk, n, err
}

// takeBack returns when nobody uses the body any more.
func (b *lentBody) takeBack() {
	close(b.ended)
	b.unblock()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.gone = true
}
