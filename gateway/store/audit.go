package store

import (
	"context"
	"time"

	"github.com/uptrace/bun"

	"sallyport/internal/sqldb"
)

// Actor is who causes a change.
type Actor struct {
	Who    string // user name and id, or the name of a token
	Origin string // "unix socket", a remote address, or "gateway"
}

type actorKey struct{}

// WithActor says on whose behalf the changes under ctx happen.
func WithActor(ctx context.Context, a Actor) context.Context {
	return context.WithValue(ctx, actorKey{}, a)
}

// ActorFrom returns the actor, which is the gateway itself unless [WithActor]
// named another.
func ActorFrom(ctx context.Context) Actor {
	if a, ok := ctx.Value(actorKey{}).(Actor); ok {
		return a
	}
	return Actor{Who: "gateway", Origin: "gateway"}
}

// Results of an audited call.
const (
	ResultOK      = "ok"
	ResultRefused = "refused"
	ResultFailed  = "failed"
)

// AuditEntry is one row of the audit log, which is only ever added to, until it
// was kept long enough.
type AuditEntry struct {
	bun.BaseModel `bun:"table:audit"`
	Pos           int64 `bun:",pk"`
	Time          time.Time
	Who           string
	Origin        string
	What          string // noun.verb
	Object        string
	Result        string
	Detail        string
}

// Audit writes what was done to which object into the log, in this
// transaction. Who did it comes from ctx.
func (tx *Tx) Audit(ctx context.Context, what, object, detail string) {
	tx.audit(ctx, what, object, ResultOK, detail)
}

func (tx *Tx) audit(ctx context.Context, what, object, result, detail string) {
	tx.audits = append(tx.audits, entry(ctx, tx.now, what, object, result, detail))
}

func entry(ctx context.Context, at time.Time, what, object, result, detail string) AuditEntry {
	a := ActorFrom(ctx)
	return AuditEntry{Time: at, Who: a.Who, Origin: a.Origin, What: what, Object: object, Result: result, Detail: detail}
}

// AuditRefusal logs a changing call that came to nothing; result is
// [ResultRefused] or [ResultFailed].
func (db *DB) AuditRefusal(ctx context.Context, what, object, result, detail string) error {
	return db.Update(ctx, func(ctx context.Context, tx *Tx) error {
		tx.audit(ctx, what, object, result, detail)
		return nil
	})
}

// AuditBeside writes a row into the log of a database that a gateway may have
// open, for a command on its host that goes round the gateway.
func AuditBeside(ctx context.Context, path, what, object, result, detail string) error {
	return sqldb.Beside(ctx, path, func(ctx context.Context, btx bun.Tx) error {
		a := entry(ctx, time.Now().UTC().Truncate(time.Microsecond), what, object, result, detail)
		if err := btx.NewRaw(nextQuery, 1, "pos").Scan(ctx, &a.Pos); err != nil {
			return err
		}
		_, err := btx.NewInsert().Model(&a).Exec(ctx)
		return err
	})
}

// AuditFilter selects audit entries, newest first. Before, if not 0, is a
// position to continue below.
type AuditFilter struct {
	Who, What string
	Since     time.Time
	Before    int64
	Limit     int
}

// AuditLog lists the audit log.
func (r Queries) AuditLog(ctx context.Context, f AuditFilter) ([]AuditEntry, error) {
	var out []AuditEntry
	q := r.q.NewSelect().Model(&out).OrderExpr("pos DESC").Limit(int64(f.Limit))
	if f.Who != "" {
		q.Where("who = ?", f.Who)
	}
	if f.What != "" {
		q.Where("what = ?", f.What)
	}
	if !f.Since.IsZero() {
		q.Where("time >= ?", f.Since.UTC())
	}
	if f.Before != 0 {
		q.Where("pos < ?", f.Before)
	}
	return out, q.Scan(ctx)
}
