package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"sallyport/config"
	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

const (
	// maxVisits is how many nodes are asked at once for what is parked there
	// because one first hop hints so, maxAllVisits because any does: an RCP that
	// lets every session hang delays only its own. maxAskedRCPs is how many RCPs
	// are asked: a request waits at each of them.
	maxVisits    = 64
	maxAllVisits = 1024
	maxAskedRCPs = 256
	// maxAccepted bounds what is accepted, partyAccepted that of one party.
	maxAccepted   = 1024
	partyAccepted = 256
	// dialService bounds the dialling of a service.
	dialService = 10 * time.Second
	// burst is how long a node is asked for more after it had something: the
	// next client needs no signal.
	burst = 5 * time.Second
	// lookForRCPs is the pause between two looks for RCPs that nobody asks,
	// noProxy that after one said that no clients come to it.
	lookForRCPs = 2 * time.Second
	noProxy     = 30 * time.Second
	// askSlack is what an answer may take beyond the time that it may wait.
	askSlack = 4 * time.Second
)

// acceptor lets clients in the networks of nodes and RCPs reach services here:
// those of the configuration, and nothing else. A client gives a name; where
// the service is stands in the configuration alone. Without services it asks
// nobody and hears no hint.
type acceptor struct {
	s        *Server
	services config.Services
	metrics  *prometheus.CounterVec // by result

	strangers, failures *rate.Limiter // of the log

	ctx   context.Context // of everything that run waits for
	end   context.CancelCauseFunc
	tasks sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	asked   map[wire.ID]bool // visits under way; true: there was another hint
	visits  map[wire.ID]int  // likewise, by the first hop that hinted first
	rcps    map[wire.ID]bool
	busy    map[wire.ID]bool // parked connections that are being accepted
	open    int
	byParty map[wire.ID]int
}

func newAcceptor(s *Server, services config.Services, reg prometheus.Registerer) (*acceptor, error) {
	a := &acceptor{s: s, services: services,
		metrics: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sallyport_gateway_accepted_total", Help: "Connections of local clients at proxies of nodes and RCPs, by what became of them."}, []string{"result"}),
		asked:   map[wire.ID]bool{}, visits: map[wire.ID]int{}, rcps: map[wire.ID]bool{}, busy: map[wire.ID]bool{}, byParty: map[wire.ID]int{},
		strangers: rate.NewLimiter(1, 10), failures: rate.NewLimiter(1, 10)}
	a.ctx, a.end = context.WithCancelCause(context.Background())
	if len(services) > 0 || s.doors != nil {
		s.fleet.onParked = a.hint
	}
	if reg == nil {
		return a, nil
	}
	return a, reg.Register(a.metrics)
}

// run asks RCPs until ctx ends, and returns when all that was accepted has ended.
func (a *acceptor) run(ctx context.Context) error {
	if len(a.services) > 0 || a.s.doors != nil {
		a.lookForRCPs(ctx)
	}
	<-ctx.Done()
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.end(errSessionsClosed)
	a.tasks.Wait()
	return nil
}

// goLocked starts something that run waits for.
func (a *acceptor) goLocked(f func()) bool {
	if a.closed {
		return false
	}
	a.tasks.Go(f)
	return true
}

// hint is told by the fleet, with its lock held, that a node may have parked
// connections, as a first hop says. It may be made up: then a visit finds nothing.
func (a *acceptor) hint(node, hop wire.ID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, ok := a.asked[node]; ok {
		a.asked[node] = true
		return
	}
	if a.visits[hop] >= maxVisits || len(a.asked) >= maxAllVisits {
		return // the client hears 504 and comes again
	}
	if a.goLocked(func() { a.visit(node, hop) }) {
		a.asked[node] = false
		a.visits[hop]++
	}
}

// visit accepts what is parked at a node, and stays while more comes.
func (a *acceptor) visit(node, hop wire.ID) {
	party := a.s.party(wire.RoleNode, node)
	for {
		err := a.collect(party, 0, burst)
		if err != nil && a.ctx.Err() == nil {
			a.s.log.Debug("parked connections not read", "party", party, "error", err)
		}
		a.mu.Lock()
		again := a.asked[node] && err == nil && !a.closed
		if !again {
			delete(a.asked, node)
			if a.visits[hop]--; a.visits[hop] == 0 {
				delete(a.visits, hop)
			}
			a.mu.Unlock()
			return
		}
		a.asked[node] = false
		a.mu.Unlock()
	}
}

// collect accepts what is parked at a party until nothing more comes within
// wait. The first answer is waited for for first.
func (a *acceptor) collect(party wire.Party, first, wait time.Duration) error {
	after := int64(0)
	for next := first; ; next = wait {
		var list wire.ParkedList
		q := url.Values{"after": {strconv.FormatInt(after, 10)}, "wait": {wire.Duration(next).String()}}
		ctx, cancel := context.WithTimeout(a.ctx, next+sessionAnswer+askSlack)
		err := a.s.sessions.Do(ctx, party, func(ctx context.Context, c *conversation) error {
			return c.call(ctx, http.MethodGet, wire.PathParked+"?"+q.Encode(), nil, &list, wire.MaxParkedList)
		})
		cancel()
		if err != nil {
			return err
		}
		for _, p := range list.Parked {
			if p.N <= after {
				return fmt.Errorf("%s repeats connection %d", party, p.N)
			}
			after = p.N
			a.begin(party, p)
		}
		if len(list.Parked) == 0 {
			return nil
		}
	}
}

