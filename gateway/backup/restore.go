package backup

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"sallyport/gateway/store"
	"sallyport/internal/atomicfile"
	"sallyport/internal/lockdir"
	"sallyport/internal/sealed"
	"sallyport/internal/sqldb"
)

// Restored says what a restoration did.
type Restored struct {
	Database     string `json:"database"`
	Previous     string `json:"previous"` // where the database before went; empty: there was none
	Installation string `json:"installation"`
	Generation   int64  `json:"generation"`
	Authority    bool   `json:"authority"` // the certificate authority was restored too
	Identity     bool   `json:"identity"`  // and the gateway's identity
}

// sqliteMagic begins a database of SQLite: what a restoration put aside, or a
// copy that somebody made by other means.
const sqliteMagic = "SQLite format 3\x00"

// ErrNoBackup says that a file is nothing that can be restored.
var ErrNoBackup = errors.New("it is no backup of a gateway")

// ErrInterrupted says that a restoration was cut off half-way.
var ErrInterrupted = errors.New("a restoration was cut off here: run `sallyport restore FILE` again, to its end")

// Restore puts a backup in the place of what is there. passphrase is asked for
// the passphrase when the file needs one.
//
// A failure on the way leaves everything as it was. A crash between the
// renames, of which there are few, leaves a mark: the gateway does not start
// before the restoration was repeated ([Interrupted]).
func Restore(ctx context.Context, p Place, file string, passphrase func() ([]byte, error)) (r Restored, err error) {
	s := &stage{place: p, database: p.Database + restoring}
	var lock *lockdir.Lock
	if _, err := os.Stat(p.Gateway); !errors.Is(err, fs.ErrNotExist) {
		if lock, err = lockdir.Acquire(p.Gateway); err != nil { // before a passphrase is asked for in vain
			return r, err
		}
	}
	defer func() {
		if lock != nil {
			err = errors.Join(err, lock.Release())
		}
	}()
	in, err := os.Open(file)
	if err != nil {
		return r, err
	}
	defer func() { _ = in.Close() }()
	content, err := s.open(ctx, in, passphrase)
	if err != nil {
		return r, stopped(ctx, err)
	}
	if lock == nil { // a mistyped file, directory or passphrase has left nothing
		if lock, err = lockdir.Acquire(p.Gateway); err != nil {
			return r, err
		}
	}
	floor, err := p.generationInUse(ctx)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, s.clear()) }()
	if err := s.fill(content); err != nil {
		return r, stopped(ctx, err)
	}
	if r, err = s.raise(ctx, floor); err != nil {
		return r, err
	}
	if err := s.keepRevocations(); err != nil {
		return r, err
	}
	if err := s.own(); err != nil {
		return r, err
	}
	r.Database, r.Authority, r.Identity = p.Database, s.authority, s.identity
	r.Previous, err = s.swap(r.Generation, time.Now())
	return r, err
}

// stopped says so in place of an error that says nothing of the file.
func stopped(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%w; nothing was changed", context.Cause(ctx))
	}
	return err
}

// open begins to read the file: it is a backup, and the passphrase is that of it.
func (s *stage) open(ctx context.Context, file *os.File, passphrase func() ([]byte, error)) (*bufio.Reader, error) {
	st, err := file.Stat()
	if err != nil {
		return nil, err
	}
	in := bufio.NewReader(file)
	head, err := in.Peek(max(len(sqliteMagic), len(sealed.Magic)))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case strings.HasPrefix(string(head), sqliteMagic):
		s.bare = true
		return bufio.NewReader(s.place.meter(ctx, in, 0, st.Size())), nil
	case !strings.HasPrefix(string(head), sealed.Magic):
		return nil, ErrNoBackup
	}
	secret, err := passphrase()
	if err != nil {
		return nil, err
	}
	opened, err := sealed.NewReader(s.place.meter(ctx, in, 0, st.Size()), secret)
	if err != nil {
		return nil, err
	}
	content := bufio.NewReader(opened)
	if _, err := content.Peek(1); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return content, nil
}

// fill unpacks what was opened beside what is there.
func (s *stage) fill(content io.Reader) error {
	if !s.bare {
		return s.unpack(content)
	}
	if err := RemoveDatabase(s.database); err != nil {
		return err
	}
	return writeNew(s.database, 0o600, content)
}

