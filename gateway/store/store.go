// Package store is the gateway's memory: who exists, what they should do, what
// they reported, and who changed it. The database is the only truth; what was
// acknowledged to anybody is in it.
//
// Reading queries are methods of [Queries] and run either on the pool of
// readers, as methods of [DB], or inside a transaction, as methods of [Tx].
// Changes happen only in [DB.Update]. Rows that are tailed or exported carry a
// position (pos), taken from one counter row by the committing transaction as
// the last thing that it does: who sees position n committed will never see a
// smaller one appear later.
//
// The SQL is plain enough for PostgreSQL to follow; what differs between the
// two engines lives in the migrations.
package store

import (
	"cmp"
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"time"

	"github.com/uptrace/bun"

	"sallyport/gateway/bus"
	"sallyport/internal/disk"
	"sallyport/internal/sqldb"
	"sallyport/internal/wire"
)

//go:embed migrations/sqlite/*.sql
var migrations embed.FS

// DefaultTenant is the tenant of everything that names none.
const DefaultTenant = "default"

// Conditions that callers match.
var (
	ErrNotFound = errors.New("not found")
	ErrFull     = sqldb.ErrFull
	ErrExists   = errors.New("exists already")
	ErrChanged  = errors.New("changed in the meantime")
	ErrEmpty    = errors.New("no gateway has ever used this database")
)

// Config says which database to open.
type Config struct {
	Path string
	Log  *slog.Logger
	Bus  bus.Bus          // woken after commits
	Now  func() time.Time // nil: time.Now
	Used bool             // one that holds no installation is refused with [ErrEmpty], and none is made
}

// DB is the gateway's database.
type DB struct {
	Queries
	sql  *sqldb.DB
	path string
	bus  bus.Bus
	now  func() time.Time
	inst Installation

	outbox *sqldb.Queue[*outboxJob]
}

// Queries are the reading queries.
type Queries struct {
	q        bun.IDB
	prepared *prepared
}

// Open opens, creates or migrates the database. A second gateway on one file
// is refused with [sqldb.ErrLocked].
func Open(ctx context.Context, cfg Config) (*DB, error) {
	sub, err := fs.Sub(migrations, "migrations/sqlite")
	if err != nil {
		return nil, err
	}
	s, err := sqldb.Open(ctx, sqldb.Config{Path: cfg.Path, Migrations: sub, Log: cfg.Log})
	if err != nil {
		return nil, err
	}
	hot, err := prepare(ctx, s)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open database %s: %w", cfg.Path, err), s.Close())
	}
	db := &DB{Queries: Queries{q: s.Read(), prepared: hot}, sql: s, path: cfg.Path, bus: cfg.Bus, now: cfg.Now, outbox: sqldb.NewQueue[*outboxJob]()}
	if db.now == nil {
		db.now = time.Now
	}
	if err := db.initialise(ctx, cfg.Used); err != nil {
		return nil, errors.Join(fmt.Errorf("open database %s: %w", cfg.Path, err), s.Close())
	}
	return db, nil
}

// initialise makes the installation UID when the database is new.
func (db *DB) initialise(ctx context.Context, used bool) error {
	return db.Update(ctx, func(ctx context.Context, tx *Tx) error {
		err := tx.q.NewSelect().Model(&db.inst).Where("id = 1").Scan(ctx)
		switch {
		case !errors.Is(err, sql.ErrNoRows):
			return err
		case used:
			return ErrEmpty
		}
		db.inst = Installation{ID: 1, UID: string(wire.NewID()), Generation: 1, CreatedAt: tx.Now()}
		if _, err := tx.q.NewInsert().Model(&db.inst).Exec(ctx); err != nil {
			return err
		}
		if _, err := tx.q.NewRaw("INSERT INTO tenants (id, name, created_at) VALUES (?, ?, ?)", DefaultTenant, DefaultTenant, tx.Now()).Exec(ctx); err != nil {
			return err
		}
		_, err = tx.q.NewRaw("INSERT INTO spools (ref, node_id, spool, watermark, dropped, created_at) VALUES (?, '', ?, 0, 0, ?)",
			internalSpool, "gateway", tx.Now()).Exec(ctx)
		return err
	})
}

// Close closes the database.
func (db *DB) Close() error { return db.sql.Close() }

