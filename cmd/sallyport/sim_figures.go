package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"sallyport/gateway/api"
	"sallyport/internal/cli"
	"sallyport/internal/simnode"
	"sallyport/internal/wire"
)

// fanoutRound is one change of the desired state of every node, in seconds
// from the moment before it was asked for. The nodes had it on disk after P50,
// P99 and Last; the gateway had every acknowledgement on disk after Acked.
type fanoutRound struct {
	P50   float64 `json:"p50_seconds"`
	P99   float64 `json:"p99_seconds"`
	Last  float64 `json:"last_seconds"`
	Acked float64 `json:"acknowledged_seconds"`
}

const fanoutName = "sim-fanout"

// fanout changes one policy of all nodes, round after round.
func (s *simulation) fanout(ctx context.Context, idle measures) error {
	if s.o.fanout == 0 {
		return nil
	}
	defer func() { // what the test made goes with it, also after Ctrl-C
		ctx := context.WithoutCancel(ctx)
		if _, err := s.api.DeleteDeployment(ctx, fanoutName); err != nil {
			s.app.out.Note("delete deployment %s: %v", fanoutName, err)
		}
		if err := s.api.DeletePolicy(ctx, fanoutName); err != nil {
			s.app.out.Note("delete policy %s: %v", fanoutName, err)
		}
	}()
	for i := range s.o.fanout {
		before, err := s.measure()
		if err != nil {
			return err
		}
		round, err := s.fanoutRound(ctx, i)
		if err != nil {
			return fmt.Errorf("fan-out round %d: %w", i+1, err)
		}
		s.report.Fanout = append(s.report.Fanout, round)
		after, err := s.measure()
		if err != nil {
			return err
		}
		s.cost(before, after, func(p *partyMeasure, a, b procFigures) { p.FanoutCPU = b.CPU - a.CPU })
		s.cost(idle, after, func(p *partyMeasure, a, b procFigures) {
			if n := s.crew.sum().Sessions; n > 0 {
				p.Warm = &warmFigure{Sessions: n, RSSPerOne: per(b.RSS-a.RSS, int(n)), AnonPerOne: per(b.Anon-a.Anon, int(n))}
			}
		})
	}
	return nil
}

func (s *simulation) fanoutRound(ctx context.Context, i int) (fanoutRound, error) {
	var r fanoutRound
	text := fmt.Sprintf("kind: policy\nname: %s\ntype: check\nspec:\n  command: [/bin/true, %q]\n  interval: 1h\n", fanoutName, fmt.Sprint(s.run, "-", i))
	if i == 0 {
		text += fmt.Sprintf("---\nkind: deployment\nname: %s\nselector: sim=%s\npolicies: [%s]\n", fanoutName, s.place.Name, fanoutName)
	}
	began := time.Now()
	if _, err := s.api.Apply(ctx, api.Apply{Manifests: []api.Manifest{{File: "sim", Text: text}}}); err != nil {
		return r, err
	}
	p, err := s.api.Policy(ctx, fanoutName)
	if err != nil {
		return r, err
	}
	bar := cli.NewProgress(s.app.streams, "changed", s.o.nodes)
	defer bar.Done()
	var at []int64
	err = s.crew.wait(ctx, "wait for a change to be on every node", s.o.timeout.Std(), func(simnode.Report) bool {
		s.crew.mu.Lock()
		at = slices.Clone(s.crew.arrivals[p.Digest])
		s.crew.mu.Unlock()
		bar.Set(len(at), s.o.nodes)
		return len(at) >= s.o.nodes
	})
	if err != nil {
		return r, err
	}
	slices.Sort(at)
	after := func(i int) float64 { return round(time.Unix(0, at[i]).Sub(began).Seconds()) }
	r.P50, r.P99, r.Last = after(len(at)/2), after(len(at)*99/100), after(len(at)-1)
	late := began.Add(s.o.timeout.Std())
	for {
		all, err := s.api.Deployments(ctx)
		if err != nil {
			return r, err
		}
		i := slices.IndexFunc(all, func(d api.Deployment) bool { return d.Name == fanoutName })
		if i >= 0 && all[i].Counts.Applied >= s.o.nodes {
			r.Acked = round(time.Since(began).Seconds())
			return r, nil
		}
		if time.Now().After(late) {
			return r, cli.Fail(cli.ExitTimeout, "the gateway has not taken every acknowledgement: %+v", all[max(i, 0)].Counts)
		}
		if !simnode.Pause(ctx, 50*time.Millisecond) {
			return r, context.Cause(ctx)
		}
	}
}

