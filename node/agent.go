package node

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
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"sallyport/config"
	"sallyport/internal/admin"
	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/local"
	"sallyport/internal/lockdir"
	"sallyport/internal/parking"
	"sallyport/internal/wire"
	"sallyport/node/policy"
)

// lookForCodes is how often a directory of join codes is read for a gateway
// that is new.
const lookForCodes = 2 * time.Second

// Config of an [Agent].
type Config struct {
	config.Node
	Version string    // of the program
	Stdin   io.Reader // where SALLYPORT_NODE_JOIN=- reads
}

// Agent is one node.
type Agent struct {
	cfg     Config
	log     *slog.Logger
	reg     *prometheus.Registry
	boot    string
	started time.Time
	claims  policy.Claims
	join    *identity.JoinSource
	lot     *parking.Lot  // nil without SALLYPORT_NODE_PROXY_LISTEN
	look    chan struct{} // holds a wake-up: a join code may be there

	listening chan struct{} // closed when addr and adminAddr are known
	addr      net.Addr
	adminAddr net.Addr

	mu        sync.Mutex
	instances map[string]*instance
}

// New does no I/O.
func New(cfg Config, log *slog.Logger, reg *prometheus.Registry) (*Agent, error) {
	a := &Agent{
		cfg: cfg, log: log, reg: reg, boot: string(wire.NewID()), started: time.Now().UTC(),
		look: make(chan struct{}, 1), listening: make(chan struct{}), instances: map[string]*instance{},
	}
	if cfg.ProxyListen != "" {
		a.lot = a.newLot()
	}
	if err := reg.Register(collector{a}); err != nil {
		return nil, fmt.Errorf("node: %w", err)
	}
	return a, nil
}

// Run works until ctx ends. lockdir.ErrLocked says that the directory is in
// use, wire.ErrJoinCode that there is nothing but a malformed join code.
func (a *Agent) Run(ctx context.Context) (err error) {
	dir := a.cfg.Dir(string(wire.RoleNode))
	lock, err := lockdir.Acquire(dir)
	if err != nil {
		return fmt.Errorf("node: %w", err)
	}
	defer func() { err = errors.Join(err, lock.Release()) }()
	if a.join, err = identity.OpenJoin(a.cfg.Join.Reveal(), a.cfg.Stdin); err != nil {
		return fmt.Errorf("node: %w", err)
	}
	a.join.KeepIn(filepath.Join(dir, identity.KeptJoin))
	if err := a.open(dir); err != nil {
		return errors.Join(fmt.Errorf("node: %w", err), a.abandon())
	}
	ports, err := a.listen(ctx, dir)
	if err != nil {
		return errors.Join(fmt.Errorf("node: %w", err), a.abandon())
	}
	g, ctx := errgroup.WithContext(ctx)
	all := a.all()
	for _, in := range all {
		g.Go(func() error {
			err := in.Run(ctx)
			if err != nil && ctx.Err() == nil && len(all) > 1 {
				a.log.Error("instance ended; the others go on", "instance", in.td, "error", err)
				return nil
			}
			return err
		})
	}
	for _, p := range ports {
		g.Go(func() error { return p.run(ctx) })
	}
	g.Go(func() error { return a.lookForGateways(ctx, g) })
	a.log.Info("node starts", "version", a.cfg.Version, "instances", len(a.all()))
	if len(a.all()) == 0 {
		a.log.Warn("there is no gateway to work for", "reason", a.noGateway())
	}
	err = g.Wait()
	if ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)) {
		a.log.Info("node stopped")
		return nil
	}
	return err
}

