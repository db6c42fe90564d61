package node

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"sallyport/internal/wire"
)

// TestLockOnAFullDisk: a node that cannot write down that it is locked is locked all
// the same, says so once, and writes it down when it can.
func TestLockOnAFullDisk(t *testing.T) {
	dir, events := t.TempDir(), 0
	open := func() *interlock {
		t.Helper()
		l, err := openInterlock(dir, func(wire.Event) { events++ })
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	l := open()
	if err := l.learn("ours"); err != nil {
		t.Fatal(err)
	}
	inTheWay := filepath.Join(dir, fileState) // a directory: nothing takes its place
	if err := os.Mkdir(inTheWay, 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := l.obey("another"); !errors.As(err, new(*lockedError)) {
			t.Errorf("it answers %v", err)
		}
		if l.locked() == "" || events != 1 {
			t.Errorf("locked: %q, after %d events", l.locked(), events)
		}
	}
	if err := l.obey("ours"); err != nil || l.locked() != "" {
		t.Errorf("its own gateway, on the full disk: %v, locked: %q", err, l.locked())
	}
	if err := l.obey("another"); !errors.As(err, new(*lockedError)) {
		t.Errorf("it answers %v", err)
	}
	if err := os.Remove(inTheWay); err != nil {
		t.Fatal(err)
	}
	if l.locked() == "" {
		t.Error("it is locked no more")
	}
	if l = open(); l.locked() == "" {
		t.Error("after a restart it does not know")
	}
	if err := l.obey("ours"); err != nil || l.locked() != "" {
		t.Errorf("its own gateway: %v, locked: %q", err, l.locked())
	}
}

// TestLocksOnAFullDisk: what is on disk is what a restart finds. A lock that is there
// is ended there, whatever else held meanwhile.
func TestLocksOnAFullDisk(t *testing.T) {
	for name, onDisk := range map[string]func(*interlock) error{
		"by another gateway before": func(l *interlock) error { _ = l.obey("second"); return nil },
		"by what was written then":  func(l *interlock) error { return l.setName("web") },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			l, err := openInterlock(dir, func(wire.Event) {})
			if err != nil {
				t.Fatal(err)
			}
			if err := l.learn("ours"); err != nil {
				t.Fatal(err)
			}
			state, aside := filepath.Join(dir, fileState), filepath.Join(dir, "aside")
			full := func() {
				t.Helper()
				if err := os.Rename(state, aside); err != nil && !errors.Is(err, os.ErrNotExist) {
					t.Fatal(err)
				}
				if err := os.Mkdir(state, 0o700); err != nil {
					t.Fatal(err)
				}
			}
			room := func() {
				t.Helper()
				if err := os.Remove(state); err != nil {
					t.Fatal(err)
				}
				if err := os.Rename(aside, state); err != nil && !errors.Is(err, os.ErrNotExist) {
					t.Fatal(err)
				}
			}
			full()
			_ = l.obey("third")
			room()
			if err := onDisk(l); err != nil {
				t.Fatal(err)
			}
			full()
			_ = l.obey("third")
			freed := l.obey("ours") == nil
			room()
			again, err := openInterlock(dir, func(wire.Event) {})
			if err != nil || freed || (again.locked() != "") != (l.locked() != "") {
				t.Errorf("%v; freed: %v, locked: %q, after a restart: %q", err, freed, l.locked(), again.locked())
			}
		})
	}
}
