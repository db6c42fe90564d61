package h2client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"go.uber.org/goleak"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"sallyport/internal/channel/h2client"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var small = h2client.Config{StreamWindow: 64 << 10, ConnWindow: 1 << 20, MaxHeader: 16 << 10, Authority: "peer"}

// bubble runs a test on a fake clock. That all goroutines have ended when it
// returns is a condition of synctest.
func bubble(t *testing.T, name string, f func(t *testing.T)) {
	t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
}

// peer is a server of which each frame is written down in the test.
type peer struct {
	*http2.Framer
	t      *testing.T
	conn   net.Conn
	frames chan string // what the client sends
	gate   atomic.Pointer[chan struct{}]
}

// pause makes the peer read nothing more but go on to write, until resume.
func (p *peer) pause() {
	gate := make(chan struct{})
	p.gate.Store(&gate)
}

func (p *peer) resume() { close(*p.gate.Swap(nil)) }

// Read implements the gate.
func (p *peer) Read(b []byte) (int, error) {
	if gate := p.gate.Load(); gate != nil {
		<-*gate
	}
	return p.conn.Read(b)
}

// newPeer connects a client with a peer that has sent its settings and reads
// whatever comes.
func newPeer(t *testing.T, cfg h2client.Config, settings ...http2.Setting) (*h2client.Conn, *peer) {
	t.Helper()
	ours, theirs := net.Pipe()
	p := &peer{t: t, conn: theirs, frames: make(chan string, 10000)}
	p.Framer = http2.NewFramer(theirs, p)
	go func() {
		preface := make([]byte, len(http2.ClientPreface))
		if _, err := io.ReadFull(theirs, preface); err != nil || string(preface) != http2.ClientPreface {
			t.Errorf("the preface is %q, %v", preface, err)
		}
		p.read()
	}()
	c, err := h2client.New(ours, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(); _ = theirs.Close() })
	p.do(p.WriteSettings(settings...))
	p.want("SETTINGS ack")
	return c, p
}

func (p *peer) do(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *peer) read() {
	defer close(p.frames)
	for {
		f, err := p.ReadFrame()
		if err != nil {
			return
		}
		p.frames <- describe(f)
	}
}

func describe(f http2.Frame) string {
	h := f.Header()
	s := fmt.Sprintf("%s %d", h.Type, h.StreamID)
	switch f := f.(type) {
	case *http2.SettingsFrame:
		if s = "SETTINGS"; f.IsAck() {
			s += " ack"
		}
	case *http2.PingFrame:
		if s = "PING"; f.IsAck() {
			s += " ack"
		}
	case *http2.DataFrame:
		s += fmt.Sprintf(" %d bytes", len(f.Data()))
		if f.StreamEnded() {
			s += " end"
		}
	case *http2.HeadersFrame:
		if f.StreamEnded() {
			s += " end"
		}
	case *http2.WindowUpdateFrame:
		s += fmt.Sprintf(" +%d", f.Increment)
	case *http2.RSTStreamFrame:
		s += " " + f.ErrCode.String()
	case *http2.GoAwayFrame:
		s = "GOAWAY " + f.ErrCode.String()
	}
	return s
}

// want reads on until the client sends this.
func (p *peer) want(frame string) {
	p.t.Helper()
	var others []string
	for f := range p.frames {
		if f == frame {
			return
		}
		others = append(others, f)
	}
	p.t.Fatalf("the client has not sent %q but %q", frame, others)
}

// headers are those of a response: pairs of name and value.
func headers(pairs ...string) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	e.SetMaxDynamicTableSize(0) // as SETTINGS_HEADER_TABLE_SIZE says
	for i := 0; i < len(pairs); i += 2 {
		_ = e.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]})
	}
	return b.Bytes()
}

func (p *peer) answer(id uint32, end bool, pairs ...string) {
	p.t.Helper()
	p.do(p.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: headers(pairs...), EndHeaders: true, EndStream: end}))
}

func get(t *testing.T, path string) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, "http://peer"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	return req
}

// result is what became of a request.
type result struct {
	res *http.Response
	err error
}

func ask(c *h2client.Conn, req *http.Request) chan result {
	done := make(chan result, 1)
	go func() {
		res, err := c.RoundTrip(req)
		done <- result{res, err}
	}()
	return done
}

func read(t *testing.T, r result) string {
	t.Helper()
	if r.err != nil {
		t.Fatal(r.err)
	}
	b, err := io.ReadAll(r.res.Body)
	_ = r.res.Body.Close()
	if err != nil {
		return fmt.Sprintf("%s, then %v", b, err)
	}
	return string(b)
}

func wantStreamError(t *testing.T, err error, code h2client.ErrCode, remote bool) {
	t.Helper()
	var e *h2client.StreamError
	if !errors.As(err, &e) || e.Code != code || e.Remote != remote {
		t.Errorf("got %v, want a stream error with code %s", err, code)
	}
}

func wantConnError(t *testing.T, c *h2client.Conn, code h2client.ErrCode) {
	t.Helper()
	<-c.Done()
	var e *h2client.ConnError
	if !errors.As(c.Err(), &e) || e.Code != code || e.Remote {
		t.Errorf("the connection ended with %v, want %s", c.Err(), code)
	}
}

// upload is a body of which the transport does not know that it is in memory.
func upload(t *testing.T, body io.Reader) *http.Request {
	t.Helper()
	if _, ok := body.(io.Closer); !ok {
		body = io.NopCloser(body)
	}
	req, err := http.NewRequestWithContext(context.Background(), http.MethodPost, "http://peer/up", body)
	if err != nil {
		t.Fatal(err)
	}
	return req
}

var kilobyte = strings.Repeat("0123456789abcdef", 64)
