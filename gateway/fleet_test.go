package gateway

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/wire"
)

// bench drives a fleet as the server does, without the server: it ticks when
// due, and answers visits with a hello unless the node is told to fail.
type bench struct {
	t       *testing.T
	f       *fleet
	visits  map[wire.ID]int
	broken  map[wire.ID]bool
	hellos  map[wire.ID]wire.Hello
	changes []change
}

func newBench(t *testing.T) *bench {
	return &bench{t: t, f: newFleet(defaultTimings, "inst"),
		visits: map[wire.ID]int{}, broken: map[wire.ID]bool{}, hellos: map[wire.ID]wire.Hello{}}
}

func (b *bench) node(name string, state wire.NodeState) wire.ID {
	id := wire.NewID()
	b.f.learn(record{ID: id, Role: wire.RoleNode, Name: name, State: state, Since: time.Now()})
	return id
}

func (b *bench) rcp(name string) wire.ID {
	id := wire.NewID()
	b.f.learn(record{ID: id, Role: wire.RoleRCP, Name: name, State: wire.StateDown, Since: time.Now()})
	b.f.expect(id, wire.RoleRCP, name, "203.0.113.1:9090")
	return id
}

func (b *bench) up(rcp wire.ID) {
	b.f.linkUp(linkInfo{ID: rcp, Role: wire.RoleRCP, Name: b.f.nameOf(rcp), Carrier: "h2", Since: time.Now()})
}

func (b *bench) snapshot(rcp wire.ID, epoch string, peers ...wire.Peer) {
	b.t.Helper()
	if err := b.f.peersHello(rcp, wire.PeersHello{ID: rcp, Epoch: epoch, Snapshot: true, Versions: wire.OwnVersions}); err != nil {
		b.t.Fatal(err)
	}
	for i, p := range peers {
		if err := b.f.apply(rcp, wire.PeersLine{Peer: &p, Pos: int64(i + 1)}); err != nil {
			b.t.Fatal(err)
		}
	}
	if err := b.f.apply(rcp, wire.PeersLine{Synced: true, Pos: int64(len(peers) + 1)}); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) gone(rcp, id wire.ID, path ...wire.ID) {
	b.t.Helper()
	if err := b.f.apply(rcp, wire.PeersLine{Gone: &wire.Gone{ID: id, Path: path, Reason: "closed"}}); err != nil {
		b.t.Fatal(err)
	}
}

func nodePeer(id wire.ID, path ...wire.ID) wire.Peer {
	return wire.Peer{Role: wire.RoleNode, ID: id, Path: path, Carrier: "h2", Since: time.Now()}
}

// work does all visits that are queued.
func (b *bench) work() {
	for c := range choreCount {
		for {
			t, ok := b.f.take(c)
			if !ok {
				break
			}
			if c == choreVisit || c == choreStranger {
				b.visits[t.id]++
				if b.broken[t.id] {
					b.f.unproven(t.id, errors.New("no answer"))
				} else {
					h, ok := b.hellos[t.id]
					if !ok {
						h = wire.Hello{State: wire.StateRunning, Versions: wire.OwnVersions, Installation: "inst"}
					}
					b.f.verifiedHello(t.id, t.role, h, 0)
				}
			}
			b.f.done(c, t, 0, 0)
		}
	}
	c, _ := b.f.takeChanges(true)
	b.changes = append(b.changes, c...)
}

// pass lets d go by.
func (b *bench) pass(d time.Duration) {
	end := time.Now().Add(d)
	for {
		b.work()
		next := b.f.tick(time.Now())
		b.work()
		now := time.Now()
		if !now.Before(end) {
			return
		}
		if next.IsZero() || next.After(end) {
			next = end
		}
		time.Sleep(max(next.Sub(now), time.Millisecond))
	}
}

func (b *bench) want(id wire.ID, state wire.NodeState, reason string) {
	b.t.Helper()
	p := b.f.Presence(id)
	if p.State != state || !strings.Contains(p.Reason, reason) {
		b.t.Fatalf("%s is %s (%q), want %s (%q)", p.Name, p.State, p.Reason, state, reason)
	}
}

