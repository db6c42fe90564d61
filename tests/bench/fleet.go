package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"sallyport/gateway/api"
)

// scalePlan is one point of the row scale.
type scalePlan struct {
	nodes, rcps int
}

// parseScale reads 1000,50000/3: numbers of nodes, on one RCP or on several.
func parseScale(s string) ([]scalePlan, error) {
	var plans []scalePlan
	for _, part := range strings.Split(s, ",") {
		n, m, several := strings.Cut(part, "/")
		p := scalePlan{rcps: 1}
		var err error
		if p.nodes, err = strconv.Atoi(n); err == nil && several {
			p.rcps, err = strconv.Atoi(m)
		}
		if err != nil || p.nodes < 1 || p.rcps < 1 {
			return nil, fmt.Errorf("--scale %q: want numbers of nodes such as 1000,50000/3", s)
		}
		plans = append(plans, p)
	}
	return plans, nil
}

// simReport is what the benchmark takes of `sallyport sim -o json`. Sizes are KiB.
type simReport struct {
	Connected      int64   `json:"connected"`
	ConnectSeconds float64 `json:"connect_seconds"`
	Failures       int64   `json:"failed_attempts"`
	EnrollRate     float64 `json:"enrolments_per_second"`
	RCP            simCost `json:"rcp"`
	Gateway        simCost `json:"gateway"`
	Fanout         []struct {
		Acked float64 `json:"acknowledged_seconds"`
	} `json:"fanout"`
	Events *struct {
		Stored    int64   `json:"stored"`
		PerSecond float64 `json:"per_second"`
		Steady    float64 `json:"steady"`
		Verified  bool    `json:"verified"`
		Lost      int64   `json:"lost"`
		Doubled   int64   `json:"doubled"`
	} `json:"events"`
}

type simCost struct {
	ConnectCPU  float64 `json:"connect_cpu_seconds"` // until all had enrolled and were connected
	RSSPerNode  float64 `json:"rss_kib_per_node"`
	AnonPerNode float64 `json:"anonymous_kib_per_node"`
	SocketsEach float64 `json:"sockets_per_node"`
	Warm        *struct {
		Sessions  int64   `json:"sessions"`
		RSSPerOne float64 `json:"rss_kib_per_session"`
	} `json:"warm"`
}

// crowd is a site with simulated nodes.
type crowd struct {
	*site

	nodes int
	join  string
}

// newCrowd starts the parties and makes a join code for the nodes.
func (b *bench) newCrowd(ctx context.Context, name string, plan scalePlan) (*crowd, error) {
	s, err := b.newSite(ctx, name, plan.rcps)
	if err != nil {
		return nil, err
	}
	code, err := s.cli(ctx, "", "join", "create", "--uses", strconv.Itoa(plan.nodes))
	if err == nil {
		c := &crowd{site: s, nodes: plan.nodes}
		if c.join, err = s.secret("sim", code); err == nil {
			return c, nil
		}
	}
	return nil, errors.Join(err, s.close())
}

// sim prepares a simulation of the crowd's nodes, which keep their identities
// from one to the next.
func (c *crowd) sim(ctx context.Context, args ...string) *exec.Cmd {
	args = append([]string{"sim", "--nodes", strconv.Itoa(c.nodes), "--join", c.join, "--data", filepath.Join(c.dir, "sim"), "--timeout", c.patience().String(), "-o", "json"}, args...)
	cmd := exec.CommandContext(ctx, filepath.Join(c.bin, "sallyport"), args...)
	cmd.Env = c.env("gateway")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = time.Minute
	return cmd
}

// patience is how long the nodes may take for anything: many times what they need.
func (c *crowd) patience() time.Duration {
	return 5*time.Minute + time.Duration(c.nodes)*50*time.Millisecond
}

// run runs a simulation to its end.
func (c *crowd) run(ctx context.Context, args ...string) (r simReport, err error) {
	cmd := c.sim(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		// Events that were lost or doubled are a figure: the report is there.
		if jerr := json.Unmarshal(stdout.Bytes(), &r); jerr == nil && r.Events != nil && r.Events.Verified {
			return r, nil
		}
		return r, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args[1:], " "), err, lastOf(stderr.String()))
	}
	if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
		return r, fmt.Errorf("report of sim: %w", err)
	}
	return r, nil
}

