// Package lockdir makes sure that one directory of state has one process.
//
// The lock is flock(2) on a file inside the directory: the kernel drops it
// with the process, also after kill -9, so that there is nothing to clean up.
package lockdir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"sallyport/internal/atomicfile"
)

// ErrLocked says that another process holds the directory. Programs exit with
// status 4 on it.
var ErrLocked = errors.New("directory is in use by another process")

// fileName of the lock inside the directory. It holds the owner's process id
// for people; only the flock counts.
const fileName = "lock"

// Lock is a directory that this process holds.
type Lock struct {
	file *os.File
}

// Acquire makes dir if it is missing and locks it, or fails at once with
// [ErrLocked]. The directory, and the one above it, are made 0711, whatever the
// umask is: the local socket in it is for any user, its listing is not.
func Acquire(dir string) (*Lock, error) {
	if err := Make(dir, 0o711); err != nil {
		return nil, fmt.Errorf("lock directory: %w (make it writable, or set SALLYPORT_DATA to a directory that is)", err)
	}
	path := filepath.Join(dir, fileName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock directory: %w (make it writable, or set SALLYPORT_DATA to a directory that is)", err)
	}
	if err := atomicfile.OwnedLike(f, dir); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock directory: %w", err)
	}
	if err := flock(f); err != nil {
		owner := readOwner(f)
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w%s: stop that process, or set SALLYPORT_DATA to another directory", dir, ErrLocked, owner)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	l := &Lock{file: f}
	if err := l.writeOwner(); err != nil && !full(err) { // the flock holds without it
		_ = l.Release()
		return nil, fmt.Errorf("lock %s: write process id: %w", path, err)
	}
	atomicfile.Tidy(dir) // whose process was killed
	return l, nil
}

// Make makes dir with a mode, and the directory above it, which is SALLYPORT_DATA,
// with 0711, if they are missing: whatever the umask is, which a service often has at
// 077. What root makes in the directory of another user is that user's. What is there
// stays as it is: that is somebody's decision.
func Make(dir string, mode fs.FileMode) error {
	above := filepath.Dir(dir)
	if err := os.MkdirAll(filepath.Dir(above), 0o711); err != nil {
		return err
	}
	if err := makeOne(above, 0o711); err != nil {
		return err
	}
	return makeOne(dir, mode)
}

func makeOne(dir string, mode fs.FileMode) error {
	if err := os.Mkdir(dir, mode); err != nil {
		if st, statErr := os.Stat(dir); statErr == nil && st.IsDir() {
			return nil
		}
		return err
	}
	// By what was opened: who may write above could put a link in its place.
	f, err := os.OpenFile(dir, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Chmod(mode), atomicfile.OwnedLike(f, filepath.Dir(dir)), f.Close())
}

// Release gives the directory up. The file stays: removing it would let two
// processes lock two files of one name.
func (l *Lock) Release() error { return l.file.Close() }

func (l *Lock) writeOwner() error {
	if err := l.file.Truncate(0); err != nil {
		return err
	}
	_, err := l.file.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return err
}

func full(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

func flock(f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// readOwner returns " (process 123)", or nothing when the file does not say.
func readOwner(f *os.File) string {
	b := make([]byte, 20)
	n, _ := f.ReadAt(b, 0)
	pid, err := strconv.Atoi(strings.TrimSpace(string(b[:n])))
	if err != nil || pid <= 0 {
		return ""
	}
	return fmt.Sprintf(" (process %d)", pid)
}