// alarms returns what was raised and cleared for a party.
func (b *bench) alarms(id wire.ID) (out string) {
	for _, c := range b.changes {
		if c.ID == id {
			for _, a := range c.Alarms {
				if a.Lost {
					out += "lost "
				} else {
					out += "back "
				}
			}
		}
	}
	return strings.TrimSpace(out)
}

func TestNodeRunsOnlyAfterASessionProvedIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		r, n := b.rcp("dmz"), b.node("web", wire.StatePending)
		b.broken[n] = true
		b.up(r)
		b.snapshot(r, "e1", nodePeer(n))
		b.pass(time.Minute)
		b.want(n, wire.StatePending, "no session succeeds: no answer")
		if !b.f.Presence(n).Connected {
			t.Fatal("the rcp's claim is not shown")
		}
		b.broken[n] = false
		b.pass(2 * time.Minute)
		b.want(n, wire.StateRunning, "")
		if got := b.alarms(n); got != "" {
			t.Fatalf("a node that came for the first time raised %q", got)
		}
	})
}

func TestNodeThatLeavesItsLivingRCPIsDownAfterTheGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		r, n := b.rcp("dmz"), b.node("web", wire.StatePending)
		b.up(r)
		b.snapshot(r, "e1", nodePeer(n))
		b.pass(time.Second)
		b.want(n, wire.StateRunning, "")

		b.gone(r, n)
		b.pass(defaultTimings.grace / 2)
		b.want(n, wire.StateRunning, "reconnecting: rcp dmz reports its channel gone")
		if err := b.f.apply(r, wire.PeersLine{Peer: new(nodePeer(n))}); err != nil {
			t.Fatal(err)
		}
		b.pass(time.Minute)
		b.want(n, wire.StateRunning, "")
		if got := b.alarms(n); got != "" {
			t.Fatalf("a reconnection raised %q", got)
		}

		b.gone(r, n)
		b.pass(defaultTimings.grace + time.Second)
		b.want(n, wire.StateDown, "closed")
		if _, err := b.f.routes(n); !errors.Is(err, ErrNotConnected) {
			t.Fatalf("routes of a node that is down: %v", err)
		}
		b.pass(time.Hour)
		before := b.visits[n]
		if err := b.f.apply(r, wire.PeersLine{Peer: new(nodePeer(n))}); err != nil {
			t.Fatal(err)
		}
		b.pass(time.Second)
		b.want(n, wire.StateRunning, "")
		if b.visits[n] == before {
			t.Fatal("it is running again without a session")
		}
		if got := b.alarms(n); got != "lost back" {
			t.Fatalf("alarms are %q, want one pair", got)
		}
	})
}

func TestLostRCPMakesItsNodesUnreachableWithoutAnEventEach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		r, other := b.rcp("dmz"), b.rcp("dmz-2")
		b.up(r)
		b.up(other)
		var nodes []wire.ID
		var peers []wire.Peer
		for i := range 50 {
			n := b.node(fmt.Sprintf("n%d", i), wire.StatePending)
			nodes, peers = append(nodes, n), append(peers, nodePeer(n))
		}
		both := nodes[0]
		b.snapshot(r, "e1", peers...)
		b.snapshot(other, "x1", nodePeer(both))
		b.pass(time.Second)

		b.f.linkDown(r, "no answer for 30s")
		b.pass(defaultTimings.grace + time.Second)
		b.want(both, wire.StateRunning, "")
		b.want(nodes[1], wire.StateUnreachable, "rcp dmz is cut off")
		if got := b.alarms(r); got != "lost" {
			t.Fatalf("alarms of the rcp are %q", got)
		}
		for _, n := range nodes {
			if got := b.alarms(n); got != "" {
				t.Fatalf("node raised %q", got)
			}
		}

		// It restarts and forgot everything; one node never comes back.
		b.up(r)
		b.snapshot(r, "e2")
		b.pass(20 * time.Second)
		b.want(nodes[1], wire.StateUnreachable, "")
		for _, p := range peers[:49] {
			if err := b.f.apply(r, wire.PeersLine{Peer: &p}); err != nil {
				t.Fatal(err)
			}
		}
		b.pass(2 * time.Minute)
		b.want(nodes[1], wire.StateRunning, "")
		b.want(nodes[49], wire.StateDown, "not in the rcp's new list")
		if got := b.alarms(r); got != "lost back" {
			t.Fatalf("alarms of the rcp are %q", got)
		}
		if got := b.alarms(nodes[1]) + b.alarms(nodes[2]); got != "" {
			t.Fatalf("nodes that came back raised %q", got)
		}
		if got := b.alarms(nodes[49]); got != "lost" {
			t.Fatalf("the node that stayed away raised %q", got)
		}
	})
}

