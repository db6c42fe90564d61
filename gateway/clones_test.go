package gateway

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

func TestWhatProvesAClone(t *testing.T) {
	t.Parallel()
	now := time.Now()
	at := func(s int) time.Time { return now.Add(time.Duration(s) * time.Second) }
	type answer struct {
		boot      string
		sent, got int // seconds
	}
	for name, c := range map[string]struct {
		answers []answer
		proof   bool
	}{
		"one host":                      {[]answer{{"a", 0, 1}, {"a", 2, 3}, {"a", 4, 5}}, false},
		"restarts":                      {[]answer{{"a", 0, 1}, {"b", 2, 3}, {"c", 4, 5}, {"c", 6, 7}}, false},
		"in turn":                       {[]answer{{"a", 0, 1}, {"b", 2, 3}, {"a", 4, 5}}, true},
		"in turn, long between":         {[]answer{{"a", 0, 1}, {"b", 2000, 2001}, {"a", 3000, 3001}}, true},
		"an answer that an RCP held up": {[]answer{{"a", 0, 1}, {"b", 4, 5}, {"a", 2, 6}}, false},
		"asked before the other was":    {[]answer{{"a", 0, 3}, {"b", 2, 4}, {"a", 3, 5}}, false},
		"the other was held up":         {[]answer{{"b", 0, 1}, {"a", 2, 3}, {"a", 5, 6}, {"b", 1, 7}}, false},
		"forgotten meanwhile":           {[]answer{{"a", 0, 1}, {"b", 4000, 4001}, {"a", 8000, 8001}}, false},
		"after many restarts":           {[]answer{{"a", 0, 1}, {"b", 2, 3}, {"c", 4, 5}, {"d", 6, 7}, {"e", 8, 9}, {"d", 10, 11}}, true},
		"three hosts":                   {[]answer{{"a", 0, 1}, {"b", 2, 3}, {"c", 4, 5}, {"a", 6, 7}}, true},
	} {
		cl := newClones(nil)
		proof := false
		for _, a := range c.answers {
			if other, _ := cl.saw("n", &greeting{hello: wire.Hello{Boot: a.boot}, sent: at(a.sent), got: at(a.got)}); other != "" {
				proof = true
			}
		}
		if proof != c.proof {
			t.Errorf("%s: proof %v", name, proof)
		}
		if n := len(cl.seen["n"]); n > maxSightings {
			t.Errorf("%s: %d boots are remembered", name, n)
		}
	}
}

func TestSuspectsAreLookedAtNowAndThen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newClones(nil)
		looks := 0
		for range 180 { // an RCP makes up boots, every second
			c.suspect("n", "evil", doubtTwo)
			time.Sleep(time.Second)
			due, _ := c.due(time.Now())
			for id, s := range due {
				c.done(id, s, false, time.Now())
			}
			looks += len(due)
		}
		if looks < 2 || looks > 4 {
			t.Errorf("%d looks in three minutes", looks)
		}
		c.saw("n", &greeting{hello: wire.Hello{Boot: "a"}, sent: time.Now(), got: time.Now()})
		c.due(time.Now().Add(suspectEvery)) // the last of them
		time.Sleep(2 * sightingLife)
		c.due(time.Now())
		if len(c.looked) > 0 || len(c.seen) > 0 {
			t.Errorf("remembered for ever: %d, %d", len(c.looked), len(c.seen))
		}
	})
}

// TestOneRCPsDoubtsDelayNoOthers: an RCP that doubts all of its nodes, and lets
// the sessions with them hang, has its own places and no others.
func TestOneRCPsDoubtsDelayNoOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newClones(nil)
		for i := range 100 {
			c.suspect(wire.ID(fmt.Sprint(i)), "evil", doubtTwo)
		}
		time.Sleep(suspectAfter)
		hung, next := c.due(time.Now())
		if len(hung) != probers || next != time.Hour {
			t.Fatalf("%d looks for one RCP at once, the next in %v", len(hung), next)
		}
		c.suspect("42", "good", doubtTwo) // whoever doubted it first
		c.suspect("n", "good", doubtTwo)
		time.Sleep(suspectAfter)
		looks, _ := c.due(time.Now())
		if looks["n"] == nil || hung["42"] == nil && looks["42"] == nil || len(looks) > 2 {
			t.Fatalf("looks at %v behind those that hang", slices.Collect(maps.Keys(looks)))
		}
		for id, s := range looks {
			c.done(id, s, false, time.Now())
		}
		for id, s := range hung { // an operator has looked at them meanwhile
			c.forget(id)
			c.done(id, s, false, time.Now())
		}
		if len(c.places) > 0 {
			t.Errorf("places are taken for ever: %v", c.places)
		}
		if looks, _ = c.due(time.Now()); len(looks) != probers {
			t.Errorf("%d looks follow", len(looks))
		}
	})
}

