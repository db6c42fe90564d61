package channel_test

import (
	"context"
	"errors"
	"net/http"
	"testing"
	"time"

	"sallyport/internal/channel"
)

// A connection may go on without anybody waiting for its end, where its port
// accepted it from downstream over TCP. Nobody lets go of it before that end was followed.
func TestConnectionStays(t *testing.T) {
	each(t, func(t *testing.T, v variant) {
		p := newPlant(t, v, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }))
		p.open(t)
		l := p.listener
		type served struct {
			c     *channel.Conn
			stays bool
		}
		got := make(chan served, 1)
		ending, ended := make(chan *channel.Conn), make(chan bool)
		ctx, cancel := context.WithCancel(t.Context())
		ran := make(chan struct{})
		go func() {
			defer close(ran)
			_ = l.Run(ctx, func(_ context.Context, c *channel.Conn) {
				stays := c.Stay(func() { ending <- c; <-ended })
				got <- served{c, stays}
			})
		}()
		defer func() { cancel(); <-ran }()

		dial := func() (*channel.Conn, served) {
			t.Helper()
			c, err := p.dialler(t).Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close(nil) })
			go func() { _ = c.Serve(t.Context(), p.handler) }()
			return c, <-got
		}
		if v.ordinary || v.carrier == "h3" {
			if c, err := p.dialler(t).Dial(ctx); err == nil { // else it has ended already, as Run's function returned
				<-c.Done()
			}
			if s := <-got; s.stays {
				t.Error("it stays")
			}
			return
		}
		c, s := dial()
		if !s.stays {
			t.Fatal("it does not stay")
		}
		res, err := request(t.Context(), t, s.c, http.MethodGet, "/", nil)
		if err != nil || res.StatusCode != http.StatusNoContent {
			t.Fatalf("it does not go on: %v", err)
		}
		_ = res.Body.Close()
		if n := len(l.Conns()); n != 1 {
			t.Errorf("%d connections", n)
		}
		c.Close(nil)
		if e := <-ending; e != s.c || e.Err() == nil {
			t.Errorf("the end of %s: %v", e.Peer(), e.Err())
		}
		ended <- true
		eventually(t, "the port lets go of it", func() bool { return len(l.Conns()) == 0 })

		_, s = dial() // and now the port is closed
		cancel()
		if e := <-ending; e != s.c || !errors.Is(e.Err(), context.Canceled) {
			t.Errorf("the end of %s: %v", e.Peer(), e.Err())
		}
		select {
		case <-ran:
			t.Error("Run did not wait for what stayed")
		case <-time.After(50 * time.Millisecond):
		}
		ended <- true
		<-ran
	})
}