func TestNodesBehindALostChainedRCPAreUnreachable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		a, c := b.rcp("dmz"), wire.NewID()
		b.f.learn(record{ID: c, Role: wire.RoleRCP, Name: "plant", State: wire.StatePending, Since: time.Now()})
		n := b.node("plc", wire.StatePending)
		b.up(a)
		b.snapshot(a, "e1", wire.Peer{Role: wire.RoleRCP, ID: c}, nodePeer(n, c))
		b.pass(time.Second)
		b.want(n, wire.StateRunning, "")
		if got := b.f.Presence(n).RCPs; len(got) != 1 || got[0] != "plant" {
			t.Fatalf("it hangs on %v, want plant", got)
		}
		for _, order := range [][]wire.ID{{c, n}, {n, c}} { // whichever the rcp says first
			for _, id := range order {
				if id == n {
					b.gone(a, n, c)
				} else {
					b.gone(a, c)
				}
			}
			b.pass(defaultTimings.grace + time.Second)
			b.want(n, wire.StateUnreachable, "rcp plant is cut off")
			b.want(c, wire.StateDown, "")
			for _, p := range []wire.Peer{{Role: wire.RoleRCP, ID: c}, nodePeer(n, c)} {
				if err := b.f.apply(a, wire.PeersLine{Peer: &p}); err != nil {
					t.Fatal(err)
				}
			}
			b.pass(time.Second)
			b.want(n, wire.StateRunning, "")
		}
		if got := b.alarms(n); got != "" {
			t.Fatalf("the node raised %q", got)
		}
		if got := b.alarms(c); got != "lost back lost back" {
			t.Fatalf("alarms of the chained rcp are %q", got)
		}
	})
}

func TestRunningNeedsASessionEveryQuarterOfAnHour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		r, n := b.rcp("dmz"), b.node("web", wire.StatePending)
		b.up(r)
		b.snapshot(r, "e1", nodePeer(n))
		b.pass(24 * time.Hour)
		b.want(n, wire.StateRunning, "")
		if v := b.visits[n]; v < 24*60/15 || v > 24*60/9+2 {
			t.Fatalf("%d sessions in a day, want one every 9 to 15 minutes", v)
		}

		// The RCP goes on claiming that the node is there.
		b.broken[n] = true
		b.pass(14 * time.Minute)
		before := b.visits[n]
		b.pass(3 * time.Minute)
		b.want(n, wire.StateUnreachable, "dmz reports it connected, but no session succeeds: no answer")
		b.pass(time.Hour)
		if v := b.visits[n] - before; v > 140 {
			t.Fatalf("%d attempts in an hour", v)
		}
		b.broken[n] = false
		b.pass(2 * time.Minute)
		b.want(n, wire.StateRunning, "")
		if got := b.alarms(n); got != "lost back" {
			t.Fatalf("alarms are %q, want one pair", got)
		}
	})
}

