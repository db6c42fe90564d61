package gateway

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/time/rate"

	"sallyport/internal/wire"
)

// timings are the periods that presence lives by. Tests shorten none of them:
// they run in a synctest bubble.
type timings struct {
	// A party that vanished for less than grace was not down: it restarted, or
	// changed to another carrier.
	grace time.Duration
	// After an RCP came back, the nodes behind it get this long to come back
	// to it before they are down: their back-off is jittered on purpose.
	settle time.Duration
	// A node is running only while a session with it succeeded within window.
	window time.Duration
	// Sessions that prove it are opened between proveMin and proveMax after
	// the last one, which leaves room for retries within window.
	proveMin, proveMax time.Duration
	// How many of them a second a fleet may cost: one so large that it would be
	// more is proven less often, and window grows with that.
	proveRate int
	// After a failed session another is tried between retryMin and retryMax
	// later, doubling.
	retryMin, retryMax time.Duration
	// How many sessions the hints of an RCP can cause per node.
	hintEvery time.Duration
	hintBurst int
}

var defaultTimings = timings{
	grace:     10 * time.Second,
	settle:    time.Minute,
	window:    15 * time.Minute,
	proveMin:  9 * time.Minute,
	proveMax:  13 * time.Minute,
	proveRate: 25,
	retryMin:  time.Second,
	retryMax:  time.Minute,
	hintEvery: 2 * time.Second,
	hintBurst: 8,
}

// stretched is a period of the timings of proofs in a fleet of this size. It
// never becomes shorter again: proofs that are planned must come within window.
func (f *fleet) stretched(d time.Duration) time.Duration {
	share := float64(f.most) / (float64(f.t.proveRate) * ((f.t.proveMin + f.t.proveMax) / 2).Seconds())
	return time.Duration(float64(d) * max(1, share))
}

// way is one way to a party: the link of a first hop, and the RCPs behind it.
// Whatever it says was reported by that first hop.
type way struct {
	link wire.ID   // the RCP, or the node itself, that we hold a link to
	path []wire.ID // RCPs between the first hop and the party, nearest first

	carrier  string
	source   string
	dialled  bool // the last hop dialled the party
	since    time.Time
	rtt      time.Duration
	draining bool
	digest   string // claimed digest of the hello
	outbox   bool   // hint
	boot     string // claimed
	// generation is claimed too: the number of the channel among those of one boot.
	generation int64

	asked string    // the claimed digest that last made us read the hello
	stale bool      // not yet seen in the snapshot that is being read
	blind bool      // the link was cut, and nothing was said about it since
	gone  time.Time // when it was reported to have left; zero while there
	why   string    // the reported reason

	failures int // sessions in a row that could not be opened this way
}

// wayKey tells the ways of one party apart.
func wayKey(link wire.ID, path []wire.ID) string {
	var b strings.Builder
	b.Grow((len(path) + 1) * 37)
	b.WriteString(string(link))
	for _, id := range path {
		b.WriteByte('/')
		b.WriteString(string(id))
	}
	return b.String()
}

// member is a node or an RCP: what the fleet knows of it.
type member struct {
	id      wire.ID
	role    wire.Role
	name    string
	known   bool   // it has a row in the database
	revoked string // why, when it is

	quarantine string // likewise

	state  wire.NodeState
	reason string
	since  time.Time
	// alarmed: an event said that it is lost; the next good state closes it.
	alarmed bool

	ways   map[string]*way
	left   time.Time // when the last way went; zero while there is one
	settle time.Time // no verdict before

	verified time.Time   // end of the last session that succeeded
	hello    *wire.Hello // what it said in it
	digest   string
	skewed   bool
	notice   string  // something an operator must know although the state is good
	failures int     // sessions in a row that failed, by any way
	lastLink wire.ID // by which the last session was opened
	lastErr  string

	prove  time.Time // when the next session is due
	limit  *rate.Limiter
	held   want // wants that wait for the limiter
	heldAt time.Time

	// What failed waits apart from hints: those are not to wait for it.
	retry   want
	retryAt time.Time

	owed   want // since it is out of reach
	wants  [choreCount]want
	chores choreBits // queued or busy, per chore
	first  bool      // busy in the session in which it was enrolled

	due   time.Time // when to judge again; zero for never
	index int       // in the heap of due times, -1 if not there
}