// lastOf is the end of what a program said, without its progress bars.
func lastOf(s string) string {
	lines := strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' })
	return strings.Join(lines[max(0, len(lines)-3):], "; ")
}

// pids are the processes that a simulation is to measure.
func (c *crowd) pids() []string {
	args := []string{"--gateway-pid", strconv.Itoa(c.gateway.pid())}
	for _, r := range c.rcps {
		args = append(args, "--rcp-pid", strconv.Itoa(r.pid()))
	}
	return args
}

// settled is when sessions that nobody uses are closed and their memory is free.
const settled = 75 * time.Second

// proving is how long the gateway takes to prove, in sessions, all nodes that
// have come back.
const proving = 2 * time.Minute

// crowdFigures is what one number of nodes gave.
type crowdFigures struct {
	first     simReport // from enrolment to the last change
	reconnect reconnection
}

// crowdRun measures one number of nodes from enrolment to reconnect, with a
// number of changes to all of them in between.
func (b *bench) crowdRun(ctx context.Context, plan scalePlan, changes int) (f crowdFigures, err error) {
	c, err := b.newCrowd(ctx, fmt.Sprintf("crowd-%d", plan.nodes), plan)
	if err != nil {
		return f, err
	}
	defer func() { b.closing(c.close()) }()
	rest := settled
	if b.quick {
		rest = 2 * time.Second
	}
	bare, err := c.rcpMemory()
	if err != nil {
		return f, err
	}
	b.say("%d nodes on %d RCPs: enrol, rest for %v, change %d times", plan.nodes, plan.rcps, rest, changes)
	f.first, err = c.run(ctx, append(c.pids(), "--settle", rest.String(), "--fanout", strconv.Itoa(changes), "--duration", "100ms")...)
	if err != nil {
		return f, err
	}
	r := f.first
	b.say("%d nodes: connected after %.1f s (%.0f enrolments/s), RCP %.1f KiB RSS and %.1f anonymous each, changes %v", plan.nodes, r.ConnectSeconds, r.EnrollRate,
		r.RCP.RSSPerNode, r.RCP.AnonPerNode, r.Fanout)
	f.reconnect, err = b.restart(ctx, c, rest)
	if err == nil {
		b.say("%d nodes: all back %.1f s after the restart of the RCP, %d missing, slowest answer of the API %v; then RCP %d KiB RSS each", plan.nodes, f.reconnect.took.Seconds(), f.reconnect.missing,
			f.reconnect.slowest, f.reconnect.memory.minus(bare).per(plan.nodes).RSS>>10)
		f.reconnect.memory = f.reconnect.memory.minus(bare).per(plan.nodes)
	}
	return f, err
}

// reconnection is what a restart of the RCPs did.
type reconnection struct {
	took    time.Duration // until every node was connected, from the start of the RCP
	missing int
	slowest time.Duration // answer of the gateway's API meanwhile
	memory  memory        // of the RCPs, when all is at rest again
}

// restart connects the nodes that are enrolled, kills the RCPs and measures how
// long all nodes take to come back.
func (b *bench) restart(ctx context.Context, c *crowd, rest time.Duration) (r reconnection, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	sim := c.sim(ctx, "--settle", "0s", "--duration", "0s")
	var stderr bytes.Buffer
	sim.Stderr = &stderr
	if err := sim.Start(); err != nil {
		return r, err
	}
	ended := make(chan struct{})
	var simErr error
	go func() {
		defer close(ended)
		simErr = sim.Wait()
	}()
	defer func() { cancel(); <-ended }()
	over := false
	all := func() error {
		select {
		case <-ended:
			over = true
			cancel()
			return fmt.Errorf("sim ended: %w: %s", simErr, lastOf(stderr.String()))
		default:
		}
		n, err := c.connected(ctx)
		if err == nil && n < c.nodes {
			err = fmt.Errorf("%d of %d nodes are connected", n, c.nodes)
		}
		return err
	}
	if err := eventually(ctx, c.patience(), "all nodes are connected", all); err != nil {
		return r, err
	}
	for _, p := range c.rcps {
		if err := p.stop(syscall.SIGKILL); err != nil {
			return r, err
		}
	}
	began := time.Now()
	for _, p := range c.rcps {
		if err := p.start(); err != nil {
			return r, err
		}
	}
	asking, enough := context.WithCancel(ctx)
	var answers sync.WaitGroup
	answers.Go(func() { r.slowest = c.slowestAnswer(asking) })
	err = eventually(ctx, c.patience(), "all nodes are back", all)
	r.took = time.Since(began)
	enough()
	answers.Wait()
	if err != nil && !over && ctx.Err() == nil { // some did not come back: that is a figure
		n, cerr := c.connected(ctx)
		r.missing = c.nodes - n
		err = cerr
	}
	if err == nil && !b.quick {
		rest += proving
	}
	if err == nil {
		err = pause(ctx, rest)
	}
	if err == nil {
		r.memory, err = c.rcpMemory()
	}
	if over { // which is why ctx ended
		err = fmt.Errorf("sim ended: %w: %s", simErr, lastOf(stderr.String()))
	}
	return r, err
}

