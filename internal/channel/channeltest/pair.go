// Package channeltest gives other packages' tests real channels in memory.
package channeltest

import (
	"context"
	"log/slog"
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
	d := &channel.Dialer{Addr: "memory:443", Peer: dir, Identity: dialler, Log: log, DialContext: network.DialContext, Carrier: channel.CarrierH2, NoConfirm: true,
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
