package rcp

import (
	"context"
	"fmt"
	"strings"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/doctor"
	"sallyport/internal/local"
	"sallyport/internal/wire"
)

// Status is what the local socket shows.
func (r *Relay) Status(context.Context) local.Status {
	state, reason := r.state()
	s := local.Status{
		Role: wire.RoleRCP, ID: r.id.ID(), Fingerprint: r.id.Fingerprint(), State: string(state), Reason: reason,
		Upstreams: r.upstreamStatus(), Version: r.cfg.Version, Started: r.started, TrustDomain: r.id.TrustDomain(),
		NotAfter: r.id.NotAfter(), Clock: r.clock.Skew(), DialTargets: r.diallers.targets(), Peers: r.peerCounts(),
	}
	for _, a := range r.addrs {
		s.Listen = append(s.Listen, a.String())
	}
	return s
}

// upstreamStatus lists those that we dial, connected or not, and those that
// have dialled us.
func (r *Relay) upstreamStatus() []wire.UpstreamStatus {
	var out []wire.UpstreamStatus
	for _, d := range r.diallers {
		if d.peer == channel.PeerUpstream {
			out = append(out, d.status())
		}
	}
	for _, c := range r.upstreams.all() {
		if c.Dialled() {
			continue
		}
		state := "connected"
		if c.Enrolling() {
			state = "enrolling"
		}
		out = append(out, wire.UpstreamStatus{
			Address: c.RemoteAddr(), ID: c.Peer().Party.ID, Role: c.Peer().Party.Role, Carrier: c.Carrier(),
			Dialler: "them", State: state, Since: c.Since(), RTT: c.RTT().Seconds(),
		})
	}
	return out
}

// Join takes a join code that an operator hands over.
func (r *Relay) Join(_ context.Context, code string) error {
	c, err := wire.ParseJoinCode(code)
	if err != nil {
		return &local.Error{Code: local.CodeInvalid, Message: err.Error()}
	}
	if c.Role != wire.RoleRCP {
		return &local.Error{Code: local.CodeRefused, Message: fmt.Sprintf("join code is for a %s, this is an rcp: make one with `sallyport rcp add` or `sallyport rcp join`", c.Role)}
	}
	if _, certified := r.id.Party(); certified && c.TrustDomain != r.id.TrustDomain() {
		return &local.Error{Code: local.CodeRefused, Message: fmt.Sprintf("join code is for %s, this RCP serves %s: one RCP serves one trust domain", c.TrustDomain, r.id.TrustDomain())}
	}
	return r.join.Keep(code)
}

// Doctor is what the RCP finds out about itself without asking anybody.
func (r *Relay) Doctor(context.Context) []local.Check {
	checks := []local.Check{
		doctor.Enrolled(r.id, fmt.Sprintf("rcp %s of %s", r.id.ID(), r.id.TrustDomain()), r.applicant.Ready(), "sallyport rcp join"),
		doctor.Certificate(r.id.NotAfter(), r.id.RenewAfter(), time.Now(), "this RCP"),
		r.checkListeners(), r.checkDialler(),
	}
	checks = append(checks, r.checkUpstreams()...)
	return append(checks, r.checkRevocations(), r.checkPeers())
}

func (r *Relay) checkListeners() local.Check {
	addrs := make([]string, len(r.addrs))
	for i, a := range r.addrs {
		addrs[i] = a.String()
	}
	return local.Check{Check: "listen", OK: true, Detail: "channels are accepted on " + strings.Join(addrs, ", ") + " (TCP and UDP)"}
}

// checkDialler is the proof that an auditor reads: it looks at the diallers
// themselves, not at the configuration.
func (r *Relay) checkDialler() local.Check {
	if len(r.diallers) == 0 {
		return local.Check{Check: "dialler", OK: true, Detail: "there is no dialler in this process: no dial target is configured, and nothing but the configuration can name one"}
	}
	return local.Check{Check: "dialler", OK: true, Detail: "this RCP dials " + strings.Join(r.diallers.targets(), ", ") + ", and nothing else"}
}

func (r *Relay) checkUpstreams() []local.Check {
	var checks []local.Check
	asked := 0
	for _, u := range r.upstreamStatus() {
		if u.State == "connected" {
			asked++
		}
		if u.Dialler == "us" && u.State != "connected" {
			checks = append(checks, doctor.Channel(u, r.applicant.Ready() != nil))
		}
	}
	c := local.Check{Check: "upstreams", OK: asked > 0, Detail: fmt.Sprintf("%d channels to gateways or RCPs above", asked)}
	if !c.OK {
		c.Fix = "see whether the gateway runs, knows this RCP (`sallyport rcp list`) and reaches its port; or set SALLYPORT_RCP_UPSTREAMS to dial it from here"
	}
	return append(checks, c)
}

func (r *Relay) checkRevocations() local.Check {
	number, _ := r.id.Revocations()
	if number == 0 {
		return local.Check{Check: "revocations", OK: true, Detail: "no set was published yet"}
	}
	return local.Check{Check: "revocations", OK: true, Detail: fmt.Sprintf("set %d is in force, also while no gateway is reachable", number)}
}

func (r *Relay) checkPeers() local.Check {
	n := r.peerCounts()
	return local.Check{Check: "peers", OK: true, Detail: fmt.Sprintf("%d nodes, %d RCPs, %d waiting for a certificate; %d known through RCPs below",
		n["node"], n["rcp"], n["pending"], max(0, r.table.size()-n["node"]-n["pending"]))}
}
