package identity

import (
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
)

// Exposed tells whether the mode of a file lets others than its owner at it, and
// what the mode is. Of a file that cannot be looked at nothing is said.
func Exposed(file string) (mode fs.FileMode, exposed bool) {
	st, err := os.Stat(file)
	if err != nil {
		return 0, false
	}
	return st.Mode().Perm(), st.Mode().Perm()&0o077 != 0
}

// WarnExposed names the key files of a pattern that others may read. They are used
// all the same: a fleet that does not start after its files were copied with
// another mode helps nobody, and what was read has been read.
func WarnExposed(log *slog.Logger, pattern string) {
	files, _ := filepath.Glob(pattern) // a bad pattern finds nothing
	for _, file := range files {
		if mode, exposed := Exposed(file); exposed {
			log.Warn("others than its owner may read a key: chmod 600, and replace the key if somebody may have", "file", file, "mode", mode.String())
		}
	}
}
