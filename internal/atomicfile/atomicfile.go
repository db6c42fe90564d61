// Package atomicfile replaces files as a whole, and has them on disk.
//
// The new file is written beside the old one. Elsewhere, as in the directory for
// temporary files that renameio prefers, a crash would leave half a file, which
// may be a key, out of the reach of whoever guards SALLYPORT_DATA.
package atomicfile

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"syscall"

	"github.com/google/renameio/v2"
)

// Write replaces a file, or makes it with a mode that the umask narrows: after a
// crash it holds the old bytes or, once Write has returned, the new ones. The mode
// of a file that is there stays.
func Write(name string, b []byte, mode fs.FileMode) error {
	return write(name, b, renameio.WithPermissions(mode), false)
}

// WriteExactly is Write with a mode that no umask narrows.
func WriteExactly(name string, b []byte, mode fs.FileMode) error {
	return write(name, b, renameio.WithStaticPermissions(mode), false)
}

// WriteForOwner is WriteExactly for the directory of a service that has a user of
// its own: where root writes, the file is that user's before it has its name.
func WriteForOwner(name string, b []byte, mode fs.FileMode) error {
	return write(name, b, renameio.WithStaticPermissions(mode), true)
}

func write(name string, b []byte, mode renameio.Option, forOwner bool) (err error) {
	dir := filepath.Dir(name)
	f, err := renameio.NewPendingFile(name, renameio.WithTempDir(dir), renameio.WithExistingPermissions(), mode)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Cleanup()) }()
	if forOwner {
		if err := OwnedLike(f.File, dir); err != nil {
			return err
		}
	}
	if _, err := f.Write(b); err != nil {
		return err
	}
	if err := f.CloseAtomicallyReplace(); err != nil {
		return err
	}
	return SyncDir(dir)
}

// WriteJSON is Write for a value, with mode 0600.
func WriteJSON(name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return Write(name, b, 0o600)
}

// Remove removes a file, if it is there: one that came back after a crash would
// undo what was meant.
func Remove(name string) error {
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return SyncDir(filepath.Dir(name))
}

// OwnedLike gives what root has opened to the owner of a directory, if that is another.
func OwnedLike(f *os.File, dir string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	st, err := os.Stat(dir)
	if err != nil {
		return err
	}
	owner, ok := st.Sys().(*syscall.Stat_t)
	if !ok || owner.Uid == 0 {
		return nil
	}
	return f.Chown(int(owner.Uid), int(owner.Gid))
}

// SyncDir makes what was named, renamed and removed in a directory survive a power
// cut.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync directory %s: %w", dir, err)
	}
	return nil
}

// leftOver is the name of a file that was not renamed yet: what renameio puts behind
// that of the file is a random number of up to 19 digits.
var leftOver = regexp.MustCompile(`^\..+[0-9]{12}$`)

// Tidy removes what a process that was killed left of files that it replaced, in dir
// and below: there may be keys and join codes in it, and nobody else would. It is for
// who has the directory alone: whoever replaces a file in it just then (an operator's
// command beside the authority, say) is told that it failed. What cannot be removed
// stays until the next time.
func Tidy(dir string) {
	root, err := os.OpenRoot(dir) // by names alone, links could lead out of it
	if err != nil {
		return
	}
	defer func() { _ = root.Close() }()
	_ = fs.WalkDir(root.FS(), ".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && leftOver.MatchString(d.Name()) {
			_ = root.Remove(path)
		}
		return nil //nolint:nilerr // see above
	})
}
