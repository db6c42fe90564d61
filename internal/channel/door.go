package channel

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"
)

const (
	// answerPatience is how long a connection keeps its place when others want it and
	// we wait for its next message: a round trip by way of a satellite and the other
	// side's signature. A ClientHello is sent with the last packet of TCP's
	// handshake, but by a thousand parties on one machine not at once.
	answerPatience = time.Second
	// doorLook is how often a newcomer looks who keeps us waiting now.
	doorLook = 20 * time.Millisecond
	// doorTries bounds the connections that one look examines closely.
	doorTries = 8
	// doorFlow is the share of the places whose parties must wait for us, or must have
	// come in, certified, in one second or the one before, for the door to count as moving.
	doorFlow = 32
)

// errGaveWay is why a handshake was cut.
var errGaveWay = errors.New("it kept us waiting while all places for handshakes were taken, and gave way to another")

// door is where connections stand between accept and the end of the handshake.
//
// A place there is cheap to take and costs nothing to keep, so nobody keeps one
// by doing nothing: when all are taken, whoever has kept us waiting too long gives
// way to a newcomer. Those without a ClientHello go first, as a hello costs the
// other side at least the sending and us a signature; among equals those of the
// source with most places, then who has kept us waiting longest. A newcomer from a source
// within its share does not wait for the patience that those above theirs would
// have. Nobody gives way for our own slowness: when a plant comes back at once, all
// places are taken by parties that wait for us, and the others wait in the
// kernel's queue and lose nothing. Parties can be slow as well, all at once where they
// share a busy machine or line, and would be slower yet if they had to begin anew: while
// the door moves nobody gives way at all. What moves it is parties with certificates, and
// our own work, of which strangers must make as much as there is to stop it.
//
// So who stands in the door behind a party's own address does not matter to
// it: what strangers need to keep it out is not sockets but to say hello, over and over,
// faster than we can answer.
type door struct {
	total, each int
	left        chan struct{} // holds a token after somebody left

	mu     sync.Mutex
	guests []*guest
	shares map[netip.Prefix]*share
	busy   int       // guests that wait for us
	second time.Time // that is counted
	passed [2]int    // certified parties that were let in: in it, in the one before
}

// share is what a source has of a door.
type share struct{ n int }

// guest is one connection in a door.
type guest struct {
	d      *door
	conn   net.Conn
	source netip.Prefix
	share  *share
	at     int // in guests; -1 when it has left

	// Under mu of the door.
	hello   bool          // its ClientHello is there
	waited  time.Duration // for the other side, without the wait that goes on
	since   time.Time     // of the wait that goes on; zero while we work
	gaveWay bool
}

func newDoor(total, each int) *door {
	return &door{total: total, each: each, left: make(chan struct{}, 1), shares: map[netip.Prefix]*share{}}
}

// enter takes a place for a connection that was just accepted. Without one it waits, unless
// the door does not move and the source has its share already: then a newcomer is
// turned away. One at a time may enter.
func (d *door) enter(ctx context.Context, conn net.Conn) (*guest, error) {
	source := sourceOf(conn.RemoteAddr())
	for {
		g, crowded := d.take(conn, source)
		if g != nil {
			return g, nil
		}
		if crowded {
			return nil, errors.New("too many handshakes in flight, and more than its share from this source")
		}
		look := time.NewTimer(doorLook)
		select {
		case <-d.left:
		case <-look.C:
		case <-ctx.Done():
		}
		look.Stop()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
}

func (d *door) take(conn net.Conn, source netip.Prefix) (g *guest, crowded bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.shares[source]
	crowded = s != nil && s.n >= d.each
	if len(d.guests) >= d.total {
		now := time.Now()
		if d.moves(now) {
			return nil, false
		}
		loser := d.loser(crowded, now)
		if loser == nil {
			return nil, crowded
		}
		loser.gaveWay = true
		d.out(loser)
		_ = loser.conn.Close()
		s = d.shares[source]
	}
	if s == nil {
		s = &share{}
		d.shares[source] = s
	}
	s.n++
	g = &guest{d: d, conn: conn, source: source, share: s, at: len(d.guests), since: time.Now()}
	d.guests = append(d.guests, g)
	return g, false
}

// pass counts a certified party that was let in.
func (d *door) pass() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.turn(time.Now())
	d.passed[0]++
}