// open opens the instances that have a directory, and those that a join code
// asks for.
func (a *Agent) open(dir string) error {
	domains, err := a.domains(dir)
	if err != nil && len(domains) == 0 {
		return err
	}
	if err != nil {
		a.log.Warn("join code is not used", "error", err)
	}
	if a.cfg.Listen != "" && len(domains) != 1 { // before anything is made: a directory that is there counts from then on
		return fmt.Errorf("SALLYPORT_NODE_LISTEN: a node that listens serves exactly one gateway, this one has %d: give it one join code, and have `sallyport local rejoin --trust-domain NAME` set aside what there is of others (%s)",
			len(domains), strings.Join(domains, ", "))
	}
	for _, td := range domains {
		if _, err := a.add(td); err != nil {
			return fmt.Errorf("instance %s: %w", td, err)
		}
	}
	return nil
}

// domains lists the trust domains of directories and join codes. Where a node
// that listens serves one already, codes of others are not used: once it had
// two, its next start would fail.
func (a *Agent) domains(dir string) ([]string, error) {
	var out []string
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if fi, err := os.Stat(filepath.Join(dir, e.Name(), "identity")); err == nil && fi.IsDir() {
			out = append(out, e.Name())
		}
	}
	served := len(out)
	joins, err := a.join.Codes()
	for _, j := range joins {
		if served == 1 && a.servesOnly(out[0], j.Code.TrustDomain) {
			err = errors.Join(err, fmt.Errorf("join code from %s: %w", j.Source, errListens(out[0])))
			continue
		}
		if j.Code.Role != wire.RoleNode {
			err = errors.Join(err, fmt.Errorf("join code from %s: %w: it is for a %s, this is a node: make one with `sallyport join create`", j.Source, wire.ErrJoinRole, j.Code.Role))
			continue
		}
		if !wire.ValidTrustDomain(j.Code.TrustDomain) {
			err = errors.Join(err, fmt.Errorf("%w: from %s: its trust domain is no name", wire.ErrJoinCode, j.Source))
			continue
		}
		out = append(out, j.Code.TrustDomain)
	}
	slices.Sort(out)
	return slices.Compact(out), err
}

// servesOnly tells that a node that serves one trust domain cannot have another
// beside it: its port shows one identity.
func (a *Agent) servesOnly(one, other string) bool { return a.cfg.Listen != "" && one != other }

func errListens(td string) error {
	return fmt.Errorf("a node that listens (SALLYPORT_NODE_LISTEN) serves exactly one gateway, this one %s", td)
}

func (a *Agent) add(td string) (*instance, error) {
	in, err := openInstance(a.cfg, td, a.join, &a.claims, a.lot, a.boot, a.log)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.instances[td] = in
	return in, nil
}

// abandon closes instances that never ran.
func (a *Agent) abandon() error {
	var errs []error
	for _, in := range a.all() {
		errs = append(errs, in.spool.Close())
	}
	return errors.Join(errs...)
}

// all lists the instances by trust domain.
func (a *Agent) all() []*instance {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := make([]*instance, 0, len(a.instances))
	for _, in := range a.instances {
		out = append(out, in)
	}
	slices.SortFunc(out, func(x, y *instance) int { return strings.Compare(x.td, y.td) })
	return out
}

// lookForGateways starts an instance for each gateway whose join code turns up
// while the node runs.
func (a *Agent) lookForGateways(ctx context.Context, g *errgroup.Group) error {
	tick := time.NewTicker(lookForCodes)
	defer tick.Stop()
	told := ""
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-a.look:
		}
		domains, err := a.domains(a.cfg.Dir(string(wire.RoleNode)))
		if err != nil && err.Error() != told {
			told = err.Error()
			a.log.Warn("join code is not used", "error", err)
		}
		for _, td := range domains {
			a.mu.Lock()
			known := a.instances[td] != nil
			a.mu.Unlock()
			if known {
				continue
			}
			in, err := a.add(td)
			if err != nil {
				a.log.Error("instance not started", "instance", td, "error", err)
				continue
			}
			g.Go(func() error {
				if err := in.Run(ctx); err != nil && ctx.Err() == nil {
					a.log.Error("instance ended; the others go on", "instance", td, "error", err)
				}
				return nil
			})
		}
	}
}

// port is something that listens.
type port struct {
	run   func(context.Context) error
	close func() error
}

