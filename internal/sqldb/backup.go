package sqldb

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/uptrace/bun"
	"github.com/uptrace/bun/dialect/sqlitedialect"

	"sallyport/internal/atomicfile"
)

// Backup writes a consistent copy of the database at path into the new file
// dest, mode 0600, also while another process uses the database. When it
// returns nil, the copy is on disk.
func Backup(ctx context.Context, path, dest string) (err error) {
	if _, err := os.Stat(path); err != nil {
		return fmt.Errorf("back up database: %w", err)
	}
	// VACUUM INTO takes an empty file; making it here decides on its mode and
	// never overwrites one.
	f, err := os.OpenFile(dest, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("back up database: %w", err)
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err != nil {
			err = errors.Join(fmt.Errorf("back up database %s: %w", path, err), os.Remove(dest))
		}
	}()
	db, err := connect(path, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	if _, err := db.ExecContext(ctx, "VACUUM INTO ?", dest); err != nil {
		return err
	}
	// SQLite leaves the syncing of the copy to the caller.
	return errors.Join(f.Sync(), atomicfile.SyncDir(filepath.Dir(dest)))
}

// Beside runs one writing transaction on a database that another process may
// have open: for a command on the same host that has something to note in it.
// It neither makes nor migrates a database.
func Beside(ctx context.Context, path string, f func(ctx context.Context, tx bun.Tx) error) (err error) {
	if _, err := os.Stat(path); err != nil {
		return err
	}
	w, err := connect(path, false)
	if err != nil {
		return err
	}
	w.SetMaxOpenConns(1)
	db := bun.NewDB(w, dialect{sqlitedialect.New()})
	defer func() { err = errors.Join(err, db.Close()) }()
	return full(db.RunInTx(ctx, nil, f))
}
