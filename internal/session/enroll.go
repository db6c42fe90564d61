package session

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// DialEnroll opens an enrolment session with the waiting party whose key
// hashes to key, and owns the stream from then on. The party's certificate is
// self-signed or expired: it proves the key and nothing else. What a response may
// be long is for its reader to say.
func DialEnroll(ctx context.Context, stream net.Conn, id *identity.Identity, key wire.KeyHash) (*Session, error) {
	who := "pending " + key.Fingerprint()
	cert, err := id.Certificate()
	if err != nil {
		_ = stream.Close()
		return nil, fmt.Errorf("enrolment session with %s: %w", who, err)
	}
	verify := func(cs tls.ConnectionState) (identity.Peer, error) { return verifyKey(id, cs, key) }
	conf := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{channel.ALPNSessionEnroll},
		InsecureSkipVerify:     true, // there is no chain yet: VerifyConnection compares the key
		SessionTicketsDisabled: true,
		GetClientCertificate:   func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil },
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := verify(cs)
			return err
		},
	}
	s, err := open(ctx, stream, conf, verify)
	if err != nil {
		return nil, fmt.Errorf("enrolment session with %s: %w", who, err)
	}
	return s, nil
}

func verifyKey(id *identity.Identity, cs tls.ConnectionState, key wire.KeyHash) (identity.Peer, error) {
	if cs.NegotiatedProtocol != channel.ALPNSessionEnroll {
		return identity.Peer{}, fmt.Errorf("%w: %q", ErrProtocol, wire.Quotable(cs.NegotiatedProtocol))
	}
	peer, err := id.VerifyPending(cs)
	if err != nil {
		return peer, err
	}
	if peer.Key != key {
		return peer, fmt.Errorf("%w: key %s answers", identity.ErrWrongParty, peer.Key.Fingerprint())
	}
	return peer, nil
}

// ServeEnroll answers a gateway's enrolment session. The gateway must show a
// chain to the pinned root, which it sends along, and the role gateway; only
// then does h hear of it. It closes the stream and returns when every handler has.
func ServeEnroll(ctx context.Context, stream net.Conn, id *identity.Identity, h http.Handler) error {
	cert, err := id.SelfSigned()
	if err != nil {
		_ = stream.Close()
		return fmt.Errorf("enrolment session: %w", err)
	}
	verify := func(cs tls.ConnectionState) (identity.Peer, error) {
		if cs.NegotiatedProtocol != channel.ALPNSessionEnroll {
			return identity.Peer{}, fmt.Errorf("%w: %q", ErrProtocol, wire.Quotable(cs.NegotiatedProtocol))
		}
		return id.VerifyPinned(cs, wire.RoleGateway)
	}
	conf := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{channel.ALPNSessionEnroll},
		ClientAuth:             tls.RequireAnyClientCert,
		Certificates:           []tls.Certificate{*cert},
		SessionTicketsDisabled: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := verify(cs)
			return err
		},
	}
	// A leaf that we have plays no part here: it is over when it is to be renewed.
	if err := serve(ctx, stream, conf, id, time.Time{}, verify, Handlers{API: h}); err != nil {
		return fmt.Errorf("enrolment session: %w", err)
	}
	return nil
}
