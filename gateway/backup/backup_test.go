package backup

import (
	"archive/tar"
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"sallyport/gateway/bus"
	"sallyport/gateway/store"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/lockdir"
	"sallyport/internal/sealed"
	"sallyport/internal/sqldb"
)

var pass = []byte("correct horse battery staple")

func ask() ([]byte, error) { return pass, nil }

func newPlace(t *testing.T) Place {
	t.Helper()
	data := t.TempDir()
	return Place{Gateway: filepath.Join(data, "gateway"), PKI: filepath.Join(data, "pki"), Database: filepath.Join(data, "gateway", "sallyport.db"), quick: true}
}

func put(t *testing.T, path, text string, mode fs.FileMode) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), mode)); err != nil {
		t.Fatal(err)
	}
}

// live makes a place that looks like a gateway's.
func live(t *testing.T) Place {
	t.Helper()
	p := newPlace(t)
	put(t, filepath.Join(p.Gateway, "identity", "key.pem"), "the gateway's key", 0o600)
	put(t, filepath.Join(p.Gateway, "api-tls", "cert.pem"), "certificate", 0o644)
	put(t, filepath.Join(p.Gateway, "local.sock"), "no socket, but of its name", 0o600)
	put(t, filepath.Join(p.Gateway, "before-x", "old"), "old", 0o600)
	put(t, filepath.Join(p.PKI, "root.key"), "the root's key", 0o600)
	put(t, filepath.Join(p.PKI, "intermediate.pem"), "issuer", 0o600)
	put(t, filepath.Join(p.PKI, "revocations.json"), revocations(3), 0o600)
	db, err := store.Open(t.Context(), store.Config{Path: p.Database, Log: slog.New(slog.DiscardHandler), Bus: &bus.Local{}})
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	return p
}

func revocations(n int64) string {
	env, _ := json.Marshal(map[string]any{"payload": fmt.Appendf(nil, `{"number":%d}`, n)})
	return string(env)
}

func backedUp(t *testing.T, p Place) (string, Manifest) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "b")
	m, err := Create(t.Context(), p, file, "test", pass)
	if err != nil {
		t.Fatal(err)
	}
	return file, m
}

