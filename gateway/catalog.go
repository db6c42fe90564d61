package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"sallyport/gateway/bus"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

const (
	// shunTime is how long a node that failed at a target is passed over, as
	// long as there is another; it doubles up to maxShunTime while the node
	// goes on failing.
	shunTime    = 10 * time.Second
	maxShunTime = 2 * time.Minute
	// maxCandidates bounds the look for the least busy node: so many that are
	// connected, from a random place on, are as good as all of them.
	maxCandidates = 16
	// maxNames bounds the names of nodes that are remembered.
	maxNames = 10_000
	// catalogRest is the share of time that reading the catalog leaves to
	// others: while ten thousand nodes report, it is not read for each.
	catalogRest = 10
	// catalogRetry is when a read that failed is tried again.
	catalogRetry = 5 * time.Second
)

// What [catalog.pick] answers when there is nobody to pick.
var (
	errNoTarget   = errors.New("no such target")             // nobody is to offer it
	errNotOffered = errors.New("the node does not offer it") // or not yet, or it failed to apply it
	errNobody     = errors.New("no node offers it")          // or not yet
	errExhausted  = errors.New("every node that offers it was tried")
)

// catalog knows which node offers which target: a target of its desired state
// that it said it has applied. What the database says is read again on each
// wake-up; who is connected is asked of the fleet when it matters. It starts
// nothing.
type catalog struct {
	fleet *fleet
	db    *store.DB
	log   *slog.Logger

	read   int64                         // highest revision of a desired state that was read; only refresh uses it
	wanted map[wire.ID]map[string]string // targets that each node should offer, by name: only refresh uses it

	mu      sync.Mutex
	offers  map[string]*offer
	streams map[wire.ID]int // connections and requests that run by way of each node
	running map[string]int  // and through each target
	shunned map[shun]shunning
	names   map[string]wire.ID // of nodes that were asked for; each answer is checked
}

// offer is one target with the nodes that offer it.
type offer struct {
	wanted []wire.ID // that should offer it, sorted
	nodes  []wire.ID // that do, sorted
	specs  map[wire.ID]*wire.TargetSpec
}

// shun names what failed: a target at a node, or, without a target, the node.
type shun struct {
	node   wire.ID
	target string
}

// shunning is for how long.
type shunning struct {
	until time.Time
	last  time.Duration
}

func newCatalog(f *fleet, db *store.DB, log *slog.Logger) *catalog {
	return &catalog{fleet: f, db: db, log: log, wanted: map[wire.ID]map[string]string{}, offers: map[string]*offer{},
		streams: map[wire.ID]int{}, running: map[string]int{}, shunned: map[shun]shunning{}, names: map[string]wire.ID{}}
}

// run keeps the catalog as the database is, until ctx ends.
func (c *catalog) run(ctx context.Context, b bus.Bus) error {
	wakes, cancel := b.Subscribe(bus.Targets)
	defer cancel()
	for {
		began := time.Now()
		err := c.refresh(ctx)
		rest := catalogRest * time.Since(began)
		if err != nil && ctx.Err() == nil {
			c.log.Error("targets not read; it is tried again", "error", err)
			rest = catalogRetry
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(rest):
		}
		if err != nil {
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case <-wakes:
		}
	}
}

