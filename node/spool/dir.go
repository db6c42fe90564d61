package spool

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
)

// Dir is the file layer below a spool: one flat directory. Names that were
// created, renamed or removed are only sure to survive a crash after Sync; the
// content of a file only after the file's own Sync.
type Dir interface {
	Names() ([]string, error)
	Create(name string) (File, error) // fails if the name exists
	Open(name string) (File, error)
	Rename(from, to string) error
	Remove(name string) error
	Sync() error
	Close() error
}

// File is one file of a [Dir].
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Size() (int64, error)
	Truncate(size int64) error
	Sync() error
}

// OpenDir returns the file layer of the operating system, on path, which it
// creates with mode 0700.
func OpenDir(path string) (Dir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	return osDir{root}, nil
}

type osDir struct{ root *os.Root }

func (d osDir) Names() ([]string, error) {
	entries, err := fs.ReadDir(d.root.FS(), ".")
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

func (d osDir) Create(name string) (File, error) {
	return wrap(d.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600))
}

func (d osDir) Open(name string) (File, error) {
	return wrap(d.root.OpenFile(name, os.O_RDWR, 0))
}

func (d osDir) Rename(from, to string) error { return d.root.Rename(from, to) }
func (d osDir) Remove(name string) error     { return d.root.Remove(name) }
func (d osDir) Close() error                 { return d.root.Close() }

func (d osDir) Sync() error {
	f, err := d.root.Open(".")
	if err != nil {
		return err
	}
	err = f.Sync()
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("sync directory %s: %w", d.root.Name(), err)
	}
	return nil
}

type osFile struct{ *os.File }

func wrap(f *os.File, err error) (File, error) {
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (f osFile) Size() (int64, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

// readAt fills b from off and returns how much there was.
func readAt(f File, b []byte, off int64) (int, error) {
	n, err := f.ReadAt(b, off)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}
