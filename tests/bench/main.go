// Command bench measures Sallyport against its goals, with Debian's haproxy as
// the yardstick in the same run, and writes docs/performance.md and its plot.
//
// Load, gateway, RCP, node and backend are processes of their own and share the
// same cores. CPU is user and system time from /proc, memory is RSS and
// anonymous memory.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"sallyport/tests/harness"
)

// settings of a run.
type settings struct {
	groups   []string
	rounds   int
	time     time.Duration // of each load
	nodes    int           // of the rows with many nodes
	points   []scalePlan
	quick    bool
	format   string
	write    bool
	programs string
	profiles string
	keep     bool
	level    string // of the roles' logs
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if kind := os.Getenv(helperVariable); kind != "" {
		return helper(ctx, kind, args)
	}
	var b bench
	var cores int
	if err := b.parse(args, &cores); err != nil {
		return err
	}
	if err := keepToCores(cores); err != nil {
		return err
	}
	root, err := harness.Repository()
	if err != nil {
		return err
	}
	m, err := thisMachine(ctx, root)
	if err != nil {
		return err
	}
	state := filepath.Join(root, "docs", "performance.json")
	if b.results, err = loadResults(state, m); err != nil {
		return err
	}
	began := time.Now()
	b.began = began.UTC().Truncate(time.Second).Add(-time.Second)
	b.say = func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "%6.1f s  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
	}
	if b.dir, err = os.MkdirTemp("", "bench"); err != nil { // short: unix socket names have 107 bytes
		return err
	}
	if !b.keep {
		defer func() { _ = os.RemoveAll(b.dir) }()
	}
	b.say("%s, commit %s", m, m.commit)
	b.say("data and logs in %s", b.dir)
	if b.bin = b.programs; b.bin == "" {
		b.bin = filepath.Join(root, "bin")
		if err := b.build(ctx, root); err != nil {
			return err
		}
	}
	err = b.measure(ctx)
	b.down()
	if b.write { // what was measured stands, also where the run was cut off
		err = errors.Join(err, b.report(root, state))
	}
	return errors.Join(err, b.print())
}

func (b *bench) parse(args []string, cores *int) error {
	set := flag.NewFlagSet("bench", flag.ContinueOnError)
	rows := set.String("rows", "all", "what to measure: all, or some of "+strings.Join(groups, ","))
	set.IntVar(&b.rounds, "rounds", 3, "rounds; the median counts")
	seconds := set.Float64("seconds", 5, "seconds of each load")
	set.IntVar(&b.nodes, "nodes", 10000, "nodes of the rows with many nodes")
	scale := set.String("scale", "1000,5000,10000,19000,50000/3", "nodes of the row scale; N/M: on M RCPs")
	set.BoolVar(&b.quick, "quick", false, "one round of one second, 500 nodes, nothing written: shows that it works")
	set.StringVar(&b.format, "o", "table", "what to print: table or json")
	set.BoolVar(&b.write, "write", true, "write docs/performance.{md,svg,json}")
	set.StringVar(&b.programs, "bin", "", "directory of the programs (default: tests/run build makes them)")
	set.StringVar(&b.profiles, "profiles", "", "directory for CPU profiles of gateway, RCP and node under each load; profiling slows them")
	set.BoolVar(&b.keep, "keep", false, "keep the directory with logs and data of what ran; its name is in the first lines")
	set.StringVar(&b.level, "log-level", "info", "of the roles; debug slows them")
	set.IntVar(cores, "cores", 2, "keep everything to that many cores; 0: all")
	if err := set.Parse(args); err != nil {
		return err
	}
	if set.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", set.Arg(0))
	}
	if b.groups = groups; *rows != "all" {
		b.groups = nil
		for _, r := range strings.Split(*rows, ",") {
			if !slices.Contains(groups, r) {
				return fmt.Errorf("no row %q: want some of %s", r, strings.Join(groups, ","))
			}
			b.groups = append(b.groups, r)
		}
	}
	b.time = time.Duration(*seconds * float64(time.Second))
	if b.quick {
		b.rounds, b.time, b.nodes, *scale, b.write = 1, time.Second, min(b.nodes, 500), "500", false
	}
	switch {
	case b.rounds < 1, b.time < 100*time.Millisecond, b.nodes < 1:
		return errors.New("want at least one round, 0.1 seconds and one node")
	case b.format != "table" && b.format != "json":
		return fmt.Errorf("-o %q: want table or json", b.format)
	}
	var err error
	b.points, err = parseScale(*scale)
	return err
}

// build makes the programs as they are released.
func (b *bench) build(ctx context.Context, root string) error {
	b.say("build")
	cmd := exec.CommandContext(ctx, filepath.Join(root, "tests", "run"), "build")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("tests/run build: %w\n%s", err, out)
	}
	return nil
}

// measure runs the groups one after the other. One that fails does not stop
// the others.
func (b *bench) measure(ctx context.Context) error {
	what := map[string]func(context.Context) error{
		groupMemory: b.memory, groupBulk: b.bulk, groupStream: b.stream, groupHTTP: b.http, groupOne: b.one,
		groupConn: b.conn, groupHandshake: b.handshakes, groupStepCA: b.stepca, groupCrowd: b.crowd, groupEvents: b.events, groupScale: b.scale,
	}
	var errs []error
	for _, g := range b.groups {
		if ctx.Err() != nil {
			break
		}
		b.say("== %s", g)
		if err := what[g](ctx); err != nil {
			b.say("%s failed: %v", g, err)
			errs = append(errs, fmt.Errorf("%s: %w", g, err))
		}
	}
	return errors.Join(append(errs, ctx.Err())...)
}

// closing says what went wrong when something ended; the figures are there.
func (b *bench) closing(err error) {
	if err != nil {
		b.say("%v", err)
	}
}

// down ends what the rows share.
func (b *bench) down() {
	b.closing(b.site.close())
	if b.haproxy != nil {
		b.closing(b.haproxy.proc.stop(syscall.SIGTERM))
	}
	b.closing(b.joiner.stop(syscall.SIGTERM))
	b.closing(b.back.stop(syscall.SIGTERM))
}

// print shows the results on stdout.
func (b *bench) print() error {
	if b.format == "json" {
		enc := json.NewEncoder(os.Stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(b.results)
	}
	_, err := fmt.Print(b.results.plain())
	return err
}
