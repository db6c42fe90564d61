package store

import (
	"context"
	"database/sql"
	"fmt"
	"time"

	"github.com/uptrace/bun"

	"sallyport/internal/sqldb"
	"sallyport/internal/wire"
)

// Installation identifies this database. Nodes obey only the UID that they
// learned at enrolment; Generation rises when a backup is restored.
type Installation struct {
	bun.BaseModel `bun:"table:installation"`
	ID            int64 `bun:",pk"`
	UID           string
	Generation    int64
	CreatedAt     time.Time

	// One backup that is restored twice makes two databases of one generation:
	// the later one counts, and Reign tells them apart.
	RestoredAt time.Time `bun:",nullzero"`
	Reign      string

	// SupersededBy is the generation that took the place of this one; 0: none.
	SupersededBy  int64
	SupersededAt  time.Time `bun:",nullzero"`
	SupersededWhy string
}

// Installation returns the row that identifies this database.
// [DB.RaiseGeneration] changes it, and is not called while others use db.
func (db *DB) Installation() Installation { return db.inst }

// GenerationAt returns the newest generation that the database at path knows of,
// its own or the one that took its place, whatever version of the program used it last.
func GenerationAt(ctx context.Context, path string) (n int64, err error) {
	err = sqldb.Peek(ctx, path, "SELECT max(generation, superseded_by) FROM installation WHERE id = 1", &n)
	return n, err
}

// SupersededAt returns what the database at path, which nobody uses, knows of the
// generation that took its place; SupersededBy is 0 where none has.
func SupersededAt(ctx context.Context, path string) (inst Installation, err error) {
	var at sql.NullTime
	err = sqldb.Glance(ctx, path, "SELECT uid, generation, superseded_by, superseded_at FROM installation WHERE id = 1",
		&inst.UID, &inst.Generation, &inst.SupersededBy, &at)
	inst.SupersededAt = at.Time
	return inst, err
}

// RaiseGeneration begins a new generation, which a database needs after it was
// restored from a backup: revisions made from now on are above all that nodes
// have seen, and join codes that were not used yet are void. above is the
// highest generation that is known to have been in use elsewhere.
func (db *DB) RaiseGeneration(ctx context.Context, above int64) error {
	inst := db.inst
	err := db.Update(ctx, func(ctx context.Context, tx *Tx) error {
		inst.Generation = max(inst.Generation, inst.SupersededBy, above) + 1
		inst.RestoredAt, inst.Reign = tx.Now(), string(wire.NewID())
		inst.SupersededBy, inst.SupersededAt, inst.SupersededWhy = 0, time.Time{}, ""
		tx.Audit(ctx, "installation.restore", "installation "+inst.UID, fmt.Sprintf("generation %d", inst.Generation))
		_, err := tx.q.NewUpdate().Model(&inst).WherePK().Exec(ctx)
		return err
	})
	if err == nil {
		db.inst = inst
	}
	return err
}

// Supersede writes down that a newer generation of this installation is in
// use: this database is not to be used any more. A restoration takes it back.
func (db *DB) Supersede(ctx context.Context, generation int64, why string) error {
	return db.Update(ctx, func(ctx context.Context, tx *Tx) error {
		tx.Audit(ctx, "installation.superseded", "installation "+db.inst.UID, fmt.Sprintf("generation %d, by generation %d: %s", db.inst.Generation, generation, why))
		_, err := tx.q.NewRaw("UPDATE installation SET superseded_by = ?, superseded_at = ?, superseded_why = ? WHERE id = 1", generation, tx.Now(), why).Exec(ctx)
		return err
	})
}
