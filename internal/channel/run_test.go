package channel_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quic-go/quic-go"

	"sallyport/internal/channel"
	"sallyport/internal/channel/channeltest"
	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

// states collects what a Dialer reports.
type states struct {
	mu     sync.Mutex
	all    []channel.State
	change chan struct{}
}

func newStates() *states { return &states{change: make(chan struct{})} }

func (s *states) add(st channel.State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = append(s.all, st)
	close(s.change)
	s.change = make(chan struct{})
}

// wait returns the first state, from the last one on, that fits.
func (s *states) wait(t *testing.T, what string, fits func(channel.State) bool) channel.State {
	t.Helper()
	deadline := time.After(40 * time.Second)
	for {
		s.mu.Lock()
		var last channel.State
		if n := len(s.all); n > 0 {
			last = s.all[n-1]
		}
		change := s.change
		s.mu.Unlock()
		if fits(last) {
			return last
		}
		select {
		case <-change:
		case <-deadline:
			t.Fatalf("never %s; last state %+v", what, last)
		}
	}
}

func (s *states) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.all)
}

// run keeps d connected until stop, which returns what Run returned.
func run(t *testing.T, d *channel.Dialer, f func(context.Context, *channel.Conn)) (s *states, stop func() error) {
	t.Helper()
	s = newStates()
	d.OnState = s.add
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- d.Run(ctx, f) }()
	stop = sync.OnceValue(func() error {
		cancel()
		return <-result
	})
	t.Cleanup(func() { _ = stop() })
	return s, stop
}

func untilDone(_ context.Context, c *channel.Conn) { <-c.Done() }

func TestAnHourOfRefusedDials(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		network := channeltest.NewNetwork()
		network.Cut(true)
		start := time.Now()
		d := &channel.Dialer{Addr: "memory:443", Peer: channel.PeerDownstream, Identity: ca.Party(t, wire.RoleGateway),
			DialContext: network.DialContext, Log: channeltest.Log(t)}
		s, stop := run(t, d, untilDone)
		time.Sleep(time.Hour)
		synctest.Wait()
		n := s.count()
		// Waits lie between 30 s and 60 s once they have grown.
		if n < 60 || n > 140 {
			t.Errorf("%d attempts in an hour", n)
		}
		s.mu.Lock()
		first, last := s.all[0], s.all[n-1]
		s.mu.Unlock()
		if first.Connected() || first.Failures != 1 || first.Err == nil || first.Next.Sub(start) > 2*time.Second {
			t.Errorf("first state %+v", first)
		}
		if last.Failures != n || time.Until(last.Next) > time.Minute {
			t.Errorf("last state %+v", last)
		}
		if err := stop(); !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
	})
}

// bubble is a listener and a dialler in memory, for a synctest bubble.
func bubble(t *testing.T, up, down *identity.Identity, ordinary bool) (*channeltest.Network, *channel.Listener, *channel.Dialer) {
	t.Helper()
	network := channeltest.NewNetwork()
	dialler, listener, dir := up, down, channel.PeerDownstream
	if !ordinary {
		dialler, listener, dir = down, up, channel.PeerUpstream
	}
	l, err := channel.Listen(channel.ListenConfig{Identity: listener, Listener: network, Log: channeltest.Log(t),
		AllowUpstream: true, AllowDownstream: true, AllowEnroll: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = l.Run(ctx, serveOrWait)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	return network, l, &channel.Dialer{Addr: "memory:443", Peer: dir, Identity: dialler, DialContext: network.DialContext, Log: channeltest.Log(t)}
}

func serveOrWait(ctx context.Context, c *channel.Conn) {
	if c.Direction() == channel.PeerUpstream {
		_ = c.Serve(ctx, ok)
		return
	}
	<-c.Done()
}

func TestDeadPathIsNoticedWithin30Seconds(t *testing.T) {
	for name, ordinary := range map[string]bool{"ordinary": true, "reversed": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca := identitytest.NewCA(t)
				network, l, d := bubble(t, ca.Party(t, wire.RoleGateway), ca.Party(t, wire.RoleRCP), ordinary)
				s, _ := run(t, d, serveOrWait)
				first := s.wait(t, "connected", channel.State.Connected)
				time.Sleep(10 * time.Minute) // an idle channel stays
				synctest.Wait()
				if err := first.Conn.Err(); err != nil {
					t.Fatalf("an idle channel died: %v", err)
				}
				other := l.Conns()[0]
				network.Blackhole()
				network.Cut(true)
				cut := time.Now()
				<-first.Conn.Done()
				here := time.Since(cut)
				<-other.Done()
				if there := time.Since(cut); here > 30*time.Second || there > 30*time.Second {
					t.Errorf("noticed after %v by the dialler, %v by the listener", here, there)
				}
				s.wait(t, "lost", func(st channel.State) bool { return !st.Connected() && st.Err != nil })
				network.Cut(false)
				back := s.wait(t, "back", func(st channel.State) bool { return st.Connected() && st.Conn != first.Conn })
				if back.Failures != 0 && back.Err != nil {
					t.Errorf("state is %+v", back)
				}
			})
		})
	}
}

