package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"sallyport/gateway/bus"
	"sallyport/internal/sqldb"
	"sallyport/internal/wire"
)

// ErrInvalid says that a node sent something that breaks a limit. Nothing of
// its batch was stored.
var ErrInvalid = errors.New("invalid")

// Stored says what became of a batch of an outbox.
type Stored struct {
	Ack        int64 // everything up to it is on disk: acknowledge it
	New        int   // events that were not there before
	Duplicates int   // that were there already
	Conflicts  int   // whose place or ID another event held: stored under a new one
}

// Watermark returns the highest seq of a spool that is on disk, 0 for none.
func (r Queries) Watermark(ctx context.Context, node wire.ID, spool string) (mark int64, err error) {
	err = r.q.NewRaw("SELECT watermark FROM spools WHERE node_id = ? AND spool = ?", node, spool).Scan(ctx, &mark)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, nil
	}
	return mark, err
}

// StoreOutbox stores a batch of a node's spool. An event that is there already
// counts as stored; a hole in the sequence that no gap names becomes one. After
// it returned without an error, Stored.Ack may be acknowledged.
//
// This is the hot path of the gateway: prepared inserts, no reflection, and the
// batches of many nodes share a transaction. What came while one is written
// goes into the next; when that fails, each batch is tried in one of its own,
// so that nobody suffers for what another node sent.
func (db *DB) StoreOutbox(ctx context.Context, node wire.ID, spool string, batch []wire.OutboxUp) (Stored, error) {
	j := &outboxJob{node: node, spool: spool, batch: batch}
	err := db.outbox.Do(ctx, j, sharers, func(group []*sqldb.Job[*outboxJob]) { db.storeGroup(ctx, group) })
	if err != nil { // alone, and with our own context
		err = db.Update(ctx, func(ctx context.Context, tx *Tx) error { return tx.storeOutboxes(ctx, []*outboxJob{j}) })
	}
	if err != nil {
		return Stored{}, fmt.Errorf("store events of node %s: %w", node.Short(), err)
	}
	return j.out, nil
}

// maxGroup bounds the lines of one shared transaction; one batch alone may be
// longer.
const maxGroup = 5000

// outboxJob is one batch.
type outboxJob struct {
	node  wire.ID
	spool string
	batch []wire.OutboxUp
	out   Stored
}

// sharers says which batches can share a transaction. Two of one spool never
// do: the second builds on what the first left.
func sharers() (fits func(*outboxJob) bool) {
	type place struct {
		node  wire.ID
		spool string
	}
	lines, there := 0, map[place]bool{}
	return func(j *outboxJob) bool {
		at := place{j.node, j.spool}
		taken := there[at]
		there[at] = true // and those behind it wait too
		if taken || lines > 0 && lines+len(j.batch) > maxGroup {
			return false
		}
		lines += len(j.batch)
		return true
	}
}

// storeGroup writes a group in one transaction. The one who writes is one of
// them, and the others do not depend on its context.
func (db *DB) storeGroup(ctx context.Context, group []*sqldb.Job[*outboxJob]) {
	jobs := make([]*outboxJob, len(group))
	for i, j := range group {
		jobs[i] = j.Work
	}
	err := db.Update(context.WithoutCancel(ctx), func(ctx context.Context, tx *Tx) error { return tx.storeOutboxes(ctx, jobs) })
	for _, j := range group {
		j.Err = err
	}
}

// maxSpoolName bounds the name that a node gives to a spool.
const maxSpoolName = 128

