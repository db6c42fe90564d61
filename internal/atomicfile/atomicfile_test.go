package atomicfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// What is not yet renamed lies beside the file, and not in the directory for
// temporary files: the error of a renaming that fails tells from where it was.
func TestWrite(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir()) // on the same file system
	dir := t.TempDir()
	obstacle := filepath.Join(dir, "obstacle")
	if err := os.Mkdir(obstacle, 0o700); err != nil {
		t.Fatal(err)
	}
	mode := func(name string) fs.FileMode {
		t.Helper()
		st, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		return st.Mode().Perm()
	}
	defer syscall.Umask(syscall.Umask(0o077))
	for _, c := range []struct {
		name  string
		write func(string, []byte, fs.FileMode) error
		first fs.FileMode // of a new file with 0644
	}{{"write", Write, 0o600}, {"exactly", WriteExactly, 0o644}, {"for owner", WriteForOwner, 0o644}} {
		name := filepath.Join(dir, c.name)
		if err := c.write(name, []byte("one"), 0o644); err != nil || mode(name) != c.first {
			t.Fatalf("%s: %v, mode %v, want %v", c.name, err, mode(name), c.first)
		}
		if err := os.Chmod(name, 0o640); err != nil {
			t.Fatal(err)
		}
		if err := c.write(name, []byte("two"), 0o644); err != nil || mode(name) != 0o640 {
			t.Errorf("%s: %v, mode %v of a file that had 0640", c.name, err, mode(name))
		}
		if b, err := os.ReadFile(name); err != nil || string(b) != "two" {
			t.Errorf("%s: %q %v", c.name, b, err)
		}
		var renaming *os.LinkError
		if err := c.write(obstacle, nil, 0o600); !errors.As(err, &renaming) || filepath.Dir(renaming.Old) != dir {
			t.Errorf("%s over a directory: %v", c.name, err)
		}
	}
	if all, err := os.ReadDir(dir); err != nil || len(all) != 4 {
		t.Errorf("left over: %v %v", all, err)
	}
}

// What root writes into a service's directory is the service's.
func TestWriteForOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root gives files away")
	}
	const user = 65534
	dir := t.TempDir()
	if err := os.Chown(dir, user, user); err != nil {
		t.Fatal(err)
	}
	for range 2 { // a new file, and one that is there
		name := filepath.Join(dir, "key")
		if err := WriteForOwner(name, []byte("one"), 0o600); err != nil {
			t.Fatal(err)
		}
		if st, err := os.Stat(name); err != nil || st.Sys().(*syscall.Stat_t).Uid != user || st.Mode().Perm() != 0o600 {
			t.Errorf("%v, %v", st, err)
		}
	}
}

// TestTidyKnowsTheName: what a write that was cut off leaves has a name that Tidy
// takes for such.
func TestTidyKnowsTheName(t *testing.T) {
	obstacle := filepath.Join(t.TempDir(), "key.pem")
	if err := os.Mkdir(obstacle, 0o700); err != nil {
		t.Fatal(err)
	}
	var renaming *os.LinkError
	if err := Write(obstacle, nil, 0o600); !errors.As(err, &renaming) || !leftOver.MatchString(filepath.Base(renaming.Old)) {
		t.Errorf("%v", err)
	}
}
