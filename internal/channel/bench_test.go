package channel_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"testing"

	"sallyport/internal/channel"
	"sallyport/internal/channel/channeltest"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

func pairTCP(b *testing.B) (upstream, downstream *channel.Conn) {
	ca := identitytest.NewCA(b)
	return channeltest.PairTCP(b, ca.Party(b, wire.RoleGateway), ca.Party(b, wire.RoleRCP), true)
}

// BenchmarkForward reports bytes through a relay: over two channels with TLS on
// loopback, all three parties in this process.
func BenchmarkForward(b *testing.B) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	next, far := pairTCP(b)
	up, near := pairTCP(b)
	got := make(chan int64, 1)
	go func() {
		_ = far.Serve(ctx, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			c, err := channel.AcceptConnect(w, r)
			if err != nil {
				b.Error(err)
				return
			}
			n, _ := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, make([]byte, 64<<10))
			_ = c.Close()
			got <- n
		}))
	}()
	go func() {
		_ = near.Serve(ctx, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = channel.Forward(w, r, next, r.Host, nil)
		}))
	}()
	c, err := up.Connect(ctx, "x:443", nil)
	if err != nil {
		b.Fatal(err)
	}
	data := make([]byte, 64<<10)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	sent := int64(0)
	for b.Loop() {
		n, err := c.Write(data)
		sent += int64(n)
		if err != nil {
			b.Fatal(err)
		}
	}
	_ = c.Close()
	if n := <-got; n != sent {
		b.Errorf("%d bytes were sent, %d arrived", sent, n)
	}
}

// BenchmarkConnect opens and closes streams through a relay.
func BenchmarkConnect(b *testing.B) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	next, far := pairTCP(b)
	up, near := pairTCP(b)
	go func() {
		_ = far.Serve(ctx, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if c, err := channel.AcceptConnect(w, r); err == nil {
				echoOnce(c)
				_ = c.Close()
			}
		}))
	}()
	go func() {
		_ = near.Serve(ctx, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = channel.Forward(w, r, next, r.Host, nil)
		}))
	}()
	b.ReportAllocs()
	var one [1]byte
	for b.Loop() {
		c, err := up.Connect(ctx, "x:443", nil)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := c.Write(one[:]); err != nil {
			b.Fatal(err)
		}
		if _, err := c.Read(one[:]); err != nil {
			b.Fatal(err)
		}
		_ = c.Close()
	}
}

func echoOnce(c net.Conn) {
	var one [1]byte
	if _, err := c.Read(one[:]); err == nil {
		_, _ = c.Write(one[:]) // the other end fails without it
	}
}

// BenchmarkSealedPass is what a relay does with a sealed lane: all of its two
// legs, four ends of TLS, in this process.
func BenchmarkSealedPass(b *testing.B) {
	upper, lower := newLanes(), newLanes()
	pair := func(l *lanes) (a, c *channel.SealedLeg) {
		up, down := pairPort(b)
		served := make(chan struct{})
		go func() { defer close(served); _ = down.Serve(context.Background(), l) }()
		b.Cleanup(func() { down.Close(nil); <-served })
		return sealedPair(b, up, l)
	}
	in, near := pair(upper)
	far, out := pair(lower)
	joined := make(chan error, 1)
	go func() {
		var err error
		for err == nil {
			_, err = near.Pass(far)
		}
		joined <- err
		_ = far.CloseWrite()
	}()
	got := make(chan int64, 1)
	go func() {
		n, _ := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{out}, make([]byte, 256<<10))
		got <- n
	}()
	data := make([]byte, 256<<10)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	sent := int64(0)
	for b.Loop() {
		n, err := in.Write(data)
		sent += int64(n)
		if err != nil {
			b.Fatal(err)
		}
	}
	_ = in.CloseWrite()
	if err := <-joined; !errors.Is(err, io.EOF) {
		b.Error(err)
	}
	if n := <-got; n != sent {
		b.Errorf("%d bytes were sent, %d arrived", sent, n)
	}
}

// pairPort is a channel over a port, beside which there can be lanes.
func pairPort(b *testing.B) (up, down *channel.Conn) {
	b.Helper()
	ca := identitytest.NewCA(b)
	accepted := make(chan *channel.Conn, 1)
	ln, err := channel.Listen(channel.ListenConfig{Addr: "127.0.0.1:0", Identity: ca.Party(b, wire.RoleRCP), AllowUpstream: true,
		Carriers: []string{channel.CarrierH2}, Log: channeltest.Log(b)})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = ln.Run(ctx, func(_ context.Context, c *channel.Conn) { accepted <- c; <-c.Done() })
	}()
	b.Cleanup(func() { cancel(); <-ended })
	d := &channel.Dialer{Addr: ln.Addr().String(), Peer: channel.PeerDownstream, Identity: ca.Party(b, wire.RoleGateway), Carrier: channel.CarrierH2,
		NoConfirm: true, Log: channeltest.Log(b)}
	if up, err = d.Dial(ctx); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { up.Close(nil) })
	return up, <-accepted
}