// refresh reads what is new. It is not called by two at once.
func (c *catalog) refresh(ctx context.Context) error {
	changed, last, err := c.db.DesiredTargets(ctx, c.read)
	if err != nil {
		return fmt.Errorf("read desired targets: %w", err)
	}
	statuses, err := c.db.TargetStatuses(ctx)
	if err != nil {
		return fmt.Errorf("read the states of targets: %w", err)
	}
	for _, n := range changed {
		if len(n.Targets) == 0 {
			delete(c.wanted, n.NodeID)
			continue
		}
		c.wanted[n.NodeID] = n.Targets
	}
	c.read = last

	digests := map[string]*wire.TargetSpec{}
	statuses = slices.DeleteFunc(statuses, func(s store.PolicyStatus) bool {
		_, wanted := c.wanted[s.NodeID][s.Policy]
		return !wanted || s.State != wire.PolicyApplied || wire.IsBuiltinTarget(s.Policy)
	})
	for _, s := range statuses {
		digests[s.Digest] = nil
	}
	raw, err := c.db.Specs(ctx, slices.Collect(maps.Keys(digests)))
	if err != nil {
		return fmt.Errorf("read the specs of targets: %w", err)
	}
	for digest, text := range raw {
		var spec wire.TargetSpec
		if err := json.Unmarshal(text, &spec); err != nil || spec.Validate() != nil {
			continue // a policy of another type, which a node that lies names
		}
		digests[digest] = &spec
	}
	offers := map[string]*offer{}
	for id, names := range c.wanted {
		for name := range names {
			o := offers[name]
			if o == nil {
				o = &offer{specs: map[wire.ID]*wire.TargetSpec{}}
				offers[name] = o
			}
			o.wanted = append(o.wanted, id)
		}
	}
	for _, s := range statuses {
		// What a node has applied counts, be it an earlier version: it has that
		// one until it says that it has the new one.
		spec := digests[s.Digest]
		if spec == nil {
			continue
		}
		o := offers[s.Policy] // what is wanted is there
		o.nodes = append(o.nodes, s.NodeID)
		o.specs[s.NodeID] = spec
	}
	for _, o := range offers {
		slices.Sort(o.wanted)
		slices.Sort(o.nodes)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.offers = offers
	return nil
}

// choice is a node that shall carry one connection or request.
type choice struct {
	node  wire.ID
	spec  *wire.TargetSpec // nil: a built-in target
	alone bool             // there is no other node to go to
	done  func()           // called once, when the connection or request is over
}

// pick chooses the node for one connection or request to a target: node, if it
// is not empty, else the least busy one that offers it, is connected and was
// not tried yet; one that failed a moment ago only if there is no other.
func (c *catalog) pick(target string, node wire.ID, tried ...wire.ID) (choice, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	o := c.offers[target]
	builtin := wire.IsBuiltinTarget(target)
	if o == nil && !builtin {
		return choice{}, errNoTarget
	}
	var found []candidate
	switch {
	case node != "" && !builtin && o.specs[node] == nil:
		return choice{}, errNotOffered
	case node == "" && !builtin && len(o.nodes) == 0:
		return choice{}, errNobody
	case node != "" && slices.Contains(tried, node):
		return choice{}, errExhausted
	case node != "":
		found = c.fleet.candidates([]wire.ID{node}, nil)
	case builtin:
		found = c.fleet.anyCandidates(tried)
	default:
		found = c.fleet.candidates(o.nodes, tried)
	}
	if len(found) == 0 {
		if len(tried) > 0 {
			return choice{}, errExhausted
		}
		return choice{}, ErrNotConnected
	}
	now := time.Now()
	best := slices.MinFunc(found, func(a, b candidate) int { return c.rank(a, target, now) - c.rank(b, target, now) })
	ch := choice{node: best.id, alone: len(found) == 1}
	if !builtin {
		ch.spec = o.specs[best.id]
	}
	c.streams[best.id]++
	ch.done = sync.OnceFunc(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.streams[best.id]--; c.streams[best.id] <= 0 {
			delete(c.streams, best.id)
		}
	})
	return ch, nil
}

// rank is lower for the better node.
func (c *catalog) rank(n candidate, target string, now time.Time) int {
	r := c.streams[n.id]
	if n.doubtful {
		r += 1 << 20
	}
	if c.isShunned(n.id, target, now) {
		r += 1 << 21
	}
	return r
}

func (c *catalog) isShunned(node wire.ID, target string, now time.Time) bool {
	if len(c.shunned) == 0 {
		return false
	}
	return now.Before(c.shunned[shun{node, target}].until) || now.Before(c.shunned[shun{node, ""}].until)
}

// failed has others preferred to a node for a while: for one target, or, with
// an empty one, for all.
func (c *catalog) failed(node wire.ID, target string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(c.shunned, func(_ shun, s shunning) bool { return now.After(s.until.Add(maxShunTime)) })
	key := shun{node, target}
	s := c.shunned[key]
	if !now.Before(s.until) { // several that fail together count once
		s.last = min(max(2*s.last, shunTime), maxShunTime)
		s.until = now.Add(s.last)
		c.shunned[key] = s
	}
}

// worked ends what failed began.
func (c *catalog) worked(node wire.ID, target string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.shunned) > 0 {
		delete(c.shunned, shun{node, target})
		delete(c.shunned, shun{node, ""})
	}
}

// enter counts a connection or request to a target, and refuses it when there
// are limit of them.
func (c *catalog) enter(target string, limit int) (leave func(), ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.running[target] >= limit {
		return nil, false
	}
	c.running[target]++
	return sync.OnceFunc(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.running[target]--; c.running[target] <= 0 {
			delete(c.running, target)
		}
	}), true
}

