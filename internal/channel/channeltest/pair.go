// Package channeltest gives other packages' tests real channels in memory.
package channeltest

import (
	"context"
	"log/slog"
	"net"
	"testing"

	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

// Log writes to the test's own log.
func Log(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// Pair returns both ends of an ordinary channel between a new gateway and a
// new RCP: upstream is the gateway's end (for RoundTrip and Connect),
// downstream the RCP's (for Serve). Both are closed with the test.
func Pair(t testing.TB) (upstream, downstream *channel.Conn) {
	t.Helper()
	ca := identitytest.NewCA(t)
	return PairOf(t, ca.Party(t, wire.RoleGateway), ca.Party(t, wire.RoleRCP), true)
}

// PairOf returns both ends of a channel between two parties. With ordinary the
// upstream party dials, else the downstream one. If one of them has no
// certificate it is an enrolment channel, and that one must be downstream.
func PairOf(t testing.TB, up, down *identity.Identity, ordinary bool) (upstream, downstream *channel.Conn) {
	t.Helper()
	network := NewNetwork()
	return pairOn(t, network, network.DialContext, "memory:443", up, down, ordinary)
}

// PairTCP is PairOf over TCP on loopback, for benchmarks: the network in memory
// is slower than the kernel's.
func PairTCP(t testing.TB, up, down *identity.Identity, ordinary bool) (upstream, downstream *channel.Conn) {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return pairOn(t, l, new(net.Dialer).DialContext, l.Addr().String(), up, down, ordinary)
}

func pairOn(t testing.TB, network net.Listener, dial func(ctx context.Context, network, addr string) (net.Conn, error), addr string,
	up, down *identity.Identity, ordinary bool,
) (upstream, downstream *channel.Conn) {
	t.Helper()
	dialler, listener, dir := up, down, channel.PeerDownstream
	if !ordinary {
		dialler, listener, dir = down, up, channel.PeerUpstream
	}
	log := Log(t)
	l, err := channel.Listen(channel.ListenConfig{Identity: listener, Listener: network, Log: log,
		AllowUpstream: true, AllowDownstream: true, AllowEnroll: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	accepted := make(chan *channel.Conn, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = l.Run(ctx, func(ctx context.Context, c *channel.Conn) {
			accepted <- c
			<-c.Done()
		})
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	_, certified := down.Party()
	d := &channel.Dialer{Addr: addr, Peer: dir, Identity: dialler, Log: log, DialContext: dial, Carrier: channel.CarrierH2, NoConfirm: true,
		Enroll: func() bool { return !certified }}
	c, err := d.Dial(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(nil) })
	other := <-accepted
	if ordinary {
		return c, other
	}
	return other, c
}