// storeOutboxes stores batches of different spools.
func (tx *Tx) storeOutboxes(ctx context.Context, jobs []*outboxJob) (err error) {
	w, err := tx.eventWriter()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	lines := int64(0)
	for _, j := range jobs {
		lines += int64(len(j.batch))
	}
	last, err := tx.next(ctx, "pos", 2*lines) // an event, and perhaps a gap before it
	if err != nil {
		return err
	}
	pos := last - 2*lines
	bySpool := make(map[int64]*outboxJob, len(jobs))
	moved := make(map[int64]int64, len(jobs)) // watermarks
	for _, j := range jobs {
		ref, before, err := tx.queue(ctx, w, j, &pos)
		if err != nil {
			return err
		}
		bySpool[ref] = j
		if j.out.Ack != before {
			moved[ref] = j.out.Ack
		}
	}
	taken, err := w.flush(ctx)
	if err != nil {
		return err
	}
	for _, e := range taken {
		j := bySpool[e.SpoolRef]
		if j == nil {
			return fmt.Errorf("event %s is of no spool of this transaction", e.ID)
		}
		j.out.New--
		conflict, err := tx.resolve(ctx, w, e, j.spool)
		switch {
		case err != nil:
			return err
		case conflict:
			j.out.Conflicts++
		default:
			j.out.Duplicates++
		}
	}
	for _, j := range jobs {
		if j.out.New+j.out.Conflicts > 0 {
			tx.Wake(bus.Events)
		}
	}
	for ref, mark := range moved {
		s, err := w.stmt(ctx, "UPDATE spools SET watermark = ? WHERE ref = ?")
		if err != nil {
			return err
		}
		if _, err := s.ExecContext(ctx, mark, ref); err != nil {
			return err
		}
	}
	return nil
}

// queue prepares the events of one batch, from pos+1 on, and fills in its
// Stored as if none of them were there. before is the watermark that was.
func (tx *Tx) queue(ctx context.Context, w *eventWriter, j *outboxJob, pos *int64) (ref, before int64, err error) {
	if j.spool == "" || len(j.spool) > maxSpoolName {
		return 0, 0, fmt.Errorf("%w: spool name %q", ErrInvalid, wire.Quotable(j.spool))
	}
	ref, before, err = tx.spool(ctx, j.node, j.spool)
	if err != nil {
		return 0, 0, err
	}
	mark := before
	j.out = Stored{}
	gap := func(from, to int64, reason string) error {
		*pos++
		return tx.addGap(ctx, Gap{Pos: *pos, NodeID: j.node, Spool: j.spool, FromSeq: from, ToSeq: to, Reason: clip(reason), Time: tx.now})
	}
	for _, up := range j.batch {
		switch {
		case up.Gap != nil:
			g := *up.Gap
			if g.From < 1 || g.To < g.From {
				return 0, 0, fmt.Errorf("%w: gap from %d to %d", ErrInvalid, g.From, g.To)
			}
			if g.To <= mark {
				continue
			}
			if g.From > mark+1 {
				g.From, g.Reason = mark+1, g.Reason+", and missing before it"
			}
			if err := gap(max(g.From, mark+1), g.To, g.Reason); err != nil {
				return 0, 0, err
			}
			mark = g.To
		case up.Event != nil:
			e := up.Event
			if err := validEvent(e); err != nil {
				return 0, 0, fmt.Errorf("%w: event with seq %d: %w", ErrInvalid, e.Seq, err)
			}
			if e.Seq > mark+1 {
				if err := gap(mark+1, e.Seq-1, "missing"); err != nil {
					return 0, 0, err
				}
			}
			*pos++
			at := e.Time
			if y := at.UTC().Year(); y < 1970 || y > 9999 { // a clock that is no clock must not keep the spool for ever
				at = tx.now
			}
			w.add(&Event{Pos: *pos, ID: e.ID, SpoolRef: ref, Seq: e.Seq, NodeID: j.node, Time: at, ReceivedAt: tx.now, Severity: e.Severity,
				Application: e.Application, Object: e.Object, Key: e.Key, Text: e.Text, Instance: e.Instance, State: eventOpen, Count: 1})
			j.out.New++
			mark = max(mark, e.Seq)
		}
	}
	j.out.Ack = mark
	return ref, before, nil
}

func validEvent(e *wire.Event) error {
	if _, err := wire.ParseID(string(e.ID)); err != nil {
		return err
	}
	if e.Seq < 1 {
		return errors.New("seq is not positive")
	}
	return e.Validate()
}

