package gateway

import (
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/wire"
)

// process is a node's memory: what a copy of it has too.
type process struct {
	boot string
	held wire.Nonce
}

// swap answers a nonce as a node does.
func (p *process) swap(n wire.Nonce, mark bool) (previous wire.Nonce) {
	previous, p.held = p.held, n
	if mark {
		p.boot = wire.MarkBoot(p.boot, n)
	}
	return previous
}

// copies is a story of processes of one boot, and what gateways make of it.
type copiesStory struct {
	one, two       process
	here, there    *clones // two gateways
	proven, copied bool
	sessions       int
}

func (s *copiesStory) step() { time.Sleep(time.Second) }

// ask is clones.greet.
func (s *copiesStory) ask(c *clones, p *process) {
	greet := func(mark bool) (bool, bool) {
		s.sessions++
		a := &greeting{nonce: wire.NewNonce(), sent: time.Now()}
		s.step()
		a.hello.Previous = p.swap(a.nonce, mark)
		a.hello.Boot = p.boot
		s.step()
		a.got = time.Now()
		other, copied := c.saw("n", a)
		return other != "", copied
	}
	proven, copied := greet(false)
	s.proven = s.proven || proven
	if copied {
		s.copied = true
		proven, _ = greet(true)
		s.proven = s.proven || proven
	}
	s.step()
}

// lose asks, and the answer never comes.
func (s *copiesStory) lose(p *process) { p.swap(wire.NewNonce(), false) }

func TestWhatProvesCopiesOfOneProcess(t *testing.T) {
	t.Parallel()
	in := func(s *copiesStory, times int) { // a look at both
		for range times {
			s.ask(s.here, &s.one)
			s.ask(s.here, &s.two)
		}
	}
	for name, c := range map[string]struct {
		story          func(*copiesStory)
		proven, copied bool
	}{
		"one process": {story: func(s *copiesStory) {
			for range 50 {
				s.ask(s.here, &s.one)
			}
		}},
		"asked by two gateways": {story: func(s *copiesStory) {
			for n := range 50 {
				s.ask(s.here, &s.one)
				if n%3 == 0 {
					s.ask(s.there, &s.one)
				}
			}
		}},
		"answers get lost": {story: func(s *copiesStory) {
			for range 50 {
				s.ask(s.here, &s.one)
				s.lose(&s.one)
			}
		}},
		"the gateway is restarted": {story: func(s *copiesStory) {
			for range 10 {
				s.ask(s.here, &s.one)
				s.here = newClones(nil)
			}
		}},
		"too old to know": {story: func(s *copiesStory) {
			s.one.held, s.two.held = wire.Nonce{}, wire.Nonce{}
			for range 10 {
				for _, boot := range []string{"b", "b"} {
					s.here.saw("n", &greeting{hello: wire.Hello{Boot: boot}, nonce: wire.NewNonce(), sent: time.Now(), got: time.Now()})
					s.step()
				}
			}
		}},
		"turned back to a snapshot again and again": {story: func(s *copiesStory) {
			s.ask(s.here, &s.one)
			snapshot := s.one
			for range 10 {
				s.ask(s.here, &s.one)
				s.ask(s.here, &s.one)
				s.one = snapshot
			}
			s.ask(s.here, &s.one)
		}, copied: true},
		"turned back to a snapshot of a copy, and two gateways": {story: func(s *copiesStory) {
			s.ask(s.here, &s.one)
			snapshot := s.one
			s.ask(s.here, &s.one)
			s.one = snapshot
			s.ask(s.here, &s.one) // it has a boot ID of its own now
			s.ask(s.here, &s.one)
			snapshot = s.one
			for range 10 {
				s.ask(s.there, &s.one)
				s.ask(s.here, &s.one)
				s.ask(s.here, &s.one)
				s.one = snapshot
			}
		}, copied: true},
		"copied before the first hello": {story: func(s *copiesStory) {
			s.two = s.one
			in(s, 2)
		}, proven: true, copied: true},
		"copied in between": {story: func(s *copiesStory) {
			for range 20 {
				s.ask(s.here, &s.one)
			}
			s.two = s.one
			in(s, 2)
		}, proven: true, copied: true},
		"an old snapshot is resumed": {story: func(s *copiesStory) {
			s.ask(s.here, &s.one)
			s.two = s.one
			for range 50 {
				s.ask(s.here, &s.one)
			}
			in(s, 3)
		}, proven: true, copied: true},
		"copied, and then the gateway is restarted": {story: func(s *copiesStory) {
			s.ask(s.here, &s.one)
			s.two = s.one
			s.ask(s.here, &s.one)
			s.ask(s.there, &s.two)
			s.here = newClones(nil)
			in(s, 3)
		}, proven: true, copied: true},
		"one of them was asked by another gateway alone": {story: func(s *copiesStory) {
			s.ask(s.here, &s.one)
			s.two = s.one
			s.ask(s.there, &s.two)
			in(s, 3)
		}, proven: true, copied: true},
		"one answers seldom": {story: func(s *copiesStory) {
			s.two = s.one
			for range 4 {
				s.ask(s.here, &s.one)
				for range 20 {
					s.ask(s.here, &s.two)
				}
			}
		}, proven: true, copied: true},
		"copied again after they had boot IDs of their own": {story: func(s *copiesStory) {
			s.two = s.one
			in(s, 2)
			s.proven = false
			s.two = s.one
			in(s, 3)
		}, proven: true, copied: true},
	} {
		synctest.Test(t, func(t *testing.T) {
			first := process{boot: "b", held: wire.NewNonce()}
			s := &copiesStory{one: first, two: first, here: newClones(nil), there: newClones(nil)}
			c.story(s)
			if s.proven != c.proven || s.copied != c.copied {
				t.Errorf("%s: proven %v, copied %v", name, s.proven, s.copied)
			}
			for _, x := range s.here.seen["n"] {
				if len(x.thread.ends) > maxEnds || len(x.thread.given) > maxGiven {
					t.Errorf("%s: %d ends and %d nonces are remembered of one boot", name, len(x.thread.ends), len(x.thread.given))
				}
			}
		})
	}
}

// TestWhatAnRCPHoldsUpProvesNothing: requests and answers of one process reach
// it, and us, as late as an RCP likes, in every order.
func TestWhatAnRCPHoldsUpProvesNothing(t *testing.T) {
	t.Parallel()
	type request struct {
		a     *greeting
		taken bool
	}
	synctest.Test(t, func(t *testing.T) {
		for seed := range uint64(2000) {
			p := process{boot: "b", held: wire.NewNonce()}
			c := newClones(nil)
			under := map[int]*request{}
			dice := seed*2654435761 + 1
			roll := func(n int) int {
				dice = dice*6364136223846793005 + 1442695040888963407
				return int(dice>>33) % n
			}
			for n := range 40 {
				time.Sleep(time.Millisecond)
				open := slices.Sorted(maps.Keys(under))
				switch what := roll(3); {
				case what == 0 || len(open) == 0: // asked
					under[n] = &request{a: &greeting{nonce: wire.NewNonce(), sent: time.Now()}}
				default:
					k := open[roll(len(open))]
					r := under[k]
					if !r.taken { // the node has it
						r.taken = true
						r.a.hello = wire.Hello{Boot: p.boot, Previous: p.swap(r.a.nonce, false)}
						continue
					}
					delete(under, k) // the answer is there, or lost
					if r.a.got = time.Now(); roll(5) == 0 {
						continue
					}
					if other, copied := c.saw("n", r.a); other != "" || copied {
						t.Fatalf("seed %d: one process is taken for two", seed)
					}
				}
			}
		}
	})
}
