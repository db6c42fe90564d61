package simnode

import (
	"context"
	"math"
	"math/rand/v2"
	"strconv"
	"time"

	"sallyport/internal/wire"
)

const (
	// generateEvery spaces the groups of events: each is one fsync here.
	generateEvery = 10 * time.Millisecond
	// eventSize is about the length of an event as it goes over the wire, in bytes.
	eventSize = 250
	// maxBacklog is where the generator waits for the gateway, in events.
	maxBacklog = 1 << 20
)

func (w *Worker) setRate(perSecond float64) { w.rate.Store(math.Float64bits(perSecond)) }

// generate stores events at the rate that was asked for, one node after the
// other.
func (w *Worker) generate(ctx context.Context) error {
	tick := time.NewTicker(generateEvery)
	defer tick.Stop()
	last := time.Now()
	owed, next := 0.0, 0
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		now := time.Now()
		rate := math.Float64frombits(w.rate.Load())
		owed = min(owed+rate*now.Sub(last).Seconds(), rate) // at most a second's worth is made up for
		last = now
		if owed < 1 || w.count.stored.Load()-w.count.acked.Load() > maxBacklog {
			continue
		}
		b := &batch{}
		first := next
		for ; owed >= 1; owed-- {
			n := w.nodes[next]
			b.add(n.number, n.spool, func(dst []byte, seq int64) []byte { return w.encodeEvent(dst, n, seq, now) })
			next = (next + 1) % len(w.nodes)
		}
		if err := w.spools.store(b); err != nil {
			return err
		}
		w.count.stored.Add(int64(len(b.events)))
		for i := range min(len(b.events), len(w.nodes)) {
			if n := w.nodes[(first+i)%len(w.nodes)]; n.outboxes.Load() == 0 {
				n.kick()
			}
		}
	}
}

const padding = "the quick brown fox jumps over the lazy dog and is seen no more in this event of a node that is not there"

// encodeEvent appends the line of an event without its end. No two are alike.
func (w *Worker) encodeEvent(dst []byte, n *node, seq int64, now time.Time) []byte {
	start := len(dst)
	dst = append(dst, `{"event":{"id":"`...)
	dst = append(dst, wire.NewEventID()...)
	dst = append(dst, `","seq":`...)
	dst = strconv.AppendInt(dst, seq, 10)
	dst = append(dst, `,"time":"`...)
	dst = now.UTC().AppendFormat(dst, time.RFC3339Nano)
	dst = append(dst, `","severity":"normal","application":"sim","object":"`...)
	dst = append(dst, w.cfg.Run...)
	dst = append(dst, `","text":"`...)
	dst = append(dst, n.name...)
	dst = append(dst, ' ')
	if left := eventSize - (len(dst) - start) - len(`"}}`); left > 0 {
		dst = append(dst, padding[:min(left, len(padding))]...)
	}
	return append(dst, `"}}`...)
}

// Chaos, per second and node.
const (
	cutShare  = 0.005
	slowShare = 0.002
	slowMost  = 20 * time.Second
)

// chaos cuts channels and makes nodes slow, by its seed, until ctx ends.
func (w *Worker) chaos(ctx context.Context) error {
	r := rand.New(rand.NewPCG(w.cfg.Chaos, uint64(w.cfg.First)))
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		for _, n := range w.nodes {
			switch p := r.Float64(); {
			case p < cutShare:
				n.mu.Lock()
				c := n.conn
				n.mu.Unlock()
				if c != nil {
					c.Close(nil)
					w.count.cuts.Add(1)
				}
			case p < cutShare+slowShare:
				n.slowUntil.Store(time.Now().Add(time.Duration(r.Int64N(int64(slowMost)))).UnixNano())
			}
		}
	}
}
