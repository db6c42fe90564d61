package store

import (
	"context"
	"time"

	"github.com/uptrace/bun"

	"sallyport/gateway/api"
	"sallyport/internal/wire"
)

// Retention forgets what is over, from the oldest on, a piece at a time, so that
// nobody waits long for the database. Each call takes the position after which
// it goes on, at first 0, and returns the one for the next; 0 says that there is
// no more. What the next version of a row depends on (watermarks of spools,
// revisions, keys, certificates) is not here.

// maxForgotten is how many rows are looked at in one piece.
const maxForgotten = 1000

// ForgetEvents drops the events that came before a moment and that nobody waits
// for: closed ones, those that were merged into another, and good news (severity
// normal). A problem stays until it is closed. Remarks go with their event.
func (db *DB) ForgetEvents(ctx context.Context, before time.Time, after int64) (n, next int64, err error) {
	var rows []Event
	err = db.q.NewSelect().Model(&rows).Column("pos", "id", "received_at", "severity", "state", "count", "merged_into").
		Where("pos > ?", after).OrderExpr("pos").Limit(maxForgotten).Scan(ctx)
	if err != nil {
		return 0, 0, err
	}
	var over []wire.ID
	for _, e := range rows {
		old := e.ReceivedAt.Before(before)
		if !old && e.Count == 1 { // one with a count was received again with each of its kind
			next = 0
			break
		}
		if next = e.Pos; old && (e.State == eventClosed || e.Severity == wire.SeverityNormal || e.MergedInto != "") {
			over = append(over, e.ID)
		}
	}
	// Good news that came again meanwhile is not over: what was merged into it is
	// told nowhere else.
	if n, err = db.drop(ctx, "events", over, "annotations", "event_id", "received_at < ?", before.UTC()); err != nil {
		return 0, 0, err
	}
	return n, next, nil
}

// ForgetGaps drops what was noted before a moment of events that never came.
func (db *DB) ForgetGaps(ctx context.Context, before time.Time, after int64) (n, next int64, err error) {
	return db.forgetRows(ctx, "gaps", before, after)
}

// ForgetAudit drops the entries of the audit log from before a moment.
func (db *DB) ForgetAudit(ctx context.Context, before time.Time, after int64) (n, next int64, err error) {
	return db.forgetRows(ctx, "audit", before, after)
}

// forgetRows is for tables of which all goes that is old.
func (db *DB) forgetRows(ctx context.Context, table string, before time.Time, after int64) (n, next int64, err error) {
	var rows []struct {
		Pos  int64
		Time time.Time
	}
	err = db.q.NewRaw("SELECT pos, time FROM ? WHERE pos > ? ORDER BY pos LIMIT ?", bun.Ident(table), after, maxForgotten).Scan(ctx, &rows)
	if err != nil {
		return 0, 0, err
	}
	for n < int64(len(rows)) && rows[n].Time.Before(before) {
		next = rows[n].Pos
		n++
	}
	if n > 0 {
		err = db.Update(ctx, func(ctx context.Context, tx *Tx) error {
			_, err := tx.q.NewRaw("DELETE FROM ? WHERE pos <= ?", bun.Ident(table), next).Exec(ctx)
			return err
		})
	}
	if err != nil {
		return 0, 0, err
	}
	if n < int64(len(rows)) {
		next = 0
	}
	return n, next, nil
}

// ForgetActions drops the actions that ended before a moment, with their output.
func (db *DB) ForgetActions(ctx context.Context, before time.Time, after int64) (n, next int64, err error) {
	var rows []*Action
	err = db.q.NewSelect().Model(&rows).Column("id", "seq", "state", "created_at", "ended_at").Where("seq > ?", after).OrderExpr("seq").Limit(maxForgotten / 50).Scan(ctx)
	if err != nil {
		return 0, 0, err
	}
	var over []wire.ID
	for _, a := range rows {
		if !a.CreatedAt.Before(before) {
			next = 0
			break
		}
		if next = a.Seq; !a.Open() && a.EndedAt.Before(before) {
			over = append(over, a.ID)
		}
	}
	if n, err = db.drop(ctx, "actions", over, "action_frames", "action_id", "ended_at < ?", before.UTC()); err != nil {
		return 0, 0, err
	}
	return n, next, nil
}

// ForgetRequests drops the certificate requests that expired, or were denied or
// discarded, before a moment: whoever reaches an RCP can make some. What an operator
// said stays in force while the party comes back.
func (db *DB) ForgetRequests(ctx context.Context, before time.Time, after int64) (n, next int64, err error) {
	err = db.Update(ctx, func(ctx context.Context, tx *Tx) (err error) {
		n, err = affected(tx.q.NewRaw("DELETE FROM requests WHERE id IN (SELECT id FROM requests WHERE state IN (?) AND decided_at < ? AND seen_at < ? LIMIT ?)",
			bun.List([]string{api.RequestExpired, api.RequestDenied, api.RequestDiscarded}), before.UTC(), before.UTC(), maxForgotten).Exec(ctx))
		return err
	})
	if err != nil {
		return 0, 0, err
	}
	if n == maxForgotten {
		next = after + 1 // there is no place to go on from: what was found is gone
	}
	return n, next, nil
}

// drop deletes rows of a table, and what another one has of them, as far as they
// fit still: they were looked at before, without a lock.
func (db *DB) drop(ctx context.Context, table string, over []wire.ID, parts, of, fits string, args ...any) (n int64, err error) {
	if len(over) == 0 {
		return 0, nil
	}
	err = db.Update(ctx, func(ctx context.Context, tx *Tx) error {
		var still []wire.ID
		err := tx.q.NewRaw("SELECT id FROM ? WHERE id IN (?) AND "+fits, append([]any{bun.Ident(table), bun.List(over)}, args...)...).Scan(ctx, &still)
		if n = int64(len(still)); err != nil || n == 0 {
			return err
		}
		if _, err := tx.q.NewRaw("DELETE FROM ? WHERE ? IN (?)", bun.Ident(parts), bun.Ident(of), bun.List(still)).Exec(ctx); err != nil {
			return err
		}
		_, err = tx.q.NewRaw("DELETE FROM ? WHERE id IN (?)", bun.Ident(table), bun.List(still)).Exec(ctx)
		return err
	})
	return n, err
}
