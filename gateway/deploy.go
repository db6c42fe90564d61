package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

// pushTime bounds one push of a desired state: the node runs the validate and
// reload commands of its policies before it answers.
const pushTime = 2 * time.Minute

// replan computes the desired states of the nodes named, or of all, within a
// transaction. Its caller hands the plans to [Server.pushPlans] after the
// commit.
func (s *Server) replan(ctx context.Context, tx *store.Tx, ids ...wire.ID) ([]nodePlan, error) {
	rcps, err := tx.RCPs(ctx)
	if err != nil {
		return nil, fmt.Errorf("read rcps: %w", err)
	}
	p, err := newPlanner(ctx, tx, s.store.Installation().Generation, s.addresses(rcps), ids...)
	if err != nil {
		return nil, err
	}
	return p.plan(ctx)
}

// addresses says how nodes reach us, given the records of RCPs.
func (s *Server) addresses(rcps []*store.RCP) []wire.RCPAddresses {
	return waysIn(rcps, enrolledRCP, s.id.ID(), s.channelPublic())
}

// channelPublic is where RCPs and nodes dial this gateway; empty if it does
// not listen.
func (s *Server) channelPublic() string {
	if s.cfg.ChannelListen == "" {
		return ""
	}
	return s.cfg.ChannelPublic
}

// pushPlans wakes the nodes whose desired state changed; those that are not
// connected get it when they come.
func (s *Server) pushPlans(plans []nodePlan) {
	ids := make([]wire.ID, len(plans))
	for i, p := range plans {
		ids[i] = p.node.ID
	}
	s.fleet.ask(wantPush, ids...)
}

// changed computes desired states anew after something that they depend on has
// changed: the tags of some nodes, or, without ids, the set of RCPs or what a
// start finds.
func (s *Server) changed(ctx context.Context, ids ...wire.ID) error {
	plans, err := s.plan(ctx, ids...)
	if err == nil {
		s.pushPlans(plans)
	}
	return err
}

// plan computes desired states anew and stores those that have changed.
func (s *Server) plan(ctx context.Context, ids ...wire.ID) (plans []nodePlan, err error) {
	err = s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) (err error) {
		plans, err = s.replan(ctx, tx, ids...)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("compute desired states: %w", err)
	}
	return plans, nil
}

// reconcile follows each verified hello of a node: what it should have is
// computed if its own tags changed, and pushed if it has something else.
func (s *Server) reconcile(ctx context.Context, id wire.ID, hello *wire.Hello) error {
	if hello.Party.Role != wire.RoleNode {
		return nil
	}
	want, err := s.wanted(ctx, id)
	if err != nil || want == nil {
		return err
	}
	switch {
	case s.fleet.quarantined(id) != "":
		return s.refused(ctx, id, want, "quarantined", s.fleet.quarantined(id))
	case hello.Installation != "" && hello.Installation != s.store.Installation().UID:
		if hello.State == wire.StateLocked || hello.Mode == "readonly" || want.Refused == refusedLocked {
			return s.foreign(ctx, id, want)
		}
		// It refuses, and knows by that that it is locked: only then can it be unlocked there.
		// Once: the gateway that it obeys frees it, and would have to again and again.
		return s.push(ctx, id, want)
	case hello.Applied.Compare(want.Revision()) > 0:
		return s.ahead(ctx, id, want, hello.Applied)
	case hello.Mode == "readonly":
		return s.refused(ctx, id, want, "readonly", "its own configuration makes it read-only")
	case hello.Applied == want.Revision() && hello.State != wire.StateLocked: // by what came from elsewhere: ours frees it
		s.settleSoon()
		return s.refused(ctx, id, want, "", "")
	}
	return s.push(ctx, id, want)
}

// wanted returns what a node should have, computed anew where tags or name
// have changed since. It is nil for a node that is gone or revoked.
func (s *Server) wanted(ctx context.Context, id wire.ID) (*store.Desired, error) {
	d, err := s.store.Desired(ctx, id)
	switch {
	case errors.Is(err, store.ErrNotFound): // the first, for one that enrolled a moment ago
	case err != nil:
		return nil, err
	default:
		n, err := s.store.Node(ctx, id)
		if errors.Is(err, store.ErrNotFound) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		rows, err := s.store.NodeTags(ctx, id)
		if err != nil {
			return nil, err
		}
		fresh := d.Content.Name == n.Name && maps.Equal(d.Content.Tags, store.Effective(rows)) && d.Generation == s.store.Installation().Generation
		if fresh || !managed(n) {
			return d, nil
		}
	}
	plans, err := s.plan(ctx, id)
	if err != nil {
		return nil, err
	}
	own := slices.IndexFunc(plans, func(p nodePlan) bool { return p.node.ID == id })
	if own < 0 {
		if d, err = s.store.Desired(ctx, id); errors.Is(err, store.ErrNotFound) {
			return nil, nil
		}
		return d, err
	}
	s.pushPlans(slices.Concat(plans[:own], plans[own+1:])) // the caller pushes its own
	return plans[own].desired, nil
}

