package node

import (
	"context"
	"fmt"

	"sallyport/internal/parking"
	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

// newLot makes the place where connections of local clients wait. The gateways
// of all instances hear of each; the first that accepts it has it.
func (a *Agent) newLot() *parking.Lot {
	return parking.New(func() int { return len(a.all()) }, a.closedToClients, func() {
		for _, in := range a.all() {
			in.signals.kick()
		}
	}, a.log)
}

// closedToClients is why no gateway can accept a local client.
func (a *Agent) closedToClients() (why string) {
	for _, in := range a.all() {
		code, said := in.closedToTargets()
		if code == 0 {
			return ""
		}
		why = said
	}
	return why
}

// listenProxy opens SALLYPORT_NODE_PROXY_LISTEN.
func (a *Agent) listenProxy() (port, error) {
	p, err := parking.Listen(string(a.cfg.ProxyListen), a.lot, a.log)
	if err != nil {
		return port{}, fmt.Errorf("listen on %s: %w (SALLYPORT_NODE_PROXY_LISTEN)", a.cfg.ProxyListen, err)
	}
	return port{p.Run, p.Close}, nil
}

// serveParked gives a gateway's stream to the local client that it accepts.
func (in *instance) serveParked(ctx context.Context, id wire.ID, s *tunnel.Stream) {
	if in.lot == nil {
		s.Refuse(tunnel.NotFound, "no proxy for local clients listens here")
		return
	}
	if code, why := in.closedToTargets(); code != 0 {
		s.Refuse(code, why)
		return
	}
	in.lot.Serve(ctx, id, s)
}
