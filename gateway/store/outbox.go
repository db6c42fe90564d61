package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/uptrace/bun"

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
	w, err := tx.eventWriter(ctx)
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
			row := Event{Pos: pos, ID: e.ID, SpoolRef: ref, Seq: e.Seq, NodeID: node, Time: e.Time, ReceivedAt: tx.now, Severity: e.Severity,
				Application: e.Application, Object: e.Object, Key: e.Key, Text: e.Text, Instance: e.Instance, State: eventOpen, Count: 1}
			stored, err := w.insert(ctx, &row)
			if err != nil {
				return out, err
			}
			conflict := false
			if !stored {
				if conflict, err = tx.resolve(ctx, w, &row, spool); err != nil {
					return out, err
				}
			}
			switch {
			case stored:
				out.New++
			case conflict:
				out.Conflicts++
			default:
				out.Duplicates++
			}
			mark = max(mark, e.Seq)
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
	if y := e.Time.Year(); y < 1970 || y > 9999 {
		return fmt.Errorf("time in the year %d", y)
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
		e.ID = wire.NewID()
	case !errors.Is(err, sql.ErrNoRows):
		return false, err
	}
	// A spool per conflicting event: its place must be free for good.
	name := spool + "~" + string(e.ID)
	if e.SpoolRef, _, err = tx.spool(ctx, e.NodeID, name); err != nil {
		return false, err
	}
	stored, err := w.insert(ctx, e)
	if err != nil {
		return false, err
	}
	if !stored {
		return false, fmt.Errorf("%s conflicts twice", what)
	}
	tx.Raise(Internal{NodeID: e.NodeID, Severity: wire.SeverityMajor, Object: "spool " + spool,
		Text: what + " claims the place or the name of another event; it was stored as event " + string(e.ID) +
			". Was the node restored from a snapshot, or is it running twice?"})
	return true, nil
}

// eventWriter inserts events and merges those that share a key.
type eventWriter struct {
	tx                    *Tx
	add, head, bump, shut *sql.Stmt
	received              string
	receivedAt            time.Time
}

const (
	insertEvent = `INSERT INTO events (pos, id, spool_ref, seq, node_id, time, received_at, severity, application, object, key, text, instance,
		state, count, merged_into, changed_by) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1, ?, '') ON CONFLICT DO NOTHING`
	selectHead = `SELECT id, severity FROM events WHERE node_id = ? AND key = ? AND key <> '' AND state <> 'closed' AND merged_into = ''`
	bumpHead   = `UPDATE events SET count = count + 1, severity = ?, text = ?, time = ?, received_at = ? WHERE id = ?`
	closeHead  = `UPDATE events SET state = 'closed', changed_at = ?, changed_by = ? WHERE id = ?`
)

func (tx *Tx) eventWriter(ctx context.Context) (*eventWriter, error) {
	btx, ok := tx.q.(bun.Tx)
	if !ok {
		return nil, fmt.Errorf("store: events are inserted in a transaction, not in %T", tx.q)
	}
	w := &eventWriter{tx: tx}
	for _, p := range []struct {
		stmt **sql.Stmt
		text string
	}{{&w.add, insertEvent}, {&w.head, selectHead}, {&w.bump, bumpHead}, {&w.shut, closeHead}} {
		s, err := btx.Tx.PrepareContext(ctx, p.text)
		if err != nil {
			return nil, errors.Join(err, w.close())
		}
		*p.stmt = s
	}
	return w, nil
}

func (w *eventWriter) close() error {
	var errs []error
	for _, s := range []*sql.Stmt{w.add, w.head, w.bump, w.shut} {
		if s != nil {
			errs = append(errs, s.Close())
		}
	}
	return errors.Join(errs...)
}

// timeText is how bun writes times for SQLite: UTC, whole microseconds, sorted
// as text.
func timeText(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05.999999-07:00") }

// insert stores an event unless its position, ID or place is taken.
//
// One key of one node is one open event to an operator. Bad news with a key
// that is open is merged into it; so is good news (normal) into good news;
// good news closes bad news, and the other way round.
func (w *eventWriter) insert(ctx context.Context, e *Event) (stored bool, err error) {
	var head wire.ID
	merge := false
	if e.Key != "" {
		var severity wire.Severity
		err := w.head.QueryRowContext(ctx, string(e.NodeID), e.Key).Scan(&head, &severity)
		switch {
		case errors.Is(err, sql.ErrNoRows):
		case err != nil:
			return false, err
		default:
			good := e.Severity == wire.SeverityNormal
			merge = good == (severity == wire.SeverityNormal)
			if merge {
				e.MergedInto = head
			}
			if merge || good {
				e.State = eventClosed
			}
		}
	}
	if w.receivedAt != e.ReceivedAt {
		w.receivedAt, w.received = e.ReceivedAt, timeText(e.ReceivedAt)
	}
	res, err := w.add.ExecContext(ctx, e.Pos, string(e.ID), e.SpoolRef, e.Seq, string(e.NodeID), timeText(e.Time), w.received, string(e.Severity),
		e.Application, e.Object, e.Key, e.Text, e.Instance, e.State, string(e.MergedInto))
	if err != nil {
		return false, err
	}
	n, err := res.RowsAffected()
	if err != nil || n == 0 || head == "" {
		return n > 0, err
	}
	if merge {
		_, err = w.bump.ExecContext(ctx, string(e.Severity), e.Text, timeText(e.Time), w.received, string(head))
	} else {
		_, err = w.shut.ExecContext(ctx, w.received, "event "+string(e.ID), string(head))
	}
	return true, err
}

// storeRaised stores the internal events at positions from pos+1 on.
func (tx *Tx) storeRaised(ctx context.Context, pos int64) (err error) {
	w, err := tx.eventWriter(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	seq, err := tx.next(ctx, "internal", int64(len(tx.raised)))
	if err != nil {
		return err
	}
	seq -= int64(len(tx.raised))
	for _, in := range tx.raised {
		pos++
		seq++
		e := Event{Pos: pos, ID: wire.NewID(), SpoolRef: internalSpool, Seq: seq, NodeID: in.NodeID, Time: tx.now, ReceivedAt: tx.now, Severity: in.Severity,
			Application: InternalApplication, Object: in.Object, Key: in.Key, Text: in.Text, State: eventOpen}
		stored, err := w.insert(ctx, &e)
		if err == nil && !stored {
			err = errors.New("its place is taken")
		}
		if err != nil {
			return fmt.Errorf("store internal event %d: %w", seq, err)
		}
	}
	tx.Wake(bus.Events)
	return nil
}
