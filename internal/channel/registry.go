package channel

import (
	"context"
	"sync"
	"time"

	"sallyport/internal/identity"
)

// grantGrace is how long the exchange that brought a certificate may take to end.
const grantGrace = 5 * time.Second

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
	if r.id.Ended(c.peer) {
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

// watch checks all connections at every change of the identity, until ctx is
// done. A party that was granted its certificate gives up the enrolment
// connections on which it waited: its upstream comes again as to any other.
func (r *registry) watch(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		changed := r.id.Changed()
		for _, c := range r.all() {
			r.check(c)
			if c.Enrolling() && c.dir == PeerUpstream && !c.dialled && !c.Draining() && !waiting(r.id) {
				wg.Go(func() { c.retire(ctx, grantGrace) })
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}