// Room is how many bytes the database can grow by, what is unused in its file
// included, and how large its disk is: 0 if its file system does not say so.
func (db *DB) Room(ctx context.Context) (free, total int64, err error) {
	space, err := disk.Of(db.path)
	if err != nil {
		return 0, 0, err
	}
	var unused, page int64
	if err := db.q.NewRaw("SELECT f.freelist_count, p.page_size FROM pragma_freelist_count AS f, pragma_page_size AS p").Scan(ctx, &unused, &page); err != nil {
		return 0, 0, err
	}
	return space.Free + unused*page, space.Total, nil
}

// Tx is a writing transaction.
type Tx struct {
	Queries
	db     *DB
	now    time.Time
	audits []AuditEntry
	raised []Internal
	notes  []Annotation
	topics map[bus.Topic]struct{}
}

// Update runs f in a transaction. When it returns nil, everything is on disk,
// and the subscribers of the topics that it touched have been woken.
func (db *DB) Update(ctx context.Context, f func(ctx context.Context, tx *Tx) error) error {
	var topics map[bus.Topic]struct{}
	err := db.sql.Write(ctx, func(ctx context.Context, btx bun.Tx) error {
		tx := &Tx{Queries: Queries{q: btx, prepared: db.prepared}, db: db, now: db.now().UTC().Truncate(time.Microsecond), topics: map[bus.Topic]struct{}{}}
		if err := f(ctx, tx); err != nil {
			return err
		}
		topics = tx.topics // flush adds to it
		return tx.flush(ctx)
	})
	if err != nil {
		return err
	}
	if db.bus != nil {
		for t := range topics {
			db.bus.Wake(t)
		}
	}
	return nil
}

// errDryRun rolls a transaction back that did its work only to show it.
var errDryRun = errors.New("dry run")

// Try runs f as Update does, and takes everything back. It returns what f
// returned.
func (db *DB) Try(ctx context.Context, f func(ctx context.Context, tx *Tx) error) error {
	err := db.Update(ctx, func(ctx context.Context, tx *Tx) error {
		if err := f(ctx, tx); err != nil {
			return err
		}
		return errDryRun
	})
	if errors.Is(err, errDryRun) {
		return nil
	}
	return err
}

// Now is the time of the transaction: UTC, in whole microseconds, which is
// what the database keeps.
func (tx *Tx) Now() time.Time { return tx.now }

// Wake names a topic whose subscribers are woken after the commit.
func (tx *Tx) Wake(t bus.Topic) { tx.topics[t] = struct{}{} }

// next adds n to a counter and returns its new value. The row stays locked
// until the transaction ends.
func (tx *Tx) next(ctx context.Context, counter string, n int64) (v int64, err error) {
	var values []int64
	if err := tx.prepared.next.Select(ctx, tx.q, &values, n, counter); err != nil || len(values) == 0 {
		return 0, cmp.Or(err, fmt.Errorf("counter %s: %w", counter, ErrNotFound))
	}
	return values[0], nil
}

// flush writes the rows that carry a position, last of all.
func (tx *Tx) flush(ctx context.Context) error {
	n := int64(len(tx.raised) + len(tx.notes) + len(tx.audits))
	if n == 0 {
		return nil
	}
	last, err := tx.next(ctx, "pos", n)
	if err != nil {
		return err
	}
	pos := last - n
	if len(tx.raised) > 0 {
		if err := tx.storeRaised(ctx, pos); err != nil {
			return err
		}
		pos += int64(len(tx.raised))
	}
	for i := range tx.notes {
		pos++
		tx.notes[i].Pos = pos
	}
	for i := range tx.audits {
		pos++
		tx.audits[i].Pos = pos
	}
	if len(tx.notes) > 0 {
		if _, err := tx.q.NewInsert().Model(&tx.notes).Exec(ctx); err != nil {
			return fmt.Errorf("store annotation: %w", err)
		}
	}
	for i := range tx.audits {
		if _, err := tx.prepared.addAudit.Exec(ctx, tx.q, &tx.audits[i]); err != nil {
			return fmt.Errorf("write audit log: %w", err)
		}
	}
	return nil
}

// notFound turns the absence of a row into [ErrNotFound].
func notFound(err error) error {
	if errors.Is(err, sql.ErrNoRows) {
		return ErrNotFound
	}
	return err
}

// one turns an update that hit no row into [ErrNotFound].
func one(res sql.Result, err error) error {
	n, err := affected(res, err)
	if err == nil && n == 0 {
		return ErrNotFound
	}
	return err
}

// affected is how many rows a statement hit.
func affected(res sql.Result, err error) (int64, error) {
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}
