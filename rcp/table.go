package rcp

import (
	"cmp"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"sallyport/internal/wire"
)

// table is who hangs on this RCP, in the order of the last change.
//
// Every change gets the next position and goes to the end of a log; a reader
// is nothing but a position in it. What changed twice while a reader was slow
// is read once, in its last form, so a reader needs no queue of its own and a
// slow one costs nothing. Parties that left stay as gravestones, for readers
// that still believe in them, until there are more than maxGraves: a reader
// from before that starts again with a snapshot.
type table struct {
	epoch      string // of this start: positions of another one mean nothing
	maxEntries int    // of them, half at most are behind other RCPs, and an eighth behind one
	maxGraves  int

	mu       sync.Mutex
	pos      int64
	floor    int64 // gravestones up to here were taken away
	entries  map[peerKey]*entry
	routes   map[target][]*entry // the same entries, by whom they lead to
	log      []record            // rising; records whose entry moved on are stale
	graves   []record            // the gravestones, oldest first, with stale ones between
	dead     int
	behind   map[wire.ID]int // live entries by the RCP at the head of their path; the sum under ""
	draining *wire.Drain
	reigns   int           // how often a new reign was announced
	changed  chan struct{} // closed and replaced by each change
}

// target is whom a CONNECT names: a party, or a key that waits for a certificate.
type target struct {
	id  wire.ID
	key wire.KeyHash
}

type peerKey struct {
	target
	path string // RCPs between us and the peer, nearest first, comma separated
}

type entry struct {
	key    peerKey
	peer   wire.Peer // its slices are never written to: readers share them
	pos    int64
	gone   bool
	reason string
	goneAt time.Time
}

type record struct {
	pos int64
	e   *entry
}

func (r record) stale() bool { return r.e.pos != r.pos }

var errTableFull = errors.New("the limit of peers is reached")

func newTable(maxEntries, maxGraves int) *table {
	return &table{
		epoch: string(wire.NewID()), maxEntries: maxEntries, maxGraves: maxGraves,
		entries: map[peerKey]*entry{}, routes: map[target][]*entry{}, behind: map[wire.ID]int{}, changed: make(chan struct{}),
	}
}

func keyOf(t target, path []wire.ID) peerKey {
	if len(path) == 0 {
		return peerKey{target: t}
	}
	s := make([]string, len(path))
	for i, id := range path {
		s[i] = string(id)
	}
	return peerKey{target: t, path: strings.Join(s, ",")}
}

// put adds or replaces a peer. It counts as a change even when nothing
// differs: a repeated hint is a new one.
func (t *table) put(p wire.Peer) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	k := keyOf(target{p.ID, p.Pending}, p.Path)
	e := t.entries[k]
	if (e == nil || e.gone) && t.full(p.Path) {
		return errTableFull
	}
	switch {
	case e == nil:
		e = &entry{key: k}
		t.entries[k] = e
		t.routes[k.target] = append(t.routes[k.target], e)
		t.count(p.Path, 1)
	case e.gone:
		t.dead--
		t.count(p.Path, 1)
	}
	e.gone, e.reason, e.peer = false, "", p
	t.touch(e)
	return nil
}

// full tells whether there is no room for another peer: an RCP that makes up
// peers fills its own share, never that of the others or of those who hang on
// us directly.
func (t *table) full(path []wire.ID) bool {
	if len(path) > 0 && (t.behind[""] >= t.maxEntries/2 || t.behind[path[0]] >= max(1, t.maxEntries/8)) {
		return true
	}
	return len(t.entries)-t.dead >= t.maxEntries
}

func (t *table) count(path []wire.ID, n int) {
	if len(path) == 0 {
		return
	}
	t.behind[""] += n
	if t.behind[path[0]] += n; t.behind[path[0]] == 0 {
		delete(t.behind, path[0])
	}
}

// drop turns a peer into a gravestone.
func (t *table) drop(tg target, path []wire.ID, reason string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := t.entries[keyOf(tg, path)]; e != nil && !e.gone {
		t.bury(e, reason)
	}
}

// dropVia drops every peer behind the RCP via that keep does not name; a nil
// keep drops them all.
func (t *table) dropVia(via wire.ID, keep map[peerKey]struct{}, reason string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, e := range t.entries {
		if e.gone || len(e.peer.Path) == 0 || e.peer.Path[0] != via {
			continue
		}
		if _, ok := keep[k]; !ok {
			t.bury(e, reason)
		}
	}
}

func (t *table) bury(e *entry, reason string) {
	e.gone, e.reason, e.goneAt = true, reason, time.Now()
	e.peer = wire.Peer{ID: e.peer.ID, Pending: e.peer.Pending, Role: e.peer.Role, Path: e.peer.Path}
	t.touch(e)
	t.dead++
	t.count(e.peer.Path, -1)
	t.graves = append(t.graves, record{e.pos, e})
	for len(t.graves) > 0 && (t.dead > t.maxGraves || t.graves[0].stale()) {
		r := t.graves[0]
		t.graves = t.graves[1:]
		if !r.stale() {
			t.floor = r.pos
			t.remove(r.e)
		}
	}
	if len(t.graves) > 2*t.dead+1024 {
		t.graves = slices.DeleteFunc(slices.Clone(t.graves), record.stale)
	}
}

