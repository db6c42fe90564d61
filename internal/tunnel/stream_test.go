package tunnel

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func everyCarrier(t *testing.T, f func(t *testing.T, carrier string)) {
	for carrier := range carriers {
		t.Run(carrier, func(t *testing.T) { f(t, carrier) })
	}
}

// echo ends its direction when the client has ended his.
func echo(_ context.Context, _ string, s *Stream) {
	_, _ = io.Copy(s, s)
	_ = s.CloseWrite()
}

func TestHalfCloseInEachDirection(t *testing.T) {
	everyCarrier(t, func(t *testing.T, carrier string) {
		wrote := make(chan error, 1)
		w := newWorld(t, carrier, func(_ context.Context, target string, s *Stream) {
			switch target {
			case "client first": // its end is the question
				b, err := io.ReadAll(s)
				if err == nil {
					_, err = fmt.Fprintf(s, "%d bytes", len(b))
				}
				wrote <- err
			case "server first":
				_, _ = io.WriteString(s, "banner")
				_ = s.CloseWrite()
				b, err := io.ReadAll(s)
				if string(b) != "after the end" {
					err = fmt.Errorf("server read %q, %w", b, err)
				}
				wrote <- err
			}
		}, Config{})
		s := w.open(t, "client first")
		if _, err := s.Write(make([]byte, 300_000)); err != nil {
			t.Fatal(err)
		}
		if err := s.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Write([]byte("x")); err == nil {
			t.Error("a write after CloseWrite succeeds")
		}
		if b, err := io.ReadAll(s); err != nil || string(b) != "300000 bytes" {
			t.Errorf("got %q, %v", b, err)
		}
		if err := <-wrote; err != nil {
			t.Error(err)
		}
		s = w.open(t, "server first")
		if b, err := io.ReadAll(s); err != nil || string(b) != "banner" {
			t.Errorf("got %q, %v", b, err)
		}
		if _, err := io.WriteString(s, "after the end"); err != nil {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := <-wrote; err != nil {
			t.Error(err)
		}
		waitFor(t, "no stream is left", func() bool { return w.client.Streams() == 0 && w.server.Streams() == 0 })
	})
}

// waitFor waits for a condition.
func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	late := time.After(10 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("not in time: %s", what)
		}
	}
}

func TestBytesArriveAsTheyWere(t *testing.T) {
	everyCarrier(t, func(t *testing.T, carrier string) {
		w := newWorld(t, carrier, echo, Config{})
		var wg sync.WaitGroup
		defer wg.Wait()
		for i := range 8 {
			size := []int{1, 100, 4096, 5000, MaxPayload, MaxPayload + 1, 1 << 20, 6_000_001}[i]
			s := w.open(t, "echo")
			sent := make([]byte, size)
			_, _ = rand.Read(sent)
			wg.Go(func() {
				for p := sent; len(p) > 0; { // in pieces of all sizes
					n := min(len(p), 1+len(p)/3)
					if _, err := s.Write(p[:n]); err != nil {
						t.Error(err)
						return
					}
					p = p[n:]
				}
				_ = s.CloseWrite()
			})
			wg.Go(func() {
				got, err := io.ReadAll(s)
				if err != nil || !bytes.Equal(got, sent) {
					t.Errorf("%d bytes: %d came back, %v", size, len(got), err)
				}
			})
		}
	})
}

