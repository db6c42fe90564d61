package store

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"sallyport/gateway/bus"
	"sallyport/internal/wire"
)

func event(seq int64, key string, severity wire.Severity) wire.OutboxUp {
	return wire.OutboxUp{Event: &wire.Event{ID: wire.NewEventID(), Seq: seq, Time: time.Now(), Severity: severity, Key: key, Text: fmt.Sprint("event ", seq)}}
}

func events(t *testing.T, db *DB, f EventFilter) []Event {
	t.Helper()
	f.Limit = 1000
	return must[[]Event](t)(db.Events(ctx, f))
}

func TestOutboxIsStoredOnce(t *testing.T) {
	db := temp(t)
	id := addNode(t, db, "n")
	wakes, cancel := db.bus.Subscribe(bus.Events)
	defer cancel()
	batch := []wire.OutboxUp{event(1, "", "critical"), event(2, "", "normal"), event(3, "", "minor")}
	got := must[Stored](t)(db.StoreOutbox(ctx, id, "s", batch))
	if got != (Stored{Ack: 3, New: 3}) {
		t.Fatalf("%+v", got)
	}
	select {
	case <-wakes:
	default:
		t.Error("nobody was woken")
	}
	if mark := must[int64](t)(db.Watermark(ctx, id, "s")); mark != 3 {
		t.Errorf("watermark %d", mark)
	}
	got = must[Stored](t)(db.StoreOutbox(ctx, id, "s", append(batch, event(4, "", "normal"))))
	if got != (Stored{Ack: 4, New: 1, Duplicates: 3}) {
		t.Errorf("sent again: %+v", got)
	}
	// A new spool after a restored snapshot brings what the old one brought.
	renumbered := *batch[0].Event
	renumbered.Seq = 1
	got = must[Stored](t)(db.StoreOutbox(ctx, id, "s2", []wire.OutboxUp{{Event: &renumbered}}))
	if got != (Stored{Ack: 1, Duplicates: 1}) {
		t.Errorf("in another spool: %+v", got)
	}
	list := events(t, db, EventFilter{})
	if len(list) != 4 || list[0].Seq != 4 || list[0].Spool != "s" || list[0].Node != "n" || list[0].State != "open" || list[0].Count != 1 {
		t.Errorf("%+v", list)
	}
	for i := range list[1:] {
		if list[i].Pos <= list[i+1].Pos {
			t.Errorf("positions do not fall: %d, %d", list[i].Pos, list[i+1].Pos)
		}
	}
}

func TestConflictingEventsAreKept(t *testing.T) {
	db := temp(t)
	a, b := addNode(t, db, "a"), addNode(t, db, "b")
	first := event(1, "", "normal")
	must[Stored](t)(db.StoreOutbox(ctx, a, "s", []wire.OutboxUp{first}))
	other := event(1, "", "critical") // the same place, another event
	for i, want := range []Stored{{Ack: 1, Conflicts: 1}, {Ack: 1, Duplicates: 1}} {
		if got := must[Stored](t)(db.StoreOutbox(ctx, a, "s", []wire.OutboxUp{other})); got != want {
			t.Errorf("same place, time %d: %+v; want %+v", i, got, want)
		}
	}
	if got := must[Stored](t)(db.StoreOutbox(ctx, b, "s", []wire.OutboxUp{first})); got != (Stored{Ack: 1, Conflicts: 1}) {
		t.Errorf("another node's ID: %+v", got)
	}
	var texts, internal int
	for _, e := range events(t, db, EventFilter{}) {
		if e.Application == InternalApplication {
			internal++
			if e.Severity != wire.SeverityMajor || !strings.Contains(e.Text, "stored as event") {
				t.Errorf("%+v", e)
			}
		} else {
			texts++
		}
	}
	if texts != 3 || internal != 2 {
		t.Errorf("%d events and %d internal ones; want 3 and 2", texts, internal)
	}
}

func TestGaps(t *testing.T) {
	db := temp(t)
	id := addNode(t, db, "n")
	gap := func(from, to int64) wire.OutboxUp {
		return wire.OutboxUp{Gap: &wire.Gap{From: from, To: to, Reason: "quota"}}
	}
	got := must[Stored](t)(db.StoreOutbox(ctx, id, "s", []wire.OutboxUp{event(1, "", "normal"), gap(2, 5), event(6, "", "normal"), event(9, "", "normal"), gap(3, 4)}))
	if got != (Stored{Ack: 9, New: 3}) {
		t.Fatalf("%+v", got)
	}
	gaps := must[[]Gap](t)(db.Gaps(ctx, id))
	if len(gaps) != 2 || gaps[1].FromSeq != 2 || gaps[1].ToSeq != 5 || gaps[0].FromSeq != 7 || gaps[0].ToSeq != 8 || gaps[0].Reason != "missing" {
		t.Errorf("%+v", gaps)
	}
	n := 0
	for _, e := range events(t, db, EventFilter{NodeID: id}) {
		if e.Application == InternalApplication && strings.Contains(e.Text, "lost") {
			n++
		}
	}
	if n != 2 {
		t.Errorf("%d internal events tell of 2 gaps", n)
	}
}

