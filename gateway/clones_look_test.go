package gateway

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/config"
	"sallyport/internal/channel"
	"sallyport/internal/wire"
)

// copyOf is a node that goes on from the memory of another.
func copyOf(one, two *fakeNode) {
	one.mu.Lock()
	defer one.mu.Unlock()
	two.mu.Lock()
	defer two.mu.Unlock()
	two.hello, two.held = one.hello, one.held
}

func (n *fakeNode) asked() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.hellos
}

// idle tells whether no look is planned or under way.
func (c *clones) idle() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.suspects) == 0
}

// wantCopies checks a quarantine for copies of one machine: both have boot IDs
// of their own, which the report names, and node show lists.
func (w *world) wantCopies(one, two *fakeNode) {
	w.t.Helper()
	id := one.id.ID()
	w.state(id, wire.StateQuarantined)
	one.mu.Lock()
	a := one.hello.Boot
	one.mu.Unlock()
	two.mu.Lock()
	b := two.hello.Boot
	two.mu.Unlock()
	why := w.s.fleet.quarantined(id)
	if a == b || wire.UnmarkBoot(a) != "b1" || wire.UnmarkBoot(b) != "b1" || !strings.Contains(why, "copies of one running machine") || !strings.Contains(why, a) || !strings.Contains(why, b) {
		w.t.Errorf("boots %s and %s, quarantined because %s", a, b, why)
	}
	var listed []string
	for _, x := range w.s.clones.boots(id) {
		if listed = append(listed, x.ID); x.Copied != (x.ID == "b1") {
			w.t.Errorf("%+v", x)
		}
	}
	if !slices.Contains(listed, a) || !slices.Contains(listed, b) {
		w.t.Errorf("node show lists %q, local status shows %s and %s", listed, a, b)
	}
	told := 0
	for _, e := range w.events(id) {
		if e.Key == keyClone && e.Severity == wire.SeverityMajor {
			told++
		}
	}
	if told != 1 || len(auditOf(w.t, w.db, "node.quarantine")) != 1 {
		w.t.Errorf("%d events, audit %v", told, auditOf(w.t, w.db, "node.quarantine"))
	}
}

// TestCopiesOfARunningMachine: each behind an RCP of its own. They count their
// channels from one number on.
func TestCopiesOfARunningMachine(t *testing.T) {
	t.Parallel()
	w, one, two, rcps := twoHosts(t)
	w.run()
	rcps[0].holdChannel(one, "b1", 1)
	w.state(one.id.ID(), wire.StateRunning)
	copyOf(one, two)
	rcps[0].holdChannel(one, "b1", 2)
	rcps[1].holdChannel(two, "b1", 2)
	w.wantCopies(one, two)
}

// TestCopiesOfARunningMachineAtOneRCP: each new channel replaces the last one,
// so that they take turns.
func TestCopiesOfARunningMachineAtOneRCP(t *testing.T) {
	t.Parallel()
	w, one, two, rcps := twoHosts(t)
	w.run()
	id := one.id.ID()
	rcps[0].holdChannel(one, "b1", 1)
	w.state(id, wire.StateRunning)
	copyOf(one, two)
	turn, last := 0, time.Now()
	eventually(t, "they are found", func() bool {
		if time.Since(last) > time.Second { // two, one, two, ...: both count 2, 3, ...
			last = time.Now()
			rcps[0].holdChannel([2]*fakeNode{two, one}[turn%2], "b1", int64(2+turn/2))
			turn++
		}
		return w.s.fleet.quarantined(id) != ""
	})
	w.wantCopies(one, two)
	t.Logf("found after %d changes of the channel", turn)
}

