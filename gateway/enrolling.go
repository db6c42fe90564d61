package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/bus"
	"sallyport/internal/identity"
	"sallyport/internal/session"
	"sallyport/internal/wire"
)

// errEnrolled ends the channel of a party that has its certificate.
var errEnrolled = errors.New("the party is enrolled: it is expected back with its certificate")

// wireEnrolment gives the enrolment its ways to the rest of the gateway.
func (s *Server) wireEnrolment() {
	s.enrolment = &enrolment{
		store: s.store, ca: s.ca, id: s.id, log: s.log, public: s.channelPublic(), grace: time.Duration(s.cfg.RenewalGrace),
		attempts:  make(map[wire.KeyHash]*attempt),
		open:      s.openEnrolment,
		keepPlace: s.keepPlace,
		changed:   s.partyChanged,
		talk: func(ctx context.Context, p wire.Party, f func(context.Context, caller) error) error {
			return s.sessions.Do(ctx, p, func(ctx context.Context, c *conversation) error { return f(ctx, c.call) })
		},
		lastWord: func(ctx context.Context, p wire.Party, f func(context.Context, caller) error) error {
			return s.sessions.lastWord(ctx, p, func(ctx context.Context, c *conversation) error { return f(ctx, c.call) })
		},
		reach: func(ctx context.Context, node wire.ID, boot string, f func(context.Context, caller) error) error {
			return s.clones.reach(ctx, node, boot, func(ctx context.Context, c *conversation) error { return f(ctx, c.call) })
		},
		first:   s.firstVisit,
		returns: s.fleet.returns,
		push:    func() { s.fleet.askAll(wantPush, wire.RoleNode) },
		ways:    s.pendingAt,
		release: func(key wire.KeyHash) {
			s.links.mu.Lock()
			p := s.links.pending[key]
			s.links.mu.Unlock()
			if p != nil {
				p.conn.Close(errEnrolled)
			}
		},
		look: func(key wire.KeyHash) {
			select {
			case s.fleet.arrived <- key:
			default: // the sweep finds it
			}
		},
	}
	s.hooks.pending = s.enrolment.pending
	s.hooks.met = append(s.hooks.met, s.enrolment.deliverTrust, s.enrolment.deliverRevocations, s.enrolment.renewDue)
}

// openEnrolment opens an enrolment session with whoever holds the key, by hop if
// it is there; rcp names the RCP by way of which it goes.
func (s *Server) openEnrolment(ctx context.Context, key wire.KeyHash, hop wire.ID) (c endToEnd, rcp string, err error) {
	return openPending(ctx, key, s.pendingWays(key, hop), func(ctx context.Context, stream net.Conn) (endToEnd, error) {
		return session.DialEnroll(ctx, stream, s.id, key)
	})
}

// partyChanged is called after a party was made, replaced or revoked: what is
// open with its old key ends.
func (s *Server) partyChanged(ctx context.Context, role wire.Role, id wire.ID) {
	var err error
	if role == wire.RoleRCP {
		err = s.links.reload(ctx)
		s.bus.Wake(bus.RCPs) // a removed one is dialled no more, and nodes hear of it
	} else {
		err = s.nodeChanged(ctx, id)
	}
	if err != nil && ctx.Err() == nil {
		s.log.Error("a change is not in force here before the next start", "party", role, "id", id, "error", err)
	}
	s.cutParty(id)
	s.links.cut(id, identity.ErrRevoked)
}

func (s *Server) createJoin(ctx context.Context, in api.CreateJoin) (api.CreatedJoin, error) {
	if in.Role == api.JoinEST && in.Name == s.cfg.DoorsName {
		return api.CreatedJoin{}, api.NewProblem(api.CodeInvalid, fmt.Sprintf("%s is the name of the doors themselves, which nobody else gets", in.Name))
	}
	return s.enrolment.createJoin(ctx, in)
}

func (s *Server) pin() api.Pin {
	return api.Pin{TrustDomain: s.id.TrustDomain(), Root: wire.KeyOf(s.ca.Root()).Fingerprint()}
}

// revokeStranger ends the trust in a node that has no row here: one that enrolled
// after the backup which was restored, perhaps as nobody should have. Its key is
// the one that it proves in a session.
func (s *Server) revokeStranger(ctx context.Context, id wire.ID, name string) (int64, error) {
	party := wire.Party{Role: wire.RoleNode, ID: id, TrustDomain: s.id.TrustDomain()}
	var peer identity.Peer
	err := s.sessions.Do(ctx, party, func(_ context.Context, c *conversation) error {
		p, ok := c.rt.(interface{ Peer() identity.Peer })
		if !ok {
			return fmt.Errorf("%w: its key is not known", ErrNotConnected)
		}
		peer = p.Peer()
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("revoke %s: %w", name, err)
	}
	return s.enrolment.revokeUnknown(ctx, party, name, peer)
}
