package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

const (
	// sightingLife is how long it is remembered which boot of a node answered.
	sightingLife = time.Hour
	maxSightings = 4 // boots of one node
	keyClone     = "clone"
)

// sighting is one boot of a node, proven in sessions.
type sighting struct {
	boot       string
	first      time.Time // when the first answer of it was there
	sent, last time.Time // of its last answer: when it was asked for, when it was there
	thread     thread
	// copied: what answered under this boot ID is no one process, or it went
	// back in time. Each process that still answers under it gets another.
	copied bool
}

// clones finds nodes whose identity lives in two processes at once: copies of
// one virtual machine, or a thief's. A boot id is made anew at each start, so
// that one process answers under one; two that answer in turn are two processes.
//
// The proof is boot a, then b, then a again, each asked for after the answer
// before was there, in sessions that only the node's key can hold. A restart
// goes from a to b and never back, and an RCP can delay an answer, but none was
// made before it was asked for. What RCPs report is a reason to look.
//
// A machine that is copied with its memory leaves two processes of one boot id.
// They cannot make what tells them apart, so the gateway brings it: see
// [thread]. Where the thread of one boot breaks, each process that answers
// under it is given a boot id of its own, and then the proof is the same. A
// machine that was turned back to a snapshot of its memory breaks its thread
// too, but is one process: no boot of it comes back, so nothing is proven.
type clones struct {
	s *Server

	mu       sync.Mutex
	seen     map[wire.ID][]sighting
	suspects map[wire.ID]*suspicion
	looked   map[wire.ID]time.Time
	places   map[wire.ID]int // looks under way, by the first hop that gave the reason
	wake     chan struct{}
}

func newClones(s *Server) *clones {
	return &clones{s: s, seen: map[wire.ID][]sighting{}, suspects: map[wire.ID]*suspicion{}, looked: map[wire.ID]time.Time{}, places: map[wire.ID]int{}, wake: make(chan struct{}, 1)}
}

// saw takes an answer over. It returns the other boot when the two prove two
// processes, and tells whether more than one process may answer under this one.
func (c *clones) saw(id wire.ID, a *greeting) (other string, copied bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := slices.DeleteFunc(c.seen[id], func(x sighting) bool { return a.got.Sub(x.last) > sightingLife })
	i := slices.IndexFunc(all, func(x sighting) bool { return x.boot == a.hello.Boot })
	if i < 0 {
		if len(all) >= maxSightings {
			all = slices.Delete(all, 0, 1)
		}
		i = len(all)
		all = append(all, sighting{boot: a.hello.Boot, first: a.got, sent: a.sent, last: a.got})
	}
	x := &all[i]
	if x.thread.breaks(a) {
		x.copied = true
	}
	for _, y := range all {
		// A boot ID that a gateway gave goes back in time with its process.
		turned := wire.UnmarkBoot(y.boot) == wire.UnmarkBoot(x.boot) && (x.copied || y.copied)
		if y.boot != x.boot && !turned && x.first.Before(y.sent) && y.last.Before(a.sent) {
			other = y.boot
		}
	}
	if a.got.After(x.last) {
		x.sent, x.last = a.sent, a.got
	}
	c.seen[id] = all
	return other, x.copied
}

// boots lists what answered as a node, the latest first.
func (c *clones) boots(id wire.ID) []api.NodeBoot {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := []api.NodeBoot{}
	for _, x := range c.seen[id] {
		out = append(out, api.NodeBoot{ID: clip(x.boot), First: x.first.UTC(), Last: x.last.UTC(), Copied: x.copied})
	}
	slices.SortFunc(out, func(a, b api.NodeBoot) int { return b.Last.Compare(a.Last) })
	return out
}

// forget begins anew with a node: an operator has looked at it.
func (c *clones) forget(id wire.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.seen, id)
	delete(c.suspects, id)
	delete(c.looked, id)
}

// greet asks a node for its hello, tells it whether it is quarantined, and follows
// what it proves. A process that answers under a boot ID which others may have is
// given another in the same session, and asked again.
func (c *clones) greet(ctx context.Context, id wire.ID, conv *conversation) (*greeting, error) {
	tell := http.Header{}
	if c.s.fleet.quarantined(id) != "" {
		tell.Set(wire.HeaderQuarantined, "1")
	}
	a, err := conv.greet(ctx, tell)
	if err != nil {
		return nil, err
	}
	other, copied := c.saw(id, a)
	if copied {
		c.suspect(id, "", doubtTwo)
		tell.Set(wire.HeaderMark, "1")
		if a, err = conv.greet(ctx, tell); err != nil {
			return nil, err
		}
		if o, _ := c.saw(id, a); o != "" {
			other = o
		}
	}
	if other == "" || c.s.fleet.quarantined(id) != "" {
		return a, nil
	}
	return a, c.quarantine(ctx, id, a.hello.Boot, other)
}

// quarantine is for a node of which two boots are proven to live.
func (c *clones) quarantine(ctx context.Context, id wire.ID, boot, other string) error {
	n, err := c.s.store.Node(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return nil // it is shown as locked (unknown), and gets nothing anyway
	}
	if err != nil {
		return err
	}
	who := "two live hosts have its identity"
	if wire.UnmarkBoot(boot) == wire.UnmarkBoot(other) {
		who = "two copies of one running machine have its identity"
	}
	why := fmt.Sprintf("%s: they answered in turn as boots %s and %s", who, clip(other), clip(boot))
	err = c.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		tx.Audit(ctx, "node.quarantine", "node "+n.Name, why)
		tx.Raise(store.Internal{NodeID: id, Severity: wire.SeverityMajor, Object: "node " + n.Name, Key: keyClone,
			Text: fmt.Sprintf("node %s is quarantined: %s; give one of them another identity (node reidentify --boot), or stop it (local status shows the boot on each host), then node resume", n.Name, why)})
		return tx.SetQuarantine(ctx, id, why)
	})
	if err != nil {
		return err
	}
	c.s.log.Warn("node quarantined", "node", n.Name, "id", id, "reason", why)
	if err := c.reload(ctx, id); err != nil {
		return err
	}
	c.s.tunnels.cut(id)
	c.suspect(id, "", doubtTwo) // to tell them
	return nil
}

// resume ends a quarantine by an operator's word. Two hosts that still live are
// found again.
func (c *clones) resume(ctx context.Context, n *store.Node) error {
	err := c.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		tx.Audit(ctx, "node.resume", "node "+n.Name, "quarantine ended")
		tx.Raise(store.Internal{NodeID: n.ID, Severity: wire.SeverityNormal, Object: "node " + n.Name, Key: keyClone,
			Text: fmt.Sprintf("the quarantine of node %s was ended by %s", n.Name, store.ActorFrom(ctx).Who)})
		return tx.SetQuarantine(ctx, n.ID, "")
	})
	if err != nil {
		return err
	}
	c.forget(n.ID)
	if err := c.reload(ctx, n.ID); err != nil {
		return err
	}
	c.s.sessions.cut(n.ID) // the one that is asked now is whoever is there now
	c.s.fleet.ask(wantHello, n.ID)
	return nil
}

func (c *clones) reload(ctx context.Context, id wire.ID) error {
	n, err := c.s.store.Node(ctx, id)
	if err != nil {
		return err
	}
	c.s.fleet.learn(nodeRecord(n))
	return nil
}

// quarantined is why a node is quarantined; empty if it is not.
func (f *fleet) quarantined(id wire.ID) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.members[id]; m != nil {
		return m.quarantine
	}
	return ""
}
