package backup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
)

const (
	// maxTree bounds what the small files of one directory take together, in
	// bytes: keys, certificates and a revocation set. All of it is read into
	// memory, so that it is of one moment.
	maxTree = 256 << 20
	// settleTries is how often a directory that changes under our hands is
	// read again.
	settleTries = 20
)

// entry is one file or directory below a tree.
type entry struct {
	name string // relative, in the form of this system
	mode fs.FileMode
	data []byte

	size     int64
	modified time.Time
}

var errRestless = errors.New("its files change all the time: try again later")

// snapshot reads a directory as it was at one moment: its files are replaced
// by renaming while we read, and a key must be of the same moment as its
// certificate.
func snapshot(dir string, leaveOut func(rel string) bool) ([]entry, error) {
	root, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, err
	}
	before, err := list(root, leaveOut)
	if err != nil {
		return nil, err
	}
	for range settleTries {
		err := load(root, before)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		after, listErr := list(root, leaveOut)
		if listErr != nil {
			return nil, listErr
		}
		if err == nil && slices.EqualFunc(before, after, entry.same) {
			return before, nil
		}
		before = after
	}
	return nil, fmt.Errorf("%s: %w", dir, errRestless)
}

func (e entry) same(o entry) bool {
	return e.name == o.name && e.mode == o.mode && e.size == o.size && e.modified.Equal(o.modified)
}

// list walks a tree. A link to a file is taken for the file: an operator may
// have put the API's certificate somewhere else.
func list(root string, leaveOut func(rel string) bool) ([]entry, error) {
	var out []entry
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist) && path != root:
			return nil // it went while we looked
		case err != nil:
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil || rel == "." {
			return err
		}
		if leaveOut(rel) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		st, err := os.Stat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return err
		case st.Mode().IsRegular():
			out = append(out, entry{name: rel, mode: st.Mode(), size: st.Size(), modified: st.ModTime()})
		case d.IsDir():
			out = append(out, entry{name: rel, mode: st.Mode()})
		}
		return nil
	})
	return out, err
}

// load reads the files of a list.
func load(root string, entries []entry) error {
	var total int64
	for i := range entries {
		e := &entries[i]
		if e.mode.IsDir() {
			continue
		}
		if total += e.size; total > maxTree {
			return fmt.Errorf("%s holds more than %d MiB beside the database: what is it? (%s)", root, maxTree>>20, e.name)
		}
		b, err := os.ReadFile(filepath.Join(root, e.name))
		if err != nil {
			return err
		}
		e.data = b
	}
	return nil
}
