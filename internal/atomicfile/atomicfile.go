// Package atomicfile replaces files as a whole.
//
// The new file is written beside the old one. Elsewhere, as in the directory for
// temporary files that renameio prefers, a crash would leave half a file, which
// may be a key, out of the reach of whoever guards SALLYPORT_DATA.
package atomicfile

import (
	"io/fs"
	"path/filepath"

	"github.com/google/renameio/v2"
)

// Write replaces a file, or makes it with a mode that the umask narrows: after a
// crash it holds the old bytes or the new ones. The mode of a file that is there
// stays. Its name is on disk when its directory is synced.
func Write(name string, b []byte, mode fs.FileMode) error {
	return renameio.WriteFile(name, b, mode, beside(name))
}

// WriteExactly is Write with a mode that no umask narrows.
func WriteExactly(name string, b []byte, mode fs.FileMode) error {
	return renameio.WriteFile(name, b, mode, beside(name), renameio.WithStaticPermissions(mode))
}

func beside(name string) renameio.Option { return renameio.WithTempDir(filepath.Dir(name)) }
