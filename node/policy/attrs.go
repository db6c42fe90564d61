package policy

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// attrLabel is the SELinux label of a file (selinux(8)).
	attrLabel = "security.selinux"
	// maxAttrs bounds the extended attributes of one file that are saved, in
	// bytes. Linux itself has 64 KiB for their names and for each value (xattr(7)).
	maxAttrs = 1 << 20
)

// readAttrs reads the extended attributes of an open file; none where the file
// system has none.
func readAttrs(fd int) (map[string][]byte, error) {
	names, err := sized(func(b []byte) (int, error) { return unix.Flistxattr(fd, b) })
	if errors.Is(err, unix.ENOTSUP) || len(names) == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	attrs, size := map[string][]byte{}, 0
	for _, name := range strings.Split(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		value, err := sized(func(b []byte) (int, error) { return unix.Fgetxattr(fd, name, b) })
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP) {
			continue // it went away, or is listed only
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if size += len(name) + len(value); size > maxAttrs {
			return nil, fmt.Errorf("they take more than %d KiB", maxAttrs>>10)
		}
		attrs[name] = value
	}
	return attrs, nil
}

// sized calls a system call of the kind that tells the size for an empty buffer.
func sized(call func([]byte) (int, error)) ([]byte, error) {
	for {
		n, err := call(nil)
		if err != nil || n == 0 {
			return nil, err
		}
		b := make([]byte, n)
		n, err = call(b)
		if errors.Is(err, unix.ERANGE) { // it grew in between
			continue
		}
		if err != nil {
			return nil, err
		}
		return b[:n], nil
	}
}

// writeAttrs sets extended attributes of an open file. What this process, or
// this file system, may not set is left out: a file that is back without its
// label is better than one that is not back.
func writeAttrs(fd int, attrs map[string][]byte) error {
	for name, value := range attrs {
		err := unix.Fsetxattr(fd, name, value, 0)
		if err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("extended attribute %s: %w", name, err)
		}
	}
	return nil
}
