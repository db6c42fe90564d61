package gateway

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"sallyport/config"
	"sallyport/gateway/bus"
	"sallyport/gateway/store"
	"sallyport/internal/doors"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// drainTime is how long a stopping gateway waits for what runs.
const drainTime = 5 * time.Second

// Config is what an operator decides.
type Config struct {
	config.Gateway
	Program string // version of this program, as hellos and the API show it
}

// Deps are what main opens and closes around a Server.
type Deps struct {
	Store    *store.DB
	Bus      bus.Bus // the one that wakes after commits of Store
	CA       Issuer
	Doors    doors.Authority    // certifies other programs; nil: the configuration opens no doors
	Identity *identity.Identity // role gateway, in $SALLYPORT_DATA/gateway/identity
	Log      *slog.Logger
	Metrics  prometheus.Registerer // nil: none
}

// Issuer is the certificate authority: *pki.Authority in one process,
// *pki.Client across two.
type Issuer interface {
	Issue(ctx context.Context, r wire.IssueRequest) (chain [][]byte, err error)
	IssueGateway(ctx context.Context, id wire.ID, csr []byte) (chain [][]byte, err error)
	SignRevocations(ctx context.Context, set wire.Revocations, after int64) (wire.Envelope, error)
	Revocations() (wire.Envelope, bool)
	Root() *x509.Certificate
	TrustDomain() string
}

// hooks are what other parts of the gateway do when something happens here.
// They are methods of Server; tests replace them.
type hooks struct {
	// pending looks at a party that waits for a certificate. It is called
	// again, every pendingSweep, until the party is gone. at is where it was met
	// this time.
	pending func(ctx context.Context, key wire.KeyHash, at pendingAt)
	// hop is called with each new channel to an RCP, before the nodes behind it
	// are known; an error ends the use of the channel.
	hop func(ctx context.Context, id wire.ID) error
	// met are called in order after each verified hello of a party of ours,
	// while its session is warm.
	met []func(ctx context.Context, id wire.ID, hello *wire.Hello) error
}

// Server is one gateway.
type Server struct {
	cfg       Config
	store     *store.DB
	bus       bus.Bus
	ca        Issuer
	id        *identity.Identity
	log       *slog.Logger
	metrics   *metrics
	fleet     *fleet
	sessions  *sessions
	tunnels   *tunnels
	links     *links
	live      liveStreams
	room      room // on the disk
	actions   *runner
	enrolment *enrolment
	targets   *targets
	forwards  *forwards
	twin      *twin
	clones    *clones
	specs     specs
	acceptor  *acceptor
	doors     *doorway        // nil: closed
	external  *externalStatus // nil: there is never an external CA
	hooks     hooks
	settling  chan struct{} // holds one token: a node may have been freed of a deleted deployment
	started   time.Time
}

// New puts a gateway together. It does no I/O and starts nothing.
func New(cfg Config, d Deps) (*Server, error) {
	if d.Store == nil || d.Bus == nil || d.CA == nil || d.Identity == nil || d.Log == nil {
		return nil, errors.New("gateway: a dependency is missing")
	}
	if d.Identity.Role() != wire.RoleGateway {
		return nil, fmt.Errorf("gateway: the identity in %s is of role %s", d.Identity.Dir(), d.Identity.Role())
	}
	s := &Server{cfg: cfg, store: d.Store, bus: d.Bus, ca: d.CA, id: d.Identity, log: d.Log, settling: make(chan struct{}, 1), started: time.Now()}
	s.room = room{look: d.Store.Room, every: roomEvery}
	s.fleet = newFleet(defaultTimings, d.Store.Installation().UID)
	var err error
	if s.metrics, err = newMetrics(d.Metrics, s.fleet); err != nil {
		return nil, fmt.Errorf("gateway: register metrics: %w", err)
	}
	if d.Metrics != nil {
		if err := d.Metrics.Register(ends{s}); err != nil {
			return nil, fmt.Errorf("gateway: register metrics: %w", err)
		}
	}
	if s.targets, err = newTargets(s, d.Metrics); err != nil {
		return nil, fmt.Errorf("gateway: register metrics: %w", err)
	}
	s.forwards = newForwards(s.targets, d.Store, d.Log)
	s.links = newLinks(s)
	s.sessions = newSessions(s.fleet, s.metrics, cfg.WarmSessions, s.links.connect, s.dialSession)
	if s.tunnels, err = newTunnels(s, d.Metrics); err != nil {
		return nil, fmt.Errorf("gateway: register metrics: %w", err)
	}
	s.external = newExternalStatus(d.CA, d.Store, d.Log)
	if s.doors, err = newDoorway(s, d.Doors); err != nil {
		return nil, err
	}
	if s.acceptor, err = newAcceptor(s, cfg.Accept, d.Metrics); err != nil {
		return nil, fmt.Errorf("gateway: register metrics: %w", err)
	}
	s.actions = newRunner(s)
	s.wire()
	return s, nil
}

