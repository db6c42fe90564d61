package channel

import (
	"context"
	"sync"
	"time"

	"sallyport/internal/identity"
)

// issuerGrace is how long a connection goes on whose peer's intermediate was
// given up, so that the one that takes its place is there first.
const issuerGrace = 10 * time.Second

// clockLook is how often connections are looked at that the clock may have left
// behind.
const clockLook = time.Minute

// grantGrace is how long the exchange that brought a certificate may take to end.
const grantGrace = 5 * time.Second

// registry holds the live connections of one owner, cuts those whose peer is
// revoked, and has those replaced whose peer's intermediate was given up.
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
	if r.id.Ended(c.peer) {
		c.Close(identity.ErrRevoked)
	}
}

func (r *registry) remove(c *Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.conns, c)
}

// outlive ends a connection some time after its replacement was asked for.
func (c *Conn) outlive(ctx context.Context) {
	c.requestDrain()
	late := time.NewTimer(issuerGrace)
	defer late.Stop()
	select {
	case <-late.C:
	case <-c.done:
	case <-ctx.Done():
	}
	c.Close(identity.ErrRevoked)
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

// watch checks all connections at every change of the identity, and now and then
// by the clock, until ctx is done. A party that was granted its certificate gives up
// the enrolment connections on which it waited: its upstream comes again as to any
// other. One of which a leaf is not valid by the clock ends: it is over, or, where it
// was made while clocks were days ahead, it has not begun. Its timer knows nothing of
// a host that slept, or whose clock was set; no session comes about between two such
// leaves, and only a new connection brings a new one.
func (r *registry) watch(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	tick := time.NewTicker(clockLook)
	defer tick.Stop()
	for {
		changed, now := r.id.Changed(), time.Now()
		for _, c := range r.all() {
			switch {
			case r.id.Revoked(c.peer.Key):
				c.Close(identity.ErrRevoked)
			case c.outOfTime(now):
				c.Close(ErrExpired)
			case r.id.Ended(c.peer) && !c.outlived:
				c.outlived = true
				wg.Go(func() { c.outlive(ctx) })
			}
			if c.Enrolling() && c.dir == PeerUpstream && !c.dialled && !c.Draining() && !waiting(r.id) {
				wg.Go(func() { c.retire(ctx, grantGrace) })
			}
		}
		select {
		case <-changed:
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
