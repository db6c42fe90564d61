package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/wire"
)

// An RCP may delay, drop and lie. These tests are about what it gains.

func TestRCPCannotMakeNodesUp(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r, n := w.rcp("evil"), w.enrolled(w.node("web"))
	w.run()
	var fakes []wire.ID
	for range 200 {
		id := wire.NewID()
		fakes = append(fakes, id)
		r.say(wire.PeersLine{Peer: &wire.Peer{Role: wire.RoleNode, ID: id, Carrier: "h2", Since: time.Now()}})
	}
	r.hold(n)
	w.state(n.id.ID(), wire.StateRunning) // not behind 200 who do not exist
	eventually(t, "all of them were looked at", func() bool {
		for _, id := range fakes {
			if r.connects(id) == 0 {
				return false
			}
		}
		return true
	})
	if s := w.s.fleet.strangers(); len(s) != 0 {
		t.Fatalf("%d nodes were made up", len(s))
	}
	for _, id := range fakes[:10] {
		if p := w.s.fleet.Presence(id); up(p.State) {
			t.Fatalf("a node that does not exist is %s", p.State)
		}
	}
	nodes, err := w.db.Nodes(context.Background())
	if err != nil || len(nodes) != 1 {
		t.Fatalf("%d nodes are in the database, %v", len(nodes), err)
	}
}

func TestRCPCannotPlayANode(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r, victim, owned := w.rcp("evil"), w.enrolled(w.node("victim")), w.enrolled(w.node("owned"))
	impostor := w.node("impostor")
	impostor.id = owned.id // what it has: the key of another node
	impostor.emit(5)
	r.mu.Lock()
	r.nodes[victim.id.ID()] = impostor
	r.mu.Unlock()
	r.say(wire.PeersLine{Peer: &wire.Peer{Role: wire.RoleNode, ID: victim.id.ID(), Carrier: "h2", Since: time.Now(), Hints: []string{wire.HintOutbox}}})
	w.run()
	eventually(t, "it was tried", func() bool { return r.connects(victim.id.ID()) > 1 })
	p := w.s.fleet.Presence(victim.id.ID())
	if up(p.State) || len(w.events(victim.id.ID())) != 0 {
		t.Fatalf("the victim is %s with %d events", p.State, len(w.events(victim.id.ID())))
	}
	// And the other way round: its hello may not name another.
	honest := w.s.party(wire.RoleNode, owned.id.ID())
	owned.mu.Lock()
	owned.hello.Party.ID = victim.id.ID()
	owned.mu.Unlock()
	r.hold(owned)
	eventually(t, "it was asked", func() bool { owned.mu.Lock(); defer owned.mu.Unlock(); return owned.hellos > 0 })
	err := w.s.sessions.Do(context.Background(), honest, func(ctx context.Context, c *conversation) error {
		_, _, err := c.Hello(ctx)
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "calls itself") {
		t.Fatalf("hello of another: %v", err)
	}
	if up(w.s.fleet.Presence(owned.id.ID()).State) || up(w.s.fleet.Presence(victim.id.ID()).State) {
		t.Fatal("a forged hello counted")
	}
}

func TestForgedDigestsAndReplayedSignalsMakeBoundedWork(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r, n := w.rcp("evil"), w.enrolled(w.node("web"))
	n.emit(10)
	r.hold(n)
	w.run()
	w.state(n.id.ID(), wire.StateRunning)
	eventually(t, "events arrive", func() bool { return len(w.events(n.id.ID())) == 10 })
	n.mu.Lock()
	hellos, pulls := n.hellos, n.pulls
	n.mu.Unlock()
	for i := range 2000 {
		r.hint(n, fmt.Sprintf("%024x", i), wire.HintOutbox, wire.HintAction)
	}
	r.hint(n, "last")
	eventually(t, "all lines were read", func() bool {
		w.s.fleet.mu.Lock()
		defer w.s.fleet.mu.Unlock()
		for _, way := range w.s.fleet.members[n.id.ID()].ways {
			return way.digest == "last"
		}
		return false
	})
	n.mu.Lock()
	hellos, pulls = n.hellos-hellos, n.pulls-pulls
	n.mu.Unlock()
	if hellos > 2*defaultTimings.hintBurst || pulls > 2*defaultTimings.hintBurst {
		t.Fatalf("2000 hints caused %d hellos and %d pulls", hellos, pulls)
	}
	if got := w.events(n.id.ID()); len(got) != 10 {
		t.Fatalf("replays made %d events of 10", len(got))
	}
	w.state(n.id.ID(), wire.StateRunning)
}

func TestHintsAreLimitedOverTimeAndNothingIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		r, n := b.rcp("evil"), b.node("web", wire.StatePending)
		b.up(r)
		b.snapshot(r, "e1", nodePeer(n))
		b.pass(time.Second)
		before := b.visits[n]
		for i := range 600 { // ten minutes of a new forged digest every second
			p := nodePeer(n)
			p.Digest = fmt.Sprint(i)
			if err := b.f.apply(r, wire.PeersLine{Peer: &p}); err != nil {
				t.Fatal(err)
			}
			b.pass(time.Second)
		}
		limit := int(600*time.Second/defaultTimings.hintEvery) + defaultTimings.hintBurst + 2
		if v := b.visits[n] - before; v > limit {
			t.Fatalf("%d visits in ten minutes, want at most %d", v, limit)
		}
		b.pass(time.Minute)
		before = b.visits[n]
		p := nodePeer(n)
		p.Digest = "a constant lie"
		for range 100 {
			if err := b.f.apply(r, wire.PeersLine{Peer: &p}); err != nil {
				t.Fatal(err)
			}
			b.pass(time.Second)
		}
		if v := b.visits[n] - before; v > 1 {
			t.Fatalf("a constant lie caused %d visits", v)
		}
	})
}