// Run serves until ctx ends, finishes what runs (at most drainTime) and
// returns when all that it started has ended.
func (s *Server) Run(ctx context.Context) error {
	if err := s.twin.stopped(); err != nil {
		return err
	}
	for _, start := range []func(context.Context) error{s.ensureCertificate, s.enrolment.start, s.loadFleet} {
		switch err := start(ctx); {
		case err != nil && ctx.Err() != nil: // we are stopped before we have begun
			return nil
		case err != nil:
			return err
		}
	}
	// Two lives: intake ends at once when we stop, work somewhat later.
	work, endWork := context.WithCancelCause(context.WithoutCancel(ctx))
	defer endWork(nil)
	inner, innerCtx := errgroup.WithContext(work)
	inner.Go(func() error { return s.sessions.Run(innerCtx) })
	inner.Go(func() error { return s.tunnels.Run(innerCtx) })
	inner.Go(func() error { return s.persistPresence(innerCtx) })
	inner.Go(func() error { return s.links.Run(innerCtx) })

	outer, outerCtx := errgroup.WithContext(ctx)
	outer.Go(func() error { // a failure of the inner ones ends the outer ones
		select {
		case <-innerCtx.Done():
			return context.Cause(innerCtx)
		case <-outerCtx.Done():
			return nil
		}
	})
	outer.Go(func() error {
		err := s.twin.watch(outerCtx)
		if err != nil {
			endWork(err) // what runs is not ours to finish
		}
		return err
	})
	outer.Go(func() error { return s.keepCertificate(outerCtx) })
	outer.Go(func() error { return s.watchCA(outerCtx) })
	outer.Go(func() error { return s.watchRoom(outerCtx) })
	outer.Go(func() error {
		return s.external.run(outerCtx, func() int64 { n, _ := s.id.Revocations(); return n })
	})
	outer.Go(func() error { return s.watchPresence(outerCtx) })
	outer.Go(func() error { return s.watchPending(outerCtx) })
	outer.Go(func() error { return s.actions.Run(outerCtx, innerCtx) })
	for c, f := range map[chore]func(context.Context, task) (want, time.Duration){
		choreVisit: s.visit, choreStranger: s.visit, choreOutbox: s.pullOutbox, choreAction: s.actions.kick,
	} {
		outer.Go(func() error { return s.runChore(outerCtx, innerCtx, c, f) })
	}
	s.runMore(outerCtx, outer)
	// Tasks hold the outer group open until they end; the drain time bounds that.
	stopped := context.AfterFunc(outerCtx, func() {
		timer := time.AfterFunc(drainTime, func() { endWork(errSessionsClosed) })
		context.AfterFunc(innerCtx, func() { timer.Stop() })
	})
	defer stopped()
	err := outer.Wait()
	endWork(errSessionsClosed)
	return errors.Join(err, inner.Wait())
}

// runChore hands the parties of one chore's queues to f, each in a goroutine, until stop
// ends; the fleet bounds how many there are at once. Tasks that run then may
// go on until work ends.
func (s *Server) runChore(stop, work context.Context, c chore, f func(context.Context, task) (again want, delay time.Duration)) error {
	var tasks errgroup.Group
	defer func() { _ = tasks.Wait() }() // tasks return no errors
	for {
		for stop.Err() == nil {
			t, ok := s.fleet.take(c)
			if !ok {
				break
			}
			tasks.Go(func() error {
				again, delay := f(work, t)
				s.fleet.done(c, t, again, delay)
				return nil
			})
		}
		select {
		case <-s.fleet.ready[c]:
		case <-stop.Done():
			return nil
		}
	}
}

// watchPresence judges parties when it is time.
func (s *Server) watchPresence(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-s.fleet.retime:
		}
		next := s.fleet.tick(time.Now())
		if next.IsZero() {
			timer.Stop()
			continue
		}
		timer.Reset(max(time.Until(next), 10*time.Millisecond))
	}
}

// loadFleet takes over what the database knows.
func (s *Server) loadFleet(ctx context.Context) error {
	nodes, err := s.store.Nodes(ctx)
	if err != nil {
		return fmt.Errorf("load nodes: %w", err)
	}
	lost, err := s.lostNodes(ctx)
	if err != nil {
		return fmt.Errorf("load open events: %w", err)
	}
	for _, n := range nodes {
		r := nodeRecord(n)
		r.Alarmed = lost[n.ID]
		s.fleet.learn(r)
	}
	if err := s.addConfiguredRCPs(ctx); err != nil {
		return err
	}
	if err := s.targets.refresh(ctx); err != nil {
		return err
	}
	return s.links.reload(ctx)
}

