package store

import (
	"context"
	"encoding/json"
	"strings"
	"time"

	"github.com/uptrace/bun"

	"sallyport/gateway/bus"
	"sallyport/internal/wire"
)

// Desired is what one node should have. The signed document is made from
// Content, the revision, and the specs that Content names by digest.
type Desired struct {
	bun.BaseModel `bun:"table:desired"`
	NodeID        wire.ID `bun:",pk"`
	Generation    int64
	N             int64
	Digest        string // of Content
	Content       DesiredContent
	ChangedAt     time.Time
	Refused       string // why the node refused the last push: a code of wire.DesiredResult, or RefusedAhead
	Reason        string
}

// RefusedAhead says that a node has a higher revision than this database: a
// restored backup. Nothing is pushed to it.
const RefusedAhead = "ahead"

// DesiredContent is everything of a desired state but revision, time and specs.
type DesiredContent struct {
	Name     string              `json:"name"`
	Tags     map[string]string   `json:"tags,omitempty"`
	Policies []DesiredPolicy     `json:"policies"`
	RCPs     []wire.RCPAddresses `json:"rcps,omitempty"`
}

// DesiredPolicy is one policy with the deployments that bring it.
type DesiredPolicy struct {
	wire.Policy
	Deployments []string `json:"deployments"`
}

// Revision orders the desired states of a node.
func (d *Desired) Revision() wire.Revision {
	return wire.Revision{Generation: d.Generation, N: d.N}
}

// Desired returns what a node should have; [ErrNotFound] before the first
// state was made.
func (r Queries) Desired(ctx context.Context, id wire.ID) (*Desired, error) {
	return row[Desired](ctx, r, r.prepared.desired, id)
}

// AllDesired returns what every node should have.
func (r Queries) AllDesired(ctx context.Context) (map[wire.ID]*Desired, error) {
	var rows []*Desired
	if err := r.q.NewSelect().Model(&rows).Scan(ctx); err != nil {
		return nil, err
	}
	out := make(map[wire.ID]*Desired, len(rows))
	for _, d := range rows {
		out[d.NodeID] = d
	}
	return out, nil
}

// PutDesired stores a new desired state under the next revision, and sets it
// in d.
func (tx *Tx) PutDesired(ctx context.Context, d *Desired) error {
	n, err := tx.next(ctx, "revision", 1)
	if err != nil {
		return err
	}
	d.Generation, d.N, d.ChangedAt = tx.db.inst.Generation, n, tx.now
	_, err = tx.prepared.putDesired.Exec(ctx, tx.q, d)
	tx.Wake(bus.Targets)
	return err
}

// targetsOf finds the targets in a stored content. Most nodes have none, and
// their content is not parsed.
func targetsOf(content string) (map[string]string, error) {
	if !strings.Contains(content, `"type":"`+wire.PolicyTarget+`"`) {
		return nil, nil
	}
	var c DesiredContent
	if err := json.Unmarshal([]byte(content), &c); err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, p := range c.Policies {
		if p.Type == wire.PolicyTarget {
			out[p.Name] = p.Digest
		}
	}
	return out, nil
}

// SetRefused writes why a node refuses what it should have; empty: it does not.
func (tx *Tx) SetRefused(ctx context.Context, id wire.ID, refused, reason string) (changed bool, err error) {
	n, err := affected(tx.q.NewRaw("UPDATE desired SET refused = ?, reason = ? WHERE node_id = ? AND (refused <> ? OR reason <> ?)",
		refused, reason, id, refused, reason).Exec(ctx))
	return n > 0, err
}

// SetApplied writes the revision that a node said it has applied.
func (tx *Tx) SetApplied(ctx context.Context, id wire.ID, rev wire.Revision) error {
	return one(tx.prepared.setApplied.Exec(ctx, tx.q, rev.Generation, rev.N, id))
}

// PolicyStatus is what a node said became of one policy.
type PolicyStatus struct {
	bun.BaseModel `bun:"table:policy_status"`
	NodeID        wire.ID `bun:",pk"`
	Policy        string  `bun:",pk"`
	Type          string
	Digest        string
	State         string
	Error         string
	Since         time.Time
}

// PolicyStatus returns what one node said of its policies.
func (r Queries) PolicyStatus(ctx context.Context, id wire.ID) ([]PolicyStatus, error) {
	var out []PolicyStatus
	err := r.prepared.statuses.Select(ctx, r.q, &out, id)
	return out, err
}

// AllPolicyStatus returns what every node said.
func (r Queries) AllPolicyStatus(ctx context.Context) (map[wire.ID]map[string]PolicyStatus, error) {
	var rows []PolicyStatus
	if err := r.q.NewSelect().Model(&rows).Scan(ctx); err != nil {
		return nil, err
	}
	out := map[wire.ID]map[string]PolicyStatus{}
	for _, s := range rows {
		if out[s.NodeID] == nil {
			out[s.NodeID] = map[string]PolicyStatus{}
		}
		out[s.NodeID][s.Policy] = s
	}
	return out, nil
}

// Limits on what a node may say of a policy, in bytes, and on how many.
const (
	maxStatusText = 4 << 10
	maxStatuses   = 4096
)

// SetPolicyStatus replaces what a node said of its policies.
func (tx *Tx) SetPolicyStatus(ctx context.Context, id wire.ID, statuses []wire.PolicyStatus) error {
	old, err := tx.PolicyStatus(ctx, id)
	if err != nil {
		return err
	}
	before := make(map[string]PolicyStatus, len(old))
	for _, s := range old {
		before[s.Policy] = s
	}
	for i, s := range statuses {
		if i == maxStatuses {
			break
		}
		row := PolicyStatus{NodeID: id, Policy: clip(s.Name), Type: clip(s.Type), Digest: clip(s.Digest), State: clip(s.State), Error: clip(s.Error),
			Since: s.Since.UTC().Truncate(time.Microsecond)}
		was, ok := before[row.Policy]
		delete(before, row.Policy)
		was.Since = was.Since.UTC()
		if ok && was == row {
			continue
		}
		if row.Type == wire.PolicyTarget || was.Type == wire.PolicyTarget {
			tx.Wake(bus.Targets)
		}
		if _, err := tx.prepared.putStatus.Exec(ctx, tx.q, &row); err != nil {
			return err
		}
	}
	for name, was := range before {
		if was.Type == wire.PolicyTarget {
			tx.Wake(bus.Targets)
		}
		if _, err := tx.q.NewRaw("DELETE FROM policy_status WHERE node_id = ? AND policy = ?", id, name).Exec(ctx); err != nil {
			return err
		}
	}
	return nil
}

func clip(s string) string { return s[:min(len(s), maxStatusText)] }

// DesiredRevisions returns the revision that each node should have.
func (r Queries) DesiredRevisions(ctx context.Context) (map[wire.ID]wire.Revision, error) {
	var rows []*Desired
	if err := r.q.NewSelect().Model(&rows).Column("node_id", "generation", "n").Scan(ctx); err != nil {
		return nil, err
	}
	out := make(map[wire.ID]wire.Revision, len(rows))
	for _, d := range rows {
		out[d.NodeID] = d.Revision()
	}
	return out, nil
}
