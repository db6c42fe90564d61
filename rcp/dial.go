package rcp

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"sallyport/config"
	"sallyport/internal/channel"
	"sallyport/internal/wire"
)

// maxMore is how many channels an upstream may ask for, beside the first.
const maxMore = 16

// diallers is everything that this RCP ever dials: one for each address in
// SALLYPORT_RCP_UPSTREAMS and SALLYPORT_RCP_DOWNSTREAMS, in that order. Nothing
// else in this package makes a channel.Dialer, and no join code, peer or
// gateway adds an address.
type diallers []*dialler

// dialler keeps one address connected.
type dialler struct {
	r      *Relay
	addr   string
	expect wire.ID // empty: whoever has a fitting role
	peer   channel.Direction

	mu    sync.Mutex
	state channel.State
	odd   bool // the next attempt downstream is for a party without a certificate
	live  map[*channel.Conn]struct{}
	extra int // channels that the upstream asked for

	missed channel.Fallback // upstream
}

var errNotDialled = errors.New("this RCP did not dial this channel: dial it yourself")

func newDiallers(r *Relay) diallers {
	var all diallers
	add := func(endpoints config.Endpoints, peer channel.Direction) {
		for _, e := range endpoints.Dialled() {
			all = append(all, &dialler{
				r: r, addr: e.Addr, expect: wire.ID(e.ID), peer: peer,
				state: channel.State{Since: r.started}, live: map[*channel.Conn]struct{}{},
			})
		}
	}
	add(r.cfg.Upstreams, channel.PeerUpstream)
	add(r.cfg.Downstreams, channel.PeerDownstream)
	return all
}

func (d *dialler) dialler(class string) *channel.Dialer {
	out := &channel.Dialer{
		Addr: d.addr, Peer: d.peer, Identity: d.r.id, Carrier: string(d.r.cfg.Carrier), Class: class, Log: d.r.log,
	}
	if d.expect != "" {
		out.Expect = &d.expect
	}
	switch {
	case d.peer == channel.PeerDownstream:
		out.Enroll = d.maybePending
	case class == channel.ClassAdmin: // the one that note hears of
		out.Enroll = d.missed.Enroll
	}
	return out
}

// maybePending: nothing tells us beforehand whether a listening party has its
// certificate yet, so every other attempt after a failure is for one that has
// not. Which it is decides the handshake, and whom it is the gateway.
func (d *dialler) maybePending() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.odd
}

// targets lists the addresses, for people.
func (ds diallers) targets() []string {
	out := []string{}
	for _, d := range ds {
		out = append(out, d.addr+" ("+d.peer.String()+")")
	}
	return out
}

// run keeps the address connected until ctx ends. Before the first join code
// there is nobody to trust, so nobody is dialled.
func (d *dialler) run(ctx context.Context) error {
	for {
		changed := d.r.applicant.Changed()
		if d.r.applicant.Ready() == nil || d.r.applicant.Needed() {
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	dial := d.dialler(channel.ClassAdmin)
	dial.OnState = d.note
	return dial.Run(ctx, d.serve)
}

func (d *dialler) serve(ctx context.Context, c *channel.Conn) {
	d.mu.Lock()
	d.live[c] = struct{}{}
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		delete(d.live, c)
		d.mu.Unlock()
	}()
	d.r.serve(ctx, c)
}

// note follows the state. An upstream that does not accept our certificate
// matters when there is a new join code: a removed RCP may have been away when
// it could be told.
func (d *dialler) note(s channel.State) {
	d.missed.Note(s)
	switch {
	case d.peer != channel.PeerUpstream:
	case s.Connected():
		d.r.applicant.Accepted(s.Conn.Enrolling())
	case channel.RefusesUs(s.Err):
		d.r.applicant.Refused(s.Err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if s.Conn != nil || d.state.Conn != nil {
		d.odd = false // connected, or lost just now
	} else if s.Failures > d.state.Failures {
		d.odd = !d.odd
	}
	d.state = s
}

// status is for people: what became of this address.
func (d *dialler) status() wire.UpstreamStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := wire.UpstreamStatus{Address: d.addr, ID: d.expect, Dialler: "us", State: "connecting", Since: d.state.Since}
	if c := d.state.Conn; c != nil {
		s.ID, s.Role, s.Carrier, s.RTT = c.Peer().Party.ID, c.Peer().Party.Role, c.Carrier(), c.RTT().Seconds()
		s.State = "connected"
		if c.Enrolling() {
			s.State = "enrolling"
		}
	} else if d.state.Failures > 0 {
		s.State = "failed"
	}
	if d.state.Err != nil {
		s.Error = d.state.Err.Error()
	}
	return s
}

// more dials another channel to the upstream behind c, once: when it ends, the
// upstream asks again if it needs it.
func (ds diallers) more(c *channel.Conn, class string) error {
	i := slices.IndexFunc(ds, func(d *dialler) bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		_, ok := d.live[c]
		return ok
	})
	if i < 0 {
		return errNotDialled
	}
	d := ds[i]
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.extra >= maxMore {
		return fmt.Errorf("%d more channels are open already, the limit", maxMore)
	}
	d.extra++
	d.r.tasks.Go(func() {
		defer func() {
			d.mu.Lock()
			d.extra--
			d.mu.Unlock()
		}()
		d.oneMore(d.r.errands, class)
	})
	return nil
}

func (d *dialler) oneMore(ctx context.Context, class string) {
	c, err := d.dialler(class).Dial(ctx)
	if err != nil {
		d.r.log.Warn("another channel was asked for and could not be dialled", "address", d.addr, "class", class, "error", err)
		return
	}
	defer c.Close(nil)
	d.serve(ctx, c)
}
