package gateway

import (
	"container/heap"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"sallyport/internal/wire"
)

// What the fleet answers when there is no way to a party.
var (
	ErrUnknownNode  = errors.New("unknown node")
	ErrNotConnected = errors.New("node is not connected")
)

// Bounds on what one first hop may make the gateway remember.
const (
	maxPeersPerLink   = 100_000
	maxUnknownPerLink = 10_000 // parties without a row in the database: stale, or made up
	maxPendingPerLink = 10_000 // what an RCP lets wait by default
	maxWays           = 16     // to one party by one first hop
)

// firstHop is a party that we hold a link to, or would like to.
type firstHop struct {
	id   wire.ID
	role wire.Role
	name string

	up       bool
	since    time.Time // of up, or of not up
	lastErr  string
	carrier  string
	address  string
	dialled  bool // we dialled
	rtt      func() time.Duration
	draining bool

	epoch   string
	pos     int64 // 0 until a snapshot of this epoch is complete
	synced  bool
	peers   int
	unknown int
	refused int64 // lines that broke a rule or a bound

	queues  [choreCount][]wire.ID
	running [choreCount]int
}

// fleet knows who hangs where: the merged peers streams, and what sessions
// proved. Everything in it is memory; [fleet.changes] gives what the database
// must learn. It starts nothing: its owner calls tick when due says so.
type fleet struct {
	t            timings
	installation string
	started      time.Time
	onChannel    func(node, hop wire.ID, why doubt) // hears from a first hop, or from us, that a node has another channel, or seems to be two, under mu; nil: nobody does
	onParked     func(node, hop wire.ID)            // hears hints of a first hop, under mu; nil: nobody does

	mu      sync.Mutex
	members map[wire.ID]*member
	known   int // members that have a row in the database
	most    int // of these at any time
	links   map[wire.ID]*firstHop
	pending map[wire.KeyHash]map[wire.ID]wire.Peer // by the first hop that reports it
	waiting map[wire.ID]int                        // pending parties per first hop
	due     dueHeap
	ready   [choreCount]chan struct{} // holds one wake-up
	retime  chan struct{}             // the next due time changed
	changed map[wire.ID]*change
	news    chan struct{}     // changed is not empty, or seen is not
	seen    map[wire.ID]seen  // last_seen to be written in a batch
	arrived chan wire.KeyHash // pending parties to be looked at; overflow is looked at again by the caller's sweep
}

// change is one transition that the database must learn. Transitions of one
// party that were not yet written are merged: the first From and the last To.
type change struct {
	ID     wire.ID
	Role   wire.Role
	Name   string
	Known  bool
	From   wire.NodeState
	To     wire.NodeState
	Reason string
	Alarms []alarm // oldest first
}

// alarm is what becomes of the event pair "lost" and "back" of a party.
type alarm struct {
	Lost   bool // or back
	State  wire.NodeState
	Reason string
}

// maxAlarms bounds the alarms of one party that wait for the database.
const maxAlarms = 16

// seen is when a session with a party last succeeded.
type seen struct {
	At   time.Time
	Role wire.Role
}

func newFleet(t timings, installation string) *fleet {
	f := &fleet{
		t: t, installation: installation, started: time.Now(),
		members: make(map[wire.ID]*member),
		links:   make(map[wire.ID]*firstHop),
		pending: make(map[wire.KeyHash]map[wire.ID]wire.Peer),
		waiting: make(map[wire.ID]int),
		retime:  make(chan struct{}, 1),
		changed: make(map[wire.ID]*change),
		news:    make(chan struct{}, 1),
		seen:    make(map[wire.ID]seen),
		arrived: make(chan wire.KeyHash, 2*maxPendingPerLink),
	}
	for i := range f.ready {
		f.ready[i] = make(chan struct{}, 1)
	}
	return f
}

// record is what the database knows of a party.
type record struct {
	ID       wire.ID
	Role     wire.Role
	Name     string
	State    wire.NodeState
	Reason   string
	Since    time.Time
	LastSeen time.Time
	Alarmed  bool
	Revoked  string // why; empty if it is not

	Quarantine string // likewise
}

// learn adds a party of the database, or takes over its new name or
// revocation. What is known of its presence stays.
func (f *fleet) learn(r record) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	m := f.members[r.ID]
	fresh := m == nil
	if fresh {
		m = f.add(r.ID, r.Role)
		m.left, m.settle = f.started, f.started.Add(f.t.settle)
		m.verified = r.LastSeen
	}
	adopted := !fresh && !m.known
	if adopted {
		f.countUnknown(m, -1)
		m.hello, m.digest, m.verified = nil, "", time.Time{}
	}
	if fresh || adopted {
		m.state, m.reason, m.since, m.alarmed = r.State, r.Reason, r.Since, r.Alarmed
	}
	if !m.known {
		f.known++
		f.most = max(f.most, f.known)
	}
	m.known, m.name, m.revoked, m.quarantine, m.role = true, r.Name, r.Revoked, r.Quarantine, r.Role
	if adopted { // it was enrolled again while it was connected: its state is proven anew
		m.chores[choreStranger] = false
		f.want(m, wantHello, false)
	}
	if m.since.IsZero() {
		m.state, m.since = wire.StatePending, now
	}
	f.judgeNow(m, now)
}