// tree lists the files of a directory with what is in them.
func tree(t *testing.T, root string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		rel, _ := filepath.Rel(root, path)
		out[rel] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestMoveToAnotherHost(t *testing.T) {
	old := live(t)
	file, m := backedUp(t, old)
	if !m.Authority || m.Generation != 1 || m.Installation == "" {
		t.Errorf("manifest %+v", m)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the file has mode %v, %v", st.Mode(), err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{"the root's key", "the gateway's key", "CREATE TABLE", "intermediate.pem"} {
		if bytes.Contains(b, []byte(secret)) {
			t.Errorf("%q can be read in the file", secret)
		}
	}
	if left := tree(t, old.Gateway); left[workBackup+"/database"] != "" || len(left) != 6 {
		t.Errorf("left behind: %v", slices.Sorted(maps.Keys(left)))
	}

	fresh := newPlace(t)
	r, err := Restore(t.Context(), fresh, file, ask)
	if err != nil {
		t.Fatal(err)
	}
	if r.Installation != m.Installation || r.Generation != 2 || !r.Authority || !r.Identity || r.Previous != "" {
		t.Errorf("restored %+v", r)
	}
	got := tree(t, fresh.Gateway)
	want := []string{"api-tls/cert.pem", "identity/key.pem", "lock", "sallyport.db", "sallyport.db.lock"}
	if names := slices.Sorted(maps.Keys(got)); !slices.Equal(slices.DeleteFunc(names, func(n string) bool { return n == "sallyport.db.lock" }), slices.DeleteFunc(want, func(n string) bool { return n == "sallyport.db.lock" })) {
		t.Errorf("the gateway's directory holds %v", names)
	}
	if got["identity/key.pem"] != "the gateway's key" {
		t.Errorf("the key is %q", got["identity/key.pem"])
	}
	for name, mode := range map[string]fs.FileMode{"identity/key.pem": 0o600, "api-tls/cert.pem": 0o644} {
		if st, err := os.Stat(filepath.Join(fresh.Gateway, name)); err != nil || st.Mode().Perm() != mode {
			t.Errorf("%s has mode %v, %v", name, st.Mode(), err)
		}
	}
	if got := tree(t, fresh.PKI); got["root.key"] != "the root's key" || len(got) != 4 {
		t.Errorf("the authority's directory holds %v", got)
	}
}

// TestMistakesLeaveNothing: no directory in a mistyped SALLYPORT_DATA, for a file that
// is none and a passphrase that is another one.
func TestMistakesLeaveNothing(t *testing.T) {
	file, _ := backedUp(t, live(t))
	text := filepath.Join(t.TempDir(), "text")
	put(t, text, "no backup, though long enough for one", 0o600)
	fresh, errNobody := newPlace(t), errors.New("nobody is there to ask")
	for name, c := range map[string]struct {
		file string
		ask  func() ([]byte, error)
		want error
	}{
		"no file":          {file + "x", ask, fs.ErrNotExist},
		"no backup":        {text, ask, ErrNoBackup},
		"no passphrase":    {file, func() ([]byte, error) { return nil, errNobody }, errNobody},
		"wrong passphrase": {file, func() ([]byte, error) { return []byte("correct horse battery stapler"), nil }, sealed.ErrOpen},
	} {
		if r, err := Restore(t.Context(), fresh, c.file, c.ask); !errors.Is(err, c.want) {
			t.Errorf("%s: %+v, %v, want %v", name, r, err, c.want)
		}
		if made, err := os.ReadDir(filepath.Dir(fresh.Gateway)); err != nil || len(made) != 0 {
			t.Errorf("%s: it made %v, %v", name, made, err)
		}
	}
}

func TestRestoreOverWhatIsThere(t *testing.T) {
	p := live(t)
	file, _ := backedUp(t, p)
	put(t, filepath.Join(p.Gateway, "identity", "later.pem"), "made after the backup", 0o600)
	put(t, filepath.Join(p.PKI, "revocations.json"), revocations(9), 0o600)
	for generation := int64(2); generation < 4; generation++ {
		r, err := Restore(t.Context(), p, file, ask)
		if err != nil || r.Generation != generation || r.Previous == "" {
			t.Fatalf("restored %+v, %v", r, err)
		}
		if _, err := os.Stat(r.Previous); err != nil {
			t.Error(err)
		}
	}
	got := tree(t, p.Gateway)
	if _, there := got["identity/later.pem"]; there {
		t.Error("two states of the identity are mixed")
	}
	kept := 0
	for name, text := range got {
		if strings.HasPrefix(name, keptPrefix) && text == "made after the backup" {
			kept++
		}
	}
	if kept != 1 {
		t.Errorf("what was there is kept %d times", kept)
	}
	if b, err := os.ReadFile(filepath.Join(p.PKI, "revocations.json")); err != nil || string(b) != revocations(9) {
		t.Errorf("the newer revocation set is lost: %s, %v", b, err)
	}
	if err := Interrupted(p); err != nil {
		t.Error(err)
	}
}

// TestWhatWasThereIsTheOwners: the user that the gateway runs as can remove what
// a restoration by root kept.
func TestWhatWasThereIsTheOwners(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root gives files away")
	}
	p := live(t)
	file, _ := backedUp(t, p)
	const user = 65534
	for _, dir := range []string{filepath.Dir(p.Gateway), p.Gateway, p.PKI} {
		if err := os.Chown(dir, user, user); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Restore(t.Context(), p, file, ask); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{p.Gateway, p.PKI} {
		kept, err := filepath.Glob(filepath.Join(dir, keptPrefix+"*Z"))
		if err != nil || len(kept) != 1 {
			t.Fatalf("kept in %s: %v, %v", dir, kept, err)
		}
		if st, err := os.Stat(kept[0]); err != nil || st.Sys().(*syscall.Stat_t).Uid != user {
			t.Errorf("%s is not the user's, %v", kept[0], err)
		}
	}
}

// TestRestoredIsTheGateways: what root restores is the user's who owns the
// gateway's directory, also where the one above is root's.
func TestRestoredIsTheGateways(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root gives files away")
	}
	p := live(t)
	file, _ := backedUp(t, p)
	const user = 65534
	precious := filepath.Join(t.TempDir(), "precious")
	put(t, precious, "root's", 0o600)
	lock := p.Database + ".lock"
	if err := errors.Join(os.Chown(p.Gateway, user, user), os.Chown(p.PKI, user, user), os.Remove(lock), os.Symlink(precious, lock)); err != nil {
		t.Fatal(err)
	}
	if _, err := Restore(t.Context(), p, file, ask); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{p.Database, filepath.Join(p.Gateway, "identity"), filepath.Join(p.PKI, "root.key")} {
		if st, err := os.Stat(name); err != nil || st.Sys().(*syscall.Stat_t).Uid != user {
			t.Errorf("%s is not the user's, %v", name, err)
		}
	}
	if st, err := os.Stat(precious); err != nil || st.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Errorf("what a link of the user's leads to is %v, %v", st, err)
	}
}