func TestRenewalMakesBeforeItBreaks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		gateway, rcp := ca.Party(t, wire.RoleGateway), ca.Party(t, wire.RoleRCP)
		_, _, d := bubble(t, gateway, rcp, false)
		s, _ := run(t, d, serveOrWait)
		first := s.wait(t, "connected", channel.State.Connected).Conn
		time.Sleep(time.Minute)
		ca.Certify(t, rcp, identitytest.NotAfter(time.Now().Add(72*time.Hour)))
		second := s.wait(t, "renewed", func(st channel.State) bool { return st.Connected() && st.Conn != first }).Conn
		if err := first.Err(); err != nil && !errors.Is(err, channel.ErrReplaced) {
			t.Errorf("the old channel was broken first: %v", err)
		}
		<-first.Done()
		if !errors.Is(first.Err(), channel.ErrReplaced) {
			t.Errorf("the old channel ended with %v", first.Err())
		}
		// A leaf that is about to end is left behind too, whoever's it is.
		time.Sleep(70 * time.Hour)
		synctest.Wait()
		if second.Err() != nil {
			t.Errorf("the second channel ended early: %v", second.Err())
		}
		<-second.Done()
		if !errors.Is(second.Err(), channel.ErrReplaced) {
			t.Errorf("the second channel ended with %v", second.Err())
		}
	})
}

// TestClockThatJumps: a connection ends when one of its leaves is not valid by the
// clock, though no timer came there, at either end; the dialler comes again.
func TestClockThatJumps(t *testing.T) {
	for name, jump := range map[string]func(*channel.Conn){"ahead": channel.Sleep, "back": channel.SetBack} {
		for _, listener := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, listener=%v", name, listener), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					ca := identitytest.NewCA(t)
					_, l, d := bubble(t, ca.Party(t, wire.RoleGateway), ca.Party(t, wire.RoleRCP), false)
					s, _ := run(t, d, serveOrWait)
					first := s.wait(t, "connected", channel.State.Connected).Conn
					time.Sleep(time.Minute)
					end := first
					if listener {
						end = l.Conns()[0]
					}
					jump(end)
					time.Sleep(2 * time.Minute)
					if !errors.Is(end.Err(), channel.ErrExpired) || first.Err() == nil {
						t.Fatalf("the channel ended with %v", end.Err())
					}
					s.wait(t, "there again", func(st channel.State) bool { return st.Connected() && st.Conn != first })
				})
			})
		}
	}
}

func TestGrantedPartyDialsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		node := ca.Pending(t, wire.RoleNode)
		_, l, d := bubble(t, ca.Party(t, wire.RoleGateway), node, false)
		s, _ := run(t, d, serveOrWait)
		first := s.wait(t, "waiting", channel.State.Connected).Conn
		synctest.Wait() // the listener counts it after it has answered
		if !first.Enrolling() || l.PendingCount() != 1 {
			t.Errorf("enrolling=%v, %d wait", first.Enrolling(), l.PendingCount())
		}
		ca.Certify(t, node)
		second := s.wait(t, "certified", func(st channel.State) bool { return st.Connected() && st.Conn != first }).Conn
		if second.Enrolling() {
			t.Error("still enrolling")
		}
		<-first.Done()
		synctest.Wait()
		if l.PendingCount() != 0 {
			t.Errorf("%d still wait", l.PendingCount())
		}
	})
}

// The same when the pending party is the one that listens.
func TestGrantedListenerIsDialledAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		rcp := ca.Pending(t, wire.RoleRCP)
		var granted atomic.Bool
		_, _, d := bubble(t, ca.Party(t, wire.RoleGateway), rcp, true)
		d.Enroll = func() bool { return !granted.Load() }
		s, _ := run(t, d, serveOrWait)
		first := s.wait(t, "waiting", channel.State.Connected).Conn
		if !first.Enrolling() || !first.Peer().Pending {
			t.Errorf("peer is %s", first.Peer())
		}
		granted.Store(true)
		ca.Certify(t, rcp)
		second := s.wait(t, "certified", func(st channel.State) bool { return st.Connected() && st.Conn != first }).Conn
		if second.Enrolling() || second.Peer().Party.ID != rcp.ID() {
			t.Errorf("peer is %s", second.Peer())
		}
	})
}

func TestDrainedDiallerComesAgainFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		_, l, d := bubble(t, ca.Party(t, wire.RoleGateway), ca.Party(t, wire.RoleNode), false)
		s, _ := run(t, d, serveOrWait)
		first := s.wait(t, "connected", channel.State.Connected).Conn
		time.Sleep(time.Minute)
		if err := l.Conns()[0].Drain(t.Context(), wire.Drain{Deadline: time.Minute}); err != nil {
			t.Error(err)
		}
		second := s.wait(t, "replaced", func(st channel.State) bool { return st.Connected() && st.Conn != first })
		if second.Err != nil {
			t.Errorf("state is %+v", second)
		}
		<-first.Done()
	})
}

// An upstream that drains whatever comes is not dialled in a loop, by a party
// without a certificate either: nothing binds an RCP to wait for its grant.
func TestPeerThatDrainsWhateverComes(t *testing.T) {
	for _, pending := range []bool{false, true} {
		t.Run(fmt.Sprintf("pending=%v", pending), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca := identitytest.NewCA(t)
				node := ca.Pending(t, wire.RoleNode)
				if !pending {
					ca.Certify(t, node)
				}
				network := channeltest.NewNetwork()
				l, err := channel.Listen(channel.ListenConfig{Identity: ca.Party(t, wire.RoleRCP), Listener: network, Log: channeltest.Log(t),
					AllowDownstream: true, AllowEnroll: true})
				if err != nil {
					t.Fatal(err)
				}
				var came atomic.Int64
				ctx, cancel := context.WithCancel(context.Background())
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					_ = l.Run(ctx, func(ctx context.Context, c *channel.Conn) {
						if came.Add(1) > 1000 {
							return // time stands still while they come without a pause
						}
						_ = c.Drain(ctx, wire.Drain{Deadline: time.Minute})
					})
				}()
				defer func() {
					cancel()
					<-ended
				}()
				_, stop := run(t, &channel.Dialer{Addr: "memory:443", Peer: channel.PeerUpstream, Identity: node,
					DialContext: network.DialContext, Log: channeltest.Log(t)}, serveOrWait)
				time.Sleep(time.Hour)
				_ = stop()
				if n := came.Load(); n < 60 || n > 400 {
					t.Errorf("%d channels in an hour", n)
				}
			})
		})
	}
}

// TestTwoAddressesOfOneParty: an upstream keeps the newest channel of a party and
// drains the others. Two diallers that reach the same one do not replace each
// other's channels for ever, and the second is there when the first has lost its.
func TestTwoAddressesOfOneParty(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		node := ca.Party(t, wire.RoleNode)
		network := channeltest.NewNetwork()
		l, err := channel.Listen(channel.ListenConfig{Identity: ca.Party(t, wire.RoleRCP), Listener: network, Log: channeltest.Log(t), AllowDownstream: true})
		if err != nil {
			t.Fatal(err)
		}
		var came atomic.Int64
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_ = l.Run(ctx, func(ctx context.Context, c *channel.Conn) {
				came.Add(1)
				time.Sleep(time.Millisecond) // the way of a drain: who dialled knows of the new channel by then
				for _, old := range l.Conns() {
					if old != c {
						go func() { _ = old.Drain(ctx, wire.Drain{Deadline: 30 * time.Second}) }()
					}
				}
				<-c.Done()
			})
		}()
		defer func() {
			cancel()
			<-ended
		}()
		var mu sync.Mutex
		live := map[*channel.Conn]int{}
		var cut [2]atomic.Bool
		for i := range cut {
			dial := func(ctx context.Context, carrier, addr string) (net.Conn, error) {
				if cut[i].Load() {
					return nil, errors.New("this address is cut off")
				}
				return network.DialContext(ctx, carrier, addr)
			}
			run(t, &channel.Dialer{Addr: "memory:443", Peer: channel.PeerUpstream, Identity: node, DialContext: dial, Log: channeltest.Log(t),
				Elsewhere: func(id wire.ID) *channel.Conn {
					mu.Lock()
					defer mu.Unlock()
					for c, by := range live {
						if by != i && c.Peer().Party.ID == id && c.Err() == nil && !c.Draining() {
							return c
						}
					}
					return nil
				}}, func(ctx context.Context, c *channel.Conn) {
				mu.Lock()
				live[c] = i
				mu.Unlock()
				serveOrWait(ctx, c)
				mu.Lock()
				delete(live, c)
				mu.Unlock()
			})
		}
		time.Sleep(time.Hour)
		if n := came.Load(); n < 3 || n > 30 {
			t.Errorf("%d channels in an hour", n)
		}
		// The one whose channel ends cannot come back: only the other can.
		before := came.Load()
		var last *channel.Conn
		mu.Lock()
		for c, by := range live {
			if c.Err() == nil && !c.Draining() {
				last = c
				cut[by].Store(true)
			}
		}
		mu.Unlock()
		if last == nil {
			t.Fatal("nobody is there")
		}
		last.Close(nil)
		time.Sleep(5 * time.Second)
		if came.Load() == before || len(l.Conns()) == 0 {
			t.Error("nobody came in the place of the channel that ended")
		}
	})
}

