package gateway

import (
	"context"
	"fmt"
	"net"
	"net/http"

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
}

// runMore starts what else runs as long as the server does.
func (s *Server) runMore(ctx context.Context, g *errgroup.Group) {
	g.Go(func() error { return s.enrolment.run(ctx) })
	g.Go(func() error { return s.runDeploy(ctx) })
	g.Go(func() error { return s.serveAPI(ctx) })
}

func (s *Server) dialSession(ctx context.Context, stream net.Conn, party wire.Party) (endToEnd, error) {
	return session.Dial(ctx, stream, s.id, party)
}

// drainRCP asks an RCP, in a session with it, to take no more streams, or to
// take them again.
func (s *Server) drainRCP(ctx context.Context, r *store.RCP, on bool) error {
	method, in := http.MethodDelete, any(nil)
	if on {
		method, in = http.MethodPost, wire.Drain{Reason: "drained by an operator"}
	}
	err := s.sessions.Do(ctx, s.party(wire.RoleRCP, r.PartyID), func(ctx context.Context, c *conversation) error {
		return c.call(ctx, method, wire.PathDrain, in, nil, 0)
	})
	if err != nil {
		return fmt.Errorf("drain rcp %s: %w", r.Name, err)
	}
	s.fleet.ask(wantHello, r.PartyID)
	return nil
}

// retryRCP dials an RCP that is not connected, now.
func (s *Server) retryRCP(r *store.RCP) { s.links.retry(r) }

var _ reaching = (*Server)(nil)
