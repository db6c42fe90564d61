package h2client_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/http2"

	"sallyport/internal/channel/h2client"
)

// server answers on one end of a connection as a channel's does.
func server(t testing.TB, conn net.Conn, h http.Handler, streams uint32) {
	base := &http.Server{Handler: h}
	srv := &http2.Server{MaxConcurrentStreams: streams}
	if err := http2.ConfigureServer(base, srv); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		srv.ServeConn(conn, &http2.ServeConnOpts{Context: context.Background(), BaseConfig: base, Handler: h})
	}()
	t.Cleanup(func() { _ = conn.Close(); <-ended })
}

// overPipe and overTLS are what the tests below run on.
func overPipe(t testing.TB, h http.Handler) net.Conn {
	ours, theirs := net.Pipe()
	server(t, theirs, h, 4)
	return ours
}

func overTLS(t testing.TB, h http.Handler) net.Conn {
	srv := httptest.NewUnstartedServer(h)
	srv.EnableHTTP2 = true // that of net/http
	srv.StartTLS()
	t.Cleanup(srv.Close)
	conf := srv.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
	conf.NextProtos = []string{"h2"}
	conn, err := tls.Dial("tcp", srv.Listener.Addr().String(), conf)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func each(t *testing.T, h http.Handler, f func(t *testing.T, c *h2client.Conn)) {
	for name, over := range map[string]func(testing.TB, http.Handler) net.Conn{"pipe": overPipe, "tls": overTLS} {
		t.Run(name, func(t *testing.T) {
			c, err := h2client.New(over(t, h), small)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			f(t, c)
		})
	}
}

func TestServer(t *testing.T) {
	big := bytes.Repeat([]byte("sixteen bytes of"), 64<<10) // 1 MiB, many windows
	mux := http.NewServeMux()
	mux.HandleFunc("GET /hello", func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintf(w, "%s %s %s %s", r.Method, r.Host, r.URL, r.Header.Get("X-Some-Field"))
	})
	mux.HandleFunc("GET /big", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(big) })
	mux.HandleFunc("POST /hash", func(w http.ResponseWriter, r *http.Request) {
		h := sha256.New()
		n, err := io.Copy(h, r.Body)
		_, _ = fmt.Fprintf(w, "%d %d %x %v", r.ContentLength, n, h.Sum(nil), err)
	})
	mux.HandleFunc("POST /refuse", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) })
	each(t, mux, func(t *testing.T, c *h2client.Conn) {
		t.Run("fields", func(t *testing.T) {
			req := get(t, "/hello?x=1")
			req.Header.Set("X-Some-Field", "a value")
			req.Header.Set("Connection", "close") // is not sent
			if s := read(t, <-ask(c, req)); s != "GET peer /hello?x=1 a value" {
				t.Errorf("got %q", s)
			}
		})
		t.Run("HEAD", func(t *testing.T) {
			req := get(t, "/hello")
			req.Method = http.MethodHead
			r := <-ask(c, req)
			if s := read(t, r); s != "" || r.res.StatusCode != 200 {
				t.Errorf("got %q, %s", s, r.res.Status)
			}
		})
		t.Run("down", func(t *testing.T) {
			if s := read(t, <-ask(c, get(t, "/big"))); s != string(big) {
				t.Errorf("%d bytes came that differ", len(s))
			}
		})
		t.Run("up", func(t *testing.T) {
			for _, length := range []int64{int64(len(big)), -1, 0} {
				req := upload(t, bytes.NewReader(big))
				req.URL.Path, req.ContentLength = "/hash", length
				if length == 0 {
					length = -1 // not known, says net/http
				}
				if s, want := read(t, <-ask(c, req)), fmt.Sprintf("%d %d %x <nil>", length, len(big), sha256.Sum256(big)); s != want {
					t.Errorf("got %s, want %s", s, want)
				}
			}
		})
		t.Run("refused", func(t *testing.T) {
			for range 20 {
				req := upload(t, bytes.NewReader(big))
				req.URL.Path = "/refuse"
				r := <-ask(c, req)
				if r.err != nil || r.res.StatusCode != http.StatusForbidden {
					t.Fatalf("got %+v", r)
				}
				_ = r.res.Body.Close()
			}
		})
		t.Run("many at a time", func(t *testing.T) {
			var wg sync.WaitGroup
			for i := range 100 {
				wg.Go(func() {
					req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://peer/hash", strings.NewReader(strings.Repeat("x", 300*i)))
					if s := read(t, <-ask(c, req)); !strings.HasSuffix(s, "<nil>") {
						t.Error(s)
					}
				})
			}
			wg.Wait()
		})
		if err := c.Ping(t.Context()); err != nil || c.Err() != nil {
			t.Error(err, c.Err())
		}
	})
}

// A tunnel that carries much in both directions at once, beside others that
// are full and that nobody reads.
func TestTunnels(t *testing.T) {
	each(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		w.WriteHeader(http.StatusOK)
		_ = rc.Flush()
		if r.Host == "stalled:1" {
			_, _ = w.Write(make([]byte, 1<<20))
			return
		}
		_, _ = io.Copy(flusher{w, rc}, r.Body)
	}), func(t *testing.T, c *h2client.Conn) {
		open := func(host string) *h2client.Stream {
			req := get(t, "/")
			req.Method, req.Host = http.MethodConnect, host
			s, res, err := c.Connect(req)
			if err != nil || res.StatusCode != http.StatusOK {
				t.Fatal(res, err)
			}
			return s
		}
		for range 3 {
			s := open("stalled:1")
			defer func() { _ = s.Close() }()
		}
		s := open("echo:1")
		defer func() { _ = s.Close() }()
		data := bytes.Repeat([]byte("there and back. "), 256<<10) // 4 MiB
		go func() {
			_, _ = s.Write(data)
			_ = s.CloseWrite()
		}()
		got, err := io.ReadAll(s)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d of %d bytes came back: %v", len(got), len(data), err)
		}
	})
}

type flusher struct {
	io.Writer
	rc *http.ResponseController
}

func (f flusher) Write(p []byte) (int, error) {
	n, err := f.Writer.Write(p)
	if err == nil {
		err = f.rc.Flush()
	}
	return n, err
}

// Close ends what runs, whatever it waits for.
func TestClose(t *testing.T) {
	each(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}), func(t *testing.T, c *h2client.Conn) {
		r := <-ask(c, get(t, "/"))
		if r.err != nil {
			t.Fatal(r.err)
		}
		pr, _ := io.Pipe()
		up := <-ask(c, upload(t, pr))
		if up.err != nil {
			t.Fatal(up.err)
		}
		reading := make(chan error, 1)
		go func() {
			_, err := io.ReadAll(r.res.Body)
			reading <- err
		}()
		_ = c.Close()
		if err := <-reading; err == nil {
			t.Error("a body ended as if it were whole")
		}
		if _, err := c.RoundTrip(get(t, "/")); err == nil {
			t.Error("a request after Close")
		}
		_ = up.res.Body.Close()
	})
}