func TestAnAuthorityThatIsAnotherKeepsNoRevocations(t *testing.T) {
	p := live(t)
	file, _ := backedUp(t, p)
	put(t, filepath.Join(p.PKI, "intermediate.pem"), "another issuer", 0o600)
	put(t, filepath.Join(p.PKI, "revocations.json"), revocations(9), 0o600)
	if _, err := Restore(t.Context(), p, file, ask); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(p.PKI, "revocations.json")); err != nil || string(b) != revocations(3) {
		t.Errorf("%s, %v", b, err)
	}
}

// TestRevocationsOfAnIssuerThatChanged: a change of the root, and an external CA
// that issues from another intermediate, leave another file of the issuer; what
// was revoked since the backup stays revoked.
func TestRevocationsOfAnIssuerThatChanged(t *testing.T) {
	ca, p := identitytest.NewCA(t), live(t)
	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Root.Raw})
	put(t, filepath.Join(p.PKI, "root.pem"), string(root), 0o600)
	put(t, filepath.Join(p.PKI, "trust-domain"), ca.TrustDomain+"\n", 0o600)
	sealed := func(ca *identitytest.CA, n int64) string {
		b, err := json.Marshal(ca.Revoke(t, n))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	put(t, filepath.Join(p.PKI, "revocations.json"), sealed(ca, 3), 0o600)
	file, _ := backedUp(t, p)
	for _, c := range []struct {
		set  string
		kept bool
	}{
		// These are no sets of that authority, and would keep it from opening.
		{sealed(identitytest.NewCA(t), 9), false},
		{sealed(ca.Beside(t), 9), false},
		{sealed(ca, 9), true},
	} {
		put(t, filepath.Join(p.PKI, "intermediate.pem"), "the issuer's next certificate", 0o600)
		put(t, filepath.Join(p.PKI, "revocations.json"), c.set, 0o600)
		if _, err := Restore(t.Context(), p, file, ask); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(filepath.Join(p.PKI, "revocations.json")); err != nil || (string(b) == c.set) != c.kept {
			t.Errorf("kept %t, want %t: %s, %v", !c.kept, c.kept, b, err)
		}
	}
}

func TestADatabaseAlone(t *testing.T) {
	p := live(t)
	file, _ := backedUp(t, p)
	r, err := Restore(t.Context(), p, file, ask)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Restore(t.Context(), p, r.Previous, func() ([]byte, error) { return nil, errors.New("asked for a passphrase") })
	if err != nil || again.Authority || again.Identity || again.Generation != 3 {
		t.Errorf("restored %+v, %v", again, err)
	}
}

// Whoever goes back to an older version restores a backup that it made, over a
// database that it cannot read: nodes obey that only with a generation above all
// that they have seen.
func TestBackToAnOlderVersion(t *testing.T) {
	p := live(t)
	file, _ := backedUp(t, p)
	for range 3 {
		if _, err := Restore(t.Context(), p, file, ask); err != nil {
			t.Fatal(err)
		}
	}
	db, err := sql.Open("sqlite", p.Database)
	if err == nil {
		_, err = db.ExecContext(t.Context(), "INSERT INTO goose_db_version (version_id, is_applied) VALUES (1000000, 1)")
	}
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	newer := filepath.Join(t.TempDir(), "newer")
	b, err := os.ReadFile(p.Database)
	if err != nil {
		t.Fatal(err)
	}
	put(t, newer, string(b), 0o600)
	if _, err := Restore(t.Context(), p, newer, ask); !errors.Is(err, sqldb.ErrNewer) || errors.Is(err, ErrNoBackup) {
		t.Errorf("a database of a newer version: %v", err)
	}
	if r, err := Restore(t.Context(), p, file, ask); err != nil || r.Generation != 5 {
		t.Errorf("restored over a newer version's: %+v, %v", r, err)
	}
}

