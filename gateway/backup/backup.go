// Package backup writes everything that makes a gateway into one sealed file,
// and puts it back: the database with the installation's UID, the certificate
// authority, the gateway's identity and its API certificate. Moving a gateway
// to another host is the two of them.
//
// The file is a tar archive inside a sealed stream (internal/sealed). A backup
// is made of a gateway that runs; a restoration needs that nobody uses the
// directories, works on copies beside what is there, and puts those in its
// place by renaming. What was there is kept.
package backup

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"sallyport/gateway/bus"
	"sallyport/gateway/store"
	"sallyport/internal/lockdir"
	"sallyport/internal/sealed"
	"sallyport/internal/sqldb"
)

// Place says where the parts of a gateway stand, and who looks on.
type Place struct {
	Gateway  string // $SALLYPORT_DATA/gateway
	PKI      string // $SALLYPORT_DATA/pki; it need not exist where the CA is elsewhere
	Database string

	// Watch is told how many bytes of how many are done; one that is nil is not. The
	// total is a guess that gets better.
	Watch func(done, total int64)

	quick bool // tests: a guess of the passphrase may be cheap
}

func (p Place) cost() byte {
	if p.quick {
		return sealed.MinCost
	}
	return sealed.Cost
}

// Manifest says what is in a backup.
type Manifest struct {
	Format       int       `json:"format"`
	Program      string    `json:"program"`
	Created      time.Time `json:"created"`
	Installation string    `json:"installation"`
	Generation   int64     `json:"generation"`
	Authority    bool      `json:"authority"` // the certificate authority is in it
}

// format is the version of the archive's layout.
const format = 1

// Names inside the archive.
const (
	nameManifest = "manifest.json"
	nameDatabase = "database"
	treeGateway  = "gateway"
	treePKI      = "pki"
)

// Names inside the directories that a backup leaves out, and a restoration
// leaves where they are.
const (
	workBackup  = "backup.tmp"
	workRestore = "restore.tmp"
	fileMarker  = "restoring"
	lockName    = "lock"
	keptPrefix  = "before-"
	restoring   = ".restoring" // behind the name of a database that is unpacked
)

// Create writes a backup into the new file dest, mode 0600, which is there when it
// is whole and on disk.
func Create(ctx context.Context, p Place, dest, program string, passphrase []byte) (m Manifest, err error) {
	if _, err := os.Stat(p.Database); err != nil {
		return m, fmt.Errorf("back up the gateway: %w (was a gateway ever started here? see SALLYPORT_DATA)", err)
	}
	out, err := begin(dest)
	if err != nil {
		return m, fmt.Errorf("back up the gateway: %w", err)
	}
	defer func() {
		if err = errors.Join(err, out.close()); err != nil {
			err = fmt.Errorf("back up the gateway: %w", err)
		}
	}()
	// Before anything is copied: no copy of an installation without a trace of
	// who took it. The row is in the backup too.
	name, err := filepath.Abs(dest)
	if err != nil {
		return m, err
	}
	if err := store.AuditBeside(ctx, p.Database, "backup.create", name, store.ResultOK, ""); err != nil {
		return m, fmt.Errorf("note it in the audit log: %w", err)
	}
	if m, err = create(ctx, p, out, program, passphrase); err != nil {
		return m, errors.Join(err, store.AuditBeside(context.WithoutCancel(ctx), p.Database, "backup.create", name, store.ResultFailed, err.Error()))
	}
	return m, out.finish()
}

func create(ctx context.Context, p Place, out io.Writer, program string, passphrase []byte) (m Manifest, err error) {
	// The copy of the database stands where the database is safe too.
	work := filepath.Join(p.Gateway, workBackup)
	lock, err := lockdir.Acquire(work)
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work), lock.Release()) }()
	database := filepath.Join(work, nameDatabase)
	if err := RemoveDatabase(database); err != nil { // of a backup that was cut off
		return m, err
	}
	// Each byte of the database is copied first, and sealed then.
	if err := sqldb.Backup(ctx, p.Database, database, func(done, total int64) { p.watch(done, 2*total) }); err != nil {
		return m, err
	}
	// After the database: revocations that it does not know yet are merged into
	// it when a gateway starts, while the other way round there would be an
	// authority that has never heard of them.
	gateway, err := snapshot(p.Gateway, func(rel string) bool { return leaveOut(rel) || p.ofDatabase(rel) })
	if err != nil {
		return m, err
	}
	authority, err := snapshot(p.PKI, leaveOut)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return m, err
	}
	m = Manifest{Format: format, Program: program, Created: time.Now().UTC(), Authority: len(authority) > 0}
	if m.Installation, m.Generation, err = describe(ctx, database); err != nil {
		return m, err
	}
	w, err := sealed.NewWriter(out, passphrase, p.cost())
	if err != nil {
		return m, err
	}
	if err := archive(ctx, p, w, m, database, gateway, authority); err != nil {
		return m, err
	}
	return m, w.Close()
}

