package channel

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// waiting tells whether a party has to enrol before it can do anything else.
func waiting(id *identity.Identity) bool {
	_, ok := id.Party()
	return !ok || id.OutOfTime()
}

// verified is what a handshake proved.
type verified struct {
	peer    identity.Peer
	dir     Direction
	begins  time.Time
	expires time.Time
	resumed bool
}

// certified is what a handshake between two leaves proved: it holds while both are
// valid.
func certified(id *identity.Identity, peer identity.Peer, dir Direction, cs tls.ConnectionState) verified {
	return verified{
		peer: peer, dir: dir, resumed: cs.DidResume,
		begins: later(peer.Leaf.NotBefore, id.NotBefore()), expires: sooner(peer.Leaf.NotAfter, id.NotAfter()),
	}
}

// checkNegotiated refuses a connection without the application protocol that
// its row of the table is about: crypto/tls accepts an empty one.
func checkNegotiated(cs tls.ConnectionState, p *protocol) error {
	if cs.Version < tls.VersionTLS13 || cs.NegotiatedProtocol != p.alpn {
		return fmt.Errorf("negotiated %q, want %q: is this a Sallyport port?", wire.Quotable(cs.NegotiatedProtocol), p.alpn)
	}
	return nil
}

// checkPeer verifies a certified peer whose role must be one of roles.
func checkPeer(id *identity.Identity, cs tls.ConnectionState, roles []wire.Role) (identity.Peer, error) {
	peer, err := id.Verify(cs)
	if err != nil {
		return peer, err
	}
	if !slices.Contains(roles, peer.Party.Role) {
		return peer, fmt.Errorf("%s: %w: want %v", peer.Party, identity.ErrWrongRole, roles)
	}
	if peer.Party.ID == id.ID() {
		return peer, fmt.Errorf("%s: %w: it is ourselves", peer.Party, ErrWrongPeer)
	}
	return peer, nil
}

// sooner returns the earlier of two moments, where zero means never.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// serverTLS makes the configurations of a listener. Each ALPN has one, which is
// kept for as long as the trusted roots and our key are the same: a session that
// is resumed with a ticket is the old key's.
type serverTLS struct {
	id    *identity.Identity
	allow func(*protocol) error
	admit func(identity.Peer, string) error
	// refused hears of what fails inside of a QUIC handshake, where the
	// listener does not see it.
	refused func(remote net.Addr, err error)

	mu      sync.Mutex
	configs map[*protocol]*tls.Config
	roots   *x509.CertPool // of the configs
	key     wire.KeyHash   // likewise
}

// config is the configuration of a port's carrier, to be made once: it holds
// the ticket keys, in memory only. The ALPN that the dialler offers chooses the
// configuration that is used for all else.
func (s *serverTLS) config(carrier string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			c, err := s.configFor(hello, carrier)
			switch {
			case carrier != CarrierH3:
				if peeked, ok := hello.Conn.(*peekedConn); ok && err == nil {
					peeked.guest.saidHello()
				}
			case err != nil:
				s.refused(hello.Conn.RemoteAddr(), err)
			default: // of which quic-go takes a copy anyway
				c = c.Clone()
				verify, remote := c.VerifyConnection, hello.Conn.RemoteAddr()
				c.VerifyConnection = func(cs tls.ConnectionState) error {
					err := verify(cs)
					if err != nil {
						s.refused(remote, err)
					}
					return err
				}
			}
			return c, err
		},
	}
}

// configFor is the configuration that belongs to what the dialler offers.
func (s *serverTLS) configFor(hello *tls.ClientHelloInfo, carrier string) (*tls.Config, error) {
	if len(hello.SupportedProtos) != 1 {
		return nil, fmt.Errorf("dialler offers %d application protocols, want exactly one", len(hello.SupportedProtos))
	}
	p, ok := protocolOf(hello.SupportedProtos[0], carrier)
	if !ok {
		return nil, fmt.Errorf("unknown application protocol %q", wire.Quotable(hello.SupportedProtos[0]))
	}
	if err := s.allow(p); err != nil {
		return nil, err
	}
	if p.enroll {
		return s.enrollConfig(p)
	}
	return s.peerConfig(p)
}