// forget drops a party that was removed from the database. If it is still
// there it turns up again as unknown.
func (f *fleet) forget(id wire.ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	if m == nil {
		return
	}
	f.drop(m)
	delete(f.changed, id)
	delete(f.seen, id)
}

func (f *fleet) add(id wire.ID, role wire.Role) *member {
	m := &member{id: id, role: role, index: -1, state: wire.StatePending, since: time.Now()}
	f.members[id] = m
	return m
}

func (f *fleet) drop(m *member) {
	for _, w := range m.ways {
		f.dropWay(m, w)
	}
	if m.index >= 0 {
		heap.Remove(&f.due, m.index)
	}
	delete(f.members, m.id)
	if m.known {
		f.known--
	}
}

// judgeNow publishes the state of m if it changed, and sets its next due time.
func (f *fleet) judgeNow(m *member, now time.Time) {
	v := f.judge(m, now)
	if v.state != m.state {
		f.publish(m, v, now)
	} else {
		m.reason = v.reason
	}
	if m.state == wire.StateDown || m.state == wire.StatePending { // nothing holds it any more
		for key, w := range m.ways {
			if !w.gone.IsZero() {
				f.dropWay(m, w)
				delete(m.ways, key)
			}
		}
	}
	if !m.known && len(m.ways) == 0 {
		f.drop(m)
		return
	}
	next := v.next
	earlier := func(t time.Time) {
		if !t.IsZero() && (next.IsZero() || t.Before(next)) {
			next = t
		}
	}
	earlier(m.prove)
	if m.held != 0 {
		earlier(m.heldAt)
	}
	if m.retry != 0 {
		earlier(m.retryAt)
	}
	f.setDue(m, next)
}

func (f *fleet) publish(m *member, v verdict, now time.Time) {
	c := f.changed[m.id]
	if c == nil {
		c = &change{ID: m.id, Role: m.role, From: m.state}
		f.changed[m.id] = c
	}
	c.Name, c.Known, c.To, c.Reason = m.name, m.known, v.state, v.reason
	lost := v.state == wire.StateDown || v.state == wire.StateUnreachable && len(f.liveWays(m)) > 0
	if m.known && (lost && !m.alarmed || up(v.state) && m.alarmed) {
		m.alarmed = !m.alarmed
		c.Alarms = append(c.Alarms, alarm{Lost: m.alarmed, State: v.state, Reason: v.reason})
		if len(c.Alarms) > maxAlarms { // the database is stuck: the oldest pair goes
			c.Alarms = c.Alarms[2:]
		}
	}
	m.state, m.reason, m.since = v.state, v.reason, now
	wake(f.news)
}

// setDue moves m in the heap of due times.
func (f *fleet) setDue(m *member, at time.Time) {
	m.due = at
	switch {
	case at.IsZero() && m.index >= 0:
		heap.Remove(&f.due, m.index)
	case at.IsZero():
		return
	case m.index >= 0:
		heap.Fix(&f.due, m.index)
	default:
		heap.Push(&f.due, m)
	}
	if len(f.due) > 0 && f.due[0] == m {
		wake(f.retime)
	}
}

// tick does what is due at now and returns when to call it next; zero for
// "when retime says so".
func (f *fleet) tick(now time.Time) time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.due) > 0 && !f.due[0].due.After(now) {
		m := f.due[0]
		if m.held != 0 && !m.heldAt.After(now) {
			held := m.held
			m.held = 0
			f.want(m, held, true)
		}
		if m.retry != 0 && !m.retryAt.After(now) {
			retry := m.retry
			m.retry = 0
			f.want(m, retry, true)
		}
		if !m.prove.IsZero() && !m.prove.After(now) {
			m.prove = time.Time{} // set again by the visit
			if len(f.liveWays(m)) > 0 {
				f.want(m, wantProve|wantHello, false)
			}
		}
		f.judgeNow(m, now)
		if m.index >= 0 && !m.due.After(now) { // cannot be: judge never asks for the past
			f.setDue(m, now.Add(time.Second))
		}
	}
	if len(f.due) == 0 {
		return time.Time{}
	}
	return f.due[0].due
}

// maxSkew is the error of a party's clock above which an operator is told.
const maxSkew = time.Minute

