package rcp

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// link is what the relay needs of a channel whose other side is downstream.
type link interface {
	Peer() identity.Peer
	Carrier() string
	Dialled() bool
	RemoteAddr() string
	Since() time.Time
	RTT() time.Duration
	RoundTrip(*http.Request) (*http.Response, error)
	Forward(w http.ResponseWriter, r *http.Request, authority string, h http.Header) (answered bool, err error)
	OpenLane(ctx context.Context, req wire.LaneRequest) (channel.LaneConn, error)
	Drain(ctx context.Context, d wire.Drain) error // POST /v1/drain, then Close when idle
	Close(cause error)
	Done() <-chan struct{}
	Err() error
	Stay(end func()) bool
}

// channelLink makes one of a channel.
type channelLink struct{ *channel.Conn }

func (l channelLink) Forward(w http.ResponseWriter, r *http.Request, authority string, h http.Header) (bool, error) {
	return channel.Forward(w, r, l.Conn, authority, h)
}

// maxChannels is how many channels of one party may live at one time: two
// carriers that both won, twice, while one pair replaces the other.
const maxChannels = 4

// pendingDoor is how many parties without a certificate may stand in the door
// of one port, beyond those that wait: coming, or leaving.
const pendingDoor = 256

// Reasons for which the relay ends a channel.
var (
	errForged       = errors.New("the peer's signals name another party or another channel")
	errTooMany      = errors.New("the party has too many channels; the oldest goes")
	errReplaced     = errors.New("replaced by a newer channel of the same party")
	errRestarted    = errors.New("the party has started anew: nobody is at the other end")
	errPendingTotal = errors.New("too many parties wait for a certificate (SALLYPORT_RCP_PENDING_MAX)")
	errCrowded      = errors.New("too many parties wait for a certificate, most of them behind this source address: one from elsewhere takes the place (SALLYPORT_RCP_PENDING_MAX)")
	errPendingFrom  = errors.New("too many parties wait for a certificate behind one source address (SALLYPORT_RCP_PENDING_PER_SOURCE)")
)

// attached is one live channel of a downstream party.
type attached struct {
	conn   link
	peer   identity.Peer
	source netip.Prefix // of a pending party
	seq    uint64       // order of arrival
	came   time.Time

	// listening ends, by hush, before the channel drains: a stream of signals
	// would never end by itself.
	listening context.Context
	hush      context.CancelFunc

	// Under roster.mu.
	requested bool        // of a pending party: a gateway shows its request to an operator
	signal    wire.Signal // the last one
	signalled bool
	replaced  bool // a newer channel of the party took over
}

func (a *attached) target() target {
	if a.peer.Pending {
		return target{key: a.peer.Key}
	}
	return target{id: a.peer.Party.ID}
}

// raceTime is within what two channels come that a party opened at one time,
// one over each carrier.
const raceTime = 2 * time.Second

// newer tells which of two channels of one party came later: by the party's own
// count, where they raced each other. Generations count only within one boot;
// otherwise, and for what has not spoken yet, arrival decides. Copies of one
// running process have one boot and counts of their own: each that comes is the
// newest, so that the gateway is shown all of them.
func (a *attached) newer(b *attached) bool {
	if a.signalled && b.signalled && a.signal.Boot == b.signal.Boot && a.signal.Generation != b.signal.Generation && a.came.Sub(b.came).Abs() < raceTime {
		return a.signal.Generation > b.signal.Generation
	}
	return a.seq > b.seq
}

// prefer orders the channels of one party: those that stay before those that
// drain, those that have spoken before those that have not, then the newest.
func prefer(a, b *attached) int {
	order := func(first bool) int {
		if first {
			return -1
		}
		return 1
	}
	switch {
	case a.replaced != b.replaced:
		return order(b.replaced)
	case a.signal.Draining != b.signal.Draining:
		return order(b.signal.Draining)
	case a.signalled != b.signalled:
		return order(a.signalled)
	case a == b:
		return 0
	}
	return order(a.newer(b))
}

// roster holds the live channels of downstream parties, and keeps the table of
// peers in step with them.
type roster struct {
	table            *table
	maxPending       int
	maxPendingSource int
	retire           func(*attached) // starts the end of a replaced channel; called with mu held

	mu      sync.Mutex
	seq     uint64
	left    uint64
	live    map[target][]*attached // best first
	sources map[netip.Prefix]*site
	pending int
	kept    int // of them, those that are requested
}

// site is who waits for a certificate behind one source address.
type site struct {
	waiting []*attached // in order of arrival
	kept    int         // of them, those that are requested
}

// loose are the places that a site may have to give up.
func (s *site) loose() int {
	if s == nil {
		return 0
	}
	return len(s.waiting) - s.kept
}

// first is the one who waits longest of those that may have to leave.
func (s *site) first() *attached {
	for _, a := range s.waiting {
		if !a.requested {
			return a
		}
	}
	return nil
}

