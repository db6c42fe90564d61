package gateway

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/channel"
	"sallyport/internal/wire"
)

// verified marks what the gateway itself has seen the proof of.
const verified = "verified"

// hopState words.
const (
	hopConnected = "connected"
	hopGone      = "gone"
	hopCut       = "not connected"
	hopUnknown   = "unknown"
)

// trace follows the way to a node hop by hop and tries a session at its end.
// It works for a node that is gone, too: then it tells where the way ends.
func (s *Server) trace(ctx context.Context, n *store.Node) (api.Trace, error) {
	t := api.Trace{Node: n.Name, ID: n.ID, Hops: []api.TraceHop{}}
	ways := s.fleet.traceWays(n.ID)
	for _, w := range ways {
		t.Hops = append(t.Hops, s.traceChannels(n, w)...)
	}
	if len(ways) == 0 {
		t.Hops = append(t.Hops, s.traceLinks()...)
	}
	p := s.fleet.Presence(n.ID)
	if !p.Connected {
		t.Verdict = s.verdictAbsent(n, p, ways)
		return t, nil
	}
	hop, err := s.traceSession(ctx, n)
	t.Hops = append(t.Hops, hop)
	t.OK = err == nil
	t.Verdict = s.verdictSession(n, p, hop, err)
	return t, nil
}

// traceWay is one way as trace shows it, first hop first.
type traceWay struct {
	link wire.ID
	path []wire.ID
	way  way // to the party itself
	mids []way
}

// traceWays returns the live ways to a party, or the ones that it was last
// seen on.
func (f *fleet) traceWays(id wire.ID) []traceWay {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	if m == nil {
		return nil
	}
	ways := f.liveWays(m)
	if len(ways) == 0 {
		for _, w := range m.ways {
			ways = append(ways, w)
		}
		slices.SortFunc(ways, func(a, b *way) int { return strings.Compare(wayKey(a.link, a.path), wayKey(b.link, b.path)) })
	}
	out := make([]traceWay, 0, len(ways))
	for _, w := range ways {
		t := traceWay{link: w.link, path: w.path, way: *w}
		for i, mid := range w.path {
			var mw way
			if hop := f.members[mid]; hop != nil {
				if x := hop.ways[wayKey(w.link, w.path[:i])]; x != nil {
					mw = *x
				}
			}
			t.mids = append(t.mids, mw)
		}
		out = append(out, t)
	}
	return out
}

// traceChannels are the channels of one way.
func (s *Server) traceChannels(n *store.Node, w traceWay) []api.TraceHop {
	hops := []api.TraceHop{s.traceFirst(w.link)}
	if w.link == n.ID {
		hops[0].To = n.Name
		return hops
	}
	first := hops[0].To
	from := first
	for i, id := range w.path {
		to := s.fleet.nameNow(id)
		hops = append(hops, reported(first, from, to, "rcp "+string(id), w.mids[i]))
		from = to
	}
	return append(hops, reported(first, from, n.Name, "node "+string(n.ID), w.way))
}

// traceFirst is the channel between us and a first hop, which we verified.
func (s *Server) traceFirst(id wire.ID) api.TraceHop {
	h, ok := s.fleet.hop(id)
	hop := api.TraceHop{From: "gateway", To: s.fleet.nameNow(id), Kind: "channel", Address: h.Address, Carrier: h.Carrier, Peer: string(h.Role) + " " + string(id),
		State: hopConnected, RTT: h.RTT.Seconds(), Error: h.LastErr, Source: verified}
	if ok && !h.Since.IsZero() {
		hop.Since = &h.Since
	}
	hop.Dialler = hop.To
	if h.Dialled || !h.Up && h.Address != "" {
		hop.Dialler = "gateway"
	}
	if !h.Up {
		hop.State, hop.RTT, hop.Carrier = hopCut, 0, ""
	}
	return hop
}

// reported is a channel that only an RCP vouches for.
func reported(first, from, to, peer string, w way) api.TraceHop {
	hop := api.TraceHop{From: from, To: to, Kind: "channel", Address: w.source, Carrier: w.carrier, Peer: peer, Dialler: to,
		State: hopConnected, RTT: w.rtt.Seconds(), Source: "reported by rcp " + first}
	if w.dialled {
		hop.Dialler = from
	}
	if !w.since.IsZero() {
		hop.Since = &w.since
	}
	switch {
	case w.link == "":
		hop.State = hopUnknown
	case !w.gone.IsZero():
		hop.State, hop.Error, hop.Since = hopGone, w.why, &w.gone
	}
	return hop
}

