// Package sqldb opens the SQL database of a role, brings its schema up to date
// and runs its transactions. It knows SQLite; what it hands out is bun, whose
// queries PostgreSQL understands too.
//
// A database has one writer and many readers: SQLite allows one writing
// transaction at a time, and a transaction that starts with reading and goes
// on to writing fails when another was faster. So [DB.Write] takes the only
// writing connection and begins with BEGIN IMMEDIATE, and [DB.Read] is a pool
// of read-only connections that WAL lets run beside it.
package sqldb

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/pressly/goose/v3"
	"github.com/uptrace/bun"
	"github.com/uptrace/bun/dialect/sqlitedialect"
	"golang.org/x/sys/unix"
	"modernc.org/sqlite" // also the driver "sqlite"
)

// ErrLocked says that another process has the database open.
var ErrLocked = errors.New("database is in use by another process")

// ErrNewer says that the database has a schema that this program does not know.
var ErrNewer = errors.New("it was used by a newer version")

// ErrFull says that the disk has no room for what was written; nothing of that
// transaction was. The database goes on when there is room again.
var ErrFull = errors.New("no space left on the disk for the database: free some space where SALLYPORT_DATA is")

// Result codes of SQLite (sqlite.org/rescode.html).
const (
	sqliteFull             = 13
	sqliteIOErrShmSize     = 4874 // the file beside the journal cannot grow: a full disk too
	sqliteConstraintUnique = 2067
)

// fullEvery spaces the log lines about a full disk: everybody tries again.
const fullEvery = time.Minute

const (
	// busyTimeout bounds the wait for a lock that SQLite holds, which with one
	// writer only happens during checkpoints and recovery.
	busyTimeout = 10 * time.Second
	readers     = 8
)

// DB is an open database.
type DB struct {
	write, read *bun.DB
	// savepoint and release stand around each of the changes that share a
	// transaction.
	savepoint, release *sql.Stmt

	changes *Queue[*change]
	lock    *os.File
	log     *slog.Logger
	told    atomic.Int64 // unix nanoseconds of the last log line about a full disk
}

// Config says which database to open.
type Config struct {
	Path       string // file of the database; its directory must exist
	Migrations fs.FS  // goose migrations, at the root of the file system
	Log        *slog.Logger
}

// Open locks the database, creates it if it is missing, and migrates it. A
// second Open of one file fails with [ErrLocked], also from another process.
func Open(ctx context.Context, cfg Config) (*DB, error) {
	path, err := filepath.Abs(cfg.Path)
	if err != nil {
		return nil, fmt.Errorf("open database: %w", err)
	}
	lock, err := lockFile(path + ".lock")
	if err != nil {
		return nil, fmt.Errorf("open database %s: %w", path, err)
	}
	db := &DB{lock: lock, log: cfg.Log, changes: NewQueue[*change]()}
	if err := db.open(ctx, path, cfg); err != nil {
		return nil, fmt.Errorf("open database %s: %w", path, errors.Join(full(err), db.Close()))
	}
	return db, nil
}

func (db *DB) open(ctx context.Context, path string, cfg Config) error {
	w, err := connect(path, false)
	if err != nil {
		return err
	}
	w.SetMaxOpenConns(1)
	db.write = bun.NewDB(w, dialect{sqlitedialect.New()})
	if err := checkDurable(ctx, w); err != nil {
		return err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return err
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, w, cfg.Migrations, goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return fmt.Errorf("migrations: %w", err)
	}
	have, want, err := p.GetVersions(ctx)
	if err != nil {
		return fmt.Errorf("read schema version: %w", err)
	}
	if have > want {
		return fmt.Errorf("its schema has version %d, this program knows %d: %w; run that one, or restore a backup", have, want, ErrNewer)
	}
	done, err := p.Up(ctx)
	if err != nil {
		return fmt.Errorf("migrate from version %d: %w", have, err)
	}
	if len(done) > 0 {
		cfg.Log.Info("database migrated", "from", have, "to", want)
	}
	if db.savepoint, err = w.PrepareContext(ctx, "SAVEPOINT one"); err != nil {
		return err
	}
	if db.release, err = w.PrepareContext(ctx, "RELEASE one"); err != nil {
		return err
	}
	r, err := connect(path, true)
	if err != nil {
		return err
	}
	r.SetMaxOpenConns(readers)
	r.SetMaxIdleConns(readers)
	db.read = bun.NewDB(r, dialect{sqlitedialect.New()})
	return r.PingContext(ctx)
}

// dialect keeps out of SQL texts what a peer may have sent and no database
// takes: NUL characters, which would cut the text off in SQLite and which
// PostgreSQL refuses, and times that cannot be read back.
type dialect struct{ *sqlitedialect.Dialect }

