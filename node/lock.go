package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"sallyport/internal/atomicfile"
	"sallyport/internal/wire"
)

const (
	fileUID   = "uid"
	fileState = "state.json"
)

// interlock decides whom an instance obeys. It guards against accident (a
// gateway with an empty database, or the wrong one), not against a thief of
// the gateway's key.
type interlock struct {
	dir   string
	raise func(wire.Event)

	mu    sync.Mutex
	state lockState
	kept  string // of a lock, why, on disk; with a full one another may hold
}

// lockState outlives a restart.
type lockState struct {
	Locked string    `json:"locked,omitempty"` // why
	Since  time.Time `json:"since,omitzero"`
	Drain  string    `json:"drain,omitempty"` // why
	Until  time.Time `json:"until,omitzero"`  // of the drain; zero: until it is taken back
	Name   string    `json:"name,omitempty"`  // as the gateway knows the node
}

func openInterlock(dir string, raise func(wire.Event)) (*interlock, error) {
	l := &interlock{dir: dir, raise: raise}
	err := loadJSON(filepath.Join(dir, fileState), &l.state)
	l.kept = l.state.Locked
	return l, err
}

// installation is the UID that the instance obeys; empty: the next that comes.
// The file is read each time: deleting it is the operator's way to unlock.
func (l *interlock) installation() (string, error) {
	b, err := os.ReadFile(filepath.Join(l.dir, fileUID))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return strings.TrimSpace(string(b)), err
}

// learn keeps the installation named by a grant, unless one is known.
func (l *interlock) learn(uid string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if uid == "" {
		return nil
	}
	known, err := l.installation()
	if err != nil || known != "" {
		return err
	}
	return atomicfile.Write(filepath.Join(l.dir, fileUID), []byte(uid+"\n"), 0o600)
}

// obey checks the installation of a verified document. A foreign one locks the
// instance; the known one, or the first after an unlock, frees it.
func (l *interlock) obey(uid string) error {
	if uid == "" {
		return errors.New("the document names no installation")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	known, err := l.installation()
	if err != nil {
		return err
	}
	if known != "" && known != uid {
		reason := fmt.Sprintf("the gateway's installation is %s, this node belongs to %s: unlock it with `sallyport local unlock`, or bring back the gateway's database",
			wire.Quotable(uid), known)
		if l.state.Locked != reason {
			lock := func(s *lockState) { s.Locked, s.Since = reason, time.Now().UTC() }
			if err := l.save(lock); err != nil { // a full disk does not unlock it, nor does it have the gateway come again and again
				lock(&l.state)
			}
			l.raise(wire.Event{Severity: wire.SeverityMajor, Application: "sallyport", Object: "lock", Key: "lock", Text: "node locked: " + reason})
		}
		return &lockedError{reason}
	}
	if known == "" {
		if err := atomicfile.Write(filepath.Join(l.dir, fileUID), []byte(uid+"\n"), 0o600); err != nil {
			return err
		}
	}
	return l.free("node unlocked: it obeys installation " + uid)
}

type lockedError struct{ reason string }

func (e *lockedError) Error() string { return e.reason }

// free ends a lock; mu is held.
func (l *interlock) free(text string) error {
	if l.state.Locked == "" {
		return nil
	}
	open := func(s *lockState) { s.Locked, s.Since = "", time.Time{} }
	if err := l.save(open); err != nil {
		if l.kept != "" {
			return err
		}
		open(&l.state) // on disk it is not locked
	}
	l.raise(wire.Event{Severity: wire.SeverityNormal, Application: "sallyport", Object: "lock", Key: "lock", Text: text})
	return nil
}

// unlock makes the instance obey uid, or, when it is empty, whichever verified
// gateway comes next.
func (l *interlock) unlock(uid string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var err error
	if uid == "" {
		err = atomicfile.Remove(filepath.Join(l.dir, fileUID))
	} else {
		err = atomicfile.Write(filepath.Join(l.dir, fileUID), []byte(uid+"\n"), 0o600)
	}
	if err != nil {
		return err
	}
	return l.free("node unlocked")
}

// locked is why the instance is locked; empty when it is not. An operator who
// deleted the uid file has unlocked it.
func (l *interlock) locked() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state.Locked == "" {
		return ""
	}
	if l.kept != l.state.Locked {
		_ = l.save(func(*lockState) {}) // there may be room now
	}
	if known, err := l.installation(); err == nil && known == "" {
		if err := l.free("node unlocked: its uid file was deleted"); err == nil {
			return ""
		}
	}
	return l.state.Locked
}

// drain takes no more work until then; zero means until it is taken back.
func (l *interlock) drain(reason string, until time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.save(func(s *lockState) { s.Drain, s.Until = firstOf(reason, "drained by an operator"), until })
}

func (l *interlock) resume() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.save(func(s *lockState) { s.Drain, s.Until = "", time.Time{} })
}

// draining is why the node takes no more work; empty when it does.
func (l *interlock) draining() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.state.Until.IsZero() && time.Now().After(l.state.Until) {
		return ""
	}
	return l.state.Drain
}

func (l *interlock) name() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state.Name
}

func (l *interlock) setName(name string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if name == "" || name == l.state.Name {
		return nil
	}
	return l.save(func(s *lockState) { s.Name = name })
}

// save changes the state once it is on disk; mu is held.
func (l *interlock) save(change func(*lockState)) error {
	next := l.state
	change(&next)
	if err := atomicfile.WriteJSON(filepath.Join(l.dir, fileState), next); err != nil {
		return err
	}
	l.state, l.kept = next, next.Locked
	return nil
}
