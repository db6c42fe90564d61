package sqldb

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/uptrace/bun"
)

// maxShared is how many may share a transaction. A commit is a sync of the
// disk, a millisecond and more: one at a time, a thousand nodes that come back
// would stand in a queue for it.
const maxShared = 64

// change is what one caller of Write does.
type change struct {
	ctx      context.Context
	f        func(context.Context, bun.Tx) error
	panicked any
}

// Write runs f in a writing transaction and commits it unless f fails. When it
// returns nil, what f wrote is on disk. Those that came while another one was
// being written share the next transaction: each sees what those before it
// wrote, and one that fails takes only its own back. ctx ends the wait for the
// turn; f, which is not interrupted any more, is short.
func (db *DB) Write(ctx context.Context, f func(ctx context.Context, tx bun.Tx) error) error {
	c := &change{ctx: ctx, f: f}
	err := db.changes.Do(ctx, c, func() func(*change) bool {
		n := 0
		return func(*change) bool { n++; return n <= maxShared }
	}, db.commit)
	if c.panicked != nil {
		panic(c.panicked)
	}
	if err = full(err); errors.Is(err, ErrFull) {
		now := time.Now().UnixNano()
		if last := db.told.Load(); now-last >= int64(fullEvery) && db.told.CompareAndSwap(last, now) {
			db.log.Error("nothing can be stored", "error", err)
		}
	}
	return err
}

// commit writes a group in one transaction.
func (db *DB) commit(group []*Job[*change]) {
	if len(group) == 1 {
		c := group[0].Work
		if c.ctx.Err() != nil {
			group[0].Err = context.Cause(c.ctx)
			return
		}
		group[0].Err = db.write.RunInTx(context.WithoutCancel(c.ctx), nil, c.attempt)
		return
	}
	err := db.write.RunInTx(context.Background(), nil, func(ctx context.Context, tx bun.Tx) error {
		for _, j := range group {
			var err error
			if j.Err, err = db.runBeside(ctx, tx, j.Work); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		return
	}
	for _, j := range group {
		if j.Err == nil { // it was done, and is undone with the rest
			j.Err = err
		}
	}
}

// runBeside runs f within a transaction of several. It returns what f did, and
// apart from that whether the transaction is lost for all.
func (db *DB) runBeside(ctx context.Context, tx bun.Tx, c *change) (failed, lost error) {
	if c.ctx.Err() != nil {
		return context.Cause(c.ctx), nil
	}
	if _, err := tx.StmtContext(ctx, db.savepoint).ExecContext(ctx); err != nil {
		return nil, err
	}
	// Nothing may interrupt a statement: that would take the whole transaction
	// back (sqlite.org/c3ref/interrupt.html).
	failed = c.attempt(context.WithoutCancel(c.ctx), tx)
	var err error
	if failed == nil {
		_, err = tx.StmtContext(ctx, db.release).ExecContext(ctx)
	} else {
		_, err = tx.Tx.ExecContext(ctx, "ROLLBACK TO one; RELEASE one")
	}
	if err != nil {
		// A full disk, for one, ends the whole transaction by itself.
		return failed, fmt.Errorf("shared transaction: %w", errors.Join(failed, err))
	}
	return failed, nil
}

var errPanicked = errors.New("panicked")

// attempt runs f, and keeps a panic for the one whose it is.
func (c *change) attempt(ctx context.Context, tx bun.Tx) (err error) {
	defer func() {
		if c.panicked = recover(); c.panicked != nil {
			err = errPanicked
		}
	}()
	return c.f(ctx, tx)
}
