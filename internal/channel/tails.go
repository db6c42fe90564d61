package channel

import "sync"

// tails are the goroutines in which streams are copied, and closed ones hand
// over their last bytes. They belong to the owner of the connection, which waits for them after it
// closed the connection; a stream that is closed later still, which has nothing
// left to hand over, is finished by who closes it. (A WaitGroup cannot be: its
// first Add must not meet its Wait.)
type tails struct {
	mu     sync.Mutex
	n      int
	waited bool
	none   sync.Cond
}

// Go runs f in a goroutine, or at once after Wait was called.
func (t *tails) Go(f func()) {
	if !t.TryGo(f) {
		f()
	}
}

// TryGo runs f in a goroutine; after Wait was called it does not, and says so.
func (t *tails) TryGo(f func()) bool {
	t.mu.Lock()
	if t.waited {
		t.mu.Unlock()
		return false
	}
	t.n++
	t.mu.Unlock()
	go func() {
		defer func() {
			t.mu.Lock()
			defer t.mu.Unlock()
			if t.n--; t.n == 0 && t.none.L != nil {
				t.none.Broadcast()
			}
		}()
		f()
	}()
	return true
}

// Wait returns when no goroutine is left, and there will be none any more.
func (t *tails) Wait() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.waited = true
	t.none.L = &t.mu
	for t.n > 0 {
		t.none.Wait()
	}
}
