package gateway

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

// Keys of the gateway's own events: bad and good news with one key are a pair.
const (
	keyNodeState = "node-state"
	keyClockSkew = "clock-skew"
	keyRCPState  = "rcp-state/" // and the RCP's name
)

const (
	seenEvery  = 30 * time.Second // last_seen is written in batches
	maxChanges = 500              // transitions in one transaction
)

// persistPresence writes transitions as they come and last_seen in batches,
// until ctx ends; what is left then is written before it returns.
func (s *Server) persistPresence(ctx context.Context) error {
	batch := time.NewTicker(seenEvery)
	defer batch.Stop()
	for {
		withSeen := false
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
			defer cancel()
			return s.writePresence(last, true)
		case <-s.fleet.news:
		case <-batch.C:
			withSeen = true
		}
		if err := s.writePresence(ctx, withSeen); err != nil && ctx.Err() == nil {
			s.log.Error("presence not written; it is tried again", "error", err)
			select { // the database is in trouble: do not make it worse
			case <-ctx.Done():
			case <-time.After(time.Second):
				wake(s.fleet.news)
			}
		}
	}
}

func (s *Server) writePresence(ctx context.Context, withSeen bool) error {
	changes, last := s.fleet.takeChanges(withSeen)
	for len(changes) > 0 {
		n := min(len(changes), maxChanges)
		err := s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
			for _, c := range changes[:n] {
				if err := s.writeChange(ctx, tx, c); err != nil {
					return fmt.Errorf("%s %s: %w", c.Role, c.Name, err)
				}
			}
			return nil
		})
		if err != nil {
			s.fleet.restore(changes, last)
			return err
		}
		for _, c := range changes[:n] {
			s.log.Info("state changed", "party", c.Role, "id", c.ID, "name", c.Name, "from", c.From, "to", c.To, "reason", c.Reason)
		}
		changes = changes[n:]
	}
	nodes := make(map[wire.ID]time.Time, len(last))
	for id, v := range last {
		if v.Role == wire.RoleNode {
			nodes[id] = v.At
		}
	}
	if err := s.store.SetLastSeen(ctx, nodes); err != nil {
		s.fleet.restore(nil, last)
		return err
	}
	return nil
}

func (s *Server) writeChange(ctx context.Context, tx *store.Tx, c change) error {
	if c.Role == wire.RoleRCP {
		return s.writeRCPChange(ctx, tx, c)
	}
	if !c.Known {
		if c.To == wire.StateLocked {
			tx.Raise(store.Internal{NodeID: c.ID, Severity: wire.SeverityMajor, Object: "node " + c.Name, Key: keyNodeState,
				Text: fmt.Sprintf("node %s (%s) is locked: %s", c.Name, c.ID, c.Reason)})
		}
		return nil
	}
	revoked := c.To == wire.StateRevoked // the database said so first, and the node may have enrolled again since
	if !revoked {
		if stands, err := tx.SetNodePresence(ctx, c.ID, c.To, c.Reason); err != nil || !stands {
			return err
		}
	}
	for _, a := range c.Alarms {
		if revoked && a.Lost { // no wonder
			continue
		}
		in := store.Internal{NodeID: c.ID, Severity: wire.SeverityMajor, Object: "node " + c.Name, Key: keyNodeState,
			Text: fmt.Sprintf("node %s is %s: %s", c.Name, a.State, a.Reason)}
		if !a.Lost {
			in.Severity, in.Text = wire.SeverityNormal, fmt.Sprintf("node %s is up again (%s)", c.Name, a.State)
		}
		tx.Raise(in)
	}
	return nil
}

func (s *Server) writeRCPChange(ctx context.Context, tx *store.Tx, c change) error {
	r, err := tx.RCPByID(ctx, c.ID)
	if errors.Is(err, store.ErrNotFound) {
		return nil // of no record of ours: reported by another RCP
	}
	if err != nil {
		return err
	}
	if r.State == api.RCPRevoked || c.To == wire.StateRevoked { // as with nodes, what was seen before takes nothing back
		return nil
	}
	if err := tx.SetRCPState(ctx, r.Name, rcpState(c.To), c.Reason); err != nil {
		return err
	}
	for _, a := range c.Alarms {
		in := store.Internal{Severity: wire.SeverityCritical, Object: "rcp " + r.Name, Key: keyRCPState + r.Name,
			Text: fmt.Sprintf("rcp %s failed: %s", r.Name, a.Reason)}
		if !a.Lost {
			in.Severity, in.Text = wire.SeverityNormal, fmt.Sprintf("rcp %s recovered", r.Name)
		}
		tx.Raise(in)
	}
	return nil
}

// rcpState is the word of the API for the state of an RCP.
func rcpState(s wire.NodeState) string {
	switch s {
	case wire.StatePending:
		return api.RCPConnecting
	case wire.StateDown, wire.StateUnreachable:
		return api.RCPFailed
	case wire.StateDraining:
		return api.RCPDraining
	case wire.StateRevoked:
		return api.RCPRevoked
	}
	return api.RCPConnected
}

// standsOpen is the severity of the event of ours with a key that nobody has closed;
// normal without one.
func (s *Server) standsOpen(ctx context.Context, key string) (wire.Severity, error) {
	open, err := s.store.Events(ctx, store.EventFilter{Own: true, Key: key, State: api.EventOpen, Limit: 1})
	if err != nil || len(open) == 0 {
		return wire.SeverityNormal, err
	}
	return open[0].Severity, nil
}

// lostNodes returns the nodes whose last word to the operator was bad: the
// pair is closed when they are back.
func (s *Server) lostNodes(ctx context.Context) (map[wire.ID]bool, error) {
	events, err := s.store.Events(ctx, store.EventFilter{Own: true, Key: keyNodeState, State: api.EventOpen, Limit: 1_000_000})
	if err != nil {
		return nil, err
	}
	lost := make(map[wire.ID]bool)
	for _, e := range events {
		if e.Severity != wire.SeverityNormal {
			lost[e.NodeID] = true
		}
	}
	return lost, nil
}

// raiseSkew tells that a party's clock went wrong, or is right again.
func (s *Server) raiseSkew(ctx context.Context, id wire.ID, skew time.Duration) error {
	in := store.Internal{NodeID: id, Severity: wire.SeverityWarning, Object: s.fleet.label(id), Key: keyClockSkew,
		Text: fmt.Sprintf("the clock of %s is off by %s", s.fleet.label(id), skew.Round(time.Second))}
	if skew.Abs() <= maxSkew {
		in.Severity, in.Text = wire.SeverityNormal, fmt.Sprintf("the clock of %s is right again", s.fleet.label(id))
	}
	return s.store.Raise(ctx, in)
}
