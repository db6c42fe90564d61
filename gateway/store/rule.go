package store

import (
	"context"
	"time"

	"github.com/uptrace/bun"

	"sallyport/internal/wire"
)

// Rule is a rule by which certificate requests are granted. Spec is JSON.
type Rule struct {
	bun.BaseModel `bun:"table:rules"`
	Tenant        string `bun:",pk"`
	Name          string `bun:",pk"`
	Spec          string
	Granted       int64     // requests that it let in
	GrantedAt     time.Time `bun:",nullzero"`
	CreatedAt     time.Time
	CreatedBy     string
	UpdatedAt     time.Time
	UpdatedBy     string
}

// Rules lists the rules of a tenant by name.
func (r Queries) Rules(ctx context.Context, tenant string) ([]*Rule, error) {
	var out []*Rule
	err := r.prepared.rules.Select(ctx, r.q, &out, tenant)
	return out, err
}

// PutRule stores a rule, or what it says now. It reports what that changed:
// "created", "changed" or "unchanged".
func (tx *Tx) PutRule(ctx context.Context, tenant, name, spec string) (change string, err error) {
	old := new(Rule)
	err = notFound(tx.q.NewSelect().Model(old).Where("tenant = ?", tenant).Where("name = ?", name).Scan(ctx))
	who := ActorFrom(ctx).Who
	switch {
	case err == nil && old.Spec == spec:
		return "unchanged", nil
	case err == nil:
		_, err = tx.q.NewRaw("UPDATE rules SET spec = ?, updated_at = ?, updated_by = ? WHERE tenant = ? AND name = ?", spec, tx.now, who, tenant, name).Exec(ctx)
		return "changed", err
	case err != ErrNotFound: //nolint:errorlint // notFound returns it bare
		return "", err
	}
	_, err = tx.q.NewInsert().Model(&Rule{Tenant: tenant, Name: name, Spec: spec, CreatedAt: tx.now, CreatedBy: who, UpdatedAt: tx.now, UpdatedBy: who}).Exec(ctx)
	return "created", err
}

// DeleteRule forgets a rule; what it granted stays.
func (tx *Tx) DeleteRule(ctx context.Context, tenant, name string) error {
	return one(tx.q.NewRaw("DELETE FROM rules WHERE tenant = ? AND name = ?", tenant, name).Exec(ctx))
}

// CountRule notes that a rule granted a request.
func (tx *Tx) CountRule(ctx context.Context, tenant, name string) error {
	return one(tx.q.NewRaw("UPDATE rules SET granted = granted + 1, granted_at = ? WHERE tenant = ? AND name = ?", tx.now, tenant, name).Exec(ctx))
}

// NodeOfDevice returns a node other than one, that a rule let in because a device
// with that key vouched for it, and that was not removed: one that is only revoked
// would be back at once, by another name.
func (r Queries) NodeOfDevice(ctx context.Context, device wire.KeyHash, other wire.ID) (*Node, error) {
	n := new(Node)
	err := r.q.NewSelect().Model(n).Where("removed_at IS NULL").Where("id <> ?", other).
		Where("id IN (SELECT party_id FROM requests WHERE device_key = ? AND device_key <> '' AND rule <> '')", device).Limit(1).Scan(ctx)
	return n, notFound(err)
}