func TestNonsenseOnThePeersStream(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r, n := w.rcp("mad"), w.enrolled(w.node("web"))
	long := `{"peer":{"role":"node","id":"` + strings.Repeat("x", 2*wire.MaxPeersLine) + `"}}`
	self := fmt.Sprintf(`{"peer":{"role":"node","id":%q}}`, r.id.ID())
	asRCP := fmt.Sprintf(`{"peer":{"role":"rcp","id":%q}}`, n.id.ID())
	loop := fmt.Sprintf(`{"peer":{"role":"node","id":%q,"path":[%q]}}`, n.id.ID(), r.id.ID())
	r.raw = []string{"{", "null", `{"peer":{"role":"gateway","id":"x"}}`, `{"gone":{"id":"nobody"}}`, self, asRCP, loop,
		`{"peer":{"pending":"zz"}}`, `{"peer":{"pending":"` + strings.Repeat("a", 64) + `","role":"node"}}`, `{"hello":{"snapshot":true}}`}
	r.hold(n)
	w.run()
	eventually(t, "it is read again and again", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return r.streams > 1 })
	r.mu.Lock()
	r.raw = r.raw[:len(r.raw)-1] // without the hello of nobody
	r.mu.Unlock()
	w.state(n.id.ID(), wire.StateRunning)
	if h, _ := w.s.fleet.hop(r.id.ID()); h.Refused < 5 {
		t.Fatalf("%d lines were refused", h.Refused)
	}
	r.mu.Lock()
	r.raw = []string{long}
	streams := r.streams
	r.mu.Unlock()
	w.s.links.cut(r.id.ID(), errors.New("test"))
	eventually(t, "the long line ends its stream", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return r.streams > streams+1 })
}

func TestRCPThatNamesItselfOtherwise(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r, n := w.rcp("evil"), w.enrolled(w.node("web"))
	r.helloID = wire.NewID()
	r.hold(n)
	w.run()
	eventually(t, "it is asked twice", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return r.streams > 1 })
	if p := w.s.fleet.Presence(n.id.ID()); p.State != wire.StatePending || p.Connected {
		t.Fatalf("the node is %+v", p)
	}
}

