package gateway

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"sallyport/internal/wire"
)

// errBadLine says that a line of a peers stream breaks a rule. The line is
// dropped and counted; the stream goes on.
var errBadLine = errors.New("bad line")

// linkInfo is what rcps.go knows of a first hop that it connected to.
type linkInfo struct {
	ID      wire.ID
	Role    wire.Role
	Name    string
	Carrier string
	Address string
	Dialled bool
	Since   time.Time
	RTT     func() time.Duration
}

// expect tells the fleet of a first hop that should be connected.
func (f *fleet) expect(id wire.ID, role wire.Role, name, address string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.links[id]
	if l == nil {
		l = &firstHop{id: id, since: time.Now()}
		f.links[id] = l
	}
	l.role, l.name = role, name
	if !l.up {
		l.address = address
	}
}

// unexpect is for a first hop that was removed: what hung on it is gone.
func (f *fleet) unexpect(id wire.ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cut(id, "the rcp was removed")
	for key := range f.pending {
		f.dropPending(id, key)
	}
	delete(f.links, id)
	now := time.Now()
	for _, m := range f.members {
		before := len(m.ways)
		maps.DeleteFunc(m.ways, func(_ string, w *way) bool { return w.link == id })
		if len(m.ways) < before {
			f.departed(m, now)
		}
	}
}

// linkUp says that a verified channel to a first hop exists. For a node that
// dialled us this is all: it has no peers.
func (f *fleet) linkUp(info linkInfo) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	l := f.links[info.ID]
	if l == nil {
		l = &firstHop{id: info.ID}
		f.links[info.ID] = l
	}
	if !l.up {
		l.since = now
	}
	l.role, l.name, l.up, l.lastErr = info.Role, info.Name, true, ""
	l.carrier, l.address, l.dialled, l.rtt, l.draining = info.Carrier, info.Address, info.Dialled, info.RTT, false
	m := f.members[info.ID]
	if m == nil {
		m = f.add(info.ID, info.Role)
		m.name = info.Name
	}
	fresh := len(f.liveWays(m)) == 0
	if info.Role == wire.RoleRCP && m.since.Before(f.started) { // no channel to it is older than the gateway
		m.since = now
	}
	w := f.way(m, info.ID, nil)
	if w == nil {
		return
	}
	w.carrier, w.source, w.since, w.dialled = info.Carrier, info.Address, info.Since, !info.Dialled
	if info.Role == wire.RoleNode && m.known && !fresh && f.onChannel != nil {
		f.onChannel(m.id, "", doubtWay)
	}
	f.arrive(m, w, "", fresh, now)
}

// linkDown says that the last channel to a first hop ended. Its peers keep
// their ways, which count for nothing until it is back.
func (f *fleet) linkDown(id wire.ID, cause string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cut(id, cause)
}

// linkError notes why a first hop cannot be connected.
func (f *fleet) linkError(id wire.ID, cause string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if l := f.links[id]; l != nil && !l.up {
		l.lastErr = clip(cause)
	}
}

func (f *fleet) cut(id wire.ID, cause string) {
	l := f.links[id]
	if l == nil || !l.up {
		return
	}
	now := time.Now()
	l.up, l.since, l.lastErr, l.synced = false, now, clip(cause), false
	for _, m := range f.members {
		touched := false
		for _, w := range m.ways {
			if w.link != id || !w.gone.IsZero() {
				continue
			}
			touched = true
			w.blind = true
			if m.id == id {
				f.leave(m, w, clip(cause), now)
			}
		}
		if touched {
			f.departed(m, now)
		}
	}
	f.scatter(l)
	if l.role == wire.RoleNode {
		delete(f.links, id)
	}
}

// scatter gives what waited for a lost first hop to the next best.
func (f *fleet) scatter(l *firstHop) {
	for c := range choreCount {
		queue := l.queues[c]
		l.queues[c] = nil
		for _, id := range queue {
			if m := f.members[id]; m != nil && m.chores[c] {
				m.chores[c] = false
				f.enqueue(m, c)
			}
		}
	}
}

