package rcp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"sallyport/config"
	"sallyport/internal/admin"
	"sallyport/internal/channel"
	"sallyport/internal/enroll"
	"sallyport/internal/identity"
	"sallyport/internal/local"
	"sallyport/internal/lockdir"
	"sallyport/internal/parking"
	"sallyport/internal/wire"
)

const (
	// maxPeers bounds the table: ten times the largest plant, some 100 MiB.
	maxPeers = 200_000
	// maxGraves is how many who left a resuming reader can still be told of.
	maxGraves = 16_384
	// drainGrace is what running streams get when the process is told to stop.
	drainGrace = 5 * time.Second
)

// Config of a [Relay].
type Config struct {
	config.RCP
	Version string    // of the program
	Stdin   io.Reader // where SALLYPORT_RCP_JOIN=- reads
}

// Relay is one RCP.
type Relay struct {
	cfg         Config
	log         *slog.Logger
	reg         *prometheus.Registry
	boot        string
	salt        string
	started     time.Time
	upstreamIDs []wire.ID // RCPs that may be upstream of us

	lot        *parking.Lot // nil without SALLYPORT_RCP_PROXY_LISTEN
	metrics    *metrics
	table      *table
	roster     *roster
	running    atomic.Int64  // streams
	ended      atomic.Uint64 // likewise, since the start
	mirrors    *mirrors
	lanes      *lanes
	upstreams  *upstreams
	diallers   diallers // empty without dial targets
	generation atomic.Int64
	draining   atomic.Pointer[wire.Drain]
	clock      local.Clock
	tasks      sync.WaitGroup // short errands that Run waits for

	// Made by Run, before anything is served.
	id        *identity.Identity
	reigns    *reigns
	join      *identity.JoinSource
	applicant *enroll.Applicant
	errands   context.Context // of tasks

	listening chan struct{} // closed when addrs is complete
	addrs     []net.Addr
}

// New does no I/O.
func New(cfg Config, log *slog.Logger, reg *prometheus.Registry) (*Relay, error) {
	r := &Relay{
		cfg: cfg, log: log, reg: reg, boot: string(wire.NewID()), salt: string(wire.NewID()), started: time.Now().UTC(),
		table:     newTable(maxPeers, maxGraves),
		lanes:     newLanes(),
		upstreams: &upstreams{live: map[*channel.Conn]struct{}{}},
		listening: make(chan struct{}),
	}
	r.roster = newRoster(r.table, int(cfg.PendingMax), int(cfg.PendingPerSource), r.startRetiring)
	if cfg.ProxyListen != "" {
		r.lot = r.newLot()
	}
	r.mirrors = &mirrors{r: r, m: map[wire.ID]*mirror{}}
	for _, e := range cfg.Upstreams {
		if e.ID != "" {
			r.upstreamIDs = append(r.upstreamIDs, wire.ID(e.ID))
		}
	}
	var err error
	r.metrics, err = newMetrics(reg, r)
	return r, err
}

