package doctor

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestOwners(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root gives files away")
	}
	const user = 65534
	dir := t.TempDir()
	inside := filepath.Join(dir, "identity")
	if err := os.Mkdir(inside, 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, inside, "key.pem", "")
	if got := Owners(dir, filepath.Join(dir, "gone")); got != nil {
		t.Errorf("root's own: %+v", got)
	}
	for _, name := range []string{dir, inside} {
		if err := os.Chown(name, user, user); err != nil {
			t.Fatal(err)
		}
	}
	if got := Owners(dir); len(got) != 1 || got[0].OK || !strings.Contains(got[0].Detail, "key.pem belongs to the user with uid 0") || !strings.Contains(got[0].Fix, "chown -R --reference="+dir) {
		t.Errorf("root's file in a service's directory: %+v", got)
	}
	if err := os.Chown(filepath.Join(inside, "key.pem"), user, user); err != nil {
		t.Fatal(err)
	}
	// What is root's and has to be: a code that the service's group may read, and what a
	// file system of its own brings.
	code := filepath.Join(dir, "code.join")
	write(t, dir, "code.join", "")
	if err := errors.Join(os.Chown(code, 0, user), os.Chmod(code, 0o640), os.Mkdir(filepath.Join(dir, "lost+found"), 0o700)); err != nil {
		t.Fatal(err)
	}
	if got := Owners(dir); got != nil {
		t.Errorf("all the user's: %+v", got)
	}
}