func TestBoundsOnWhatAnRCPMayClaim(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	r := b.rcp("evil")
	b.up(r)
	if err := b.f.peersHello(r, wire.PeersHello{ID: r, Epoch: "e", Snapshot: true}); err != nil {
		t.Fatal(err)
	}
	refused := 0
	var madeUp wire.ID
	for range maxUnknownPerLink + 100 {
		id := wire.NewID()
		if err := b.f.apply(r, wire.PeersLine{Peer: new(nodePeer(id))}); errors.Is(err, errBadLine) {
			refused++
		} else {
			madeUp = id
		}
	}
	if refused != 100 {
		t.Fatalf("%d of %d made-up nodes were refused, want 100", refused, maxUnknownPerLink+100)
	}
	// More ways to those are more of the same.
	if err := b.f.apply(r, wire.PeersLine{Peer: new(nodePeer(madeUp, wire.NewID()))}); !errors.Is(err, errBadLine) {
		t.Fatalf("another way to a made-up node: %v", err)
	}
	if err := b.f.apply(r, wire.PeersLine{Peer: new(nodePeer(madeUp))}); err != nil {
		t.Fatalf("the same way once more: %v", err)
	}
	// Strangers make parties that wait, not an RCP: an honest one keeps its
	// stream, and who comes last is known.
	word := strings.Repeat("w", 2<<10)
	for i := range maxPendingPerLink + 100 {
		key := wire.KeyHash(fmt.Sprintf("%064x", i))
		if err := b.f.apply(r, wire.PeersLine{Peer: &wire.Peer{Pending: key, Boot: word, Digest: word, Hints: []string{word}}}); err != nil {
			t.Fatal(err)
		}
		if kept, err := json.Marshal(b.f.pending[key]); err != nil || len(kept) > 512 {
			t.Fatalf("%d bytes are kept of a party that waits, %v", len(kept), err)
		}
		if len(b.f.pendingRoutes(key)) != 1 || len(b.f.pending) > maxPendingPerLink {
			t.Fatalf("the %dth that waits is not known, or %d are", i, len(b.f.pending))
		}
	}
	n := b.node("web", wire.StatePending)
	refused = 0
	for range maxWays + 10 {
		if err := b.f.apply(r, wire.PeersLine{Peer: new(nodePeer(n, wire.NewID()))}); errors.Is(err, errBadLine) {
			refused++
		}
	}
	if refused != 10 {
		t.Fatalf("%d ways were refused, want 10", refused)
	}
	// What is made up keeps nobody out whom the operator has let in.
	b.f.links[r].peers = maxPeersPerLink
	if err := b.f.apply(r, wire.PeersLine{Peer: new(nodePeer(b.node("app", wire.StateDown)))}); err != nil {
		t.Fatalf("a known node beside too many others: %v", err)
	}
	// The truth about the node still gets in.
	honest := b.rcp("honest")
	b.up(honest)
	b.snapshot(honest, "h1", nodePeer(n))
	var path []wire.ID
	for range wire.MaxHops {
		path = append(path, wire.NewID())
	}
	if err := b.f.apply(r, wire.PeersLine{Peer: new(nodePeer(n, path...))}); !errors.Is(err, errBadLine) {
		t.Fatalf("a path over too many RCPs: %v", err)
	}
	// A node that a real way is reported for is not shut out by the made-up ones.
	other := b.rcp("good")
	b.up(other)
	fresh := b.node("fresh", wire.StatePending)
	b.snapshot(other, "g1", nodePeer(fresh))
	b.work()
	b.want(fresh, wire.StateRunning, "")
	// All that it made up goes when it says so, or is removed.
	b.f.unexpect(r)
	if len(b.f.pending) != 0 || len(b.f.members) > 6 {
		t.Fatalf("%d pending and %d members are left of it", len(b.f.pending), len(b.f.members))
	}
}

func TestOneRCPsLiesDoNotShutOutAnothersTruth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		evil, good, n := b.rcp("evil"), b.rcp("good"), b.node("web", wire.StatePending)
		b.up(evil)
		b.up(good)
		b.snapshot(good, "g1", nodePeer(n))
		b.snapshot(evil, "e1")
		b.pass(time.Second)
		b.want(n, wire.StateRunning, "")
		for range 50 { // it flaps a node that it does not even hold
			if err := b.f.apply(evil, wire.PeersLine{Peer: new(nodePeer(n))}); err != nil {
				t.Fatal(err)
			}
			b.gone(evil, n)
			b.pass(time.Second)
		}
		b.want(n, wire.StateRunning, "")
		if got := b.alarms(n); got != "" {
			t.Fatalf("alarms: %q", got)
		}
	})
}

