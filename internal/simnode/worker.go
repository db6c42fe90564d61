package simnode

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

const (
	// perSource is how many nodes share one source address when the RCP is on
	// loopback, where there are plenty: an RCP limits what one address does.
	perSource = 250
	// reportEvery spaces the reports.
	reportEvery = 200 * time.Millisecond
	// slowAnswer is what a slow node adds to each answer, at most.
	slowAnswer = 3 * time.Second
)

// Config of a [Worker].
type Config struct {
	Dir       string            `json:"dir"`
	Name      string            `json:"name"`  // of the nodes, before their number
	First     int               `json:"first"` // number of the first node
	Count     int               `json:"count"`
	Join      string            `json:"join"` // the join code itself
	Upstreams []string          `json:"upstreams"`
	Carrier   string            `json:"carrier"`
	Tags      map[string]string `json:"tags"`
	Enrolling int               `json:"enrolling"` // nodes that enrol at once
	Run       string            `json:"run"`       // stands in every event as its object
	Chaos     uint64            `json:"chaos"`     // seed; 0: none
	Version   string            `json:"version"`   // of the program
}

// Worker is the nodes of one process.
type Worker struct {
	cfg   Config
	quiet *slog.Logger // of channels: thousands would fill any log
	boot  string
	salt  string

	join      *identity.JoinSource
	vault     *vault
	spools    *spools
	nodes     []*node
	events    []*spool // by number less First
	enrolling chan struct{}
	rate      atomic.Uint64 // events per second, as float bits
	ctx       context.Context
	failed    context.CancelCauseFunc
	count     counters

	mu       sync.Mutex
	arrivals []Arrival
	problem  string // the last failure of a channel
}

type counters struct {
	connected, sessions, enrolled, dialled, failures, hellos, stored, acked, cuts atomic.Int64
}

// NewWorker does no I/O.
func NewWorker(cfg Config) (*Worker, error) {
	if cfg.Count < 1 || len(cfg.Upstreams) == 0 {
		return nil, errors.New("a worker needs nodes and an upstream: the join code names no address, so give --upstream")
	}
	join, err := identity.OpenJoin(cfg.Join, nil)
	if err != nil {
		return nil, err
	}
	return &Worker{cfg: cfg, quiet: slog.New(slog.DiscardHandler), boot: string(wire.NewID()), salt: string(wire.NewID()),
		join: join, enrolling: make(chan struct{}, max(1, cfg.Enrolling))}, nil
}

// Run works until ctx or the commands end.
func (w *Worker) Run(ctx context.Context, commands Receiver, reports Sender) (err error) {
	ctx, w.failed = context.WithCancelCause(ctx)
	defer w.failed(nil)
	w.ctx = ctx
	if err := os.MkdirAll(w.cfg.Dir, 0o700); err != nil {
		return err
	}
	if w.vault, err = openVault(filepath.Join(w.cfg.Dir, "nodes.log")); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.vault.log.close()) }()
	if err := w.openSpools(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.spools.close()) }()
	if err := w.openNodes(); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	stop := errors.New("told to stop")
	g.Go(func() error {
		err := w.obey(ctx, commands, reports)
		if err == nil {
			err = stop
		}
		return err
	})
	for _, n := range w.nodes {
		g.Go(func() error { return n.run(ctx) })
	}
	g.Go(func() error { return w.report(ctx, reports) })
	g.Go(func() error { return w.generate(ctx) })
	if w.cfg.Chaos != 0 {
		g.Go(func() error { return w.chaos(ctx) })
	}
	err = g.Wait()
	if cause := context.Cause(w.ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	if errors.Is(err, stop) || errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// openNodes makes missing keys in parallel: the log writes them in groups.
func (w *Worker) openNodes() error {
	w.nodes = make([]*node, w.cfg.Count)
	var g errgroup.Group
	g.SetLimit(64 * runtime.GOMAXPROCS(0))
	for i := range w.nodes {
		g.Go(func() (err error) {
			w.nodes[i], err = openNode(w, w.cfg.First+i)
			return err
		})
	}
	return g.Wait()
}

// openSpools gives every node a spool with a name of its own, once.
func (w *Worker) openSpools() (err error) {
	w.events = make([]*spool, w.cfg.Count)
	var made []fileRecord
	for i := range w.events {
		name := string(w.vault.read(w.cfg.First+i, fileSpool))
		if name == "" {
			name = string(wire.NewID())
			made = append(made, fileRecord{w.cfg.First + i, fileSpool, []byte(name)})
		}
		w.events[i] = &spool{name: name}
	}
	if len(made) > 0 {
		if err := w.vault.write(made...); err != nil {
			return err
		}
	}
	w.spools, err = openSpools(w.cfg.Dir, w.cfg.First, w.events)
	if err != nil {
		return err
	}
	for _, sp := range w.events {
		sp.all = w.spools
	}
	return nil
}

// fail ends the worker: something that cannot be.
func (w *Worker) fail(err error) { w.failed(err) }

// complain keeps the last failure of a channel for the report.
func (w *Worker) complain(node string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.problem = node + ": " + err.Error()
}

// arrived notes when a desired state was on disk.
func (w *Worker) arrived(a Arrival) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.arrivals = append(w.arrivals, a)
}

