package channel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"sallyport/internal/identity"
)

// recordHandshake is the first byte of TLS (RFC 8446 section 5.1). Everything
// else on the TCP port but a lane's leg is closed without an answer.
const recordHandshake = 0x16

// ListenConfig says who may connect to a port, and as what.
type ListenConfig struct {
	Addr     string // host:port; port 0 chooses one
	Identity *identity.Identity

	// Admit decides beyond the table of protocols and roles; nil admits whom
	// the table admits. It is called in the TLS handshake, more than once for
	// one connection, with a verified peer (Pending on the enrolment
	// protocols, unless we are the pending side). An error refuses.
	Admit func(peer identity.Peer, alpn string) error

	AllowUpstream   bool // diallers may be upstream of us
	AllowDownstream bool // diallers may be downstream of us
	AllowEnroll     bool // parties without a certificate may wait here; without one ourselves: upstreams may come for us

	Carriers []string // CarrierH2, CarrierH3; nil: both
	Limits   Limits
	Log      *slog.Logger

	// Listener replaces the TCP port, for tests in memory; there is no UDP then.
	Listener net.Listener
}

// Listener accepts connections on one port: TCP and UDP of one number.
type Listener struct {
	cfg        ListenConfig
	log        *slog.Logger
	limits     Limits
	tls        *serverTLS
	tcpTLS     *tls.Config
	tcp        net.Listener
	udp        *udpPort // nil without QUIC
	conns      *registry
	door       *door    // of TCP
	handshakes *sources // on QUIC
	pending    *sources
	legs       *legs
	logRate    *rate.Limiter
}

// Listen opens the port. Nobody is answered before Run.
func Listen(cfg ListenConfig) (*Listener, error) {
	if cfg.Identity == nil || cfg.Log == nil {
		return nil, errors.New("listen: identity and log are needed")
	}
	if cfg.Carriers == nil {
		cfg.Carriers = []string{CarrierH2, CarrierH3}
	}
	lim := cfg.Limits.withDefaults()
	l := &Listener{cfg: cfg, log: cfg.Log, limits: lim, conns: newRegistry(cfg.Identity),
		door:       newDoor(lim.Handshakes, lim.HandshakesPerSource),
		handshakes: newSources(lim.Handshakes, lim.HandshakesPerSource),
		pending:    newSources(lim.Pending, lim.PendingPerSource),
		legs:       newLegs(),
		logRate:    rate.NewLimiter(rate.Every(time.Second), 20)}
	l.tls = &serverTLS{id: cfg.Identity, allow: l.allow, admit: l.admit, refused: l.refused}
	l.tcpTLS = l.tls.config(CarrierH2)
	if cfg.Listener != nil {
		l.tcp = cfg.Listener
		return l, nil
	}
	if err := l.open(); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", cfg.Addr, err)
	}
	return l, nil
}

// open binds TCP and UDP of the same number. With port 0 the number that TCP
// gets may be taken on UDP: then another is tried.
func (l *Listener) open() error {
	for try := 0; ; try++ {
		tcp, err := net.Listen("tcp", l.cfg.Addr)
		if err != nil {
			return err
		}
		l.tcp = tcp
		if !slices.Contains(l.cfg.Carriers, CarrierH3) {
			return nil
		}
		host, _, err := net.SplitHostPort(l.cfg.Addr)
		if err == nil {
			_, port, _ := net.SplitHostPort(tcp.Addr().String())
			if l.udp, err = openUDP(net.JoinHostPort(host, port), l); err == nil {
				return nil
			}
		}
		_ = tcp.Close()
		_, port, perr := net.SplitHostPort(l.cfg.Addr)
		if perr != nil || port != "0" || try == 8 {
			return err
		}
	}
}

// Addr is the address of the port.
func (l *Listener) Addr() net.Addr { return l.tcp.Addr() }

// Conns are the live connections.
func (l *Listener) Conns() []*Conn { return l.conns.all() }

// Close frees the port of a Listener that was never run.
func (l *Listener) Close() error {
	err := l.tcp.Close()
	if l.udp != nil {
		l.udp.close()
	}
	return err
}

func (l *Listener) stopAccepting() {
	_ = l.tcp.Close()
	if l.udp != nil {
		_ = l.udp.ln.Close()
	}
}

// Run answers until ctx is done, and calls f for each verified connection in a
// goroutine of its own; when f returns, the connection is closed, unless f had it
// stay ([Conn.Stay]). For an upstream peer f calls Serve. Run returns when every f has,
// and what stayed has ended.
func (l *Listener) Run(ctx context.Context, f func(context.Context, *Conn)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer func() { _ = l.Close() }() // after the last connection: without the UDP socket it could not say that it ends
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	stop := context.AfterFunc(ctx, l.stopAccepting)
	defer stop()
	wg.Go(func() { l.conns.watch(ctx) })
	if l.udp != nil {
		wg.Go(func() {
			if err := l.udp.accept(ctx, func(c *Conn) { l.run(ctx, &wg, c, f) }); err != nil {
				cancel(fmt.Errorf("QUIC on %s: %w", l.Addr(), err))
			}
		})
	}
	var pause time.Duration
	for {
		raw, err := l.tcp.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("accept on %s: %w", l.Addr(), err)
			}
			// Out of file descriptors, most likely: it passes.
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			l.log.Warn("accept failed", "address", l.Addr().String(), "err", err, "retry_in", pause)
			if sleep(ctx, pause) != nil {
				return context.Cause(ctx)
			}
			continue
		}
		pause = 0
		// While it waits for a place, diallers wait in the kernel's queue: a plant that
		// comes back at once is let in as fast as it can be, and nobody has to try again.
		g, err := l.door.enter(ctx, raw)
		if err != nil {
			l.log.Debug("connection turned away", "remote", raw.RemoteAddr().String(), "err", err)
			_ = raw.Close()
			continue
		}
		wg.Go(func() {
			c, err := l.handshake(ctx, raw, g)
			if g.leave() {
				err = errors.Join(errGaveWay, err)
				if c != nil {
					c.Close(errGaveWay)
				}
			}
			if err != nil {
				_ = raw.Close()
				l.refused(raw.RemoteAddr(), err)
				return
			}
			if c != nil && !c.Enrolling() {
				l.door.pass()
			}
			if c != nil { // the handshake has grown this goroutine's stack: another takes over
				wg.Go(func() { l.run(ctx, &wg, c, f) })
			}
		})
	}
}

