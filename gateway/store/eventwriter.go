package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/uptrace/bun"

	"sallyport/internal/sqldb"
	"sallyport/internal/wire"
)

// eventWriter inserts events with prepared statements and merges those that
// share a key. It is the hot path of the gateway: events without a key go in
// many to a statement, which saves a fifth of the time.
type eventWriter struct {
	tx         bun.Tx
	stmts      map[string]*sql.Stmt
	queue      []*Event // without keys, not inserted yet
	args       []any
	taken      []*Event // whose ID or place another event holds
	received   string   // receivedAt as text
	receivedAt time.Time
}

// eventChunk is the number of rows of one insert, the fastest of those that
// were measured from 1 to 1,000.
const eventChunk = 50

// What fails for another reason than a conflict fails the transaction: with OR
// FAIL, SQLite keeps no journal of the pages that a statement changes, to take
// back half of it.
const (
	insertHead = `INSERT OR FAIL INTO events (pos, id, spool_ref, seq, node_id, time, received_at, severity, application, object, key, text, instance,
		state, count, merged_into, changed_by) VALUES `
	insertRow  = `(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, '')`
	insertTail = ` ON CONFLICT DO NOTHING`
	selectHead = `SELECT id, severity FROM events WHERE node_id = ? AND key = ? AND key <> '' AND state <> 'closed' AND merged_into = ''`
	bumpHead   = `UPDATE events SET count = count + 1, severity = ?, text = ?, time = ?, received_at = ? WHERE id = ?`
	closeHead  = `UPDATE events SET state = 'closed', changed_at = ?, changed_by = ? WHERE id = ?`
)

// What is the same in all rows of a chunk is bound once or not at all: binding
// costs a quarter of what inserting does.
const (
	plainColumns = 11
	plainHead    = `INSERT OR FAIL INTO events (received_at, pos, id, spool_ref, seq, node_id, time, severity, application, object, text, instance,
		key, state, count, merged_into, changed_by) VALUES `
	plainRow = `(?1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, '', 'open', 1, '', '')`
)

var (
	insertOne  = insertHead + insertRow + insertTail
	insertMany = plainHead + strings.Repeat(plainRow+", ", eventChunk-1) + plainRow + insertTail
)

func (tx *Tx) eventWriter() (*eventWriter, error) {
	btx, ok := tx.q.(bun.Tx)
	if !ok {
		return nil, fmt.Errorf("store: events are inserted in a transaction, not in %T", tx.q)
	}
	return &eventWriter{tx: btx, stmts: make(map[string]*sql.Stmt)}, nil
}

func (w *eventWriter) stmt(ctx context.Context, text string) (*sql.Stmt, error) {
	if s, ok := w.stmts[text]; ok {
		return s, nil
	}
	s, err := w.tx.Tx.PrepareContext(ctx, text)
	if err == nil {
		w.stmts[text] = s
	}
	return s, err
}

