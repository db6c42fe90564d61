package gateway

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"sallyport/internal/doctor"
	"sallyport/internal/local"
	"sallyport/internal/wire"
)

// Status is what the gateway's local socket shows. A gateway has no upstream:
// the RCPs that it dials are its dial targets.
func (s *Server) Status(context.Context) local.Status {
	st := local.Status{
		Role: wire.RoleGateway, ID: s.id.ID(), Fingerprint: s.id.Fingerprint(), State: string(wire.StateRunning),
		Version: s.cfg.Program, Started: s.started, TrustDomain: s.id.TrustDomain(), NotAfter: s.id.NotAfter(),
		Peers: map[string]int{},
	}
	if err := s.Ready(); err != nil {
		st.State, st.Reason = string(wire.StateFailing), err.Error()
	}
	if addr := s.ChannelAddr(); addr != nil {
		st.Listen = []string{addr.String()}
	}
	for _, t := range s.links.targets(nil) {
		st.DialTargets = append(st.DialTargets, t.addr)
	}
	slices.Sort(st.DialTargets)
	states, _, up, pending := s.fleet.totals()
	for state, n := range states {
		st.Peers["node "+string(state)] = n
	}
	st.Peers["rcp"], st.Peers["pending"] = up, pending
	return st
}

// Doctor is what the gateway finds out about itself. It asks nobody but a
// certificate authority in another process.
func (s *Server) Doctor(ctx context.Context) []local.Check {
	checks := []local.Check{s.checkOwnCertificate(), s.checkAuthority(ctx), s.checkDatabase(ctx)}
	return append(checks, s.checkRCPs(ctx)...)
}

func (s *Server) checkOwnCertificate() local.Check {
	c := local.Check{Check: "certificate", OK: true, Detail: fmt.Sprintf("gateway %s of %s, key %s, until %s",
		s.id.ID(), s.id.TrustDomain(), s.id.Fingerprint(), s.id.NotAfter().UTC().Format(time.RFC3339))}
	if err := s.Ready(); err != nil {
		c.OK, c.Detail = false, err.Error()
		c.Fix = "see the log: the gateway asks its certificate authority once a minute"
	}
	return c
}

func (s *Server) checkDatabase(ctx context.Context) local.Check {
	nodes, err := s.store.Nodes(ctx)
	if err != nil {
		return local.Check{Check: "database", Detail: err.Error(), Fix: "see whether " + s.cfg.Database + " is readable and its disk is not full"}
	}
	inst := s.store.Installation()
	return local.Check{Check: "database", OK: true, Detail: fmt.Sprintf("%d nodes in %s, installation %s, generation %d", len(nodes), s.cfg.Database, inst.UID, inst.Generation)}
}

func (s *Server) checkRCPs(ctx context.Context) []local.Check {
	rcps, err := s.store.RCPs(ctx)
	if err != nil {
		return []local.Check{{Check: "rcps", Detail: err.Error(), Fix: "see database"}}
	}
	if len(rcps) == 0 && s.cfg.ChannelListen == "" {
		return []local.Check{{Check: "rcps", Detail: "there is none, and no node can dial the gateway", Fix: "`sallyport rcp add NAME HOST:PORT` makes one and prints its join code"}}
	}
	var checks []local.Check
	for _, r := range rcps {
		hop, ok := s.fleet.hop(r.PartyID)
		c := local.Check{Check: "rcp " + r.Name, OK: ok && hop.Up}
		switch {
		case c.OK:
			c.Detail = fmt.Sprintf("connected over %s since %s", hop.Carrier, hop.Since.UTC().Format(time.RFC3339))
		case r.Via != "" && s.fleet.Presence(r.PartyID).Connected:
			c.OK, c.Detail = true, "connected, behind "+r.Via
		case r.Via != "":
			c.Detail = "not connected, and it stands behind " + r.Via
			c.Fix = "see " + r.Via + " first; on the host of each `sallyport local doctor`"
		case r.PartyID == "" && s.links.lastError(r) == "":
			c.Detail = "waiting for it to enrol"
			c.Fix = fmt.Sprintf("start it with its join code: `sallyport rcp join %s` prints a new one", r.Name)
			if r.Address == "" {
				c.Fix += "; SALLYPORT_RCP_UPSTREAMS there names the address of SALLYPORT_GATEWAY_CHANNEL_LISTEN here"
			}
		default:
			cause := s.links.lastError(r)
			c.Detail = strings.TrimSuffix("not connected: "+cause, ": ")
			c.Fix = "on its host `sallyport local doctor`; " + doctor.Upstream(cause)
		}
		checks = append(checks, c)
	}
	return checks
}