func (t *table) remove(e *entry) {
	e.pos = -1 // its record in the log is stale from now on
	t.dead--
	delete(t.entries, e.key)
	rest := slices.DeleteFunc(t.routes[e.key.target], func(o *entry) bool { return o == e })
	if len(rest) == 0 {
		delete(t.routes, e.key.target)
		return
	}
	t.routes[e.key.target] = rest
}

func (t *table) touch(e *entry) {
	t.pos++
	e.pos = t.pos
	t.log = append(t.log, record{e.pos, e})
	if len(t.log) > 2*len(t.entries)+1024 {
		t.log = slices.DeleteFunc(t.log, record.stale)
	}
	t.wake()
}

func (t *table) wake() {
	close(t.changed)
	t.changed = make(chan struct{})
}

// setDraining is told to every reader; nil takes it back.
func (t *table) setDraining(d *wire.Drain) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.draining = d
	t.wake()
}

// route lists the ways to a party, shortest first, those that drain last. Equal
// ones come in random order: a retry may take another. When there is none, gone
// tells about one that there was.
func (t *table) route(tg target) (ways []wire.Peer, gone *entry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range t.routes[tg] {
		if !e.gone {
			ways = append(ways, e.peer)
		} else if gone == nil || e.pos > gone.pos {
			c := *e
			gone = &c
		}
	}
	rand.Shuffle(len(ways), func(i, j int) { ways[i], ways[j] = ways[j], ways[i] })
	slices.SortStableFunc(ways, func(a, b wire.Peer) int {
		if a.Draining != b.Draining {
			if a.Draining {
				return 1
			}
			return -1
		}
		return len(a.Path) - len(b.Path)
	})
	return ways, gone
}

// size counts the peers that are there.
func (t *table) size() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.entries) - t.dead
}

// cursor is a reader's place. The zero cursor has seen nothing.
type cursor struct {
	pos      int64
	until    int64 // catching up to here; then comes the synced line
	synced   bool  // it was sent: until means nothing any more
	snapshot bool  // while catching up: gravestones up to until are not for this reader
	draining *wire.Drain
	reigns   int  // news of them that this reader has
	resumed  bool // the draining line that this reader has is taken back
}

// resume returns a cursor behind pos, or one that starts with a snapshot when
// that place is not known any more.
func (t *table) resume(epoch string, pos int64) cursor {
	t.mu.Lock()
	defer t.mu.Unlock()
	if epoch != t.epoch || pos <= 0 || pos < t.floor || pos > t.pos {
		return t.restart()
	}
	return cursor{pos: pos, until: t.pos, reigns: t.reigns}
}

func (t *table) restart() cursor { return cursor{until: t.pos, snapshot: true, reigns: t.reigns} }

// newReign tells every reader to look at the reigns that we hold. Who comes
// later reads them in the first hello.
func (t *table) newReign() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.reigns++
	t.wake()
}

// read appends at most limit lines that follow the cursor, and moves it. It
// says whether the reader fell too far behind and starts again with a
// snapshot (nothing is appended then). With no lines, more is closed by the
// next change.
func (t *table) read(c *cursor, lines []wire.PeersLine, limit int) (_ []wire.PeersLine, again bool, more <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	known := c.pos
	if c.snapshot {
		known = c.until
	}
	if known < t.floor {
		*c = cursor{until: t.pos, snapshot: true, draining: c.draining, reigns: c.reigns}
		return lines, true, t.changed
	}
	i, _ := slices.BinarySearchFunc(t.log, c.pos+1, func(r record, pos int64) int { return cmp.Compare(r.pos, pos) })
	n := len(lines) + limit
	for ; i < len(t.log) && len(lines) < n; i++ {
		r := t.log[i]
		if !c.synced && r.pos > c.until {
			break
		}
		c.pos = r.pos
		switch {
		case r.stale(), r.e.gone && c.snapshot:
		case r.e.gone:
			lines = append(lines, wire.PeersLine{Pos: r.pos, Gone: &wire.Gone{
				ID: r.e.peer.ID, Pending: r.e.peer.Pending, Path: r.e.peer.Path, Reason: r.e.reason,
			}})
		default:
			p := r.e.peer
			lines = append(lines, wire.PeersLine{Pos: r.pos, Peer: &p})
		}
	}
	if !c.synced && len(lines) < n {
		c.pos = max(c.pos, c.until)
		c.synced, c.snapshot = true, false
		lines = append(lines, wire.PeersLine{Pos: c.pos, Synced: true})
	}
	if c.draining != t.draining && t.draining != nil && len(lines) < n {
		c.draining = t.draining
		lines = append(lines, wire.PeersLine{Draining: t.draining, Pos: c.pos})
	}
	if c.reigns != t.reigns && len(lines) < n {
		c.reigns = t.reigns
		lines = append(lines, wire.PeersLine{Reign: true, Pos: c.pos})
	}
	c.resumed = c.draining != nil && t.draining == nil
	return lines, false, t.changed
}