func TestLargeFleetIsProvenLessOften(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		r, n := b.rcp("dmz"), b.node("web", wire.StatePending)
		many := make([]wire.ID, 3*16_500) // three times what 25 proofs a second reach in 11 minutes
		for i := range many {
			many[i] = b.node("", wire.StateDown)
		}
		b.up(r)
		b.snapshot(r, "e1", nodePeer(n))
		b.pass(24 * time.Hour)
		b.want(n, wire.StateRunning, "")
		if v := b.visits[n]; v < 24*60/45 || v > 24*60/27+2 {
			t.Fatalf("%d sessions in a day, want one every 27 to 45 minutes", v)
		}

		// Proofs that are planned by then still come in time.
		for _, id := range many {
			b.f.forget(id)
		}
		b.pass(time.Hour)
		b.want(n, wire.StateRunning, "")
		if got := b.alarms(n); got != "" {
			t.Fatalf("alarms are %q, want none", got)
		}

		b.broken[n] = true
		b.pass(46 * time.Minute)
		b.want(n, wire.StateUnreachable, "no session succeeds")
	})
}

func TestSilentForAWeek(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		r, n := b.rcp("dmz"), b.node("web", wire.StatePending)
		b.up(r)
		b.snapshot(r, "e1", nodePeer(n))
		b.pass(time.Second)
		b.gone(r, n)
		b.pass(7 * 24 * time.Hour)
		b.want(n, wire.StateDown, "")
		visits := b.visits[n]
		if visits > 2 {
			t.Fatalf("%d sessions with a node that was away", visits)
		}
		if err := b.f.apply(r, wire.PeersLine{Peer: new(nodePeer(n))}); err != nil {
			t.Fatal(err)
		}
		b.pass(time.Second)
		b.want(n, wire.StateRunning, "")
		if got := b.alarms(n); got != "lost back" {
			t.Fatalf("alarms are %q", got)
		}
	})
}

func TestRestartedGatewayKeepsWhatTheDatabaseSays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		r := b.rcp("dmz")
		dead := wire.NewID() // was connected, and is not any more
		b.f.learn(record{ID: dead, Role: wire.RoleRCP, Name: "dead", State: wire.StateRunning, Since: time.Now().Add(-time.Hour)})
		b.f.expect(dead, wire.RoleRCP, "dead", "203.0.113.2:9090")
		id, lost := wire.NewID(), wire.NewID()
		for _, n := range []wire.ID{id, lost} {
			b.f.learn(record{ID: n, Role: wire.RoleNode, Name: "n", State: wire.StateRunning, Since: time.Now().Add(-time.Hour), LastSeen: time.Now().Add(-5 * time.Minute)})
		}
		b.pass(3 * time.Second)
		b.up(r)
		b.snapshot(r, "e1", nodePeer(id))
		b.pass(time.Second)
		b.want(id, wire.StateRunning, "")
		if since := time.Since(b.f.Presence(id).Since); since < time.Hour {
			t.Fatalf("running since %v: the restart moved it", since)
		}
		b.pass(time.Minute)
		b.want(lost, wire.StateUnreachable, "rcp dead is cut off") // it may hang there
		b.want(dead, wire.StateDown, "since the gateway started")
		if got := b.alarms(dead); got != "lost" {
			t.Fatalf("an RCP that is away when the gateway starts raised %q", got)
		}
		b.up(dead)
		b.snapshot(dead, "d1")
		b.pass(2 * time.Minute)
		if got := b.alarms(id); got != "" {
			t.Fatalf("the restart raised %q", got)
		}
		b.want(lost, wire.StateDown, "no rcp reports it")
	})
}

// An RCP is connected since this gateway has a channel to it, and not since one had
// that ran before.
func TestRCPIsConnectedSinceItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		id := wire.NewID()
		b.f.learn(record{ID: id, Role: wire.RoleRCP, Name: "dmz", State: wire.StateRunning, Since: time.Now().Add(-24 * time.Hour)})
		b.f.expect(id, wire.RoleRCP, "dmz", "203.0.113.1:9090")
		b.pass(3 * time.Second)
		up := time.Now()
		b.up(id)
		b.pass(time.Minute)
		b.f.linkDown(id, "the channel ended")
		b.pass(time.Second)
		b.up(id) // within the grace: it was connected all the time
		b.pass(time.Minute)
		b.want(id, wire.StateRunning, "")
		if since := b.f.Presence(id).Since; !since.Equal(up) {
			t.Errorf("connected since %s; want %s", since, up)
		}
	})
}

