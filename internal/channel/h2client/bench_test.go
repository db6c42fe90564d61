package h2client_test

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/net/http2"

	"sallyport/internal/channel/h2client"
)

// clients are this package's and the one of golang.org/x/net/http2.
var clients = []struct {
	name string
	make func(net.Conn) (http.RoundTripper, error)
}{
	{"ours", func(c net.Conn) (http.RoundTripper, error) { return h2client.New(c, small) }},
	{"xnet", func(c net.Conn) (http.RoundTripper, error) {
		t := &http2.Transport{DisableCompression: true, StrictMaxConcurrentStreams: true}
		return t.NewClientConn(c)
	}},
}

// BenchmarkRoundTrip is a small request with a body and a small answer.
func BenchmarkRoundTrip(b *testing.B) {
	for _, cl := range clients {
		b.Run(cl.name, func(b *testing.B) {
			conn := overTLS(b, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }))
			defer func() { _ = conn.Close() }()
			rt, err := cl.make(conn)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				req, _ := http.NewRequestWithContext(context.Background(), http.MethodPost, "https://peer/", strings.NewReader("hello"))
				res, err := rt.RoundTrip(req)
				if err != nil {
					b.Fatal(err)
				}
				_, _ = io.Copy(io.Discard, res.Body)
				_ = res.Body.Close()
			}
		})
	}
}

// BenchmarkDownload is bulk in one response.
func BenchmarkDownload(b *testing.B) {
	piece := make([]byte, 64<<10)
	for _, cl := range clients {
		b.Run(cl.name, func(b *testing.B) {
			conn := overTLS(b, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				for {
					if _, err := w.Write(piece); err != nil {
						return
					}
				}
			}))
			defer func() { _ = conn.Close() }()
			rt, err := cl.make(conn)
			if err != nil {
				b.Fatal(err)
			}
			req, _ := http.NewRequestWithContext(context.Background(), http.MethodGet, "https://peer/", nil)
			res, err := rt.RoundTrip(req)
			if err != nil {
				b.Fatal(err)
			}
			buf := make([]byte, len(piece))
			b.SetBytes(int64(len(buf)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := io.ReadFull(res.Body, buf); err != nil {
					b.Fatal(err)
				}
			}
			_ = res.Body.Close()
		})
	}
}

// BenchmarkIdle reports what a connection costs on which one request is open
// whose answer has begun and carries nothing, as signals mostly do: what is
// above a TLS connection that a goroutine reads from.
func BenchmarkIdle(b *testing.B) {
	const n = 500
	hold := make(chan struct{})
	defer close(hold)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).Flush()
		select {
		case <-hold:
		case <-r.Context().Done():
		}
	}))
	srv.EnableHTTP2 = true
	srv.StartTLS()
	defer srv.Close()
	conf := srv.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
	conf.NextProtos = []string{"h2"}
	for _, cl := range clients {
		b.Run(cl.name, func(b *testing.B) {
			for b.Loop() {
				conns := make([]net.Conn, n)
				for i := range conns {
					c, err := tls.Dial("tcp", srv.Listener.Addr().String(), conf)
					if err != nil {
						b.Fatal(err)
					}
					conns[i] = c
				}
				heap, stack := inUse()
				held := make([]*http.Response, n)
				for i, c := range conns {
					rt, err := cl.make(c)
					if err != nil {
						b.Fatal(err)
					}
					req, _ := http.NewRequestWithContext(context.Background(), http.MethodGet, "https://peer/", nil)
					if held[i], err = rt.RoundTrip(req); err != nil {
						b.Fatal(err)
					}
				}
				h, s := inUse()
				b.ReportMetric(float64(h-heap)/n, "heap-B/conn")
				b.ReportMetric(float64(s-stack)/n, "stack-B/conn")
				for i, c := range conns {
					_ = held[i].Body.Close()
					_ = c.Close()
				}
			}
		})
	}
}

// inUse is heap and stacks of the whole process, the servers included.
func inUse() (heap, stack int64) {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc), int64(m.StackInuse)
}
