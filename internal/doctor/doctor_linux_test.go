package doctor

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

// TestAuthorityOfAnotherUser: what a user may not look at is not missing, and
// is not to be restored.
func TestAuthorityOfAnotherUser(t *testing.T) {
	dir, pki := healthy(t, identitytest.NewCA(t), wire.RoleGateway), filepath.Join(t.TempDir(), "pki")
	if err := os.Mkdir(pki, 0o000); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 { // root looks everywhere; the file system sees another user on this thread
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := syscall.Setfsuid(65534); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = syscall.Setfsuid(0) }()
	}
	got := failed(Authority(pki, dir, time.Now()))["authority"]
	if !strings.Contains(got.Detail, "permission denied") || !strings.Contains(got.Fix, "run as the user") {
		t.Errorf("%+v", got)
	}
}
