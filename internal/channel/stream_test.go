package channel_test

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/nettest"

	"sallyport/internal/channel"
	"sallyport/internal/channel/channeltest"
)

func TestStreamIsAConn(t *testing.T) {
	up, down := channeltest.Pair(t)
	conns := make(chan net.Conn)
	go func() {
		_ = down.Serve(context.Background(), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			c, err := channel.AcceptConnect(w, r)
			if err != nil {
				t.Error(err)
				return
			}
			h := &handed{Conn: c, closed: make(chan struct{})}
			conns <- h
			select {
			case <-h.closed:
			case <-r.Context().Done():
				_ = h.Close()
			}
		}))
	}()
	for _, swap := range []bool{false, true} {
		t.Run(map[bool]string{false: "client", true: "server"}[swap], func(t *testing.T) {
			nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
				c1, err = up.Connect(context.Background(), "x:443", nil)
				if err != nil {
					return nil, nil, nil, err
				}
				c2 = <-conns
				a, b := c1, c2
				if swap {
					c1, c2 = c2, c1
				}
				return c1, c2, func() { _ = a.Close(); _ = b.Close() }, nil
			})
		})
	}
}

// handed is a stream whose handler wants to know when it is closed.
type handed struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

func (h *handed) Close() error {
	err := h.Conn.Close()
	h.once.Do(func() { close(h.closed) })
	return err
}

func TestRefusal(t *testing.T) {
	up, down := channeltest.Pair(t)
	go func() {
		_ = down.Serve(context.Background(), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			channel.Refuse(w, http.StatusNotFound, "no\nsuch "+r.Host)
		}))
	}()
	_, err := up.Connect(context.Background(), "x:443", nil)
	var refused *channel.RefusedError
	if !errors.As(err, &refused) || refused.Status != 404 || refused.Reason != "no such x:443" || !strings.Contains(err.Error(), "connect x:443") {
		t.Errorf("got %v", err)
	}
}