func TestMaliciousNodeOutbox(t *testing.T) {
	t.Parallel()
	w, _, n := running(t)
	id := n.id.ID()
	bad := wire.Event{ID: wire.NewID(), Seq: 1, Time: time.Now(), Severity: "loud", Text: "x"}
	n.mu.Lock()
	n.events = []wire.Event{bad}
	n.mu.Unlock()
	_, delay := w.s.pullOutbox(context.Background(), task{id: id, role: wire.RoleNode, name: "web", known: true})
	if delay == 0 || len(w.events(id)) != 0 {
		t.Fatalf("an event with an unknown severity was taken, or is asked for at once again (%v)", delay)
	}
	n.mu.Lock()
	acked := n.acked
	n.mu.Unlock()
	if acked != 0 {
		t.Fatal("what was not stored was acknowledged")
	}
	w.state(id, wire.StateRunning)
}

// A hello may be long, for its policies. Its words stand in lists.
func TestWordsOfAHelloSpoilNoList(t *testing.T) {
	t.Parallel()
	w, r, n := running(t)
	long := strings.Repeat("v", 1<<20)
	said := wire.Hello{Party: n.hello.Party, Boot: long, Program: long, Mode: long, Installation: long, OS: long, Arch: long, Outbox: wire.OutboxState{Spool: long}}
	if _, err := w.s.record(t.Context(), task{id: n.id.ID(), role: wire.RoleNode, known: true}, &said, 0); err != nil {
		t.Fatal(err)
	}
	row, err := w.db.Node(t.Context(), n.id.ID())
	if err != nil {
		t.Fatal(err)
	}
	if b, err := json.Marshal(row); err != nil || len(b) > 8<<10 || !strings.HasPrefix(row.Program, "vvv") {
		t.Errorf("%d bytes are kept of a node, %v", len(b), err)
	}
	if _, err := w.s.record(t.Context(), task{id: r.id.ID(), role: wire.RoleRCP, known: true}, &wire.Hello{Program: long}, 0); err != nil {
		t.Fatal(err)
	}
	if rcp, err := w.db.RCPByID(t.Context(), r.id.ID()); err != nil || len(rcp.Program) > 300 {
		t.Errorf("the version of an RCP: %v", err)
	}
	tags := map[string]string{}
	for i := range 5000 {
		tags[fmt.Sprint("k", i)] = long[:100]
	}
	said.Name, said.Reason, said.Salt, said.Tags = long, long, long, tags
	said.Upstreams = []wire.UpstreamStatus{{Error: long}}
	w.s.fleet.verifiedHello(n.id.ID(), wire.RoleNode, said, 0)
	if b, err := json.Marshal(w.s.fleet.Presence(n.id.ID()).Hello); err != nil || len(b) > 32<<10 {
		t.Errorf("%d bytes are kept of a hello, %v", len(b), err)
	}
	stranger := strangerView(presence{ID: wire.NewID(), Hello: &wire.Hello{Program: long, Name: long, Tags: map[string]string{"a": long, "b": "c"}}})
	if len(stranger.Version)+len(stranger.Name) > 1<<10 || len(stranger.Tags) != 1 {
		t.Errorf("a stranger is shown with %d bytes and %d tags", len(stranger.Version)+len(stranger.Name), len(stranger.Tags))
	}
	if err := refusal(&http.Response{StatusCode: 500, Body: io.NopCloser(strings.NewReader("no\nsallyport: all is well"))}); strings.Contains(err.Error(), "\n") {
		t.Errorf("a refusal of several lines: %q", err)
	}
}

func TestNodeThatReadsNothingHoldsNoOutboxForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		body, down := io.Pipe() // nobody reads body
		defer func() { _ = body.Close() }()
		c := &conversation{rt: nopSession{}}
		p := &pull{down: down, stuck: func() { _ = down.CloseWithError(c.mute()) }}
		if err := p.send(wire.OutboxDown{}); err == nil || time.Since(began) != sessionAnswer {
			t.Fatalf("%v after %v", err, time.Since(began))
		}
		if !c.dead() {
			t.Fatal("its session is used again")
		}
	})
}