// dialFrom gives the nodes many source addresses where that costs nothing: all
// of 127.0.0.0/8 is loopback on Linux. Elsewhere the host's own is used.
func (w *Worker) dialFrom(number int) func(ctx context.Context, network, address string) (net.Conn, error) {
	up := w.cfg.Upstreams[number%len(w.cfg.Upstreams)]
	ap, err := netip.ParseAddrPort(up)
	if err != nil || !ap.Addr().Is4() || !ap.Addr().IsLoopback() || runtime.GOOS != "linux" || w.cfg.Carrier != channel.CarrierH2 {
		return nil
	}
	source := number/perSource + 1
	from := &net.TCPAddr{IP: net.IPv4(127, 1+byte(source>>16), byte(source>>8), byte(source))}
	d := &net.Dialer{LocalAddr: from}
	return d.DialContext
}

// report sends the figures until ctx ends.
func (w *Worker) report(ctx context.Context, reports Sender) error {
	tick := time.NewTicker(reportEvery)
	defer tick.Stop()
	for {
		if err := reports.Send(w.figures()); err != nil {
			return fmt.Errorf("report: %w", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (w *Worker) figures() Report {
	c := &w.count
	depth := int64(0)
	for _, sp := range w.events {
		sp.mu.Lock()
		depth += int64(len(sp.pending))
		sp.mu.Unlock()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	r := Report{
		Connected: c.connected.Load(), Sessions: c.sessions.Load(), Enrolled: c.enrolled.Load(), Dialled: c.dialled.Load(),
		Failures: c.failures.Load(), Hellos: c.hellos.Load(), Stored: c.stored.Load(), Acked: c.acked.Load(), Depth: depth, Cuts: c.cuts.Load(),
		Problem: w.problem, Arrivals: w.arrivals,
	}
	w.arrivals, w.problem = nil, ""
	return r
}

// obey takes commands until there are no more: the owner is gone, or done.
func (w *Worker) obey(ctx context.Context, commands Receiver, reports Sender) error {
	lines := make(chan Command)
	ended := make(chan struct{})
	go func() { // ends with the input, which ends with the owner
		for {
			var c Command
			if commands.Receive(&c) != nil {
				close(ended)
				return
			}
			select {
			case lines <- c:
			case <-ctx.Done():
				return
			}
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ended:
			return nil
		case c := <-lines:
			if c.Rate != nil {
				w.setRate(*c.Rate)
			}
			if c.Spools {
				if err := reports.Send(Report{Spools: w.spoolStates()}); err != nil {
					return err
				}
			}
			if c.Stop {
				return nil
			}
		}
	}
}

func (w *Worker) spoolStates() []SpoolState {
	out := make([]SpoolState, len(w.events))
	for i, sp := range w.events {
		st := sp.state()
		out[i] = SpoolState{Node: w.nodes[i].id.ID(), Spool: st.Spool, Last: st.Next - 1, Depth: st.Depth}
	}
	return out
}