// All streams but one are read by nobody, at either end: the one goes on.
func TestStalledStreamsDelayNobody(t *testing.T) {
	everyCarrier(t, func(t *testing.T, carrier string) {
		const stalled = 40
		hold := make(chan struct{})
		defer close(hold)
		w := newWorld(t, carrier, func(ctx context.Context, target string, s *Stream) {
			switch target {
			case "deaf":
				<-hold
			case "talker":
				buf := make([]byte, 100_000)
				for {
					if _, err := s.Write(buf); err != nil {
						return
					}
				}
			default:
				echo(ctx, target, s)
			}
		}, Config{})
		var full sync.WaitGroup
		for i := range stalled {
			s := w.open(t, []string{"deaf", "talker"}[i%2])
			s.announce()
			if i%2 == 0 {
				full.Go(func() {
					_ = s.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
					n, err := s.Write(make([]byte, 10<<20))
					var ne net.Error
					if !errors.As(err, &ne) || !ne.Timeout() || n > firstWindow {
						t.Errorf("a stream that nobody reads took %d bytes, then %v", n, err)
					}
				})
			}
		}
		full.Wait()
		s := w.open(t, "echo")
		_ = s.SetDeadline(time.Now().Add(10 * time.Second))
		buf := make([]byte, 1<<20)
		for range 10 {
			if _, err := s.Write(buf[:100_000]); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(s, buf[:100_000]); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestWindowGrowsForFastReadersOnly(t *testing.T) {
	budget := NewBudget(tunnelBudget)
	var window atomic.Int64
	w := newWorld(t, "tls on tcp", func(_ context.Context, _ string, s *Stream) {
		buf := make([]byte, 1<<20)
		for {
			if _, err := s.Read(buf); err != nil {
				s.mu.Lock()
				defer s.mu.Unlock()
				window.Store(s.window)
				return
			}
		}
	}, Config{Budget: budget})
	s := w.open(t, "fast")
	buf := make([]byte, 1<<20)
	for range 64 {
		if _, err := s.Write(buf); err != nil {
			t.Fatal(err)
		}
	}
	_ = s.Close()
	waitFor(t, "the stream is over", func() bool { return window.Load() > 0 && w.server.Streams() == 0 })
	t.Logf("window: %d", window.Load())
	if window.Load() > maxWindow {
		t.Errorf("the window grew to %d", window.Load())
	}
	waitFor(t, "what was taken of the budget is back", func() bool { return budget.left.Load() == tunnelBudget })
}

func TestBudgetBoundsWindows(t *testing.T) {
	budget := NewBudget(3 * firstWindow)
	s := newStream(newTunnel(nil, nil, echo, Config{Budget: budget}), "x")
	grow := func() {
		s.hungry = true
		s.growLocked()
	}
	grow() // takes 1, leaves 2
	grow() // takes 2
	grow()
	if s.window != 4*firstWindow || budget.left.Load() != 0 {
		t.Errorf("window %d, %d left of the budget", s.window, budget.left.Load())
	}
	s.returnBudgetLocked()
	s.returnBudgetLocked()
	if budget.left.Load() != 3*firstWindow {
		t.Errorf("%d came back", budget.left.Load())
	}
}

func TestRefusal(t *testing.T) {
	everyCarrier(t, func(t *testing.T, carrier string) {
		w := newWorld(t, carrier, func(_ context.Context, _ string, s *Stream) {
			s.Refuse(Unreachable, "dial tcp 192.0.2.1:80: no route")
		}, Config{})
		s := w.open(t, "gone")
		if _, err := io.WriteString(s, "hello"); err != nil {
			t.Fatal(err)
		}
		_, err := s.Read(make([]byte, 10))
		var refused *RefusedError
		if !errors.As(err, &refused) || refused.Code != Unreachable || refused.Reason != "dial tcp 192.0.2.1:80: no route" {
			t.Errorf("read gave %v", err)
		}
		if _, err := io.WriteString(s, "hello"); !errors.As(err, &refused) {
			t.Errorf("write gave %v", err)
		}
		if w.client.Streams() != 0 {
			t.Error("the stream is still open")
		}
	})
}

func TestResetMidBody(t *testing.T) {
	everyCarrier(t, func(t *testing.T, carrier string) {
		w := newWorld(t, carrier, func(_ context.Context, _ string, s *Stream) {
			_, _ = s.Write(make([]byte, 200_000))
			s.Refuse(Reset, "")
		}, Config{})
		s := w.open(t, "x")
		n, err := io.Copy(io.Discard, s)
		var refused *RefusedError
		if !errors.As(err, &refused) || refused.Code != Reset || n != 200_000 {
			t.Errorf("%d bytes, then %v", n, err)
		}
	})
}

func TestClosedStreamStopsItsWriter(t *testing.T) {
	everyCarrier(t, func(t *testing.T, carrier string) {
		stopped := make(chan error, 1)
		gone := make(chan struct{})
		w := newWorld(t, carrier, func(ctx context.Context, _ string, s *Stream) {
			var err error
			for err == nil {
				_, err = s.Write(make([]byte, 50_000))
			}
			stopped <- err
			<-ctx.Done()
			close(gone)
		}, Config{})
		s := w.open(t, "x")
		if _, err := io.ReadFull(s, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		_ = s.Close()
		if err := <-stopped; !errors.Is(err, ErrStopped) {
			t.Errorf("write gave %v", err)
		}
		<-gone
		if _, err := s.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read after Close gave %v", err)
		}
	})
}

func TestEndOfTunnelEndsStreams(t *testing.T) {
	everyCarrier(t, func(t *testing.T, carrier string) {
		ended := make(chan error, 1)
		w := newWorld(t, carrier, func(_ context.Context, _ string, s *Stream) {
			_, _ = io.WriteString(s, "some")
			_, err := io.Copy(io.Discard, s)
			ended <- err
		}, Config{})
		s := w.open(t, "x")
		idle := w.open(t, "never used")
		if _, err := io.ReadFull(s, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
		writing := make(chan error, 1)
		deaf := w.open(t, "deaf")
		go func() {
			var err error
			for err == nil {
				_, err = deaf.Write(make([]byte, 1<<20))
			}
			writing <- err
		}()
		_ = w.server.Close()
		for name, s := range map[string]*Stream{"used": s, "unused": idle} {
			if _, err := s.Read(make([]byte, 4)); err == nil || errors.Is(err, io.EOF) {
				t.Errorf("%s: read gave %v: an end like any other", name, err)
			}
		}
		if err := <-writing; err == nil {
			t.Error("writing goes on")
		}
		if err := <-ended; err == nil {
			t.Error("the server's stream ended like any other")
		}
		if _, err := w.client.Open("x"); err == nil {
			t.Error("a dead tunnel opens streams")
		}
		<-w.client.Done()
	})
}

func TestStreamLimit(t *testing.T) {
	hold := make(chan struct{})
	defer close(hold)
	a, b, below, sBelow := carriers["tls on tcp"](t)
	w := &world{client: Client(a, below, Config{MaxStreams: 6}), server: Server(b, sBelow, func(context.Context, string, *Stream) { <-hold }, Config{MaxStreams: 3}),
		ended: make(chan error, 2), stop: func() {}}
	w.wg.Go(func() { w.ended <- w.client.Run(context.Background()) })
	w.wg.Go(func() { w.ended <- w.server.Run(context.Background()) })
	t.Cleanup(w.wg.Wait)
	t.Cleanup(func() { _ = w.client.Close() })
	var streams []*Stream
	for range 6 {
		streams = append(streams, w.open(t, "x"))
	}
	if _, err := w.client.Open("x"); !errors.Is(err, ErrFull) {
		t.Errorf("one stream above the limit gave %v", err)
	}
	for _, s := range streams {
		s.announce()
	}
	var refused *RefusedError
	if _, err := streams[3].Read(make([]byte, 1)); !errors.As(err, &refused) || refused.Code != Overloaded {
		t.Errorf("one above the server's limit gave %v", err)
	}
}

func TestUnusedStreamIsNeverOpened(t *testing.T) {
	opened := make(chan string, 10)
	w := newWorld(t, "tls on tcp", func(_ context.Context, target string, _ *Stream) { opened <- target }, Config{})
	if err := w.open(t, "unused").Close(); err != nil {
		t.Fatal(err)
	}
	s := w.open(t, "used")
	if _, err := io.ReadAll(s); err != nil {
		t.Fatal(err)
	}
	if got := <-opened; got != "used" || len(opened) != 0 {
		t.Errorf("the server heard of %q and %d more", got, len(opened))
	}
}

// joined is a TCP connection that goes through a tunnel to serve.
func joined(t *testing.T, serve func(*net.TCPConn)) *net.TCPConn {
	t.Helper()
	backend := serveTCP(t, func(c net.Conn) { serve(c.(*net.TCPConn)) })
	c, err := net.Dial("tcp", forwarded(t, backend.Addr()).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	return c.(*net.TCPConn)
}

func TestJoinPassesHalfClose(t *testing.T) {
	c := joined(t, func(c *net.TCPConn) {
		b, _ := io.ReadAll(c)
		_, _ = fmt.Fprintf(c, "%d", len(b))
	})
	if _, err := c.Write(make([]byte, 3_000_000)); err != nil {
		t.Fatal(err)
	}
	_ = c.CloseWrite()
	if b, err := io.ReadAll(c); err != nil || string(b) != "3000000" {
		t.Errorf("got %q, %v", b, err)
	}
	got := make(chan string, 1)
	c = joined(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "banner")
		_ = c.CloseWrite()
		b, _ := io.ReadAll(c)
		got <- string(b)
	})
	if b, err := io.ReadAll(c); err != nil || string(b) != "banner" {
		t.Errorf("got %q, %v", b, err)
	}
	_, _ = io.WriteString(c, "more")
	_ = c.Close()
	if s := <-got; s != "more" {
		t.Errorf("the backend got %q", s)
	}
}

func TestJoinPassesReset(t *testing.T) {
	c := joined(t, func(c *net.TCPConn) {
		_, _ = io.ReadFull(c, make([]byte, 5))
		_ = c.SetLinger(0)
	})
	_, _ = io.WriteString(c, "hello")
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the backend's reset gave %v", err)
	}
	got := make(chan error, 1)
	c = joined(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "hello")
		_, err := io.Copy(io.Discard, c)
		got <- err
	})
	if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	_ = c.SetLinger(0)
	_ = c.Close()
	if err := <-got; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client's reset gave %v", err)
	}
}

// A backend that is gone frees the client, although he says nothing.
func TestJoinEndsIdleClientsWhenTheBackendIsGone(t *testing.T) {
	c := joined(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "bye")
		_ = c.CloseWrite()
		_ = c.SetLinger(0)
		_, _ = io.ReadFull(c, make([]byte, 1))
	})
	if b, err := io.ReadAll(c); err != nil || string(b) != "bye" {
		t.Fatalf("got %q, %v", b, err)
	}
	if _, err := io.WriteString(c, "x"); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the client's connection is cut", func() bool {
		_, err := io.WriteString(c, "x")
		return err != nil
	})
}

func TestJoinEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	w := newWorld(t, "tls on tcp", echo, Config{})
	a, b := tcpPair(t)
	defer func() { _ = b.Close() }()
	done := make(chan error, 1)
	go func() {
		_, _, err := Join(ctx, w.open(t, "x"), a)
		done <- err
	}()
	if _, err := io.WriteString(b, "hello"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(b, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("joined until %v", err)
	}
	if _, err := b.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection ends with %v", err)
	}
}