func newRoster(t *table, maxPending, maxPendingSource int, retire func(*attached)) *roster {
	return &roster{
		table: t, maxPending: maxPending, maxPendingSource: maxPendingSource, retire: retire,
		live: map[target][]*attached{}, sources: map[netip.Prefix]*site{},
	}
}

// sourceOf is what limits count by: an address, or the /64 that IPv6 gives to
// one site.
func sourceOf(remote string) netip.Prefix {
	ap, err := netip.ParseAddrPort(remote)
	if err != nil {
		return netip.Prefix{} // all that is unreadable shares one limit
	}
	addr := ap.Addr().Unmap().WithZone("")
	bits := 32
	if addr.Is6() {
		bits = 64
	}
	p, err := addr.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return p
}

// join enters a channel. The caller calls leave when the channel has ended.
func (r *roster) join(ctx context.Context, conn link) (*attached, error) {
	a := &attached{conn: conn, peer: conn.Peer()}
	a.listening, a.hush = context.WithCancel(ctx)
	var old []*attached
	var evicted *attached
	err := func() error {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.seq++
		a.seq, a.came = r.seq, time.Now()
		tg := a.target()
		if a.peer.Pending {
			a.source = sourceOf(conn.RemoteAddr())
			at := r.sources[a.source]
			if len(r.live[tg]) == 0 {
				if at != nil && len(at.waiting) >= r.maxPendingSource {
					return fmt.Errorf("%w: %s", errPendingFrom, a.source)
				}
				if r.pending >= r.maxPending {
					if evicted = r.giveWay(a.source); evicted == nil {
						return errPendingTotal
					}
					r.out(evicted, errCrowded.Error())
				}
			}
			if at = r.sources[a.source]; at == nil {
				at = &site{}
				r.sources[a.source] = at
			}
			r.pending++
			at.waiting = append(at.waiting, a)
			old = slices.Clone(r.live[tg]) // one key has one channel: the last one
			for _, o := range old {
				if o.requested {
					r.unkeep(o)
					r.keep(a)
				}
			}
		} else if n := len(r.live[tg]); n >= maxChannels {
			old = []*attached{slices.MinFunc(r.live[tg], func(x, y *attached) int { return cmp.Compare(x.seq, y.seq) })}
		}
		r.live[tg] = append(r.live[tg], a)
		if err := r.publish(tg); err != nil {
			r.remove(a)
			return err
		}
		return nil
	}()
	if evicted != nil {
		evicted.hush()
		evicted.conn.Close(errCrowded)
	}
	if err != nil {
		a.hush()
		return nil, err
	}
	for _, o := range old {
		if a.peer.Pending {
			o.conn.Close(errReplaced)
		} else {
			o.conn.Close(errTooMany)
		}
	}
	return a, nil
}

// giveWay finds who leaves when all places are taken and a party comes from
// source: the one that waits longest behind the address with most of them, so
// that strangers cannot keep a node with a code out. Nobody does for a source
// that has as many itself. Parties whose request waits for an operator neither
// leave nor count: whoever comes from thousands of addresses cannot push them out. mu
// is held.
func (r *roster) giveWay(source netip.Prefix) *attached {
	var most *site
	var first *attached
	for _, s := range r.sources {
		if n := s.loose(); n == 0 || n < most.loose() {
			continue
		}
		if f := s.first(); s.loose() > most.loose() || f.seq < first.seq {
			most, first = s, f
		}
	}
	own := r.sources[source].loose()
	if own+1 < most.loose() || own == 0 && first != nil {
		return first
	}
	return nil
}

// requested says that a gateway shows the request of a pending party to an
// operator. The party keeps its place from then on: of half of them at most, so that
// strangers who make requests leave room for others too.
func (r *roster) requested(tg target) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, a := range r.live[tg] {
		if a.peer.Pending {
			r.keep(a)
		}
	}
}

// keep keeps a pending party in its place; mu is held.
func (r *roster) keep(a *attached) {
	if !a.requested && r.kept < r.maxPending/2 {
		a.requested = true
		r.kept++
		r.sources[a.source].kept++
	}
}

func (r *roster) unkeep(a *attached) {
	if a.requested {
		a.requested = false
		r.kept--
		r.sources[a.source].kept--
	}
}

// leave takes a channel out.
func (r *roster) leave(a *attached, reason string) {
	a.hush()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.out(a, reason)
}

// out takes a channel out, and its party out of the table with the last one;
// mu is held.
func (r *roster) out(a *attached, reason string) {
	tg := a.target()
	wasBest := len(r.live[tg]) > 0 && r.live[tg][0] == a
	if !r.remove(a) {
		return
	}
	switch {
	case len(r.live[tg]) == 0:
		r.table.drop(tg, nil, reason)
	case wasBest:
		_ = r.publish(tg) // an entry that is there is never refused
	}
}

