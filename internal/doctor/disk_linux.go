package doctor

import (
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// roomIn asks the file system. Some of it is kept for root.
func roomIn(dir string) (room, error) {
	st, err := os.Stat(dir)
	if err != nil {
		return room{}, err
	}
	var f unix.Statfs_t
	if err := unix.Statfs(dir, &f); err != nil {
		return room{}, err
	}
	blocks := f.Bavail
	if ownedByRoot(st) {
		blocks = f.Bfree
	}
	r := room{bytes: blocks * uint64(f.Frsize), noInodes: f.Files > 0 && f.Ffree == 0, readOnly: f.Flags&unix.ST_RDONLY != 0}
	if s, ok := st.Sys().(*syscall.Stat_t); ok {
		r.device = s.Dev
	}
	return r, nil
}

func ownedByRoot(st fs.FileInfo) bool {
	s, ok := st.Sys().(*syscall.Stat_t)
	return ok && s.Uid == 0
}