// hello begins a peers stream. It reports the position to resume from is lost
// when the RCP started anew: what it says from now on is a snapshot.
func (f *fleet) peersHello(id wire.ID, h wire.PeersHello) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.links[id]
	if l == nil {
		return ErrNotConnected
	}
	if h.ID != id {
		return fmt.Errorf("%w: a peers stream of %s names itself %s", errBadLine, id, wire.Quotable(string(h.ID)))
	}
	l.draining = false // an RCP that still drains says so again after the hello
	if !h.Snapshot {
		if h.Epoch != l.epoch || l.pos == 0 {
			return fmt.Errorf("%w: it resumes a stream that we never read", errBadLine)
		}
		l.synced = true
		now := time.Now()
		for _, m := range f.members {
			fresh := len(f.liveWays(m)) == 0
			for _, w := range m.ways {
				if w.link == id && w.blind && w.gone.IsZero() {
					f.arrive(m, w, w.digest, fresh, now)
				}
			}
		}
		return nil
	}
	if l.epoch != h.Epoch && l.epoch != "" {
		// It lost its memory; nodes need a while to find back to it.
		f.settleBehind(id, nil)
	}
	l.epoch, l.pos, l.synced = clip(h.Epoch), 0, false
	for _, m := range f.members {
		for _, w := range m.ways {
			if w.link == id && m.id != id {
				w.stale = true
			}
		}
	}
	for key, by := range f.pending {
		if p, ok := by[id]; ok {
			p.Draining = true // marks it as stale; pending parties do not drain
			f.pending[key][id] = p
		}
	}
	return nil
}

// settleBehind gives everything behind an RCP that came back time to return.
func (f *fleet) settleBehind(link wire.ID, path []wire.ID) {
	until := time.Now().Add(f.t.settle)
	for _, m := range f.members {
		for _, w := range m.ways {
			if w.link == link && len(w.path) >= len(path) && slices.Equal(w.path[:len(path)], path) && m.id != link {
				m.settle = until
			}
		}
	}
}

// resume returns from where a peers stream goes on.
func (f *fleet) resume(id wire.ID) (epoch string, pos int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if l := f.links[id]; l != nil {
		return l.epoch, l.pos
	}
	return "", 0
}

// apply takes over one line of the peers stream of a first hop. An error
// wraps errBadLine: the line was dropped.
func (f *fleet) apply(id wire.ID, line wire.PeersLine) (err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.links[id]
	if l == nil {
		return ErrNotConnected
	}
	switch {
	case line.Peer != nil && line.Peer.Pending != "":
		err = f.pendingPeer(l, *line.Peer)
	case line.Peer != nil:
		err = f.peer(l, *line.Peer)
	case line.Gone != nil && line.Gone.Pending != "":
		f.dropPending(l.id, line.Gone.Pending)
	case line.Gone != nil:
		f.goneLine(l, *line.Gone)
	case line.Synced:
		f.synced(l)
	case line.Draining != nil:
		l.draining = true
	case line.Reign:
		if m := f.members[id]; m != nil {
			f.want(m, wantHello, true)
		}
	}
	if err != nil {
		l.refused++
	}
	if line.Pos > l.pos && l.synced { // a resumed stream must not skip what a broken snapshot did not say
		l.pos = line.Pos
	}
	return err
}

func (f *fleet) peer(l *firstHop, p wire.Peer) error {
	if _, err := wire.ParseID(string(p.ID)); err != nil {
		return fmt.Errorf("%w: peer: %w", errBadLine, err)
	}
	if p.Role != wire.RoleNode && p.Role != wire.RoleRCP {
		return fmt.Errorf("%w: peer %s has role %q", errBadLine, p.ID, wire.Quotable(string(p.Role)))
	}
	if err := checkPath(l.id, p.ID, p.Path); err != nil {
		return err
	}
	m := f.members[p.ID]
	if f.full(l, m, p.Path) {
		return fmt.Errorf("%w: rcp %s reports more parties than the limit", errBadLine, l.name)
	}
	if m == nil {
		m = f.add(p.ID, p.Role)
	}
	if m.role != p.Role {
		return fmt.Errorf("%w: %s %s is reported as %s", errBadLine, m.role, p.ID, p.Role)
	}
	now := time.Now()
	fresh := len(f.liveWays(m)) == 0
	w := f.way(m, l.id, p.Path)
	if w == nil {
		return fmt.Errorf("%w: %s is reported on more than %d ways", errBadLine, p.ID, maxWays)
	}
	p.Since = peerTime(p.Since)
	renewed := fresh || !w.since.Equal(p.Since) // another channel than the one by which something may have failed
	watched := m.role == wire.RoleNode && m.known && f.onChannel != nil
	why := doubtNone
	if watched && renewed {
		why = f.doubts(m, w, &p)
	}
	w.carrier, w.source, w.dialled = carrierOf(p.Carrier), clip(p.Source), p.Dialled
	w.since, w.draining, w.boot, w.generation = p.Since, p.Draining, clip(p.Boot), p.Generation
	w.rtt = time.Duration(min(max(p.RTT, 0), 3600) * float64(time.Second))
	if m.role == wire.RoleRCP && fresh {
		f.settleBehind(l.id, slices.Concat(p.Path, []wire.ID{p.ID}))
	}
	f.arrive(m, w, p.Digest, fresh, now)
	if watched && f.twoBoots(m) {
		why = doubtTwo
	}
	if watched && (renewed || why != doubtNone) {
		f.onChannel(m.id, l.id, why)
	}
	if held := m.held | m.retry; renewed && held != 0 { // the limit on hints still holds
		m.held, m.retry = 0, 0
		f.want(m, held, true)
	}
	f.hint(m, w, p.Digest, p.Hints)
	return nil
}

