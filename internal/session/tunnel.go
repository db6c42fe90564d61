package session

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

// Tunnel is the gateway's end of a tunnel. It lives while Run runs.
type Tunnel struct {
	*tunnel.Tunnel
	id      *identity.Identity
	peer    identity.Peer
	own     time.Time // NotAfter of the leaf that opened it
	resumed bool
}

// DialTunnel shakes hands with peer over a stream or a lane that leads to it,
// and owns the connection from then on. Nothing in the clear names the peer.
func DialTunnel(ctx context.Context, conn net.Conn, id *identity.Identity, peer wire.Party, cfg tunnel.Config) (*Tunnel, error) {
	cert, err := id.BriefCertificate()
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("tunnel to %s: %w", peer, err)
	}
	verify := func(cs tls.ConnectionState) (identity.Peer, error) {
		return verifyParty(id, cs, channel.ALPNTunnel, peer)
	}
	conf := &tls.Config{
		MinVersion:           tls.VersionTLS13,
		NextProtos:           []string{channel.ALPNTunnel},
		ServerName:           peer.TrustDomain,
		RootCAs:              id.Roots(),
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil },
		ClientSessionCache:   ticketsFor{resumptionOf(id).clientCache(cert), "tunnel " + string(peer.ID)},
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := verify(cs)
			return err
		},
		DynamicRecordSizingDisabled: true, // Batch makes large writes of them either way
	}
	below := tunnel.NewBatch(conn)
	c, verified, err := shake(ctx, below, conf, verify)
	if err != nil {
		return nil, fmt.Errorf("tunnel to %s: %w", peer, err)
	}
	return &Tunnel{Tunnel: tunnel.Client(c, below, cfg), id: id, peer: verified, own: cert.Leaf.NotAfter,
		resumed: c.ConnectionState().DidResume}, nil
}

// Run moves the tunnel's bytes until either side ends it, ctx is done, the peer
// is revoked or the leaf of either expires; the error says why.
func (t *Tunnel) Run(ctx context.Context) error {
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		watch(ctx, t.id, t.peer, t.own, end)
	}()
	err := t.Tunnel.Run(ctx)
	end(nil)
	<-watched
	return fmt.Errorf("tunnel to %s: %w", t.peer, err)
}

// Peer is the verified party at the other end.
func (t *Tunnel) Peer() identity.Peer { return t.peer }

// Resumed tells whether a ticket saved the full handshake.
func (t *Tunnel) Resumed() bool { return t.resumed }

// ticketsFor keeps the tickets of one peer apart from those of others: tunnels
// have the same ServerName, by which the standard library would file them.
type ticketsFor struct {
	cache tls.ClientSessionCache
	key   string
}

func (t ticketsFor) Get(string) (*tls.ClientSessionState, bool) { return t.cache.Get(t.key) }

func (t ticketsFor) Put(_ string, cs *tls.ClientSessionState) { t.cache.Put(t.key, cs) }