// up reports whether state means that the gateway can talk to the party.
func up(s wire.NodeState) bool {
	switch s {
	case wire.StatePending, wire.StateDown, wire.StateUnreachable, wire.StateRevoked:
		return false
	}
	return true
}

// spoken tells whether a session has succeeded since m was last out of reach.
func (m *member) spoken() bool { return up(m.state) || !m.verified.Before(m.since) }

// verdict is what judge finds.
type verdict struct {
	state  wire.NodeState
	reason string
	next   time.Time // judge again then at the latest; zero: when something happens
}

// judge decides the state of m from what is known at now. It changes nothing.
func (f *fleet) judge(m *member, now time.Time) verdict {
	if m.revoked != "" {
		return verdict{state: wire.StateRevoked, reason: m.revoked}
	}
	live := f.liveWays(m)
	if len(live) > 0 {
		return f.judgeLive(m, live, now)
	}
	if m.state == wire.StateDown || m.state == wire.StatePending || m.state == wire.StateRevoked {
		// Nothing is known to hold it; that an RCP is cut off too adds nothing.
		return verdict{state: keepAbsent(m.state), reason: m.reason}
	}
	end := m.left.Add(f.t.grace)
	if m.settle.After(end) {
		end = m.settle
	}
	cut, why := f.cutOff(m)
	if now.Before(end) {
		if m.state != wire.StateUnreachable || !cut { // its RCP is back, so that it is on its way
			why = "reconnecting: " + why
		}
		return verdict{state: m.state, reason: why, next: end}
	}
	if cut {
		return verdict{state: wire.StateUnreachable, reason: why}
	}
	return verdict{state: wire.StateDown, reason: why}
}

// keepAbsent is the state of a party that was absent and still is; a
// revocation that was lifted (the party enrolled again) leaves it pending.
func keepAbsent(s wire.NodeState) wire.NodeState {
	if s == wire.StateRevoked {
		return wire.StatePending
	}
	return s
}

// judgeLive is judge for a party that some first hop reports.
func (f *fleet) judgeLive(m *member, live []*way, now time.Time) verdict {
	until := m.verified.Add(f.stretched(f.t.window))
	proven := now.Before(until) && m.spoken()
	if m.role == wire.RoleRCP && slices.ContainsFunc(live, func(w *way) bool { return w.link == m.id }) {
		proven, until = true, time.Time{} // the channel itself is verified
	}
	if proven {
		v := f.judgeHello(m)
		v.next = until
		return v
	}
	claim := fmt.Sprintf("%s reports it connected", f.hopName(live[0]))
	if m.lastErr != "" && m.failures > 0 {
		claim += ", but no session succeeds: " + m.lastErr
	} else {
		claim += "; a session has yet to prove it"
	}
	if up(m.state) {
		if m.verified.IsZero() { // just loaded: what the database says holds until the window is over
			until = f.started.Add(f.stretched(f.t.window))
			if now.Before(until) {
				return verdict{state: m.state, reason: m.reason, next: until}
			}
		}
		return verdict{state: wire.StateUnreachable, reason: claim}
	}
	return verdict{state: m.state, reason: claim}
}

// judgeHello gives the state that the last verified hello means.
func (f *fleet) judgeHello(m *member) verdict {
	h := m.hello
	if m.quarantine != "" {
		return verdict{state: wire.StateQuarantined, reason: m.quarantine}
	}
	if h == nil {
		return verdict{state: wire.StateRunning, reason: m.notice}
	}
	if _, ok := h.Versions.Common(wire.OwnVersions); !ok {
		return verdict{state: wire.StateUpgrade, reason: fmt.Sprintf("program %s speaks protocol %d to %d, this gateway %d to %d: upgrade the older one",
			wire.Quotable(h.Program), h.Versions.Min, h.Versions.Max, wire.ProtocolMin, wire.ProtocolMax)}
	}
	if !m.known {
		return verdict{state: wire.StateLocked, reason: "unknown: it has a valid certificate, but this database does not know it; restore the database, or enrol it again"}
	}
	if h.Installation != "" && f.installation != "" && h.Installation != f.installation {
		return verdict{state: wire.StateLocked, reason: fmt.Sprintf("it obeys installation %s, this is %s: unlock it, or restore the database",
			wire.Quotable(h.Installation), f.installation)}
	}
	switch h.State {
	case wire.StateFailing, wire.StateReadonly, wire.StateLocked, wire.StateDraining, wire.StateQuarantined:
		return verdict{state: h.State, reason: clip(h.Reason)}
	}
	if m.notice != "" {
		return verdict{state: wire.StateRunning, reason: m.notice}
	}
	return verdict{state: wire.StateRunning}
}