// verifiedHello takes over what a session with a party proved. skew is the
// party's clock less ours. It reports whether the party's clock went wrong or
// became right.
func (f *fleet) verifiedHello(id wire.ID, role wire.Role, hello wire.Hello, skew time.Duration) (skewChanged bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	if m == nil {
		m = f.add(id, role)
	}
	now := time.Now()
	m.digest, m.hello = hello.Digest(), bounded(&hello)
	wrong := skew.Abs() > maxSkew
	skewChanged = wrong != m.skewed
	m.skewed = wrong
	if !m.known && m.name == "" {
		m.name = clip(hello.Name)
	}
	f.proven(m, now)
	return skewChanged
}

// bounded is what is kept of a hello in memory: a fleet holds many, and a party
// may fill all that one can hold. The database has the policies.
func bounded(hello *wire.Hello) *wire.Hello {
	h := words(hello)
	h.Policies, h.Previous, h.Upstreams = nil, wire.Nonce{}, nil
	h.Reason = h.Reason[:min(len(h.Reason), 4<<10)]
	h.Reigns = h.Reigns[:min(len(h.Reigns), 64)]
	h.Tags = boundTags(h.Tags)
	return h
}

// took takes over what a node answered to a desired state that it took. Its
// hello has changed by that, so that the digest that it signals next is known
// and calls for no visit.
func (f *fleet) took(id wire.ID, r *wire.DesiredResult) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	if m == nil || m.hello == nil {
		return
	}
	hello := *m.hello
	hello.Installation, hello.Applied, hello.Policies = f.installation, r.Applied, r.Policies
	m.digest = hello.Digest()
	hello.Policies = nil // as in verifiedHello
	m.hello = &hello
}

// heardBefore returns the last verified hello of a party of which nothing else
// is wanted than that it takes something: it need not say it again, because it
// signals what has changed since. It is nil where there is none.
func (f *fleet) heardBefore(t task) *wire.Hello {
	if t.wants != wantPush || !t.known {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[t.id]
	if m == nil || m.hello == nil || m.lastErr != "" {
		return nil
	}
	if _, ok := m.hello.Versions.Common(wire.OwnVersions); !ok {
		return nil
	}
	hello := *m.hello
	return &hello
}

// contact says that a session with the party did something useful just now.
func (f *fleet) contact(id wire.ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.members[id]; m != nil {
		f.proven(m, time.Now())
	}
}

func (f *fleet) proven(m *member, now time.Time) {
	m.verified, m.failures, m.lastErr = now, 0, ""
	m.prove = now.Add(f.stretched(f.t.proveMin + rand.N(f.t.proveMax-f.t.proveMin)))
	if m.known {
		f.seen[m.id] = seen{At: now, Role: m.role}
	}
	f.judgeNow(m, now)
}

// unproven says that no session with the party could be opened, and plans the
// next attempt.
func (f *fleet) unproven(id wire.ID, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	if m == nil {
		return
	}
	now := time.Now()
	m.failures++
	m.lastErr = clip(err.Error())
	if len(f.liveWays(m)) > 0 {
		delay := f.t.retryMin << min(m.failures-1, 16)
		delay = min(delay, f.t.retryMax)
		if up(m.state) && now.Sub(m.verified) > f.stretched(f.t.window) { // a lost cause costs little
			delay = f.t.retryMax
		}
		m.prove = now.Add(delay/2 + rand.N(delay/2+1))
	}
	f.judgeNow(m, now)
}

// setNotice sets what an operator must know of a node although it runs; empty
// clears it.
func (f *fleet) setNotice(id wire.ID, text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.members[id]; m != nil && m.notice != text {
		m.notice = text
		f.judgeNow(m, time.Now())
	}
}

// takeChanges returns what the database has to learn, and forgets it; the
// caller gives it back with restore if it could not be written.
func (f *fleet) takeChanges(withSeen bool) (changes []change, last map[wire.ID]seen) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.changed {
		changes = append(changes, *c)
	}
	clear(f.changed)
	if withSeen {
		last = f.seen
		f.seen = make(map[wire.ID]seen)
	}
	return changes, last
}

func (f *fleet) restore(changes []change, last map[wire.ID]seen) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range changes {
		if newer := f.changed[c.ID]; newer != nil {
			newer.From = c.From
			newer.Alarms = append(c.Alarms, newer.Alarms...)
			continue
		}
		f.changed[c.ID] = &c
	}
	for id, s := range last {
		if _, ok := f.seen[id]; !ok {
			f.seen[id] = s
		}
	}
}

// wake leaves a wake-up in a channel that holds one.
func wake(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// dueHeap orders members by when they must be judged again.
type dueHeap []*member

func (h dueHeap) Len() int           { return len(h) }
func (h dueHeap) Less(i, j int) bool { return h[i].due.Before(h[j].due) }
func (h dueHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}
func (h *dueHeap) Push(x any) {
	m := x.(*member)
	m.index = len(*h)
	*h = append(*h, m)
}
func (h *dueHeap) Pop() any {
	old := *h
	m := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	m.index = -1
	return m
}
