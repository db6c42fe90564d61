package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"sallyport/gateway/bus"
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

// StoreOutbox stores a batch of a node's spool in one transaction. An event
// that is there already counts as stored; a hole in the sequence that no gap
// names becomes one. After it returned without an error, Stored.Ack may be
// acknowledged.
//
// This is the hot path of the gateway: prepared inserts, no reflection.
func (db *DB) StoreOutbox(ctx context.Context, node wire.ID, spool string, batch []wire.OutboxUp) (Stored, error) {
	var out Stored
	err := db.Update(ctx, func(ctx context.Context, tx *Tx) (err error) {
		out, err = tx.storeOutbox(ctx, node, spool, batch)
		return err
	})
	if err != nil {
		return Stored{}, fmt.Errorf("store events of node %s: %w", node.Short(), err)
	}
	return out, nil
}

// maxSpoolName bounds the name that a node gives to a spool.
const maxSpoolName = 128

func (tx *Tx) storeOutbox(ctx context.Context, node wire.ID, spool string, batch []wire.OutboxUp) (out Stored, err error) {
	if spool == "" || len(spool) > maxSpoolName {
		return out, fmt.Errorf("%w: spool name %q", ErrInvalid, wire.Quotable(spool))
	}
	ref, mark, err := tx.spool(ctx, node, spool)
	if err != nil {
		return out, err
	}
	before := mark
	w, err := tx.eventWriter()
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	last, err := tx.next(ctx, "pos", 2*int64(len(batch))) // an event, and perhaps a gap before it
	if err != nil {
		return out, err
	}
	pos := last - 2*int64(len(batch))
	gap := func(from, to int64, reason string) error {
		pos++
		return tx.addGap(ctx, Gap{Pos: pos, NodeID: node, Spool: spool, FromSeq: from, ToSeq: to, Reason: clip(reason), Time: tx.now})
	}
	for _, up := range batch {
		switch {
		case up.Gap != nil:
			g := *up.Gap
			if g.From < 1 || g.To < g.From {
				return out, fmt.Errorf("%w: gap from %d to %d", ErrInvalid, g.From, g.To)
			}
			if g.To <= mark {
				continue
			}
			if g.From > mark+1 {
				g.From, g.Reason = mark+1, g.Reason+", and missing before it"
			}
			if err := gap(max(g.From, mark+1), g.To, g.Reason); err != nil {
				return out, err
			}
			mark = g.To
		case up.Event != nil:
			e := up.Event
			if err := validEvent(e); err != nil {
				return out, fmt.Errorf("%w: event with seq %d: %w", ErrInvalid, e.Seq, err)
			}
			if e.Seq > mark+1 {
				if err := gap(mark+1, e.Seq-1, "missing"); err != nil {
					return out, err
				}
			}
			pos++
			at := e.Time
			if y := at.UTC().Year(); y < 1970 || y > 9999 { // a clock that is no clock must not keep the spool for ever
				at = tx.now
			}
			w.add(&Event{Pos: pos, ID: e.ID, SpoolRef: ref, Seq: e.Seq, NodeID: node, Time: at, ReceivedAt: tx.now, Severity: e.Severity,
				Application: e.Application, Object: e.Object, Key: e.Key, Text: e.Text, Instance: e.Instance, State: eventOpen, Count: 1})
			mark = max(mark, e.Seq)
		}
	}
	taken, err := w.flush(ctx)
	if err != nil {
		return out, err
	}
	out.New = w.added
	for _, e := range taken {
		conflict, err := tx.resolve(ctx, w, e, spool)
		switch {
		case err != nil:
			return out, err
		case conflict:
			out.Conflicts++
		default:
			out.Duplicates++
		}
	}
	out.Ack = mark
	if out.New+out.Conflicts > 0 {
		tx.Wake(bus.Events)
	}
	if mark == before {
		return out, nil
	}
	_, err = tx.q.NewRaw("UPDATE spools SET watermark = ? WHERE ref = ?", mark, ref).Exec(ctx)
	return out, err
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
	res, err := tx.q.NewInsert().Model(&g).On("CONFLICT (node_id, spool, from_seq, to_seq) DO NOTHING").Exec(ctx)
	if err != nil {
		return err
	}
	if n, err := res.RowsAffected(); err != nil || n == 0 {
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
