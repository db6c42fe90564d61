package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyport/gateway/api"
	"sallyport/internal/cli"
	"sallyport/internal/simnode"
	"sallyport/internal/wire"
)

// enrollingAtOnce is how many nodes wait for a certificate at one time: an RCP
// keeps a thousand for one source, and a gateway as many for one RCP.
const enrollingAtOnce = 256

// simulation is one run of sim.
type simulation struct {
	app   *app
	o     simOptions
	place simPlace
	seed  uint64
	code  string // join code; a secret
	run   string // stands in every event
	crew  *crew
	api   *api.Client // nil: no gateway to ask

	report simReport
}

// simReport is what -o json prints.
type simReport struct {
	Nodes          int           `json:"nodes"`
	Processes      int           `json:"processes"`
	Connected      int64         `json:"connected"`
	ConnectSeconds float64       `json:"connect_seconds"` // until all were
	Failures       int64         `json:"failed_attempts"` // to connect, while connecting
	Enrolled       int64         `json:"enrolled"`
	EnrollRate     float64       `json:"enrolments_per_second,omitempty"`
	Running        *int          `json:"running,omitempty"` // says the gateway
	RunningSeconds float64       `json:"running_seconds,omitempty"`
	RCP            *partyMeasure `json:"rcp,omitempty"`
	Gateway        *partyMeasure `json:"gateway,omitempty"`
	Fanout         []fanoutRound `json:"fanout,omitempty"`
	Events         *eventFigures `json:"events,omitempty"`
	Chaos          *chaosFigures `json:"chaos,omitempty"`
}

// partyMeasure is what a party cost. Sizes are KiB.
type partyMeasure struct {
	Before      procFigures `json:"before"`
	Idle        procFigures `json:"idle"` // all connected, after --settle
	RSSPerNode  float64     `json:"rss_kib_per_node"`
	AnonPerNode float64     `json:"anonymous_kib_per_node"`
	SocketsEach float64     `json:"sockets_per_node"`
	ConnectCPU  float64     `json:"connect_cpu_seconds"`
	Warm        *warmFigure `json:"warm,omitempty"`
	FanoutCPU   float64     `json:"fanout_cpu_seconds,omitempty"` // of one round
	EventsCPU   float64     `json:"events_cpu_seconds,omitempty"`
	SettledCPU  float64     `json:"settle_cpu_seconds"`
}

// warmFigure is what open sessions add to an idle node.
type warmFigure struct {
	Sessions   int64   `json:"sessions"`
	RSSPerOne  float64 `json:"rss_kib_per_session"`
	AnonPerOne float64 `json:"anonymous_kib_per_session"`
}

// chaosFigures is what chaos did.
type chaosFigures struct {
	Seed  uint64 `json:"seed"`
	Cuts  int64  `json:"cuts"`
	Kills int    `json:"kills"`
}

// play runs the phases one after the other.
func (s *simulation) play(ctx context.Context) error {
	if c, err := s.app.client(); err == nil {
		if _, err := c.About(ctx); err == nil {
			s.api = c
			defer c.Close()
		} else {
			c.Close()
			if s.o.fanout > 0 {
				return fmt.Errorf("--fanout needs a gateway to ask: %w", err)
			}
			s.app.out.Note("no gateway answers, so nobody says what it has: %v", err)
		}
	}
	if err := s.hire(); err != nil {
		return err
	}
	// The processes end after the phases, whatever ended those.
	working, dismiss := context.WithCancel(context.WithoutCancel(ctx))
	defer dismiss()
	crew, _ := errgroup.WithContext(working)
	phases, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	for _, w := range s.crew.workers {
		crew.Go(func() error {
			err := w.run(working)
			if err != nil {
				abort(err)
			}
			return err
		})
	}
	err := s.phases(phases)
	s.crew.stop()
	end := time.AfterFunc(20*time.Second, dismiss)
	defer end.Stop()
	if werr := crew.Wait(); werr != nil {
		return werr
	}
	if err != nil && !cli.Interrupted(ctx) {
		return err
	}
	return s.print()
}

// hire describes the processes.
func (s *simulation) hire() error {
	var configs []simnode.Config
	count := (s.o.nodes + s.place.PerProcess - 1) / s.place.PerProcess
	for i := range count {
		first := i * s.place.PerProcess
		configs = append(configs, simnode.Config{
			Dir: filepath.Join(s.o.data, fmt.Sprintf("worker-%03d", i)), Name: s.place.Name, First: first, Count: min(s.place.PerProcess, s.o.nodes-first),
			Join: s.code, Upstreams: s.place.Upstreams, Carrier: s.o.carrier, Tags: map[string]string{"sim": s.place.Name},
			Enrolling: max(1, enrollingAtOnce/count), Run: s.run, Chaos: s.seed,
		})
	}
	var err error
	s.crew, err = newCrew(configs)
	s.report.Nodes, s.report.Processes = s.o.nodes, count
	return err
}

