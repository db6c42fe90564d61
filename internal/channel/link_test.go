package channel_test

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/channel/channeltest"
	"sallyport/internal/wire"
)

func TestLinkGrowsByDialling(t *testing.T) {
	conns := make(chan net.Conn, 100)
	classes := make(chan string, 100)
	h := handOver(t, conns)
	p := newPlant(t, variant{"h2", true}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		classes <- channel.FromContext(r.Context()).Class()
		h.ServeHTTP(w, r)
	}))
	p.limits = channel.Limits{Streams: 10}
	p.listen(t)
	link := channel.NewLink(channeltest.Log(t))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	admins := make(chan *channel.Conn, 1)
	d := p.dialler(t)
	d.Backoff.First = time.Millisecond
	go func() {
		ended <- link.Run(ctx, d, func(_ context.Context, c *channel.Conn) {
			admins <- c
			<-c.Done()
		})
	}()
	if _, err := link.Connect(t.Context(), "x:443", nil); !errors.Is(err, channel.ErrNotConnected) && err != nil {
		t.Errorf("got %v", err)
	}
	admin := <-admins
	for range 20 {
		c, err := link.Connect(t.Context(), "x:443", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		if got := <-classes; got != channel.ClassSession {
			t.Errorf("the stream came on a connection of class %q", got)
		}
	}
	if admin.Streams() > 1 || admin.Class() != channel.ClassAdmin || link.Admin() != admin {
		t.Errorf("the admin connection carries %d streams", admin.Streams())
	}
	// 20 streams at 10 a connection, and another one opens at 8.
	if n := len(link.Conns()); n < 3 || n > 5 {
		t.Errorf("%d connections", n)
	}
	for _, c := range link.Conns() {
		if c.Streams() > 10 {
			t.Errorf("%d streams on one connection", c.Streams())
		}
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("Run returned %v", err)
	}
	if link.Admin() != nil || len(link.Conns()) != 0 {
		t.Error("connections are left")
	}
}

func TestLinkGrowsByAsking(t *testing.T) {
	conns := make(chan net.Conn, 100)
	accept := handOver(t, conns)
	var p *plant
	var further sync.WaitGroup
	t.Cleanup(further.Wait)
	p = newPlant(t, variant{"h2", false}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != wire.PathChannels {
			accept.ServeHTTP(w, r)
			return
		}
		var m wire.MoreChannels
		if err := wire.DecodeJSON(r.Body, 1<<10, &m); err != nil {
			t.Error(err)
		}
		more := p.dialler(t)
		more.Class = m.Class
		further.Go(func() {
			c, err := more.Dial(t.Context())
			if err != nil {
				return // they are counted below
			}
			defer c.Close(nil)
			p.serve(t.Context(), c)
		})
	}))
	p.limits = channel.Limits{Streams: 10}
	link := channel.NewLink(channeltest.Log(t))
	attached := make(chan struct{}, 10)
	p.listen(t)
	go func() {
		for {
			select {
			case c := <-p.accepted:
				detach := link.Attach(c)
				attached <- struct{}{}
				context.AfterFunc(t.Context(), detach)
			case <-t.Context().Done():
				return
			}
		}
	}()
	d := p.dialler(t)
	d.Backoff.First = time.Millisecond
	run(t, d, p.serve)
	<-attached
	admin := link.Admin()
	for range 20 {
		c, err := link.Connect(t.Context(), "x:443", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
	}
	if n := len(link.Conns()); n < 3 || n > 5 {
		t.Errorf("%d connections", n)
	}
	if link.Admin() != admin || admin.Streams() != 0 {
		t.Errorf("the admin connection carries %d streams", admin.Streams())
	}
}

func TestLinkWithoutMore(t *testing.T) {
	p := newPlant(t, variant{"h2", false}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect {
			http.NotFound(w, r)
			return
		}
		echo(t).ServeHTTP(w, r)
	}))
	up := p.connect(t)
	link := channel.NewLink(channeltest.Log(t))
	defer link.Attach(up)()
	for range 3 {
		c, err := link.Connect(t.Context(), "x:443", nil)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
	}
	res, err := request(t.Context(), t, link.Admin(), http.MethodGet, "/", nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
}
