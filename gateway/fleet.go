package gateway

import (
	"container/heap"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"golang.org/x/time/rate"

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

// want is a reason to open a session with a party.
type want uint8

const (
	wantHello want = 1 << iota // read and verify the hello
	wantProve                  // prove that it can be reached, preferably by another way
	wantPush                   // we have something for it: desired state, revocations
	wantOutbox
	wantActions
	wantNews // read the hello if the party signals another than the one that we know
)

// chore is one kind of work with parties. Each first hop has a queue of its own
// for each, with a bound on what runs at once: neither a node with a long
// outbox nor an RCP that lets every session hang delays those beside it.
type chore uint8

const (
	choreVisit    chore = iota
	choreStranger       // visits to parties that the database does not know
	choreOutbox
	choreAction
	choreCount
)

var chores = [choreCount]struct {
	name   string
	wants  want
	atOnce int // per first hop
}{
	choreVisit:    {"visit", wantHello | wantProve | wantPush | wantNews, 32},
	choreStranger: {"stranger", wantHello | wantProve | wantNews, 2},
	choreOutbox:   {"outbox", wantOutbox, 64},
	choreAction:   {"action", wantActions, 16},
}

// choreBits says for each chore whether a party is queued or busy in it.
type choreBits [choreCount]bool

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
	log          *slog.Logger
	installation string
	started      time.Time
	onTwoBoots   func(node wire.ID) // hears that RCPs report a node under two boots, under mu; nil: nobody does
	onParked     func(node wire.ID) // hears hints, under mu; nil: nobody does

	mu      sync.Mutex
	members map[wire.ID]*member
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
	Since  time.Time
	Alarms []alarm // oldest first
}

// alarm is what becomes of the event pair "lost" and "back" of a party.
type alarm struct {
	Lost   bool // or back
	State  wire.NodeState
	Reason string
	At     time.Time
}

// maxAlarms bounds the alarms of one party that wait for the database.
const maxAlarms = 16

// seen is when a session with a party last succeeded.
type seen struct {
	At   time.Time
	Role wire.Role
}

func newFleet(t timings, installation string, log *slog.Logger) *fleet {
	f := &fleet{
		t: t, log: log, installation: installation, started: time.Now(),
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
	c.Name, c.Known, c.To, c.Reason, c.Since = m.name, m.known, v.state, v.reason, now
	lost := v.state == wire.StateDown || v.state == wire.StateUnreachable && len(f.liveWays(m)) > 0
	if m.known && (lost && !m.alarmed || up(v.state) && m.alarmed) {
		m.alarmed = !m.alarmed
		c.Alarms = append(c.Alarms, alarm{Lost: m.alarmed, State: v.state, Reason: v.reason, At: now})
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

// want asks for a session with m. What was hinted by an RCP is limited; what
// we want ourselves is not.
func (f *fleet) want(m *member, w want, hinted bool) {
	if m.revoked != "" {
		return
	}
	if hinted {
		if m.limit == nil {
			m.limit = rate.NewLimiter(rate.Every(f.t.hintEvery), f.t.hintBurst)
		}
		if m.held != 0 {
			m.held |= w
			return
		}
		if !m.limit.Allow() {
			m.held, m.heldAt = w, time.Now().Add(f.t.hintEvery)
			if m.due.IsZero() || m.heldAt.Before(m.due) {
				f.setDue(m, m.heldAt)
			}
			return
		}
	}
	for c := range choreCount {
		bits := w & chores[c].wants
		switch {
		case bits == 0, c == choreVisit && !m.known, c == choreStranger && m.known:
			continue
		case (c == choreOutbox || c == choreAction) && !m.known && m.hello == nil:
			continue // made up, until a session says otherwise
		}
		m.wants[c] |= bits
		f.enqueue(m, c)
	}
}

// enqueue puts m into the queue of its best first hop.
func (f *fleet) enqueue(m *member, c chore) {
	live := f.liveWays(m)
	if m.chores[c] || len(live) == 0 {
		return
	}
	m.chores[c] = true
	hop := f.links[live[0].link]
	hop.queues[c] = append(hop.queues[c], m.id)
	wake(f.ready[c])
}

// ask wants something of parties for a reason of our own; those without a way
// are asked when they come.
func (f *fleet) ask(w want, ids ...wire.ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, id := range ids {
		if m := f.members[id]; m != nil {
			f.askLocked(m, w)
		}
	}
}

// askLocked owes it to a party that is out of reach.
func (f *fleet) askLocked(m *member, w want) {
	if len(f.liveWays(m)) > 0 {
		f.want(m, w, false)
	} else {
		m.owed |= w
	}
}

// askAll wants something of every connected party of a role.
func (f *fleet) askAll(w want, roles ...wire.Role) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.members {
		for _, r := range roles {
			if m.role == r {
				f.askLocked(m, w)
			}
		}
	}
}

// task is a party that was taken from a queue.
type task struct {
	id    wire.ID
	role  wire.Role
	name  string
	known bool
	wants want
	hop   *firstHop // whose queue it stood in
}

// take returns a party that waits for a chore; ok is false if there is none now.
// Every task that was taken is given back with done.
func (f *fleet) take(c chore) (t task, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, hop := range f.links { // in random order: fair enough
		for hop.running[c] < chores[c].atOnce && len(hop.queues[c]) > 0 {
			id := hop.queues[c][0]
			hop.queues[c] = hop.queues[c][1:]
			m := f.members[id]
			if m == nil || !m.chores[c] {
				continue
			}
			if m.wants[c]&wantNews != 0 && !m.news() {
				if m.wants[c] &^= wantNews; m.wants[c] == 0 {
					m.chores[c] = false
					continue
				}
			}
			hop.running[c]++
			t = task{id: id, role: m.role, name: m.name, known: m.known, wants: m.wants[c], hop: hop}
			m.wants[c] = 0
			return t, true
		}
	}
	return task{}, false
}

// crowded tells whether others wait for a chore behind the first hop of a task.
func (f *fleet) crowded(c chore, t task) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return t.hop != nil && len(t.hop.queues[c]) > 0
}

// done gives a task back. again is wanted after the delay, beside what was
// asked for in the meantime.
func (f *fleet) done(c chore, t task, again want, delay time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	t.hop.running[c]--
	wake(f.ready[c])
	m := f.members[t.id]
	if m == nil {
		return
	}
	m.chores[c] = false
	if m.wants[c] != 0 {
		f.enqueue(m, c)
	}
	if again != 0 {
		now := time.Now()
		if at := now.Add(delay); m.retry == 0 || at.Before(m.retryAt) {
			m.retryAt = at
		}
		m.retry |= again
		f.judgeNow(m, now)
	}
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
	m.digest, m.skew = hello.Digest(), skew
	hello.Policies = nil // the database has them; a fleet holds many hellos
	m.hello = &hello
	wrong := skew.Abs() > maxSkew
	skewChanged = wrong != m.skewed
	m.skewed = wrong
	if !m.known && m.name == "" {
		m.name = clip(hello.Name)
	}
	f.proven(m, now)
	return skewChanged
}

// news tells whether a party signals another hello than the one that we know,
// on any way to it.
func (m *member) news() bool {
	for _, w := range m.ways {
		if w.gone.IsZero() && w.digest != "" && w.digest != m.digest {
			return true
		}
	}
	return false
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
	m.prove = now.Add(f.t.proveMin + rand.N(f.t.proveMax-f.t.proveMin))
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
		if up(m.state) && now.Sub(m.verified) > f.t.window { // a lost cause costs little
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
