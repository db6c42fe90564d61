package h2client_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"sallyport/internal/channel/h2client"
)

// What a server may do to one stream, and that it does not harm the others.
func TestResponses(t *testing.T) {
	bubble(t, "informational responses precede the real one", func(t *testing.T) {
		c, p := newPeer(t, small)
		got := ask(c, get(t, "/"))
		p.want("HEADERS 1 end")
		p.answer(1, false, ":status", "103", "link", "</x>")
		p.answer(1, false, ":status", "200", "x-a", "b")
		p.do(p.WriteDataPadded(1, true, []byte("hello"), make([]byte, 100)))
		r := <-got
		if s := read(t, r); s != "hello" || r.res.Header.Get("X-A") != "b" || r.res.Header.Get("Link") != "" {
			t.Errorf("got %q %v", s, r.res.Header)
		}
	})
	bubble(t, "too many of them do not", func(t *testing.T) {
		c, p := newPeer(t, small)
		got := ask(c, get(t, "/"))
		p.want("HEADERS 1 end")
		for range 17 {
			p.answer(1, false, ":status", "102")
		}
		p.want("RST_STREAM 1 PROTOCOL_ERROR")
		wantStreamError(t, (<-got).err, h2client.CodeProtocol, false)
	})
	bubble(t, "no body", func(t *testing.T) {
		c, p := newPeer(t, small)
		got := ask(c, get(t, "/"))
		p.want("HEADERS 1 end")
		p.answer(1, true, ":status", "200")
		if r := <-got; r.err != nil || r.res.Body != http.NoBody || r.res.ContentLength != 0 {
			t.Errorf("got %+v", r)
		}
	})
	bubble(t, "trailers are read over", func(t *testing.T) {
		c, p := newPeer(t, small)
		got := ask(c, get(t, "/"))
		p.want("HEADERS 1 end")
		p.answer(1, false, ":status", "200")
		p.do(p.WriteData(1, false, []byte("hello")))
		p.answer(1, true, "x-sum", "1")
		if s := read(t, <-got); s != "hello" {
			t.Errorf("got %q", s)
		}
	})
	for name, pairs := range map[string][]string{
		"no status":          {"x-a", "b"},
		"second status":      {":status", "200", ":status", "200"},
		"status after":       {"x-a", "b", ":status", "200"},
		"short status":       {":status", "20"},
		"request's field":    {":status", "200", ":path", "/"},
		"capitals":           {":status", "200", "X-A", "b"},
		"line break":         {":status", "200", "x-a", "b\r\nc"},
		"connection's field": {":status", "200", "transfer-encoding", "chunked"},
		"two lengths":        {":status", "200", "content-length", "1", "content-length", "2"},
		"switching":          {":status", "101"},
	} {
		bubble(t, "malformed: "+name, func(t *testing.T) {
			c, p := newPeer(t, small)
			got := ask(c, get(t, "/"))
			p.want("HEADERS 1 end")
			p.answer(1, false, pairs...)
			p.want("RST_STREAM 1 PROTOCOL_ERROR")
			if r := <-got; r.err == nil {
				t.Errorf("got %v", r.res)
			}
			still(t, c, p, 3)
		})
	}
	bubble(t, "header above the limit", func(t *testing.T) {
		c, p := newPeer(t, small)
		got := ask(c, get(t, "/"))
		p.want("HEADERS 1 end")
		block := headers(":status", "200", "x-a", strings.Repeat("x", 20<<10))
		p.do(p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block[:10<<10]}))
		p.do(p.WriteContinuation(1, true, block[10<<10:]))
		if r := <-got; !errors.Is(r.err, h2client.ErrTooLarge) {
			t.Errorf("got %v", r.err)
		}
		still(t, c, p, 3)
	})
	for name, c := range map[string]struct {
		send string
		want string
		rst  bool
	}{
		"exact": {"12345", "12345", false},
		"less":  {"1234", "1234, then unexpected EOF", false},
		"more":  {"123456", ", then HTTP/2 stream was reset, PROTOCOL_ERROR: more data than Content-Length", true},
	} {
		bubble(t, "content-length: "+name, func(t *testing.T) {
			conn, p := newPeer(t, small)
			got := ask(conn, get(t, "/"))
			p.want("HEADERS 1 end")
			p.answer(1, false, ":status", "200", "content-length", "5")
			p.do(p.WriteData(1, true, []byte(c.send)))
			if s := read(t, <-got); s != c.want {
				t.Errorf("got %q, want %q", s, c.want)
			}
			if c.rst {
				p.want("RST_STREAM 1 PROTOCOL_ERROR")
			}
			still(t, conn, p, 3)
		})
	}
	bubble(t, "reset", func(t *testing.T) {
		c, p := newPeer(t, small)
		got := ask(c, get(t, "/"))
		p.want("HEADERS 1 end")
		p.answer(1, false, ":status", "200")
		p.do(p.WriteData(1, false, []byte("some")))
		p.do(p.WriteRSTStream(1, http2.ErrCodeInternal))
		if s := read(t, <-got); s != "some, then HTTP/2 stream was reset by the peer: INTERNAL_ERROR" {
			t.Errorf("got %q", s)
		}
		still(t, c, p, 3)
	})
}

