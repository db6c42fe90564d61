package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

const (
	// pendingSweep is how often a party that still waits is looked at again: a
	// grant must not wait long for it, and most often nothing changed.
	pendingSweep = 10 * time.Second
	// pendingAtOnce bounds the enrolment sessions by way of one first hop.
	pendingAtOnce = 8
	// pendingTime bounds one of them.
	pendingTime = 30 * time.Second
)

// watchPending shows every party that waits for a certificate to the
// enrolment, when it comes and from time to time while it is there. An RCP
// that makes parties up, or lets their sessions hang, delays only its own.
func (s *Server) watchPending(ctx context.Context) error {
	w := &pendingWork{s: s, busy: make(map[wire.KeyHash]bool), running: make(map[wire.ID]int)}
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
			for _, key := range s.waitingKeys() {
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
	running map[wire.ID]int // by first hop; "" for those that we have a channel to
}

// start looks at one party unless that goes on already, or its first hop has
// too many: the sweep comes again.
func (w *pendingWork) start(ctx context.Context, key wire.KeyHash) {
	rcp, hop, peer, ok := w.s.whereIs(key)
	if !ok || w.s.hooks.pending == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.busy[key] || w.running[hop] >= pendingAtOnce {
		return
	}
	w.busy[key] = true
	w.running[hop]++
	w.wg.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, pendingTime)
		defer cancel()
		w.s.hooks.pending(ctx, key, rcp, peer)
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.busy, key)
		if w.running[hop]--; w.running[hop] == 0 {
			delete(w.running, hop)
		}
	})
}

// whereIs finds the way to a pending party: our own channel first. rcp is nil
// for one that dialled us.
func (s *Server) whereIs(key wire.KeyHash) (rcp *store.RCP, hop wire.ID, peer wire.Peer, ok bool) {
	s.links.mu.Lock()
	p := s.links.pending[key]
	s.links.mu.Unlock()
	if p != nil {
		peer = wire.Peer{Pending: key, Carrier: p.conn.Carrier(), Source: p.conn.RemoteAddr(), Dialled: p.conn.Dialled(), Since: p.conn.Since()}
		return s.links.record(p.rcp), "", peer, true
	}
	for _, at := range s.fleet.pendingRoutes(key) {
		return s.links.recordOf(at.Link), at.Link, at.Peer, true
	}
	return nil, "", wire.Peer{}, false
}

// ConnectPending opens a stream to a party that waits for a certificate. rcp
// names the RCP by way of which it goes; empty for a channel of our own.
func (s *Server) ConnectPending(ctx context.Context, key wire.KeyHash) (stream net.Conn, rcp string, err error) {
	authority := wire.PendingAuthority(key)
	s.links.mu.Lock()
	p := s.links.pending[key]
	s.links.mu.Unlock()
	if p != nil {
		stream, err := p.conn.Connect(ctx, authority, nil)
		if err != nil {
			return nil, p.rcp, fmt.Errorf("reach pending party %s: %w", key.Fingerprint(), err)
		}
		return stream, p.rcp, nil
	}
	routes := s.fleet.pendingRoutes(key)
	errs := []error{ErrNotConnected}
	for _, r := range routes {
		stream, err := s.links.connect(ctx, r.Link, authority)
		if err == nil {
			return stream, r.Name, nil
		}
		errs = append(errs, fmt.Errorf("rcp %s: %w", r.Name, err))
	}
	return nil, "", fmt.Errorf("reach pending party %s: %w", key.Fingerprint(), errors.Join(errs...))
}
