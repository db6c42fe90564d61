package sqldb

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/uptrace/bun"
)

func TestBackupOfADatabaseInUse(t *testing.T) {
	dir := t.TempDir()
	path, dest := filepath.Join(dir, "x.db"), filepath.Join(dir, "copy.db")
	db := open(t, path, "CREATE TABLE s (v TEXT NOT NULL);")
	defer func() { _ = db.Close() }()
	insert := func(v string) {
		t.Helper()
		if err := db.Write(ctx, func(ctx context.Context, tx bun.Tx) error {
			_, err := tx.NewRaw("INSERT INTO s (v) VALUES (?)", v).Exec(ctx)
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	insert("before") // stands in the write-ahead log only
	insert(strings.Repeat("much ", 100_000))
	var last int64
	watch := func(done, total int64) {
		if done < last || done > total {
			t.Errorf("%d of %d bytes after %d", done, total, last)
		}
		last = done
	}
	if err := Backup(ctx, path, dest, watch); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(dest); err != nil || st.Size() != last {
		t.Errorf("of %v, %v, %d bytes were told of", st, err, last)
	}
	insert("after")
	if st, err := os.Stat(dest); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	copied := open(t, dest, "CREATE TABLE s (v TEXT NOT NULL);")
	defer func() { _ = copied.Close() }()
	var all []string
	if err := copied.Read().NewRaw("SELECT v FROM s").Scan(ctx, &all); err != nil || len(all) != 2 || all[0] != "before" {
		t.Errorf("the copy holds %d rows, %v", len(all), err)
	}
	if err := Backup(ctx, path, dest, watch); !errors.Is(err, fs.ErrExist) {
		t.Errorf("an existing file was not refused: %v", err)
	}
	if err := Backup(ctx, filepath.Join(dir, "none.db"), filepath.Join(dir, "y.db"), watch); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a database that is not there: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "none.db")); !errors.Is(err, fs.ErrNotExist) {
		t.Error("the backup made the database that it should copy")
	}
}
