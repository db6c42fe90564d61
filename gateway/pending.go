package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"sallyport/internal/wire"
)

const (
	// pendingSweep is how often a party that still waits is looked at again: a
	// grant must not wait long for it, and most often nothing changed.
	pendingSweep = 10 * time.Second
	// pendingAtOnce bounds the enrolment sessions by way of one first hop; the
	// others wait in a queue, as long as the fleet knows pending parties.
	pendingAtOnce = 32
	// pendingTime bounds one of them, and pendingOpen the opening of it by one
	// way, so that there is time for another.
	pendingTime = 30 * time.Second
	pendingOpen = 8 * time.Second
	// pendingSlow is how long one of them may take before its party has to let
	// the others go first, and keepTime what of it an RCP gets that is to keep the
	// party's place.
	pendingSlow = 2 * time.Second
	keepTime    = time.Second
)

// watchPending shows every party that waits for a certificate to the
// enrolment, when it comes and from time to time while it is there. An RCP
// that makes parties up, or lets their sessions hang, delays only its own.
func (s *Server) watchPending(ctx context.Context) error {
	w := newPendingWork(s)
	defer w.wg.Wait()
	sweep := time.NewTicker(pendingSweep)
	defer sweep.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case key := <-s.fleet.arrived:
			w.start(ctx, key)
		case <-sweep.C:
			keys := s.waitingKeys()
			w.forget(keys)
			for _, key := range keys {
				w.start(ctx, key)
			}
		}
	}
}

// waitingKeys are all pending parties: those that RCPs report, in no order,
// and those that we have a channel to.
func (s *Server) waitingKeys() []wire.KeyHash {
	keys := s.fleet.pendingKeys()
	s.links.mu.Lock()
	defer s.links.mu.Unlock()
	for key := range s.links.pending {
		keys = append(keys, key)
	}
	return keys
}

// pendingWork bounds what goes on with pending parties.
type pendingWork struct {
	s  *Server
	wg sync.WaitGroup

	mu      sync.Mutex
	busy    map[wire.KeyHash]bool
	queued  map[wire.KeyHash]bool
	slow    map[wire.KeyHash]bool // that let us wait when we looked at them last
	running map[wire.ID]int       // by first hop; "" for those that we have a channel to
	queues  map[wire.ID]*turns    // likewise; with keys that are not queued any more between
}

func newPendingWork(s *Server) *pendingWork {
	return &pendingWork{s: s, busy: make(map[wire.KeyHash]bool), queued: make(map[wire.KeyHash]bool), slow: make(map[wire.KeyHash]bool),
		running: make(map[wire.ID]int), queues: make(map[wire.ID]*turns)}
}

// forget forgets who was slow and is not there any more.
func (w *pendingWork) forget(there []wire.KeyHash) {
	w.mu.Lock()
	defer w.mu.Unlock()
	slow := make(map[wire.KeyHash]bool)
	for _, key := range there {
		if w.slow[key] {
			slow[key] = true
		}
	}
	w.slow = slow
}

// start looks at one party by a first hop that has room. Else the party waits
// for its turn at one, and may be started by another before that: the sweep
// comes again. It tells whether the party is there.
func (w *pendingWork) start(ctx context.Context, key wire.KeyHash) (there bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.busy[key] || w.s.hooks.pending == nil {
		return false
	}
	at, ok := w.s.whereIs(key, func(hop wire.ID) bool { return w.running[hop] < pendingAtOnce })
	if ok {
		delete(w.queued, key)
		w.busy[key] = true
		w.running[at.Link]++
		w.wg.Go(func() { w.look(ctx, key, at) })
		return true
	}
	at, ok = w.s.whereIs(key, func(wire.ID) bool { return true })
	if !ok || w.queued[key] {
		return ok
	}
	q := w.queues[at.Link]
	if q == nil {
		q = new(turns)
		w.queues[at.Link] = q
	}
	if q.n < 2*maxPendingPerLink {
		w.queued[key] = true
		q.add(siteOf(at.Peer.Source), key, w.slow[key])
	}
	return true
}

// look looks at a party, and starts the one that waits behind it.
func (w *pendingWork) look(ctx context.Context, key wire.KeyHash, at pendingAt) {
	began := time.Now()
	within, cancel := context.WithTimeout(ctx, pendingTime)
	w.s.hooks.pending(within, key, at)
	cancel()
	w.mu.Lock()
	delete(w.busy, key)
	if time.Since(began) > pendingSlow {
		w.slow[key] = true
	} else {
		delete(w.slow, key)
	}
	if w.running[at.Link]--; w.running[at.Link] == 0 {
		delete(w.running, at.Link)
	}
	w.mu.Unlock()
	for ctx.Err() == nil {
		next, ok := w.next(at.Link)
		if !ok || w.start(ctx, next) { // who has left meanwhile gives up the turn
			return
		}
	}
}

