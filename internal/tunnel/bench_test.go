package tunnel

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"sync"
	"testing"
)

// echoTCP is a backend that echoes each connection.
func echoTCP(tb testing.TB) net.Listener {
	tb.Helper()
	return serveTCP(tb, func(c net.Conn) {
		buf := make([]byte, 64<<10)
		for {
			n, err := c.Read(buf)
			if err != nil {
				return
			}
			if _, err := c.Write(buf[:n]); err != nil {
				return
			}
		}
	})
}

func serveTCP(tb testing.TB, serve func(net.Conn)) net.Listener {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				serve(c)
			})
		}
	})
	tb.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
	})
	return l
}

// forwarded is a listener whose connections go through a tunnel to backend.
func forwarded(tb testing.TB, backend net.Addr) net.Addr {
	tb.Helper()
	w := newWorld(tb, "tls on tcp", func(ctx context.Context, _ string, s *Stream) {
		c, err := net.Dial("tcp", backend.String())
		if err != nil {
			s.Refuse(Unreachable, err.Error())
			return
		}
		_, _, _ = Join(ctx, s, c)
	}, Config{})
	l := serveTCP(tb, func(c net.Conn) {
		s, err := w.client.Open("backend")
		if err != nil {
			tb.Error(err)
			return
		}
		_, _, _ = Join(context.Background(), s, c)
	})
	return l.Addr()
}

// BenchmarkBulk sends from one end to the other: what a tunnel itself costs.
func BenchmarkBulk(b *testing.B) {
	for name, streams := range map[string]int{"1": 1, "8": 8} {
		b.Run(name, func(b *testing.B) {
			w := newWorld(b, "tls on tcp", func(_ context.Context, _ string, s *Stream) {
				_, _ = s.WriteTo(io.Discard)
				_ = s.CloseWrite()
			}, Config{})
			const size = 1 << 20
			buf := make([]byte, size)
			b.SetBytes(size)
			b.ReportAllocs()
			defer reportCPU(b)()
			var wg sync.WaitGroup
			for i := range streams {
				s := w.open(b, "sink")
				wg.Go(func() {
					for n := i; n < b.N; n += streams {
						if _, err := s.Write(buf); err != nil {
							b.Error(err)
							return
						}
					}
					_ = s.CloseWrite()
					_, _ = s.Read(buf)
				})
			}
			wg.Wait()
		})
	}
}

// BenchmarkForwardBulk goes from TCP to TCP: client, tunnel, backend.
func BenchmarkForwardBulk(b *testing.B) {
	for name, streams := range map[string]int{"1": 1, "8": 8} {
		b.Run(name, func(b *testing.B) {
			sink := serveTCP(b, func(c net.Conn) {
				buf := make([]byte, 256<<10)
				for {
					if _, err := c.Read(buf); err != nil {
						return
					}
				}
			})
			addr := forwarded(b, sink.Addr())
			const size = 1 << 20
			buf := make([]byte, size)
			b.SetBytes(size)
			b.ReportAllocs()
			defer reportCPU(b)()
			var wg sync.WaitGroup
			for i := range streams {
				wg.Go(func() {
					c, err := net.Dial("tcp", addr.String())
					if err != nil {
						b.Error(err)
						return
					}
					defer func() { _ = c.Close() }()
					for n := i; n < b.N; n += streams {
						if _, err := c.Write(buf); err != nil {
							b.Error(err)
							return
						}
					}
					_ = c.(*net.TCPConn).CloseWrite()
					_, _ = c.Read(buf)
				})
			}
			wg.Wait()
		})
	}
}

// BenchmarkPingPong sends 100 bytes there and back again through TCP, tunnel
// and TCP; "direct" is without the tunnel.
func BenchmarkPingPong(b *testing.B) {
	backend := echoTCP(b)
	for name, addr := range map[string]net.Addr{"direct": backend.Addr(), "tunnel": forwarded(b, backend.Addr())} {
		b.Run(name, func(b *testing.B) {
			c, err := net.Dial("tcp", addr.String())
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			buf := make([]byte, 100)
			b.ReportAllocs()
			defer reportCPU(b)()
			for b.Loop() {
				if _, err := c.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkRequests is as BenchmarkPingPong inside the tunnel alone, on 64 streams at once.
func BenchmarkRequests(b *testing.B) {
	w := newWorld(b, "tls on tcp", func(_ context.Context, _ string, s *Stream) {
		buf := make([]byte, 1000)
		for {
			n, err := s.Read(buf)
			if err != nil {
				return
			}
			if _, err := s.Write(buf[:n]); err != nil {
				return
			}
		}
	}, Config{})
	b.ReportAllocs()
	defer reportCPU(b)()
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		s, err := w.client.Open("echo")
		if err != nil {
			b.Error(err)
			return
		}
		defer func() { _ = s.Close() }()
		buf := make([]byte, 100)
		for pb.Next() {
			if _, err := s.Write(buf); err != nil {
				b.Error(err)
				return
			}
			if _, err := io.ReadFull(s, buf); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

// BenchmarkOpen opens a stream, sends and gets one message, and closes it.
func BenchmarkOpen(b *testing.B) {
	w := newWorld(b, "tls on tcp", func(_ context.Context, _ string, s *Stream) {
		buf := make([]byte, 100)
		n, _ := s.Read(buf)
		_, _ = s.Write(buf[:n])
	}, Config{})
	b.ReportAllocs()
	defer reportCPU(b)()
	b.SetParallelism(8)
	b.RunParallel(func(pb *testing.PB) {
		buf := make([]byte, 100)
		for pb.Next() {
			s, err := w.client.Open("echo")
			if err != nil {
				b.Error(err)
				return
			}
			if _, err := s.Write(buf); err != nil {
				b.Error(err)
			}
			if _, err := io.ReadFull(s, buf); err != nil {
				b.Error(err)
			}
			_ = s.Close()
		}
	})
}

// BenchmarkBareTLS is the yardstick of BenchmarkBulk: no tunnel, no Batch.
func BenchmarkBareTLS(b *testing.B) {
	x, y := tcpPair(b)
	cert := testCert()
	conf := &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: nil, MinVersion: tls.VersionTLS13, DynamicRecordSizingDisabled: true}
	s := tls.Server(y, conf)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, s, make([]byte, 64<<10))
	}()
	roots := tlsRoots()
	c := tls.Client(x, &tls.Config{RootCAs: roots, ServerName: "peer", MinVersion: tls.VersionTLS13, DynamicRecordSizingDisabled: true})
	buf := make([]byte, 1<<20)
	b.SetBytes(1 << 20)
	for b.Loop() {
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
	_ = c.Close()
	<-done
}
