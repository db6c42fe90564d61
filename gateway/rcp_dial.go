package gateway

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"sallyport/config"
	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/channel"
	"sallyport/internal/wire"
)

// redialMax bounds the wait between two attempts to dial an RCP: there are few
// of them, and each holds many nodes.
const redialMax = 20 * time.Second

// targetSweep is how often the list of addresses to dial is looked at although
// no record changed.
const targetSweep = time.Minute

// dialTarget is what makes a dialler another one.
type dialTarget struct {
	name, addr string
	id         wire.ID
}

// targets are the addresses to dial now.
//
// An RCP that waits for its first certificate, for a new one after its leaf
// expired, or to be enrolled anew with an open join code is dialled without its
// UUID: see dial. The dialler of one that is connected stays as it is.
func (l *links) targets(running []dialTarget) []dialTarget {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []dialTarget
	for _, r := range l.records {
		if r.Address == "" || r.Via != "" || r.State == api.RCPRevoked && !l.joining[r.Name] {
			continue
		}
		t := dialTarget{r.Name, r.Address, r.PartyID}
		if r.State == api.RCPPending || l.joining[r.Name] || !r.NotAfter.IsZero() && time.Now().After(r.NotAfter) {
			t.id = ""
		}
		if r.PartyID != "" && len(l.hops[r.PartyID]) > 0 {
			for _, old := range running {
				if old.name == t.name && old.addr == t.addr {
					t = old
				}
			}
		}
		out = append(out, t)
	}
	return out
}

// dial keeps one RCP connected until ctx ends.
//
// The record of an RCP that has not enrolled names no UUID: then the ordinary
// protocol is tried, for an RCP that has a certificate of ours already (named
// in the environment, or added anew after the database was lost), and every
// other time that of enrolment. Whoever proves the role rcp there is pinned.
// A pinned one is tried by the enrolment protocol while one side does not take
// the other's certificates: it has missed a change of the authority.
func (l *links) dial(ctx context.Context, t dialTarget) {
	log := l.s.log.With("rcp", t.name) // the dialler adds the address
	var attempts atomic.Int64
	var in atomic.Bool // by the ordinary protocol: further connections come by it too
	var missed channel.Fallback
	defer l.note(t.name, nil)
	d := &channel.Dialer{
		Addr: t.addr, Peer: channel.PeerDownstream, Identity: l.s.id, Carrier: string(l.s.cfg.Carrier), Class: channel.ClassAdmin, Backoff: channel.Backoff{Max: redialMax}, Log: log,
		OnState: func(st channel.State) {
			missed.Note(st)
			in.Store(st.Conn != nil && !st.Conn.Enrolling())
			if st.Err != nil && t.id != "" {
				l.s.fleet.linkError(t.id, st.Err.Error())
			}
			if st.Err != nil || st.Conn != nil {
				l.note(t.name, st.Err)
			}
		},
	}
	if t.id != "" {
		d.Expect, d.Enroll = &t.id, missed.Enroll
	} else {
		d.Enroll = func() bool { return !in.Load() && attempts.Add(1)%2 == 0 }
	}
	link := channel.NewLink(log)
	for ctx.Err() == nil {
		again, cancel := context.WithCancel(ctx)
		l.mu.Lock()
		l.retries[t.name] = cancel
		l.mu.Unlock()
		err := link.Run(again, d, func(ctx context.Context, c *channel.Conn) { l.serve(ctx, c, t.name, link) })
		if err != nil && again.Err() == nil {
			log.Error("cannot dial", "error", err)
			<-again.Done() // until the record or the operator changes something
		}
		cancel()
	}
}

// retry dials an RCP that is not connected at once, whatever the back-off says.
func (l *links) retry(r *store.RCP) {
	if h, ok := l.s.fleet.hop(r.PartyID); ok && h.Up {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if again := l.retries[r.Name]; again != nil {
		again()
	}
}

// note keeps the reason why a pending RCP cannot be connected where operators
// look for it; nil ends it.
func (l *links) note(name string, cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if cause == nil {
		delete(l.trouble, name)
		return
	}
	l.trouble[name] = clip(cause.Error())
}

// lastError is why an RCP cannot be connected; empty if it is, or was not tried.
func (l *links) lastError(r *store.RCP) string {
	if r.PartyID == "" {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.trouble[r.Name]
	}
	if h, ok := l.s.fleet.hop(r.PartyID); ok && !h.Up {
		return h.LastErr
	}
	return ""
}

// addConfiguredRCPs makes records of the RCPs that the environment names.
// Their name is their address.
func (s *Server) addConfiguredRCPs(ctx context.Context) error {
	return s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		list, err := tx.RCPs(ctx)
		if err != nil {
			return err
		}
		wanted := map[string]bool{}
		for _, e := range s.cfg.RCPs {
			wanted[e.Addr] = true
			if err := s.addConfiguredRCP(ctx, tx, list, e); err != nil {
				return fmt.Errorf("SALLYPORT_GATEWAY_RCPS: %s: %w", e, err)
			}
		}
		for _, r := range list {
			if r.Source == store.RCPConfigured && !wanted[r.Address] {
				tx.Audit(ctx, "rcp.remove", r.Name, "no longer in SALLYPORT_GATEWAY_RCPS")
				if err := tx.RemoveRCP(ctx, r.Name); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

func (s *Server) addConfiguredRCP(ctx context.Context, tx *store.Tx, list []*store.RCP, e config.Endpoint) error {
	id := wire.ID(e.ID)
	for _, r := range list {
		if r.Address != e.Addr && (id == "" || r.PartyID != id) {
			continue
		}
		if id != "" && r.PartyID != "" && r.PartyID != id {
			return fmt.Errorf("rcp %s at this address has the UUID %s; remove it first if it was replaced", r.Name, r.PartyID)
		}
		return nil // it has a record
	}
	r := &store.RCP{Name: e.Addr, PartyID: id, Address: e.Addr, Public: []string{e.Addr}, Source: store.RCPConfigured, State: api.RCPPending}
	if id != "" {
		r.State = api.RCPConnecting
	}
	tx.Audit(ctx, "rcp.add", r.Name, "from SALLYPORT_GATEWAY_RCPS")
	return tx.AddRCP(ctx, r)
}
