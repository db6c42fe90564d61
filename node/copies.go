package node

import (
	"net/http"
	"sync"

	"sallyport/internal/wire"
)

// copies is how a gateway tells this process from copies of it: those that a
// virtual machine leaves which is copied with its memory. They share all that
// the process made itself, random numbers too; only what comes from outside
// makes them differ. So this must stay in memory: on disk it would be shared.
type copies struct {
	mu   sync.Mutex
	held wire.Nonce // the last one brought; at first one of our own
	mark wire.Nonce // that made a boot ID of our own; zero: none did
}

// heard takes what a request for the hello brings, and returns what was held
// before: never the same twice. Zero: the request brings none. It tells
// whether the boot ID is another one now.
func (c *copies) heard(h http.Header) (previous wire.Nonce, marked bool) {
	n, err := wire.ParseNonce(h.Get(wire.HeaderNonce))
	if err != nil {
		return wire.Nonce{}, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if n == c.held {
		return wire.Nonce{}, false // no gateway asks twice with one
	}
	previous, c.held = c.held, n
	if marked = h.Get(wire.HeaderMark) == "1"; marked {
		c.mark = n
	}
	return previous, marked
}

// boot is the boot ID of this process, which was made at its start.
func (c *copies) boot(made string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mark.IsZero() {
		return made
	}
	return wire.MarkBoot(made, c.mark)
}
