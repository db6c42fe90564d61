package backup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"sallyport/internal/atomicfile"
)

// partial is behind the name of a backup that is not whole yet. By its own name, one
// that a killed process left would pass for a backup with whoever looks for the file.
const partial = ".partial"

// draft is a backup that is written.
type draft struct {
	*os.File

	dest  string
	whole bool // and has its name
}

// begin opens the draft of a new file, and takes over one that was cut off.
func begin(dest string) (*draft, error) {
	if err := vacant(dest); err != nil {
		return nil, err
	}
	name := dest + partial
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	cutOff := errors.Is(err, fs.ErrExist)
	if cutOff { // others may write in the directory too, and have laid out a link or a pipe
		f, err = os.OpenFile(name, os.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	}
	if err != nil {
		return nil, err
	}
	d := &draft{File: f, dest: dest}
	if err = d.lock(); err == nil && cutOff {
		err = d.empty()
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return d, nil
}

func vacant(dest string) error {
	if _, err := os.Lstat(dest); err == nil {
		return &fs.PathError{Op: "create", Path: dest, Err: fs.ErrExist}
	}
	return nil
}

// lock keeps others from taking the draft over. Not every file system can; there,
// who writes two backups of one name at a time is told of it by the second rename.
func (d *draft) lock() error {
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("%w %s", errBusy, d.Name())
	}
	return nil
}

var errBusy = errors.New("another backup writes")

// empty makes sure that a draft that was there is ours, and drops what is in it.
func (d *draft) empty() error {
	held, err := d.Stat()
	if err != nil {
		return err
	}
	named, err := os.Lstat(d.Name())
	if err != nil || !os.SameFile(held, named) { // whoever had it locked has given it its name
		return fmt.Errorf("%w %s", errBusy, d.Name())
	}
	owner, ok := held.Sys().(*syscall.Stat_t)
	if !ok || !held.Mode().IsRegular() || owner.Nlink != 1 || int(owner.Uid) != os.Geteuid() || held.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s is no backup of this user that was cut off: remove it, or name another file", d.Name())
	}
	return d.Truncate(0)
}

// finish has the whole backup on disk, and gives it its name if nobody has that.
func (d *draft) finish() error {
	if err := d.Sync(); err != nil {
		return err
	}
	err := unix.Renameat2(unix.AT_FDCWD, d.Name(), unix.AT_FDCWD, d.dest, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // not every file system can
		if err := vacant(d.dest); err != nil {
			return err
		}
		err = os.Rename(d.Name(), d.dest)
	}
	if err != nil {
		return &fs.PathError{Op: "create", Path: d.dest, Err: err}
	}
	d.whole = true
	return atomicfile.SyncDir(filepath.Dir(d.dest))
}

// close ends the draft, which goes unless it is whole.
func (d *draft) close() error {
	if d.whole {
		return d.Close()
	}
	return errors.Join(d.Close(), os.Remove(d.Name()))
}
