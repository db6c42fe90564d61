// Package disk asks a file system how much room it has.
package disk

import (
	"cmp"
	"fmt"

	"golang.org/x/sys/unix"
)

// Space is what a file system has, in bytes. Total 0: it does not say (ramfs, a
// tmpfs without a limit).
type Space struct {
	Total      int64
	Free       int64 // for everybody
	FreeToRoot int64 // some is kept for root
	NoInodes   bool  // no file can be made
	ReadOnly   bool
}

// Of asks the file system on which a path is.
func Of(path string) (Space, error) {
	var f unix.Statfs_t
	if err := unix.Statfs(path, &f); err != nil {
		return Space{}, fmt.Errorf("look at the disk of %s: %w", path, err)
	}
	block := uint64(cmp.Or(f.Frsize, f.Bsize))
	return Space{
		Total: int64(f.Blocks * block), Free: int64(f.Bavail * block), FreeToRoot: int64(f.Bfree * block),
		NoInodes: f.Files > 0 && f.Ffree == 0, ReadOnly: f.Flags&unix.ST_RDONLY != 0,
	}, nil
}