func nodeRecord(n *store.Node) record {
	r := record{ID: n.ID, Role: wire.RoleNode, Name: n.Name, State: n.State, Reason: n.StateReason, Since: n.StateSince, LastSeen: n.LastSeen, Quarantine: n.Quarantine}
	if n.State == wire.StateRevoked {
		if r.Revoked = n.StateReason; r.Revoked == "" {
			r.Revoked = "revoked"
		}
	}
	return r
}

// nodeChanged is called after a node was enrolled, renamed, revoked or removed.
func (s *Server) nodeChanged(ctx context.Context, id wire.ID) error {
	n, err := s.store.Node(ctx, id)
	switch {
	case errors.Is(err, store.ErrNotFound):
		s.fleet.forget(id)
	case err != nil:
		return fmt.Errorf("load node %s: %w", id.Short(), err)
	default:
		s.fleet.learn(nodeRecord(n))
		if n.State != wire.StateRevoked {
			return nil
		}
	}
	s.cutParty(id)
	s.links.cut(id, identity.ErrRevoked)
	s.actions.kick(ctx, task{id: id}) // nobody brings their results any more: they end now, not when their time is over
	return nil
}

// cutParty ends all conversations with a party, and what runs through it.
func (s *Server) cutParty(id wire.ID) {
	s.sessions.cut(id)
	s.tunnels.cut(id)
}

// ensureCertificate issues the gateway's own leaf if it has none that is good.
// The gateway is the local operator of its CA.
func (s *Server) ensureCertificate(ctx context.Context) error {
	switch own, issued := s.id.TrustDomain(), s.ca.TrustDomain(); own {
	case issued:
	case "":
		if err := s.id.Pin(wire.KeyOf(s.ca.Root()), issued); err != nil {
			return fmt.Errorf("trust the certificate authority: %w", err)
		}
	default: // a directory that was lost is made anew, with another root, which no party here trusts
		return fmt.Errorf("the certificate authority is of trust domain %s, this gateway and its parties are of %s: put back its pki directory, or restore both from one backup (`sallyport restore FILE`); "+
			"without either move %s away, and every party has to enrol again", issued, own, s.id.Dir())
	}
	behind, err := s.takeTrust()
	if err != nil {
		return err
	}
	if !behind && !s.id.RenewalDue() {
		return nil
	}
	err = s.renewOwn(ctx)
	if err != nil && time.Now().Before(s.id.NotAfter()) {
		s.log.Error("the gateway starts with the certificate that it has; renewal is tried again in a minute", "error", err, "not_after", s.id.NotAfter())
		return nil
	}
	return err
}

func (s *Server) renewOwn(ctx context.Context) error {
	csr, err := s.id.CSR(false)
	if err != nil {
		return fmt.Errorf("renew the gateway's certificate: %w", err)
	}
	chain, err := s.ca.IssueGateway(ctx, s.id.ID(), csr)
	if err != nil {
		return fmt.Errorf("renew the gateway's certificate: %w", err)
	}
	if _, err := noted(ctx, s.store, chain, s.party(wire.RoleGateway, s.id.ID())); err != nil {
		return fmt.Errorf("renew the gateway's certificate: %w", err)
	}
	if err := s.id.Install(chain); err != nil {
		return fmt.Errorf("renew the gateway's certificate: %w", err)
	}
	s.log.Info("gateway certificate issued", "id", s.id.ID(), "fingerprint", s.id.Fingerprint(), "not_after", s.id.NotAfter())
	_, err = s.takeTrust() // the first leaf brings the first roots
	return err
}

// keepCertificate renews the leaf at two thirds of its life, and within a
// minute when its intermediate is given up, or when the clock was put back to
// before its beginning.
func (s *Server) keepCertificate(ctx context.Context) error {
	var turned caTurn
	for {
		behind, err := s.takeTrust()
		if err == nil && (behind || s.id.RenewalDue()) {
			err = s.renewOwn(ctx)
		}
		if err == nil {
			err = s.followTurn(ctx, &turned)
		}
		if err != nil && ctx.Err() == nil {
			s.log.Error("renewal failed; it is tried again in a minute", "error", err, "not_after", s.id.NotAfter())
		}
		wait := time.Minute
		if err == nil {
			wait = max(0, min(wait, time.Until(s.id.RenewAfter())))
		}
		if !s.awaitTurn(ctx, turned, wait) {
			return nil
		}
	}
}

// Ready says why the gateway cannot do its work now.
func (s *Server) Ready() error {
	if _, err := s.id.Certificate(); err != nil {
		return fmt.Errorf("own certificate: %w", err)
	}
	if s.id.OutOfTime() {
		return fmt.Errorf("own certificate is good from %s to %s, by the clock of this host not now", s.id.NotBefore().UTC().Format(time.RFC3339), s.id.NotAfter().UTC().Format(time.RFC3339))
	}
	return nil
}