// maxSpecs bounds the specs that are kept in memory, in bytes.
const maxSpecs = 8 << 20

// specs keeps those that were sent last. A spec is known by its digest and never
// changes, and a change sends the same few to every node.
type specs struct {
	mu    sync.Mutex
	known map[string]json.RawMessage
	size  int
}

// get returns the specs with these digests; one that is nowhere is left out.
func (c *specs) get(ctx context.Context, db *store.DB, digests []string) (map[string]json.RawMessage, error) {
	out := make(map[string]json.RawMessage, len(digests))
	var missing []string
	c.mu.Lock()
	for _, d := range digests {
		if spec, ok := c.known[d]; ok {
			out[d] = spec
		} else {
			missing = append(missing, d)
		}
	}
	c.mu.Unlock()
	if len(missing) == 0 {
		return out, nil
	}
	found, err := db.Specs(ctx, missing)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for d, spec := range found {
		out[d] = spec
		if c.known == nil || c.size+len(spec) > maxSpecs {
			c.known, c.size = map[string]json.RawMessage{}, 0
		}
		if _, ok := c.known[d]; !ok {
			c.known[d], c.size = spec, c.size+len(spec)
		}
	}
	return out, nil
}

// document makes the signed document of a desired state.
func (s *Server) document(ctx context.Context, id wire.ID, d *store.Desired) (wire.Envelope, error) {
	doc := wire.Desired{
		Node: id, Installation: s.store.Installation().UID, Revision: d.Revision(), Issued: time.Now().UTC(),
		Name: d.Content.Name, Tags: d.Content.Tags, Policies: make([]wire.Policy, len(d.Content.Policies)), RCPs: d.Content.RCPs,
	}
	digests := make([]string, len(d.Content.Policies))
	for i, p := range d.Content.Policies {
		doc.Policies[i], digests[i] = p.Policy, p.Digest
	}
	var err error
	if doc.Specs, err = s.specs.get(ctx, s.store, digests); err != nil {
		return wire.Envelope{}, fmt.Errorf("read specs: %w", err)
	}
	for _, p := range doc.Policies {
		if _, ok := doc.Specs[p.Digest]; !ok {
			return wire.Envelope{}, fmt.Errorf("policy %s: its spec %s is not in the database", p.Name, p.Digest)
		}
	}
	return s.id.Sign(wire.TypeDesired, doc)
}

// push puts a desired state on a node and records what became of it.
func (s *Server) push(ctx context.Context, id wire.ID, d *store.Desired) error {
	ctx, cancel := context.WithTimeout(ctx, pushTime)
	defer cancel()
	env, err := s.document(ctx, id, d)
	if err != nil {
		return fmt.Errorf("push %s: %w", d.Revision(), err)
	}
	body, err := json.Marshal(env)
	if err != nil {
		return fmt.Errorf("push %s: %w", d.Revision(), err)
	}
	if len(body) > wire.MaxDesired {
		return s.refused(ctx, id, d, "too-large", fmt.Sprintf("its desired state has %d bytes, the limit is %d: fewer or smaller policies", len(body), wire.MaxDesired))
	}
	var result wire.DesiredResult
	err = s.sessions.Do(ctx, s.party(wire.RoleNode, id), func(ctx context.Context, c *conversation) error {
		result = wire.DesiredResult{}
		req, err := http.NewRequestWithContext(ctx, http.MethodPut, "https://"+c.party.ServerName()+wire.PathDesired, bytes.NewReader(body))
		if err != nil {
			return err
		}
		req.Header.Set("Content-Type", "application/json")
		res, err := c.RoundTrip(req)
		if err != nil {
			return err
		}
		defer func() { _ = res.Body.Close() }()
		if err := refusal(res); err != nil {
			return err
		}
		return wire.DecodeJSON(res.Body, wire.MaxHello, &result)
	})
	if err != nil {
		return fmt.Errorf("push %s: %w", d.Revision(), err)
	}
	if err := s.pushed(ctx, id, d, &result); err != nil || result.Refused != wire.RefusedFull {
		return err
	}
	return fmt.Errorf("push %s: %s", d.Revision(), wire.Quotable(result.Reason)) // which has it tried again
}

