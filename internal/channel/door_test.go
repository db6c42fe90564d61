package channel

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// fakeConn is a connection from an address that is closed, or not.
type fakeConn struct {
	net.Conn
	from   net.Addr
	closed bool
}

func (c *fakeConn) RemoteAddr() net.Addr { return c.from }
func (c *fakeConn) Close() error         { c.closed = true; return nil }

// from is a connection of host i of network 10.<net>.
func from(network, i int) *fakeConn {
	addr := netip.AddrFrom4([4]byte{10, byte(network), byte(i >> 8), byte(i)})
	return &fakeConn{from: net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr, 1000))}
}

// mustEnter is a newcomer that has its place within the time.
func mustEnter(t *testing.T, d *door, c net.Conn, within time.Duration) *guest {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	g, err := d.enter(ctx, c)
	if err != nil {
		t.Fatalf("%s: %v", c.RemoteAddr(), err)
	}
	return g
}

// said brings a guest to where it owes us the second half of its handshake.
func said(g *guest) *guest {
	g.works()
	g.saidHello()
	g.waits()
	return g
}

// A party comes in however many strangers hold the door, from wherever, and
// wherever they stop.
func TestNobodyHoldsTheDoor(t *testing.T) {
	const total, each = 64, 16
	for name, stranger := range map[string]func(*guest){
		"nothing is sent":     func(*guest) {},
		"a hello, then never": func(g *guest) { said(g) },
	} {
		for where, address := range map[string]func(i int) *fakeConn{
			"behind its address":   func(int) *fakeConn { return from(1, 1) },
			"at ten addresses":     func(i int) *fakeConn { return from(2, i%10) },
			"at an address apiece": func(i int) *fakeConn { return from(3, i) },
		} {
			t.Run(name+", "+where, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					d := newDoor(total, each)
					var strangers []*fakeConn
					for i := range total {
						c := address(i)
						strangers = append(strangers, c)
						stranger(mustEnter(t, d, c, 2*time.Second))
					}
					time.Sleep(answerPatience) // of the bubble
					honest := from(1, 1)
					g := mustEnter(t, d, honest, time.Second)
					said(g)
					// It is in, and newer strangers do not push it out.
					for i := range total - 2 {
						c := address(total + i)
						if s, err := d.enter(t.Context(), c); err == nil {
							stranger(s)
						}
						if honest.closed {
							t.Fatalf("pushed out by newcomer %d", i)
						}
					}
					if g.leave() {
						t.Error("it gave way")
					}
					gone := 0
					for _, c := range strangers {
						if c.closed {
							gone++
						}
					}
					if gone == 0 || len(d.guests) > total {
						t.Errorf("%d of the strangers gave way, %d are in", gone, len(d.guests))
					}
				})
			})
		}
	}
}

// A byte now and then is no answer.
func TestDrippingIsWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDoor(2, 2)
		slow := from(1, 1)
		g := said(mustEnter(t, d, slow, time.Second))
		for range 12 {
			time.Sleep(answerPatience / 10)
			g.works()
			g.waits()
		}
		quick := from(2, 2)
		said(mustEnter(t, d, quick, time.Second))
		mustEnter(t, d, from(3, 3), time.Second)
		if !slow.closed || quick.closed {
			t.Errorf("gave way: slow %v, quick %v", slow.closed, quick.closed)
		}
	})
}

// When all places are taken by parties that wait for us, nobody gives way:
// newcomers wait, and those of a source with its share are turned away.
func TestNobodyGivesWayForOurSlowness(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const total, each = 8, 8
		d := newDoor(total, each)
		var plant []*fakeConn
		var guests []*guest
		for range total {
			c := from(1, 1)
			g := mustEnter(t, d, c, time.Second)
			g.works()
			plant, guests = append(plant, c), append(guests, g)
		}
		time.Sleep(10 * answerPatience)
		hurried, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := d.enter(hurried, from(1, 1)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("one more of the same source does not wait: %v", err)
		}
		began := time.Now()
		go func() {
			time.Sleep(5 * time.Second)
			if guests[0].leave() {
				t.Error("it gave way")
			}
		}()
		mustEnter(t, d, from(2, 2), 6*time.Second)
		if took := time.Since(began); took != 5*time.Second {
			t.Errorf("in after %v, want as soon as there is room", took)
		}
		for i, c := range plant {
			if c.closed {
				t.Errorf("number %d gave way", i)
			}
		}
	})
}