// TestCopiesThatNothingGivesAway: each hangs on an RCP of its own for good, and
// no number comes twice. The one that is asked does not know of the other's way.
func TestCopiesThatNothingGivesAway(t *testing.T) {
	t.Parallel()
	w, one, two, rcps := twoHosts(t)
	w.run()
	id := one.id.ID()
	one.mu.Lock()
	one.hello.Upstreams = []wire.UpstreamStatus{{ID: rcps[0].id.ID(), Role: wire.RoleRCP, State: "connected"}, {Address: "192.0.2.1:9090", State: "failed"}}
	one.mu.Unlock()
	rcps[0].holdChannel(one, "b1", 1)
	w.state(id, wire.StateRunning)
	copyOf(one, two)
	two.mu.Lock()
	two.hello.Upstreams = []wire.UpstreamStatus{{ID: rcps[1].id.ID(), Role: wire.RoleRCP, State: "connected"}}
	two.mu.Unlock()
	rcps[1].holdChannel(two, "b1", 2)
	var at time.Time
	eventually(t, "a look is planned", func() bool {
		w.s.clones.mu.Lock()
		defer w.s.clones.mu.Unlock()
		s := w.s.clones.suspects[id]
		if s == nil {
			return false
		}
		at, s.at = s.at, time.Now() // do not wait for it
		return s.why == doubtWay
	})
	if wait := time.Until(at); wait < wayAfter/2 || wait > 2*wayAfter {
		t.Errorf("it is planned in %v", wait)
	}
	wake(w.s.clones.wake)
	w.wantCopies(one, two)
}

// TestAnRCPsWordQuarantinesNobody: boots, counts and ways that RCPs make up are
// a reason to look, and what is seen is one process.
func TestAnRCPsWordQuarantinesNobody(t *testing.T) {
	t.Parallel()
	w, one, _, rcps := twoHosts(t)
	w.run()
	id := one.id.ID()
	rcps[0].holdChannel(one, "b1", 7)
	rcps[1].holdBoot(one, "made up")
	w.state(id, wire.StateRunning)
	for n := range 200 { // faster than it can be looked at
		rcps[n%2].holdChannel(one, fmt.Sprint("b", n%3), int64(n%5))
	}
	eventually(t, "it was looked at", func() bool { return one.asked() >= 3 })
	eventually(t, "it is one, which two answers show", func() bool {
		w.s.clones.mu.Lock()
		defer w.s.clones.mu.Unlock()
		s := w.s.clones.suspects[id]
		return s == nil || s.asked == 0
	})
	if n := one.asked(); n > 1+2 {
		t.Errorf("it was asked %d times", n)
	}
	if why := w.s.fleet.quarantined(id); why != "" {
		t.Errorf("quarantined: %s", why)
	}
	one.mu.Lock()
	boot := one.hello.Boot
	one.mu.Unlock()
	if boot != "b1" {
		t.Errorf("it was taken for copies: boot %s", boot)
	}
	w.state(id, wire.StateRunning)
}

// TestOldNodesAreNotAccused: programs that know no nonces have one boot like
// any other.
func TestOldNodesAreNotAccused(t *testing.T) {
	t.Parallel()
	w, one, two, rcps := twoHosts(t)
	one.held = wire.Nonce{}
	copyOf(one, two)
	w.run()
	id := one.id.ID()
	rcps[0].holdChannel(one, "b1", 1)
	w.state(id, wire.StateRunning)
	rcps[1].holdChannel(two, "b1", 1)
	eventually(t, "it was looked at", func() bool { return one.asked()+two.asked() >= 1+probes && w.s.clones.idle() })
	if why := w.s.fleet.quarantined(id); why != "" {
		t.Errorf("quarantined: %s", why)
	}
}

// TestAFlakyNetworkIsNoReason: a node that comes again and again counts on.
func TestAFlakyNetworkIsNoReason(t *testing.T) {
	t.Parallel()
	w, one, _, rcps := twoHosts(t)
	w.run()
	id := one.id.ID()
	for n := range int64(300) {
		if n%3 == 0 {
			rcps[0].drop(one)
		}
		rcps[0].holdChannel(one, "b1", n+1)
	}
	w.state(id, wire.StateRunning)
	rcps[0].mu.Lock()
	last := int64(len(rcps[0].lines))
	rcps[0].mu.Unlock()
	eventually(t, "all is read", func() bool { _, pos := w.s.fleet.resume(rcps[0].id.ID()); return pos == last })
	if !w.s.clones.idle() {
		t.Error("it is looked at")
	}
}