// Tidy removes what a backup or a restoration left half-done when it was killed:
// copies of keys and of the database that nobody would look for. The caller holds
// the lock of the gateway's directory, so that no restoration is under way; a
// backup that is keeps its copy.
func Tidy(p Place) error {
	stale := stage{place: p}
	errs := []error{os.RemoveAll(stale.tree(treeGateway)), RemoveDatabase(p.Database + restoring)}
	if err := os.RemoveAll(stale.tree(treePKI)); !errors.Is(err, fs.ErrPermission) { // an authority of another user is restored by that one
		errs = append(errs, err)
	}
	work := filepath.Join(p.Gateway, workBackup)
	if _, err := os.Stat(work); err != nil {
		return errors.Join(errs...)
	}
	lock, err := lockdir.Acquire(work)
	switch {
	case errors.Is(err, lockdir.ErrLocked):
	case err != nil:
		errs = append(errs, err)
	default:
		errs = append(errs, os.RemoveAll(work), lock.Release())
	}
	return errors.Join(errs...)
}

// leaveOut names what belongs to one host or to one moment.
func leaveOut(rel string) bool {
	top, _, below := strings.Cut(rel, string(filepath.Separator))
	switch {
	case top == workBackup, top == workRestore, strings.HasPrefix(top, keptPrefix):
		return true
	case below:
		return false
	}
	return top == fileMarker || top == lockName || strings.HasSuffix(top, ".sock")
}

// ofDatabase tells the database's files, when they stand in the gateway's
// directory. Their copies of earlier restorations are of no use elsewhere.
func (p Place) ofDatabase(rel string) bool {
	dir, err := filepath.Rel(p.Gateway, filepath.Dir(p.Database))
	return err == nil && filepath.Dir(rel) == dir && strings.HasPrefix(filepath.Base(rel), filepath.Base(p.Database))
}

// describe reads which installation a copy of a database is.
func describe(ctx context.Context, path string) (uid string, generation int64, err error) {
	db, err := open(ctx, path)
	if err != nil {
		return "", 0, err
	}
	inst := db.Installation()
	return inst.UID, inst.Generation, db.Close()
}

// open opens the database of an installation. Any other one of SQLite would
// become one, with a UID that no node knows.
func open(ctx context.Context, path string) (*store.DB, error) {
	return store.Open(ctx, store.Config{Path: path, Log: slog.New(slog.DiscardHandler), Bus: &bus.Local{}, Used: true})
}

// archive writes the parts in the order in which a restoration wants them.
func archive(ctx context.Context, p Place, w io.Writer, m Manifest, database string, gateway, authority []entry) error {
	t := tar.NewWriter(w)
	about, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := addBytes(t, entry{name: nameManifest, mode: 0o600, data: about}); err != nil {
		return err
	}
	if err := addFile(ctx, p, t, nameDatabase, database); err != nil {
		return err
	}
	for tree, entries := range map[string][]entry{treeGateway: gateway, treePKI: authority} {
		for _, e := range entries {
			e.name = tree + "/" + filepath.ToSlash(e.name)
			if err := addBytes(t, e); err != nil {
				return err
			}
		}
	}
	return t.Close()
}

func addBytes(t *tar.Writer, e entry) error {
	h := &tar.Header{Name: e.name, Mode: int64(e.mode.Perm()), Size: int64(len(e.data)), Typeflag: tar.TypeReg, Format: tar.FormatPAX}
	if e.mode.IsDir() {
		h.Typeflag = tar.TypeDir
	}
	if err := t.WriteHeader(h); err != nil {
		return err
	}
	_, err := t.Write(e.data)
	return err
}

func addFile(ctx context.Context, p Place, t *tar.Writer, name, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if err := t.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: st.Size(), Typeflag: tar.TypeReg, Format: tar.FormatPAX}); err != nil {
		return err
	}
	_, err = io.Copy(t, p.meter(ctx, f, st.Size(), 2*st.Size()))
	return err
}

func (p Place) watch(done, total int64) {
	if p.Watch != nil {
		p.Watch(done, total)
	}
}

// meter reads in, tells how far it is, with done bytes before it, and ends with ctx.
func (p Place) meter(ctx context.Context, in io.Reader, done, total int64) io.Reader {
	return readFunc(func(b []byte) (int, error) {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		n, err := in.Read(b)
		done += int64(n)
		p.watch(done, max(done, total))
		return n, err
	})
}

type readFunc func(b []byte) (int, error)

func (f readFunc) Read(b []byte) (int, error) { return f(b) }