// eventFigures is the load of events. Lost and Doubled are counted at the
// gateway's API, against what was on the nodes' disks.
type eventFigures struct {
	Asked     float64 `json:"asked_per_second"`
	Stored    int64   `json:"stored"`     // on the nodes' disks
	Seconds   float64 `json:"seconds"`    // until the last one was acknowledged
	PerSecond float64 `json:"per_second"` // acknowledged, over all of that time
	Steady    float64 `json:"steady"`     // acknowledged per second, the first and the last tenth left out
	Verified  bool    `json:"verified"`   // by the gateway's API
	Lost      int64   `json:"lost"`
	Doubled   int64   `json:"doubled"`
}

// events makes events for the duration, waits for the last acknowledgement and
// counts. calm ends the chaos.
func (s *simulation) events(ctx context.Context, calm func()) error {
	base, err := s.crew.spools(ctx)
	if err != nil {
		return err
	}
	before, err := s.measure()
	if err != nil {
		return err
	}
	acked := s.crew.sum().Acked
	began := time.Now()
	if err := s.crew.rate(s.o.rate, s.o.nodes); err != nil {
		return err
	}
	samples, err := s.watchLoad(ctx, began)
	if err != nil && !cli.Interrupted(ctx) {
		return err
	}
	ctx = context.WithoutCancel(ctx) // an interrupted load is counted as well
	calm()
	if err := s.crew.rate(0, s.o.nodes); err != nil {
		return err
	}
	if err := s.crew.wait(ctx, "wait for the last event", s.o.timeout.Std(), func(r simnode.Report) bool {
		return r.Depth == 0 && r.Connected == int64(s.o.nodes)
	}); err != nil {
		return err
	}
	took := time.Since(began).Seconds()
	after, err := s.measure()
	if err != nil {
		return err
	}
	s.cost(before, after, func(p *partyMeasure, a, b procFigures) { p.EventsCPU = b.CPU - a.CPU })
	last, err := s.drained(ctx)
	if err != nil {
		return err
	}
	f := &eventFigures{Asked: s.o.rate, Seconds: round(took), Steady: steady(samples)}
	f.PerSecond = round(float64(s.crew.sum().Acked-acked) / took)
	s.report.Events = f
	return s.verify(ctx, f, began, base, last)
}

// drained returns the spools as soon as nothing waits in any: a report may be
// older than the last event, so that each is asked.
func (s *simulation) drained(ctx context.Context) ([]simnode.SpoolState, error) {
	for until := time.Now().Add(s.o.timeout.Std()); ; {
		all, err := s.crew.spools(ctx)
		if err != nil || !slices.ContainsFunc(all, func(sp simnode.SpoolState) bool { return sp.Depth > 0 }) {
			return all, err
		}
		if time.Now().After(until) {
			return nil, cli.Fail(cli.ExitTimeout, "wait for the last event: not within %s", s.o.timeout)
		}
		if !simnode.Pause(ctx, 20*time.Millisecond) {
			return nil, context.Cause(ctx)
		}
	}
}

// sample is how many events were acknowledged at some time.
type sample struct {
	at    time.Duration
	acked int64
}

func (s *simulation) watchLoad(ctx context.Context, began time.Time) ([]sample, error) {
	var samples []sample
	var end <-chan time.Time
	if d := s.o.duration.Std(); d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		end = t.C
	}
	tick := time.NewTicker(time.Second / 4)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			samples = append(samples, sample{time.Since(began), s.crew.sum().Acked})
		case <-end:
			return samples, nil
		case <-ctx.Done():
			return samples, context.Cause(ctx)
		}
	}
}

func steady(all []sample) float64 {
	cut := len(all) / 10
	if len(all) < 3 {
		return 0
	}
	first, last := all[cut], all[len(all)-1-cut]
	return round(float64(last.acked-first.acked) / (last.at - first.at).Seconds())
}

