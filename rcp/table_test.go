package rcp

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/wire"
)

// view is what a reader of peers lines believes. It follows the rules of
// wire.PeersLine and nothing else, so that it does not inherit a mistake of
// the table's.
type view struct {
	reigns int
	epoch  string
	pos    int64
	peers  map[peerKey]wire.Peer
	synced bool
	drain  *wire.Drain
	snaps  int
}

func (v *view) apply(l wire.PeersLine) {
	if l.Reign {
		v.reigns++
	}
	switch {
	case l.Hello != nil:
		v.epoch, v.synced, v.drain = l.Hello.Epoch, false, nil
		if l.Hello.Snapshot {
			v.peers, v.pos = map[peerKey]wire.Peer{}, 0
			v.snaps++
		}
	case l.Peer != nil:
		v.peers[keyOf(target{l.Peer.ID, l.Peer.Pending}, l.Peer.Path)] = *l.Peer
	case l.Gone != nil:
		delete(v.peers, keyOf(target{l.Gone.ID, l.Gone.Pending}, l.Gone.Path))
	case l.Synced:
		v.synced = true
	case l.Draining != nil:
		v.drain = l.Draining
	}
	if l.Pos > 0 {
		v.pos = l.Pos
	}
}

// truth is the table's content, read under its lock.
func (t *table) truth() map[peerKey]wire.Peer {
	t.mu.Lock()
	defer t.mu.Unlock()
	m := map[peerKey]wire.Peer{}
	for k, e := range t.entries {
		if !e.gone {
			m[k] = e.peer
		}
	}
	return m
}

func samePeers(t testing.TB, got, want map[peerKey]wire.Peer) {
	t.Helper()
	for k, w := range want {
		if g, ok := got[k]; !ok || g.Generation != w.Generation || g.Digest != w.Digest {
			t.Fatalf("peer %v: the reader has %+v (%v), the table %+v", k, g, ok, w)
		}
	}
	for k := range got {
		if _, ok := want[k]; !ok {
			t.Fatalf("the reader still believes in %v", k)
		}
	}
}

// churn makes random changes: joins, changes, leaves, whole RCPs lost.
type churn struct {
	rng  *rand.Rand
	ids  []wire.ID
	rcps []wire.ID
	n    int64
}

func newChurn(seed uint64) *churn {
	c := &churn{rng: rand.New(rand.NewPCG(seed, 1))}
	for range 20 {
		c.ids = append(c.ids, wire.NewID())
	}
	c.rcps = []wire.ID{wire.NewID(), wire.NewID()}
	return c
}

func (c *churn) step(t *table) {
	c.n++
	tg := target{id: c.ids[c.rng.IntN(len(c.ids))]}
	role := wire.RoleNode
	if c.rng.IntN(5) == 0 {
		tg, role = target{key: wire.HashSPKI([]byte{byte(c.rng.IntN(5))})}, ""
	}
	var path []wire.ID
	if c.rng.IntN(3) == 0 {
		path = []wire.ID{c.rcps[c.rng.IntN(2)]}
	}
	switch c.rng.IntN(20) {
	case 0:
		t.dropVia(c.rcps[c.rng.IntN(2)], nil, "test")
	case 1, 2, 3, 4, 5, 6, 7:
		t.drop(tg, path, "test")
	default:
		if err := t.put(wire.Peer{Role: role, ID: tg.id, Pending: tg.key, Path: path, Generation: c.n}); err != nil {
			panic(err)
		}
	}
}

// TestReadersEndInTheSameView: whatever happens in whatever order, a reader
// that reads a little now and then, loses its stream and resumes, believes in
// the end what the table holds.
func TestReadersEndInTheSameView(t *testing.T) {
	for seed := range uint64(300) {
		checkReaders(t, seed, 5+int(seed%60))
	}
}

func FuzzReadersEndInTheSameView(f *testing.F) {
	f.Add(uint64(1), 3)
	f.Add(uint64(2), 1000)
	f.Fuzz(func(t *testing.T, seed uint64, graves int) {
		checkReaders(t, seed, 1+max(0, graves)%2000)
	})
}

