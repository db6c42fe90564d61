package sqldb

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/uptrace/bun"
	"github.com/uptrace/bun/dialect/sqlitedialect"

	"sallyport/internal/atomicfile"
)

// Backup writes a consistent copy of the database at path into the new file
// dest, mode 0600, also while another process uses the database. When it
// returns nil, the copy is on disk. watch is told how many bytes of how many there
// are, from another goroutine, and not any more once Backup has returned.
func Backup(ctx context.Context, path, dest string, watch func(done, total int64)) (err error) {
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
	var size int64 // free pages are not copied
	if err := db.QueryRowContext(ctx, "SELECT (page_count - freelist_count) * page_size FROM pragma_page_count, pragma_freelist_count, pragma_page_size").Scan(&size); err != nil {
		return err
	}
	stop := follow(f, size, watch)
	_, err = db.ExecContext(ctx, "VACUUM INTO ?", dest)
	stop()
	if err != nil {
		return err
	}
	// SQLite leaves the syncing of the copy to the caller.
	return errors.Join(f.Sync(), atomicfile.SyncDir(filepath.Dir(dest)))
}

// followEvery is how often the size of a copy is looked at: a person looks.
const followEvery = 100 * time.Millisecond

// follow tells watch how far a file has grown until stop is called: SQLite does not
// say how far it is.
func follow(f *os.File, total int64, watch func(done, total int64)) (stop func()) {
	look := func() {
		if st, err := f.Stat(); err == nil {
			watch(st.Size(), max(total, st.Size()))
		}
	}
	ended, quit := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(followEvery)
		defer tick.Stop()
		for {
			select {
			case <-quit:
				look()
				return
			case <-tick.C:
				look()
			}
		}
	}()
	return func() { close(quit); <-ended }
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