// spool finds or makes the row of a spool.
func (tx *Tx) spool(ctx context.Context, node wire.ID, spool string) (ref, watermark int64, err error) {
	err = tx.q.NewRaw("SELECT ref, watermark FROM spools WHERE node_id = ? AND spool = ?", node, spool).Scan(ctx, &ref, &watermark)
	if !errors.Is(err, sql.ErrNoRows) {
		return ref, watermark, err
	}
	if ref, err = tx.next(ctx, "spool", 1); err != nil {
		return 0, 0, err
	}
	_, err = tx.q.NewRaw("INSERT INTO spools (ref, node_id, spool, watermark, dropped, created_at) VALUES (?, ?, ?, 0, 0, ?)", ref, node, spool, tx.now).Exec(ctx)
	return ref, 0, err
}

// addGap stores a gap once, and says so in an event.
func (tx *Tx) addGap(ctx context.Context, g Gap) error {
	n, err := affected(tx.q.NewInsert().Model(&g).On("CONFLICT (node_id, spool, from_seq, to_seq) DO NOTHING").Exec(ctx))
	if err != nil || n == 0 {
		return err
	}
	tx.Raise(Internal{NodeID: g.NodeID, Severity: wire.SeverityWarning, Object: "spool " + g.Spool,
		Text: fmt.Sprintf("%d events were lost before they reached the gateway (%d to %d of spool %s): %s", g.ToSeq-g.FromSeq+1, g.FromSeq, g.ToSeq, g.Spool, g.Reason)})
	return nil
}

// resolve deals with an event whose ID or place is taken. The same ID of the
// same node is the same event; everything else is stored under a new name, and
// says so.
func (tx *Tx) resolve(ctx context.Context, w *eventWriter, e *Event, spool string) (conflict bool, err error) {
	var owner wire.ID
	err = tx.q.NewRaw("SELECT node_id FROM events WHERE id = ?", e.ID).Scan(ctx, &owner)
	what := fmt.Sprintf("event %s at %d of spool %s", e.ID, e.Seq, spool)
	switch {
	case err == nil && owner == e.NodeID:
		return false, nil
	case err == nil:
		e.ID = wire.NewEventID()
	case !errors.Is(err, sql.ErrNoRows):
		return false, err
	}
	// A spool per conflicting event: its place must be free for good.
	name := spool + "~" + string(e.ID)
	if e.SpoolRef, _, err = tx.spool(ctx, e.NodeID, name); err != nil {
		return false, err
	}
	w.add(e)
	taken, err := w.flush(ctx)
	if err != nil {
		return false, err
	}
	if len(taken) > 0 {
		return false, fmt.Errorf("%s conflicts twice", what)
	}
	tx.Raise(Internal{NodeID: e.NodeID, Severity: wire.SeverityMajor, Object: "spool " + spool,
		Text: what + " claims the place or the name of another event; it was stored as event " + string(e.ID) +
			". Was the node restored from a snapshot, or is it running twice?"})
	return true, nil
}

// storeRaised stores the internal events at positions from pos+1 on.
func (tx *Tx) storeRaised(ctx context.Context, pos int64) (err error) {
	w, err := tx.eventWriter()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	n := int64(len(tx.raised))
	seq, err := tx.next(ctx, "internal", n)
	if err != nil {
		return err
	}
	for i, in := range tx.raised {
		w.add(&Event{Pos: pos + 1 + int64(i), ID: wire.NewEventID(), SpoolRef: internalSpool, Seq: seq - n + 1 + int64(i), NodeID: in.NodeID, Time: tx.now, ReceivedAt: tx.now,
			Severity: in.Severity, Application: InternalApplication, Object: in.Object, Key: in.Key, Text: in.Text, State: eventOpen})
	}
	taken, err := w.flush(ctx)
	if err == nil && len(taken) > 0 {
		err = fmt.Errorf("store internal event: the place of %d is taken", taken[0].Seq)
	}
	tx.Wake(bus.Events)
	return err
}
