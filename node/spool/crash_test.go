package spool

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"sallyport/internal/wire"
)

// gateway is the other end in its simplest form: what it has stored survives
// everything, and it acknowledges only that.
type gateway struct {
	t      *testing.T
	places map[string]map[int64]wire.ID // spool → seq → event
	marks  map[string]int64
	seen   map[wire.ID]int // how often an event came under a new place
	gaps   map[string]int64
}

func newGateway(t *testing.T) *gateway {
	return &gateway{t: t, places: map[string]map[int64]wire.ID{}, marks: map[string]int64{}, seen: map[wire.ID]int{}, gaps: map[string]int64{}}
}

func (g *gateway) receive(spool string, lines []wire.OutboxUp) {
	g.t.Helper()
	for _, l := range lines {
		next := g.marks[spool] + 1
		switch {
		case l.Gap != nil:
			if l.Gap.From != next || l.Gap.To < l.Gap.From {
				g.t.Fatalf("gap %+v, want it to begin at %d", l.Gap, next)
			}
			g.gaps[l.Gap.Reason] += l.Gap.To - l.Gap.From + 1
			g.marks[spool] = l.Gap.To
		case l.Event != nil:
			if l.Event.Seq != next {
				g.t.Fatalf("event with seq %d, want %d", l.Event.Seq, next)
			}
			if g.places[spool] == nil {
				g.places[spool] = map[int64]wire.ID{}
			}
			g.places[spool][next] = l.Event.ID
			g.seen[l.Event.ID]++
			g.marks[spool] = next
		default:
			g.t.Fatal("empty line")
		}
	}
}

func (g *gateway) open(s *Spool) (*Reader, string, error) {
	st, err := s.State()
	if err != nil {
		return nil, "", err
	}
	r, renewed, err := s.Reader(wire.OutboxMark{Spool: st.Spool, Seq: g.marks[st.Spool]})
	if err != nil {
		return nil, "", err
	}
	if renewed {
		if st, err = s.State(); err != nil {
			return nil, "", err
		}
	}
	return r, st.Spool, nil
}

// pull reads what is there without waiting.
func pull(r *Reader) ([]wire.OutboxUp, error) {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	return r.next()
}

// TestCrashAnywhere cuts the power at a random operation of a random workload,
// many times over: what was acknowledged arrives exactly once, or as a gap that
// the quota made.
func TestCrashAnywhere(t *testing.T) {
	for seed := range 40 {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { crashRun(t, uint64(seed)) })
	}
}

func crashRun(t *testing.T, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 2))
	dir := newForgetful(seed)
	g := newGateway(t)
	quota := int64(8 << 20)
	if seed%2 == 1 {
		quota = 48 << 10
	}
	acked := map[wire.ID]bool{} // acknowledged to the sender
	tried := map[wire.ID]bool{}
	for range 6 {
		dir.budget = 1 + rnd.IntN(300)
		if err := crashLife(dir, rnd, g, quota, acked, tried); err != nil && !errors.Is(err, errCrash) {
			t.Fatal(err)
		}
		dir = dir.reboot()
	}
	dir.budget = -1
	s, err := Open(Config{Dir: dir, Quota: quota})
	if err != nil {
		t.Fatal(err)
	}
	r, id, err := g.open(s)
	if err != nil {
		t.Fatal(err)
	}
	for {
		lines, err := pull(r)
		if err != nil {
			t.Fatal(err)
		}
		if len(lines) == 0 {
			break
		}
		g.receive(id, lines)
	}
	missing := int64(0)
	for e := range acked {
		if g.seen[e] == 0 {
			missing++
		}
	}
	if missing > g.gaps["quota"] {
		t.Errorf("%d of %d acknowledged events are missing, but gaps name only %d", missing, len(acked), g.gaps["quota"])
	}
	if quota > 1<<20 && missing > 0 {
		t.Errorf("%d events missing without a quota", missing)
	}
	for e, n := range g.seen {
		if n > 1 {
			t.Errorf("event %s came %d times", e, n)
		}
		if !tried[e] {
			t.Errorf("event %s was never sent", e)
		}
	}
	if len(g.marks) != 1 {
		t.Errorf("%d spool ids: a crash alone must not make a new one", len(g.marks))
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// crashLife is one life of the process: it ends with the power cut.
func crashLife(dir *forgetful, rnd *rand.Rand, g *gateway, quota int64, acked, tried map[wire.ID]bool) error {
	s, err := Open(Config{Dir: dir, Quota: quota})
	if err != nil {
		return err
	}
	var r *Reader
	var id string
	for {
		switch rnd.IntN(6) {
		case 0, 1, 2:
			events := make([]wire.Event, 1+rnd.IntN(40))
			for i := range events {
				events[i] = wire.Event{ID: wire.NewID(), Severity: wire.Severities[rnd.IntN(5)], Text: fmt.Sprintf("%0*d", 1+rnd.IntN(400), i)}
				tried[events[i].ID] = true
			}
			if _, err := s.Append(events...); err != nil {
				return err
			}
			for _, e := range events {
				acked[e.ID] = true
			}
		case 3:
			if r, id, err = g.open(s); err != nil {
				return err
			}
		case 4:
			if r != nil {
				lines, err := pull(r)
				if err != nil {
					return err
				}
				g.receive(id, lines)
			}
		case 5:
			if r != nil {
				if err := r.Ack(wire.OutboxMark{Spool: id, Seq: g.marks[id]}); err != nil {
					return err
				}
			}
		}
		if dir.dead {
			return errCrash
		}
	}
}