// twoHosts are two nodes with one identity, each behind an RCP of its own.
func twoHosts(t *testing.T) (w *world, one, two *fakeNode, rcps [2]*fakeRCP) {
	w = newWorld(t)
	rcps[0], rcps[1] = w.rcp("dmz-1"), w.rcp("dmz-2")
	one = w.enrolled(w.node("web"))
	two = w.node("web")
	two.id = one.id
	two.hello = one.hello
	two.hello.Boot = "b2"
	return w, one, two, rcps
}

func (r *fakeRCP) holdBoot(n *fakeNode, boot string) { r.holdChannel(n, boot, 0) }

// holdChannel makes the RCP hold a node on a new channel.
func (r *fakeRCP) holdChannel(n *fakeNode, boot string, generation int64) {
	r.mu.Lock()
	r.nodes[n.id.ID()] = n
	r.mu.Unlock()
	r.say(wire.PeersLine{Peer: &wire.Peer{Role: wire.RoleNode, ID: n.id.ID(), Boot: boot, Generation: generation, Carrier: "h2", Since: time.Now()}})
}

func TestClonesAreQuarantined(t *testing.T) {
	t.Parallel()
	w, one, two, rcps := twoHosts(t)
	w.deploys = true
	w.run()
	id := one.id.ID()
	rcps[0].holdBoot(one, "b1")
	w.state(id, wire.StateRunning)
	rcps[1].holdBoot(two, "b2")
	w.state(id, wire.StateQuarantined)
	n, err := w.db.Node(t.Context(), id)
	if err != nil || !strings.Contains(n.Quarantine, "b1") || !strings.Contains(n.Quarantine, "b2") {
		t.Errorf("%+v, %v", n, err)
	}
	// The boots that `node reidentify --boot` wants are those of the report.
	var boots []string
	for _, b := range w.s.clones.boots(id) {
		boots = append(boots, b.ID)
	}
	if slices.Sort(boots); !slices.Equal(boots, []string{"b1", "b2"}) {
		t.Errorf("boots %q, want b1 and b2", boots)
	}
	told := 0
	for _, e := range w.events(id) {
		if e.Key == keyClone && e.Severity == wire.SeverityMajor {
			told++
		}
	}
	if told != 1 || len(auditOf(t, w.db, "node.quarantine")) != 1 {
		t.Errorf("%d events, audit %v", told, auditOf(t, w.db, "node.quarantine"))
	}
	// Both hosts know, and their `local status` says so.
	knows := func(n *fakeNode, want bool) {
		t.Helper()
		eventually(t, "the node is told whether it is quarantined", func() bool {
			n.mu.Lock()
			defer n.mu.Unlock()
			return n.confined == want
		})
	}
	knows(one, true)
	knows(two, true)
	// It gets nothing.
	if a := w.done(w.act(one, time.Minute, "true")); a.State != wire.ActionRefused || !strings.Contains(a.Reason, "quarantined") {
		t.Errorf("an action: %s, %s", a.State, a.Reason)
	}
	one.mu.Lock()
	runs := len(one.runs)
	one.mu.Unlock()
	if runs > 0 {
		t.Error("an action was run")
	}

	// It outlives a restart of the gateway, and ends by an operator's word.
	w.restart()
	eventually(t, "it is loaded again", func() bool { return w.s.fleet.quarantined(id) != "" })
	w.state(id, wire.StateQuarantined)
	rcps[1].drop(two)
	eventually(t, "it has one way left", func() bool {
		doors, _ := w.s.clones.doors(id)
		return len(doors) == 1 && doors[0].route.link == rcps[0].id.ID()
	})
	if n, err = w.db.Node(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if err := w.s.clones.resume(store.WithActor(t.Context(), store.Actor{Who: "me"}), n); err != nil {
		t.Fatal(err)
	}
	w.state(id, wire.StateRunning)
	if n, err = w.db.Node(t.Context(), id); err != nil || n.Quarantine != "" {
		t.Errorf("%+v, %v", n, err)
	}
	knows(one, false)
	// If the other one still lives, it is found again.
	w.s.clones.forget(id)
	rcps[1].holdBoot(two, "b2")
	w.state(id, wire.StateQuarantined)
}