// TestReplacedRCP: an RCP enrolled anew takes the place of its old identity.
// What hung on that comes back to it within seconds, and until then nobody reads
// that an RCP is cut off which is connected.
func TestReplacedRCP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		old := b.rcp("dmz")
		n := b.node("web", wire.StatePending)
		b.up(old)
		b.snapshot(old, "e1", nodePeer(n))
		b.pass(time.Minute)
		b.want(n, wire.StateRunning, "")

		next := b.rcp("dmz")
		b.f.unexpect(old)
		b.f.forget(old)
		b.pass(time.Second)
		b.want(n, wire.StateRunning, "reconnecting: the rcp that held it was removed or replaced, and rcp dmz is cut off")
		b.pass(time.Minute)
		b.want(n, wire.StateUnreachable, "was removed or replaced, and rcp dmz is cut off")
		b.up(next)
		b.snapshot(next, "e2")
		b.pass(time.Second)
		b.want(n, wire.StateUnreachable, "reconnecting: the rcp that held it was removed or replaced, and no rcp reports it")
		if err := b.f.apply(next, wire.PeersLine{Peer: new(nodePeer(n))}); err != nil {
			t.Fatal(err)
		}
		b.pass(time.Second)
		b.want(n, wire.StateRunning, "")
		if got := b.alarms(n); got != "" {
			t.Errorf("alarms are %q", got)
		}
	})
}

func TestHelloDecidesTheState(t *testing.T) {
	for _, c := range []struct {
		name  string
		hello wire.Hello
		want  wire.NodeState
		why   string
	}{
		{"failing", wire.Hello{State: wire.StateFailing, Reason: "policy x failed", Versions: wire.OwnVersions, Installation: "inst"}, wire.StateFailing, "policy x failed"},
		{"another installation", wire.Hello{State: wire.StateRunning, Versions: wire.OwnVersions, Installation: "other"}, wire.StateLocked, "obeys installation other"},
		{"locked", wire.Hello{State: wire.StateLocked, Reason: "by hand", Versions: wire.OwnVersions}, wire.StateLocked, "by hand"},
		{"newer", wire.Hello{State: wire.StateRunning, Versions: wire.VersionRange{Min: 7, Max: 9}}, wire.StateUpgrade, "speaks protocol 7 to 9"},
		{"claims what only a gateway can know", wire.Hello{State: wire.StateDown, Versions: wire.OwnVersions}, wire.StateRunning, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t)
				r, n := b.rcp("dmz"), b.node("web", wire.StatePending)
				b.hellos[n] = c.hello
				b.up(r)
				b.snapshot(r, "e1", nodePeer(n))
				b.pass(time.Second)
				b.want(n, c.want, c.why)
			})
		})
	}
}

func TestNodeUnknownToTheDatabaseIsLockedAndThenAdopted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		r, n := b.rcp("dmz"), wire.NewID()
		b.up(r)
		b.snapshot(r, "e1", nodePeer(n))
		if len(b.f.strangers()) != 0 {
			t.Fatal("a claim alone made a stranger")
		}
		b.pass(time.Second)
		b.want(n, wire.StateLocked, "unknown")
		if s := b.f.strangers(); len(s) != 1 || s[0].ID != n {
			t.Fatalf("strangers: %v", s)
		}
		b.f.learn(record{ID: n, Role: wire.RoleNode, Name: "web", State: wire.StatePending, Since: time.Now()})
		b.pass(time.Second)
		b.want(n, wire.StateRunning, "")
		if len(b.f.strangers()) != 0 || b.f.links[r].unknown != 0 {
			t.Fatal("it is still a stranger")
		}
		b.f.forget(n)
		if b.f.links[r].peers != 1 { // the rcp itself
			t.Fatalf("%d peers are counted", b.f.links[r].peers)
		}
	})
}