// pushed records a node's answer.
func (s *Server) pushed(ctx context.Context, id wire.ID, d *store.Desired, r *wire.DesiredResult) error {
	if r.Refused == "" && r.Applied != d.Revision() {
		r.Refused, r.Reason = "not-applied", fmt.Sprintf("it answered with revision %s", r.Applied)
	}
	if r.Refused == refusedLocked { // its revision is a number of the installation that it obeys
		return s.foreign(ctx, id, d)
	}
	if r.Applied.Compare(d.Revision()) > 0 {
		return s.ahead(ctx, id, d, r.Applied)
	}
	if r.Refused == "" {
		s.fleet.took(id, r) // at once: its signal is on the way
	}
	err := s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		if err := tx.SetApplied(ctx, id, r.Applied); err != nil {
			return err
		}
		if r.Refused != "" { // what it has is what it had
			return nil
		}
		return tx.SetPolicyStatus(ctx, id, r.Policies)
	})
	if errors.Is(err, store.ErrNotFound) {
		return nil // removed meanwhile
	}
	if err != nil {
		return fmt.Errorf("record the answer to %s: %w", d.Revision(), err)
	}
	s.settleSoon()
	return s.refused(ctx, id, d, r.Refused, r.Reason)
}

// refused records why a node does not take what it should have; an empty code
// says that it does.
func (s *Server) refused(ctx context.Context, id wire.ID, d *store.Desired, code, reason string) error {
	if d.Refused == code && d.Reason == reason {
		if code == "" { // the notice may be about an earlier revision
			s.fleet.setNotice(id, "")
		}
		return nil
	}
	err := s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		_, err := tx.SetRefused(ctx, id, code, clip(reason))
		return err
	})
	if err != nil {
		return fmt.Errorf("record a refusal: %w", err)
	}
	switch code {
	case "", refusedLocked, "readonly", "draining": // the node's state says it already
		s.fleet.setNotice(id, "")
	default:
		s.fleet.setNotice(id, fmt.Sprintf("it refuses revision %s (%s): %s", d.Revision(), code, clip(reason)))
	}
	return nil
}

// refusedLocked is the code of a node that obeys another installation.
const refusedLocked = "locked"

func (s *Server) foreign(ctx context.Context, id wire.ID, d *store.Desired) error {
	return s.refused(ctx, id, d, refusedLocked, "it obeys another installation")
}

// keyAhead pairs the events about nodes that are ahead of the database.
const keyAhead = "desired-ahead"

// ahead stops pushing to a node that has a higher revision than we ever made:
// this database is older than what the node has seen. It is not pushed to
// before the generation is raised.
func (s *Server) ahead(ctx context.Context, id wire.ID, d *store.Desired, applied wire.Revision) error {
	reason := fmt.Sprintf("it has revision %s and this gateway knows only %s: the database is older than the node's state, so nothing is pushed; "+
		"if this is a restored backup, restore it with `sallyport restore`, which starts a new generation", applied, d.Revision())
	s.fleet.setNotice(id, reason)
	if d.Refused == store.RefusedAhead {
		return nil
	}
	err := s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		if _, err := tx.SetRefused(ctx, id, store.RefusedAhead, reason); err != nil {
			return err
		}
		tx.Raise(store.Internal{NodeID: id, Severity: wire.SeverityMajor, Object: s.fleet.label(id), Key: keyAhead, Text: s.fleet.label(id) + ": " + reason})
		return nil
	})
	if err != nil {
		return fmt.Errorf("record that the node is ahead: %w", err)
	}
	return nil
}

// settlePause spaces the looks for deleted deployments that no node carries any
// more: each costs as much as there are nodes, so that the answers of many are
// looked at together, in at most a twentieth of the time.
const settlePause = 250 * time.Millisecond

// settleSoon has runSettle look.
func (s *Server) settleSoon() {
	select {
	case s.settling <- struct{}{}:
	default:
	}
}

// runSettle looks once at the start, and when nodes have answered.
func (s *Server) runSettle(ctx context.Context) error {
	s.settleSoon()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.settling:
		}
		began := time.Now()
		if err := s.settle(ctx); err != nil && ctx.Err() == nil {
			s.log.Error("deleted deployments not ended; it is tried again when a node has answered", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(max(settlePause, 20*time.Since(began))):
		}
	}
}

// settle ends the deployments that were deleted and that no node carries any
// more.
func (s *Server) settle(ctx context.Context) error {
	orphans, err := s.orphans(ctx, s.store.Queries)
	if err != nil || len(orphans) == 0 {
		return err
	}
	return s.store.Update(ctx, s.settleIn)
}

func (s *Server) settleIn(ctx context.Context, tx *store.Tx) error {
	orphans, err := s.orphans(ctx, tx.Queries)
	if err != nil {
		return err
	}
	for _, d := range orphans {
		if err := tx.PurgeDeployment(ctx, d.Tenant, d.Name); err != nil {
			return fmt.Errorf("end deployment %s: %w", d.Name, err)
		}
	}
	return nil
}

// orphans returns the deleted deployments that no node carries any more.
func (s *Server) orphans(ctx context.Context, q store.Queries) ([]*store.Deployment, error) {
	all, err := q.Deployments(ctx, store.DefaultTenant)
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(d *store.Deployment) bool { return d.DeletedAt.IsZero() })
	if len(all) == 0 {
		return nil, nil
	}
	v, err := s.deployView(ctx, q)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(d *store.Deployment) bool { return len(v.carriers(d)) > 0 }), nil
}
