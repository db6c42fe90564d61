package doctor

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"sallyport/internal/local"
)

// ownerDepth is how deep below a role's directory owners are looked at: what a role
// does not start without lies above it, and spools may be large.
const ownerDepth = 2

// Owners examines whether what lies in a role's directories is its user's, who owns
// them: a role that was once started by root leaves files that its user cannot open.
// Root opens everything.
func Owners(dirs ...string) (checks []local.Check) {
	for _, dir := range dirs {
		st, err := os.Stat(dir)
		if err != nil {
			continue
		}
		owner, known := uidOf(st)
		if !known || owner == 0 {
			continue
		}
		_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				return fs.SkipDir
			}
			info, err := e.Info()
			if err != nil {
				return nil // it went meanwhile
			}
			if e.IsDir() && e.Name() == "lost+found" { // of a file system of its own
				return fs.SkipDir
			}
			if uid, known := uidOf(info); known && uid != owner && (e.IsDir() || e.Type().IsRegular()) && !lent(info, st) {
				checks = append(checks, local.Check{Check: "owner", Detail: fmt.Sprintf("%s belongs to the user with uid %d, and %s to uid %d: the role, which runs as that one, may be unable to open it", path, uid, dir, owner),
					Fix: "stop the role, `chown -R --reference=" + dir + " " + dir + "`, and start it as that user only"})
				return fs.SkipAll
			}
			if e.IsDir() && strings.Count(path[len(dir):], string(filepath.Separator)) >= ownerDepth {
				return fs.SkipDir
			}
			return nil
		})
	}
	return checks
}

// lent tells whether a file is meant to be read by the owner of the directory it is
// in, and to be another's, such as a join code that root has put there.
func lent(file, dir fs.FileInfo) bool {
	f, ok := file.Sys().(*syscall.Stat_t)
	d, known := dir.Sys().(*syscall.Stat_t)
	return file.Mode().IsRegular() && (file.Mode().Perm()&0o004 != 0 || ok && known && f.Gid == d.Gid && file.Mode().Perm()&0o040 != 0)
}

func uidOf(st fs.FileInfo) (uint32, bool) {
	s, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return s.Uid, true
}