// still shows that the connection has survived.
func still(t *testing.T, c *h2client.Conn, p *peer, id uint32) {
	t.Helper()
	got := ask(c, get(t, "/still"))
	p.want("HEADERS " + string('0'+rune(id)) + " end")
	p.answer(id, true, ":status", "204")
	if r := <-got; r.err != nil {
		t.Errorf("the connection did not survive: %v", r.err)
	}
}

func TestCancel(t *testing.T) {
	bubble(t, "before the response", func(t *testing.T) {
		c, p := newPeer(t, small)
		ctx, cancel := context.WithCancel(t.Context())
		got := ask(c, get(t, "/").WithContext(ctx))
		p.want("HEADERS 1 end")
		cancel()
		p.want("RST_STREAM 1 CANCEL")
		if r := <-got; !errors.Is(r.err, context.Canceled) {
			t.Errorf("got %v", r.err)
		}
		p.answer(1, false, ":status", "200") // it was under way
		still(t, c, p, 3)
	})
	bubble(t, "while the body is read", func(t *testing.T) {
		c, p := newPeer(t, small)
		ctx, cancel := context.WithCancel(t.Context())
		got := ask(c, get(t, "/").WithContext(ctx))
		p.want("HEADERS 1 end")
		p.answer(1, false, ":status", "200")
		r := <-got
		time.AfterFunc(time.Second, cancel)
		if _, err := r.res.Body.Read(make([]byte, 1)); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		p.want("RST_STREAM 1 CANCEL")
	})
	bubble(t, "by closing the body", func(t *testing.T) {
		c, p := newPeer(t, small)
		got := ask(c, get(t, "/"))
		p.want("HEADERS 1 end")
		p.answer(1, false, ":status", "200")
		p.do(p.WriteData(1, false, []byte("some")))
		r := <-got
		_ = r.res.Body.Close()
		p.want("RST_STREAM 1 CANCEL")
		if _, err := r.res.Body.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("read of a closed body gave %v", err)
		}
	})
	bubble(t, "no answer in time", func(t *testing.T) {
		cfg := small
		cfg.HeaderTimeout = time.Minute
		c, p := newPeer(t, cfg)
		began := time.Now()
		if _, err := c.RoundTrip(get(t, "/")); !errors.Is(err, h2client.ErrNoAnswer) || time.Since(began) != time.Minute {
			t.Errorf("got %v after %v", err, time.Since(began))
		}
		p.want("RST_STREAM 1 CANCEL")
	})
	bubble(t, "data for a stream that is gone gives its window back", func(t *testing.T) {
		c, p := newPeer(t, h2client.Config{StreamWindow: 16 << 10, ConnWindow: 128 << 10, MaxHeader: 4 << 10, Authority: "peer"})
		s, _, err := connect(t, c, p, 1)
		if err != nil {
			t.Fatal(err)
		}
		_ = s.Close()
		p.want("RST_STREAM 1 CANCEL")
		for range 4 {
			p.do(p.WriteData(1, false, make([]byte, 16<<10)))
		}
		p.want("WINDOW_UPDATE 0 +65536")
	})
}

// connect opens a stream on a peer that is asked for nothing else meanwhile.
func connect(t *testing.T, c *h2client.Conn, p *peer, id uint32) (*h2client.Stream, *http.Response, error) {
	t.Helper()
	type opened struct {
		s   *h2client.Stream
		res *http.Response
		err error
	}
	done := make(chan opened, 1)
	req := get(t, "/")
	req.Method, req.Host = http.MethodConnect, "x:443"
	go func() {
		s, res, err := c.Connect(req)
		done <- opened{s, res, err}
	}()
	p.want("HEADERS " + string('0'+rune(id)))
	p.answer(id, false, ":status", "200")
	o := <-done
	return o.s, o.res, o.err
}

func TestConnect(t *testing.T) {
	bubble(t, "both ways", func(t *testing.T) {
		c, p := newPeer(t, small)
		ctx, cancel := context.WithCancel(t.Context())
		s, res, err := connect(t, c, p, 1)
		if err != nil || res.StatusCode != 200 {
			t.Fatal(res, err)
		}
		cancel() // bounds the opening only
		_ = ctx
		if n, err := s.Write([]byte("down")); n != 4 || err != nil {
			t.Error(n, err)
		}
		p.want("DATA 1 4 bytes")
		p.do(p.WriteData(1, false, []byte("up")))
		if n, err := s.Read(nil); n != 0 || err != nil { // waits
			t.Error(n, err)
		}
		b := make([]byte, 10)
		if n, err := s.Read(b); string(b[:n]) != "up" || err != nil {
			t.Errorf("%q %v", b[:n], err)
		}
		if n, wait, err := s.TryRead(b); n != 0 || wait == nil || err != nil {
			t.Error(n, wait, err)
		}
		if err := s.CloseWrite(); err != nil {
			t.Error(err)
		}
		p.want("DATA 1 0 bytes end")
		if _, err := s.Write([]byte("x")); err == nil {
			t.Error("written after the end")
		}
		p.do(p.WriteData(1, true, []byte("last")))
		if b, err := io.ReadAll(s); string(b) != "last" || err != nil {
			t.Errorf("%q %v", b, err)
		}
		_ = s.Close() // both are through: nothing is reset
		still(t, c, p, 3)
	})
	bubble(t, "the end of the connection is not that of the stream", func(t *testing.T) {
		c, p := newPeer(t, small)
		s, _, err := connect(t, c, p, 1)
		if err != nil {
			t.Fatal(err)
		}
		_ = p.conn.Close()
		if _, err := s.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("got %v", err)
		}
		if _, err := s.Write([]byte("x")); err == nil {
			t.Error("written to a dead connection")
		}
	})
}