func TestInUse(t *testing.T) {
	p := live(t)
	file, _ := backedUp(t, p)
	for _, dir := range []string{p.Gateway, p.PKI} {
		lock, err := lockdir.Acquire(dir)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Restore(t.Context(), p, file, ask); !errors.Is(err, lockdir.ErrLocked) {
			t.Errorf("%s is in use: %v", dir, err)
		}
		if err := lock.Release(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestStopped: who stops a restoration is not told that the backup is none.
func TestStopped(t *testing.T) {
	p := live(t)
	file, _ := backedUp(t, p)
	ctx, stop := context.WithCancelCause(t.Context())
	defer stop(nil)
	why := errors.New("interrupted")
	r, err := Restore(ctx, p, file, func() ([]byte, error) { stop(why); return ask() })
	if !errors.Is(err, why) || errors.Is(err, ErrNoBackup) {
		t.Errorf("restored %+v, %v", r, err)
	}
	if r, err = Restore(t.Context(), p, file, ask); err != nil || r.Generation != 2 {
		t.Errorf("begun again: %+v, %v", r, err)
	}
}

// TestProgress: who looks on is told of each byte, of a restoration from the passphrase
// on, and sees the end.
func TestProgress(t *testing.T) {
	p := live(t)
	var last, of int64
	asked, early := false, false
	p.Watch = func(done, total int64) {
		if done < last || done > total || early && !asked {
			t.Errorf("%d of %d after %d, asked: %t", done, total, last, asked)
		}
		last, of = done, total
	}
	file, _ := backedUp(t, p)
	if last == 0 || last != of {
		t.Errorf("the backup ended at %d of %d", last, of)
	}
	st, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	last, early = 0, true
	if _, err := Restore(t.Context(), p, file, func() ([]byte, error) { asked = true; return ask() }); err != nil {
		t.Fatal(err)
	}
	if last != st.Size() || of != last {
		t.Errorf("the restoration of %d bytes ended at %d of %d", st.Size(), last, of)
	}
}

// TestStoppedOnTheWay: neither waits for the end of what may be many gigabytes.
func TestStoppedOnTheWay(t *testing.T) {
	p := live(t)
	file, _ := backedUp(t, p)
	dest := filepath.Join(t.TempDir(), "b")
	for name, run := range map[string]func(ctx context.Context, p Place) error{
		"backup":  func(ctx context.Context, p Place) error { _, err := Create(ctx, p, dest, "test", pass); return err },
		"restore": func(ctx context.Context, p Place) error { _, err := Restore(ctx, p, file, ask); return err },
	} {
		ctx, stop := context.WithCancelCause(t.Context())
		defer stop(nil)
		why, watched := errors.New("interrupted"), p
		watched.Watch = func(done, total int64) {
			if done > total/2 {
				stop(why)
			}
		}
		if err := run(ctx, watched); !errors.Is(err, why) || errors.Is(err, ErrNoBackup) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if left := tree(t, filepath.Dir(dest)); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestCutOff(t *testing.T) {
	p := live(t)
	file, _ := backedUp(t, p)
	put(t, p.marker(), "7\n", 0o600)
	if err := Interrupted(p); !errors.Is(err, ErrInterrupted) {
		t.Errorf("%v", err)
	}
	r, err := Restore(t.Context(), p, file, ask)
	if err != nil || r.Generation != 8 || Interrupted(p) != nil {
		t.Errorf("restored %+v, %v, %v", r, err, Interrupted(p))
	}
}

// What was revoked after the backup is kept too when the restoration was cut off
// while the authority was put aside, and begun anew.
func TestCutOffBetweenIssuerAndRevocations(t *testing.T) {
	for name, moved := range map[string][]string{"issuer": {"intermediate.pem"}, "both": {"intermediate.pem", "revocations.json"}} {
		p := live(t)
		file, _ := backedUp(t, p)
		put(t, filepath.Join(p.PKI, "revocations.json"), revocations(9), 0o600)
		old := filepath.Join(p.PKI, keptPrefix+"1") // of another authority, years ago
		put(t, filepath.Join(old, "intermediate.pem"), "another issuer", 0o600)
		put(t, filepath.Join(old, "revocations.json"), revocations(99), 0o600)
		put(t, p.marker(), "7\n", 0o600)
		if err := os.Mkdir(filepath.Join(p.PKI, keptPrefix+"2"), 0o700); err != nil {
			t.Fatal(err)
		}
		for _, m := range moved {
			if err := os.Rename(filepath.Join(p.PKI, m), filepath.Join(p.PKI, keptPrefix+"2", m)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := Restore(t.Context(), p, file, ask); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(filepath.Join(p.PKI, "revocations.json")); err != nil || string(b) != revocations(9) {
			t.Errorf("%s: %s, %v", name, b, err)
		}
	}
}

func TestWhatWasKilledIsTidiedUp(t *testing.T) {
	p := live(t)
	stale := []string{filepath.Join(p.Gateway, "restore.tmp"), filepath.Join(p.PKI, "restore.tmp"), p.Database + ".restoring", filepath.Join(p.Gateway, "backup.tmp")}
	leave := func() {
		put(t, filepath.Join(stale[0], "identity", "key.pem"), "a key", 0o600)
		put(t, filepath.Join(stale[1], "root.key"), "a key", 0o600)
		put(t, stale[2], "a database", 0o600)
		put(t, filepath.Join(stale[3], "database"), "a database", 0o600)
	}
	leave()
	if err := Tidy(p); err != nil {
		t.Fatal(err)
	}
	for _, path := range stale {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there: %v", path, err)
		}
	}
	if _, err := os.Stat(filepath.Join(p.PKI, "root.key")); err != nil {
		t.Error(err)
	}
	// A backup that runs keeps what it works with.
	leave()
	running, err := lockdir.Acquire(stale[3])
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = running.Release() }()
	if err := Tidy(p); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(stale[3], "database")); err != nil {
		t.Error(err)
	}
}

func TestABackupOverwritesNothing(t *testing.T) {
	p := live(t)
	file, _ := backedUp(t, p)
	if _, err := Create(t.Context(), p, file, "test", pass); !errors.Is(err, fs.ErrExist) {
		t.Errorf("%v", err)
	}
	if _, err := Create(t.Context(), newPlace(t), file+"2", "test", pass); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of nothing: %v", err)
	}
	if _, err := os.Stat(file + "2"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("half a backup is left: %v", err)
	}
}

// TestABackupHasItsNameWhenItIsWhole: until then it has another, which the next one
// takes over if it was cut off and is ours.
func TestABackupHasItsNameWhenItIsWhole(t *testing.T) {
	p := live(t)
	file := filepath.Join(t.TempDir(), "b")
	cutOff := file + partial
	d, err := begin(file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteString(strings.Repeat("half ", 100_000)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(file); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("half a backup has its name: %v", err)
	}
	if _, err := Create(t.Context(), p, file, "test", pass); err == nil || !strings.Contains(err.Error(), "another backup writes") {
		t.Errorf("while another is written: %v", err)
	}
	if st, err := d.Stat(); err != nil || st.Size() != 500_000 {
		t.Errorf("the other holds %d bytes, %v", st.Size(), err)
	}
	if err := d.Close(); err != nil { // as a kill does it
		t.Fatal(err)
	}
	if _, err := Create(t.Context(), p, file, "test", pass); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(cutOff); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what was cut off is there still: %v", err)
	}
	if _, err := Restore(t.Context(), p, file, ask); err != nil {
		t.Error(err)
	}
	precious := filepath.Join(t.TempDir(), "precious")
	put(t, precious, "precious", 0o600)
	for what, lay := range map[string]func(string, string) error{"a symbolic link": os.Symlink, "a link": os.Link, "a pipe": func(_, name string) error { return syscall.Mkfifo(name, 0o600) }} {
		other := filepath.Join(t.TempDir(), "b")
		if err := lay(precious, other+partial); err != nil {
			t.Fatal(err)
		}
		if _, err := Create(t.Context(), p, other, "test", pass); err == nil {
			t.Errorf("%s was taken for a backup that was cut off", what)
		}
		if _, err := os.Stat(other); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: a backup is there: %v", what, err)
		}
	}
	if b, err := os.ReadFile(precious); string(b) != "precious" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	d, err = begin(file + "2")
	if err != nil {
		t.Fatal(err)
	}
	put(t, file+"2", "another's", 0o600)
	if err := d.finish(); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a file that came meanwhile: %v", err)
	}
	if err := d.close(); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(file + "2"); string(b) != "another's" || err != nil {
		t.Errorf("it holds %q, %v", b, err)
	}
}

// hostile makes an archive by hand, sealed under the right passphrase.
func hostile(t *testing.T, headers ...*tar.Header) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "b")
	out, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	w, err := sealed.NewWriter(out, pass, sealed.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	a := tar.NewWriter(w)
	for _, h := range headers {
		text := []byte("{\"format\":1}")
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(text))
		}
		h.Mode = 0o777
		if err := a.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := a.Write(text); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := errors.Join(a.Close(), w.Close(), out.Close()); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestRefused(t *testing.T) {
	p := live(t)
	file, _ := backedUp(t, p)
	before := tree(t, filepath.Dir(p.Gateway))
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	cut := filepath.Join(t.TempDir(), "cut")
	put(t, cut, string(b[:len(b)-1]), 0o600)
	short := filepath.Join(t.TempDir(), "short") // whole chunks, but not the last
	put(t, short, string(b[:len(b)/2]), 0o600)
	text := filepath.Join(t.TempDir(), "text")
	put(t, text, "no backup", 0o600)
	foreign := filepath.Join(t.TempDir(), "foreign") // a database, but not of a gateway
	db, err := sql.Open("sqlite", foreign)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.ExecContext(t.Context(), "CREATE TABLE shopping (item TEXT)"); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	reg := func(name string) *tar.Header { return &tar.Header{Name: name, Typeflag: tar.TypeReg} }
	for name, f := range map[string]struct {
		file string
		want error
	}{
		"cut off":       {cut, sealed.ErrOpen},
		"half":          {short, sealed.ErrOpen},
		"text":          {text, ErrNoBackup},
		"foreign":       {foreign, ErrNoBackup},
		"empty":         {hostile(t), ErrNoBackup},
		"no database":   {hostile(t, reg(nameManifest)), ErrNoBackup},
		"not SQLite":    {hostile(t, reg(nameManifest), reg(nameDatabase)), ErrNoBackup},
		"outside":       {hostile(t, reg(nameManifest), reg("gateway/../../evil")), ErrNoBackup},
		"absolute":      {hostile(t, reg(nameManifest), reg("/etc/evil")), ErrNoBackup},
		"a link":        {hostile(t, reg(nameManifest), &tar.Header{Name: "pki/x", Linkname: "/etc/passwd", Typeflag: tar.TypeSymlink}), ErrNoBackup},
		"the marker":    {hostile(t, reg(nameManifest), reg("gateway/restoring")), ErrNoBackup},
		"twice":         {hostile(t, reg(nameManifest), reg("pki/x"), reg("pki/./x")), ErrNoBackup},
		"another place": {hostile(t, reg(nameManifest), reg("node/x")), ErrNoBackup},
	} {
		if _, err := Restore(t.Context(), p, f.file, ask); !errors.Is(err, f.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Restore(t.Context(), p, file, func() ([]byte, error) { return []byte("another passphrase"), nil }); !errors.Is(err, sealed.ErrOpen) || errors.Is(err, ErrNoBackup) {
		t.Errorf("wrong passphrase: %v", err)
	}
	after := tree(t, filepath.Dir(p.Gateway))
	for _, m := range []map[string]string{before, after} {
		maps.DeleteFunc(m, func(name, _ string) bool { return strings.HasSuffix(name, "lock") })
	}
	if !maps.Equal(before, after) {
		t.Errorf("something was changed: %v, %v", slices.Sorted(maps.Keys(before)), slices.Sorted(maps.Keys(after)))
	}
}

func TestSnapshotOfWhatChanges(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "a"), "one", 0o600)
	n := 0
	changing := func(string) bool { // each look finds another state
		n++
		put(t, filepath.Join(dir, "a"), strings.Repeat("x", n), 0o600)
		return false
	}
	if _, err := snapshot(dir, changing); !errors.Is(err, errRestless) {
		t.Errorf("%v", err)
	}
	linked := filepath.Join(t.TempDir(), "link")
	if err := errors.Join(os.Symlink(dir, linked), os.Symlink(filepath.Join(dir, "a"), filepath.Join(dir, "b"))); err != nil {
		t.Fatal(err)
	}
	got, err := snapshot(linked, func(string) bool { return false })
	if err != nil || len(got) != 2 || len(got[1].data) == 0 || !got[1].mode.IsRegular() {
		t.Errorf("%v, %v", got, err)
	}
}