func (r *roster) remove(a *attached) bool {
	tg := a.target()
	i := slices.Index(r.live[tg], a)
	if i < 0 {
		return false
	}
	r.left++
	r.live[tg] = slices.Delete(r.live[tg], i, i+1)
	if len(r.live[tg]) == 0 {
		delete(r.live, tg)
	}
	if a.peer.Pending {
		r.pending--
		at := r.sources[a.source]
		if i := slices.Index(at.waiting, a); i >= 0 {
			at.waiting = slices.Delete(at.waiting, i, i+1)
		}
		r.unkeep(a)
		if len(at.waiting) == 0 {
			delete(r.sources, a.source)
		}
	}
	return true
}

// publish sorts a party's channels and puts the best into the table; mu is held.
func (r *roster) publish(tg target) error {
	all := r.live[tg]
	slices.SortStableFunc(all, prefer)
	a := all[0]
	p := wire.Peer{
		Boot: a.signal.Boot, Generation: a.signal.Generation, Digest: a.signal.Digest, Hints: a.signal.Hints,
		Draining: a.signal.Draining,
		Carrier:  a.conn.Carrier(), Source: a.conn.RemoteAddr(), Dialled: a.conn.Dialled(),
		Since: a.conn.Since(), RTT: a.conn.RTT().Seconds(),
	}
	if a.peer.Pending {
		p.Pending = a.peer.Key
	} else {
		p.Role, p.ID = a.peer.Party.Role, a.peer.Party.ID
	}
	return r.table.put(p)
}

// signal takes one line of a party about itself. An error means that the
// channel lies about who it is, and must be cut. What an outdated channel says
// is ignored.
func (r *roster) signal(a *attached, s wire.Signal) error {
	if s.ID != a.peer.Party.ID {
		return fmt.Errorf("%w: %s says it is %q", errForged, a.peer.Party, wire.Quotable(string(s.ID)))
	}
	if err := checkHints(s.Boot, s.Digest, s.Hints); err != nil {
		return fmt.Errorf("%w: %w", errForged, err)
	}
	var stale []*attached
	defer func() { // unlocked: closing may have to wait for a peer that reads nothing
		for _, o := range stale {
			o.conn.Close(errRestarted)
		}
	}()
	r.mu.Lock()
	defer r.mu.Unlock()
	if a.signalled && (s.Boot != a.signal.Boot || s.Generation != a.signal.Generation) {
		return fmt.Errorf("%w: boot or generation changed within one channel", errForged)
	}
	first := !a.signalled
	a.signal, a.signalled = s, true
	tg := a.target()
	if slices.Index(r.live[tg], a) < 0 {
		return nil // it has left meanwhile
	}
	if first {
		stale = r.supersede(r.live[tg])
	}
	if a.replaced {
		return nil
	}
	return r.publish(tg)
}

// supersede marks every channel for which a newer one has spoken; mu is held.
// One of the same boot may still have something running on it, and ends gently.
// One of another boot belongs to a process that is gone: over QUIC its silence
// would be noticed only after 30 s, and sessions through it would hang as long.
// The caller closes those of another boot, which are returned.
func (r *roster) supersede(all []*attached) (stale []*attached) {
	for _, old := range all {
		if old.replaced || !old.signalled {
			continue
		}
		for _, a := range all {
			if a != old && a.signalled && !a.replaced && a.newer(old) {
				old.replaced = true
				if a.signal.Boot == old.signal.Boot {
					r.retire(old)
				} else {
					stale = append(stale, old)
				}
				break
			}
		}
	}
	return stale
}

// channels lists the live channels of a party, best first.
func (r *roster) channels(tg target) []*attached {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.live[tg])
}

// all lists every live channel for which keep is true.
func (r *roster) all(keep func(identity.Peer) bool) (out []*attached) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range r.live {
		for _, a := range l {
			if keep(a.peer) {
				out = append(out, a)
			}
		}
	}
	return out
}

// moved counts the channels that have come and gone, and the parties that are there.
func (r *roster) moved() (channels, live uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.seq + r.left, uint64(len(r.live))
}

// count returns the connected parties by role, and the pending ones.
func (r *roster) count() (byRole map[wire.Role]int, pending int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	byRole = map[wire.Role]int{}
	for _, l := range r.live {
		if p := l[0].peer; !p.Pending {
			byRole[p.Party.Role]++
		}
	}
	return byRole, r.pending
}

// Limits on what a peer says of itself, in bytes: well above what honest
// parties send, far below a line.
const (
	maxBootText = 64
	maxHints    = 8
	maxHintText = 32
)

func checkHints(boot, digest string, hints []string) error {
	if len(boot) > maxBootText || len(digest) > maxBootText || len(hints) > maxHints {
		return errors.New("boot, digest or hints are too long")
	}
	for _, h := range hints {
		if len(h) > maxHintText {
			return errors.New("a hint is too long")
		}
	}
	return nil
}
