package gateway

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/wire"
)

// A node that is visited in the session in which it was enrolled comes back
// running, and its new channel calls for no visit: not when it comes in the
// middle, nor when its first signal is from before it took what it was given.
func TestNodeThatWasVisitedAtItsEnrolmentIsNotVisitedAgain(t *testing.T) {
	for _, c := range []struct {
		name           string
		before, within bool // when its channel comes; neither: after the visit
		failed, other  bool // what the visit was; what the node claims at last
		visits         int
	}{
		{name: "channel before the visit", before: true},
		{name: "channel within the visit", within: true},
		{name: "channel after the visit"},
		{name: "visit failed, channel before it", before: true, failed: true, visits: 1},
		{name: "visit failed, channel after it", failed: true, visits: 1},
		{name: "the node has changed since", before: true, other: true, visits: 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t)
				r, n := b.rcp("dmz"), b.node("web", wire.StatePending)
				b.up(r)
				b.snapshot(r, "e1")
				early := wire.Hello{State: wire.StateRunning, Versions: wire.OwnVersions, Installation: "inst"}
				hello := early
				hello.Applied = wire.Revision{Generation: 1, N: 1}
				claims := func(h wire.Hello) {
					t.Helper()
					p := nodePeer(n)
					p.Digest = h.Digest()
					if err := b.f.apply(r, wire.PeersLine{Peer: &p, Pos: 2}); err != nil {
						t.Fatal(err)
					}
					b.work()
				}
				task, ok := b.f.beginFirst(n)
				if !ok || task.id != n || !task.known || task.role != wire.RoleNode {
					t.Fatalf("the visit is %+v, %v", task, ok)
				}
				if _, ok := b.f.beginFirst(n); ok {
					t.Fatal("two have the same visit")
				}
				if c.before {
					claims(early)
				}
				var again want
				if c.failed {
					again = task.wants
				} else {
					b.f.verifiedHello(n, wire.RoleNode, early, 0)
					if c.within {
						claims(early)
					}
					b.f.took(n, &wire.DesiredResult{Applied: hello.Applied})
				}
				last := hello
				if c.other {
					last.State = wire.StateReadonly
				}
				b.hellos[n] = last
				b.f.endFirst(n, again)
				b.work()
				if !c.before && !c.within {
					b.pass(time.Second)
				}
				claims(last)
				b.pass(10 * time.Second)
				if b.visits[n] != c.visits {
					t.Errorf("%d ordinary visits, want %d", b.visits[n], c.visits)
				}
				b.want(n, last.State, "")
				b.pass(time.Hour) // it is proven in its turn
				if v := b.visits[n]; v < 3 {
					t.Errorf("%d visits in an hour", v)
				}
			})
		})
	}
}

// closedOnce counts.
type closedOnce struct {
	nopSession
	closed int
}

func (s *closedOnce) Close() error { s.closed++; return nil }

// What is asked of a party goes through the session that was lent for
// as long as it is.
func TestLentSession(t *testing.T) {
	b := newBench(t)
	dials := 0
	s := b.sessions(t, func(context.Context, wire.ID) (endToEnd, error) {
		dials++
		return nil, ErrNotConnected
	})
	node := wire.Party{Role: wire.RoleNode, ID: b.node("web", wire.StatePending)}
	ask := func() (used endToEnd, err error) {
		err = s.Do(t.Context(), node, func(_ context.Context, c *conversation) error {
			used = c.rt
			return nil
		})
		return used, err
	}
	rt := &closedOnce{}
	s.lend(node, rt, func() {
		for range 2 {
			if used, err := ask(); err != nil || used != endToEnd(rt) {
				t.Fatalf("asked through %v: %v", used, err)
			}
		}
	})
	s.closing.Wait()
	if rt.closed != 1 {
		t.Fatalf("it was closed %d times", rt.closed)
	}
	if _, err := ask(); err == nil {
		t.Fatal("it was asked through a session that is closed")
	}
}
