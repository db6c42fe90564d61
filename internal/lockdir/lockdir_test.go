package lockdir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSecondStartIsRefusedAndNamesTheOwner(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "rcp")
	l, err := Acquire(dir)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Acquire(dir)
	if !errors.Is(err, ErrLocked) {
		t.Fatalf("second lock: %v, want ErrLocked", err)
	}
	if want := fmt.Sprintf("process %d", os.Getpid()); !strings.Contains(err.Error(), want) {
		t.Errorf("error %q does not name the owner (%s)", err, want)
	}
	if err := l.Release(); err != nil {
		t.Fatal(err)
	}
	again, err := Acquire(dir)
	if err != nil {
		t.Fatalf("after release: %v", err)
	}
	_ = again.Release()
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm()&0o011 == 0 {
		t.Errorf("mode of %s is %v (%v): others cannot reach the socket in it", dir, st.Mode(), err)
	}
}

// The umask of a service is often 077: any user reads the status of a role all
// the same.
func TestUmaskLeavesTheSocketInReach(t *testing.T) {
	top := t.TempDir()
	defer unix.Umask(unix.Umask(0o077))
	data := filepath.Join(top, "data")
	l, err := Acquire(filepath.Join(data, "rcp"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Release() }()
	for _, dir := range []string{data, filepath.Join(data, "rcp")} {
		if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o711 {
			t.Errorf("%s: %v, %v", dir, st.Mode(), err)
		}
	}
	shut := filepath.Join(top, "shut", "rcp")
	if err := os.MkdirAll(shut, 0o700); err != nil {
		t.Fatal(err)
	}
	again, err := Acquire(shut)
	if err != nil {
		t.Fatal(err)
	}
	_ = again.Release()
	if st, err := os.Stat(shut); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("what was there became %v, %v", st.Mode(), err)
	}
}

// What root makes for a service is the service's, the lock above all: it would not
// start any more.
func TestRootMakesItForTheOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root gives files away")
	}
	const user = 65534
	data := t.TempDir()
	if err := os.Chown(data, user, user); err != nil {
		t.Fatal(err)
	}
	pki := filepath.Join(data, "pki")
	if err := Make(pki, 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := Acquire(pki)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Release() }()
	for name, mode := range map[string]fs.FileMode{pki: 0o700, filepath.Join(pki, "lock"): 0o600} {
		if st, err := os.Stat(name); err != nil || st.Sys().(*syscall.Stat_t).Uid != user || st.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", name, st, err)
		}
	}
}

func TestLinkIsNotFollowed(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(t.TempDir(), "precious")
	if err := os.WriteFile(target, []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, filepath.Join(dir, fileName)); err != nil {
		t.Fatal(err)
	}
	if l, err := Acquire(dir); err == nil {
		_ = l.Release()
		t.Fatal("a symlink was taken for the lock file")
	}
	if b, _ := os.ReadFile(target); string(b) != "keep" {
		t.Fatalf("the link's target now holds %q", b)
	}
}

func TestUnusableDirectorySaysWhatToDo(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Acquire(filepath.Join(file, "rcp"))
	if err == nil || !strings.Contains(err.Error(), "SALLYPORT_DATA") {
		t.Fatalf("got %v, want an error that names SALLYPORT_DATA", err)
	}
}

// TestWhatAKilledProcessLeft: files that were not renamed yet go, wherever they are
// below, and no others.
func TestWhatAKilledProcessLeft(t *testing.T) {
	dir := t.TempDir()
	write := func(name string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte("secret"), 0o600)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	gone := []string{write(".intermediate.key7152569868796809690"), write("a.sallyport/identity/.join.json435864959666670")}
	stay := []string{write("intermediate.key"), write(".profile"), write("segment-7152569868796809690"), write(".b2024")}
	target := filepath.Join(t.TempDir(), ".key.pem7152569868796809690")
	if err := errors.Join(os.WriteFile(target, nil, 0o600), os.Symlink(filepath.Dir(target), filepath.Join(dir, "link"))); err != nil {
		t.Fatal(err)
	}
	l, err := Acquire(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Release() }()
	for _, path := range gone {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", path, err)
		}
	}
	for _, path := range append(stay, target) {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
}