// rcpMemory is that of all RCPs together.
func (c *crowd) rcpMemory() (sum memory, err error) {
	for _, r := range c.rcps {
		m, err := memoryOf(r.pid())
		if err != nil {
			return sum, err
		}
		sum.RSS, sum.Anonymous = sum.RSS+m.RSS, sum.Anonymous+m.Anonymous
	}
	return sum, nil
}

// connected is how many nodes the RCPs hold.
func (c *crowd) connected(ctx context.Context) (int, error) {
	sum := 0
	for _, r := range c.rcps {
		n, err := metric(ctx, r.metrics, "sallyport_rcp_peers", `role="node"`)
		if err != nil {
			return 0, err
		}
		sum += int(n)
	}
	return sum, nil
}

// slowestAnswer asks the gateway's API ten times a second until ctx ends.
func (c *crowd) slowestAnswer(ctx context.Context) time.Duration {
	var slowest time.Duration
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	for {
		began := time.Now()
		_, err := c.client.Nodes(ctx, api.NodeQuery{Page: api.Page{Limit: 1}})
		if err == nil || ctx.Err() == nil {
			slowest = max(slowest, time.Since(began))
		}
		select {
		case <-ctx.Done():
			return slowest
		case <-again.C:
		}
	}
}

// servers are the cores that "two cores for gateway and RCP" means.
const servers = 2

// crowd measures the rows with many nodes, all with the same nodes.
func (b *bench) crowd(ctx context.Context) error {
	f, err := b.point(ctx, scalePlan{b.nodes, 1}, 1+b.rounds)
	if err != nil {
		return err
	}
	r := f.first
	b.put("enrol.rate", r.EnrollRate)
	each := func(seconds float64) float64 { return seconds * 1000 / float64(b.nodes) }
	b.put("enrol.rcp", each(r.RCP.ConnectCPU))
	b.put("enrol.gateway", each(r.Gateway.ConnectCPU))
	b.put("enrol.served", servers*float64(b.nodes)/(r.RCP.ConnectCPU+r.Gateway.ConnectCPU))
	b.put("idle.rss", kib(f.reconnect.memory.RSS))
	b.put("idle.anonymous", kib(f.reconnect.memory.Anonymous))
	b.put("idle.enrolled", r.RCP.RSSPerNode)
	b.put("idle.sockets", r.RCP.SocketsEach)
	b.put("idle.gateway", r.Gateway.AnonPerNode)
	if r.RCP.Warm != nil && r.Gateway.Warm != nil {
		b.put("warm.rcp", r.RCP.Warm.RSSPerOne)
		b.put("warm.gateway", r.Gateway.Warm.RSSPerOne)
		b.put("warm.sessions", float64(r.Gateway.Warm.Sessions))
	}
	if len(r.Fanout) > 1 {
		b.put("desired.cold", r.Fanout[0].Acked)
		var warm []float64
		for _, f := range r.Fanout[1:] {
			warm = append(warm, f.Acked)
		}
		b.put("desired.warm", warm...)
	}
	b.put("reconnect.seconds", f.reconnect.took.Seconds())
	b.put("reconnect.failures", float64(f.reconnect.missing))
	b.put("reconnect.api", milliseconds(f.reconnect.slowest))
	return nil
}

