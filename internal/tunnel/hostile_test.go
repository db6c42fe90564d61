package tunnel

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

// raw is a tunnel whose other end we play ourselves.
func raw(t *testing.T, makeEnd func(net.Conn) *Tunnel) (peer net.Conn, end *Tunnel, ended <-chan error) {
	t.Helper()
	a, b := tcpPair(t)
	end = makeEnd(b)
	done := make(chan error, 1)
	go func() { done <- end.Run(context.Background()) }()
	t.Cleanup(func() {
		_ = a.Close()
		_ = end.Close()
		<-end.Done()
	})
	_ = a.SetDeadline(time.Now().Add(20 * time.Second))
	return a, end, done
}

func frames(list ...any) []byte {
	var b []byte
	for _, x := range list {
		switch x := x.(type) {
		case header:
			b = appendHeader(b, x)
		case string:
			b = append(b, x...)
		case []byte:
			b = append(b, x...)
		}
	}
	return b
}

func TestServerEndsTheTunnelOfAPeerThatBreaksTheRules(t *testing.T) {
	open := frames(header{kindOpen, 1, 1}, "x")
	data := frames(header{kindData, 1, 1000}, make([]byte, 1000))
	for name, what := range map[string][]byte{
		"garbage":                []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		"unknown kind":           frames(header{99, 1, 0}),
		"empty data":             frames(open, header{kindData, 1, 0}),
		"data too long":          frames(open, header{kindData, 1, MaxPayload + 1}),
		"stream 0":               frames(header{kindOpen, 0, 1}, "x"),
		"ping with a stream":     frames(header{kindPing, 1, 8}, make([]byte, 8)),
		"data before open":       data,
		"end of unknown":         frames(header{kindEnd, 5, 0}),
		"window of unknown":      frames(header{kindWindow, 5, 4}, make([]byte, 4)),
		"opened twice":           frames(open, open),
		"older id":               frames(header{kindOpen, 9, 1}, "x", header{kindOpen, 8, 1}, "x"),
		"data after end":         frames(open, header{kindEnd, 1, 0}, data),
		"end twice":              frames(open, header{kindEnd, 1, 0}, header{kindEnd, 1, 0}),
		"control in target":      frames(header{kindOpen, 1, 3}, "a\nb"),
		"control in reset":       frames(open, header{kindReset, 1, 3}, "\x01\x00\x00"),
		"reset of old, not text": frames(open, header{kindClose, 1, 0}, header{kindReset, 1, 3}, "\x01\xff\xff"),
		"window overrun":         frames(open, bytes.Repeat(data, firstWindow/1000+1)),
		"huge windows":           frames(open, bytes.Repeat(frames(header{kindWindow, 1, 4}, []byte{0x7f, 255, 255, 255}), 2)),
	} {
		t.Run(name, func(t *testing.T) {
			peer, _, ended := raw(t, func(c net.Conn) *Tunnel {
				return Server(c, nil, func(ctx context.Context, _ string, _ *Stream) { <-ctx.Done() }, Config{})
			})
			_, _ = peer.Write(what)
			_, _ = io.Copy(io.Discard, peer) // cut by the server
			if err := <-ended; !errors.Is(err, errFrame) {
				t.Errorf("ended with %v", err)
			}
		})
	}
}

func TestClientEndsTheTunnelOfAServerThatBreaksTheRules(t *testing.T) {
	for name, what := range map[string][]byte{
		"opens a stream":  frames(header{kindOpen, 1, 1}, "x"),
		"unknown stream":  frames(header{kindData, 2, 1}, "x"),
		"garbage":         []byte("HTTP/1.1 400 Bad Request\r\n\r\n"),
		"data after end":  frames(header{kindEnd, 1, 0}, header{kindData, 1, 1}, "x"),
		"window overrun":  frames(bytes.Repeat(frames(header{kindData, 1, 65000}, make([]byte, 65000)), 5)),
		"future of reset": frames(header{kindReset, 2, 1}, "\x01"),
	} {
		t.Run(name, func(t *testing.T) {
			peer, end, ended := raw(t, func(c net.Conn) *Tunnel { return Client(c, nil, Config{}) })
			s, err := end.Open("x")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = s.Close() }()
			s.announce()
			_, _ = peer.Write(what)
			_, _ = io.Copy(io.Discard, peer)
			if err := <-ended; !errors.Is(err, errFrame) {
				t.Errorf("ended with %v", err)
			}
		})
	}
}

func TestFramesOfOldStreamsAreDropped(t *testing.T) {
	served := make(chan struct{}, 10)
	peer, end, _ := raw(t, func(c net.Conn) *Tunnel {
		return Server(c, nil, func(_ context.Context, _ string, s *Stream) {
			s.Refuse(NotFound, "")
			served <- struct{}{}
		}, Config{})
	})
	_, _ = peer.Write(frames(header{kindOpen, 1, 1}, "x"))
	<-served
	if _, err := io.ReadFull(peer, make([]byte, headerLen+1)); err != nil { // the refusal
		t.Fatal(err)
	}
	_, _ = peer.Write(frames(header{kindData, 1, 3000}, make([]byte, 3000), header{kindBlocked, 1, 0}, header{kindEnd, 1, 0},
		header{kindWindow, 1, 4}, make([]byte, 4), header{kindPing, 0, 8}, "12345678"))
	pong := make([]byte, headerLen+8)
	if _, err := io.ReadFull(peer, pong); err != nil || string(pong[headerLen:]) != "12345678" || kind(pong[0]) != kindPong {
		t.Errorf("got %q, %v", pong, err)
	}
	if end.Err() != nil {
		t.Error(end.Err())
	}
}