func TestFallbackAndReturn(t *testing.T) {
	for name, ordinary := range map[string]bool{"ordinary": true, "reversed": false} {
		t.Run(name, func(t *testing.T) {
			p := newPlant(t, variant{"h3", ordinary}, ok)
			p.limits = channel.Limits{KeepAlive: 300 * time.Millisecond}
			p.listen(t)
			r := newRelay(t, p.listener.Addr().String())
			d := p.dialler(t)
			d.Addr, d.Carrier = r.addr, channel.CarrierAuto
			d.Backoff = channel.Backoff{First: 50 * time.Millisecond, Min: 50 * time.Millisecond, Max: 200 * time.Millisecond, Probe: 500 * time.Millisecond}
			s, _ := run(t, d, p.serve)
			on := func(carrier string) func(channel.State) bool {
				return func(st channel.State) bool { return st.Connected() && st.Conn.Carrier() == carrier }
			}
			s.wait(t, "on QUIC", on("h3"))
			r.noUDP.Store(true)
			s.wait(t, "on HTTP/2", on("h2"))
			r.noUDP.Store(false)
			last := s.wait(t, "back on QUIC", on("h3"))
			if n := len(p.listener.Conns()); n > 2 {
				t.Errorf("%d channels are open", n)
			}
			if last.Err != nil {
				t.Errorf("state is %+v", last)
			}
		})
	}
}

// Whoever listens and was killed and started again says so to those who still
// speak to the one before: nobody waits for its silence.
func TestQUICListenerThatWasKilled(t *testing.T) {
	for name, ordinary := range map[string]bool{"ordinary": true, "reversed": false} {
		t.Run(name, func(t *testing.T) {
			p := newPlant(t, variant{"h3", ordinary}, ok)
			p.limits = channel.Limits{KeepAlive: time.Second}
			p.listen(t)
			again := &plant{variant: p.variant, ca: p.ca, up: p.up, down: p.down, handler: p.handler, limits: p.limits}
			again.listen(t)
			r := newRelay(t, p.listener.Addr().String())
			r.mtu.Store(1300) // quic-go's search for the path's MTU sends larger ones, which would be answered with a reset too
			d := p.dialler(t)
			d.Addr, d.Carrier = r.addr, channel.CarrierH3
			s, _ := run(t, d, p.serve)
			first := s.wait(t, "connected", channel.State.Connected).Conn
			r.move(again.listener.Addr().String())
			s.wait(t, "connected again", func(st channel.State) bool { return st.Connected() && st.Conn != first })
			if err := first.Err(); !errors.Is(err, channel.ErrPeerGone) || !errors.As(err, new(*quic.StatelessResetError)) {
				t.Errorf("the first one ended because of: %v", err)
			}
		})
	}
}

func TestForcedCarrier(t *testing.T) {
	p := newPlant(t, variant{"h3", true}, ok)
	p.listen(t)
	r := newRelay(t, p.listener.Addr().String())
	d := p.dialler(t)
	d.Addr, d.Carrier = r.addr, channel.CarrierH2
	c, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c.Close(nil)
	if c.Carrier() != "h2" || r.udpIn.Load() != 0 {
		t.Errorf("on %s, %d datagrams", c.Carrier(), r.udpIn.Load())
	}
	r.noTCP.Store(true)
	d = p.dialler(t)
	d.Addr = r.addr
	if c, err = d.Dial(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.Close(nil)
	if c.Carrier() != "h3" {
		t.Errorf("on %s", c.Carrier())
	}
	d = p.dialler(t)
	d.Carrier = "pigeon"
	if _, err := d.Dial(t.Context()); !errors.Is(err, channel.ErrNoTransport) {
		t.Errorf("got %v", err)
	}
}

func TestOneDeadAddressDelaysNoOther(t *testing.T) {
	p := newPlant(t, variant{"h2", true}, ok)
	p.listen(t)
	r := newRelay(t, p.listener.Addr().String())
	r.noTCP.Store(true)
	dead := p.dialler(t)
	dead.Addr = r.addr
	run(t, dead, untilDone)
	live := p.dialler(t)
	live.Backoff.First = time.Millisecond
	s, _ := run(t, live, untilDone)
	start := time.Now()
	s.wait(t, "connected", channel.State.Connected)
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("connected after %v", d)
	}
}

var _ http.Handler = ok
