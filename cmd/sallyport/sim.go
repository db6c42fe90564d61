package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/atomicfile"
	"sallyport/internal/channel"
	"sallyport/internal/cli"
	"sallyport/internal/identity"
	"sallyport/internal/lockdir"
	"sallyport/internal/simnode"
	"sallyport/internal/wire"
)

// simOptions are the flags of sim.
type simOptions struct {
	nodes      int
	join       string
	upstreams  []string
	data       string
	carrier    string
	perProcess int
	rate       float64
	duration   cli.DurationFlag
	settle     cli.DurationFlag
	timeout    cli.DurationFlag
	chaos      string
	fanout     int
	rcps       []int
	gateway    int
}

func (a *app) simCommand() *cobra.Command {
	o := simOptions{}
	cmd := &cobra.Command{
		Use:   "sim --nodes N --join FILE [--events-per-second R] [--fanout ROUNDS] [--chaos seed=S]",
		Short: "Connect N simulated nodes to a real RCP and gateway, and measure",
		Long: "Connect N simulated nodes to a real RCP and gateway, with real keys, certificates, channels and sessions, in as few\n" +
			"processes as the limit of open files allows. FILE holds a join code with --uses N. Identities and unsent events stay in\n" +
			"--data: a second run with it reconnects the same nodes and needs no code. A simulated node changes nothing on this host:\n" +
			"policies are applied as soon as they are on disk, and actions answer with their own command line.\n\n" +
			"Lost and doubled events, running nodes and --fanout are asked of the gateway that SALLYPORT_URL or SALLYPORT_DATA name.\n" +
			"Memory, sockets and CPU time of RCPs and gateway are read from /proc, for the processes that --rcp-pid and --gateway-pid name.",
		Example: "  sallyport join create --uses 1000 > sim.join\n" +
			"  sallyport sim --nodes 1000 --join sim.join --events-per-second 500 --duration 1m",
		Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return a.sim(cmd.Context(), o) },
	}
	f := cmd.Flags()
	f.IntVar(&o.nodes, "nodes", 0, "number of nodes")
	f.StringVar(&o.join, "join", "", "file with a join code; not needed when every node in --data is enrolled")
	f.StringSliceVar(&o.upstreams, "upstream", nil, "host:port of an RCP instead of those in the join code; nodes take turns")
	f.StringVar(&o.data, "data", "", "directory of identities and events; without it a temporary one, deleted at the end")
	f.StringVar(&o.carrier, "carrier", channel.CarrierH2, "carrier of the channels: auto, h2 or h3")
	_ = cmd.RegisterFlagCompletionFunc("carrier", fixed(channel.CarrierAuto, channel.CarrierH2, channel.CarrierH3))
	f.IntVar(&o.perProcess, "per-process", 5000, "nodes in one process, when --data is new")
	f.Float64Var(&o.rate, "events-per-second", 0, "events of all nodes together")
	o.duration.Duration = wire.Duration(30 * time.Second)
	f.Var(&o.duration, "duration", "how long to go on when all are connected; 0: until Ctrl-C")
	o.settle.Duration = wire.Duration(5 * time.Second)
	f.Var(&o.settle, "settle", "rest before idle memory is measured; 75s lets sessions end and garbage go")
	o.timeout.Duration = wire.Duration(10 * time.Minute)
	f.Var(&o.timeout, "timeout", "longest wait for all to be connected, for an answer to a change, for the last event")
	f.StringVar(&o.chaos, "chaos", "", "seed=S: cut channels, slow nodes down and kill processes, by that seed")
	f.IntVar(&o.fanout, "fanout", 0, "rounds of changing the desired state of all nodes")
	f.IntSliceVar(&o.rcps, "rcp-pid", nil, "process of an RCP to be measured")
	f.IntVar(&o.gateway, "gateway-pid", 0, "process of the gateway to be measured")
	cmd.AddCommand(a.simWorkerCommand())
	return cmd
}

// simGC is how much the heap of a worker may grow between two collections, in
// percent. No node has a heap of thousands of nodes: collecting it is the
// simulation's own work, and is not to take the time of what is measured.
const simGC = 300

