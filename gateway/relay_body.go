package gateway

import (
	"errors"
	"io"
	"sync"
)

// relayBody is the caller's body. Its beginning is kept until a target has
// answered, so that a request that did not reach one can be sent again.
type relayBody struct {
	src io.Reader

	reading sync.Mutex // held while src is read, which may take for ever

	mu      sync.Mutex
	kept    []byte
	total   int       // what was read of src
	lost    bool      // kept is not all of it
	done    bool      // a target has answered: nothing need be kept
	current *bodyView // the only one that may read
	err     error     // of src, io.EOF included
}

// bodyView is the body as one attempt reads it.
type bodyView struct {
	b        *relayBody
	pos      int
	progress func() // called after each read
}

var errStale = errors.New("the beginning of the body is gone")

// view begins to read from the beginning; earlier views read no more.
func (b *relayBody) view(progress func()) *bodyView {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.current = &bodyView{b: b, progress: progress}
	return b.current
}

// again says whether another view would see all of the body.
func (b *relayBody) again() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.lost && !b.done
}

// answered ends the keeping.
func (b *relayBody) answered() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.done = true
}

// Read implements [io.Reader].
func (v *bodyView) Read(p []byte) (n int, err error) {
	defer func() {
		if n > 0 {
			v.progress()
		}
	}()
	if n, ok, err := v.fromKept(p); ok {
		return n, err
	}
	b := v.b
	b.reading.Lock()
	defer b.reading.Unlock()
	if n, ok, err := v.fromKept(p); ok { // an earlier view's read has ended meanwhile
		return n, err
	}
	n, err = b.src.Read(p)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.total += n
	b.err = err
	switch {
	case b.lost:
	case b.done, b.total > maxReplay:
		b.kept, b.lost = nil, true
	default:
		b.kept = append(b.kept, p[:n]...)
	}
	if b.current != v { // the next view has it, if it was kept
		return 0, errStale
	}
	v.pos += n
	return n, err
}

// fromKept reads what was read before; ok is false if src has to be read.
func (v *bodyView) fromKept(p []byte) (n int, ok bool, err error) {
	b := v.b
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.current != v, v.pos < b.total && b.lost:
		return 0, true, errStale
	case v.pos < b.total:
		n = copy(p, b.kept[v.pos:])
		v.pos += n
		return n, true, nil
	case b.err != nil:
		return 0, true, b.err
	}
	return 0, false, nil
}

// Close implements [io.Closer]. The body itself is closed by the server.
func (v *bodyView) Close() error { return nil }
