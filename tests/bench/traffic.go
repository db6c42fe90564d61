package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
)

// Parameters of the rows, as the table names them.
const (
	httpConns   = 64
	connWorkers = 16
	warmUp      = time.Second
)

// bench is one run.
type bench struct {
	settings
	dir, bin string
	began    time.Time
	say      func(format string, args ...any)
	results  results

	back    *process
	targets addresses
	joiner  *process // between a front and the sink
	joined  string
	haproxy *yardstick
	site    *site     // with lanes
	front   addresses // of its forwards
}

// yardstickUp starts the backend and haproxy once.
func (b *bench) yardstickUp(ctx context.Context) error {
	if b.haproxy != nil {
		return nil
	}
	var err error
	if b.back, b.targets, err = startBackend(ctx, b.dir); err != nil {
		return err
	}
	var joined []string
	if b.joiner, joined, err = startHelper(ctx, b.dir, "joiner", b.targets.sink); err != nil {
		return err
	}
	b.joined = joined[0]
	if b.haproxy, err = startHaproxy(ctx, b.dir, b.targets); err != nil {
		return err
	}
	b.results.Haproxy = b.haproxy.version
	return nil
}

// siteUp starts the site whose RCP joins lanes once.
func (b *bench) siteUp(ctx context.Context) error {
	if err := b.yardstickUp(ctx); err != nil || b.site != nil {
		return err
	}
	s, err := b.newSite(ctx, "lane", 1, "SALLYPORT_RCP_LANES=on")
	if err != nil {
		return err
	}
	if b.front, err = s.forward(ctx, b.targets); err != nil {
		return errors.Join(err, s.close())
	}
	b.site = s
	return nil
}

// counted runs a load and returns what it cost the parties of a site.
func (b *bench) counted(ctx context.Context, s *site, label string, load func(context.Context) error) (spent, error) {
	before, err := s.cpu()
	if err != nil {
		return spent{}, err
	}
	g, gctx := errgroup.WithContext(ctx)
	if b.profiles != "" {
		for role, socket := range map[string]string{"gateway": "gateway/gateway", "rcp": "rcp-1/rcp", "node": "node/node"} {
			g.Go(func() error {
				return profile(gctx, filepath.Join(s.dir, socket, "local.sock"), filepath.Join(b.profiles, label+"-"+role+".pprof"), b.time)
			})
		}
	}
	g.Go(func() error { return load(gctx) })
	if err := g.Wait(); err != nil {
		return spent{}, fmt.Errorf("%s: %w", label, err)
	}
	after, err := s.cpu()
	return after.minus(before), err
}

// bulkRound is one round of bulk with a number of streams.
type bulkRound struct {
	through   volume // our way
	direct    volume // haproxy
	cost      spent
	directCPU time.Duration // CPU of haproxy
}

func (b *bench) bulkRound(ctx context.Context, s *site, front addresses, streams int, label string) (r bulkRound, err error) {
	for _, addr := range []string{b.haproxy.front.sink, front.sink} {
		if _, err := bulkDown(ctx, addr, streams, warmUp); err != nil {
			return r, fmt.Errorf("%s: warm up: %w", label, err)
		}
	}
	before, err := cpuOf(b.haproxy.proc.pid())
	if err != nil {
		return r, err
	}
	if r.direct, err = bulkDown(ctx, b.haproxy.front.sink, streams, b.time); err != nil {
		return r, fmt.Errorf("%s: haproxy: %w", label, err)
	}
	after, err := cpuOf(b.haproxy.proc.pid())
	if err != nil {
		return r, err
	}
	r.directCPU = after - before
	r.cost, err = b.counted(ctx, s, label, func(ctx context.Context) error {
		var err error
		r.through, err = bulkDown(ctx, front.sink, streams, b.time)
		return err
	})
	if err == nil {
		b.say("%s: %.0f MiB/s, haproxy %.0f, RCP %.2f CPU-s/GiB, gateway %.2f, node %.2f", label, r.through.mibPerSecond(), r.direct.mibPerSecond(),
			perGiB(r.cost.rcp, r.through.bytes), perGiB(r.cost.gateway, r.through.bytes), perGiB(r.cost.node, r.through.bytes))
	}
	return r, err
}

func (r bulkRound) rcp() float64     { return perGiB(r.cost.rcp, r.through.bytes) }
func (r bulkRound) gateway() float64 { return perGiB(r.cost.gateway, r.through.bytes) }
func (r bulkRound) node() float64    { return perGiB(r.cost.node, r.through.bytes) }
func (r bulkRound) rate() float64    { return r.through.mibPerSecond() }
func (r bulkRound) haproxy() float64 { return r.direct.mibPerSecond() }
func (r bulkRound) share() float64   { return ratio(r.rate(), r.haproxy()) }

func ratio(a, b float64) float64 {
	if b == 0 {
		return 0
	}
	return a / b
}