func (w *eventWriter) close() error {
	var errs []error
	for _, s := range w.stmts {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

// timeText is how bun writes times for SQLite: UTC, whole microseconds, sorted
// as text.
func timeText(t time.Time) string {
	return sqldb.CleanTime(t).Format("2006-01-02 15:04:05.999999-07:00")
}

// add queues an event for the next flush.
func (w *eventWriter) add(e *Event) {
	e.Key = sqldb.Clean(e.Key)
	w.queue = append(w.queue, e)
}

// flush inserts the queue and returns the events whose ID or place is taken.
func (w *eventWriter) flush(ctx context.Context) (taken []*Event, err error) {
	queue := w.queue
	w.queue, w.taken = nil, nil
	for len(queue) > 0 {
		n := 0
		for n < len(queue) && n < eventChunk && queue[n].plain() && queue[n].ReceivedAt.Equal(queue[0].ReceivedAt) {
			n++
		}
		if n == eventChunk {
			err = w.insertChunk(ctx, queue[:n])
		} else {
			n = 1
			err = w.insert(ctx, queue[0])
		}
		if err != nil {
			return nil, err
		}
		queue = queue[n:]
	}
	return w.taken, nil
}

// plain tells whether an event can be a row of insertMany.
func (e *Event) plain() bool { return e.Key == "" && e.State == eventOpen && e.MergedInto == "" }

// receivedText is received_at of an event; most have the one of the event before.
func (w *eventWriter) receivedText(e *Event) string {
	if w.receivedAt != e.ReceivedAt {
		w.receivedAt, w.received = e.ReceivedAt, timeText(e.ReceivedAt)
	}
	return w.received
}

func (w *eventWriter) row(e *Event) {
	w.args = append(w.args, e.Pos, string(e.ID), e.SpoolRef, e.Seq, string(e.NodeID), timeText(e.Time), w.receivedText(e), string(e.Severity),
		sqldb.Clean(e.Application), sqldb.Clean(e.Object), e.Key, sqldb.Clean(e.Text), sqldb.Clean(e.Instance), e.State, 1, string(e.MergedInto))
}

func (w *eventWriter) exec(ctx context.Context, text string) (rows int64, err error) {
	s, err := w.stmt(ctx, text)
	if err != nil {
		return 0, err
	}
	return affected(s.ExecContext(ctx, w.args...))
}

// insertChunk inserts events without keys at once.
func (w *eventWriter) insertChunk(ctx context.Context, chunk []*Event) error {
	if w.args == nil {
		w.args = make([]any, 0, 1+eventChunk*plainColumns)
	}
	w.args = append(w.args[:0], w.receivedText(chunk[0]))
	for _, e := range chunk {
		w.args = append(w.args, e.Pos, string(e.ID), e.SpoolRef, e.Seq, string(e.NodeID), timeText(e.Time), string(e.Severity),
			sqldb.Clean(e.Application), sqldb.Clean(e.Object), sqldb.Clean(e.Text), sqldb.Clean(e.Instance))
	}
	n, err := w.exec(ctx, insertMany)
	if err != nil || int(n) == len(chunk) {
		return err
	}
	var there []int64
	err = w.tx.NewRaw("SELECT pos FROM events WHERE pos >= ? AND pos <= ?", chunk[0].Pos, chunk[len(chunk)-1].Pos).Scan(ctx, &there)
	if err != nil {
		return err
	}
	stored := make(map[int64]bool, len(there))
	for _, pos := range there {
		stored[pos] = true
	}
	for _, e := range chunk {
		if !stored[e.Pos] {
			w.taken = append(w.taken, e)
		}
	}
	return nil
}

// insert inserts one event.
//
// One key of one node is one open event to an operator. Bad news with a key
// that is open is merged into it; so is good news (normal) into good news;
// good news closes bad news, and the other way round.
func (w *eventWriter) insert(ctx context.Context, e *Event) error {
	var head wire.ID
	merge := false
	if e.Key != "" {
		s, err := w.stmt(ctx, selectHead)
		if err != nil {
			return err
		}
		var severity wire.Severity
		err = s.QueryRowContext(ctx, string(e.NodeID), e.Key).Scan(&head, &severity)
		switch {
		case errors.Is(err, sql.ErrNoRows):
		case err != nil:
			return err
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
	w.args = w.args[:0]
	w.row(e)
	n, err := w.exec(ctx, insertOne)
	if err != nil {
		return err
	}
	if n == 0 {
		e.MergedInto, e.State = "", eventOpen
		w.taken = append(w.taken, e)
		return nil
	}
	if head == "" {
		return nil
	}
	update, args := closeHead, []any{w.received, "event " + string(e.ID), string(head)}
	if merge {
		update, args = bumpHead, []any{string(e.Severity), sqldb.Clean(e.Text), timeText(e.Time), w.received, string(head)}
	}
	s, err := w.stmt(ctx, update)
	if err == nil {
		_, err = s.ExecContext(ctx, args...)
	}
	return err
}
