package gateway

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyport/gateway/store"
	"sallyport/internal/session"
	"sallyport/internal/wire"
)

// wire ties the parts of the gateway together: what follows from a hello, and
// who looks at parties that wait.
func (s *Server) wire() {
	s.hooks.met = append(s.hooks.met, s.reconcile)
	s.wireEnrolment()
	s.twin = newTwin(s)
	s.clones = newClones(s)
	s.fleet.onChannel = s.clones.suspect
	s.hooks.hop = s.twin.hop
	s.hooks.met = append(s.hooks.met, s.twin.met)
}

// runMore starts what else runs as long as the server does.
func (s *Server) runMore(ctx context.Context, g *errgroup.Group) {
	g.Go(func() error { return s.enrolment.run(ctx) })
	g.Go(func() error { return s.clones.run(ctx) })
	g.Go(func() error { return s.runDeploy(ctx) })
	g.Go(func() error { return s.runSettle(ctx) })
	g.Go(func() error { return s.keepRetention(ctx) })
	g.Go(func() error { return s.targets.run(ctx, s.bus) })
	g.Go(func() error { return s.forwards.run(ctx, s.bus) })
	g.Go(func() error { return s.acceptor.run(ctx) })
	g.Go(func() error { return s.serveAPI(ctx) })
	g.Go(func() error { return s.doors.run(ctx) })
}

func (s *Server) dialSession(ctx context.Context, stream net.Conn, party wire.Party) (endToEnd, error) {
	return session.Dial(ctx, stream, s.id, party)
}

// drainRCP asks an RCP, in a session with it, to take no more streams, or to
// take them again.
func (s *Server) drainRCP(ctx context.Context, r *store.RCP, on bool) error {
	var d *wire.Drain
	if on {
		d = &wire.Drain{Reason: "drained by an operator"}
	}
	if err := s.drain(ctx, s.party(wire.RoleRCP, r.PartyID), d); err != nil {
		return fmt.Errorf("%s rcp %s: %w", drainVerb(d), r.Name, err)
	}
	return nil
}

// drainNode asks a node, in a session with it, to take no more desired states
// and actions, or, without a drain, to take them again.
func (s *Server) drainNode(ctx context.Context, n *store.Node, d *wire.Drain) error {
	if err := s.drain(ctx, s.party(wire.RoleNode, n.ID), d); err != nil {
		return fmt.Errorf("%s node %s: %w", drainVerb(d), n.Name, err)
	}
	return nil
}

// drainVerb is what the operator called it.
func drainVerb(d *wire.Drain) string {
	if d == nil {
		return "resume"
	}
	return "drain"
}

func (s *Server) drain(ctx context.Context, party wire.Party, d *wire.Drain) error {
	method, in := http.MethodDelete, any(nil)
	if d != nil {
		method, in = http.MethodPost, d
	}
	err := s.sessions.Do(ctx, party, func(ctx context.Context, c *conversation) error {
		return c.call(ctx, method, wire.PathDrain, in, nil, 0)
	})
	if err == nil {
		s.fleet.ask(wantHello, party.ID)
	}
	return err
}

// drainSeen is how long one who asked for a drain, or for its end, waits for the
// state that the party itself then tells.
const drainSeen = 2 * time.Second

// seenDraining returns when the fleet knows what the party was told just now: the
// answer to the operator shows it.
func (s *Server) seenDraining(ctx context.Context, id wire.ID, on bool) {
	ctx, cancel := context.WithTimeout(ctx, drainSeen)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		switch p := s.fleet.Presence(id); {
		case !p.Connected, (p.State == wire.StateDraining) == on,
			p.State == wire.StateReadonly, p.State == wire.StateLocked: // which are told before it
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
