package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"sallyport/internal/atomicfile"
)

// saveFile replaces a file atomically; it is on disk, name included, when it
// returns.
func saveFile(file string, b []byte) error {
	if err := atomicfile.Write(file, b, 0o600); err != nil {
		return err
	}
	return syncDir(filepath.Dir(file))
}

func saveJSON(file string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return saveFile(file, b)
}

// loadJSON leaves v alone when there is no file.
func loadJSON(file string, v any) error {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s is damaged: %w (move it away to go on without)", file, err)
	}
	return nil
}

func removeFile(file string) error {
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(filepath.Dir(file))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return err
}
