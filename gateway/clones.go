package gateway

import (
	"context"
	"errors"
	"fmt"
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
	// suspectAfter lets a node that was restarted lose its old channels before
	// two boots are suspicious; suspectEvery bounds the work that an RCP can
	// cause by making boots up, for one node; probers for all.
	suspectAfter = 3 * time.Second
	suspectEvery = time.Minute
	probers      = 4
	probes       = 6 // sessions of one look
	keyClone     = "clone"
)

// sighting is one boot of a node, proven in sessions.
type sighting struct {
	boot       string
	first      time.Time // when the first answer of it was there
	sent, last time.Time // of its last answer: when it was asked for, when it was there
}

// clones finds nodes whose identity lives on two hosts at once: copies of one
// virtual machine, or a thief's. A boot id is made anew at each start, so that
// one process answers under one; two that answer in turn are two processes.
//
// The proof is boot a, then b, then a again, each asked for after the answer
// before was there, in sessions that only the node's key can hold. A restart
// goes from a to b and never back, and an RCP can delay an answer, but none was
// made before it was asked for. What RCPs report of boots is a reason to look.
type clones struct {
	s *Server

	mu       sync.Mutex
	seen     map[wire.ID][]sighting
	suspects map[wire.ID]time.Time // when to look at them
	looked   map[wire.ID]time.Time
	wake     chan struct{}
}

func newClones(s *Server) *clones {
	return &clones{s: s, seen: map[wire.ID][]sighting{}, suspects: map[wire.ID]time.Time{}, looked: map[wire.ID]time.Time{}, wake: make(chan struct{}, 1)}
}

// saw takes an answer over: sent is when it was asked for, got when it was
// there. It returns the other boot when the two prove two processes.
func (c *clones) saw(id wire.ID, boot string, sent, got time.Time) (other string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := slices.DeleteFunc(c.seen[id], func(x sighting) bool { return got.Sub(x.last) > sightingLife })
	i := slices.IndexFunc(all, func(x sighting) bool { return x.boot == boot })
	if i < 0 {
		if len(all) >= maxSightings {
			all = slices.Delete(all, 0, 1)
		}
		c.seen[id] = append(all, sighting{boot: boot, first: got, sent: sent, last: got})
		return ""
	}
	for _, x := range all {
		if x.boot != boot && all[i].first.Before(x.sent) && x.last.Before(sent) {
			other = x.boot
		}
	}
	if got.After(all[i].last) {
		all[i].sent, all[i].last = sent, got
	}
	c.seen[id] = all
	return other
}

// boots lists what answered as a node, the latest first.
func (c *clones) boots(id wire.ID) []api.NodeBoot {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := []api.NodeBoot{}
	for _, x := range c.seen[id] {
		out = append(out, api.NodeBoot{ID: clip(x.boot), First: x.first.UTC(), Last: x.last.UTC()})
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

// suspect is told that RCPs report a node under two boots at once. It does not
// wait: the fleet calls it.
func (c *clones) suspect(id wire.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, there := c.suspects[id]; there {
		return
	}
	now := time.Now()
	at := now.Add(suspectAfter)
	if last, ok := c.looked[id]; ok && at.Before(last.Add(suspectEvery)) {
		at = last.Add(suspectEvery)
	}
	c.suspects[id] = at
	wake(c.wake)
}

// due takes the suspects out whose time has come, and says when the next is.
func (c *clones) due(now time.Time) (ids []wire.ID, next time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	next = time.Hour
	for id, at := range c.suspects {
		if wait := at.Sub(now); wait > 0 {
			next = min(next, wait)
			continue
		}
		delete(c.suspects, id)
		c.looked[id] = now
		ids = append(ids, id)
	}
	for id, at := range c.looked {
		if now.Sub(at) > suspectEvery {
			delete(c.looked, id)
		}
	}
	for id, all := range c.seen {
		if now.Sub(all[len(all)-1].last) > sightingLife {
			delete(c.seen, id)
		}
	}
	return ids, next
}

// run looks at suspects until ctx ends.
func (c *clones) run(ctx context.Context) error {
	var looking sync.WaitGroup
	defer looking.Wait()
	places := make(chan struct{}, probers)
	for {
		ids, next := c.due(time.Now())
		for _, id := range ids {
			select {
			case places <- struct{}{}:
			case <-ctx.Done():
				return nil
			}
			looking.Go(func() {
				defer func() { <-places }()
				c.look(ctx, id)
			})
		}
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-c.wake:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// look asks a node for its hello by its ways in turn, each time in a session
// of its own.
func (c *clones) look(ctx context.Context, id wire.ID) {
	for n := range probes {
		routes, err := c.s.fleet.routes(id)
		if err != nil {
			return
		}
		routes = byFirstHop(routes, "")
		if c.s.fleet.quarantined(id) != "" {
			return
		}
		err = c.ask(ctx, id, routes[n%len(routes)])
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			c.s.log.Debug("a node that is reported under two boots does not answer by one way", "id", id, "rcp", routes[n%len(routes)].name, "error", err)
		}
	}
}

func (c *clones) ask(ctx context.Context, id wire.ID, r route) error {
	ctx, cancel := context.WithTimeout(ctx, openWay+sessionAnswer)
	defer cancel()
	party := c.s.party(wire.RoleNode, id)
	rt, err := c.s.sessions.openBy(ctx, party, r)
	if err != nil {
		return err
	}
	defer func() { _ = rt.Close() }()
	sent := time.Now()
	h, _, err := (&conversation{party: party, via: r, since: sent, rt: rt, used: sent}).Hello(ctx)
	if err != nil {
		return err
	}
	return c.heard(ctx, id, h.Boot, sent)
}

// ErrQuarantined says that a node gets nothing because two live hosts have its
// identity.
var ErrQuarantined = errors.New("quarantined")

// heard follows each verified hello of a node. It returns ErrQuarantined when
// the node is quarantined because of it.
func (c *clones) heard(ctx context.Context, id wire.ID, boot string, sent time.Time) error {
	other := c.saw(id, boot, sent, time.Now())
	if other == "" || c.s.fleet.quarantined(id) != "" {
		return nil
	}
	n, err := c.s.store.Node(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return nil // it is shown as locked (unknown), and gets nothing anyway
	}
	if err != nil {
		return err
	}
	why := fmt.Sprintf("two live hosts have its identity: they answered in turn as boots %s and %s", clip(other), clip(boot))
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
	return fmt.Errorf("node %s: %w: %s", n.Name, ErrQuarantined, why)
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

// twoBoots tells whether ways of a node are reported under different boots.
func (f *fleet) twoBoots(m *member) bool {
	boot := ""
	for _, w := range f.liveWays(m) {
		if w.boot == "" {
			continue
		}
		if boot != "" && w.boot != boot {
			return true
		}
		boot = w.boot
	}
	return false
}