// TestALookAtOneWayEnds: it is bounded also where channels change all the time.
func TestALookAtOneWayEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newClones(nil)
		c.suspect("n", "evil", doubtTwo)
		began := time.Now()
		var longest time.Duration
		last := began
		for asked := 0; ; {
			due, next := c.due(time.Now())
			if len(due) == 0 {
				if next == time.Hour {
					if asked != turnProbes {
						t.Errorf("%d sessions", asked)
					}
					break
				}
				time.Sleep(next)
				if asked == 5 {
					c.suspect("n", "evil", doubtNone) // a channel changed
				}
				continue
			}
			longest, last = max(longest, time.Since(last)), time.Now()
			s := due["n"]
			s.asked++
			asked++
			c.suspect("n", "evil", doubtTwo) // while busy
			c.done("n", s, s.asked < turnProbes, time.Now())
		}
		if longest > turnEvery || time.Since(began) > 2*time.Minute {
			t.Errorf("%v between two sessions, %v in all", longest, time.Since(began))
		}
		c.suspect("n", "evil", doubtNone)
		if !c.idle() {
			t.Error("a channel that changes is a reason to look")
		}
		c.suspect("m", "evil", doubtWay)
		if s := c.suspects["m"]; time.Until(s.at) < wayAfter || time.Until(s.at) > 2*wayAfter {
			t.Errorf("another way: asked in %v", time.Until(s.at))
		}
		c.suspect("m", "evil", doubtTwo)
		if s := c.suspects["m"]; time.Until(s.at) > suspectAfter {
			t.Errorf("two boots: asked in %v", time.Until(s.at))
		}
	})
}

// TestCopiesThatDialTheGateway: both have a channel to it, and each is asked on
// its own.
func TestCopiesThatDialTheGateway(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.cfg.Gateway = config.Gateway{ChannelListen: "127.0.0.1:0"}
	one := w.enrolled(w.node("direct"))
	two := w.node("direct")
	two.id = one.id
	w.run()
	eventually(t, "the gateway listens", func() bool { return w.s.ChannelAddr() != nil })
	dial := func(n *fakeNode) {
		ctx, cancel := context.WithCancel(context.Background())
		d := &channel.Dialer{Addr: w.s.ChannelAddr().String(), Peer: channel.PeerUpstream, Identity: n.id, Carrier: channel.CarrierH2, Log: testLog(t)}
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_ = d.Run(ctx, func(ctx context.Context, c *channel.Conn) { _ = c.Serve(ctx, directNode{n: n}) })
		}()
		t.Cleanup(func() { cancel(); <-ended })
	}
	dial(one)
	w.state(one.id.ID(), wire.StateRunning)
	copyOf(one, two)
	dial(two)
	w.wantCopies(one, two)
}

// TestOneOfTwoIsReached: node reidentify --boot means one process, whichever
// way leads to it.
func TestOneOfTwoIsReached(t *testing.T) {
	t.Parallel()
	w, one, two, rcps := twoHosts(t)
	w.run()
	id := one.id.ID()
	rcps[0].holdBoot(one, "b1")
	w.state(id, wire.StateRunning)
	rcps[1].holdBoot(two, "b2")
	w.state(id, wire.StateQuarantined)
	for _, boot := range []string{"b1", "b2"} {
		var got string
		err := w.s.clones.reach(t.Context(), id, boot, func(ctx context.Context, c *conversation) error {
			h, _, err := c.Hello(ctx)
			got = h.Boot
			return err
		})
		if err != nil || got != boot {
			t.Errorf("boot %s: %q answers, %v", boot, got, err)
		}
	}
	refused := errors.New("refused by the node")
	if err := w.s.clones.reach(t.Context(), id, "b1", func(context.Context, *conversation) error { return refused }); !errors.Is(err, refused) {
		t.Errorf("%v, want what the node said", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := w.s.clones.reach(ctx, id, "b3", nil); err == nil {
		t.Error("a boot that does not answer was reached")
	}
}
