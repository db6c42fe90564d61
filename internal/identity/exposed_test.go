package identity

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestWarnExposed(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"fine.key": 0o600, "group.key": 0o640, "open.key": 0o644, "open.pem": 0o644} {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	WarnExposed(slog.New(slog.NewTextHandler(&out, nil)), filepath.Join(dir, "*.key"))
	if s := out.String(); strings.Count(s, "WARN") != 2 || !strings.Contains(s, "group.key") || !strings.Contains(s, "open.key mode=-rw-r--r--") {
		t.Error(s)
	}
}
