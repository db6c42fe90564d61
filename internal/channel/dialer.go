package channel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"sync"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// Dialer reaches one address. Its fields must not change after the first use.
type Dialer struct {
	Addr     string    // host:port
	Peer     Direction // where the party at Addr is, seen from us: PeerUpstream, we will serve; PeerDownstream, we will ask
	Identity *identity.Identity
	Expect   *wire.ID // the UUID that must answer; nil: any party with a fitting role

	// Enroll tells, before each attempt, whether to use the enrolment
	// protocol; nil: never. Towards a downstream peer that is for one which is
	// still pending. Towards an upstream peer it is used by itself while we
	// have no valid certificate; beyond that it is for a party that has missed
	// a change of the certificate authority, and may be given a new leaf.
	Enroll func() bool

	// Elsewhere returns a live connection with a party that Run did not make;
	// nil: there is none. Run then does not replace that one by one of its own,
	// which the other side would replace in turn, but for an attempt now and
	// then: the address may lead to another party by now. nil: never.
	Elsewhere func(wire.ID) *Conn

	Carrier string // CarrierAuto (also ""), CarrierH2, CarrierH3
	Class   string // ClassAdmin (also ""), ClassSession, ClassBulk
	Backoff Backoff
	Limits  Limits
	Log     *slog.Logger

	Proxy       func(target *url.URL) (*url.URL, error)                              // nil: from HTTPS_PROXY and NO_PROXY
	DialContext func(ctx context.Context, network, address string) (net.Conn, error) // nil: the network; set: never QUIC
	OnState     func(State)                                                          // called by Run at every change; must not block

	// NoConfirm lets Dial return before the other side has verified us, for
	// tests that serve its end later.
	NoConfirm bool

	once sync.Once
	tls  *clientTLS
	lim  Limits
}

// State is what Run knows of its address.
type State struct {
	Conn     *Conn     // nil while not connected
	Instead  *Conn     // by which the party is there meanwhile: see Dialer.Elsewhere
	Err      error     // of the last attempt or connection; nil while all is well
	Failures int       // in a row
	Next     time.Time // of the next attempt; zero if none is planned
	Since    time.Time // when Conn came, or went
}

// Connected tells whether a live connection is there.
func (s State) Connected() bool { return s.Conn != nil }

func (d *Dialer) init() error {
	if d.Identity == nil || d.Log == nil {
		return errors.New("dial: identity and log are needed")
	}
	if d.Peer != PeerUpstream && d.Peer != PeerDownstream {
		return fmt.Errorf("dial %s: %s is not a direction", d.Addr, d.Peer)
	}
	switch d.Carrier {
	case "", CarrierAuto, CarrierH2, CarrierH3:
	default:
		return fmt.Errorf("dial %s: %w: %q", d.Addr, ErrNoTransport, d.Carrier)
	}
	d.once.Do(func() {
		d.tls = &clientTLS{id: d.Identity, expect: d.Expect}
		d.lim = d.Limits.withDefaults()
	})
	return nil
}

// withClass is a Dialer to the same address for connections of a class.
func (d *Dialer) withClass(class string) *Dialer {
	return &Dialer{Addr: d.Addr, Peer: d.Peer, Identity: d.Identity, Expect: d.Expect, Enroll: d.Enroll, Carrier: d.Carrier, Class: class,
		Backoff: d.Backoff, Limits: d.Limits, Log: d.Log, Proxy: d.Proxy, DialContext: d.DialContext}
}

func (d *Dialer) enrolling() bool {
	if d.Peer == PeerUpstream && waiting(d.Identity) {
		return true
	}
	return d.Enroll != nil && d.Enroll()
}

// Dial makes one attempt, at most Limits.HandshakeTimeout long. It succeeds
// only after the other side has verified us too.
func (d *Dialer) Dial(ctx context.Context) (*Conn, error) {
	if err := d.init(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, d.lim.HandshakeTimeout)
	defer cancel()
	c, err := d.dialRace(ctx, d.enrolling()) // one answer for all carriers of an attempt
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", d.Addr, err)
	}
	if d.Class != "" {
		c.SetClass(d.Class)
	}
	return c, nil
}

// dialH2 makes one attempt over TCP.
func (d *Dialer) dialH2(ctx context.Context, enroll bool) (*Conn, error) {
	p, err := protocolFor(d.Peer, CarrierH2, d.Class, enroll)
	if err != nil {
		return nil, err
	}
	conf, err := d.tls.config(p, d.Peer)
	if err != nil {
		return nil, err
	}
	raw, direct, err := d.dialTCP(ctx)
	if err != nil {
		return nil, err
	}
	c, err := d.handshake(ctx, raw, p, conf)
	if err != nil {
		_ = raw.Close()
		if !direct { // what answered may be the proxy itself: a page of its own, or a certificate of its own
			err = fmt.Errorf("through the HTTP proxy: %w", err)
		}
		return nil, err
	}
	c.dialler = d
	if direct {
		c.dialLeg = d.dialFunc()
	}
	return c, nil
}

func (d *Dialer) handshake(ctx context.Context, raw net.Conn, p *protocol, conf *tls.Config) (*Conn, error) {
	unblock := context.AfterFunc(ctx, func() { _ = raw.SetDeadline(time.Unix(1, 0)) })
	defer unblock()
	conn := tls.Client(raw, conf)
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, handshakeError(ctx, err)
	}
	v, err := d.tls.verify(p, d.Peer, conn.ConnectionState())
	if err != nil {
		return nil, err
	}
	// With TLS 1.3 the dialler is done before the other side has looked at
	// its certificate (RFC 8446 section 2): whether it was accepted shows in
	// the first byte, which both the client and the server of HTTP/2 send
	// unasked.
	var established net.Conn = conn
	if !d.NoConfirm {
		if established, err = peek(conn, 64); err != nil {
			return nil, handshakeError(ctx, err)
		}
	}
	if !unblock() {
		return nil, context.Cause(ctx)
	}
	return connH2(d.Identity, p, v, true, established, d.lim, d.Log)
}

// handshakeError says what a failed handshake probably means.
func handshakeError(ctx context.Context, err error) error {
	var op *net.OpError
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("handshake: %w", context.Cause(ctx))
	case errors.As(err, &op) && op.Op == "remote error": // crypto/tls's name for an alert
		return fmt.Errorf("the other side refuses us (its log says why): %w", err)
	}
	return fmt.Errorf("handshake: %w", err)
}
