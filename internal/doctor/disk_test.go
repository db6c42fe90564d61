package doctor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRoom(t *testing.T) {
	for name, c := range map[string]struct {
		r           room
		ok, warning bool
		detail, fix string
	}{
		"plenty":    {room{bytes: 1 << 40}, true, false, "1048576 MiB free", ""},
		"scarce":    {room{bytes: 64 << 20}, true, true, "64 MiB free", "df -h /data"},
		"full":      {room{bytes: 4096}, false, false, "full", "df -h /data"},
		"inodes":    {room{bytes: 1 << 40, noInodes: true}, false, false, "inode", "df -i /data"},
		"read-only": {room{bytes: 1 << 40, readOnly: true}, false, false, "read-only", "remount,rw"},
	} {
		if got := c.r.check("/data"); got.OK != c.ok || got.Warning != c.warning || !strings.Contains(got.Detail, c.detail) || !strings.Contains(got.Fix, c.fix) || got.Check != "disk" {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// One file system is named once, what is not there is left out, and a directory
// that its owner may not write in is a finding.
func TestDisks(t *testing.T) {
	dir := t.TempDir()
	sub, shut := filepath.Join(dir, "sub"), filepath.Join(dir, "shut")
	for _, d := range []string{sub, shut} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(shut, 65534, 65534); err != nil {
			t.Fatal(err)
		}
	}
	if got := Disks(dir, sub, shut, filepath.Join(dir, "gone")); len(got) != 1 || !strings.Contains(got[0].Detail, dir) {
		t.Errorf("%+v", got)
	}
	if err := os.Chmod(shut, 0o500); err != nil {
		t.Fatal(err)
	}
	if got := Disks(shut); len(got) != 1 || got[0].OK || got[0].Fix != "chmod u+rwx "+shut {
		t.Errorf("%+v", got)
	}
	if err := os.Chmod(sub, 0o777); err != nil {
		t.Fatal(err)
	}
	if got := Disks(sub); len(got) != 2 || got[0].OK || !strings.Contains(got[0].Detail, "every user of the host") || !strings.Contains(got[1].Detail, "free for "+sub) {
		t.Errorf("%+v", got)
	}
	for mode, want := range map[os.FileMode]int{0o777: 1, 0o777 | os.ModeSticky: 0, 0o775: 0} {
		if err := os.Chmod(sub, mode); err != nil {
			t.Fatal(err)
		}
		if got := Above(sub); len(got) != want || want > 0 && (!got[0].OK || !got[0].Warning) {
			t.Errorf("above, with %v: %+v", mode, got)
		}
	}
}
