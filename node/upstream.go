package node

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/enroll"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// upstreams keeps an instance connected: one dialler for each address, all in
// parallel, so that one dead RCP never delays another.
type upstreams struct {
	in    *instance
	retry chan struct{} // holds a wake-up: what to dial may have changed

	mu       sync.Mutex
	diallers map[string]*dialler
	live     map[*channel.Conn]string // address, when we dialled
}

// dialler keeps one address connected.
type dialler struct {
	up     *upstreams
	addr   string
	expect wire.ID // empty: whoever has a fitting role
	cancel context.CancelFunc
	missed channel.Fallback
	state  channel.State // guarded by up.mu
}

func newUpstreams(in *instance) *upstreams {
	return &upstreams{in: in, retry: make(chan struct{}, 1), diallers: map[string]*dialler{}, live: map[*channel.Conn]string{}}
}

func (u *upstreams) poke() {
	select {
	case u.retry <- struct{}{}:
	default:
	}
}

// targets is what is to be dialled: address and, if the operator named one,
// the UUID that must answer.
func (u *upstreams) targets() map[string]wire.ID {
	out := map[string]wire.ID{}
	if configured := u.in.cfg.Upstreams.Dialled(); len(configured) > 0 {
		for _, e := range configured {
			out[e.Addr] = wire.ID(e.ID)
		}
		return out
	}
	for _, addr := range u.in.addresses.all(u.in.applicant.Addresses()) {
		out[addr] = ""
	}
	return out
}

// Run dials until ctx ends, and returns when every channel is gone.
func (u *upstreams) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		enrolment := u.in.applicant.Changed()
		u.reconcile(ctx, &wg)
		dropped, next, err := u.in.addresses.expire()
		if err != nil {
			u.in.log.Warn("keep the RCP list", "error", err)
		}
		if len(dropped) > 0 {
			u.in.raise(wire.Event{Severity: wire.SeverityWarning, Application: "sallyport", Object: "rcp-list", Key: "rcp-list",
				Text: "no RCP of the new list could be reached, the node goes on with the old one: " + strings.Join(dropped, ", ")})
			continue
		}
		if next == 0 {
			next = time.Hour
		}
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		case <-u.retry:
		case <-enrolment:
		}
		timer.Stop()
	}
}

// reconcile starts and stops diallers.
func (u *upstreams) reconcile(ctx context.Context, wg *sync.WaitGroup) {
	want := u.targets()
	u.mu.Lock()
	defer u.mu.Unlock()
	for addr, d := range u.diallers {
		if id, ok := want[addr]; !ok || id != d.expect {
			d.cancel()
			delete(u.diallers, addr)
		}
	}
	for addr, expect := range want {
		if u.diallers[addr] != nil {
			continue
		}
		d := &dialler{up: u, addr: addr, expect: expect, state: channel.State{Since: time.Now()}}
		u.diallers[addr] = d
		var dctx context.Context
		dctx, d.cancel = context.WithCancel(ctx)
		wg.Go(func() {
			defer d.cancel()
			d.run(dctx)
		})
	}
}