// raise opens the copy, which also migrates it, and begins a generation above
// its own and above the one that was in use here.
func (s *stage) raise(ctx context.Context, floor int64) (r Restored, err error) {
	db, err := open(ctx, s.database)
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return r, stopped(ctx, err)
	case errors.Is(err, sqldb.ErrNewer):
		return r, err
	default:
		return r, fmt.Errorf("%w: %w", ErrNoBackup, err)
	}
	if uid := db.Installation().UID; s.manifest.Installation != "" && uid != s.manifest.Installation {
		return r, errors.Join(fmt.Errorf("%w: its manifest names installation %s, its database %s", ErrNoBackup, s.manifest.Installation, uid), db.Close())
	}
	if err := db.RaiseGeneration(ctx, floor); err != nil {
		return r, errors.Join(err, db.Close())
	}
	inst := db.Installation()
	return Restored{Installation: inst.UID, Generation: inst.Generation}, db.Close()
}

// generationInUse is the highest generation that nodes may have seen from
// here; 0 when the database is gone or damaged: that is why one restores.
func (p Place) generationInUse(ctx context.Context) (int64, error) {
	var marked int64
	if b, err := os.ReadFile(p.marker()); err == nil {
		marked, _ = strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64) // a crash may have left it empty
	}
	if _, err := os.Stat(p.Database); err != nil {
		return marked, nil //nolint:nilerr // it is missing
	}
	db, err := open(ctx, p.Database)
	if errors.Is(err, sqldb.ErrLocked) {
		return 0, err
	}
	if errors.Is(err, sqldb.ErrNewer) { // somebody goes back to an older version
		n, err := store.GenerationAt(ctx, p.Database)
		return max(marked, n), err
	}
	if err != nil {
		return marked, nil //nolint:nilerr // a damaged database has no generation that could be read
	}
	inst := db.Installation()
	return max(marked, inst.Generation, inst.SupersededBy), db.Close()
}

func (p Place) marker() string { return filepath.Join(p.Gateway, fileMarker) }

// Interrupted returns [ErrInterrupted] when a restoration was cut off between
// its renames: what stands there may be of two backups.
func Interrupted(p Place) error {
	_, err := os.Stat(p.marker())
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	}
	return fmt.Errorf("%s: %w", p.Gateway, ErrInterrupted)
}

// swap puts the staged files in place and what was there aside.
func (s *stage) swap(generation int64, now time.Time) (previous string, err error) {
	stamp := keptPrefix + now.UTC().Format("20060102T150405.000Z")
	if err := atomicfile.Write(s.place.marker(), []byte(strconv.FormatInt(generation, 10)+"\n"), 0o600); err != nil {
		return "", err
	}
	if s.authority {
		if err := exchange(s.place.PKI, stamp, leaveOut); err != nil {
			return "", err
		}
	}
	if s.identity {
		if err := exchange(s.place.Gateway, stamp, func(rel string) bool { return leaveOut(rel) || s.place.ofDatabase(rel) }); err != nil {
			return "", err
		}
	}
	if previous, err = setAside(s.place.Database, stamp); err != nil {
		return "", err
	}
	if err := errors.Join(os.Rename(s.database, s.place.Database), atomicfile.SyncDir(filepath.Dir(s.place.Database))); err != nil {
		return previous, err
	}
	return previous, errors.Join(os.Remove(s.place.marker()), atomicfile.SyncDir(s.place.Gateway))
}

// exchange moves what is in dir into dir/stamp, and the staged files up.
func exchange(dir, stamp string, stays func(rel string) bool) error {
	staged := filepath.Join(dir, workRestore)
	have, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	kept := filepath.Join(dir, stamp)
	for _, e := range have {
		if stays(e.Name()) {
			continue
		}
		if err := lockdir.Make(kept, 0o700); err != nil {
			return err
		}
		if err := os.Rename(filepath.Join(dir, e.Name()), filepath.Join(kept, e.Name())); err != nil {
			return err
		}
	}
	fresh, err := os.ReadDir(staged)
	if err != nil {
		return err
	}
	for _, e := range fresh {
		if e.Name() == lockName {
			continue
		}
		if err := os.Rename(filepath.Join(staged, e.Name()), filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return atomicfile.SyncDir(dir)
}

// sqliteFiles are what SQLite and our lock add to a database's name.
var sqliteFiles = []string{"", "-wal", "-shm", ".lock"}

// setAside renames the database with its write-ahead log, which may hold what
// the database itself does not have yet.
func setAside(path, stamp string) (string, error) {
	kept := path + "." + stamp
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

// RemoveDatabase removes a database that nobody uses, with all that belongs to
// it. That there is none is no error.
func RemoveDatabase(path string) error {
	var errs []error
	for _, suffix := range sqliteFiles {
		if err := os.Remove(path + suffix); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// writeNew writes a new file and has it on disk when it returns.
func writeNew(path string, mode fs.FileMode, in io.Reader) error {
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Sync(), out.Close())
}
