package gateway

import (
	"time"

	"golang.org/x/time/rate"

	"sallyport/internal/wire"
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
	wants  want
	atOnce int // per first hop
}{
	choreVisit:    {wantHello | wantProve | wantPush | wantNews, 128},
	choreStranger: {wantHello | wantProve | wantNews, 2},
	choreOutbox:   {wantOutbox, 64},
	choreAction:   {wantActions, 16},
}

// choreBits says for each chore whether a party is queued or busy in it.
type choreBits [choreCount]bool

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
		f.later(m, again, delay)
	}
}

// later wants something of m after a delay, apart from hints: those are not to
// wait for it.
func (f *fleet) later(m *member, w want, delay time.Duration) {
	now := time.Now()
	if at := now.Add(delay); m.retry == 0 || at.Before(m.retryAt) {
		m.retryAt = at
	}
	m.retry |= w
	f.judgeNow(m, now)
}