// peerConfig is the configuration for certified diallers.
func (s *serverTLS) peerConfig(p *protocol) (*tls.Config, error) {
	if waiting(s.id) {
		return nil, fmt.Errorf("%s refused: %w", p.alpn, identity.ErrNoCertificate)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if roots, key := s.id.Roots(), s.id.KeyHash(); s.roots == nil || !s.roots.Equal(roots) || s.key != key {
		s.roots, s.key, s.configs = roots, key, map[*protocol]*tls.Config{}
	}
	c := s.configs[p]
	if c == nil {
		c = &tls.Config{
			MinVersion:     tls.VersionTLS13,
			NextProtos:     []string{p.alpn},
			ClientAuth:     tls.RequireAndVerifyClientCert,
			ClientCAs:      s.roots,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.id.BriefCertificate() },
			// quic-go works on a copy of this, whose ticket keys nobody else
			// would have; and QUIC tickets are what 0-RTT begins with.
			SessionTicketsDisabled: p.carrier == CarrierH3,
			// Batch makes large writes of a lane's records.
			DynamicRecordSizingDisabled: p.class == classLane,
			VerifyConnection: func(cs tls.ConnectionState) error {
				_, err := s.verify(p, cs)
				return err
			},
		}
		if !c.SessionTicketsDisabled {
			secret, err := ticketSecret(s.id)
			if err != nil {
				return nil, err
			}
			t := &tickets{id: s.id, secret: secret}
			c.WrapSession, c.UnwrapSession = t.wrap, t.unwrap
		}
		s.configs[p] = c
	}
	return c, nil
}

// verify checks a dialler: in VerifyConnection, and once more to learn who it
// is when the handshake is done.
func (s *serverTLS) verify(p *protocol, cs tls.ConnectionState) (verified, error) {
	if err := checkNegotiated(cs, p); err != nil {
		return verified{}, err
	}
	if p.enroll {
		return s.verifyEnroll(p, cs)
	}
	peer, err := checkPeer(s.id, cs, p.accepts)
	if err != nil {
		return verified{}, err
	}
	if err := s.admit(peer, p.alpn); err != nil {
		return verified{}, err
	}
	return certified(s.id, peer, p.dialler, cs), nil
}

// clientTLS makes the configurations of a dialler.
type clientTLS struct {
	id     *identity.Identity
	expect *wire.ID

	mu      sync.Mutex
	tickets tls.ClientSessionCache // of leaf: a resumed session is that leaf's
	leaf    *tls.Certificate
}

// config is the configuration for one attempt with protocol p, towards a peer
// in direction dir.
func (c *clientTLS) config(p *protocol, dir Direction) (*tls.Config, error) {
	if p.enroll {
		return c.enrollConfig(p, dir)
	}
	cert, err := c.id.BriefCertificate()
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.leaf != cert {
		c.leaf, c.tickets = cert, tls.NewLRUClientSessionCache(4)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{p.alpn},
		// Who answers is not known, only that it is one of us; the address is
		// never compared with the certificate (NAT, balancers).
		ServerName:           c.id.TrustDomain(),
		RootCAs:              c.id.Roots(),
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil },
		ClientSessionCache:   c.tickets,
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := c.verify(p, dir, cs)
			return err
		},
	}, nil
}

// verify checks the party that answered.
func (c *clientTLS) verify(p *protocol, dir Direction, cs tls.ConnectionState) (verified, error) {
	if err := checkNegotiated(cs, p); err != nil {
		return verified{}, err
	}
	if p.enroll {
		return c.verifyEnroll(dir, cs)
	}
	peer, err := checkPeer(c.id, cs, p.answers)
	if err != nil {
		return verified{}, err
	}
	if err := c.expected(peer); err != nil {
		return verified{}, err
	}
	return certified(c.id, peer, dir, cs), nil
}

// expected compares with the UUID that the configuration names.
func (c *clientTLS) expected(peer identity.Peer) error {
	if c.expect != nil && *c.expect != peer.Party.ID {
		return fmt.Errorf("%w: %s, want %s (is the address right? did the party get a new identity?)", ErrWrongPeer, peer.Party, *c.expect)
	}
	return nil
}
