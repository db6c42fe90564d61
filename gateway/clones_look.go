package gateway

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/wire"
)

const (
	// suspectAfter lets a node that was restarted lose its old channels before
	// two boots are suspicious; suspectEvery bounds the work that an RCP can
	// cause by making things up, for one node; probers for all that it doubts. An
	// RCP that lets every session hang delays none that another one doubts.
	suspectAfter = 3 * time.Second
	suspectEvery = time.Minute
	probers      = 4
	probes       = 6 // sessions of one look, by several ways in turn
	// What shares one way takes turns at it: each new channel replaces the last
	// one. Then a look lasts until so many sessions, one for each change.
	turnProbes = 12
	turnEvery  = 10 * time.Second       // without a change that was reported
	turnAfter  = 300 * time.Millisecond // after one
	// wayAfter is when a node that came by another way is asked whether it
	// knows of all its ways: a machine that was just resumed may believe in its
	// old channels until they have missed two keep-alives.
	wayAfter = 30 * time.Second
)

// doubt is a reason to look whether a node is one process.
type doubt uint8

const (
	doubtNone doubt = iota // a channel of it changed
	doubtWay               // it came by another way, besides those that it has
	doubtTwo               // what is reported of it, or what it said, is not that of one process
)

// suspicion is a look that is planned, or under way.
type suspicion struct {
	why   doubt
	at    time.Time // of the next session
	asked int
	busy  bool
	moved bool      // a channel changed while busy
	by    []wire.ID // first hops that gave a reason; empty for one that we found
	place wire.ID   // of these, whose place it takes while busy
}

// suspect is told of a reason to look, by a first hop or, if that is empty, by
// what we found. It does not wait: the fleet calls it.
func (c *clones) suspect(id, hop wire.ID, why doubt) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	s := c.suspects[id]
	if s == nil {
		if why != doubtNone {
			c.suspects[id] = &suspicion{why: why, at: c.earliest(id, now.Add(after(why))), by: []wire.ID{hop}}
			wake(c.wake)
		}
		return
	}
	sooner := false // to wake for each line of an RCP would be to go through all suspects for each
	if why != doubtNone && !slices.Contains(s.by, hop) {
		s.by, sooner = append(s.by, hop), true
	}
	at := s.at
	switch {
	case s.busy: // done looks at it
		s.moved = true
		s.why = max(s.why, why)
		return
	case s.asked > 0: // it waits for the other one's turn
		at = now.Add(turnAfter)
	case why > s.why:
		s.why, at = why, c.earliest(id, now.Add(after(why)))
	}
	if at.Before(s.at) {
		s.at, sooner = at, true
	}
	if sooner {
		wake(c.wake)
	}
}

func after(why doubt) time.Duration {
	if why == doubtWay {
		return wayAfter + rand.N(wayAfter/2) // an RCP that comes back brings thousands at once
	}
	return suspectAfter
}

// earliest keeps the distance to the last look; mu is held.
func (c *clones) earliest(id wire.ID, at time.Time) time.Time {
	if last, ok := c.looked[id]; ok && at.Before(last.Add(suspectEvery)) {
		return last.Add(suspectEvery)
	}
	return at
}

