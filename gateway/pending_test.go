package gateway

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/wire"
)

// An RCP that takes a CONNECT and then says nothing must not use up the time
// in which another way would have worked.
func TestStalledWayToAPendingPartyLeavesTimeForTheNext(t *testing.T) {
	key := wire.KeyHash(strings.Repeat("ab", 32))
	stalls := func(ctx context.Context) (net.Conn, error) {
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}
	pipe := func(context.Context) (net.Conn, error) {
		near, _ := net.Pipe()
		return near, nil
	}
	type open struct{ endToEnd }
	for _, c := range []struct {
		name  string
		first pendingWay
	}{
		{"connect", pendingWay{"evil", stalls}},
		{"handshake", pendingWay{"evil", pipe}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), pendingTime)
				defer cancel()
				began, dials := time.Now(), 0
				ways := []pendingWay{c.first, {"good", pipe}}
				s, rcp, err := openPending(ctx, key, ways, func(ctx context.Context, stream net.Conn) (endToEnd, error) {
					if dials++; c.name == "handshake" && dials == 1 {
						<-ctx.Done()
						return nil, context.Cause(ctx)
					}
					return open{}, stream.Close()
				})
				if err != nil || s == nil || rcp != "good" || time.Since(began) != pendingOpen {
					t.Fatalf("session %v by %q after %v: %v", s, rcp, time.Since(began), err)
				}
			})
		})
	}
	_, _, err := openPending(t.Context(), key, []pendingWay{{"evil", func(context.Context) (net.Conn, error) { return nil, errors.New("no") }}}, nil)
	if !errors.Is(err, ErrNotConnected) || !strings.Contains(err.Error(), "rcp evil: no") {
		t.Fatal(err)
	}
}

// The first hop of a party is one with room: an RCP that reports the parties of
// others and lets its sessions hang keeps none of them from a look.
func TestPendingPartyIsLookedAtByWayOfAHopWithRoom(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	evil, good := b.rcp("evil"), b.rcp("good")
	key := wire.KeyHash(strings.Repeat("cd", 32))
	for _, r := range []wire.ID{evil, good} {
		b.up(r)
		b.snapshot(r, "e")
		if err := b.f.apply(r, wire.PeersLine{Peer: &wire.Peer{Pending: key}}); err != nil {
			t.Fatal(err)
		}
	}
	s := &Server{fleet: b.f}
	s.links = newLinks(s)
	for range 20 {
		if _, hop, _, ok := s.whereIs(key, func(hop wire.ID) bool { return hop != evil }); !ok || hop != good {
			t.Fatalf("looked at by way of %s, %v", hop, ok)
		}
	}
}