// run keeps the address connected. Before the first join code there is nobody
// to trust, so nobody is dialled.
func (d *dialler) run(ctx context.Context) {
	in := d.up.in
	for {
		changed := in.applicant.Changed()
		if in.applicant.Ready() == nil || in.applicant.Needed() {
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
	dial := &channel.Dialer{Addr: d.addr, Peer: channel.PeerUpstream, Identity: in.id, Carrier: string(in.cfg.Carrier), Log: in.log, OnState: d.note, Enroll: d.missed.Enroll, Elsewhere: d.elsewhere,
		Limits: channel.Limits{Streams: maxStreams}}
	if d.expect != "" {
		dial.Expect = &d.expect
	}
	err := dial.Run(ctx, func(ctx context.Context, c *channel.Conn) { d.up.serve(ctx, c, d.addr) })
	if ctx.Err() == nil {
		in.log.Error("dialler ended", "address", d.addr, "error", err)
	}
}

// elsewhere returns a channel with an RCP that another dialler holds, because
// the RCP has two addresses, or that the RCP dialled.
func (d *dialler) elsewhere(id wire.ID) *channel.Conn {
	d.up.mu.Lock()
	defer d.up.mu.Unlock()
	for c, addr := range d.up.live {
		if addr != d.addr && c.Peer().Party.ID == id && c.Err() == nil && !c.Enrolling() && !c.Draining() {
			return c
		}
	}
	return nil
}

// note follows the state. An alert from the other side means that our
// certificate is not accepted, which matters when there is a new join code.
func (d *dialler) note(s channel.State) {
	d.missed.Note(s)
	d.up.mu.Lock()
	before := d.state
	d.state = s
	d.up.mu.Unlock()
	if s.Err != nil && (before.Err == nil || before.Err.Error() != s.Err.Error()) {
		d.up.in.log.Warn("upstream cannot be reached", "address", d.addr, "error", s.Err, "failures", s.Failures)
	}
	switch {
	case s.Connected():
		d.up.in.applicant.Accepted(s.Conn.Enrolling())
	case channel.RefusesUs(s.Err):
		d.up.in.applicant.Refused(s.Err)
	}
}

// serve answers one channel until it ends, whoever dialled; addr is empty when
// the upstream did.
func (u *upstreams) serve(ctx context.Context, c *channel.Conn, addr string) {
	in := u.in
	log := in.log.With("upstream", c.Peer().String(), "address", c.RemoteAddr(), "carrier", c.Carrier())
	u.mu.Lock()
	u.live[c] = addr
	u.mu.Unlock()
	defer func() {
		u.mu.Lock()
		delete(u.live, c)
		u.mu.Unlock()
		in.changed()
	}()
	if addr != "" && !c.Enrolling() {
		if changed, err := in.addresses.reached(addr); err != nil {
			log.Warn("keep the RCP list", "error", err)
		} else if changed {
			u.poke()
		}
	}
	log.Info("upstream channel up", "dialled", c.Dialled(), "enrolling", c.Enrolling())
	in.changed()
	if c.Enrolling() {
		leave, when, left := enroll.LeaveFor, in.applicant.Another(), make(chan struct{})
		if in.applicant.Ready() == nil {
			leave, when = enroll.Leave, in.applicant.Decided()
		}
		go func() {
			defer close(left)
			leave(c.Done(), when, c.Close)
		}()
		defer func() { <-left }()
	}
	err := c.Serve(ctx, in.channelHandler(c))
	log.Info("upstream channel down", "reason", err)
}

// unlisted tells whether an address is of the join code alone.
func (u *upstreams) unlisted(addr string) bool {
	return len(u.in.cfg.Upstreams.Dialled()) == 0 && u.in.addresses.unlisted(addr)
}

// connected lists the addresses that certified channels were dialled to.
func (u *upstreams) connected() (addrs []string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for c, addr := range u.live {
		if addr != "" && !c.Enrolling() {
			addrs = append(addrs, addr)
		}
	}
	return addrs
}

// up counts certified channels.
func (u *upstreams) up() (n int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for c := range u.live {
		if !c.Enrolling() {
			n++
		}
	}
	return n
}

// all lists the channels that are up.
func (u *upstreams) all() []*channel.Conn {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Collect(maps.Keys(u.live))
}

// cut ends the channels of revoked peers, and all of them when we are revoked
// ourselves.
func (u *upstreams) cut(cause error, all bool) {
	u.mu.Lock()
	var conns []*channel.Conn
	for c := range u.live {
		if all || u.in.id.Revoked(c.Peer().Key) {
			conns = append(conns, c)
		}
	}
	u.mu.Unlock()
	for _, c := range conns {
		u.in.log.Warn("channel cut", "upstream", c.Peer().String(), "reason", cause)
		c.Close(cause)
	}
	u.in.lanes.cut(func(p identity.Peer) bool { return all || u.in.id.Revoked(p.Key) }, cause)
}

// ofJoinCode is said of an address that nobody but the join code names.
const ofJoinCode = "it is in the join code, and not in the gateway's list of RCPs: was that RCP removed?"

// status lists every address and everybody who has dialled us.
func (u *upstreams) status() []wire.UpstreamStatus {
	u.mu.Lock()
	defer u.mu.Unlock()
	out := []wire.UpstreamStatus{}
	for _, d := range u.diallers {
		s := wire.UpstreamStatus{Address: d.addr, ID: d.expect, Dialler: "us", State: "connecting", Since: d.state.Since}
		if c := d.state.Conn; c != nil {
			describe(&s, c)
		} else if c := d.state.Instead; c != nil && c.Err() == nil {
			describe(&s, c)
			if !c.Dialled() {
				s.Dialler = "them"
			}
		} else if d.state.Failures > 0 {
			s.State = "failed"
		}
		if d.state.Err != nil {
			s.Error = d.state.Err.Error()
			if u.unlisted(d.addr) {
				s.Error += "; " + ofJoinCode
			}
		}
		out = append(out, s)
	}
	for c := range u.live {
		if !c.Dialled() {
			s := wire.UpstreamStatus{Address: c.RemoteAddr(), Dialler: "them", Since: c.Since()}
			describe(&s, c)
			out = append(out, s)
		}
	}
	slices.SortFunc(out, func(a, b wire.UpstreamStatus) int { return strings.Compare(a.Address, b.Address) })
	return out
}

func describe(s *wire.UpstreamStatus, c *channel.Conn) {
	s.ID, s.Role, s.Carrier, s.RTT, s.State = c.Peer().Party.ID, c.Peer().Party.Role, c.Carrier(), c.RTT().Seconds(), "connected"
	if c.Enrolling() {
		s.State = "enrolling"
	}
}
