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
	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

// Handlers answer a gateway.
type Handlers struct {
	API     http.Handler   // sessions; nil: refused
	Targets tunnel.Handler // streams of tunnels; nil: refused
}

// Serve answers a gateway's session on a stream that came by CONNECT, until
// either side ends it, ctx is done, the gateway is revoked or a leaf expires.
// It closes the stream and returns when every handler has.
func Serve(ctx context.Context, stream net.Conn, id *identity.Identity, h http.Handler) error {
	return Handlers{API: h}.Serve(ctx, stream, id)
}

// ServeLane answers a gateway's tunnel on a lane, as [Serve] does a session.
func ServeLane(ctx context.Context, lane net.Conn, id *identity.Identity, h tunnel.Handler) error {
	return Handlers{Targets: h}.Serve(ctx, lane, id)
}

// Serve is as the function [Serve]; the gateway decides what it opens.
func (h Handlers) Serve(ctx context.Context, stream net.Conn, id *identity.Identity) error {
	conf := resumptionOf(id).serverConfig(id, func(roots *x509.CertPool) *tls.Config {
		return &tls.Config{
			MinVersion:     tls.VersionTLS13,
			NextProtos:     []string{channel.ALPNSession, channel.ALPNTunnel},
			ClientAuth:     tls.RequireAndVerifyClientCert,
			ClientCAs:      roots,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return id.BriefCertificate() },
			VerifyConnection: func(cs tls.ConnectionState) error {
				_, err := verifyGateway(id, cs)
				return err
			},
			DynamicRecordSizingDisabled: true, // Batch makes large writes of them either way
		}
	})
	err := serve(ctx, stream, conf, id, id.NotAfter(), func(cs tls.ConnectionState) (identity.Peer, error) { return verifyGateway(id, cs) }, h)
	if err != nil {
		return fmt.Errorf("session: %w", err)
	}
	return nil
}

// verifyGateway checks that a gateway of our trust domain opens the session.
func verifyGateway(id *identity.Identity, cs tls.ConnectionState) (identity.Peer, error) {
	if p := cs.NegotiatedProtocol; p != channel.ALPNSession && p != channel.ALPNTunnel {
		return identity.Peer{}, fmt.Errorf("%w: %q", ErrProtocol, wire.Quotable(p))
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

// serve shakes hands as TLS server and answers what the gateway opens. own is
// the end of the leaf that we show; zero: we show none that ends.
func serve(ctx context.Context, stream net.Conn, conf *tls.Config, id *identity.Identity, own time.Time, verify func(tls.ConnectionState) (identity.Peer, error), h Handlers) error {
	defer func() { _ = stream.Close() }()
	below := tunnel.NewBatch(stream)
	conn := tls.Server(below, conf)
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
	proto := conn.ConnectionState().NegotiatedProtocol
	if isTunnel := proto == channel.ALPNTunnel; isTunnel && h.Targets == nil || !isTunnel && h.API == nil {
		return fmt.Errorf("%s: %w: %q is not served here", peer, ErrProtocol, proto)
	}
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		watch(ctx, id, peer, own, end)
	}()
	if proto == channel.ALPNTunnel {
		err = tunnel.Server(conn, below, h.Targets, tunnel.Config{}).Run(ctx)
	} else {
		err = channel.Serve(ctx, conn, h.API)
	}
	end(nil)
	<-watched
	return err
}

// issuerGrace is how long a session goes on whose peer's intermediate was given
// up: what is short may end, and the gateway opens another.
const issuerGrace = 10 * time.Second

// watch ends a session when its peer is revoked or a leaf expires: the peer's,
// or our own at the given time.
func watch(ctx context.Context, id *identity.Identity, peer identity.Peer, own time.Time, end context.CancelCauseFunc) {
	until := peer.Leaf.NotAfter
	if !own.IsZero() {
		until = sooner(until, own)
	}
	expired := time.NewTimer(time.Until(until))
	defer expired.Stop()
	var late <-chan time.Time
	for {
		changed := id.Changed()
		switch {
		case id.Revoked(peer.Key):
			end(fmt.Errorf("%s: %w", peer, identity.ErrRevoked))
			return
		case late == nil && id.Ended(peer):
			t := time.NewTimer(issuerGrace)
			defer t.Stop()
			late = t.C
		}
		select {
		case <-changed:
		case <-late:
			end(fmt.Errorf("%s: its intermediate: %w", peer, identity.ErrRevoked))
			return
		case <-expired.C:
			end(fmt.Errorf("%s: %w", peer, identity.ErrExpired))
			return
		case <-ctx.Done():
			return
		}
	}
}