// full tells whether a first hop may not report m, which is nil for a party that
// nobody has reported, or another way to it. Of a party that is made up each way
// counts, as it takes as much memory as another such party; those with a row are
// as many as the operator let in.
func (f *fleet) full(l *firstHop, m *member, path []wire.ID) bool {
	if m != nil && (m.known || m.ways[wayKey(l.id, path)] != nil) {
		return false
	}
	return l.peers >= maxPeersPerLink || l.unknown >= maxUnknownPerLink
}

// same tells of a node that just came into reach again whether it can be taken
// for what it was: it was proven not long ago, claims nothing new and is owed
// nothing, so that the proof can wait for its turn. An RCP that was started
// again brings back thousands at once, when there is enough to do.
func (f *fleet) same(m *member, digest string, now time.Time) bool {
	return m.role == wire.RoleNode && m.known && m.hello != nil && m.spoken() && m.failures == 0 && m.owed == 0 &&
		now.Sub(m.verified) < f.stretched(f.t.proveMin) && (digest == "" || digest == m.digest)
}

// arrive makes w live, by which digest is claimed of the party. One that just
// came into reach is visited at once unless it is the same: it is not running
// before it said so itself.
func (f *fleet) arrive(m *member, w *way, digest string, fresh bool, now time.Time) {
	w.stale, w.blind, w.gone, w.why = false, false, time.Time{}, ""
	if fresh {
		same := f.same(m, digest, now)
		owed := m.owed
		w.failures, m.failures, m.owed = 0, 0, 0
		switch {
		case m.first: // somebody speaks with it already
			f.want(m, wantNews|owed, true)
		case same:
			m.prove = now.Add(f.t.settle + rand.N(f.stretched(f.t.settle))) // the others come back first
		default:
			m.prove = time.Time{}
			f.want(m, wantHello|wantPush|owed, true)
		}
		if m.role == wire.RoleNode {
			f.want(m, wantActions, false)
		}
	}
	m.left, m.settle = time.Time{}, time.Time{}
	f.judgeNow(m, now)
}

// way finds or makes one way; nil if the party has too many.
func (f *fleet) way(m *member, link wire.ID, path []wire.ID) *way {
	key := wayKey(link, path)
	if w := m.ways[key]; w != nil {
		return w
	}
	same := 0 // of this first hop alone: one that makes ways up must not use up those of others
	for _, w := range m.ways {
		if w.link == link {
			same++
		}
	}
	if same >= maxWays {
		return nil
	}
	w := &way{link: link, path: slices.Clone(path)}
	if m.ways == nil {
		m.ways = make(map[string]*way, 1)
	}
	m.ways[key] = w
	if l := f.links[link]; l != nil {
		l.peers++
		if !m.known {
			l.unknown++
		}
	}
	return w
}

// dropWay takes w out of its link's counts; the caller deletes it.
func (f *fleet) dropWay(m *member, w *way) {
	if l := f.links[w.link]; l != nil {
		l.peers--
		if !m.known {
			l.unknown--
		}
	}
}

// countUnknown corrects the counts when a party becomes known.
func (f *fleet) countUnknown(m *member, n int) {
	for _, w := range m.ways {
		if l := f.links[w.link]; l != nil {
			l.unknown += n
		}
	}
}

func (f *fleet) goneLine(l *firstHop, g wire.Gone) {
	m := f.members[g.ID]
	if m == nil || m.id == l.id {
		return
	}
	w := m.ways[wayKey(l.id, g.Path)]
	if w == nil || !w.gone.IsZero() {
		return
	}
	now := time.Now()
	f.leave(m, w, clip(g.Reason), now)
	f.departed(m, now)
	if m.role == wire.RoleRCP {
		f.behindGone(l, slices.Concat(w.path, []wire.ID{m.id}), now)
	}
}

