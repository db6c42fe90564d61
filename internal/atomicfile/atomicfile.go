// Package atomicfile replaces files as a whole, and has them on disk.
//
// The new file is written beside the old one. Elsewhere, as in the directory for
// temporary files that renameio prefers, a crash would leave half a file, which
// may be a key, out of the reach of whoever guards SALLYPORT_DATA.
package atomicfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
)

// Write replaces a file, or makes it with a mode that the umask narrows: after a
// crash it holds the old bytes or, once Write has returned, the new ones. The mode
// of a file that is there stays.
func Write(name string, b []byte, mode fs.FileMode) error {
	return write(name, b, mode)
}

// WriteExactly is Write with a mode that no umask narrows.
func WriteExactly(name string, b []byte, mode fs.FileMode) error {
	return write(name, b, mode, renameio.WithStaticPermissions(mode))
}

func write(name string, b []byte, mode fs.FileMode, opts ...renameio.Option) error {
	dir := filepath.Dir(name)
	if err := renameio.WriteFile(name, b, mode, append(opts, renameio.WithTempDir(dir))...); err != nil {
		return err
	}
	return SyncDir(dir)
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