// floor measures what splicing alone costs.
func (b *bench) floor(ctx context.Context, streams int) (float64, error) {
	if _, err := bulkDown(ctx, b.joined, streams, warmUp/2); err != nil {
		return 0, fmt.Errorf("splicing alone: warm up: %w", err)
	}
	before, err := cpuOf(b.joiner.pid())
	if err != nil {
		return 0, err
	}
	v, err := bulkDown(ctx, b.joined, streams, b.time)
	if err != nil {
		return 0, fmt.Errorf("splicing alone: %w", err)
	}
	after, err := cpuOf(b.joiner.pid())
	b.say("splicing alone, %d streams: %.0f MiB/s, %.2f CPU-s/GiB", streams, v.mibPerSecond(), perGiB(after-before, v.bytes))
	return perGiB(after-before, v.bytes), err
}

// bulk measures lanes.
func (b *bench) bulk(ctx context.Context) error {
	if err := b.siteUp(ctx); err != nil {
		return err
	}
	before, err := b.site.carried(ctx)
	if err != nil {
		return err
	}
	rounds, floors := make(map[int][]bulkRound), make(map[int][]float64)
	var up, upShare []float64
	var moved int64
	for range b.rounds {
		for _, streams := range []int{1, 8} {
			r, err := b.bulkRound(ctx, b.site, b.front, streams, fmt.Sprintf("bulk-%d", streams))
			if err != nil {
				return err
			}
			rounds[streams] = append(rounds[streams], r)
			moved += r.through.bytes
			floor, err := b.floor(ctx, streams)
			if err != nil {
				return err
			}
			floors[streams] = append(floors[streams], floor)
		}
		direct, err := bulkUp(ctx, b.haproxy.front.source, 8, b.time)
		if err != nil {
			return fmt.Errorf("bulk towards the gateway: haproxy: %w", err)
		}
		var v volume
		cost, err := b.counted(ctx, b.site, "bulk-up-8", func(ctx context.Context) error {
			var err error
			v, err = bulkUp(ctx, b.front.source, 8, b.time)
			return err
		})
		if err != nil {
			return err
		}
		b.say("bulk-up-8: %.0f MiB/s, haproxy %.0f, RCP %.2f CPU-s/GiB, gateway %.2f, node %.2f", v.mibPerSecond(), direct.mibPerSecond(),
			perGiB(cost.rcp, v.bytes), perGiB(cost.gateway, v.bytes), perGiB(cost.node, v.bytes))
		up, upShare = append(up, v.mibPerSecond()), append(upShare, ratio(v.mibPerSecond(), direct.mibPerSecond()))
		moved += v.bytes
	}
	after, err := b.site.carried(ctx)
	if err != nil {
		return err
	}
	one, eight := rounds[1], rounds[8]
	b.put("lane.rcp.1", column(one, bulkRound.rcp)...)
	b.put("lane.rcp.8", column(eight, bulkRound.rcp)...)
	b.put("lane.floor.1", floors[1]...)
	b.put("lane.floor.8", floors[8]...)
	b.put("lane.share.1", column(one, bulkRound.share)...)
	b.put("lane.share.8", column(eight, bulkRound.share)...)
	b.put("lane.rate.1", column(one, bulkRound.rate)...)
	b.put("lane.rate.8", column(eight, bulkRound.rate)...)
	b.put("lane.up.8", up...)
	b.put("lane.up.share.8", upShare...)
	b.put("lane.gateway.8", column(eight, bulkRound.gateway)...)
	b.put("lane.node.8", column(eight, bulkRound.node)...)
	b.put("lane.haproxy.1", column(one, bulkRound.haproxy)...)
	b.put("lane.haproxy.8", column(eight, bulkRound.haproxy)...)
	b.put("lane.haproxy.cpu.8", column(eight, func(r bulkRound) float64 { return perGiB(r.directCPU, r.direct.bytes) })...)
	b.put("lane.beside", min(1, ratio(float64(after-before), float64(moved))))
	return nil
}

// stream measures the same with lanes switched off.
func (b *bench) stream(ctx context.Context) error {
	if err := b.yardstickUp(ctx); err != nil {
		return err
	}
	s, err := b.newSite(ctx, "stream", 1, "SALLYPORT_RCP_LANES=off")
	if err != nil {
		return err
	}
	defer func() { b.closing(s.close()) }()
	front, err := s.forward(ctx, b.targets)
	if err != nil {
		return err
	}
	rounds := make(map[int][]bulkRound)
	for range b.rounds {
		for _, streams := range []int{1, 8} {
			r, err := b.bulkRound(ctx, s, front, streams, fmt.Sprintf("stream-%d", streams))
			if err != nil {
				return err
			}
			rounds[streams] = append(rounds[streams], r)
		}
	}
	b.put("stream.rcp.1", column(rounds[1], bulkRound.rcp)...)
	b.put("stream.rcp.8", column(rounds[8], bulkRound.rcp)...)
	b.put("stream.rate.1", column(rounds[1], bulkRound.rate)...)
	b.put("stream.rate.8", column(rounds[8], bulkRound.rate)...)
	return nil
}