// moves tells whether newcomers may as well wait; mu is held.
func (d *door) moves(now time.Time) bool {
	d.turn(now)
	return max(d.busy, d.passed[0], d.passed[1]) >= max(d.total/doorFlow, 1)
}

// turn begins to count another second when it is time; mu is held.
func (d *door) turn(now time.Time) {
	switch past := now.Sub(d.second); {
	case past >= 2*time.Second:
		d.second, d.passed = now, [2]int{}
	case past >= time.Second:
		d.second, d.passed = now, [2]int{0, d.passed[0]}
	}
}

// loser finds who gives way to a newcomer, whose source may have its share
// already; mu is held.
func (d *door) loser(crowded bool, now time.Time) *guest {
	for range doorTries {
		var worst *guest
		for _, g := range d.guests {
			if g.since.IsZero() || g.kept(now) < g.patience(crowded) {
				continue
			}
			if worst == nil || g.worse(worst, now) {
				worst = g
			}
		}
		if worst == nil || !unread(worst.conn) {
			return worst
		}
		// It has answered; we have not come to it.
		worst.waited, worst.since = 0, now
	}
	return nil
}

// patience is how long we wait for a guest when its place is wanted.
func (g *guest) patience(crowded bool) time.Duration {
	if g.hello && !crowded && g.share.n > g.d.each {
		return 0
	}
	return answerPatience
}

// kept is how long a guest has kept us waiting, all in all: a byte now and then
// does not count as an answer.
func (g *guest) kept(now time.Time) time.Duration { return g.waited + now.Sub(g.since) }

func (g *guest) worse(o *guest, now time.Time) bool {
	if g.hello != o.hello {
		return !g.hello
	}
	if g.share.n != o.share.n {
		return g.share.n > o.share.n
	}
	return g.kept(now) > o.kept(now)
}

// out takes a guest out; mu is held.
func (d *door) out(g *guest) {
	if g.at < 0 {
		return
	}
	last := len(d.guests) - 1
	d.guests[g.at] = d.guests[last]
	d.guests[g.at].at = g.at
	d.guests[last] = nil
	d.guests = d.guests[:last]
	g.at = -1
	if g.since.IsZero() {
		d.busy--
	}
	if g.share.n--; g.share.n == 0 {
		delete(d.shares, g.source)
	}
	select {
	case d.left <- struct{}{}:
	default:
	}
}

// leave frees the place. It tells whether it was taken away before.
func (g *guest) leave() (gaveWay bool) {
	g.d.mu.Lock()
	defer g.d.mu.Unlock()
	g.d.out(g)
	return g.gaveWay
}

// waits says that we wait for the other side from now on, works that it is our
// turn. saidHello is called once, when the ClientHello has been read. A nil guest
// takes all of it.
func (g *guest) waits() {
	if g == nil {
		return
	}
	g.d.mu.Lock()
	defer g.d.mu.Unlock()
	if g.since.IsZero() && g.at >= 0 {
		g.d.busy--
	}
	g.since = time.Now()
}

func (g *guest) works() {
	if g == nil {
		return
	}
	g.d.mu.Lock()
	defer g.d.mu.Unlock()
	if !g.since.IsZero() {
		g.waited += time.Since(g.since)
		g.since = time.Time{}
		if g.at >= 0 {
			g.d.busy++
		}
	}
}

func (g *guest) saidHello() {
	if g == nil {
		return
	}
	g.d.mu.Lock()
	defer g.d.mu.Unlock()
	g.hello, g.waited = true, 0
}
