package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/uptrace/bun"

	"sallyport/gateway/bus"
	"sallyport/internal/wire"
)

// Forward is one TCP listener of the gateway that leads to a target.
type Forward struct {
	bun.BaseModel `bun:"table:forwards"`
	Listen        string `bun:",pk"` // ip:port
	Tenant        string
	Target        string
	NodeID        wire.ID // empty: any node that offers the target
	TokenID       string  // of the API token that it was made with, and ends with; empty: it was made over the unix socket
	CreatedAt     time.Time
	CreatedBy     string
}

// Forwards lists forwards by address.
func (r Queries) Forwards(ctx context.Context) ([]*Forward, error) {
	var out []*Forward
	err := r.q.NewSelect().Model(&out).OrderExpr("listen").Scan(ctx)
	return out, err
}

// AddForward stores a forward; its address must be free.
func (tx *Tx) AddForward(ctx context.Context, f *Forward) error {
	f.CreatedAt, f.CreatedBy = tx.now, ActorFrom(ctx).Who
	res, err := tx.q.NewInsert().Model(f).On("CONFLICT (listen) DO NOTHING").Exec(ctx)
	if err != nil {
		return err
	}
	if n, err := res.RowsAffected(); err != nil || n == 0 {
		return fmt.Errorf("forward on %s: %w", f.Listen, ErrExists)
	}
	tx.Wake(bus.Forwards)
	return nil
}

// RemoveForward deletes a forward.
func (tx *Tx) RemoveForward(ctx context.Context, listen string) error {
	tx.Wake(bus.Forwards)
	return one(tx.q.NewRaw("DELETE FROM forwards WHERE listen = ?", listen).Exec(ctx))
}

// OverForwards lists the forwards whose API token is revoked or expired.
func (r Queries) OverForwards(ctx context.Context, now time.Time) ([]*Forward, error) {
	var out []*Forward
	err := r.q.NewSelect().Model(&out).Where("token_id <> ''").
		Where("token_id NOT IN (SELECT id FROM tokens WHERE revoked_at IS NULL AND expires_at > ?)", now.UTC()).OrderExpr("listen").Scan(ctx)
	return out, err
}

// EndForwards deletes the forwards whose API token is revoked or expired.
func (tx *Tx) EndForwards(ctx context.Context) error {
	over, err := tx.OverForwards(ctx, tx.now)
	for _, f := range over {
		tx.Audit(ctx, "target.unforward", "target "+f.Target, "on "+f.Listen+", made with token "+f.TokenID+", which is over")
		err = errors.Join(err, tx.RemoveForward(ctx, f.Listen))
	}
	return err
}

// NodeTargets are the targets that one node should offer.
type NodeTargets struct {
	NodeID  wire.ID
	Targets map[string]string // digest of the spec by name; empty: none
}

// DesiredTargets reads the desired states with a revision above n, in their
// order, and returns the highest. Revisions are given in the order of commits,
// so that reading on from there misses nothing.
func (r Queries) DesiredTargets(ctx context.Context, n int64) (out []NodeTargets, last int64, err error) {
	var rows []struct {
		NodeID  wire.ID
		N       int64
		Content string
	}
	if err := r.q.NewRaw("SELECT node_id, n, content FROM desired WHERE n > ? ORDER BY n", n).Scan(ctx, &rows); err != nil {
		return nil, n, err
	}
	out, last = make([]NodeTargets, len(rows)), n
	for i, row := range rows {
		out[i].NodeID, last = row.NodeID, row.N
		if out[i].Targets, err = targetsOf(row.Content); err != nil {
			return nil, n, fmt.Errorf("desired state of node %s: %w", row.NodeID, err)
		}
	}
	return out, last, nil
}

// TargetStatuses returns what every node said of its targets.
func (r Queries) TargetStatuses(ctx context.Context) ([]PolicyStatus, error) {
	var out []PolicyStatus
	err := r.q.NewSelect().Model(&out).Where("type = ?", wire.PolicyTarget).Scan(ctx)
	return out, err
}

// TargetStatus returns what nodes said of one target.
func (r Queries) TargetStatus(ctx context.Context, target string) (map[wire.ID]PolicyStatus, error) {
	var rows []PolicyStatus
	err := r.q.NewSelect().Model(&rows).Where("type = ?", wire.PolicyTarget).Where("policy = ?", target).Scan(ctx)
	out := make(map[wire.ID]PolicyStatus, len(rows))
	for _, s := range rows {
		out[s.NodeID] = s
	}
	return out, err
}
