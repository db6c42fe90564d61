package sqldb

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/uptrace/bun"
)

var ctx = context.Background()

func migrations(files ...string) fs.FS {
	m := fstest.MapFS{}
	for i, sql := range files {
		name := []string{"00001_one.sql", "00002_two.sql"}[i]
		m[name] = &fstest.MapFile{Data: []byte("-- +goose Up\n" + sql + "\n")}
	}
	return m
}

func open(t *testing.T, path string, files ...string) *DB {
	t.Helper()
	db, err := Open(ctx, Config{Path: path, Migrations: migrations(files...), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return db
}

const table = "CREATE TABLE t (n BIGINT NOT NULL PRIMARY KEY);"

func pragma(t *testing.T, db bun.IDB, name string) (v string) {
	t.Helper()
	if err := db.NewRaw("PRAGMA "+name).Scan(ctx, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// An acknowledged event is on disk only if these hold on the very connections
// that are open: kill -9 would not show a missing fsync.
func TestOpenConnectionsAreDurable(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "a b%20?.db"), table)
	defer func() { _ = db.Close() }()
	check := func(where string, c bun.IDB) {
		if m, s := pragma(t, c, "journal_mode"), pragma(t, c, "synchronous"); m != "wal" || s != "2" {
			t.Errorf("%s: journal_mode %s, synchronous %s; want wal and 2 (FULL)", where, m, s)
		}
		if fk := pragma(t, c, "foreign_keys"); fk != "1" {
			t.Errorf("%s: foreign_keys %s", where, fk)
		}
	}
	if err := db.Write(ctx, func(_ context.Context, tx bun.Tx) error { check("in the writing transaction", tx); return nil }); err != nil {
		t.Fatal(err)
	}
	for range readers { // hold them, so that each is another connection
		c, err := db.Read().Conn(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		check("reader", c)
	}
}

func TestReadersCannotWriteAndSeeOnlyCommits(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "x.db"), table)
	defer func() { _ = db.Close() }()
	count := func() (n int) {
		if err := db.Read().NewRaw("SELECT count(*) FROM t").Scan(ctx, &n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	if _, err := db.Read().ExecContext(ctx, "INSERT INTO t VALUES (1)"); err == nil {
		t.Error("a reader wrote")
	}
	boom := errors.New("boom")
	err := db.Write(ctx, func(ctx context.Context, tx bun.Tx) error {
		if _, err := tx.ExecContext(ctx, "INSERT INTO t VALUES (1)"); err != nil {
			return err
		}
		if n := count(); n != 0 {
			t.Errorf("a reader sees %d uncommitted rows", n)
		}
		return boom
	})
	if !errors.Is(err, boom) || count() != 0 {
		t.Errorf("failed transaction: %v, %d rows", err, count())
	}
}

func TestSecondOpenIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.db")
	db := open(t, path, table)
	if _, err := Open(ctx, Config{Path: path, Migrations: migrations(table), Log: slog.New(slog.DiscardHandler)}); !errors.Is(err, ErrLocked) {
		t.Errorf("second open: %v; want ErrLocked", err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	db = open(t, path, table)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestNewerSchemaIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.db")
	if err := open(t, path, table, "CREATE TABLE u (n BIGINT);").Close(); err != nil {
		t.Fatal(err)
	}
	_, err := Open(ctx, Config{Path: path, Migrations: migrations(table), Log: slog.New(slog.DiscardHandler)})
	if !errors.Is(err, ErrNewer) {
		t.Errorf("%v", err)
	}
}

func TestUnusableDirectory(t *testing.T) {
	_, err := Open(ctx, Config{Path: filepath.Join(t.TempDir(), "missing", "x.db"), Migrations: migrations(table), Log: slog.New(slog.DiscardHandler)})
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

func TestNULDoesNotCutTheSQLOff(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "x.db"), "CREATE TABLE s (v TEXT NOT NULL);")
	defer func() { _ = db.Close() }()
	err := db.Write(ctx, func(ctx context.Context, tx bun.Tx) error {
		_, err := tx.NewRaw("INSERT INTO s (v) VALUES (?)", "a\x00' OR 'b").Exec(ctx)
		return err
	})
	var got string
	if err == nil {
		err = db.Read().NewRaw("SELECT v FROM s").Scan(ctx, &got)
	}
	if err != nil || got != "a\uFFFD' OR 'b" {
		t.Errorf("%q, %v", got, err)
	}
}

// A full disk is told apart, and forgotten once there is room.
func TestFullDisk(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "x.db"), "CREATE TABLE t (b BLOB NOT NULL);")
	t.Cleanup(func() { _ = db.Close() })
	var log bytes.Buffer
	db.log = slog.New(slog.NewTextHandler(&log, nil))
	pages := func(n int) {
		t.Helper()
		if _, err := db.write.ExecContext(ctx, fmt.Sprintf("PRAGMA max_page_count = %d", n)); err != nil {
			t.Fatal(err)
		}
	}
	write := func() error {
		return db.Write(ctx, func(ctx context.Context, tx bun.Tx) error {
			_, err := tx.ExecContext(ctx, "INSERT INTO t (b) VALUES (zeroblob(100000))")
			return err
		})
	}
	pages(10)
	for range 2 {
		if err := write(); !errors.Is(err, ErrFull) || !strings.Contains(err.Error(), "free some space") {
			t.Fatalf("%v; want ErrFull and what to do", err)
		}
	}
	if n := strings.Count(log.String(), "free some space"); n != 1 {
		t.Errorf("it was logged %d times, want once for now: %s", n, &log)
	}
	pages(1000)
	if err := write(); err != nil {
		t.Error(err)
	}
	if n, err := db.Read().NewSelect().Table("t").Count(ctx); err != nil || n != 1 {
		t.Errorf("%d rows, %v; want the one that was acknowledged", n, err)
	}
}