// operationRound is one round of requests or connections.
type operationRound struct {
	through, direct latencies
	cost            spent
}

func (r operationRound) share() float64   { return ratio(r.rate(), r.haproxy()) }
func (r operationRound) rate() float64    { return r.through.perSecond() }
func (r operationRound) haproxy() float64 { return r.direct.perSecond() }
func (r operationRound) rcp() float64     { return perOperation(r.cost.rcp, r.through.count()) }
func (r operationRound) gateway() float64 { return perOperation(r.cost.gateway, r.through.count()) }
func (r operationRound) node() float64    { return perOperation(r.cost.node, r.through.count()) }

func through(p float64) func(operationRound) float64 {
	return func(r operationRound) float64 { return milliseconds(r.through.p(p)) }
}

func direct(p float64) func(operationRound) float64 {
	return func(r operationRound) float64 { return milliseconds(r.direct.p(p)) }
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// operations measures a load of many small operations in rounds.
func (b *bench) operations(ctx context.Context, label string, theirs, ours string, load func(ctx context.Context, addr string, d time.Duration) (latencies, error)) ([]operationRound, error) {
	var rounds []operationRound
	for range b.rounds {
		for _, addr := range []string{theirs, ours} {
			if _, err := load(ctx, addr, warmUp/2); err != nil {
				return nil, fmt.Errorf("%s: warm up: %w", label, err)
			}
		}
		var r operationRound
		var err error
		if r.direct, err = load(ctx, theirs, b.time); err != nil {
			return nil, fmt.Errorf("%s: haproxy: %w", label, err)
		}
		r.cost, err = b.counted(ctx, b.site, label, func(ctx context.Context) error {
			var err error
			r.through, err = load(ctx, ours, b.time)
			return err
		})
		if err != nil {
			return nil, err
		}
		b.say("%s: %.0f/s, haproxy %.0f/s; p50 %.3f ms, p99 %.3f ms, haproxy %.3f and %.3f; CPU each: RCP %.1f µs, gateway %.1f, node %.1f", label, r.rate(), r.haproxy(),
			through(0.5)(r), through(0.99)(r), direct(0.5)(r), direct(0.99)(r), r.rcp(), r.gateway(), r.node())
		rounds = append(rounds, r)
	}
	return rounds, nil
}

func (b *bench) http(ctx context.Context) error {
	if err := b.siteUp(ctx); err != nil {
		return err
	}
	rounds, err := b.operations(ctx, "http", b.haproxy.front.http, b.front.http, func(ctx context.Context, addr string, d time.Duration) (latencies, error) {
		return requests(ctx, addr, httpConns, d)
	})
	if err != nil {
		return err
	}
	b.put("http.share", column(rounds, operationRound.share)...)
	b.put("http.p99", column(rounds, through(0.99))...)
	b.put("http.rcp", column(rounds, operationRound.rcp)...)
	b.put("http.rate", column(rounds, operationRound.rate)...)
	b.put("http.haproxy", column(rounds, operationRound.haproxy)...)
	b.put("http.haproxy.p99", column(rounds, direct(0.99))...)
	b.put("http.gateway", column(rounds, operationRound.gateway)...)
	b.put("http.node", column(rounds, operationRound.node)...)
	return nil
}

func (b *bench) one(ctx context.Context) error {
	if err := b.siteUp(ctx); err != nil {
		return err
	}
	rounds, err := b.operations(ctx, "one", b.haproxy.front.http, b.front.http, func(ctx context.Context, addr string, d time.Duration) (latencies, error) {
		return requests(ctx, addr, 1, d)
	})
	if err != nil {
		return err
	}
	b.put("one.p50", column(rounds, through(0.5))...)
	b.put("one.p99", column(rounds, through(0.99))...)
	b.put("one.haproxy", column(rounds, direct(0.5))...)
	return nil
}

func (b *bench) conn(ctx context.Context) error {
	if err := b.siteUp(ctx); err != nil {
		return err
	}
	rounds, err := b.operations(ctx, "conn", b.haproxy.front.echo, b.front.echo, func(ctx context.Context, addr string, d time.Duration) (latencies, error) {
		return connections(ctx, addr, connWorkers, d)
	})
	if err != nil {
		return err
	}
	b.put("conn.share", column(rounds, operationRound.share)...)
	b.put("conn.rcp", column(rounds, operationRound.rcp)...)
	b.put("conn.rate", column(rounds, operationRound.rate)...)
	b.put("conn.haproxy", column(rounds, operationRound.haproxy)...)
	b.put("conn.gateway", column(rounds, operationRound.gateway)...)
	b.put("conn.node", column(rounds, operationRound.node)...)
	return nil
}