func (s *simulation) phases(ctx context.Context) error {
	m, err := s.measure()
	if err != nil {
		return err
	}
	before := m
	if err := s.connect(ctx); err != nil {
		return err
	}
	if m, err = s.measure(); err != nil {
		return err
	}
	s.cost(before, m, func(p *partyMeasure, a, b procFigures) { p.Before, p.ConnectCPU = a, b.CPU-a.CPU })
	if !simnode.Pause(ctx, s.o.settle.Std()) {
		return context.Cause(ctx)
	}
	connected := m
	if m, err = s.measure(); err != nil {
		return err
	}
	s.cost(before, m, func(p *partyMeasure, a, b procFigures) {
		p.Idle = b
		p.RSSPerNode, p.AnonPerNode = per(b.RSS-a.RSS, s.o.nodes), per(b.Anon-a.Anon, s.o.nodes)
		p.SocketsEach = per(int64(b.Sockets-a.Sockets), s.o.nodes)
	})
	s.cost(connected, m, func(p *partyMeasure, a, b procFigures) { p.SettledCPU = b.CPU - a.CPU })
	if err := s.fanout(ctx, m); err != nil {
		return err
	}
	return s.load(ctx)
}

// measures are the figures of RCPs and gateway at one moment.
type measures struct{ rcp, gateway *procFigures }

func (s *simulation) measure() (m measures, err error) {
	if m.rcp, err = readProc(s.o.rcps...); err != nil {
		return m, err
	}
	if s.o.gateway != 0 {
		m.gateway, err = readProc(s.o.gateway)
	}
	return m, err
}

// cost writes what changed between two moments into the report.
func (s *simulation) cost(a, b measures, set func(p *partyMeasure, a, b procFigures)) {
	for _, party := range []struct {
		at   **partyMeasure
		a, b *procFigures
	}{{&s.report.RCP, a.rcp, b.rcp}, {&s.report.Gateway, a.gateway, b.gateway}} {
		if party.a == nil || party.b == nil {
			continue
		}
		if *party.at == nil {
			*party.at = &partyMeasure{}
		}
		set(*party.at, *party.a, *party.b)
	}
}

func per(total int64, n int) float64 { return round(float64(total) / float64(max(1, n))) }

func round(f float64) float64 {
	r, err := strconv.ParseFloat(strconv.FormatFloat(f, 'f', 3, 64), 64)
	if err != nil {
		return f
	}
	return r
}

// connect waits until every node is, and, when there is a gateway to ask,
// until it calls them running.
func (s *simulation) connect(ctx context.Context) error {
	began := time.Now()
	bar := cli.NewProgress(s.app.streams, "connected", s.o.nodes)
	defer bar.Done()
	err := s.crew.wait(ctx, "connect all nodes", s.o.timeout.Std(), func(r simnode.Report) bool {
		bar.Set(int(r.Connected), s.o.nodes)
		return r.Connected >= int64(s.o.nodes)
	})
	r := s.crew.sum()
	s.report.Connected, s.report.Failures, s.report.Enrolled = r.Connected, r.Failures, r.Enrolled
	s.report.ConnectSeconds = round(time.Since(began).Seconds())
	if r.Enrolled > 0 {
		s.report.EnrollRate = round(float64(r.Enrolled) / time.Since(began).Seconds())
	}
	if err != nil || s.api == nil {
		return err
	}
	err = s.crew.wait(ctx, "wait for the gateway's first sessions", s.o.timeout.Std(), func(r simnode.Report) bool {
		return r.Hellos >= int64(s.o.nodes) || s.report.Enrolled == 0
	})
	if err != nil {
		return err
	}
	late := time.Now().Add(s.o.timeout.Std())
	for {
		running, err := s.running(ctx)
		if err != nil {
			return err
		}
		s.report.Running, s.report.RunningSeconds = &running, round(time.Since(began).Seconds())
		if running >= s.o.nodes {
			return nil
		}
		if time.Now().After(late) {
			return cli.Fail(cli.ExitTimeout, "only %d of %d nodes are running, says the gateway", running, s.o.nodes)
		}
		if !simnode.Pause(ctx, time.Second) {
			return context.Cause(ctx)
		}
	}
}

// running counts our nodes that the gateway calls running.
func (s *simulation) running(ctx context.Context) (n int, err error) {
	all, err := s.api.Nodes(ctx, api.NodeQuery{Selector: "sim=" + s.place.Name, State: string(wire.StateRunning)})
	return len(all), err
}

// load makes events, with chaos if it was asked for, for the duration.
func (s *simulation) load(ctx context.Context) error {
	var kills int
	var wild errgroup.Group
	chaotic, calm := context.WithCancel(ctx)
	defer calm()
	if s.seed != 0 {
		wild.Go(func() error {
			kills = s.crew.chaos(chaotic, s.seed)
			return nil
		})
	}
	var err error
	if s.o.rate > 0 {
		err = s.events(ctx, func() { calm(); _ = wild.Wait() })
	} else {
		err = s.hold(ctx)
	}
	calm()
	_ = wild.Wait() // returns nil
	if s.seed != 0 {
		s.report.Chaos = &chaosFigures{Seed: s.seed, Cuts: s.crew.sum().Cuts, Kills: kills}
	}
	return err
}

// hold keeps everything as it is for the duration.
func (s *simulation) hold(ctx context.Context) error {
	if d := s.o.duration.Std(); d > 0 {
		if !simnode.Pause(ctx, d) {
			return context.Cause(ctx)
		}
		return nil
	}
	<-ctx.Done()
	return context.Cause(ctx)
}