// point measures one number of nodes and notes it.
func (b *bench) point(ctx context.Context, plan scalePlan, changes int) (crowdFigures, error) {
	f, err := b.crowdRun(ctx, plan, changes)
	if err != nil && f.first.Connected == 0 {
		return f, err
	}
	p := scalePoint{Nodes: plan.nodes, RCPs: plan.rcps, Connect: f.first.ConnectSeconds, Reconnect: -1,
		RSS: f.first.RCP.RSSPerNode, Anonymous: f.first.RCP.AnonPerNode, Desired: -1}
	if err == nil {
		p.Reconnect, p.RSS, p.Anonymous = f.reconnect.took.Seconds(), kib(f.reconnect.memory.RSS), kib(f.reconnect.memory.Anonymous)
	}
	if len(f.first.Fanout) > 0 {
		p.Desired = f.first.Fanout[0].Acked
	}
	b.putScale(p)
	return f, err
}

// scale measures the numbers of nodes that the rows with many nodes have not.
func (b *bench) scale(ctx context.Context) error {
	var errs []error
	for _, plan := range b.points {
		if b.measured(plan) {
			continue
		}
		if _, err := b.point(ctx, plan, 1); err != nil {
			errs = append(errs, fmt.Errorf("%d nodes on %d RCPs: %w", plan.nodes, plan.rcps, err))
		}
	}
	return errors.Join(errs...)
}

// measured tells whether this run has the point already.
func (b *bench) measured(plan scalePlan) bool {
	for _, p := range b.results.Scale {
		if p.Nodes == plan.nodes && p.RCPs == plan.rcps && p.Time.After(b.began) {
			return true
		}
	}
	return false
}

// Load of events: more than can be carried, from nodes as many as a busy site has.
const (
	eventNodes = 100
	eventsAsk  = 100000 // per second, all nodes together
)

// events measures durable events, and then counts them while every role on the
// way is killed.
func (b *bench) events(ctx context.Context) error {
	c, err := b.newCrowd(ctx, "events", scalePlan{eventNodes, 1})
	if err != nil {
		return err
	}
	defer func() { b.closing(c.close()) }()
	load := func(rate int) []string {
		return []string{"--settle", "0s", "--events-per-second", strconv.Itoa(rate), "--duration", b.time.String()}
	}
	var rates []float64
	var wrong int64
	for range b.rounds {
		r, err := c.run(ctx, append(c.pids(), load(eventsAsk)...)...)
		if err != nil {
			return err
		}
		if r.Events == nil || !r.Events.Verified {
			return errors.New("sim did not count its events at the gateway")
		}
		b.say("events: %.0f/s acknowledged (%d on the nodes' disks), %d lost, %d doubled", r.Events.PerSecond, r.Events.Stored, r.Events.Lost, r.Events.Doubled)
		rates = append(rates, r.Events.PerSecond)
		wrong += r.Events.Lost + r.Events.Doubled
	}
	b.put("events.rate", rates...)
	killing, enough := context.WithCancel(ctx)
	var killer sync.WaitGroup
	var kerr error
	kills := 0
	killer.Go(func() { kills, kerr = c.kill(killing, max(b.time/2, 2*time.Second), 4) })
	r, err := c.run(ctx, load(eventsAsk/5)...)
	enough()
	killer.Wait()
	if err = errors.Join(err, kerr); err != nil {
		return fmt.Errorf("under kill -9: %w", err)
	}
	if r.Events == nil || !r.Events.Verified {
		return errors.New("sim did not count its events at the gateway")
	}
	b.say("events: under %d times kill -9 of gateway and RCP: %d stored, %d lost, %d doubled", kills, r.Events.Stored, r.Events.Lost, r.Events.Doubled)
	b.put("events.lost", float64(wrong+r.Events.Lost+r.Events.Doubled))
	b.put("events.kills", float64(kills))
	return nil
}

// kill kills gateway and RCP in turns and starts them again, times times or
// until ctx ends.
func (c *crowd) kill(ctx context.Context, every time.Duration, times int) (kills int, err error) {
	victims := []*process{c.gateway, c.rcp.process}
	for kills < times {
		if err := pause(ctx, every); err != nil {
			return kills, nil //nolint:nilerr // the end of ctx is the end of the killing
		}
		p := victims[kills%len(victims)]
		if err := p.stop(syscall.SIGKILL); err != nil {
			return kills, err
		}
		if err := p.start(); err != nil {
			return kills, err
		}
		kills++
	}
	return kills, nil
}