func checkReaders(t *testing.T, seed uint64, graves int) {
	c := newChurn(seed)
	tab := newTable(1000, graves)
	type reader struct {
		view
		cur  cursor
		open bool
	}
	readers := make([]reader, 3)
	read := func(r *reader, limit int) int {
		if !r.open {
			r.cur, r.open = tab.resume(r.epoch, r.pos), true
			r.apply(wire.PeersLine{Hello: &wire.PeersHello{Epoch: tab.epoch, Snapshot: r.cur.snapshot}})
		}
		lines, again, _ := tab.read(&r.cur, nil, limit)
		if again {
			r.apply(wire.PeersLine{Hello: &wire.PeersHello{Epoch: tab.epoch, Snapshot: true}})
			return 1
		}
		last := r.pos
		for i, l := range lines {
			if l.Pos < last && !(r.cur.snapshot || i == 0) {
				t.Fatalf("seed %d: position fell from %d to %d", seed, last, l.Pos)
			}
			r.apply(l)
			last = l.Pos
		}
		return len(lines)
	}
	for range 600 {
		c.step(tab)
		r := &readers[c.rng.IntN(len(readers))]
		switch c.rng.IntN(8) {
		case 0:
			r.open = false // the stream broke; everything that was read counts
		case 1, 2, 3:
			read(r, 1+c.rng.IntN(6))
		}
	}
	want := tab.truth()
	for i := range readers {
		for read(&readers[i], 1+c.rng.IntN(9)) > 0 {
		}
		if !readers[i].synced {
			t.Fatalf("seed %d: reader %d was never told that it is up to date", seed, i)
		}
		samePeers(t, readers[i].peers, want)
	}
	if got := len(tab.log); got > 2*len(tab.entries)+1025 {
		t.Fatalf("seed %d: log of %d records for %d entries", seed, got, len(tab.entries))
	}
	if tab.dead > graves {
		t.Fatalf("seed %d: %d gravestones, limit %d", seed, tab.dead, graves)
	}
}

func TestTableStaysSmallUnderFlapping(t *testing.T) {
	tab := newTable(10, 4)
	id := wire.NewID()
	for range 20_000 {
		if err := tab.put(wire.Peer{Role: wire.RoleNode, ID: id}); err != nil {
			t.Fatal(err)
		}
		tab.drop(target{id: id}, nil, "flap")
	}
	if len(tab.entries) > 5 || len(tab.log) > 1100 || len(tab.graves) > 1100 {
		t.Errorf("%d entries, %d log records, %d graves", len(tab.entries), len(tab.log), len(tab.graves))
	}
}

func TestTableRefusesAboveItsLimit(t *testing.T) {
	tab := newTable(2, 4)
	a, b, c := wire.NewID(), wire.NewID(), wire.NewID()
	for _, id := range []wire.ID{a, b} {
		if err := tab.put(wire.Peer{Role: wire.RoleNode, ID: id}); err != nil {
			t.Fatal(err)
		}
	}
	if err := tab.put(wire.Peer{Role: wire.RoleNode, ID: c}); !errors.Is(err, errTableFull) {
		t.Fatalf("third: %v", err)
	}
	if err := tab.put(wire.Peer{Role: wire.RoleNode, ID: a, Digest: "x"}); err != nil {
		t.Fatalf("a change of one that is there: %v", err)
	}
	tab.drop(target{id: b}, nil, "left")
	if err := tab.put(wire.Peer{Role: wire.RoleNode, ID: c}); err != nil {
		t.Fatalf("after one left: %v", err)
	}
}

func TestOneRCPFillsOnlyItsShare(t *testing.T) {
	tab := newTable(80, 100)
	liar, honest := wire.NewID(), wire.NewID()
	fill := func(path ...wire.ID) (n int) {
		for tab.put(wire.Peer{Role: wire.RoleNode, ID: wire.NewID(), Path: path}) == nil {
			n++
		}
		return n
	}
	if n := fill(liar); n != 10 {
		t.Errorf("one RCP got %d of 80 places, want an eighth", n)
	}
	if n := fill(honest, liar); n != 10 {
		t.Errorf("another RCP got %d places", n)
	}
	for range 10 {
		fill(wire.NewID())
	}
	if n := fill(); n != 40 {
		t.Errorf("%d places were left for those who hang on us, want half", n)
	}
	tab.dropVia(liar, nil, "cut")
	if n := fill(liar); n != 10 {
		t.Errorf("after it left, %d places", n)
	}
}