// simWorkerCommand is what sim executes as its worker processes.
func (a *app) simWorkerCommand() *cobra.Command {
	return &cobra.Command{Use: "worker", Short: "One process of a simulation", Hidden: true, Args: cli.Exactly(0), RunE: func(cmd *cobra.Command, _ []string) error {
		lines := simnode.NewLines(a.streams.In, a.streams.Out)
		cfg, err := lines.Config()
		if err != nil {
			return fmt.Errorf("configuration on standard input: %w", err)
		}
		cfg.Version = cli.BuildVersion()
		w, err := simnode.NewWorker(cfg)
		if err != nil {
			return err
		}
		if os.Getenv("GOGC") == "" {
			debug.SetGCPercent(simGC)
		}
		return w.Run(cmd.Context(), lines, lines)
	}}
}

// simPlace is what --data says of its nodes.
type simPlace struct {
	Name       string   `json:"name"` // of the nodes, before their number
	PerProcess int      `json:"per_process"`
	Upstreams  []string `json:"upstreams"` // of the last join code
}

// sim runs the simulation.
func (a *app) sim(ctx context.Context, o simOptions) (err error) {
	if o.nodes < 1 {
		return cli.Usage("--nodes: want a number of at least 1")
	}
	var seed uint64
	if o.chaos != "" {
		if _, err := fmt.Sscanf(o.chaos, "seed=%d", &seed); err != nil || seed == 0 {
			return cli.Usage("--chaos %q: want seed=S with a number above 0", o.chaos)
		}
	}
	if !slices.Contains([]string{channel.CarrierAuto, channel.CarrierH2, channel.CarrierH3}, o.carrier) {
		return cli.Usage("--carrier %q: want auto, h2 or h3", o.carrier)
	}
	if o.perProcess < 1 || o.perProcess > 15000 {
		return cli.Usage("--per-process: want 1 to 15000; each node needs a socket")
	}
	if o.data == "" {
		if o.data, err = os.MkdirTemp("", "sallyport-sim-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(o.data)) }()
	}
	lock, err := lockdir.Acquire(o.data)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Release()) }()
	place, code, err := a.simPrepare(&o)
	if err != nil {
		return err
	}
	s := &simulation{app: a, o: o, place: place, seed: seed, code: code, run: "sim-" + wire.NewID().Short()}
	return s.play(ctx)
}

// simPrepare reads or makes the description of --data, and the join code.
func (a *app) simPrepare(o *simOptions) (place simPlace, code string, err error) {
	name := filepath.Join(o.data, "sim.json")
	b, err := os.ReadFile(name)
	switch {
	case errors.Is(err, os.ErrNotExist):
		place = simPlace{Name: "sim-" + wire.NewID().Short()[:4], PerProcess: o.perProcess}
	case err != nil:
		return place, "", err
	default:
		if err := json.Unmarshal(b, &place); err != nil || place.PerProcess < 1 {
			return place, "", fmt.Errorf("%s is damaged: %w (delete %s to begin with new nodes)", name, err, o.data)
		}
	}
	if o.join != "" {
		source, err := identity.OpenJoin(o.join, a.streams.In)
		if err != nil {
			return place, "", err
		}
		codes, err := source.Codes()
		if err != nil {
			return place, "", err
		}
		if len(codes) != 1 || codes[0].Code.Role != wire.RoleNode {
			return place, "", cli.Usage("--join %s: want one join code for nodes, as `sallyport join create --uses %d` prints it", source, o.nodes)
		}
		place.Upstreams = codes[0].Code.Addresses
		if code, err = codes[0].Code.Encode(); err != nil {
			return place, "", err
		}
	}
	if len(o.upstreams) > 0 {
		place.Upstreams = o.upstreams
	}
	for _, up := range place.Upstreams {
		if _, _, err := net.SplitHostPort(up); err != nil {
			return place, "", cli.Usage("--upstream %q: %w", up, err)
		}
	}
	if len(place.Upstreams) == 0 {
		return place, "", cli.Usage("there is no address to dial: give --join, or --upstream host:port when the code holds none")
	}
	if b, err = json.MarshalIndent(place, "", "  "); err != nil {
		return place, "", err
	}
	return place, code, atomicfile.Write(name, append(b, '\n'), 0o600)
}
