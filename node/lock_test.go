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
