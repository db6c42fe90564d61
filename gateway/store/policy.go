package store

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"time"

	"github.com/uptrace/bun"

	"sallyport/internal/wire"
)

// Policy is one version of a policy.
type Policy struct {
	bun.BaseModel `bun:"table:policy_versions"`
	Tenant        string `bun:",pk"`
	Name          string `bun:",pk"`
	Version       int64  `bun:",pk"`
	Type          string
	Digest        string // wire.SpecDigest of Spec
	Spec          string // JSON, the very bytes that travel
	CreatedAt     time.Time
	CreatedBy     string
}

// policyHead says which version of a policy is the current one.
type policyHead struct {
	bun.BaseModel `bun:"table:policies"`
	Tenant        string `bun:",pk"`
	Name          string `bun:",pk"`
	Current       int64  // 0: deleted
	Last          int64  // highest version ever made
}

// Policies lists the current versions by name.
func (r Queries) Policies(ctx context.Context, tenant string) ([]*Policy, error) {
	var out []*Policy
	err := currentPolicies(r.q.NewSelect().Model(&out)).Where("policy.tenant = ?", tenant).Scan(ctx)
	return out, err
}

// PolicyHeads is [Queries.Policies] without the specs, which may be megabytes
// each.
func (r Queries) PolicyHeads(ctx context.Context, tenant string) ([]*Policy, error) {
	var out []*Policy
	err := r.prepared.policyHeads.Select(ctx, r.q, &out, tenant)
	return out, err
}

func currentPolicies(q *bun.SelectQuery) *bun.SelectQuery {
	return q.Join("JOIN policies AS h ON h.tenant = policy.tenant AND h.name = policy.name AND h.current = policy.version").OrderExpr("policy.name")
}

// Policy returns the current version.
func (r Queries) Policy(ctx context.Context, tenant, name string) (*Policy, error) {
	p := new(Policy)
	err := currentPolicies(r.q.NewSelect().Model(p)).Where("policy.tenant = ?", tenant).Where("policy.name = ?", name).Scan(ctx)
	return p, notFound(err)
}

// PolicyVersions lists all versions, newest first; none if the policy was
// deleted.
func (r Queries) PolicyVersions(ctx context.Context, tenant, name string) ([]*Policy, error) {
	var out []*Policy
	err := r.q.NewSelect().Model(&out).
		Join("JOIN policies AS h ON h.tenant = policy.tenant AND h.name = policy.name AND h.current > 0").
		Where("policy.tenant = ?", tenant).Where("policy.name = ?", name).OrderExpr("policy.version DESC").Scan(ctx)
	return out, err
}

// Specs returns the specs with these digests. A digest that is nowhere is left
// out.
func (r Queries) Specs(ctx context.Context, digests []string) (map[string]json.RawMessage, error) {
	out := make(map[string]json.RawMessage, len(digests))
	if len(digests) == 0 {
		return out, nil
	}
	var rows []Policy
	err := r.q.NewSelect().Model(&rows).Column("digest", "spec").Where("digest IN (?)", bun.List(digests)).Scan(ctx)
	for _, p := range rows {
		out[p.Digest] = json.RawMessage(p.Spec)
	}
	return out, err
}

// Changes that PutPolicy and PutDeployment report.
const (
	Created   = "created"
	Changed   = "changed"
	Unchanged = "unchanged"
)

// PutPolicy makes a new version, unless type and spec are those of the current
// one. It sets p's Version, Digest and time.
func (tx *Tx) PutPolicy(ctx context.Context, p *Policy) (change string, err error) {
	p.Digest = wire.SpecDigest(json.RawMessage(p.Spec))
	change = Changed
	switch old, err := tx.Policy(ctx, p.Tenant, p.Name); {
	case errors.Is(err, ErrNotFound):
		change = Created
	case err != nil:
		return "", err
	case old.Type == p.Type && old.Digest == p.Digest:
		*p = *old
		return Unchanged, nil
	}
	h := policyHead{Tenant: p.Tenant, Name: p.Name, Current: 1, Last: 1}
	_, err = tx.q.NewInsert().Model(&h).On("CONFLICT (tenant, name) DO UPDATE").
		Set("current = policy_head.last + 1, last = policy_head.last + 1").Returning("current").Exec(ctx)
	if err != nil {
		return "", err
	}
	p.Version, p.CreatedAt, p.CreatedBy = h.Current, tx.now, ActorFrom(ctx).Who
	_, err = tx.q.NewInsert().Model(p).Exec(ctx)
	return change, err
}

