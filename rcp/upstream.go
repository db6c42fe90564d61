package rcp

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/time/rate"

	"sallyport/config"
	"sallyport/internal/channel"
	"sallyport/internal/enroll"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// maxPeersStreams is how many peers streams one channel may hold open: an
// honest gateway has one, and another for a moment when it resumes.
const maxPeersStreams = 4

var errNotAdmitted = errors.New("wrong side of this RCP")

// admit decides who may be what on one of our ports, after the handshake has
// proved who it is. Gateways may ask. An RCP may ask only when our
// configuration names its UUID as upstream; otherwise an RCP that dials us is
// downstream, so that a sibling whose key was stolen gains nothing. On the
// enrolment protocols a pending party waits for us (it is downstream), and a
// certified one comes for us, who are pending ourselves.
func (r *Relay) admit(side config.Side) func(identity.Peer, string) error {
	return func(p identity.Peer, alpn string) error {
		switch {
		case p.Pending && side == config.Upstream:
			return fmt.Errorf("%w: this port is for upstreams", errNotAdmitted)
		case p.Pending:
			return nil // limited in number where it is kept; nothing but its key can be reached
		case channel.EnrollALPN(alpn) && side == config.Downstream:
			return fmt.Errorf("%w: this port is for downstreams", errNotAdmitted)
		case channel.EnrollALPN(alpn), alpn == channel.ALPNUp, alpn == channel.ALPNUpBulk, alpn == channel.ALPNUpLane, alpn == channel.ALPNUpH3:
			return r.mayBeUpstream(p)
		}
		return nil
	}
}

func (r *Relay) mayBeUpstream(p identity.Peer) error {
	switch p.Party.Role {
	case wire.RoleGateway:
		return nil
	case wire.RoleRCP:
		if slices.Contains(r.upstreamIDs, p.Party.ID) {
			return nil
		}
		err := fmt.Errorf("%w: %s asks to be our upstream; SALLYPORT_RCP_UPSTREAMS does not name its UUID", errNotAdmitted, p.Party)
		r.metrics.refuse(err)
		return err
	}
	err := fmt.Errorf("%w: a %s is never upstream", errNotAdmitted, p.Party.Role)
	r.metrics.refuse(err)
	return err
}

// upstreams are the live channels whose other side may ask us.
type upstreams struct {
	mu   sync.Mutex
	live map[*channel.Conn]struct{}
}

func (u *upstreams) add(c *channel.Conn) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.live[c] = struct{}{}
}

func (u *upstreams) remove(c *channel.Conn) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.live, c)
}

func (u *upstreams) all() (out []*channel.Conn) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for c := range u.live {
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b *channel.Conn) int { return a.Since().Compare(b.Since()) })
	return out
}

// roles lists the role of each certified upstream once, however many channels
// it has.
func (u *upstreams) roles() (roles []wire.Role) {
	seen := map[wire.ID]bool{}
	for _, c := range u.all() {
		if p := c.Peer().Party; !seen[p.ID] {
			seen[p.ID] = true
			roles = append(roles, p.Role)
		}
	}
	return roles
}

// serveUpstream answers one upstream channel until it ends.
func (r *Relay) serveUpstream(ctx context.Context, c *channel.Conn) {
	log := r.log.With("upstream", c.Peer().String(), "address", c.RemoteAddr(), "carrier", c.Carrier())
	r.upstreams.add(c)
	defer r.upstreams.remove(c)
	if r.id.Ended(c.Peer()) { // the set arrived between the handshake and here
		c.Close(identity.ErrRevoked)
	}
	log.Info("upstream channel up", "dialled", c.Dialled(), "enrolling", c.Enrolling())
	if c.Enrolling() {
		leave, when, left := enroll.LeaveFor, r.applicant.Another(), make(chan struct{})
		if _, certified := r.id.Party(); certified && !r.id.OutOfTime() {
			leave, when = enroll.Leave, r.applicant.Decided()
		}
		go func() {
			defer close(left)
			leave(c.Done(), when, c.Close)
		}()
		defer func() { <-left }()
	}
	err := c.Serve(ctx, r.upstreamHandler(c))
	log.Info("upstream channel down", "reason", err)
}

