package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"sallyport/gateway/store"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// visitTime bounds one visit: hello, and what follows from it.
const visitTime = 2 * time.Minute

// party names a member of our trust domain.
func (s *Server) party(role wire.Role, id wire.ID) wire.Party {
	return wire.Party{Role: role, ID: id, TrustDomain: s.id.TrustDomain()}
}

// visit reads the hello of a party in a verified session, and does what
// follows from it.
func (s *Server) visit(ctx context.Context, t task) (again want, delay time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, visitTime)
	defer cancel()
	if hello := s.fleet.heardBefore(t); hello != nil && s.meet(ctx, t, hello) == nil {
		return 0, 0 // a signal says what came of it
	}
	do := s.sessions.Do
	if t.wants&wantProve != 0 {
		do = s.sessions.fresh
	}
	var hello wire.Hello
	err := do(ctx, s.party(t.role, t.id), func(ctx context.Context, c *conversation) error {
		greet := func() (*greeting, error) { return c.greet(ctx, nil) }
		if t.role == wire.RoleNode && t.known {
			greet = func() (*greeting, error) { return s.clones.greet(ctx, t.id, c) }
		}
		a, err := greet()
		if err != nil {
			return err
		}
		hello = a.hello
		held, err := s.heard(ctx, t, &hello, a.skew)
		if err != nil {
			return err
		}
		if p, ok := c.rt.(interface{ Peer() identity.Peer }); ok && held != "" && held != p.Peer().Key && s.enrolment != nil {
			if err := s.enrolment.follow(ctx, p.Peer()); err != nil { // it is tried again with the next
				s.log.Warn("the key of a party is not taken over", "error", err)
			}
		}
		return nil
	})
	if err != nil {
		s.metrics.visits.WithLabelValues("hello", "failed").Inc()
		if ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded) {
			s.fleet.unproven(t.id, err)
			s.log.Debug("visit failed", "party", t.role, "id", t.id, "name", t.name, "error", err)
		}
		return 0, 0
	}
	s.metrics.visits.WithLabelValues("hello", "ok").Inc()
	if !t.known {
		return 0, 0
	}
	if _, ok := hello.Versions.Common(wire.OwnVersions); !ok {
		return 0, 0
	}
	if err := s.meet(ctx, t, &hello); err != nil && ctx.Err() == nil {
		s.log.Warn("work after a hello failed; it is tried again with the next", "party", t.role, "id", t.id, "name", t.name, "error", err)
		again, delay = wantPush|wantHello, s.fleet.t.retryMax
	}
	return again, delay
}

// meet does what follows from a verified hello.
func (s *Server) meet(ctx context.Context, t task, hello *wire.Hello) error {
	var errs []error
	for _, met := range s.hooks.met {
		errs = append(errs, met(ctx, t.id, hello))
	}
	return errors.Join(errs...)
}

// heard takes over a verified hello.
func (s *Server) heard(ctx context.Context, t task, hello *wire.Hello, skew time.Duration) (held wire.KeyHash, err error) {
	if held, err = s.record(ctx, t, hello, skew); err != nil {
		return "", err
	}
	if s.fleet.verifiedHello(t.id, t.role, *hello, skew) && t.known {
		if err := s.raiseSkew(ctx, t.id, skew); err != nil {
			return "", err
		}
	}
	if t.role == wire.RoleNode && hello.Outbox.Depth > 0 {
		s.fleet.ask(wantOutbox, t.id)
	}
	return held, nil
}

// words is a hello whose words fit into a list that people read: a party may
// fill all that a hello can hold with its version.
func words(hello *wire.Hello) *wire.Hello {
	h := *hello
	for _, s := range []*string{&h.Boot, &h.Program, &h.Name, &h.Mode, &h.Installation, &h.OS, &h.Arch, &h.Outbox.Spool, &h.Salt} {
		*s = clip(*s)
	}
	return &h
}

// record writes what a hello says into the database, where held is the party's key.
func (s *Server) record(ctx context.Context, t task, hello *wire.Hello, skew time.Duration) (held wire.KeyHash, err error) {
	if !t.known {
		return "", nil
	}
	said := words(hello)
	err = s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		if t.role == wire.RoleRCP {
			r, err := tx.RCPByID(ctx, t.id)
			if err != nil {
				return err
			}
			held = r.KeyHash
			return tx.SetRCPSeen(ctx, r.Name, said.Program, hello.NotAfter, hello.RenewAfter, skew)
		}
		n, err := tx.RecordHello(ctx, said, skew)
		if err != nil {
			return err
		}
		held = n.KeyHash
		return nil
	})
	if errors.Is(err, store.ErrNotFound) {
		return "", nil // removed a moment ago
	}
	if err != nil {
		return "", fmt.Errorf("record hello of %s %s: %w", t.role, t.name, err)
	}
	return held, nil
}

// ping measures the round trip of a small request in a session.
func (c *conversation) ping(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	err := c.call(ctx, http.MethodPost, wire.PathEcho, "sallyport", nil, wire.MaxEnrollBody)
	return time.Since(began), err
}