// refused logs a failed handshake: the other side learns only that it failed.
// Strangers cannot fill the log with it.
func (l *Listener) refused(remote net.Addr, err error) {
	level := slog.LevelDebug
	if !errors.Is(err, io.EOF) && l.logRate.Allow() {
		level = slog.LevelWarn
	}
	l.log.Log(context.Background(), level, "connection refused", "remote", remote.String(), "err", err)
}

// run owns a verified connection until it has ended: itself, or, where f lets the
// connection stay, without a goroutine, as one of wg.
func (l *Listener) run(ctx context.Context, wg *sync.WaitGroup, c *Conn, f func(context.Context, *Conn)) {
	stop := context.AfterFunc(ctx, func() { c.Close(context.Cause(ctx)) })
	l.conns.add(c)
	leave := func() {}
	end := func() {
		c.Close(nil)
		c.tails.Wait()
		leave()
		l.conns.remove(c)
		stop()
	}
	if c.Enrolling() && c.dir == PeerDownstream {
		var ok bool
		if leave, ok = l.pending.enter(c.remote); !ok {
			l.log.Warn("too many pending parties: raise the limit if they are honest", "remote", c.RemoteAddr(), "pending", l.pending.count())
			c.Close(ErrTooManyPeers)
			leave = func() {}
			end()
			return
		}
	}
	f(ctx, c)
	last := c.stayed()
	if last == nil {
		end()
		return
	}
	wg.Add(1)
	c.ended(func() {
		defer wg.Done()
		last()
		end()
	})
}

// handshake makes a Conn of an accepted TCP connection, or none of a lane's
// leg, which it hands to whoever expects that.
func (l *Listener) handshake(ctx context.Context, raw net.Conn, g *guest) (*Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, l.limits.HandshakeTimeout)
	defer cancel()
	if err := raw.SetDeadline(time.Now().Add(l.limits.HandshakeTimeout)); err != nil {
		return nil, err
	}
	unblock := context.AfterFunc(ctx, func() { _ = raw.SetDeadline(time.Unix(1, 0)) })
	defer unblock()
	first, err := peek(raw, 1)
	if err != nil {
		return nil, err
	}
	switch first.head[0] {
	case recordHandshake:
		g.works()
	case lanePreface[0]:
		return nil, l.lane(ctx, raw, first.head, unblock)
	default:
		return nil, fmt.Errorf("first byte is %#02x, not TLS", first.head[0])
	}
	first.exact, first.guest = &records{}, g
	conn := tls.Server(first, l.tcpTLS)
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	cs := conn.ConnectionState()
	p, ok := protocolOf(cs.NegotiatedProtocol, CarrierH2)
	if !ok {
		return nil, ErrNoTransport
	}
	v, err := l.tls.verify(p, cs)
	if err != nil {
		return nil, err
	}
	first.exact, first.guest = nil, nil
	if p.class == classLane {
		return nil, l.sealedLane(ctx, raw, first, conn, v, unblock)
	}
	if !unblock() {
		return nil, ctx.Err()
	}
	if err := raw.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	var established net.Conn = conn
	if v.dir == PeerDownstream { // thousands of them, and they rest
		established = resting(conn, first)
	}
	c, err := connH2(l.cfg.Identity, p, v, false, established, l.limits, l.log)
	if err == nil {
		c.legs = l.legs
	}
	return c, err
}

// connH2 makes a Conn of a TLS connection whose handshake is done.
func connH2(id *identity.Identity, p *protocol, v verified, dialled bool, conn net.Conn, lim Limits, log *slog.Logger) (*Conn, error) {
	c := newConn(id, p, v, dialled, conn.LocalAddr(), conn.RemoteAddr(), lim)
	t, err := newH2(conn, v.dir, c.limits, log, c.Close)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	c.attach(t, v.expires)
	return c, nil
}

// allow refuses the protocols that this port is not for.
func (l *Listener) allow(p *protocol) error {
	ok := p.enroll && l.cfg.AllowEnroll || p.dialler == PeerUpstream && l.cfg.AllowUpstream || p.dialler == PeerDownstream && l.cfg.AllowDownstream
	if ok && !p.enroll {
		ok = slices.Contains(p.answers, l.cfg.Identity.Role())
	}
	if !ok {
		return fmt.Errorf("%s: %w on this port", p.alpn, ErrNotAdmitted)
	}
	return nil
}

func (l *Listener) admit(peer identity.Peer, alpn string) error {
	if l.cfg.Admit == nil {
		return nil
	}
	if err := l.cfg.Admit(peer, alpn); err != nil {
		return fmt.Errorf("%s: %w: %w", peer, ErrNotAdmitted, err)
	}
	return nil
}

// sleep waits for d; it returns the cause when ctx ends first.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