// upstreamHandler is everything that an upstream peer can ask. While either
// side enrols, that is our own key and nothing else.
func (r *Relay) upstreamHandler(c *channel.Conn) http.Handler {
	generation := r.generation.Add(1)
	var streams atomic.Int32
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+wire.PathPeers, func(w http.ResponseWriter, req *http.Request) {
		defer streams.Add(-1)
		if streams.Add(1) > maxPeersStreams {
			channel.Refuse(w, http.StatusTooManyRequests, "too many peers streams on this channel")
			return
		}
		err := r.table.servePeers(w, req, wire.PeersHello{
			ID: r.id.ID(), Program: r.cfg.Version, Versions: wire.OwnVersions, Boot: r.boot, Generation: generation,
		})
		r.log.Debug("peers stream ended", "upstream", c.Peer().String(), "reason", err)
	})
	mux.HandleFunc("POST "+wire.PathDrain, r.takeDrain)
	mux.HandleFunc("PUT "+wire.PathRevocations, r.takeRevocations)
	pace := rate.NewLimiter(laneRate, laneBurst)
	mux.HandleFunc("POST "+wire.PathLanes, func(w http.ResponseWriter, req *http.Request) { r.takeLane(w, req, c, pace) })
	mux.HandleFunc("POST "+wire.PathChannels, func(w http.ResponseWriter, req *http.Request) { r.takeChannels(w, req, c) })
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		switch {
		case req.Method == http.MethodConnect:
			r.connect(w, req, c)
		case c.Enrolling():
			channel.Refuse(w, http.StatusForbidden, "this channel is for enrolment: only "+wire.PendingAuthority(r.id.KeyHash())+" can be reached")
		default:
			mux.ServeHTTP(w, req)
		}
	})
}

// takeDrain: the upstream is about to end this channel. The channel itself
// sees to its replacement when we dialled it.
func (r *Relay) takeDrain(w http.ResponseWriter, req *http.Request) {
	var d wire.Drain
	if err := wire.DecodeJSON(req.Body, wire.MaxEnrollBody, &d); err != nil {
		channel.Refuse(w, http.StatusBadRequest, "drain: "+err.Error())
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// takeRevocations keeps a set signed by the CA, whoever brought it, and cuts
// whom it names before it answers.
func (r *Relay) takeRevocations(w http.ResponseWriter, req *http.Request) {
	var env wire.Envelope
	if err := wire.DecodeJSON(req.Body, wire.MaxRevocations, &env); err != nil {
		channel.Refuse(w, http.StatusBadRequest, "revocations: "+err.Error())
		return
	}
	newer, err := r.id.ApplyRevocations(env)
	switch {
	case errors.Is(err, identity.ErrOlder):
		channel.Refuse(w, http.StatusConflict, err.Error())
		return
	case err != nil:
		r.cutRevoked() // it may be in force although it could not be written
		r.log.Error("a revocation set was not taken", "error", err)
		channel.Refuse(w, http.StatusUnprocessableEntity, err.Error())
		return
	case newer:
		r.cutRevoked()
	}
	w.WriteHeader(http.StatusNoContent)
}

// cutRevoked ends every channel of a party whose key is revoked.
func (r *Relay) cutRevoked() {
	number, _ := r.id.Revocations()
	gone := func(p identity.Peer) bool { return r.id.Revoked(p.Key) }
	for _, a := range r.roster.all(gone) {
		r.log.Warn("channel cut: its key is revoked", "peer", a.peer.String(), "set", number)
		r.metrics.refuse(identity.ErrRevoked)
		a.conn.Close(identity.ErrRevoked)
	}
	for _, c := range r.upstreams.all() {
		if gone(c.Peer()) {
			r.log.Warn("channel cut: its key is revoked", "upstream", c.Peer().String(), "set", number)
			r.metrics.refuse(identity.ErrRevoked)
			c.Close(identity.ErrRevoked)
		}
	}
	if n := r.lanes.cut(gone, identity.ErrRevoked); n > 0 {
		r.log.Warn("lanes cut: a key is revoked", "lanes", n, "set", number)
	}
}

// enforceRevocations follows the set that we hold: it cuts whom it names, also
// when it came in our own session or with a grant, and hands it to the RCPs
// below us.
func (r *Relay) enforceRevocations(ctx context.Context) error {
	var told int64
	for {
		changed := r.id.Changed()
		if number, _ := r.id.Revocations(); number > told {
			told = number
			r.cutRevoked()
			for _, a := range r.roster.all(func(p identity.Peer) bool { return !p.Pending && p.Party.Role == wire.RoleRCP }) {
				r.tasks.Go(func() {
					if err := r.tellRevocations(ctx, a); err != nil {
						r.log.Warn("revocations not delivered", "peer", a.peer.String(), "error", err)
					}
				})
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// takeChannels dials another channel of a class to an upstream that cannot
// dial us.
func (r *Relay) takeChannels(w http.ResponseWriter, req *http.Request, c *channel.Conn) {
	var more wire.MoreChannels
	if err := wire.DecodeJSON(req.Body, wire.MaxEnrollBody, &more); err != nil {
		channel.Refuse(w, http.StatusBadRequest, "channels: "+err.Error())
		return
	}
	switch more.Class {
	case channel.ClassAdmin, channel.ClassSession, channel.ClassBulk:
	default:
		channel.Refuse(w, http.StatusBadRequest, fmt.Sprintf("channels: unknown class %q", wire.Quotable(more.Class)))
		return
	}
	if err := r.diallers.more(c, more.Class); err != nil {
		channel.Refuse(w, http.StatusConflict, err.Error())
		return
	}
	w.WriteHeader(http.StatusAccepted)
}