// traceLinks are all first hops, for a node that was not seen anywhere.
func (s *Server) traceLinks() []api.TraceHop {
	s.fleet.mu.Lock()
	var ids []wire.ID
	for id, l := range s.fleet.links {
		if l.role == wire.RoleRCP {
			ids = append(ids, id)
		}
	}
	s.fleet.mu.Unlock()
	slices.Sort(ids)
	hops := make([]api.TraceHop, 0, len(ids))
	for _, id := range ids {
		hops = append(hops, s.traceFirst(id))
	}
	return hops
}

// traceSession opens a new session with the node and measures a round trip.
func (s *Server) traceSession(ctx context.Context, n *store.Node) (api.TraceHop, error) {
	hop := api.TraceHop{From: "gateway", To: n.Name, Kind: "session", Peer: "node " + string(n.ID), Dialler: "gateway", State: "open", Source: verified}
	err := s.sessions.fresh(ctx, s.party(wire.RoleNode, n.ID), func(ctx context.Context, c *conversation) error {
		hop.Carrier = "over " + c.via.name
		rtt, err := c.ping(ctx)
		hop.RTT = rtt.Seconds()
		hop.Since = &c.since
		return err
	})
	if err != nil {
		hop.State, hop.Error, hop.RTT = "failed", err.Error(), 0
	}
	return hop, err
}

func (s *Server) verdictSession(n *store.Node, p presence, hop api.TraceHop, err error) string {
	if err == nil {
		how := fmt.Sprintf("node %s answers end to end in %s, %s", n.Name, time.Duration(hop.RTT*float64(time.Second)).Round(10*time.Microsecond), hop.Carrier)
		if p.State != wire.StateRunning {
			how += fmt.Sprintf("; its state is %s", p.State)
			if p.Reason != "" {
				how += ": " + p.Reason
			}
		}
		return how + "."
	}
	var no *channel.RefusedError
	if errors.As(err, &no) {
		return fmt.Sprintf("Node %s is reported as connected by %s, but the stream to it was refused on the way: %s.", n.Name, strings.Join(p.via(), ", "), no.Error())
	}
	return fmt.Sprintf("Node %s is reported as connected by %s, but no end-to-end session with it succeeds: %v. Either the node is stuck, or an rcp does not tell the truth.",
		n.Name, strings.Join(p.via(), ", "), err)
}

// via names those that report a party.
func (p presence) via() []string {
	var out []string
	for _, w := range p.Paths {
		name := "rcp " + w.RCP
		if w.RCP == directHop {
			name = "its own channel to the gateway"
		}
		if !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	return out
}

// verdictAbsent says in plain words where the way to an absent node ends.
func (s *Server) verdictAbsent(n *store.Node, p presence, ways []traceWay) string {
	switch {
	case p.State == wire.StateRevoked:
		return fmt.Sprintf("Node %s is revoked (%s): nothing may connect with its certificate. Let it enrol again with a new join code.", n.Name, p.Reason)
	case p.State == wire.StatePending:
		return fmt.Sprintf("Node %s was never connected since it got its certificate. Is it running, and can it reach an rcp?", n.Name)
	}
	var cut []string
	for _, h := range s.traceLinks() {
		if h.State == hopCut {
			text := "rcp " + h.To
			if h.Address != "" {
				text += " at " + h.Address
			}
			if h.Error != "" {
				text += " (" + h.Error + ")"
			}
			cut = append(cut, text)
		}
	}
	for _, w := range ways {
		if h, ok := s.fleet.hop(w.link); w.link != n.ID && (!ok || !h.Up) {
			return fmt.Sprintf("Node %s was last seen behind rcp %s, to which the gateway has no channel: %s. Look there first; the node itself may be well.", n.Name, s.fleet.nameNow(w.link), orNone(h.LastErr))
		}
		for i, mid := range w.mids {
			if mid.link == "" || !mid.gone.IsZero() {
				return fmt.Sprintf("Node %s was last seen behind rcp %s, which is itself cut off (%s). Look there first; the node itself may be well.", n.Name, s.fleet.nameNow(w.path[i]), orNone(mid.why))
			}
		}
	}
	if p.State == wire.StateUnreachable && len(cut) > 0 {
		return fmt.Sprintf("Node %s may hang on an rcp that is cut off: %s.", n.Name, strings.Join(cut, "; "))
	}
	return fmt.Sprintf("Node %s is not connected: %s. Is it running, and can it reach its rcp? `sallyport-node local status` on the host says what it tries.", n.Name, orNone(p.Reason))
}

func orNone(s string) string {
	if s == "" {
		return "no reason is known"
	}
	return s
}