// A peer that opens and resets gets no more handlers than it may have streams.
func TestRapidResetGetsNoMoreHandlers(t *testing.T) {
	const limit = 5
	hold, began := make(chan struct{}), make(chan struct{}, 1000)
	peer, end, _ := raw(t, func(c net.Conn) *Tunnel {
		return Server(c, nil, func(context.Context, string, *Stream) {
			began <- struct{}{}
			<-hold
		}, Config{MaxStreams: limit})
	})
	var b []byte
	for id := range uint32(200) {
		b = append(b, frames(header{kindOpen, id + 1, 1}, "x", header{kindReset, id + 1, 1}, "\x08")...)
	}
	_, _ = peer.Write(append(b, frames(header{kindPing, 0, 8}, "12345678")...))
	waitFor(t, "all was read", func() bool {
		h := make([]byte, headerLen)
		if _, err := io.ReadFull(peer, h); err != nil {
			t.Fatal(err)
		}
		parsed, err := parseHeader(h)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.CopyN(io.Discard, peer, int64(parsed.n))
		return parsed.kind == kindPong
	})
	if n := len(began); n > limit {
		t.Errorf("%d handlers run", n)
	}
	close(hold)
	_ = end.Close()
}

func TestPeerThatReadsNoAnswersIsCut(t *testing.T) {
	peer, _, ended := raw(t, func(c net.Conn) *Tunnel {
		return Server(c, nil, func(context.Context, string, *Stream) {}, Config{MaxStreams: -1}) // each is refused
	})
	go func() {
		var b []byte
		for id := uint32(1); ; id++ {
			if b = appendHeader(b, header{kindOpen, id, 1}); len(b) > 60000 {
				if _, err := peer.Write(b); err != nil {
					return
				}
				b = b[:0]
			}
			b = append(b, 'x')
		}
	}()
	select {
	case err := <-ended:
		if !errors.Is(err, errFlood) {
			t.Errorf("ended with %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("its answers pile up")
	}
}

// Small pieces are packed: what waits takes little more memory than it has bytes.
func TestSmallFramesArePacked(t *testing.T) {
	s := newStream(newTunnel(nil, nil, echo, Config{}), "x")
	for range firstWindow {
		s.copyIn([]byte{1})
	}
	memory := 0
	for b := s.in.head; b != nil; b = b.next {
		memory += len(b.buf)
	}
	if memory > 2*firstWindow {
		t.Errorf("%d bytes take %d", firstWindow, memory)
	}
	s.closeRead()
}

func TestSilentPeerIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		go func() { _, _ = io.Copy(io.Discard, a) }() // reads, and says nothing
		c := Client(b, nil, Config{})
		ended := make(chan error, 1)
		began := time.Now()
		go func() { ended <- c.Run(t.Context()) }()
		time.Sleep(10 * time.Minute) // without streams it may be silent
		if c.Err() != nil {
			t.Fatal(c.Err())
		}
		s, err := c.Open("x")
		if err != nil {
			t.Fatal(err)
		}
		s.announce()
		asked := time.Now()
		if err := <-ended; !errors.Is(err, ErrSilent) {
			t.Errorf("ended with %v", err)
		}
		if took := time.Since(asked); took > 4*keepAlive || took < 2*keepAlive {
			t.Errorf("noticed after %s", took)
		}
		_ = s.Close()
		_ = a.Close()
		t.Logf("took %s in all", time.Since(began))
	})
}

func TestPeerThatAnswersIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		c, sv := Client(a, nil, Config{}), Server(b, nil, func(ctx context.Context, _ string, _ *Stream) { <-ctx.Done() }, Config{})
		done := make(chan struct{}, 2)
		for _, end := range []*Tunnel{c, sv} {
			go func() { _ = end.Run(t.Context()); done <- struct{}{} }()
		}
		s, err := c.Open("x")
		if err != nil {
			t.Fatal(err)
		}
		s.announce()
		time.Sleep(time.Hour)
		if c.Err() != nil || sv.Err() != nil {
			t.Errorf("ended with %v, %v", c.Err(), sv.Err())
		}
		_ = s.Close()
		_ = c.Close()
		<-done
		<-done
	})
}

// FuzzTunnel feeds bytes to a server: it may end the tunnel, no more.
func FuzzTunnel(f *testing.F) {
	f.Add(frames(header{kindOpen, 1, 1}, "x", header{kindData, 1, 3}, "abc", header{kindEnd, 1, 0}))
	f.Add(frames(header{kindOpen, 1, 1}, "x", header{kindReset, 1, 2}, "\x01x", header{kindPing, 0, 8}, "12345678"))
	f.Fuzz(func(t *testing.T, b []byte) {
		x, y := net.Pipe()
		end := Server(y, nil, echo, Config{MaxStreams: 4})
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = end.Run(context.Background())
		}()
		go func() { _, _ = io.Copy(io.Discard, x) }()
		_, _ = x.Write(b)
		_ = x.Close()
		<-done
	})
}
