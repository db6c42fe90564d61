// Package parking lets clients in the network of a node or an RCP reach
// services of the trusted network, without anybody dialling into it: their
// connections wait here until a gateway, which hears of them, accepts them. A
// client names a service and nothing else; which services there are, and where,
// only the gateway knows.
package parking

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/wire"
)

// Limits of one lot. Who fills it is a stranger.
const (
	maxParked    = 256
	maxPerSource = 32
	maxJoined    = 1024 // accepted, and being copied
	// acceptWithin is how long a client waits for a gateway, the time included
	// in which that one dials the service.
	acceptWithin = 20 * time.Second
	// sayAgain is how often the log hears at most that a closed lot refuses clients.
	sayAgain = time.Minute
)

// Verdicts on a parked connection.
var (
	errNobody = errors.New("no gateway accepted the connection in time")
	errGone   = errors.New("the connection does not wait any more")
)

// Lot holds the connections that wait.
type Lot struct {
	// Audience is how many worlds are asked: a connection is refused when all
	// of them refused it.
	audience func() int
	closed   func() string // why nobody can accept any; empty: somebody may
	wake     func()        // there is one more
	log      *slog.Logger

	joined   atomic.Int64
	accepted atomic.Int64
	refused  atomic.Int64
	shut     shut

	mu        sync.Mutex
	n         int64
	waiting   map[wire.ID]*parked
	perSource map[netip.Prefix]int
	changed   chan struct{} // closed when one more waits; nil: nobody looks
}

// shut counts the clients that a closed lot refuses: they have their answer at
// once, and one that asks again and again is not to fill the log.
type shut struct {
	mu   sync.Mutex
	why  string
	said time.Time
	n    int64 // since then
}

// refused counts one client, and tells whether the log is to hear of it, and of
// how many with it.
func (s *shut) refused(why string, now time.Time) (n int64, say bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n++
	if why == s.why && now.Sub(s.said) < sayAgain {
		return 0, false
	}
	n = s.n
	s.why, s.said, s.n = why, now, 0
	return n, true
}

// parked is one connection that waits.
type parked struct {
	wire.Parked
	source   netip.Prefix
	refusals map[string]bool // by world
	audience int
	verdict  chan verdict // capacity 1
}

// verdict is either a stream to join, or an answer for the client.
type verdict struct {
	taken  *taken
	status int
	reason string
}

// New makes a lot. closed says why no world may have a connection, so that no
// client waits for that. wake is called when somebody should be told; both are
// called without locks.
func New(audience func() int, closed func() string, wake func(), log *slog.Logger) *Lot {
	return &Lot{audience: audience, closed: closed, wake: wake, log: log, waiting: map[wire.ID]*parked{}, perSource: map[netip.Prefix]int{}}
}

// network is what a source is counted by: an IPv6 host has a whole /64.
func network(a netip.Addr) netip.Prefix {
	a = a.Unmap().WithZone("")
	bits := 32
	if a.Is6() {
		bits = 64
	}
	p, err := a.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return p
}

// park lets a connection wait. The verdict comes in its channel, unless leave
// is called first, which must be called in any case.
func (l *Lot) park(service string, source netip.AddrPort) (p *parked, leave func(), err error) {
	from := network(source.Addr())
	l.mu.Lock()
	switch {
	case len(l.waiting) >= maxParked:
		err = fmt.Errorf("%d connections wait already", maxParked)
	case l.perSource[from] >= maxPerSource:
		err = fmt.Errorf("%d connections of this source wait already", maxPerSource)
	case l.joined.Load() >= maxJoined:
		err = fmt.Errorf("%d connections are open already", maxJoined)
	}
	if err != nil {
		l.mu.Unlock()
		return nil, nil, err
	}
	l.n++
	p = &parked{
		Parked: wire.Parked{ID: wire.NewID(), N: l.n, Service: service, Source: source.String(), Since: time.Now().UTC()},
		source: from, refusals: map[string]bool{}, audience: max(l.audience(), 1), verdict: make(chan verdict, 1),
	}
	l.waiting[p.ID] = p
	l.perSource[from]++
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
	l.mu.Unlock()
	l.wake()
	return p, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.removeLocked(p)
	}, nil
}

func (l *Lot) removeLocked(p *parked) bool {
	if l.waiting[p.ID] != p {
		return false
	}
	delete(l.waiting, p.ID)
	if l.perSource[p.source]--; l.perSource[p.source] <= 0 {
		delete(l.perSource, p.source)
	}
	return true
}

// Waits tells whether anything waits that world has not refused.
func (l *Lot) Waits(world string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.waiting {
		if !p.refusals[world] {
			return true
		}
	}
	return false
}

// List returns what waits for world behind after, oldest first. If there is
// nothing it waits for it, until ctx is done.
func (l *Lot) List(ctx context.Context, world string, after int64) []wire.Parked {
	for {
		l.mu.Lock()
		var out []wire.Parked
		for _, p := range l.waiting {
			if p.N > after && !p.refusals[world] {
				out = append(out, p.Parked)
			}
		}
		if l.changed == nil {
			l.changed = make(chan struct{})
		}
		changed := l.changed
		l.mu.Unlock()
		if len(out) > 0 {
			slices.SortFunc(out, func(a, b wire.Parked) int { return cmp.Compare(a.N, b.N) })
			return out
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return []wire.Parked{}
		}
	}
}

// Refuse takes a world's word that a connection is not accepted. The client
// hears it when all have refused it; that a service cannot be reached it hears
// at once.
func (l *Lot) Refuse(world string, r wire.ParkedRefusal) error {
	if r.Status != http.StatusForbidden && r.Status != http.StatusBadGateway {
		return fmt.Errorf("status %d is no refusal", r.Status)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.waiting[r.ID]
	if p == nil {
		return errGone
	}
	p.refusals[world] = true
	if r.Status == http.StatusForbidden && len(p.refusals) < p.audience {
		return nil
	}
	l.removeLocked(p)
	l.refused.Add(1)
	p.verdict <- verdict{status: r.Status, reason: wire.Quotable(r.Reason)}
	return nil
}

// take gives a connection to who is first.
func (l *Lot) take(id wire.ID, t *taken) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.waiting[id]
	if p == nil || !l.removeLocked(p) {
		return errGone
	}
	l.accepted.Add(1)
	p.verdict <- verdict{taken: t}
	return nil
}

// Figures for metrics: connections that wait, that are joined, and how many
// were accepted and refused so far.
func (l *Lot) Figures() (waiting, joined, accepted, refused int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return int64(len(l.waiting)), l.joined.Load(), l.accepted.Load(), l.refused.Load()
}