// behindGone takes what hung on a lost RCP of the path with it.
func (f *fleet) behindGone(l *firstHop, path []wire.ID, now time.Time) {
	for _, m := range f.members {
		touched := false
		for _, w := range m.ways {
			if w.link == l.id && w.gone.IsZero() && len(w.path) >= len(path) && slices.Equal(w.path[:len(path)], path) {
				f.leave(m, w, "", now)
				touched = true
			}
		}
		if touched {
			f.departed(m, now)
		}
	}
}

func (f *fleet) leave(m *member, w *way, why string, now time.Time) {
	w.gone, w.why, w.stale, w.blind = now, why, false, false
	w.outbox, w.asked = false, ""
}

// departed judges a party that lost a way.
func (f *fleet) departed(m *member, now time.Time) {
	if len(f.liveWays(m)) == 0 && m.left.IsZero() {
		m.left = now
	}
	f.judgeNow(m, now)
}

// synced ends a snapshot: what it did not name is gone.
func (f *fleet) synced(l *firstHop) {
	now := time.Now()
	l.synced = true
	for _, m := range f.members {
		// A party that was not seen since we started may have hung on this RCP.
		touched := len(m.ways) == 0 && m.state == wire.StateUnreachable
		if touched {
			m.settle = now.Add(f.t.settle)
		}
		for _, w := range m.ways {
			if w.link == l.id && w.stale {
				w.stale = false
				if w.gone.IsZero() {
					f.leave(m, w, "it is not in the rcp's new list", now)
					touched = true
				}
			}
		}
		if touched {
			f.departed(m, now)
		}
	}
	for key, by := range f.pending {
		if by[l.id].Draining {
			f.dropPending(l.id, key)
		}
	}
}

func (f *fleet) pendingPeer(l *firstHop, p wire.Peer) error {
	if _, err := wire.ParseKeyHash(string(p.Pending)); err != nil {
		return fmt.Errorf("%w: pending peer: %w", errBadLine, err)
	}
	if p.ID != "" || p.Role != "" {
		return fmt.Errorf("%w: a pending peer is named by its key alone", errBadLine)
	}
	if err := checkPath(l.id, "", p.Path); err != nil {
		return err
	}
	by := f.pending[p.Pending]
	_, there := by[l.id]
	if !there && f.waiting[l.id] >= maxPendingPerLink {
		// Strangers can bring an honest RCP here, and the one that comes now may
		// be a node with a code: another gives way, whichever.
		f.dropAnyPending(l.id)
		by = f.pending[p.Pending]
	}
	if by == nil {
		by = make(map[wire.ID]wire.Peer, 1)
		f.pending[p.Pending] = by
	}
	if !there {
		f.waiting[l.id]++
	}
	// A line may hold far more than is read of a party that waits.
	by[l.id] = wire.Peer{Pending: p.Pending, Path: p.Path, Source: clip(p.Source), Carrier: carrierOf(p.Carrier), Dialled: p.Dialled, Since: peerTime(p.Since)}
	if !there {
		select {
		case f.arrived <- p.Pending:
		default: // the sweep over all pending parties finds it
		}
	}
	return nil
}

func (f *fleet) dropAnyPending(link wire.ID) {
	for key, by := range f.pending {
		if _, ok := by[link]; ok {
			f.dropPending(link, key)
			return
		}
	}
}

func (f *fleet) dropPending(link wire.ID, key wire.KeyHash) {
	by := f.pending[key]
	if _, ok := by[link]; !ok {
		return
	}
	delete(by, link)
	if f.waiting[link]--; f.waiting[link] <= 0 {
		delete(f.waiting, link)
	}
	if len(by) == 0 {
		delete(f.pending, key)
	}
}

// checkPath refuses what no honest RCP would say: too long, or with a loop.
func checkPath(link, end wire.ID, path []wire.ID) error {
	if len(path) >= wire.MaxHops {
		return fmt.Errorf("%w: path of %d rcps is above the limit of %d", errBadLine, len(path)+1, wire.MaxHops)
	}
	for i, id := range path {
		if _, err := wire.ParseID(string(id)); err != nil {
			return fmt.Errorf("%w: path: %w", errBadLine, err)
		}
		if id == link || id == end || slices.Contains(path[:i], id) {
			return fmt.Errorf("%w: path with a loop at %s", errBadLine, id)
		}
	}
	if end == link {
		return fmt.Errorf("%w: %s reports itself as its peer", errBadLine, link)
	}
	return nil
}

func carrierOf(s string) string {
	if s == "h2" || s == "h3" {
		return s
	}
	return ""
}
