package session

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// handshakeTimeout bounds the handshake on either side.
const handshakeTimeout = 15 * time.Second

// ErrProtocol says that the other side does not speak the session protocol.
var ErrProtocol = errors.New("session protocol was not negotiated")

// Session is the gateway's end: an http.RoundTripper whose requests the other
// party answers; the host of their URLs is ignored. It ends, whatever runs in
// it, at the NotAfter of the leaf that opened it, whichever side's comes first.
type Session struct {
	peer    identity.Peer
	resumed bool
	client  *channel.ClientConn
	expiry  *time.Timer
}

// Dial opens a session with peer over a stream that leads to it, and owns the
// stream from then on. That the other side accepts us shows in the first request.
func Dial(ctx context.Context, stream net.Conn, id *identity.Identity, peer wire.Party) (*Session, error) {
	cert, err := id.BriefCertificate()
	if err != nil {
		_ = stream.Close()
		return nil, fmt.Errorf("session with %s: %w", peer, err)
	}
	conf := &tls.Config{
		MinVersion:           tls.VersionTLS13,
		NextProtos:           []string{channel.ALPNSession},
		ServerName:           peer.ServerName(),
		RootCAs:              id.Roots(),
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil },
		ClientSessionCache:   resumptionOf(id).clientCache(cert),
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := verifyParty(id, cs, channel.ALPNSession, peer)
			return err
		},
	}
	s, err := open(ctx, stream, conf, func(cs tls.ConnectionState) (identity.Peer, error) {
		return verifyParty(id, cs, channel.ALPNSession, peer)
	})
	if err != nil {
		return nil, fmt.Errorf("session with %s: %w", peer, err)
	}
	s.endAt(sooner(s.peer.Leaf.NotAfter, cert.Leaf.NotAfter))
	return s, nil
}

// verifyParty checks that the very party answers that was asked for.
func verifyParty(id *identity.Identity, cs tls.ConnectionState, proto string, want wire.Party) (identity.Peer, error) {
	if cs.NegotiatedProtocol != proto {
		return identity.Peer{}, fmt.Errorf("%w: %q", ErrProtocol, wire.Quotable(cs.NegotiatedProtocol))
	}
	peer, err := id.Verify(cs)
	if err != nil {
		return peer, err
	}
	if peer.Party != want {
		return peer, fmt.Errorf("%w: %s answers", identity.ErrWrongParty, peer.Party)
	}
	return peer, nil
}

// open shakes hands as TLS client and puts HTTP/2 on top.
func open(ctx context.Context, stream net.Conn, conf *tls.Config, verify func(tls.ConnectionState) (identity.Peer, error)) (*Session, error) {
	conn, peer, err := shake(ctx, stream, conf, verify)
	if err != nil {
		return nil, err
	}
	client, err := channel.Client(conn)
	if err != nil {
		return nil, err
	}
	return &Session{peer: peer, resumed: conn.ConnectionState().DidResume, client: client}, nil
}

// shake does the handshake of a TLS client, and closes the stream if it fails.
func shake(ctx context.Context, stream net.Conn, conf *tls.Config, verify func(tls.ConnectionState) (identity.Peer, error)) (*tls.Conn, identity.Peer, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	conn := tls.Client(stream, conf)
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = stream.Close()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, identity.Peer{}, fmt.Errorf("handshake: %w", err)
	}
	peer, err := verify(conn.ConnectionState())
	if err != nil {
		_ = conn.Close()
		return nil, identity.Peer{}, err
	}
	return conn, peer, nil
}

func (s *Session) endAt(t time.Time) {
	s.expiry = time.AfterFunc(time.Until(t), func() { _ = s.client.Close() })
}

func sooner(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// Peer is the verified party at the other end.
func (s *Session) Peer() identity.Peer { return s.peer }

// Resumed tells whether a ticket saved the full handshake.
func (s *Session) Resumed() bool { return s.resumed }

// Done is closed when the session has ended.
func (s *Session) Done() <-chan struct{} { return s.client.Done() }

// RoundTrip sends a request to the party.
func (s *Session) RoundTrip(req *http.Request) (*http.Response, error) {
	res, err := s.client.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.peer, err)
	}
	return res, nil
}

// Close ends the session, its requests and its stream.
func (s *Session) Close() error {
	if s.expiry != nil {
		s.expiry.Stop()
	}
	return s.client.Close()
}
