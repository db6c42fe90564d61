package spool

import (
	"errors"
	"io/fs"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
)

var errCrash = errors.New("power cut")

// forgetful is a file layer in memory that loses in a crash what was not
// synced: each unsynced write survives, is torn or is lost on its own, and so
// does each unsynced directory entry.
type forgetful struct {
	mu      sync.Mutex
	rnd     *rand.Rand
	entries map[string]*inode // as the running process sees them
	durable map[string]*inode // as of the last directory sync
	changes []func(map[string]*inode)
	budget  int   // operations until the power cut; below 0: none comes
	room    int64 // bytes until the disk is full; below 0: no limit
	failing bool  // every Sync fails
	dead    bool
	ops     int
}

type inode struct {
	data    []byte // as the running process sees it
	durable []byte
	writes  []write
}

type write struct {
	off  int64
	data []byte // nil: truncate to off
}

func newForgetful(seed uint64) *forgetful {
	return &forgetful{rnd: rand.New(rand.NewPCG(seed, 1)), entries: map[string]*inode{}, durable: map[string]*inode{}, budget: -1, room: -1}
}

func (d *forgetful) op() error {
	if d.dead {
		return errCrash
	}
	d.ops++
	if d.budget == 0 {
		d.dead = true
		return errCrash
	}
	if d.budget > 0 {
		d.budget--
	}
	return nil
}

// reboot returns what a power cut leaves.
func (d *forgetful) reboot() *forgetful {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dead = true
	n := &forgetful{rnd: d.rnd, entries: maps.Clone(d.durable), budget: -1, room: d.room}
	for _, change := range d.changes {
		if d.rnd.IntN(2) == 0 {
			change(n.entries)
		}
	}
	seen := map[*inode]*inode{}
	for name, ino := range n.entries {
		if seen[ino] == nil {
			seen[ino] = ino.crash(d.rnd)
		}
		n.entries[name] = seen[ino]
	}
	n.durable = maps.Clone(n.entries)
	return n
}

func (i *inode) crash(rnd *rand.Rand) *inode {
	data := slices.Clone(i.durable)
	for _, w := range i.writes {
		switch rnd.IntN(3) {
		case 0:
			data = apply(data, w)
		case 1:
			if len(w.data) > 0 { // torn: a part of it, the rest zeros or old
				cut := rnd.IntN(len(w.data))
				if rnd.IntN(2) == 0 {
					data = apply(data, write{w.off, w.data[:cut]})
				} else {
					data = apply(data, write{w.off + int64(cut), w.data[cut:]})
				}
			}
		}
	}
	return &inode{data: data, durable: slices.Clone(data)}
}

func apply(b []byte, w write) []byte {
	end := w.off + int64(len(w.data))
	if n := end - int64(len(b)); n > 0 {
		b = append(b, make([]byte, n)...)
	}
	if w.data == nil {
		return b[:w.off]
	}
	copy(b[w.off:], w.data)
	return b
}

func (d *forgetful) change(f func(map[string]*inode)) {
	f(d.entries)
	d.changes = append(d.changes, f)
}

func (d *forgetful) Names() ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Collect(maps.Keys(d.entries)), d.op()
}

func (d *forgetful) Create(name string) (File, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.op(); err != nil {
		return nil, err
	}
	if d.entries[name] != nil {
		return nil, fs.ErrExist
	}
	ino := &inode{}
	d.change(func(m map[string]*inode) { m[name] = ino })
	return &memFile{d, ino}, nil
}

func (d *forgetful) Open(name string) (File, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.op(); err != nil {
		return nil, err
	}
	if d.entries[name] == nil {
		return nil, fs.ErrNotExist
	}
	return &memFile{d, d.entries[name]}, nil
}

func (d *forgetful) Rename(from, to string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.op(); err != nil {
		return err
	}
	ino := d.entries[from]
	if ino == nil {
		return fs.ErrNotExist
	}
	d.change(func(m map[string]*inode) { delete(m, from); m[to] = ino })
	return nil
}

func (d *forgetful) Remove(name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.op(); err != nil {
		return err
	}
	d.change(func(m map[string]*inode) { delete(m, name) })
	return nil
}

func (d *forgetful) Sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.op(); err != nil {
		return err
	}
	d.durable, d.changes = maps.Clone(d.entries), nil
	return nil
}

func (d *forgetful) Close() error { return nil }

type memFile struct {
	d   *forgetful
	ino *inode
}

func (f *memFile) ReadAt(b []byte, off int64) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if f.d.dead {
		return 0, errCrash
	}
	if off >= int64(len(f.ino.data)) {
		return 0, nil
	}
	return copy(b, f.ino.data[off:]), nil
}

func (f *memFile) WriteAt(b []byte, off int64) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if err := f.d.op(); err != nil {
		return 0, err
	}
	n := len(b)
	if f.d.room >= 0 && off+int64(n) > int64(len(f.ino.data)) {
		n = int(min(int64(n), f.d.room))
		f.d.room -= int64(n)
	}
	w := write{off, slices.Clone(b[:n])}
	f.ino.data = apply(f.ino.data, w)
	f.ino.writes = append(f.ino.writes, w)
	if n < len(b) {
		return n, syscall.ENOSPC
	}
	return n, nil
}

func (f *memFile) Size() (int64, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return int64(len(f.ino.data)), nil
}

func (f *memFile) Truncate(size int64) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if err := f.d.op(); err != nil {
		return err
	}
	w := write{off: size}
	f.ino.data = apply(f.ino.data, w)
	f.ino.writes = append(f.ino.writes, w)
	return nil
}

func (f *memFile) Sync() error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if err := f.d.op(); err != nil {
		return err
	}
	if f.d.failing {
		return syscall.EIO
	}
	f.ino.durable, f.ino.writes = slices.Clone(f.ino.data), nil
	return nil
}

func (f *memFile) Close() error { return nil }
