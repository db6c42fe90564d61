package store

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/internal/wire"
)

// forget calls one of the Forget* until there is no more.
func forget(t *testing.T, f func(context.Context, time.Time, int64) (int64, int64, error), before time.Time) (total int64, calls int) {
	t.Helper()
	for after := int64(0); calls == 0 || after != 0; calls++ {
		n, next, err := f(ctx, before, after)
		if err != nil {
			t.Fatal(err)
		}
		if next != 0 && next <= after {
			t.Fatalf("after %d comes %d", after, next)
		}
		total, after = total+n, next
	}
	return total, calls
}

// TestRetention: what is over and old goes, with all that hangs on it; problems
// that nobody closed, what is young, and what an event's place depends on stay.
func TestRetention(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	db := must[*DB](t)(Open(ctx, Config{Path: filepath.Join(t.TempDir(), "sallyport.db"), Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return now }}))
	t.Cleanup(func() { _ = db.Close() })
	id := addNode(t, db, "n")
	day := func(first int64) (problem, closed wire.OutboxUp) {
		t.Helper()
		problem, closed = event(first, "", "critical"), event(first+1, "", "major")
		batch := []wire.OutboxUp{problem, closed, event(first+2, "disk", "minor"), event(first+3, "disk", "minor"), {Gap: &wire.Gap{From: first + 4, To: first + 5, Reason: "full"}}}
		for n := range int64(2 * maxForgotten) {
			batch = append(batch, event(first+6+n, "", "normal"))
		}
		must[Stored](t)(db.StoreOutbox(ctx, id, "s", batch))
		update(t, db, func(tx *Tx) error {
			tx.Annotate(ctx, closed.Event.ID, "called the vendor")
			tx.Annotate(ctx, problem.Event.ID, "nobody there")
			tx.Audit(ctx, "node.tag", "n", "")
			return tx.SetEventState(ctx, closed.Event.ID, eventClosed)
		})
		return problem, closed
	}
	problem, closed := day(1)
	done := &Action{ID: wire.NewID(), Tenant: DefaultTenant, NodeID: id, NodeName: "n", Command: []string{"x"}}
	waits := &Action{ID: wire.NewID(), Tenant: DefaultTenant, NodeID: id, NodeName: "n", Command: []string{"x"}}
	update(t, db, func(tx *Tx) error {
		done.State = wire.ActionSucceeded
		return errors.Join(tx.AddActions(ctx, []*Action{done, waits}), tx.AddFrames(ctx, done, []wire.ActionFrame{{N: 1, Stream: "stdout", Data: []byte("out")}}))
	})
	done.State = wire.ActionSucceeded
	update(t, db, func(tx *Tx) error { return tx.SaveAction(ctx, done) })
	now = now.Add(100 * 24 * time.Hour)
	before := now.Add(-24 * time.Hour)
	young, _ := day(5000)
	if total, _ := forget(t, db.ForgetEvents, now.Add(-200*24*time.Hour)); total != 0 {
		t.Fatalf("%d events are older than all of them", total)
	}

	// Of the first day: closed, merged, and those of severity normal.
	if total, calls := forget(t, db.ForgetEvents, before); total != 2*maxForgotten+2 || calls < 3 {
		t.Errorf("%d events in %d pieces", total, calls)
	}
	left := map[wire.ID]Event{}
	for _, e := range must[[]Event](t)(db.Events(ctx, EventFilter{Merged: true, Limit: 10 * maxForgotten})) {
		left[e.ID] = e
	}
	if _, is := left[closed.Event.ID]; is || left[problem.Event.ID].Seq != 1 || left[young.Event.ID].Seq != 5000 {
		t.Errorf("closed %v, problem %+v, young %+v", is, left[problem.Event.ID], left[young.Event.ID])
	}
	if notes := must[[]Annotation](t)(db.Annotations(ctx, closed.Event.ID)); len(notes) != 0 {
		t.Errorf("remarks on an event that is gone: %+v", notes)
	}
	if notes := must[[]Annotation](t)(db.Annotations(ctx, problem.Event.ID)); len(notes) != 1 {
		t.Errorf("remarks on a problem: %+v", notes)
	}
	heads := 0
	for _, e := range left { // which both days have come to
		if e.Key == "disk" && e.MergedInto == "" {
			if heads++; e.Count != 4 {
				t.Errorf("a head counts %d", e.Count)
			}
		}
	}
	if heads != 1 {
		t.Errorf("%d heads", heads)
	}
	if mark := must[int64](t)(db.Watermark(ctx, id, "s")); mark != 5000+5+2*maxForgotten {
		t.Errorf("watermark %d", mark)
	}

	if total, _ := forget(t, db.ForgetGaps, before); total != 1 {
		t.Errorf("%d gaps", total)
	}
	if total, _ := forget(t, db.ForgetActions, before); total != 1 {
		t.Errorf("%d actions", total)
	}
	if _, err := db.Action(ctx, done.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("an action that ended: %v", err)
	}
	if a := must[*Action](t)(db.Action(ctx, waits.ID)); !a.Open() {
		t.Errorf("%+v", a)
	}
	if frames := must[[]wire.ActionFrame](t)(db.Frames(ctx, done.ID, 0, 10)); len(frames) != 0 {
		t.Errorf("output of an action that is gone: %+v", frames)
	}
	if total, _ := forget(t, db.ForgetAudit, before); total != 1 {
		t.Errorf("%d entries of the audit log", total)
	}
	if log := must[[]AuditEntry](t)(db.AuditLog(ctx, AuditFilter{Limit: 10})); len(log) != 1 {
		t.Errorf("audit log %+v", log)
	}
	for name, f := range map[string]func(context.Context, time.Time, int64) (int64, int64, error){"events": db.ForgetEvents, "gaps": db.ForgetGaps, "actions": db.ForgetActions, "audit": db.ForgetAudit} {
		if total, _ := forget(t, f, before); total != 0 {
			t.Errorf("%d %s the second time", total, name)
		}
	}
}

