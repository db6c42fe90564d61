package rcp

import (
	"context"
	"fmt"

	"sallyport/internal/parking"
	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

// newLot makes the place where connections of local clients wait. Nobody is
// woken: a gateway that accepts any waits in its session for the next.
func (r *Relay) newLot() *parking.Lot {
	return parking.New(func() int { return 1 }, r.closedToClients, func() {}, r.log)
}

// closedToClients is why no gateway can accept a local client.
func (r *Relay) closedToClients() string {
	switch {
	case r.id.Revoked(r.id.KeyHash()):
		return "the RCP is revoked"
	case r.draining.Load() != nil:
		return "the RCP is being drained"
	}
	return ""
}

// listenProxy opens SALLYPORT_RCP_PROXY_LISTEN.
func (r *Relay) listenProxy() (port, error) {
	p, err := parking.Listen(string(r.cfg.ProxyListen), r.lot, r.log)
	if err != nil {
		return port{}, fmt.Errorf("listen on %s: %w (SALLYPORT_RCP_PROXY_LISTEN)", r.cfg.ProxyListen, err)
	}
	return port{p.Run, p.Close}, nil
}

// serveTarget answers a stream that a gateway opened to the RCP itself. An RCP
// reaches nothing: all that there is are clients of its own proxy.
func (r *Relay) serveTarget(ctx context.Context, target string, s *tunnel.Stream) {
	id, ok := wire.ParseParkedTarget(target)
	switch {
	case !ok || r.lot == nil:
		s.Refuse(tunnel.NotFound, "an RCP offers no targets")
	case r.draining.Load() != nil:
		s.Refuse(tunnel.Draining, "the RCP is being drained")
	default:
		r.lot.Serve(ctx, id, s)
	}
}
