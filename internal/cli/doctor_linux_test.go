package cli

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"sallyport/internal/wire"
)

// TestDoctorOfAnotherUser says who may look, instead of finding nothing.
func TestDoctorOfAnotherUser(t *testing.T) {
	data := t.TempDir()
	if err := os.Chmod(filepath.Dir(data), 0o711); err != nil { // another user has to come as far as the directory itself
		t.Fatal(err)
	}
	role := filepath.Join(data, "node")
	if err := os.Mkdir(role, 0o711); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 { // root looks everywhere; the file system sees another user on this thread
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := syscall.Setfsuid(65534); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = syscall.Setfsuid(0) }()
	} else if err := os.Chmod(role, 0o111); err != nil {
		t.Fatal(err)
	}
	s, _, _ := streams("")
	s.Env = []string{"SALLYPORT_DATA=" + data}
	l := &localRole{streams: s, out: NewOutput(s), roles: []wire.Role{wire.RoleGateway, wire.RoleNode}}
	checks, err := l.examine(t.Context())
	if err != nil || len(checks) != 3 || !strings.Contains(checks[1].Detail, "permission denied") || !strings.Contains(checks[1].Fix, "as root") {
		t.Errorf("a directory that may not be listed: %+v, %v", checks, err)
	}
	if os.Geteuid() == 0 {
		_ = syscall.Setfsuid(0)
	}
	if err := os.Chmod(data, 0o000); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.Chmod(data, 0o700) }()
	if os.Geteuid() == 0 {
		_ = syscall.Setfsuid(65534)
		defer func() { _ = syscall.Setfsuid(0) }()
	}
	_, err = l.examine(t.Context())
	_, statusErr := l.clients()
	for _, err := range []error{err, statusErr} {
		if err == nil || !strings.Contains(err.Error(), "permission denied") || !strings.Contains(err.Error(), "as root") {
			t.Errorf("a directory that may not be passed through: %v", err)
		}
	}
}
