package sqldb

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"

	"github.com/uptrace/bun"
)

// crowd has changes wait while another one is written, in the order of their
// numbers, and returns what became of them.
func crowd(t *testing.T, db *DB, changes ...func(context.Context, bun.Tx) error) []error {
	t.Helper()
	errs := make([]error, len(changes))
	var wg sync.WaitGroup
	defer wg.Wait()
	release, running := make(chan struct{}), make(chan struct{})
	wg.Go(func() {
		if err := db.Write(ctx, func(context.Context, bun.Tx) error {
			close(running)
			<-release
			return nil
		}); err != nil {
			t.Error(err)
		}
	})
	<-running
	for i, f := range changes {
		wg.Go(func() {
			defer func() {
				if p := recover(); p != nil {
					errs[i] = fmt.Errorf("panic: %v", p)
				}
			}()
			errs[i] = db.Write(ctx, f)
		})
		for waiting(db) != i+1 {
			runtime.Gosched()
		}
	}
	close(release)
	wg.Wait()
	return errs
}

func waiting(db *DB) int {
	db.changes.mu.Lock()
	defer db.changes.mu.Unlock()
	return len(db.changes.waiting)
}

func put(v string) func(context.Context, bun.Tx) error {
	return func(ctx context.Context, tx bun.Tx) error {
		_, err := tx.NewRaw("INSERT INTO s (v) VALUES (?)", v).Exec(ctx)
		return err
	}
}

func stored(t *testing.T, db *DB) []string {
	t.Helper()
	var all []string
	if err := db.Read().NewRaw("SELECT v FROM s ORDER BY v").Scan(ctx, &all); err != nil {
		t.Fatal(err)
	}
	return all
}

func TestThoseWhoWaitShareATransaction(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "x.db"), "CREATE TABLE s (v TEXT NOT NULL);")
	defer func() { _ = db.Close() }()
	errBad := errors.New("bad")
	errs := crowd(t, db,
		put("a"),
		func(ctx context.Context, tx bun.Tx) error { return errors.Join(put("b")(ctx, tx), errBad) },
		func(ctx context.Context, tx bun.Tx) error {
			var seen []string
			if err := tx.NewRaw("SELECT v FROM s").Scan(ctx, &seen); err != nil || !slices.Equal(seen, []string{"a"}) {
				t.Errorf("a member of the group sees %v, %v", seen, err)
			}
			if all := stored(t, db); len(all) != 0 {
				t.Errorf("%v is committed before the group is", all)
			}
			return put("c")(ctx, tx)
		},
		func(ctx context.Context, tx bun.Tx) error {
			if err := put("d")(ctx, tx); err != nil {
				return err
			}
			panic("no way")
		},
		put("e"),
	)
	if errs[0] != nil || !errors.Is(errs[1], errBad) || errs[2] != nil || errs[3] == nil || errs[3].Error() != "panic: no way" || errs[4] != nil {
		t.Errorf("the members got %v", errs)
	}
	if all := stored(t, db); !slices.Equal(all, []string{"a", "c", "e"}) {
		t.Errorf("%v is stored", all)
	}
	if err := db.Write(ctx, put("f")); err != nil {
		t.Errorf("after a panic: %v", err)
	}
}

func TestNobodyIsToldThatALostTransactionIsStored(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "x.db"), "CREATE TABLE s (v TEXT NOT NULL);")
	defer func() { _ = db.Close() }()
	errs := crowd(t, db,
		put("a"),
		func(ctx context.Context, tx bun.Tx) error { // as SQLite does by itself when the disk is full
			_, err := tx.Tx.ExecContext(ctx, "ROLLBACK")
			return err
		},
		put("c"),
	)
	for i, err := range errs {
		if err == nil {
			t.Errorf("member %d was told that it is stored", i)
		}
	}
	if all := stored(t, db); len(all) != 0 {
		t.Errorf("%v is stored", all)
	}
	if err := db.Write(ctx, put("d")); err != nil {
		t.Errorf("the next change: %v", err)
	}
}

func TestAChangeThatWaitsCanBeTakenBack(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "x.db"), "CREATE TABLE s (v TEXT NOT NULL);")
	defer func() { _ = db.Close() }()
	db.changes.turn <- struct{}{} // somebody writes
	given, cancel := context.WithCancel(ctx)
	cancel()
	if err := db.Write(given, put("a")); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if n := waiting(db); n != 0 {
		t.Errorf("%d changes still wait", n)
	}
	<-db.changes.turn
}
