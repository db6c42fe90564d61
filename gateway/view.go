package gateway

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"sallyport/gateway/api"
	"sallyport/internal/wire"
)

// directHop stands for the name of an RCP where a node hangs on the gateway itself.
const directHop = "direct"

// presence is what the fleet knows of one party at one moment.
type presence struct {
	ID        wire.ID
	Name      string
	Known     bool // it has a row in the database
	State     wire.NodeState
	Reason    string
	Since     time.Time
	Connected bool // some connected first hop reports it
	RCPs      []string
	Carrier   string
	LastSeen  time.Time   // end of the last session that succeeded
	Hello     *wire.Hello // what it said in it; nil if there was none since we started
	Paths     []api.NodePath
}

// Presence returns what is known of a party. For one that the fleet never
// heard of, State is empty.
func (f *fleet) Presence(id wire.ID) presence {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.members[id]; m != nil {
		return f.look(m)
	}
	return presence{ID: id}
}

const (
	// rekeyWait is how long the end of a key waits for its party to come with the
	// next one, which it does at once. On a way that is slower than that it is cut
	// first, as it is in any case where the RCP dials it.
	rekeyWait = 3 * time.Second
	rekeyLook = 20 * time.Millisecond
)

// returns notes the channels of a party. The function that it returns waits until
// the party is there by another one, if it dials any, and for rekeyWait at most.
func (f *fleet) returns(id wire.ID) func(context.Context) {
	channels := func() map[string]time.Time {
		f.mu.Lock()
		defer f.mu.Unlock()
		out := map[string]time.Time{}
		if m := f.members[id]; m != nil {
			for _, w := range f.liveWays(m) {
				if !w.dialled {
					out[wayKey(w.link, w.path)] = w.since
				}
			}
		}
		return out
	}
	before := channels()
	return func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, rekeyWait)
		defer cancel()
		tick := time.NewTicker(rekeyLook)
		defer tick.Stop()
		for len(before) > 0 {
			for way, since := range channels() {
				if was, ok := before[way]; !ok || !was.Equal(since) {
					return
				}
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
	}
}