// next takes the next party of a first hop out of its queue.
func (w *pendingWork) next(hop wire.ID) (key wire.KeyHash, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if q := w.queues[hop]; q != nil {
		for {
			key, ok := q.next()
			if !ok {
				break
			}
			if w.queued[key] {
				delete(w.queued, key)
				return key, true
			}
		}
	}
	delete(w.queues, hop)
	return "", false
}

// whereIs finds a way to a pending party whose first hop has room: our own
// channel first.
func (s *Server) whereIs(key wire.KeyHash, room func(hop wire.ID) bool) (at pendingAt, ok bool) {
	all := s.pendingAt(key)
	i := slices.IndexFunc(all, func(at pendingAt) bool { return room(at.Link) })
	if i < 0 {
		return pendingAt{}, false
	}
	return all[i], true
}

// pendingAt says where a party waits: at a channel of our own, then at the first
// hops that report it, in no order.
func (s *Server) pendingAt(key wire.KeyHash) (at []pendingAt) {
	s.links.mu.Lock()
	p := s.links.pending[key]
	s.links.mu.Unlock()
	if p != nil {
		at = append(at, pendingAt{Name: p.rcp, Peer: wire.Peer{Pending: key, Carrier: p.conn.Carrier(), Source: p.conn.RemoteAddr(), Dialled: p.conn.Dialled(), Since: p.conn.Since()}})
	}
	return append(at, s.fleet.pendingRoutes(key)...)
}

// pendingWays are the ways to a party that waits for a certificate: a channel
// of our own first, then that of the first hop whose place the look takes, then
// the others in no order. So an RCP that lets sessions hang does it in its own
// places, also with parties that wait elsewhere too.
func (s *Server) pendingWays(key wire.KeyHash, hop wire.ID) (ways []pendingWay) {
	authority := wire.PendingAuthority(key)
	s.links.mu.Lock()
	p := s.links.pending[key]
	s.links.mu.Unlock()
	if p != nil {
		ways = append(ways, pendingWay{p.rcp, func(ctx context.Context) (net.Conn, error) { return p.conn.Connect(ctx, authority, nil) }})
	}
	routes := s.fleet.pendingRoutes(key)
	if i := slices.IndexFunc(routes, func(r pendingAt) bool { return r.Link == hop }); i > 0 {
		routes[0], routes[i] = routes[i], routes[0]
	}
	for _, r := range routes {
		ways = append(ways, pendingWay{r.Name, func(ctx context.Context) (net.Conn, error) { return s.links.connect(ctx, r.Link, authority) }})
	}
	return ways
}

// keepPlace tells every RCP where a party waits that an operator is shown its
// request: strangers who come later do not push it out there. An RCP that cannot be
// told now is told when the party is looked at again.
func (s *Server) keepPlace(ctx context.Context, key wire.KeyHash) {
	ctx, cancel := context.WithTimeout(ctx, keepTime)
	defer cancel()
	var telling sync.WaitGroup
	defer telling.Wait()
	for _, r := range s.fleet.pendingRoutes(key) {
		telling.Go(func() {
			stream, err := s.links.connectWith(ctx, r.Link, wire.PendingAuthority(key), http.Header{wire.HeaderRequested: {"1"}})
			if err == nil {
				_ = stream.Close()
			} else {
				s.log.Debug("RCP not told that a waiting party keeps its place", "rcp", r.Name, "fingerprint", key.Fingerprint(), "error", err)
			}
		})
	}
}

// pendingWay is one way to a party that waits for a certificate.
type pendingWay struct {
	rcp     string // by way of which; empty for a channel of our own that the party dialled
	connect func(ctx context.Context) (net.Conn, error)
}

// openPending opens a session with a party that waits for a certificate by the
// first of its ways that works, each of which gets pendingOpen.
func openPending(ctx context.Context, key wire.KeyHash, ways []pendingWay, dial func(ctx context.Context, stream net.Conn) (endToEnd, error)) (endToEnd, string, error) {
	errs := []error{ErrNotConnected}
	for _, way := range ways {
		session, err := way.open(ctx, dial)
		if err == nil {
			return session, way.rcp, nil
		}
		if way.rcp != "" {
			err = fmt.Errorf("rcp %s: %w", way.rcp, err)
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, "", fmt.Errorf("reach pending party %s: %w", key.Fingerprint(), errors.Join(errs...))
}

func (w pendingWay) open(ctx context.Context, dial func(ctx context.Context, stream net.Conn) (endToEnd, error)) (endToEnd, error) {
	ctx, cancel := context.WithTimeout(ctx, pendingOpen)
	defer cancel()
	stream, err := w.connect(ctx)
	if err != nil {
		return nil, err
	}
	session, err := dial(ctx, stream)
	if err != nil {
		_ = stream.Close()
		return nil, fmt.Errorf("enrolment session: %w", err)
	}
	return session, nil
}
