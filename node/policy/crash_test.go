package policy

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"sallyport/internal/wire"
)

// TestFilesCrashAfterCommit: the process dies when a version that drops a path
// is recorded and the journal is still there. What stood at the dropped path
// before the first policy must not be forgotten.
func TestFilesCrashAfterCommit(t *testing.T) {
	h := newHost(t)
	h.write("a", "old a", 0o600)
	v1 := h.files("p", wire.FilesSpec{Files: []wire.FileSpec{h.file("a", "new"), h.file("b", "new")}})
	v2 := h.files("p", wire.FilesSpec{Files: []wire.FileSpec{h.file("b", "newer"), h.file("c", "newer")}, Reload: []string{"/bin/true"}})
	state(t, h.apply(v1)["p"], wire.PolicyApplied, "")
	var journal []byte
	h.run = func(context.Context, []string) (Output, error) {
		var err error
		journal, err = os.ReadFile(h.e.journalFile())
		return Output{}, err
	}
	originals := filepath.Join(t.TempDir(), "originals")
	if err := os.CopyFS(originals, os.DirFS(filepath.Join(h.cfg.Dir, "originals"))); err != nil {
		t.Fatal(err)
	}
	state(t, h.apply(v2)["p"], wire.PolicyApplied, "")
	h.want(map[string]string{"a": "600 old a", "b": "644 newer", "c": "644 newer"})
	// What a kill -9 right after the commit leaves: the journal, and what was
	// saved of the dropped path.
	h.run = nil
	if err := os.WriteFile(h.e.journalFile(), journal, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(h.cfg.Dir, "originals", filepath.Base(h.e.originals.file(filepath.Join(h.etc, "a"))))); err != nil {
		t.Fatal(err)
	}
	saved, err := os.ReadFile(filepath.Join(originals, filepath.Base(h.e.originals.file(filepath.Join(h.etc, "a")))))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(h.e.originals.file(filepath.Join(h.etc, "a")), saved, 0o600); err != nil {
		t.Fatal(err)
	}
	h.open()
	state(t, h.apply(v2)["p"], wire.PolicyApplied, "")
	h.want(map[string]string{"a": "600 old a", "b": "644 newer", "c": "644 newer"})
	h.apply()
	h.want(map[string]string{"a": "600 old a"})
}

// TestFilesRollbackFails: what could not be put back is neither forgotten nor
// taken for the original by the next attempt.
func TestFilesRollbackFails(t *testing.T) {
	h := newHost(t)
	h.write("a", "old a", 0o600)
	h.write("b", "old b", 0o600)
	p := h.files("p", wire.FilesSpec{Files: []wire.FileSpec{h.file("a", "new"), h.file("b", "new")}, Validate: []string{"/bin/true"}})
	a := filepath.Join(h.etc, "a")
	h.run = func(context.Context, []string) (Output, error) { // a directory in its place: rename fails
		return Output{}, errors.Join(errors.New("broken"), os.Remove(a), os.Mkdir(a, 0o755))
	}
	state(t, h.apply(p)["p"], wire.PolicyFailed, "put back")
	if err := errors.Join(os.Remove(a), os.WriteFile(a, []byte("new"), 0o644)); err != nil {
		t.Fatal(err)
	}
	h.run = nil
	state(t, h.apply(p)["p"], wire.PolicyApplied, "")
	h.want(map[string]string{"a": "644 new", "b": "644 new"})
	h.apply()
	h.want(map[string]string{"a": "600 old a", "b": "600 old b"})
}
