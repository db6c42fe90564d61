package policy

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"sallyport/internal/atomicfile"
)

// originals remembers what stood at each path before the first policy came. It
// belongs to the path, not to the policy: one policy may follow another.
type originals struct {
	dir  string
	have map[string]snapshot
}

func openOriginals(dir string) (*originals, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	o := &originals{dir: dir, have: map[string]snapshot{}}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, entry := range entries {
		if !strings.HasSuffix(entry.Name(), ".json") {
			continue // a temporary file that a crash left
		}
		var s snapshot
		if err := loadJSON(filepath.Join(dir, entry.Name()), &s); err != nil {
			return nil, err
		}
		o.have[s.Path] = s
	}
	return o, nil
}

func (o *originals) file(path string) string {
	sum := sha256.Sum256([]byte(path))
	return filepath.Join(o.dir, hex.EncodeToString(sum[:16])+".json")
}

func (o *originals) get(path string) (snapshot, bool) {
	s, ok := o.have[path]
	return s, ok
}

// add saves s unless its path is known.
func (o *originals) add(s snapshot) error {
	if _, ok := o.have[s.Path]; ok {
		return nil
	}
	if err := atomicfile.WriteJSON(o.file(s.Path), s); err != nil {
		return err
	}
	o.have[s.Path] = s
	return nil
}

// created notes directories that were made for a path.
func (o *originals) created(path string, dirs []string) error {
	s, ok := o.have[path]
	if !ok {
		return nil
	}
	s.Created = append(s.Created, dirs...)
	o.have[path] = s
	return atomicfile.WriteJSON(o.file(path), s)
}

// restored forgets a path that is as it was found, with the directories made
// for it.
func (o *originals) restored(path string) error {
	s, ok := o.have[path]
	if !ok {
		return nil
	}
	prune(s.Created)
	if err := os.Remove(o.file(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	delete(o.have, path)
	return nil
}

// journal is on disk while files are being swapped. Found at a start, it says
// what to put back.
type journal struct {
	Policy string     `json:"policy"`
	Undo   []snapshot `json:"undo"`
	Reload []string   `json:"reload,omitempty"`
}

func (e *Engine) journalFile() string { return filepath.Join(e.cfg.Dir, "journal.json") }

func (e *Engine) journal(name string, undo []snapshot, reload []string) error {
	return atomicfile.WriteJSON(e.journalFile(), journal{Policy: name, Undo: undo, Reload: reload})
}

// rollback puts back what the journal names, and lets the service see it. A
// path that no policy owns gets what stood there before the first one: after a
// crash behind the commit it is a path that the policy gave up.
func (e *Engine) rollback(ctx context.Context) error {
	var j journal
	err := loadJSON(e.journalFile(), &j)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for i := len(j.Undo) - 1; i >= 0; i-- {
		undo := j.Undo[i]
		if original, ok := e.originals.get(undo.Path); ok && !e.ownedByOther(undo.Path, "") {
			undo = original
		}
		if _, err := write(undo); err != nil {
			return err
		}
	}
	if err := e.command(ctx, "reload", j.Reload); err != nil {
		e.cfg.Log.Warn("reload after putting back files", "policy", j.Policy, "error", err)
	}
	if err := atomicfile.Remove(e.journalFile()); err != nil {
		return err
	}
	for _, undo := range j.Undo {
		if !e.ownedByOther(undo.Path, "") {
			if err := e.originals.restored(undo.Path); err != nil {
				e.cfg.Log.Warn("forget a saved file", "path", undo.Path, "error", err)
			}
		}
	}
	return nil
}

// finish puts back what an attempt left that could not be rolled back then: the
// journal is the only one that knows it, and there is one journal.
func (e *Engine) finish(ctx context.Context) error {
	if err := e.rollback(context.WithoutCancel(ctx)); err != nil {
		return fmt.Errorf("put back what an earlier attempt left: %w", err)
	}
	return nil
}

func loadJSON(file string, v any) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s is damaged: %w (move it away to go on without: what policies replaced is then not put back when they go)", file, err)
	}
	return nil
}
