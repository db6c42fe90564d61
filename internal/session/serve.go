package session

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

type peerKey struct{}

// PeerFrom returns the verified gateway that sent a request.
func PeerFrom(ctx context.Context) (identity.Peer, bool) {
	p, ok := ctx.Value(peerKey{}).(identity.Peer)
	return p, ok
}

// Serve answers a gateway's session on a stream that came by CONNECT, until
// either side ends it, ctx is done, the gateway is revoked or a leaf expires.
// It closes the stream and returns when every handler has.
func Serve(ctx context.Context, stream net.Conn, id *identity.Identity, h http.Handler) error {
	conf := resumptionOf(id).serverConfig(id, func(roots *x509.CertPool) *tls.Config {
		return &tls.Config{
			MinVersion:     tls.VersionTLS13,
			NextProtos:     []string{channel.ALPNSession},
			ClientAuth:     tls.RequireAndVerifyClientCert,
			ClientCAs:      roots,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return id.Certificate() },
			VerifyConnection: func(cs tls.ConnectionState) error {
				_, err := verifyGateway(id, cs)
				return err
			},
		}
	})
	err := serve(ctx, stream, conf, id, func(cs tls.ConnectionState) (identity.Peer, error) { return verifyGateway(id, cs) }, h)
	if err != nil {
		return fmt.Errorf("session: %w", err)
	}
	return nil
}

// verifyGateway checks that a gateway of our trust domain opens the session.
func verifyGateway(id *identity.Identity, cs tls.ConnectionState) (identity.Peer, error) {
	if cs.NegotiatedProtocol != channel.ALPNSession {
		return identity.Peer{}, fmt.Errorf("%w: %q", ErrProtocol, wire.Quotable(cs.NegotiatedProtocol))
	}
	peer, err := id.Verify(cs)
	if err != nil {
		return peer, err
	}
	if peer.Party.Role != wire.RoleGateway {
		return peer, fmt.Errorf("%s: %w: only a gateway opens sessions", peer.Party, identity.ErrWrongRole)
	}
	return peer, nil
}

// serve shakes hands as TLS server and answers HTTP/2.
func serve(ctx context.Context, stream net.Conn, conf *tls.Config, id *identity.Identity, verify func(tls.ConnectionState) (identity.Peer, error), h http.Handler) error {
	defer func() { _ = stream.Close() }()
	conn := tls.Server(stream, conf)
	shake, cancel := context.WithTimeout(ctx, handshakeTimeout)
	err := conn.HandshakeContext(shake)
	if err != nil && shake.Err() != nil {
		err = context.Cause(shake)
	}
	cancel()
	if err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	peer, err := verify(conn.ConnectionState())
	if err != nil {
		return err
	}
	ctx, end := context.WithCancelCause(context.WithValue(ctx, peerKey{}, peer))
	defer end(nil)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		watch(ctx, id, peer, end)
	}()
	err = channel.Serve(ctx, conn, h)
	end(nil)
	<-watched
	return err
}

// watch ends a session when its peer is revoked or a leaf expires.
func watch(ctx context.Context, id *identity.Identity, peer identity.Peer, end context.CancelCauseFunc) {
	until := peer.Leaf.NotAfter
	if own := id.NotAfter(); !own.IsZero() {
		until = sooner(until, own)
	}
	expired := time.NewTimer(time.Until(until))
	defer expired.Stop()
	for {
		changed := id.Changed()
		if id.Revoked(peer.Key) {
			end(fmt.Errorf("%s: %w", peer, identity.ErrRevoked))
			return
		}
		select {
		case <-changed:
		case <-expired.C:
			end(fmt.Errorf("%s: %w", peer, identity.ErrExpired))
			return
		case <-ctx.Done():
			return
		}
	}
}