// lookForRCPs keeps a request waiting at every RCP that is connected: an RCP
// has nobody above it to whom it signals.
func (a *acceptor) lookForRCPs(ctx context.Context) {
	tick := time.NewTicker(lookForRCPs)
	defer tick.Stop()
	for ctx.Err() == nil {
		for _, id := range a.s.fleet.connected(wire.RoleRCP) {
			a.mu.Lock()
			if !a.rcps[id] && len(a.rcps) < maxAskedRCPs {
				a.rcps[id] = a.goLocked(func() { a.followRCP(id) })
			}
			a.mu.Unlock()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

func (a *acceptor) followRCP(id wire.ID) {
	defer func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.rcps, id)
	}()
	for a.ctx.Err() == nil {
		err := a.collect(a.s.party(wire.RoleRCP, id), wire.MaxParkedWait.Std(), wire.MaxParkedWait.Std())
		if err == nil {
			continue
		}
		a.s.log.Debug("parked connections not read", "rcp", id, "error", err)
		pause := lookForRCPs
		var no *statusError
		if errors.As(err, &no) && no.Status == http.StatusNotFound {
			pause = noProxy
		}
		select {
		case <-time.After(pause):
		case <-a.ctx.Done():
		}
		if pause != noProxy {
			return // it is asked again while it is connected
		}
	}
}

// begin accepts or refuses one connection, unless that is being done.
func (a *acceptor) begin(party wire.Party, p wire.Parked) {
	if _, err := wire.ParseID(string(p.ID)); err != nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.busy[p.ID] || a.open >= maxAccepted || a.byParty[party.ID] >= partyAccepted {
		return
	}
	started := a.goLocked(func() {
		defer func() {
			a.mu.Lock()
			defer a.mu.Unlock()
			delete(a.busy, p.ID)
			a.open--
			if a.byParty[party.ID]--; a.byParty[party.ID] == 0 {
				delete(a.byParty, party.ID)
			}
		}()
		a.accept(party, p)
	})
	if started {
		a.busy[p.ID] = true
		a.open++
		a.byParty[party.ID]++
	}
}

// accept joins one parked connection to the service that its client names. The
// service is dialled first, so that the client hears when it is not there.
func (a *acceptor) accept(party wire.Party, p wire.Parked) {
	log := a.s.log.With("party", party.String(), "service", wire.Quotable(p.Service), "source", wire.Quotable(p.Source))
	if a.s.doors != nil && p.Service == a.s.cfg.DoorsName {
		a.admit(party, p, log)
		return
	}
	service, ok := a.services.Find(p.Service)
	if !ok {
		a.metrics.WithLabelValues("unknown").Inc()
		if a.strangers.Allow() {
			log.Warn("local client refused: SALLYPORT_GATEWAY_ACCEPT names no such service")
		}
		a.refuse(party, wire.ParkedRefusal{ID: p.ID, Status: http.StatusForbidden, Reason: "the gateway offers no such service"})
		return
	}
	conn, err := a.dial(service)
	if err != nil {
		a.metrics.WithLabelValues("unreachable").Inc()
		if a.failures.Allow() {
			log.Error("service cannot be reached", "address", service.Addr, "error", err)
		}
		// Where it is, and why not, is no business of a client.
		a.refuse(party, wire.ParkedRefusal{ID: p.ID, Status: http.StatusBadGateway, Reason: "the gateway cannot reach it"})
		return
	}
	ctx, cancel := context.WithTimeout(a.ctx, openAll)
	stream, err := a.s.dialTarget(ctx, party.ID, wire.ParkedTarget(p.ID))
	cancel()
	if err != nil {
		a.metrics.WithLabelValues("lost").Inc()
		log.Debug("local client lost", "error", errors.Join(err, conn.Close()))
		return
	}
	a.metrics.WithLabelValues("accepted").Inc()
	log.Info("local client accepted")
	sent, received, err := tunnel.Join(a.ctx, stream, conn)
	log.Debug("local client ended", "sent", sent, "received", received, "reason", err)
}

// admit leads one parked connection to the doors, which are here.
func (a *acceptor) admit(party wire.Party, p wire.Parked, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(a.ctx, openAll)
	stream, err := a.s.dialTarget(ctx, party.ID, wire.ParkedTarget(p.ID))
	cancel()
	if err != nil {
		a.metrics.WithLabelValues("lost").Inc()
		log.Debug("local client lost", "error", err)
		return
	}
	a.metrics.WithLabelValues("accepted").Inc()
	a.s.doors.admit(a.ctx, party, stream)
}

func (a *acceptor) dial(service config.Service) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(a.ctx, dialService)
	defer cancel()
	var d net.Dialer
	d.SetMultipathTCP(false)
	return d.DialContext(ctx, "tcp", service.Addr)
}

func (a *acceptor) refuse(party wire.Party, r wire.ParkedRefusal) {
	ctx, cancel := context.WithTimeout(a.ctx, sessionAnswer)
	defer cancel()
	err := a.s.sessions.Do(ctx, party, func(ctx context.Context, c *conversation) error {
		return c.call(ctx, http.MethodPost, wire.PathParked, r, nil, 0)
	})
	if err != nil {
		a.s.log.Debug("refusal not told", "party", party, "error", err)
	}
}

// connected lists the parties of a role that are ours and can be reached now.
func (f *fleet) connected(role wire.Role) (ids []wire.ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id, m := range f.members {
		if m.role == role && m.known && m.revoked == "" && len(f.liveWays(m)) > 0 {
			ids = append(ids, id)
		}
	}
	return ids
}

// roleOf is the role of a party, node if it is not known.
func (f *fleet) roleOf(id wire.ID) wire.Role {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m := f.members[id]; m != nil {
		return m.role
	}
	return wire.RoleNode
}