// strangers returns the nodes that proved in a session that they hold a
// certificate of ours, and that the database does not know.
func (f *fleet) strangers() []presence {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []presence
	for _, m := range f.members {
		if !m.known && m.hello != nil && m.role == wire.RoleNode {
			out = append(out, f.look(m))
		}
	}
	slices.SortFunc(out, func(a, b presence) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

func (f *fleet) look(m *member) presence {
	live := f.liveWays(m)
	p := presence{ID: m.id, Name: m.name, Known: m.known, State: m.state, Reason: m.reason, Since: m.since,
		Connected: len(live) > 0, RCPs: []string{}, LastSeen: m.verified, Hello: m.hello}
	for i, w := range live {
		if i == 0 {
			p.Carrier = w.carrier
		}
		path := api.NodePath{RCP: directHop, Carrier: w.carrier, Source: w.source, Boot: w.boot, Since: w.since, RTT: w.rtt.Seconds()}
		if w.link != m.id {
			path.RCP = f.nameOf(w.link)
			for _, id := range w.path {
				path.Via = append(path.Via, f.nameOf(id))
			}
			// The RCP that a node hangs on is the last of its path.
			hangsOn := path.RCP
			if n := len(path.Via); n > 0 {
				hangsOn = path.Via[n-1]
			}
			if !slices.Contains(p.RCPs, hangsOn) {
				p.RCPs = append(p.RCPs, hangsOn)
			}
		}
		p.Paths = append(p.Paths, path)
	}
	return p
}

// counts are the numbers that a table of RCPs and the metrics show.
type counts struct {
	Online  int // nodes that are connected by way of the RCP, as far as it says
	Pending int // parties that wait for a certificate there
}

// behind counts what an RCP reports, itself or through others; nothing while its
// channel is gone.
func (f *fleet) behind(id wire.ID) (c counts) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.members {
		if m.role != wire.RoleNode {
			continue
		}
		for _, w := range f.liveWays(m) {
			if w.link == id && len(w.path) == 0 || len(w.path) > 0 && w.path[len(w.path)-1] == id {
				c.Online++
				break
			}
		}
	}
	if l := f.links[id]; l != nil && l.up {
		c.Pending = f.waiting[id]
	}
	return c
}

// route is one way to a party, copied for those that open a stream on it.
type route struct {
	link wire.ID
	path []wire.ID
	name string // of the first hop, for messages
}

// routes returns the live ways to a party, best first.
func (f *fleet) routes(id wire.ID) ([]route, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	if m == nil {
		return nil, ErrUnknownNode
	}
	if m.revoked != "" {
		return nil, fmt.Errorf("%w: it is revoked", ErrNotConnected)
	}
	return f.routesOf(m)
}

// lastRoutes returns the live ways to a party that is revoked: an RCP may hold
// its channel until it has the signed set.
func (f *fleet) lastRoutes(id wire.ID) ([]route, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	if m == nil || m.revoked == "" {
		return nil, ErrUnknownNode
	}
	return f.routesOf(m)
}

func (f *fleet) routesOf(m *member) ([]route, error) {
	live := f.liveWays(m)
	if len(live) == 0 {
		return nil, ErrNotConnected
	}
	out := make([]route, len(live))
	for i, w := range live {
		out[i] = route{link: w.link, path: w.path, name: f.hopName(w)}
	}
	return out, nil
}

// tried notes how opening a stream on a way went.
func (f *fleet) tried(id wire.ID, r route, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	if m == nil {
		return
	}
	w := m.ways[wayKey(r.link, r.path)]
	switch {
	case w == nil:
	case err == nil:
		w.failures = 0
		m.lastLink = r.link
	default:
		w.failures++
	}
}

// lastLink is the first hop by which the last session with a party was opened.
func (f *fleet) lastLink(id wire.ID) wire.ID {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.members[id]; m != nil {
		return m.lastLink
	}
	return ""
}

// pendingAt is where a pending party can be reached.
type pendingAt struct {
	Link wire.ID // empty: by a channel of our own
	Name string  // of the RCP; empty: we know none
	Peer wire.Peer
}

// pendingRoutes returns the first hops that report a pending party, in no order.
func (f *fleet) pendingRoutes(key wire.KeyHash) []pendingAt {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []pendingAt
	for id, p := range f.pending[key] {
		if l := f.links[id]; l != nil && l.up {
			out = append(out, pendingAt{Link: id, Name: f.nameOf(id), Peer: p})
		}
	}
	return out
}

// pendingKeys returns every pending party that some connected first hop reports.
func (f *fleet) pendingKeys() []wire.KeyHash {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]wire.KeyHash, 0, len(f.pending))
	for key := range f.pending {
		out = append(out, key)
	}
	return out
}

// totals are for metrics: parties by role and state, and links.
func (f *fleet) totals() (states map[wire.NodeState]int, rcps, linksUp, pending int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	states = make(map[wire.NodeState]int)
	for _, m := range f.members {
		if m.role == wire.RoleNode && (m.known || m.hello != nil) {
			states[m.state]++
		}
	}
	for _, l := range f.links {
		if l.role == wire.RoleRCP {
			rcps++
			if l.up {
				linksUp++
			}
		}
	}
	return states, rcps, linksUp, len(f.pending)
}

// hopView is one first hop for trace and for tables.
type hopView struct {
	Up      bool
	Role    wire.Role
	Since   time.Time
	LastErr string
	Carrier string
	Address string
	Dialled bool
	RTT     time.Duration
	Synced  bool
	Refused int64
}

// hop returns what is known of the link to a first hop.
func (f *fleet) hop(id wire.ID) (hopView, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.links[id]
	if l == nil {
		return hopView{}, false
	}
	v := hopView{Up: l.up, Role: l.role, Since: l.since, LastErr: l.lastErr, Carrier: l.carrier,
		Address: l.address, Dialled: l.dialled, Synced: l.synced, Refused: l.refused}
	if l.up && l.rtt != nil {
		v.RTT = l.rtt()
	}
	return v, true
}

// label is how messages name a party.
func (f *fleet) label(id wire.ID) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.members[id]; m != nil {
		return string(m.role) + " " + f.nameOf(id)
	}
	return "party " + id.Short()
}

// nameNow is nameOf for those that do not hold the lock.
func (f *fleet) nameNow(id wire.ID) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.nameOf(id)
}
