package channel

import (
	"context"
	"sync"

	"sallyport/internal/identity"
)

// registry holds the live connections of one owner, and cuts those whose peer
// is revoked.
type registry struct {
	id *identity.Identity

	mu    sync.Mutex
	conns map[*Conn]struct{}
}

func newRegistry(id *identity.Identity) *registry {
	return &registry{id: id, conns: map[*Conn]struct{}{}}
}

// add takes a connection in; a peer that was revoked since its handshake is cut.
func (r *registry) add(c *Conn) {
	r.mu.Lock()
	r.conns[c] = struct{}{}
	r.mu.Unlock()
	r.check(c)
}

func (r *registry) remove(c *Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.conns, c)
}

func (r *registry) check(c *Conn) {
	if r.id.Revoked(c.peer.Key) {
		c.Close(identity.ErrRevoked)
	}
}

func (r *registry) all() []*Conn {
	r.mu.Lock()
	defer r.mu.Unlock()
	conns := make([]*Conn, 0, len(r.conns))
	for c := range r.conns {
		conns = append(conns, c)
	}
	return conns
}

// watch checks all connections at every change of the identity, until ctx is done.
func (r *registry) watch(ctx context.Context) {
	for {
		changed := r.id.Changed()
		for _, c := range r.all() {
			r.check(c)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}
