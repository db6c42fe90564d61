package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"sallyport/internal/disk"
	"sallyport/internal/local"
)

const (
	// fullBelow is when nothing more can be written, or not the next file; a
	// database and a spool grow by more than that.
	fullBelow = 1 << 20
	// scarceBelow is when somebody should look after it.
	scarceBelow = 128 << 20
)

// room is what a file system has left for whoever owns a directory on it.
type room struct {
	bytes    int64
	noInodes bool
	readOnly bool
	device   uint64
}

// roomIn asks the file system; known is false where it does not say.
func roomIn(dir string) (r room, known bool) {
	st, err := os.Stat(dir)
	if err != nil {
		return r, false
	}
	space, err := disk.Of(dir)
	if err != nil || space.Total == 0 {
		return r, false
	}
	r = room{bytes: space.Free, noInodes: space.NoInodes, readOnly: space.ReadOnly}
	if ownedByRoot(st) {
		r.bytes = space.FreeToRoot
	}
	if s, ok := st.Sys().(*syscall.Stat_t); ok {
		r.device = s.Dev
	}
	return r, true
}

func ownedByRoot(st fs.FileInfo) bool {
	uid, ok := uidOf(st)
	return ok && uid == 0
}

// Disks examines whether what a role keeps in dirs can still be written. Of
// several directories on one file system the first is named.
func Disks(dirs ...string) (checks []local.Check) {
	seen := map[uint64]bool{}
	for _, dir := range dirs {
		if c, ok := writable(dir); !ok {
			checks = append(checks, c)
			continue
		}
		if c, ok := shut(dir); !ok {
			checks = append(checks, c)
		}
		r, known := roomIn(dir)
		if !known || seen[r.device] { // it is not there, or not for this user to see
			continue
		}
		seen[r.device] = true
		checks = append(checks, r.check(dir))
	}
	return checks
}

// writable looks at the directory's mode only: who asks is perhaps not who runs
// the role, and root may write everywhere.
func writable(dir string) (local.Check, bool) {
	st, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission):
		return local.Check{}, true
	case err != nil:
		return local.Check{Check: "disk", Detail: err.Error(), Fix: "see the kernel's log (dmesg) for what is wrong with the disk"}, false
	case st.IsDir() && st.Mode().Perm()&0o300 != 0o300 && !ownedByRoot(st):
		return local.Check{Check: "disk", Detail: fmt.Sprintf("%s has mode %04o: its owner may not write there", dir, st.Mode().Perm()), Fix: "chmod u+rwx " + dir}, false
	}
	return local.Check{}, true
}

// shut looks whether others than the owner of a role's directory may write there.
func shut(dir string) (local.Check, bool) {
	st, err := os.Stat(dir)
	if err != nil || !st.IsDir() || st.Mode().Perm()&0o002 == 0 { // the sticky bit does not keep them from making what we have not made yet
		return local.Check{}, true
	}
	return local.Check{Check: "disk", Detail: fmt.Sprintf("%s has mode %04o: every user of the host may put files there, and replace keys and database", dir, st.Mode().Perm()),
		Fix: "chmod 711 " + dir + ", and see who owns what lies in it (ls -la)"}, false
}

// Above examines the directory that those of the roles are in: who may write there
// can put others in their place, which in a container, where its volume often is like
// that, is nobody.
func Above(dir string) []local.Check {
	st, err := os.Stat(dir)
	if err != nil || st.Mode().Perm()&0o002 == 0 || st.Mode()&fs.ModeSticky != 0 {
		return nil
	}
	return []local.Check{{Check: "disk", OK: true, Warning: true, Detail: fmt.Sprintf("%s has mode %04o: every user of the host may put another directory in the place of the role's", dir, st.Mode().Perm()),
		Fix: "chmod 711 " + dir}}
}

func (r room) check(dir string) local.Check {
	free := fmt.Sprintf("%d MiB free for %s", r.bytes>>20, dir)
	const loses = "; until then nothing new is kept: no certificate, no revocation, no event"
	switch {
	case r.readOnly:
		return local.Check{Check: "disk", Detail: dir + " is on a file system that is mounted read-only" + loses,
			Fix: "see the kernel's log (dmesg) for why, and mount it for writing again (mount -o remount,rw `findmnt -no TARGET -T " + dir + "`); a container needs a volume there"}
	case r.bytes < fullBelow:
		return local.Check{Check: "disk", Detail: "the disk is full: " + free + loses,
			Fix: "make room there (df -h " + dir + "; du -xh " + dir + " | sort -h | tail), or move SALLYPORT_DATA while the role is stopped; it goes on by itself"}
	case r.noInodes:
		return local.Check{Check: "disk", Detail: "the file system of " + dir + " has no inode left: no file can be made there" + loses,
			Fix: "remove files there (df -i " + dir + ")"}
	case r.bytes < scarceBelow:
		return local.Check{Check: "disk", OK: true, Warning: true, Detail: "little room: " + free, Fix: "make room there before it is full (df -h " + dir + ")"}
	}
	return local.Check{Check: "disk", OK: true, Detail: free}
}