// verify reads back what the gateway has of the events between two states of
// the spools.
func (s *simulation) verify(ctx context.Context, f *eventFigures, began time.Time, base, last []simnode.SpoolState) error {
	type place struct {
		node  wire.ID
		spool string
	}
	type part struct {
		from int64 // seq before the first
		seen []uint8
	}
	parts := make(map[place]*part, len(base))
	for i, b := range base {
		f.Stored += last[i].Last - b.Last
		parts[place{b.Node, b.Spool}] = &part{from: b.Last, seen: make([]uint8, last[i].Last-b.Last)}
	}
	if s.api == nil {
		return nil
	}
	bar := cli.NewProgress(s.app.streams, "verified", int(f.Stored))
	defer bar.Done()
	count := func() error {
		read := 0
		f.Doubled = 0
		for _, p := range parts {
			clear(p.seen)
		}
		return s.api.EachEvent(ctx, api.EventQuery{Since: began.Add(-time.Minute), Merged: true}, func(e api.Event) error {
			p := parts[place{e.NodeID, e.Spool}]
			if p == nil || e.Seq <= p.from || e.Seq > p.from+int64(len(p.seen)) {
				return nil
			}
			if read++; read%1000 == 0 {
				bar.Set(read, int(f.Stored))
			}
			if n := &p.seen[e.Seq-p.from-1]; *n == 0 {
				*n = 1
			} else {
				f.Doubled++
			}
			return nil
		})
	}
	// A gateway that is being killed for the sake of this figure is asked again.
	err := count()
	for until := time.Now().Add(s.o.timeout.Std()); err != nil && time.Now().Before(until) && simnode.Pause(ctx, time.Second); {
		err = count()
	}
	if err != nil {
		return fmt.Errorf("count the events that the gateway has: %w", err)
	}
	for _, p := range parts {
		for _, n := range p.seen {
			if n == 0 {
				f.Lost++
			}
		}
	}
	f.Verified = true
	return nil
}

// print shows the report, and fails when something was lost.
func (s *simulation) print() error {
	r := &s.report
	t := cli.Table{Columns: []string{"figure", "value"}}
	add := func(figure, format string, args ...any) { t.Add(figure, fmt.Sprintf(format, args...)) }
	add("nodes", "%d in %d processes", r.Nodes, r.Processes)
	add("connected", "%d after %.1f s, %d failed attempts", r.Connected, r.ConnectSeconds, r.Failures)
	if r.Enrolled > 0 {
		add("enrolled", "%d, %.0f per second", r.Enrolled, r.EnrollRate)
	}
	if r.Running != nil {
		add("running", "%d after %.1f s", *r.Running, r.RunningSeconds)
	}
	for _, p := range []struct {
		name string
		m    *partyMeasure
	}{{"rcp", r.RCP}, {"gateway", r.Gateway}} {
		if p.m == nil {
			continue
		}
		add(p.name+" per idle node", "%.1f KiB RSS, %.1f KiB anonymous, %.2f sockets", p.m.RSSPerNode, p.m.AnonPerNode, p.m.SocketsEach)
		add(p.name+" in all", "%.1f MiB RSS, %.1f MiB anonymous; before %.1f and %.1f", float64(p.m.Idle.RSS)/1024, float64(p.m.Idle.Anon)/1024, float64(p.m.Before.RSS)/1024, float64(p.m.Before.Anon)/1024)
		cpu := []string{fmt.Sprintf("connecting %.1f s", p.m.ConnectCPU), fmt.Sprintf("at rest %.1f s", p.m.SettledCPU)}
		if p.m.FanoutCPU > 0 {
			cpu = append(cpu, fmt.Sprintf("a change %.1f s", p.m.FanoutCPU))
		}
		if p.m.EventsCPU > 0 {
			cpu = append(cpu, fmt.Sprintf("events %.1f s", p.m.EventsCPU))
		}
		add(p.name+" CPU time", "%s", strings.Join(cpu, ", "))
		if w := p.m.Warm; w != nil {
			add(p.name+" per warm session", "%.1f KiB RSS, %.1f KiB anonymous, %d sessions", w.RSSPerOne, w.AnonPerOne, w.Sessions)
		}
	}
	for i, f := range r.Fanout {
		add(fmt.Sprintf("change %d to all", i+1), "half %.2f s, 99 %% %.2f s, last %.2f s, all acknowledged %.2f s", f.P50, f.P99, f.Last, f.Acked)
	}
	if e := r.Events; e != nil {
		add("events", "%d in %.1f s, %.0f per second (steady %.0f, asked %.0f)", e.Stored, e.Seconds, e.PerSecond, e.Steady, e.Asked)
		if e.Verified {
			add("lost, doubled", "%d, %d", e.Lost, e.Doubled)
		}
	}
	if c := r.Chaos; c != nil {
		add("chaos", "seed %d: %d channels cut, %d processes killed", c.Seed, c.Cuts, c.Kills)
	}
	if err := s.app.out.Print(r, t); err != nil {
		return err
	}
	if e := r.Events; e != nil && e.Lost+e.Doubled > 0 {
		return cli.Fail(cli.ExitFailed, "%d events are lost, %d doubled", e.Lost, e.Doubled)
	}
	return nil
}
