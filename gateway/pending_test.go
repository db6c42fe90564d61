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
		if at, ok := s.whereIs(key, func(hop wire.ID) bool { return hop != evil }); !ok || at.Link != good {
			t.Fatalf("looked at by way of %s, %v", at.Link, ok)
		}
		// And the session goes that way first: the other one has no say in how
		// long the place is taken.
		if ways := s.pendingWays(key, good); len(ways) != 2 || ways[0].rcp != "good" {
			t.Fatalf("%d ways, the first by %s", len(ways), ways[0].rcp)
		}
	}
}

// TestPlacesAreKeptBesideAHostileRCP: one that lets nothing through does not hold
// the look at a party that waits at another one too.
func TestPlacesAreKeptBesideAHostileRCP(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	evil, good := w.rcp("evil"), w.rcp("good")
	evil.hang = make(chan struct{})
	defer close(evil.hang)
	key := wire.KeyHash(strings.Repeat("ef", 32))
	w.run()
	for _, r := range []*fakeRCP{evil, good} {
		r.say(wire.PeersLine{Peer: &wire.Peer{Pending: key}})
	}
	eventually(t, "both report it", func() bool { return len(w.s.fleet.pendingRoutes(key)) == 2 })
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.s.keepPlace(t.Context(), key)
	}()
	for _, r := range []*fakeRCP{evil, good} {
		eventually(t, r.name+" is told", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return r.kept[wire.PendingAuthority(key)] > 0 })
	}
	<-done // and the hanging one is given up
}