func TestRequestBodies(t *testing.T) {
	bubble(t, "a small one goes along with the header", func(t *testing.T) {
		c, p := newPeer(t, small)
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://peer/", strings.NewReader("hello"))
		got := ask(c, req)
		p.want("HEADERS 1")
		p.want("DATA 1 5 bytes end")
		p.answer(1, true, ":status", "200")
		if r := <-got; r.err != nil {
			t.Error(r.err)
		}
	})
	bubble(t, "as far as the window allows", func(t *testing.T) {
		c, p := newPeer(t, small, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 3})
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://peer/", strings.NewReader("hello"))
		got := ask(c, req)
		p.want("DATA 1 3 bytes")
		p.do(p.WriteWindowUpdate(1, 10))
		p.want("DATA 1 2 bytes end")
		p.answer(1, true, ":status", "200")
		if r := <-got; r.err != nil {
			t.Error(r.err)
		}
	})
	bubble(t, "of a length that is not what was said", func(t *testing.T) {
		c, p := newPeer(t, small)
		for _, length := range []int64{4, 6} {
			req := upload(t, strings.NewReader("hello"))
			req.ContentLength = length
			if _, err := c.RoundTrip(req); err == nil {
				t.Errorf("5 bytes were sent as %d", length)
			}
		}
		p.want("RST_STREAM 3 CANCEL")
	})
	bubble(t, "that the server does not want", func(t *testing.T) {
		c, p := newPeer(t, small, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 10})
		pr, pw := io.Pipe()
		got := ask(c, upload(t, pr))
		p.want("HEADERS 1")
		written := make(chan error, 1)
		go func() {
			_, err := io.WriteString(pw, strings.Repeat(kilobyte, 4))
			written <- err
		}()
		p.want("DATA 1 1024 bytes")
		p.answer(1, true, ":status", "200")
		p.do(p.WriteRSTStream(1, http2.ErrCodeNo)) // RFC 9113 section 8.1
		if r := <-got; r.err != nil || r.res.StatusCode != 200 {
			t.Errorf("got %+v", r)
		}
		if err := <-written; err != nil && !errors.Is(err, io.ErrClosedPipe) {
			t.Error(err)
		}
		if _, err := pw.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("the body was not closed: %v", err)
		}
	})
	bubble(t, "that the server refuses", func(t *testing.T) {
		c, p := newPeer(t, small)
		pr, pw := io.Pipe()
		got := ask(c, upload(t, pr))
		p.want("HEADERS 1")
		p.answer(1, true, ":status", "413")
		p.want("RST_STREAM 1 CANCEL")
		if r := <-got; r.err != nil || r.res.StatusCode != 413 {
			t.Errorf("got %+v", r)
		}
		synctest.Wait()
		if _, err := pw.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("the body was not closed: %v", err)
		}
	})
	bubble(t, "that fails", func(t *testing.T) {
		c, p := newPeer(t, small)
		pr, pw := io.Pipe()
		got := ask(c, upload(t, pr))
		p.want("HEADERS 1")
		broken := errors.New("disk is gone")
		_ = pw.CloseWithError(broken)
		p.want("RST_STREAM 1 CANCEL")
		if r := <-got; !errors.Is(r.err, broken) {
			t.Errorf("got %v", r.err)
		}
	})
}

func TestInvalidRequests(t *testing.T) {
	bubble(t, "are not sent", func(t *testing.T) {
		c, p := newPeer(t, small, http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: 1 << 10})
		for name, spoil := range map[string]func(*http.Request){
			"method":              func(r *http.Request) { r.Method = "GET /" },
			"field name":          func(r *http.Request) { r.Header["X Y"] = []string{"z"} },
			"field value":         func(r *http.Request) { r.Header["X"] = []string{"a\r\nb"} },
			"path":                func(r *http.Request) { r.URL.Opaque = "\x00" },
			"our limit":           func(r *http.Request) { r.Header.Set("X", strings.Repeat("x", 17<<10)) },
			"the peer's limit":    func(r *http.Request) { r.Header.Set("X", strings.Repeat("x", 2<<10)) },
			"CONNECT to no place": func(r *http.Request) { r.Method, r.Host, r.URL.Host = http.MethodConnect, "", "" },
		} {
			req := get(t, "/")
			spoil(req)
			if _, err := c.RoundTrip(req); err == nil {
				t.Errorf("%s: it was sent", name)
			}
		}
		still(t, c, p, 1)
	})
}