func TestRevokedNodeIsNeverVisited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		r, n := b.rcp("dmz"), b.node("web", wire.StatePending)
		b.up(r)
		b.snapshot(r, "e1", nodePeer(n))
		b.pass(time.Second)
		before := b.visits[n]
		b.f.learn(record{ID: n, Role: wire.RoleNode, Name: "web", Revoked: "stolen"})
		b.want(n, wire.StateRevoked, "stolen")
		b.pass(24 * time.Hour)
		if b.visits[n] != before {
			t.Fatal("a revoked node was visited")
		}
		if _, err := b.f.routes(n); err == nil {
			t.Fatal("a revoked node has routes")
		}
	})
}

// Work that failed is tried again later; what a node hints meanwhile does not
// wait for it.
func TestHintsDoNotWaitForARetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		r, n := b.rcp("dmz"), b.node("web", wire.StateRunning)
		b.up(r)
		b.snapshot(r, "e1", nodePeer(n))
		b.pass(time.Minute)
		b.f.ask(wantPush, n)
		failed, ok := b.f.take(choreVisit)
		if !ok || failed.id != n {
			t.Fatal("no visit")
		}
		b.f.done(choreVisit, failed, wantPush, time.Minute)
		b.f.mu.Lock()
		b.f.want(b.f.members[n], wantOutbox, true)
		b.f.mu.Unlock()
		if hinted, ok := b.f.take(choreOutbox); !ok || hinted.id != n {
			t.Error("the hint waits for the retry")
		} else {
			b.f.done(choreOutbox, hinted, 0, 0)
		}
		before := b.visits[n]
		b.pass(50 * time.Second)
		if b.visits[n] != before {
			t.Error("tried again too early")
		}
		b.pass(20 * time.Second)
		if b.visits[n] != before+1 {
			t.Errorf("%d visits, want one retry", b.visits[n]-before)
		}
	})
}

// An RCP that was started again brings back nodes that are what they were: they
// are proven in their turn. Who claims something new, or is owed something, is
// visited at once.
func TestNodesThatComeBackUnchangedWaitForTheirTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		hello := wire.Hello{State: wire.StateRunning, Versions: wire.OwnVersions, Installation: "inst"}
		r := b.rcp("dmz")
		same, changed, owed := b.node("same", wire.StateRunning), b.node("changed", wire.StateRunning), b.node("owed", wire.StateRunning)
		claims := func(id wire.ID, digest string) wire.Peer {
			p := nodePeer(id)
			p.Digest = digest
			return p
		}
		b.up(r)
		b.snapshot(r, "before", claims(same, hello.Digest()), claims(changed, hello.Digest()), claims(owed, hello.Digest()))
		b.work()
		clear(b.visits)
		b.f.linkDown(r, "killed")
		b.f.ask(wantPush, owed)
		b.pass(2 * time.Second)
		b.up(r)
		b.snapshot(r, "after", claims(same, hello.Digest()), claims(changed, "another"), claims(owed, hello.Digest()))
		b.work()
		if b.visits[same] != 0 || b.visits[changed] != 1 || b.visits[owed] != 1 {
			t.Fatalf("visits at once: %d to the one that is the same, %d to the one that changed, %d to the one that is owed something", b.visits[same], b.visits[changed], b.visits[owed])
		}
		b.want(same, wire.StateRunning, "")
		b.pass(b.f.t.settle)
		if b.visits[same] != 0 {
			t.Error("it was proven while others were still coming back")
		}
		b.pass(b.f.t.settle)
		if b.visits[same] == 0 {
			t.Error("it was not proven when they were back")
		}
	})
}