// DeletePolicy deletes a policy; its versions stay for the record, and a new
// policy of that name goes on counting.
func (tx *Tx) DeletePolicy(ctx context.Context, tenant, name string) error {
	return one(tx.q.NewRaw("UPDATE policies SET current = 0 WHERE tenant = ? AND name = ? AND current > 0", tenant, name).Exec(ctx))
}

// Deployment puts policies on the nodes that a selector fits. One that was
// deleted stays until no node carries its policies any more.
type Deployment struct {
	bun.BaseModel `bun:"table:deployments"`
	Tenant        string `bun:",pk"`
	Name          string `bun:",pk"`
	Selector      string
	Policies      []string
	MinNodes      int
	MaxNodes      int      // 0: no limit
	Rollout       *Rollout // nil: none was asked for
	Revision      int64    // rises with each change of it or of its policies
	CreatedAt     time.Time
	UpdatedAt     time.Time
	DeletedAt     time.Time `bun:",nullzero"`
}

// Rollout says how a change shall spread over the nodes of a deployment.
type Rollout struct {
	MaxParallel string `json:"max_parallel,omitempty"` // a number of nodes, or a percentage
	MaxFailures int    `json:"max_failures"`
}

// Deployments lists deployments by name, those that are being taken back
// included.
func (r Queries) Deployments(ctx context.Context, tenant string) ([]*Deployment, error) {
	var out []*Deployment
	err := r.prepared.deployments.Select(ctx, r.q, &out, tenant)
	return out, err
}

// Deployment returns one of them.
func (r Queries) Deployment(ctx context.Context, tenant, name string) (*Deployment, error) {
	d := new(Deployment)
	err := r.q.NewSelect().Model(d).Where("tenant = ?", tenant).Where("name = ?", name).Scan(ctx)
	return d, notFound(err)
}

// PutDeployment creates or changes a deployment. With force it counts as
// changed even when it is not: one of its policies is.
func (tx *Tx) PutDeployment(ctx context.Context, d *Deployment, force bool) (change string, err error) {
	d.CreatedAt, d.UpdatedAt, d.Revision, d.DeletedAt = tx.now, tx.now, 1, time.Time{}
	old, err := tx.Deployment(ctx, d.Tenant, d.Name)
	switch {
	case errors.Is(err, ErrNotFound):
		_, err := tx.q.NewInsert().Model(d).Exec(ctx)
		return Created, err
	case err != nil:
		return "", err
	}
	change = Changed
	if !old.DeletedAt.IsZero() {
		change = Created
	} else if same(old, d) {
		if !force {
			*d = *old
			return Unchanged, nil
		}
		change = Unchanged // the document is; the revision rises all the same
	}
	d.CreatedAt, d.Revision = old.CreatedAt, old.Revision+1
	_, err = tx.q.NewUpdate().Model(d).WherePK().Exec(ctx)
	return change, err
}

func same(a, b *Deployment) bool {
	rollouts := a.Rollout == b.Rollout || a.Rollout != nil && b.Rollout != nil && *a.Rollout == *b.Rollout
	return rollouts && a.Selector == b.Selector && a.MinNodes == b.MinNodes && a.MaxNodes == b.MaxNodes && slices.Equal(a.Policies, b.Policies)
}

// DeleteDeployment marks a deployment as deleted.
func (tx *Tx) DeleteDeployment(ctx context.Context, tenant, name string) error {
	return one(tx.q.NewRaw("UPDATE deployments SET deleted_at = ?, updated_at = ?, revision = revision + 1 WHERE tenant = ? AND name = ? AND deleted_at IS NULL",
		tx.now, tx.now, tenant, name).Exec(ctx))
}

// PurgeDeployment forgets a deployment that was deleted.
func (tx *Tx) PurgeDeployment(ctx context.Context, tenant, name string) error {
	_, err := tx.q.NewRaw("DELETE FROM deployments WHERE tenant = ? AND name = ? AND deleted_at IS NOT NULL", tenant, name).Exec(ctx)
	return err
}