// usage is what the catalog knows of one target.
type usage struct {
	wanted, offered []wire.ID // nodes that should offer it, and that do
	specs           map[wire.ID]*wire.TargetSpec
	running         int // connections and requests
}

func (c *catalog) usage(target string) usage {
	c.mu.Lock()
	defer c.mu.Unlock()
	u := usage{running: c.running[target]}
	if o := c.offers[target]; o != nil { // never changed once it is there
		u.wanted, u.offered, u.specs = o.wanted, o.nodes, o.specs
	}
	return u
}

// streamsBy is how many connections and requests run by way of a node.
func (c *catalog) streamsBy(node wire.ID) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.streams[node]
}

// avoided tells until when others are preferred to a node; zero if they are not.
func (c *catalog) avoided(node wire.ID, target string) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	until := c.shunned[shun{node, target}].until
	if all := c.shunned[shun{node, ""}].until; all.After(until) {
		until = all
	}
	if !time.Now().Before(until) {
		return time.Time{}
	}
	return until
}

// candidate is a node that can be reached as far as the fleet knows.
type candidate struct {
	id       wire.ID
	doubtful bool // it drains, or no session has proved the connection yet
}

// candidates returns up to maxCandidates of the nodes that are connected, from
// a random place on.
func (f *fleet) candidates(ids, without []wire.ID) []candidate {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]candidate, 0, min(len(ids), maxCandidates))
	start := rand.IntN(max(len(ids), 1))
	for i := range ids {
		id := ids[(start+i)%len(ids)]
		if c, ok := f.candidate(f.members[id]); ok && !slices.Contains(without, id) {
			if out = append(out, c); len(out) == maxCandidates {
				break
			}
		}
	}
	return out
}

// anyCandidates is candidates for all nodes. A map is walked from a random
// place on.
func (f *fleet) anyCandidates(without []wire.ID) []candidate {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []candidate
	for id, m := range f.members {
		if c, ok := f.candidate(m); ok && !slices.Contains(without, id) {
			if out = append(out, c); len(out) == maxCandidates {
				break
			}
		}
	}
	return out
}

func (f *fleet) candidate(m *member) (c candidate, ok bool) {
	if m == nil || m.role != wire.RoleNode || !m.known || m.revoked != "" || !f.hasWay(m) {
		return c, false
	}
	switch m.state {
	case wire.StateLocked, wire.StateQuarantined, wire.StateUpgrade:
		return c, false
	case wire.StateRunning, wire.StateFailing, wire.StateReadonly:
		return candidate{id: m.id}, true
	}
	return candidate{id: m.id, doubtful: true}, true
}

// reachable counts the nodes that are candidates.
func (f *fleet) reachable(ids []wire.ID) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, id := range ids {
		if _, ok := f.candidate(f.members[id]); ok {
			n++
		}
	}
	return n
}

// allReachable counts all of them, and how many nodes there are.
func (f *fleet) allReachable() (known, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.members {
		if m.role == wire.RoleNode && m.known && m.revoked == "" {
			known++
		}
		if _, ok := f.candidate(m); ok {
			n++
		}
	}
	return known, n
}

// hasWay is whether liveWays would return any.
func (f *fleet) hasWay(m *member) bool {
	for _, w := range m.ways {
		if l := f.links[w.link]; l != nil && l.up && !w.blind && w.gone.IsZero() {
			return true
		}
	}
	return false
}

// brokenAt names what an absent node is cut off at: an RCP, or the node itself.
func (f *fleet) brokenAt(id wire.ID) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	if m == nil {
		return "node " + id.Short()
	}
	for _, w := range m.ways {
		if hop := f.brokenHop(m, w); hop != "" {
			return hop
		}
	}
	return "node " + f.nameOf(id)
}

// node finds a node by its exact name or its ID.
func (c *catalog) node(ref string) (wire.ID, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fleet.mu.Lock()
	defer c.fleet.mu.Unlock()
	fits := func(m *member) bool {
		return m != nil && m.role == wire.RoleNode && m.known && (m.name == ref || string(m.id) == ref)
	}
	for _, id := range []wire.ID{wire.ID(ref), c.names[ref]} {
		if fits(c.fleet.members[id]) {
			return id, true
		}
	}
	for id, m := range c.fleet.members {
		if fits(m) {
			if len(c.names) >= maxNames {
				clear(c.names)
			}
			c.names[ref] = id
			return id, true
		}
	}
	return "", false
}