// What an RCP counts is known while it is connected: nobody knows who still waits
// at one that is away.
func TestRCPThatIsAwayCountsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		r, n := b.rcp("dmz"), b.node("web", wire.StateRunning)
		peers := []wire.Peer{nodePeer(n), {Pending: wire.KeyHash(fmt.Sprintf("%064x", 1))}}
		b.up(r)
		b.snapshot(r, "e", peers...)
		for _, want := range []counts{{Online: 1, Pending: 1}, {}} {
			if got := b.f.behind(r); got != want {
				t.Errorf("behind it are %+v, want %+v", got, want)
			}
			b.f.linkDown(r, "killed")
		}
		b.up(r)
		b.snapshot(r, "e2", peers...)
		if got := b.f.behind(r); got.Pending != 1 {
			t.Errorf("back again it has %+v behind it", got)
		}
	})
}

// What a node answers to a desired state says how its hello changes: the signal
// that follows calls for no visit, whether it comes before the answer is looked
// at or after. Another change does.
func TestSignalOfAStateThatWasPushedCallsForNoVisit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		hello := wire.Hello{State: wire.StateRunning, Versions: wire.OwnVersions, Installation: "inst"}
		r, n := b.rcp("dmz"), b.node("web", wire.StateRunning)
		peer := nodePeer(n)
		signals := func(h wire.Hello) {
			peer.Digest = h.Digest()
			if err := b.f.apply(r, wire.PeersLine{Peer: &peer}); err != nil {
				t.Fatal(err)
			}
		}
		b.up(r)
		b.snapshot(r, "e1", peer)
		signals(hello)
		b.work()
		clear(b.visits)

		answer := func(revision int64) *wire.DesiredResult {
			return &wire.DesiredResult{Applied: wire.Revision{Generation: 1, N: revision}, Policies: []wire.PolicyStatus{{Name: "motd", State: wire.PolicyApplied}}}
		}
		after := func(r *wire.DesiredResult) wire.Hello {
			h := hello
			h.Applied, h.Policies = r.Applied, r.Policies
			return h
		}
		b.f.took(n, answer(7))
		signals(after(answer(7)))
		b.work()
		signals(after(answer(8)))
		b.f.took(n, answer(8))
		b.work()
		if b.visits[n] != 0 {
			t.Errorf("%d visits for what the answers had said", b.visits[n])
		}
		failed := after(answer(8))
		failed.Policies[0].State = wire.PolicyFailed
		signals(failed)
		b.work()
		if b.visits[n] != 1 {
			t.Errorf("%d visits for a policy that failed later, want 1", b.visits[n])
		}
	})
}

// A key whose place another took ends when its node is there by a channel with
// that, and a node that does not come, or is dialled, keeps nobody waiting.
func TestOldKeyWaitsForTheNewChannel(t *testing.T) {
	for name, c := range map[string]struct {
		dialled bool
		comes   time.Duration // 0: it does not
		want    time.Duration
	}{
		"it dials":        {comes: 700 * time.Millisecond, want: 700 * time.Millisecond},
		"it stays away":   {want: rekeyWait},
		"its RCP dials":   {dialled: true},
		"it comes by two": {comes: time.Second, want: time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t)
				rcp, other, node := b.rcp("dmz-1"), b.rcp("dmz-2"), b.node("web-1", wire.StateRunning)
				peer := nodePeer(node)
				peer.Dialled = c.dialled
				b.up(rcp)
				b.up(other)
				b.snapshot(rcp, "e1", peer)
				if name == "it comes by two" {
					b.snapshot(other, "e1", peer)
				}
				wait := b.f.returns(node)
				if c.comes > 0 {
					time.AfterFunc(c.comes, func() {
						peer.Since = time.Now()
						if err := b.f.apply(rcp, wire.PeersLine{Peer: &peer, Pos: 9}); err != nil {
							t.Error(err)
						}
					})
				}
				began := time.Now()
				wait(t.Context())
				if took := time.Since(began).Round(100 * time.Millisecond); took != c.want {
					t.Errorf("it waits for %v, want %v", took, c.want)
				}
			})
		})
	}
}
