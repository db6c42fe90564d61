package identity_test

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

func TestKeptJoinCodeComesFirst(t *testing.T) {
	code := func(td string) string {
		s, err := (wire.JoinCode{TrustDomain: td, Root: wire.HashSPKI(nil), Role: wire.RoleRCP}).Encode()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s, err := identity.OpenJoin(code("configured"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Keep(code("lost")); err == nil {
		t.Error("a code was kept nowhere")
	}
	path := filepath.Join(t.TempDir(), "join")
	s.KeepIn(path)
	if joins, err := s.Codes(); err != nil || len(joins) != 1 {
		t.Fatalf("before: %v, %v", joins, err)
	}
	if err := s.Keep("sp1.garbage"); !errors.Is(err, wire.ErrJoinCode) {
		t.Errorf("garbage: %v", err)
	}
	if err := s.Keep(code("handed")); err != nil {
		t.Fatal(err)
	}
	joins, err := s.Codes()
	if err != nil || len(joins) != 2 || joins[0].Code.TrustDomain != "handed" || joins[0].Source != path {
		t.Fatalf("after: %+v, %v", joins, err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v: a code is a secret", st.Mode(), err)
	}
}

// A code that root has put down for itself is no fault of SALLYPORT_DATA.
func TestJoinFileThatMayNotBeRead(t *testing.T) {
	if os.Geteuid() == 0 { // root reads everything; the file system sees another user on this thread
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer func() { _ = syscall.Setfsuid(0) }()
	}
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o711); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "code")
	if err := os.WriteFile(file, []byte("sp1."), 0o000); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := syscall.Setfsuid(65534); err != nil {
			t.Fatal(err)
		}
	}
	s, err := identity.OpenJoin(file, nil)
	if err == nil {
		_, err = s.Codes()
	}
	if err == nil || !strings.Contains(err.Error(), "let the user that this runs as read it") || strings.Contains(err.Error(), "SALLYPORT_DATA") {
		t.Error(err)
	}
}
