package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"sallyport/config"
	"sallyport/gateway/bus"
	"sallyport/gateway/store"
	"sallyport/internal/cli"
	"sallyport/internal/lockdir"
	"sallyport/internal/sqldb"
	"sallyport/internal/wire"
)

func (a *app) backupCommand() *cobra.Command {
	return &cobra.Command{
		Use: "backup FILE", Short: "Copy the gateway's database into a new file, on the gateway's host", Args: cli.Exactly(1),
		Long: "Copy the gateway's database into a new file. The gateway may run meanwhile. The certificate authority in\n" +
			"$SALLYPORT_DATA/pki is not in it: keep a copy of that directory too, in a safe place.",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := config.LoadGateway(a.streams.Env)
			if err != nil {
				return err
			}
			if err := sqldb.Backup(cmd.Context(), c.Database, args[0]); err != nil {
				return err
			}
			a.out.Note("%s holds the database. It does not hold the certificate authority: keep a copy of %s too.", args[0], c.Dir("pki"))
			return nil
		},
	}
}

// restored is what `restore` prints.
type restored struct {
	Database     string `json:"database"`
	Previous     string `json:"previous"` // where the database before went; empty: there was none
	Installation string `json:"installation"`
	Generation   int64  `json:"generation"`
}

func (a *app) restoreCommand() *cobra.Command {
	return &cobra.Command{
		Use: "restore FILE", Short: "Put a backup in the place of the gateway's database, as a new generation", Args: cli.Exactly(1),
		Long: "Put a backup in the place of the gateway's database. The gateway must not run. Nodes have seen newer revisions\n" +
			"than the backup knows: a new generation stands above all of them. Join codes that were not used yet are void.\n" +
			"The database that was there is kept beside it.",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := config.LoadGateway(a.streams.Env)
			if err != nil {
				return err
			}
			r, err := restore(cmd.Context(), c, args[0])
			if err != nil {
				return fmt.Errorf("restore %s: %w", args[0], err)
			}
			if a.out.Format != cli.FormatTable {
				return a.out.Print(r, cli.Table{Columns: []string{"database", "previous", "installation", "generation"},
					Rows: [][]string{{r.Database, r.Previous, r.Installation, fmt.Sprint(r.Generation)}}})
			}
			a.out.Say("%s is restored: installation %s, generation %d. Start the gateway now.", r.Database, r.Installation, r.Generation)
			if r.Previous != "" {
				a.out.Say("The database before is kept as %s.", r.Previous)
			}
			return nil
		},
	}
}

// restore works on a copy beside the database and renames it at the end: a
// failure on the way leaves everything as it was.
func restore(ctx context.Context, c config.Gateway, file string) (r restored, err error) {
	lock, err := lockdir.Acquire(c.Dir(string(wire.RoleGateway)))
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, lock.Release()) }()
	current, err := generationOf(ctx, c.Database)
	if err != nil {
		return r, err
	}
	fresh := c.Database + ".restoring"
	defer func() { _ = removeDatabase(fresh) }() // after the rename there is nothing left of it but the lock file
	if err := copyFile(file, fresh); err != nil {
		return r, err
	}
	if r, err = raiseGeneration(ctx, fresh, current); err != nil {
		return r, err
	}
	r.Database = c.Database
	if r.Previous, err = setAside(c.Database, time.Now()); err != nil {
		return r, err
	}
	return r, errors.Join(os.Rename(fresh, c.Database), sqldb.SyncDir(filepath.Dir(c.Database)))
}

// generationOf reads the generation that nodes may have seen last; 0 when the
// database is gone or damaged: that is why one restores.
func generationOf(ctx context.Context, path string) (int64, error) {
	if _, err := os.Stat(path); err != nil {
		return 0, nil
	}
	db, err := store.Open(ctx, store.Config{Path: path, Log: slog.New(slog.DiscardHandler), Bus: &bus.Local{}})
	if errors.Is(err, sqldb.ErrLocked) {
		return 0, err
	}
	if err != nil {
		return 0, nil //nolint:nilerr // a damaged database has no generation that could be read
	}
	return db.Installation().Generation, db.Close()
}

// raiseGeneration opens the copy, which also migrates it, and begins a
// generation above its own and above the one that was in use.
func raiseGeneration(ctx context.Context, path string, current int64) (restored, error) {
	db, err := store.Open(ctx, store.Config{Path: path, Log: slog.New(slog.DiscardHandler), Bus: &bus.Local{}})
	if err != nil {
		return restored{}, fmt.Errorf("it is no backup of a gateway: %w", err)
	}
	for {
		if err := db.RaiseGeneration(ctx); err != nil {
			return restored{}, errors.Join(err, db.Close())
		}
		if db.Installation().Generation > current {
			break
		}
	}
	inst := db.Installation()
	return restored{Installation: inst.UID, Generation: inst.Generation}, db.Close()
}

// sqliteFiles are what SQLite and our lock add to a database's name.
var sqliteFiles = []string{"", "-wal", "-shm", ".lock"}

// setAside renames the database with its write-ahead log, which may hold what
// the database itself does not have yet.
func setAside(path string, now time.Time) (string, error) {
	kept := path + ".before-" + now.UTC().Format("20060102T150405Z")
	for _, suffix := range sqliteFiles[:3] {
		err := os.Rename(path+suffix, kept+suffix)
		if errors.Is(err, fs.ErrNotExist) {
			if suffix == "" {
				return "", nil
			}
			continue
		}
		if err != nil {
			return "", err
		}
	}
	return kept, nil
}

func removeDatabase(path string) error {
	var errs []error
	for _, suffix := range sqliteFiles {
		if err := os.Remove(path + suffix); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func copyFile(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	if err := removeDatabase(to); err != nil { // of a restore that was cut off
		return err
	}
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Sync(), out.Close())
}
