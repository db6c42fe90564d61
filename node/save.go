package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

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
