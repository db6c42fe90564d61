package channel_test

import (
	"errors"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"sallyport/internal/channel"
)

// TestNoRequestIsSentTwice: HTTP/2 may send a GET again that the server says it
// has not begun (RFC 9113, section 8.7), and net/http does. A nonce in a hello
// must reach a node once, so a session's client never does that by itself.
func TestNoRequestIsSentTwice(t *testing.T) {
	t.Parallel()
	for name, refuse := range map[string]func(*http2.Framer, uint32) error{
		"refused stream": func(f *http2.Framer, id uint32) error { return f.WriteRSTStream(id, http2.ErrCodeRefusedStream) },
		"GOAWAY before it": func(f *http2.Framer, _ uint32) error {
			return f.WriteGoAway(0, http2.ErrCodeNo, nil)
		},
		"GOAWAY and refused": func(f *http2.Framer, id uint32) error {
			return errors.Join(f.WriteGoAway(0, http2.ErrCodeNo, nil), f.WriteRSTStream(id, http2.ErrCodeRefusedStream))
		},
		"connection lost": func(*http2.Framer, uint32) error { return io.ErrClosedPipe },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = ln.Close() }()
			near, err := net.Dial("tcp", ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			far, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			asked := make(chan int, 1)
			go func() {
				n := 0
				defer func() { _ = far.Close(); asked <- n }()
				if _, err := io.ReadFull(far, make([]byte, len(http2.ClientPreface))); err != nil {
					return
				}
				f := http2.NewFramer(far, far)
				if f.WriteSettings() != nil {
					return
				}
				for {
					frame, err := f.ReadFrame()
					if err != nil {
						return
					}
					if h, ok := frame.(*http2.HeadersFrame); ok {
						n++
						if refuse(f, h.StreamID) != nil {
							return
						}
					}
				}
			}()
			c, err := channel.Client(near)
			if err != nil {
				t.Fatal(err)
			}
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://peer/v1/hello", nil)
			if err != nil {
				t.Fatal(err)
			}
			answered := make(chan error, 1)
			go func() {
				res, err := c.RoundTrip(req)
				if err == nil {
					_ = res.Body.Close()
				}
				answered <- err
			}()
			select {
			case err := <-answered:
				if err == nil {
					t.Error("a refused request has an answer")
				}
			case <-time.After(20 * time.Second):
				t.Error("no end")
			}
			_ = c.Close()
			if n := <-asked; n != 1 {
				t.Errorf("the request was sent %d times", n)
			}
		})
	}
}