func TestRoutes(t *testing.T) {
	tab := newTable(100, 4)
	id, r1, r2 := wire.NewID(), wire.NewID(), wire.NewID()
	put := func(p wire.Peer) {
		p.Role, p.ID = wire.RoleNode, id
		if err := tab.put(p); err != nil {
			t.Fatal(err)
		}
	}
	if ways, gone := tab.route(target{id: id}); ways != nil || gone != nil {
		t.Fatal("a party that was never here has a way or a grave")
	}
	put(wire.Peer{Path: []wire.ID{r1, r2}})
	put(wire.Peer{Path: []wire.ID{r2}, Draining: true})
	put(wire.Peer{Path: []wire.ID{r1}})
	ways, _ := tab.route(target{id: id})
	if len(ways) != 3 || len(ways[0].Path) != 1 || ways[0].Draining || len(ways[1].Path) != 2 || !ways[2].Draining {
		t.Fatalf("ways %+v: want the short one, the long one, the draining one", ways)
	}
	tab.dropVia(r1, nil, "cut")
	tab.dropVia(r2, nil, "cut too")
	if ways, gone := tab.route(target{id: id}); len(ways) != 0 || gone == nil || gone.reason != "cut too" {
		t.Fatalf("after all left: %v, %+v", ways, gone)
	}
}

// streamOf runs the real handler and returns its lines.
func streamOf(t *testing.T, tab *table, query string) (*wire.LineReader, func()) {
	t.Helper()
	pr, pw := io.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		r := httptest.NewRequestWithContext(ctx, http.MethodGet, wire.PathPeers+query, nil)
		_ = tab.servePeers(&pipeWriter{w: pw, h: http.Header{}}, r, wire.PeersHello{ID: "rcp", Program: "test"})
		_ = pw.Close()
	}()
	return wire.NewLineReader(pr, wire.MaxPeersLine), func() {
		cancel()
		_ = pr.Close()
		<-done
	}
}

type pipeWriter struct {
	w io.Writer
	h http.Header
}

func (p *pipeWriter) Header() http.Header         { return p.h }
func (p *pipeWriter) Write(b []byte) (int, error) { return p.w.Write(b) }
func (p *pipeWriter) WriteHeader(int)             {}
func (p *pipeWriter) FlushError() error           { return nil }

func TestPeersStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tab := newTable(100, 10)
		ids := make([]wire.ID, 3)
		for i := range ids {
			ids[i] = wire.NewID()
			if err := tab.put(wire.Peer{Role: wire.RoleNode, ID: ids[i], Since: time.Now()}); err != nil {
				t.Fatal(err)
			}
		}
		lines, stop := streamOf(t, tab, "")
		var v view
		next := func() wire.PeersLine {
			t.Helper()
			var l wire.PeersLine
			if err := lines.Next(&l); err != nil {
				t.Fatal(err)
			}
			v.apply(l)
			return l
		}
		if l := next(); l.Hello == nil || !l.Hello.Snapshot || l.Hello.Epoch != tab.epoch {
			t.Fatalf("first line %+v: want a hello with a snapshot", l)
		}
		for !v.synced {
			next()
		}
		if !slices.Equal(slices.Sorted(maps.Keys(idsOf(v.peers))), slices.Sorted(slices.Values(ids))) {
			t.Fatalf("snapshot holds %v", v.peers)
		}

		// Many changes of one peer within one interval arrive as one line.
		synctest.Wait()
		before := time.Now()
		for i := range 50 {
			_ = tab.put(wire.Peer{Role: wire.RoleNode, ID: ids[0], Generation: int64(i)})
		}
		if l := next(); l.Peer == nil || l.Peer.Generation != 49 {
			t.Fatalf("after a burst: %+v, want its last state at once", l)
		}
		if time.Since(before) > 2*coalesce {
			t.Errorf("a change took %s", time.Since(before))
		}

		// Silence is filled.
		before = time.Now()
		if l := next(); l.Peer != nil || l.Gone != nil || l.Pos != v.pos || time.Since(before) > keepAlive+coalesce {
			t.Fatalf("%+v after %s: want a keep-alive", l, time.Since(before))
		}

		// A broken stream goes on where it was, also about those who left.
		stop()
		tab.drop(target{id: ids[1]}, nil, "left")
		lines, stop = streamOf(t, tab, "?epoch="+v.epoch+"&pos="+itoa(v.pos))
		if l := next(); l.Hello == nil || l.Hello.Snapshot {
			t.Fatalf("resumed with %+v: want a hello without a snapshot", l)
		}
		if l := next(); l.Gone == nil || l.Gone.ID != ids[1] || l.Gone.Reason != "left" {
			t.Fatalf("resumed, then %+v: want the one that left", l)
		}
		for !v.synced {
			next()
		}
		samePeers(t, v.peers, tab.truth())

		// Draining is told, and taken back by ending the stream.
		tab.setDraining(&wire.Drain{Deadline: time.Minute})
		if l := next(); l.Draining == nil {
			t.Fatalf("%+v: want the draining line", l)
		}
		tab.setDraining(nil)
		var l wire.PeersLine
		if err := lines.Next(&l); !errors.Is(err, io.EOF) {
			t.Fatalf("after the draining ended: %+v, %v, want the end of the stream", l, err)
		}
		stop()

		// Another epoch, a future position and garbage get a snapshot or a refusal.
		for _, q := range []string{"?epoch=other&pos=1", "?epoch=" + tab.epoch + "&pos=999999", "?epoch=" + tab.epoch + "&pos=-5"} {
			lines, stop = streamOf(t, tab, q)
			if l := next(); l.Hello == nil || !l.Hello.Snapshot {
				t.Errorf("%s: %+v, want a snapshot", q, l)
			}
			stop()
		}
		rec := httptest.NewRecorder()
		if err := tab.servePeers(rec, httptest.NewRequest(http.MethodGet, "/v1/peers?pos=x", nil), wire.PeersHello{}); err == nil || rec.Code != http.StatusBadRequest {
			t.Errorf("pos=x: %d, %v", rec.Code, err)
		}
	})
}

func TestSlowReaderHoldsUpNobodyAndCatchesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tab := newTable(5000, 50)
		slow, stopSlow := streamOf(t, tab, "") // its pipe blocks until somebody reads
		defer stopSlow()
		fast, stopFast := streamOf(t, tab, "")
		defer stopFast()
		var v view
		go func() {
			for {
				var l wire.PeersLine
				if fast.Next(&l) != nil {
					return
				}
				v.apply(l)
			}
		}()
		c := newChurn(7)
		for range 5000 {
			c.step(tab)
			if c.n%100 == 0 {
				time.Sleep(coalesce)
			}
		}
		time.Sleep(5 * coalesce)
		synctest.Wait()
		samePeers(t, v.peers, tab.truth())

		var s view
		s.peers = map[peerKey]wire.Peer{}
		n := 0
		for ; s.pos < tab.pos; n++ {
			var l wire.PeersLine
			if err := slow.Next(&l); err != nil {
				t.Fatal(err)
			}
			s.apply(l)
		}
		for !s.synced {
			var l wire.PeersLine
			if err := slow.Next(&l); err != nil {
				t.Fatal(err)
			}
			s.apply(l)
		}
		samePeers(t, s.peers, tab.truth())
		if n > 400 {
			t.Errorf("the slow reader got %d lines for 5,000 changes of some 60 peers", n)
		}
		if s.snaps < 2 {
			t.Errorf("%d snapshots: its gravestones were gone, so it needed another", s.snaps)
		}
	})
}

func idsOf(m map[peerKey]wire.Peer) map[wire.ID]bool {
	out := map[wire.ID]bool{}
	for k := range m {
		out[k.id] = true
	}
	return out
}

func itoa(n int64) string {
	b, _ := wire.AppendLine(nil, n)
	return string(bytes.TrimSpace(b))
}
