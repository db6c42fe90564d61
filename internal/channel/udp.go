package channel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"

	"github.com/quic-go/quic-go"
)

// udpPort is the UDP half of a Listener.
type udpPort struct {
	l    *Listener
	conn net.PacketConn
	tr   *quic.Transport
	ln   *quic.Listener
}

type leaveKey struct{}

// openUDP binds addr. Only a listening transport has the two keys: a dialling
// one must never answer a packet that it does not know.
func openUDP(addr string, l *Listener) (*udpPort, error) {
	pc, err := net.ListenPacket("udp", addr)
	if err != nil {
		return nil, err
	}
	u := &udpPort{l: l, conn: pc}
	reset, token, err := quicKeys(l.cfg.Identity)
	if err != nil {
		_ = pc.Close()
		return nil, err
	}
	u.tr = &quic.Transport{
		Conn:              pc,
		StatelessResetKey: reset,
		TokenGeneratorKey: token,
		// Our diallers speak version 1; strangers get no answer.
		DisableVersionNegotiationPackets: true,
		// Under load a dialler must first show that its address is its own
		// (Retry, RFC 9000 section 8.1.2): else one packet, from anywhere, would take
		// a place of whatever address it names.
		VerifySourceAddress: func(addr net.Addr) bool { return l.handshakes.busy(addr) },
		ConnContext: func(ctx context.Context, info *quic.ClientInfo) (context.Context, error) {
			leave, ok := l.handshakes.enter(info.RemoteAddr)
			if !ok {
				return nil, errors.New("too many handshakes in flight")
			}
			context.AfterFunc(ctx, leave)
			return context.WithValue(ctx, leaveKey{}, leave), nil
		},
	}
	if u.ln, err = u.tr.Listen(l.tls.config(CarrierH3), quicConfig(l.limits)); err != nil {
		_ = u.tr.Close()
		_ = pc.Close()
		return nil, err
	}
	return u, nil
}

func (u *udpPort) close() {
	_ = u.ln.Close()
	_ = u.tr.Close()
	_ = u.conn.Close()
}

// accept calls run for each verified connection in a goroutine of its own,
// until the port is closed; it returns when all have ended.
func (u *udpPort) accept(ctx context.Context, run func(*Conn)) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		qc, err := u.ln.Accept(ctx)
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, quic.ErrServerClosed) {
				return nil
			}
			return err
		}
		wg.Go(func() {
			c, err := u.newConn(qc)
			if leave, ok := qc.Context().Value(leaveKey{}).(func()); ok {
				leave()
			}
			if err != nil {
				_ = qc.CloseWithError(0, "")
				u.l.refused(qc.RemoteAddr(), err)
				return
			}
			run(c)
		})
	}
}

// newConn makes a Conn of an accepted QUIC connection.
func (u *udpPort) newConn(qc *quic.Conn) (*Conn, error) {
	cs := qc.ConnectionState().TLS
	p, ok := protocolOf(cs.NegotiatedProtocol, CarrierH3)
	if !ok {
		return nil, ErrNoTransport
	}
	v, err := u.l.tls.verify(p, cs)
	if err != nil {
		return nil, err
	}
	c := newConn(u.l.cfg.Identity, p, v, false, qc.LocalAddr(), qc.RemoteAddr(), u.l.limits)
	c.legs = u.l.legs
	t := newH3(qc, v.dir, c.limits, u.l.log)
	c.attach(t, v.expires)
	t.watch(c.Close)
	return c, nil
}

// dialH3 makes one attempt over QUIC. A host with several addresses is tried
// at its first IPv4 and its first IPv6 address at once.
func (d *Dialer) dialH3(ctx context.Context, enroll bool) (*Conn, error) {
	host, port, err := net.SplitHostPort(d.Addr)
	if err != nil {
		return nil, err
	}
	number, err := net.DefaultResolver.LookupPort(ctx, "udp", port)
	if err != nil {
		return nil, err
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	var attempts []attempt
	for _, family := range []func(netip.Addr) bool{netip.Addr.Is4, netip.Addr.Is6} {
		i := slices.IndexFunc(ips, func(ip netip.Addr) bool { return family(ip.Unmap()) })
		if i >= 0 {
			to := netip.AddrPortFrom(ips[i].Unmap(), uint16(number))
			attempts = append(attempts, attempt{dial: func(ctx context.Context) (*Conn, error) { return d.dialUDP(ctx, to, enroll) }})
		}
	}
	return firstOf(ctx, attempts)
}

func (d *Dialer) dialUDP(ctx context.Context, to netip.AddrPort, enroll bool) (*Conn, error) {
	p, err := protocolFor(d.Peer, CarrierH3, d.Class, enroll)
	if err != nil {
		return nil, err
	}
	conf, err := d.tls.config(p, d.Peer)
	if err != nil {
		return nil, err
	}
	network := "udp4"
	if to.Addr().Is6() {
		network = "udp6"
	}
	pc, err := net.ListenUDP(network, nil)
	if err != nil {
		return nil, err
	}
	tr := &quic.Transport{Conn: pc}
	shut := sync.OnceFunc(func() {
		_ = tr.Close()
		_ = pc.Close()
	})
	qc, err := tr.Dial(ctx, net.UDPAddrFromAddrPort(to), conf, quicConfig(d.lim))
	if err != nil {
		shut()
		return nil, quicDialError(ctx, err)
	}
	v, err := d.tls.verify(p, d.Peer, qc.ConnectionState().TLS)
	if err != nil {
		_ = qc.CloseWithError(0, "")
		shut()
		return nil, err
	}
	c := newConn(d.Identity, p, v, true, qc.LocalAddr(), qc.RemoteAddr(), d.lim)
	c.dialLeg, c.dialler = d.dialFunc(), d
	t := newH3(qc, v.dir, c.limits, d.Log)
	if !d.NoConfirm {
		if err := t.confirm(ctx); err != nil {
			_ = qc.CloseWithError(0, "")
			shut()
			return nil, quicDialError(ctx, err)
		}
	}
	c.attach(t, v.expires)
	t.keepAlive()
	t.watch(func(err error) {
		c.Close(err)
		shut()
	})
	return c, nil
}

// quicDialError says what a failed handshake probably means.
func quicDialError(ctx context.Context, err error) error {
	var transport *quic.TransportError
	switch {
	case errors.As(err, &transport) && transport.Remote && transport.ErrorCode.IsCryptoError():
		return fmt.Errorf("the other side refuses us (its log says why): %w", err)
	case ctx.Err() != nil:
		return fmt.Errorf("QUIC handshake: %w", context.Cause(ctx))
	}
	return fmt.Errorf("QUIC handshake: %w", err)
}