// due returns the suspects whose time has come and for which there is a place,
// and says when the next is. Each is given back with done.
func (c *clones) due(now time.Time) (looks map[wire.ID]*suspicion, next time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	looks, next = map[wire.ID]*suspicion{}, time.Hour
	for id, s := range c.suspects {
		if s.busy {
			continue
		}
		if wait := s.at.Sub(now); wait > 0 {
			next = min(next, wait)
			continue
		}
		i := slices.IndexFunc(s.by, func(hop wire.ID) bool { return c.places[hop] < probers })
		if i < 0 {
			continue // done wakes us
		}
		if s.asked == 0 {
			c.looked[id] = now
		}
		s.busy, s.moved, s.place = true, false, s.by[i]
		c.places[s.place]++
		looks[id] = s
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
	return looks, next
}

// done ends a look, or plans its next session.
func (c *clones) done(id wire.ID, s *suspicion, more bool, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.places[s.place]--; c.places[s.place] == 0 {
		delete(c.places, s.place)
	}
	wake(c.wake)
	if c.suspects[id] != s {
		return // forgotten meanwhile
	}
	s.busy = false
	switch {
	case !more:
		delete(c.suspects, id)
	case s.moved:
		s.at = now.Add(turnAfter)
	default:
		s.at = now.Add(turnEvery)
	}
}

// run looks at suspects until ctx ends.
func (c *clones) run(ctx context.Context) error {
	var looking sync.WaitGroup
	defer looking.Wait()
	for {
		looks, next := c.due(time.Now())
		for id, s := range looks {
			looking.Go(func() {
				more := c.look(ctx, id, s)
				c.done(id, s, more, time.Now())
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
// of its own, until it is quarantined, or proven to be one process. It tells
// whether to ask again later: by a single way, those behind it take turns. One that
// is quarantined is told so by each way.
func (c *clones) look(ctx context.Context, id wire.ID, s *suspicion) (more bool) {
	run := unbroken{}
	for ; s.asked < turnProbes; s.asked++ {
		doors, reported := c.doors(id)
		if c.s.fleet.quarantined(id) != "" {
			c.tell(ctx, id, doors)
			return false
		}
		if len(doors) == 0 || reported < 2 && c.reason(s) == doubtWay {
			return false
		}
		if len(doors) == 1 && doors[0].conn != nil {
			return false // both would have a channel to us
		}
		if reported > 1 && s.asked >= probes {
			return false
		}
		d := doors[s.asked%len(doors)]
		a, err := c.ask(ctx, id, d)
		switch {
		case ctx.Err() != nil:
			return false
		case err != nil:
			c.s.log.Debug("a node that may be two does not answer by one way", "id", id, "way", d.route.name, "error", err)
		case c.reason(s) == doubtWay && (a.hello.Previous.IsZero() || c.s.fleet.accounts(id, a.hello.Upstreams)):
			return false
		case run.add(d, a) == len(doors) && reported == len(doors) && reported > 1:
			return false
		}
		if reported < 2 {
			s.asked++
			return s.asked < turnProbes
		}
	}
	return false
}

func (c *clones) tell(ctx context.Context, id wire.ID, doors []door) {
	for _, d := range doors {
		if _, err := c.ask(ctx, id, d); err != nil {
			c.s.log.Debug("a quarantined node is not told by one way", "id", id, "way", d.route.name, "error", err)
		}
	}
}

func (c *clones) reason(s *suspicion) doubt {
	c.mu.Lock()
	defer c.mu.Unlock()
	return s.why
}

// unbroken counts the ways by which one process proved to answer, one answer
// after the other.
type unbroken struct {
	last *greeting
	by   []door
}

// add returns how many they are: one whose nonce is not given back with the
// next answer may be another process, or another gateway came in between.
func (u *unbroken) add(d door, a *greeting) int {
	if u.last == nil || a.hello.Boot != u.last.hello.Boot || a.hello.Previous != u.last.nonce {
		u.by = nil
	}
	u.last = a
	if !slices.ContainsFunc(u.by, d.same) {
		u.by = append(u.by, d)
	}
	return len(u.by)
}

// door is a way that a look can choose: a first hop, or, where the node hangs
// on us, one of its channels.
type door struct {
	route route
	conn  *channel.Conn
}

func (d door) same(o door) bool { return d.route.link == o.route.link && d.conn == o.conn }

// doors lists them, and counts the ways that are reported: an RCP that has
// several takes one as it likes.
func (c *clones) doors(id wire.ID) (out []door, reported int) {
	routes, err := c.s.fleet.routes(id)
	if err != nil {
		return nil, 0
	}
	reported = len(routes)
	for _, r := range byFirstHop(routes, "") {
		if r.link != id {
			out = append(out, door{route: r})
			continue
		}
		conns := c.s.links.conns(id)
		reported += len(conns) - 1
		for _, conn := range conns {
			out = append(out, door{route: r, conn: conn})
		}
	}
	return out, reported
}

func (c *clones) ask(ctx context.Context, id wire.ID, d door) (*greeting, error) {
	ctx, cancel := context.WithTimeout(ctx, openWay+2*sessionAnswer)
	defer cancel()
	conv, err := c.open(ctx, id, d)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conv.rt.Close() }()
	return c.greet(ctx, id, conv)
}

// open opens a session by one door.
func (c *clones) open(ctx context.Context, id wire.ID, d door) (*conversation, error) {
	party := c.s.party(wire.RoleNode, id)
	var rt endToEnd
	var err error
	if d.conn == nil {
		rt, err = c.s.sessions.openBy(ctx, party, d.route)
	} else {
		rt, err = c.s.sessions.openOn(ctx, party, d.conn)
	}
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return &conversation{party: party, via: d.route, since: now, rt: rt}, nil
}

// Bounds on the search for one process of several.
const (
	reachTime  = 30 * time.Second
	reachEvery = 500 * time.Millisecond // by the same way: those behind it take turns
)

// errOtherProcess says that another process than the one meant answered.
var errOtherProcess = errors.New("another process answers")

// reach runs f in a session with the process of a node that has a boot ID. A
// node that is two answers with the one or the other, which ways and channels
// decide.
func (c *clones) reach(ctx context.Context, id wire.ID, boot string, f func(ctx context.Context, c *conversation) error) error {
	limit := time.Now().Add(reachTime)
	tick := time.NewTicker(reachEvery)
	defer tick.Stop()
	for n := 0; ; n++ {
		doors, _ := c.doors(id)
		if len(doors) == 0 {
			return fmt.Errorf("%s: %w", c.s.fleet.label(id), ErrNotConnected)
		}
		reached, err := c.tryDoor(ctx, id, doors[n%len(doors)], boot, f)
		switch {
		case reached:
			return err
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case time.Now().After(limit):
			return fmt.Errorf("%s: %w as boot %s within %s: %w (node show lists those that did)", c.s.fleet.label(id), ErrNotConnected, wire.Quotable(boot), wire.Duration(reachTime), err)
		}
		if n%len(doors) == len(doors)-1 {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	}
}

func (c *clones) tryDoor(ctx context.Context, id wire.ID, d door, boot string, f func(ctx context.Context, c *conversation) error) (reached bool, err error) {
	conv, err := c.open(ctx, id, d)
	if err != nil {
		return false, err
	}
	defer func() { _ = conv.rt.Close() }()
	a, err := c.greet(ctx, id, conv)
	if err != nil {
		return false, err
	}
	if a.hello.Boot != boot {
		return false, fmt.Errorf("%w: boot %s", errOtherProcess, wire.Quotable(a.hello.Boot))
	}
	return true, f(ctx, conv)
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

// doubts looks at what an RCP reports of a node by w, which still holds what it
// reported before. A process counts the channels that it opens or answers, and
// uses no number twice; copies of it go on from the same.
func (f *fleet) doubts(m *member, w *way, p *wire.Peer) doubt {
	if w.since.Equal(p.Since) {
		return doubtNone
	}
	boot := clip(p.Boot)
	counts := boot != "" && p.Generation > 0
	if counts && w.boot == boot && p.Generation <= w.generation && p.Since.After(w.since) {
		return doubtTwo
	}
	why := doubtNone
	for _, o := range m.ways {
		switch {
		case o == w:
		case counts && o.boot == boot && o.generation == p.Generation && !o.since.Equal(p.Since): // one channel may be reported by two ways
			return doubtTwo
		case o.gone.IsZero() && !o.blind:
			why = doubtWay
		}
	}
	return why
}

// accounts tells whether a node that says so of its upstreams knows of each
// way that it is reported by.
func (f *fleet) accounts(id wire.ID, said []wire.UpstreamStatus) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	if m == nil {
		return true
	}
	for _, w := range f.liveWays(m) {
		hop := w.link
		if len(w.path) > 0 {
			hop = w.path[len(w.path)-1]
		}
		if !slices.ContainsFunc(said, func(u wire.UpstreamStatus) bool {
			return u.State == "connected" && (u.ID == hop || hop == id && u.Role == wire.RoleGateway)
		}) {
			return false
		}
	}
	return true
}