// listen opens every port, or none.
func (a *Agent) listen(ctx context.Context, dir string) (ports []port, err error) {
	defer func() {
		if err != nil {
			for _, p := range ports {
				_ = p.close()
			}
		}
	}()
	sock, err := local.Listen(dir, a, a.log)
	if err != nil {
		return nil, err
	}
	ports = append(ports, port{sock.Run, sock.Close})
	if a.cfg.Listen != "" {
		p, err := a.listenChannels()
		if err != nil {
			return ports, err
		}
		ports = append(ports, p)
	}
	if a.cfg.AdminListen != "" {
		adm, err := admin.Listen(admin.Config{Addr: string(a.cfg.AdminListen), Gatherer: a.reg, Ready: a.Ready, Log: a.log})
		if err != nil {
			return ports, err
		}
		a.adminAddr = adm.Addr()
		ports = append(ports, port{adm.Run, adm.Close})
	}
	if a.lot != nil {
		p, err := a.listenProxy()
		if err != nil {
			return ports, err
		}
		ports = append(ports, p)
	}
	close(a.listening)
	return ports, ctx.Err()
}

// listenChannels opens SALLYPORT_NODE_LISTEN, for RCPs and gateways that dial
// the node. A port shows one identity, so it serves one gateway's world.
func (a *Agent) listenChannels() (port, error) {
	in := a.all()[0] // open has seen to it that there is one
	ln, err := channel.Listen(channel.ListenConfig{
		Addr: string(a.cfg.Listen), Identity: in.id, AllowUpstream: true, AllowEnroll: true, Admit: admitUpstream,
		Carriers: carriers(a.cfg.Carrier), Limits: channel.Limits{Streams: maxStreams}, Log: in.log,
	})
	if err != nil {
		return port{}, fmt.Errorf("listen on %s: %w (SALLYPORT_NODE_LISTEN)", a.cfg.Listen, err)
	}
	a.addr = ln.Addr()
	run := func(ctx context.Context) error {
		return ln.Run(ctx, func(ctx context.Context, c *channel.Conn) { in.upstreams.serve(ctx, c, "") })
	}
	return port{run, ln.Close}, nil
}

// admitUpstream: only gateways and RCPs of the trust domain may dial a node;
// nobody waits here for a certificate but the node itself.
func admitUpstream(p identity.Peer, _ string) error {
	if p.Pending || p.Party.Role == wire.RoleNode {
		return fmt.Errorf("%w: a node is dialled by RCPs and gateways only", channel.ErrNotAdmitted)
	}
	return nil
}

// Addrs waits until every listener is open; channels is nil without
// SALLYPORT_NODE_LISTEN, admin without its listener.
func (a *Agent) Addrs(ctx context.Context) (channels, adminAddr net.Addr, err error) {
	select {
	case <-a.listening:
		return a.addr, a.adminAddr, nil
	case <-ctx.Done():
		return nil, nil, context.Cause(ctx)
	}
}

// Ready is nil when every instance is enrolled and connected.
func (a *Agent) Ready() error {
	all := a.all()
	if len(all) == 0 {
		return a.noGateway()
	}
	var errs []error
	for _, in := range all {
		err := in.applicant.Ready()
		if err == nil && in.upstreams.up() == 0 {
			err = errors.New("no upstream is connected")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", in.td, err))
		}
	}
	return errors.Join(errs...)
}

// noGateway says why there is no instance.
func (a *Agent) noGateway() error {
	const made = "(the gateway prints one: `sallyport join create`)"
	if why := a.join.Absent(); why != "" {
		return fmt.Errorf("not enrolled: %s; put a join code where SALLYPORT_NODE_JOIN points %s", why, made)
	}
	return errors.New("not enrolled: set SALLYPORT_NODE_JOIN to a join code or its file " + made)
}

// carriers is what a listening node answers; nil: all.
func carriers(c config.Carrier) []string {
	if c == "" || c == channel.CarrierAuto {
		return nil
	}
	return []string{string(c)}
}
