package channel

import (
	"crypto/tls"
	"errors"
	"fmt"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// Enrolment connections. One side has no valid certificate: it is pending, it
// is downstream, it shows a self-signed certificate (or its expired one) that
// proves only its key, and it answers nothing but what
// [sallyport/internal/session.ServeEnroll] answers inside a CONNECT. The other
// side shows its chain with the root, which the pending one compares with the
// pin of its join code. This file holds the only TLS configurations without the
// standard library's verification; neither side ever gives or takes a ticket.

// errBothPending says that nobody can vouch for anybody.
var errBothPending = errors.New("neither side has a certificate")

// enrollConfig is the listener's configuration.
func (s *serverTLS) enrollConfig(p *protocol) (*tls.Config, error) {
	cert, err := s.id.Certificate()
	if waiting(s.id) {
		cert, err = s.id.SelfSigned()
	}
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{p.alpn},
		ClientAuth:             tls.RequireAnyClientCert,
		Certificates:           []tls.Certificate{*cert},
		SessionTicketsDisabled: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := s.verify(p, cs)
			return err
		},
	}, nil
}

// verifyEnroll checks a dialler on an enrolment protocol.
func (s *serverTLS) verifyEnroll(p *protocol, cs tls.ConnectionState) (verified, error) {
	v := verified{dir: PeerDownstream}
	var err error
	if waiting(s.id) {
		v.dir = PeerUpstream
		v.peer, err = s.id.VerifyPinned(cs, wire.RoleGateway, wire.RoleRCP)
		if err != nil && len(cs.PeerCertificates) == 1 {
			err = fmt.Errorf("%w: %w", errBothPending, err)
		}
	} else if v.peer, err = s.comesForUs(cs); err == nil {
		v.dir = PeerUpstream
	} else {
		v.peer, err = s.id.VerifyPending(cs)
	}
	if err != nil {
		return v, err
	}
	return v, s.admit(v.peer, p.alpn)
}

// comesForUs recognises an upstream that dials a certified party by the
// enrolment protocol: it cannot reach us by any other, because one of us has
// missed a change of the certificate authority. A pending party shows one
// certificate only.
func (s *serverTLS) comesForUs(cs tls.ConnectionState) (identity.Peer, error) {
	if len(cs.PeerCertificates) < 2 {
		return identity.Peer{}, identity.ErrUntrusted
	}
	return s.id.VerifyPinned(cs, wire.RoleGateway, wire.RoleRCP)
}

// enrollConfig is the dialler's configuration. A dialler whose peer is upstream
// is the pending side; one whose peer is downstream looks for a pending party.
func (c *clientTLS) enrollConfig(p *protocol, dir Direction) (*tls.Config, error) {
	cert, err := c.id.Certificate()
	switch {
	case dir == PeerUpstream:
		cert, err = c.id.SelfSigned()
	case waiting(c.id):
		err = fmt.Errorf("dial a pending party: %w", identity.ErrNoCertificate)
	}
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{p.alpn},
		InsecureSkipVerify:     true, // VerifyConnection compares with the pin
		SessionTicketsDisabled: true,
		GetClientCertificate:   func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil },
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := c.verify(p, dir, cs)
			return err
		},
	}, nil
}

// verifyEnroll checks the party that answered on an enrolment protocol.
func (c *clientTLS) verifyEnroll(dir Direction, cs tls.ConnectionState) (verified, error) {
	v := verified{dir: dir}
	var err error
	if dir == PeerDownstream {
		v.peer, err = c.id.VerifyPending(cs)
		return v, err
	}
	if v.peer, err = c.id.VerifyPinned(cs, wire.RoleGateway, wire.RoleRCP); err != nil {
		return v, err
	}
	return v, c.expected(v.peer)
}