// TestRetentionOfRequests: what an operator said of a request is in force while its
// party comes back, and is forgotten when that has stayed away.
func TestRetentionOfRequests(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	db := must[*DB](t)(Open(ctx, Config{Path: filepath.Join(t.TempDir(), "sallyport.db"), Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return now }}))
	t.Cleanup(func() { _ = db.Close() })
	update(t, db, func(tx *Tx) error {
		for _, id := range []string{api.RequestPending, api.RequestDenied, api.RequestDiscarded, "comes back"} {
			q := &Request{ID: id, Role: wire.RoleNode, Name: id, KeyHash: wire.HashSPKI([]byte(id)), CSR: []byte("x"), State: api.RequestPending}
			if err := tx.AddRequest(ctx, q); err != nil {
				return err
			}
			q.DecidedAt = now
			if q.State = id; id == "comes back" {
				q.State = api.RequestDenied
			}
			if err := tx.SaveRequest(ctx, q); err != nil {
				return err
			}
		}
		return nil
	})
	now = now.Add(100 * 24 * time.Hour)
	update(t, db, func(tx *Tx) error { return tx.SawRequest(ctx, "comes back") })
	if total, _ := forget(t, db.ForgetRequests, now.Add(-90*24*time.Hour)); total != 2 {
		t.Errorf("%d were dropped", total)
	}
	for _, id := range []string{api.RequestPending, "comes back"} {
		if _, err := db.Request(ctx, id); err != nil {
			t.Errorf("%s: %v", id, err)
		}
	}
}

// TestWhatIsDroppedIsStillOver: good news that came again after it was looked at
// stays, for what was merged into it is told nowhere else.
func TestWhatIsDroppedIsStillOver(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	db := must[*DB](t)(Open(ctx, Config{Path: filepath.Join(t.TempDir(), "sallyport.db"), Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return now }}))
	t.Cleanup(func() { _ = db.Close() })
	id := addNode(t, db, "n")
	again, old := event(1, "backup", "normal"), event(2, "", "normal")
	must[Stored](t)(db.StoreOutbox(ctx, id, "s", []wire.OutboxUp{again, old}))
	looked := []wire.ID{again.Event.ID, old.Event.ID}
	now = now.Add(100 * 24 * time.Hour)
	must[Stored](t)(db.StoreOutbox(ctx, id, "s", []wire.OutboxUp{event(3, "backup", "normal")})) // which is merged into the first one
	n, err := db.drop(ctx, "events", looked, "annotations", "event_id", "received_at < ?", now.Add(-24*time.Hour))
	if err != nil || n != 1 {
		t.Errorf("%d dropped, %v", n, err)
	}
	left := must[[]Event](t)(db.Events(ctx, EventFilter{Limit: 10}))
	if slices.ContainsFunc(left, func(e Event) bool { return e.ID == old.Event.ID }) || !slices.ContainsFunc(left, func(e Event) bool { return e.ID == again.Event.ID && e.Count == 2 }) {
		t.Errorf("left: %+v", left)
	}
}