// cutOff tells whether some RCP that could hold the absent m is itself cut
// off, and explains the absence.
func (f *fleet) cutOff(m *member) (cut bool, why string) {
	if len(m.ways) == 0 { // any RCP could hold it
		unseen := "not seen since the gateway started"
		if !m.verified.Before(f.started) {
			unseen = "the rcp that held it was removed or replaced"
		}
		if l := f.links[m.id]; l != nil && m.role == wire.RoleRCP { // but for one that we dial, or that dials us: nothing holds that
			return false, "no channel to it since the gateway started"
		}
		for _, l := range f.links {
			if !l.up && l.role == wire.RoleRCP {
				return true, fmt.Sprintf("%s, and rcp %s is cut off", unseen, l.name)
			}
		}
		return false, unseen + ", and no rcp reports it"
	}
	var last *way
	for _, w := range m.ways {
		if hop := f.brokenHop(m, w); hop != "" {
			return true, hop + " is cut off"
		}
		if last == nil || w.gone.After(last.gone) {
			last = w
		}
	}
	why = f.hopName(last) + " reports its channel gone"
	if last.link == m.id {
		why = "its channel to the gateway ended"
		if m.role == wire.RoleRCP {
			why = "the channel to it ended"
		}
	}
	if last.why != "" {
		why += ": " + last.why
	}
	return false, why
}

// brokenHop names the first RCP on w that is not connected; empty if all are.
func (f *fleet) brokenHop(m *member, w *way) string {
	l := f.links[w.link]
	if l == nil || !l.up || w.blind {
		if w.link == m.id {
			return ""
		}
		return "rcp " + f.nameOf(w.link)
	}
	for i, id := range w.path {
		hop := f.members[id]
		if hop == nil {
			return "rcp " + id.Short()
		}
		hw := hop.ways[wayKey(w.link, w.path[:i])]
		if hw == nil || !hw.gone.IsZero() {
			return "rcp " + f.nameOf(id)
		}
	}
	return ""
}

// liveWays returns the ways that a connected first hop reports, best first:
// not draining, not failing, direct, short, quick.
func (f *fleet) liveWays(m *member) []*way {
	var live []*way
	for _, w := range m.ways {
		if l := f.links[w.link]; l != nil && l.up && !w.blind && w.gone.IsZero() {
			live = append(live, w)
		}
	}
	slices.SortFunc(live, func(a, b *way) int {
		return compareWays(f, a, b)
	})
	return live
}

func compareWays(f *fleet, a, b *way) int {
	rank := func(w *way) (n int) {
		if w.failures > 0 {
			n += 100 * min(w.failures, 10)
		}
		if w.draining || f.links[w.link].draining {
			n += 50
		}
		return n + len(w.path)
	}
	if d := rank(a) - rank(b); d != 0 {
		return d
	}
	if a.rtt != b.rtt && a.rtt > 0 && b.rtt > 0 {
		return int(max(min(a.rtt-b.rtt, 1), -1))
	}
	return strings.Compare(wayKey(a.link, a.path), wayKey(b.link, b.path))
}

// hopName names the party that reports w.
func (f *fleet) hopName(w *way) string {
	if l := f.links[w.link]; l != nil && l.role == wire.RoleNode {
		return "its own channel"
	}
	return "rcp " + f.nameOf(w.link)
}

// nameOf returns the operator's name of a party, or the beginning of its ID.
func (f *fleet) nameOf(id wire.ID) string {
	if l := f.links[id]; l != nil && l.name != "" {
		return l.name
	}
	if m := f.members[id]; m != nil && m.name != "" {
		return m.name
	}
	return id.Short()
}

// peerTime is a time that a peer says; zero where its year in UTC has not four
// digits. JSON takes such a time from another time zone, and cannot write it: one
// line of an RCP would make the whole list of nodes unreadable.
func peerTime(t time.Time) time.Time {
	t = t.UTC()
	if y := t.Year(); y < 1 || y > 9999 {
		return time.Time{}
	}
	return t
}

// clip bounds text of a peer that is kept.
func clip(s string) string {
	const limit = 256
	if len(s) > limit {
		return s[:limit] + "…"
	}
	return s
}