func TestBadOutboxIsRefusedWhole(t *testing.T) {
	db := temp(t)
	id := addNode(t, db, "n")
	long := event(2, "", "normal")
	long.Event.Text = strings.Repeat("x", wire.MaxEventText+1)
	badID := event(2, "", "normal")
	badID.Event.ID = "x"
	for name, up := range map[string]wire.OutboxUp{
		"long": long, "id": badID, "seq": event(0, "", "normal"), "severity": event(2, "", "bad"),
		"gap": {Gap: &wire.Gap{From: 5, To: 4}},
	} {
		if _, err := db.StoreOutbox(ctx, id, "s", []wire.OutboxUp{event(1, "", "normal"), up}); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := db.StoreOutbox(ctx, id, "", nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("empty spool name: %v", err)
	}
	if list := events(t, db, EventFilter{}); len(list) != 0 {
		t.Errorf("%d events were stored", len(list))
	}
}

// A node whose clock is no clock still gets its events stored.
func TestEventOfAnImpossibleTimeIsOfNow(t *testing.T) {
	db := temp(t)
	id := addNode(t, db, "n")
	for i, at := range []time.Time{{}, time.Date(9999, 12, 31, 23, 59, 59, 0, time.FixedZone("", -23*3600)), time.Date(1969, 12, 31, 0, 0, 0, 0, time.UTC)} {
		e := event(int64(i+1), "", "normal")
		e.Event.Time = at
		must[Stored](t)(db.StoreOutbox(ctx, id, "s", []wire.OutboxUp{e}))
	}
	list := events(t, db, EventFilter{})
	if len(list) != 3 {
		t.Fatalf("%d events", len(list))
	}
	for _, e := range list {
		if !e.Time.Equal(e.ReceivedAt) {
			t.Errorf("time %v, received %v", e.Time, e.ReceivedAt)
		}
	}
}

func TestEventsWithOneKeyAreOne(t *testing.T) {
	db := temp(t)
	id, other := addNode(t, db, "n"), addNode(t, db, "m")
	store := func(node wire.ID, seq int64, key string, s wire.Severity) {
		t.Helper()
		if got := must[Stored](t)(db.StoreOutbox(ctx, node, "s", []wire.OutboxUp{event(seq, key, s)})); got.New != 1 {
			t.Fatalf("%+v", got)
		}
	}
	store(id, 1, "disk", "warning")
	store(id, 2, "disk", "critical")
	store(id, 3, "", "critical")
	store(id, 4, "", "critical")
	store(other, 1, "disk", "warning")
	list := events(t, db, EventFilter{NodeID: id})
	if len(list) != 3 || list[2].Count != 2 || list[2].Severity != "critical" || list[2].Text != "event 2" || list[2].State != "open" {
		t.Fatalf("%+v", list)
	}
	if all := events(t, db, EventFilter{NodeID: id, Merged: true, Ascending: true}); len(all) != 4 || all[1].MergedInto != list[2].ID {
		t.Errorf("%+v", all)
	}
	store(id, 5, "disk", "normal") // good news closes bad news
	list = events(t, db, EventFilter{NodeID: id, Key: "disk"})
	if len(list) != 2 || list[0].Severity != "normal" || list[0].State != "closed" || list[1].State != "closed" || list[1].ChangedBy == "" || list[1].Count != 2 {
		t.Errorf("%+v", list)
	}
	store(id, 6, "disk", "major") // and a new problem is a new event
	list = events(t, db, EventFilter{NodeID: id, Key: "disk", State: "open"})
	if len(list) != 1 || list[0].Count != 1 || list[0].Seq != 6 {
		t.Errorf("%+v", list)
	}
	if list = events(t, db, EventFilter{NodeID: other}); len(list) != 1 || list[0].State != "open" {
		t.Errorf("another node's event: %+v", list)
	}
}

func TestInternalPairs(t *testing.T) {
	db := temp(t)
	id := addNode(t, db, "n")
	raise := func(s wire.Severity, text string) {
		if err := db.Raise(ctx, Internal{NodeID: id, Severity: s, Object: "node n", Key: "node", Text: text}); err != nil {
			t.Fatal(err)
		}
	}
	raise(wire.SeverityCritical, "down")
	raise(wire.SeverityNormal, "up")
	list := events(t, db, EventFilter{NodeID: id})
	if len(list) != 2 || list[0].Text != "up" || list[1].Text != "down" || list[1].State != "closed" || list[1].Spool != "gateway" {
		t.Fatalf("%+v", list)
	}
}

func TestEventChanges(t *testing.T) {
	db := temp(t)
	id := addNode(t, db, "n")
	up := event(1, "", "major")
	must[Stored](t)(db.StoreOutbox(ctx, id, "s", []wire.OutboxUp{up}))
	eid := up.Event.ID
	update(t, db, func(tx *Tx) error { tx.Annotate(ctx, eid, "seen"); return tx.SetEventState(ctx, eid, eventAcked) })
	found := must[[]Event](t)(db.FindEvents(ctx, string(eid[:8]), 2))
	notes := must[[]Annotation](t)(db.Annotations(ctx, eid))
	if len(found) != 1 || found[0].State != eventAcked || found[0].ChangedBy != "gateway" || len(notes) != 1 || notes[0].Text != "seen" {
		t.Errorf("%+v, %+v", found, notes)
	}
	if bad := must[[]Event](t)(db.FindEvents(ctx, "%", 2)); len(bad) != 0 {
		t.Errorf("%+v", bad)
	}
}

// BenchmarkStoreOutbox measures rows per second as a gateway stores them:
// batches of 1,000 in one transaction, each on disk before it returns.
func BenchmarkStoreOutbox(b *testing.B) {
	for _, key := range []string{"", "key"} {
		b.Run("key="+key, func(b *testing.B) {
			db := temp(b)
			id := addNode(b, db, "n")
			const size = 1000
			seq := int64(0)
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				batch := make([]wire.OutboxUp, size)
				for i := range batch {
					seq++
					batch[i] = event(seq, key, wire.SeverityWarning)
					batch[i].Event.Text = "DISK CRITICAL - free space: / 120 MiB (1% inode=87%)"
				}
				b.StartTimer()
				if _, err := db.StoreOutbox(ctx, id, "s", batch); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.N)*size/b.Elapsed().Seconds(), "rows/s")
		})
	}
}