// Parties that are slow because all of them come at once, from a machine or by way of a
// line that they share, do not give way to each other: that would make all of them
// begin anew. They do again when nobody comes in any more.
func TestNobodyGivesWayWhileTheDoorMoves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const total, each = 64, 16
		d := newDoor(total, each)
		var guests []*guest
		for range total {
			guests = append(guests, mustEnter(t, d, from(1, 1), time.Second))
		}
		for range 10 { // seconds, in each of which as few come in as count
			for range total / doorFlow {
				d.pass()
			}
			time.Sleep(answerPatience - time.Millisecond)
			for range total / doorFlow {
				time.AfterFunc(answerPatience/4, func() {
					if guests[0].leave() {
						t.Error("one gave way")
					}
				})
				g := mustEnter(t, d, from(1, 1), time.Second)
				guests = append(guests[1:], g)
			}
		}
		time.Sleep(2 * time.Second) // and nobody comes in
		mustEnter(t, d, from(2, 1), time.Second)
		gone := 0
		for _, g := range guests {
			if g.conn.(*fakeConn).closed {
				gone++
			}
		}
		if gone != 1 {
			t.Errorf("%d gave way to one newcomer", gone)
		}
	})
}

// A source above its share has no claim to be waited for against one below.
func TestShareOfASource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const total, each = 8, 4
		d := newDoor(total, each)
		var greedy []*fakeConn
		for range total {
			c := from(1, 1)
			greedy = append(greedy, c)
			said(mustEnter(t, d, c, time.Second))
		}
		// A place that nobody else wants may be taken above the share; the next comer of the
		// same source waits for nothing.
		if _, err := d.enter(t.Context(), from(1, 1)); err == nil {
			t.Error("the source pushes out its own, which are on time")
		}
		began := time.Now()
		for i := range total - each {
			said(mustEnter(t, d, from(2, i), time.Second))
		}
		if took := time.Since(began); took > answerPatience {
			t.Errorf("newcomers waited %v for a source above its share", took)
		}
		gone := 0
		for _, c := range greedy {
			if c.closed {
				gone++
			}
		}
		if gone != total-each {
			t.Errorf("%d gave way, want %d", gone, total-each)
		}
		// Now it is within its share, and has its time.
		ctx, cancel := context.WithTimeout(t.Context(), answerPatience/2)
		defer cancel()
		if g, err := d.enter(ctx, from(3, 3)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v, %v: want to wait", g, err)
		}
	})
}

// The counts of a door are right after any order of coming and going.
func TestDoorCounts(t *testing.T) {
	d := newDoor(16, 4)
	var in []*guest
	for i := range 1000 {
		if g, err := d.enter(t.Context(), from(i%3, i%5)); err == nil {
			g.works() // nobody gives way
			in = append(in, g)
		}
		if len(in) > 12 || i%7 == 0 && len(in) > 0 {
			k := i % len(in)
			for range 2 { // the second counts for nothing
				if in[k].leave() {
					t.Fatal("it gave way")
				}
			}
			in = append(in[:k], in[k+1:]...)
		}
		shares := 0
		for _, s := range d.shares {
			shares += s.n
		}
		if len(d.guests) != len(in) || shares != len(in) || d.busy != len(in) {
			t.Fatalf("after %d: %d guests, shares of %d, %d at work, want %d", i, len(d.guests), shares, d.busy, len(in))
		}
		for at, g := range d.guests {
			if g.at != at {
				t.Fatalf("number %d thinks that it is %d", at, g.at)
			}
		}
	}
	for _, g := range in {
		g.leave()
	}
	if len(d.guests) != 0 || len(d.shares) != 0 || d.busy != 0 {
		t.Errorf("%d guests, %d shares, %d at work are left", len(d.guests), len(d.shares), d.busy)
	}
}