func (d dialect) AppendString(b []byte, s string) []byte { return d.Dialect.AppendString(b, Clean(s)) }

func (d dialect) AppendTime(b []byte, t time.Time) []byte {
	return d.Dialect.AppendTime(b, CleanTime(t))
}

// CleanTime returns t in UTC, or the zero time where the year in UTC has not
// four digits: no query and no JSON could read it back, and the whole table
// would be unreadable for the sake of one row. JSON takes such times from a
// peer, because they have four digits in another time zone.
func CleanTime(t time.Time) time.Time {
	t = t.UTC()
	if y := t.Year(); y < 1 || y > 9999 {
		return time.Time{}
	}
	return t
}

// Clean replaces NUL characters, for strings that are bound rather than
// written into the SQL text.
func Clean(s string) string {
	if strings.IndexByte(s, 0) < 0 {
		return s
	}
	return strings.ReplaceAll(s, "\x00", "\uFFFD")
}

func connect(path string, readOnly bool) (*sql.DB, error) {
	q := url.Values{}
	q.Add("_pragma", "busy_timeout("+strconv.FormatInt(busyTimeout.Milliseconds(), 10)+")")
	q.Add("_pragma", "foreign_keys(1)")
	q.Add("_pragma", "cache_size(-16384)") // KiB
	if readOnly {
		q.Add("_pragma", "query_only(1)")
	} else {
		q.Add("_pragma", "journal_mode(WAL)")
		q.Add("_pragma", "temp_store(MEMORY)") // what a savepoint may have to bring back; by default a file, made and removed for each larger transaction
		q.Set("_txlock", "immediate")
	}
	q.Add("_pragma", "synchronous(FULL)") // after journal_mode: WAL alone would allow NORMAL, which loses acknowledged commits at power loss
	return openFile(path, q)
}

func openFile(path string, q url.Values) (*sql.DB, error) {
	u := url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath(), RawQuery: q.Encode()}
	return sql.Open("sqlite", u.String())
}

// Peek reads one row of a database as it is, whatever version of the program used
// it last: it is neither locked nor migrated.
func Peek(ctx context.Context, path, query string, dest ...any) error {
	r, err := connect(path, true)
	if err != nil {
		return err
	}
	return errors.Join(r.QueryRowContext(ctx, query).Scan(dest...), r.Close())
}

// Glance is [Peek] for a database that nobody uses, and leaves nothing beside it; what
// a process that was killed has left in the write-ahead log is not seen.
func Glance(ctx context.Context, path, query string, dest ...any) error {
	r, err := openFile(path, url.Values{"mode": {"ro"}, "immutable": {"1"}})
	if err != nil {
		return err
	}
	return errors.Join(r.QueryRowContext(ctx, query).Scan(dest...), r.Close())
}

// checkDurable refuses to run where the settings did not take effect: on some
// network file systems WAL is silently not to be had.
func checkDurable(ctx context.Context, db *sql.DB) error {
	var mode string
	var sync int
	if err := db.QueryRowContext(ctx, "PRAGMA journal_mode").Scan(&mode); err != nil {
		return err
	}
	if err := db.QueryRowContext(ctx, "PRAGMA synchronous").Scan(&sync); err != nil {
		return err
	}
	if mode != "wal" || sync != synchronousFull {
		return fmt.Errorf("journal_mode is %s and synchronous %d, want wal and %d: keep the database on a local file system", mode, sync, synchronousFull)
	}
	return nil
}

// synchronousFull is the value of PRAGMA synchronous for FULL.
const synchronousFull = 2

// Read returns the pool of read-only connections.
func (db *DB) Read() *bun.DB { return db.read }

// full adds ErrFull to an error that means it.
func full(err error) error {
	var e *sqlite.Error
	if errors.As(err, &e) && (e.Code() == sqliteFull || e.Code() == sqliteIOErrShmSize) {
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return err
}

// IsTaken tells whether a write failed because another row has what a unique
// index allows once.
func IsTaken(err error) bool {
	var e *sqlite.Error
	return errors.As(err, &e) && e.Code() == sqliteConstraintUnique
}

// Close closes the database and gives up the lock.
func (db *DB) Close() error {
	var errs []error
	if db.read != nil {
		errs = append(errs, db.read.Close())
	}
	if db.write != nil {
		errs = append(errs, db.write.Close())
	}
	return errors.Join(append(errs, db.lock.Close())...)
}

// lockFile takes the lock for the life of the process; the kernel drops it at
// kill -9. The file stays: removing it would race with the next to open it.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, ErrLocked
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}