// JSON takes a time with a year of four digits in its own zone, and cannot
// write it in UTC: one line of an RCP would make every list unreadable.
func TestImpossibleTimesOfAnRCPSpoilNoList(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	r, n := b.rcp("evil"), b.node("web", wire.StateRunning)
	b.up(r)
	b.snapshot(r, "e")
	for _, line := range []string{
		fmt.Sprintf(`{"peer":{"role":"node","id":%q,"since":"9999-12-31T23:59:59-23:00"}}`, n),
		fmt.Sprintf(`{"peer":{"pending":%q,"since":"0000-01-01T00:00:00+23:00"}}`, strings.Repeat("ab", 32)),
	} {
		var l wire.PeersLine
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			t.Fatal(err)
		}
		if err := b.f.apply(r, l); err != nil {
			t.Fatal(err)
		}
	}
	paths := b.f.Presence(n).Paths
	if _, err := json.Marshal(paths); err != nil || len(paths) != 1 {
		t.Errorf("%d paths: %v", len(paths), err)
	}
	at := b.f.pendingRoutes(wire.KeyHash(strings.Repeat("ab", 32)))
	if _, err := json.Marshal(at); err != nil || len(at) != 1 {
		t.Errorf("%d pending: %v", len(at), err)
	}
}

func TestPendingPartiesOfOneRCPDelayNoOthers(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	evil, good := b.rcp("evil"), b.rcp("good")
	b.up(evil)
	b.up(good)
	b.snapshot(evil, "e")
	b.snapshot(good, "g")
	for i := range 500 {
		if err := b.f.apply(evil, wire.PeersLine{Peer: &wire.Peer{Pending: wire.KeyHash(fmt.Sprintf("%064x", i))}}); err != nil {
			t.Fatal(err)
		}
	}
	honest := wire.KeyHash(strings.Repeat("ab", 32))
	if err := b.f.apply(good, wire.PeersLine{Peer: &wire.Peer{Pending: honest}}); err != nil {
		t.Fatal(err)
	}
	if at := b.f.pendingRoutes(honest); len(at) != 1 || at[0].Link != good {
		t.Fatalf("the honest one is at %+v", at)
	}
}

// FuzzPeersLine feeds the fleet with whatever decodes as lines of an RCP, and
// counts again what it keeps count of.
func FuzzPeersLine(f *testing.F) {
	id := "7f0ad3a8-8f5c-4f0e-9a51-0d1f6f3f2b11"
	other := "0b9c1d56-3c1f-4a43-8f0e-5d8f4f8b3a10"
	f.Add(fmt.Sprintf(`{"peer":{"role":"node","id":%q,"digest":"d","hints":["outbox"]},"pos":1}`, id))
	f.Add(fmt.Sprintf(`{"peer":{"role":"rcp","id":%q}}`+"\n"+`{"peer":{"role":"node","id":%q,"path":[%q]}}`+"\n"+`{"gone":{"id":%q}}`, other, id, other, other))
	f.Add(`{"hello":{"epoch":"e2","snapshot":true}}` + "\n" + `{"synced":true,"pos":9}` + "\n" + `{"draining":{}}`)
	f.Add(`{"peer":{"pending":"` + strings.Repeat("0a", 32) + `"}}` + "\n" + `{"gone":{"pending":"` + strings.Repeat("0a", 32) + `"}}`)
	f.Fuzz(func(t *testing.T, text string) {
		b := newBench(t)
		r, _ := b.rcp("evil"), b.node("web", wire.StatePending)
		b.f.learn(record{ID: wire.ID(id), Role: wire.RoleNode, Name: "known", State: wire.StatePending, Since: time.Now()})
		b.up(r)
		lines := wire.NewLineReader(strings.NewReader(text), wire.MaxPeersLine)
		for {
			var line wire.PeersLine
			if err := lines.Next(&line); errors.Is(err, wire.ErrMalformed) {
				continue
			} else if err != nil {
				break
			}
			if line.Hello != nil {
				line.Hello.ID = r
				_ = b.f.peersHello(r, *line.Hello) // a refusal is as good
				continue
			}
			_ = b.f.apply(r, line)
			b.work()
		}
		b.f.tick(time.Now())
		b.f.mu.Lock()
		defer b.f.mu.Unlock()
		peers, unknown, pending := 0, 0, 0
		for _, m := range b.f.members {
			for range m.ways {
				if peers++; !m.known {
					unknown++
				}
			}
			if m.index >= 0 && b.f.due[m.index] != m {
				t.Fatal("the heap of due times is broken")
			}
		}
		for _, by := range b.f.pending {
			pending += len(by)
		}
		l := b.f.links[r]
		if l.peers != peers || l.unknown != unknown || b.f.waiting[r] != pending {
			t.Fatalf("counted %d peers, %d unknown, %d pending; there are %d, %d, %d", l.peers, l.unknown, b.f.waiting[r], peers, unknown, pending)
		}
	})
}