// Addrs waits until every listener is open, and returns the addresses in use,
// in the order of the configuration.
func (r *Relay) Addrs(ctx context.Context) ([]net.Addr, error) {
	select {
	case <-r.listening:
		return slices.Clone(r.addrs), nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Run serves until ctx ends; then it tells everybody, and gives running
// streams a few seconds. lockdir.ErrLocked says that the directory is in use.
func (r *Relay) Run(ctx context.Context) (err error) {
	dir := r.cfg.Dir(string(wire.RoleRCP))
	lock, err := lockdir.Acquire(dir)
	if err != nil {
		return fmt.Errorf("rcp: %w", err)
	}
	defer func() { err = errors.Join(err, lock.Release()) }()
	if err := r.open(dir); err != nil {
		return fmt.Errorf("rcp: %w", err)
	}
	ports, err := r.listen(dir)
	if err != nil {
		return fmt.Errorf("rcp: %w", err)
	}
	r.greet()

	// What serves outlives ctx by the time that draining takes.
	serving, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	defer stop(nil)
	r.errands = serving
	g, serving := errgroup.WithContext(serving)
	g.Go(func() error { return r.applicant.Run(serving) })
	g.Go(func() error { return r.enforceRevocations(serving) })
	g.Go(func() error { return r.tuneMemory(serving, os.Getenv("GOGC") != "") })
	for _, p := range ports {
		g.Go(func() error { return p.run(serving) })
	}
	for _, d := range r.diallers {
		g.Go(func() error { return d.run(serving) })
	}
	g.Go(func() error {
		select {
		case <-ctx.Done():
			r.drainAll(serving)
			stop(context.Cause(ctx))
		case <-serving.Done():
		}
		return nil
	})
	err = g.Wait()
	stop(err)
	r.tasks.Wait()
	if ctx.Err() != nil {
		r.log.Info("rcp stopped")
		return nil
	}
	return err
}

// open loads the identity and prepares what depends on it.
func (r *Relay) open(dir string) error {
	var err error
	if r.id, err = identity.Open(filepath.Join(dir, "identity"), wire.RoleRCP); err != nil {
		return err
	}
	identity.WarnExposed(r.log, filepath.Join(dir, "identity", "key*.pem"))
	if r.reigns, err = openReigns(dir); err != nil {
		return err
	}
	if r.join, err = identity.OpenJoin(r.cfg.Join.Reveal(), r.cfg.Stdin); err != nil {
		return err
	}
	r.join.KeepIn(filepath.Join(dir, identity.KeptJoin))
	r.applicant = enroll.New(enroll.Config{
		Identity: r.id, Join: r.join, Program: r.cfg.Version, Log: r.log,
	})
	if err := r.applicant.TakeImported(); err != nil {
		return err
	}
	r.diallers = newDiallers(r)
	return nil
}

// port is something that listens.
type port struct {
	run   func(context.Context) error
	close func() error
}

// listen opens every port, or none.
func (r *Relay) listen(dir string) (ports []port, err error) {
	defer func() {
		if err != nil {
			for _, p := range ports {
				_ = p.close()
			}
		}
	}()
	for _, l := range r.cfg.Listen {
		ln, err := channel.Listen(channel.ListenConfig{
			Addr: l.Addr, Identity: r.id, Admit: r.admit(l.Side),
			AllowUpstream: l.Side != config.Downstream, AllowDownstream: l.Side != config.Upstream, AllowEnroll: true,
			// Who leaves when all places are taken is the roster's to say, so it has
			// to see those that come then.
			Limits: channel.Limits{Pending: int(r.cfg.PendingMax) + pendingDoor, PendingPerSource: int(r.cfg.PendingPerSource) + pendingDoor},
			Log:    r.log,
		})
		if err != nil {
			return ports, fmt.Errorf("listen on %s: %w (SALLYPORT_RCP_LISTEN)", l.Addr, err)
		}
		r.addrs = append(r.addrs, ln.Addr())
		ports = append(ports, port{func(ctx context.Context) error { return ln.Run(ctx, r.serve) }, ln.Close})
	}
	sock, err := local.Listen(dir, r, r.log)
	if err != nil {
		return ports, err
	}
	ports = append(ports, port{sock.Run, sock.Close})
	if r.cfg.AdminListen != "" {
		adm, err := admin.Listen(admin.Config{Addr: string(r.cfg.AdminListen), Gatherer: r.reg, Ready: r.Ready, Log: r.log})
		if err != nil {
			return ports, err
		}
		ports = append(ports, port{adm.Run, adm.Close})
	}
	if r.lot != nil {
		p, err := r.listenProxy()
		if err != nil {
			return ports, err
		}
		ports = append(ports, p)
	}
	close(r.listening)
	return ports, nil
}

// serve takes one verified channel, whoever dialled, until it ends.
func (r *Relay) serve(ctx context.Context, c *channel.Conn) {
	if c.Direction() == channel.PeerUpstream {
		r.serveUpstream(ctx, c)
		return
	}
	r.serveDownstream(ctx, channelLink{c})
}

func (r *Relay) greet() {
	addrs := make([]string, len(r.addrs))
	for i, a := range r.addrs {
		addrs[i] = a.String()
	}
	r.log.Info("rcp starts", "version", r.cfg.Version, "id", r.id.ID(), "fingerprint", r.id.Fingerprint(),
		"listen", addrs, "dial_targets", r.diallers.targets())
}

// startRetiring is called by the roster for a channel that was replaced.
func (r *Relay) startRetiring(a *attached) {
	r.tasks.Go(func() { r.drain(r.errands, a, wire.Drain{Deadline: replaceGrace, Reason: errReplaced.Error()}) })
}

// drainAll tells upstreams and downstreams that the RCP goes, and waits for
// running streams.
func (r *Relay) drainAll(ctx context.Context) {
	d := wire.Drain{Deadline: drainGrace, Reason: "the RCP is being stopped"}
	r.setDraining(&d)
	ctx, cancel := context.WithTimeout(ctx, drainGrace)
	defer cancel()
	var all sync.WaitGroup
	for _, a := range r.roster.all(func(p identity.Peer) bool { return !p.Pending }) {
		all.Go(func() { r.drain(ctx, a, d) })
	}
	all.Go(func() { r.lanes.wait(ctx) })
	farewell := time.NewTimer(2 * coalesce) // for the line upward
	defer farewell.Stop()
	select {
	case <-farewell.C:
	case <-ctx.Done():
	}
	all.Wait()
}

// Ready is nil when the RCP listens and has a certificate in force.
func (r *Relay) Ready() error {
	select {
	case <-r.listening:
	default:
		return errors.New("starting")
	}
	return r.applicant.Ready()
}
