package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/uptrace/bun"

	"sallyport/gateway/bus"
	"sallyport/internal/sqldb"
	"sallyport/internal/wire"
)

// Node is one node. State is the last one that was written: presence in memory
// knows more.
type Node struct {
	bun.BaseModel `bun:"table:nodes"`
	ID            wire.ID `bun:",pk"`
	Tenant        string
	Name          string
	State         wire.NodeState
	StateReason   string
	StateSince    time.Time
	KeyHash       wire.KeyHash
	JoinID        string
	AllowTags     []string // globs over key=value; empty: the node may set any tag
	Installation  string   // that the node said it obeys
	Boot          string
	Program       string
	VersionMin    int
	VersionMax    int
	Mode          string
	OS            string `bun:"os"`
	Arch          string
	AsRoot        bool
	AppliedGen    int64
	AppliedN      int64 `bun:"applied_n"`
	Outbox        wire.OutboxState
	SkewSeconds   float64
	NotAfter      time.Time `bun:",nullzero"`
	RenewAfter    time.Time `bun:",nullzero"`
	LastSeen      time.Time `bun:",nullzero"`
	CreatedAt     time.Time
	RemovedAt     time.Time `bun:",nullzero"`
	Quarantine    string    // why; empty: it is not
	Version       int64     // rises with each change by an operator: the ETag
}

// Applied is the revision that the node said it has applied.
func (n *Node) Applied() wire.Revision {
	return wire.Revision{Generation: n.AppliedGen, N: n.AppliedN}
}

// Node returns a node that was not removed.
func (r Queries) Node(ctx context.Context, id wire.ID) (*Node, error) {
	return row[Node](ctx, r, r.prepared.node, id)
}

// AnyNode returns a node also when it was removed.
func (r Queries) AnyNode(ctx context.Context, id wire.ID) (*Node, error) {
	return row[Node](ctx, r, r.prepared.anyNode, id)
}

// NodeByName returns the live node of that name.
func (r Queries) NodeByName(ctx context.Context, tenant, name string) (*Node, error) {
	return row[Node](ctx, r, r.prepared.nodeByName, tenant, name)
}

// Nodes lists all nodes that were not removed, by name.
func (r Queries) Nodes(ctx context.Context) ([]*Node, error) {
	var out []*Node
	err := r.q.NewSelect().Model(&out).Where("removed_at IS NULL").OrderExpr("name, id").Scan(ctx)
	return out, err
}

// FindNodes returns the nodes that a reference may mean: the one of exactly
// that name or ID, else all whose name or ID begins with it, at most limit.
func (r Queries) FindNodes(ctx context.Context, ref string, limit int) ([]*Node, error) {
	var out []*Node
	err := r.q.NewSelect().Model(&out).Where("removed_at IS NULL").Where("name = ? OR id = ?", ref, ref).Scan(ctx)
	if err != nil || len(out) > 0 || ref == "" {
		return out, err
	}
	err = r.q.NewSelect().Model(&out).Where("removed_at IS NULL").
		Where("substr(name, 1, ?) = ? OR substr(id, 1, ?) = ?", len([]rune(ref)), ref, len([]rune(ref)), ref).
		OrderExpr("name").Limit(int64(limit)).Scan(ctx)
	return out, err
}

// AddNode stores a new node, or one that was removed and enrols again under
// its ID: its history, and the tags that the gateway set, stay.
func (tx *Tx) AddNode(ctx context.Context, n *Node) error {
	n.CreatedAt, n.StateSince, n.Version = tx.now, tx.now, 1
	if n.Tenant == "" {
		n.Tenant = DefaultTenant
	}
	tx.Wake(bus.Nodes)
	_, err := tx.prepared.putNode.Exec(ctx, tx.q, n)
	if sqldb.IsTaken(err) {
		return fmt.Errorf("node %q: %w", n.Name, ErrExists)
	}
	return err
}

// SetNodeState writes a transition; since is only moved by a new state.
func (tx *Tx) SetNodeState(ctx context.Context, id wire.ID, state wire.NodeState, reason string) error {
	err := one(tx.prepared.setState.Exec(ctx, tx.q, state, tx.now, state, reason, id, state, reason))
	if err == nil {
		tx.Wake(bus.Nodes)
		return nil
	}
	_, err = tx.AnyNode(ctx, id) // nothing new, or no such node
	return err
}

// SetNodePresence writes a transition that was seen, and tells whether that is the
// node's state now. What was seen before a revocation, and comes after it, does not
// take that back.
func (tx *Tx) SetNodePresence(ctx context.Context, id wire.ID, state wire.NodeState, reason string) (stands bool, err error) {
	err = one(tx.prepared.setPresence.Exec(ctx, tx.q, state, tx.now, state, reason, id, state, reason))
	if err == nil {
		tx.Wake(bus.Nodes)
	}
	if !errors.Is(err, ErrNotFound) {
		return err == nil, err
	}
	n, err := tx.Node(ctx, id) // nothing new, revoked or removed
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return err == nil && n.State == state, err
}

// RecordHello writes what a verified hello says: facts, policy statuses and
// the tags that the node itself sets.
func (tx *Tx) RecordHello(ctx context.Context, h *wire.Hello, skew time.Duration) (*Node, error) {
	id := h.Party.ID
	n, err := tx.Node(ctx, id)
	if err != nil {
		return nil, err
	}
	n.Installation, n.Boot, n.Program, n.Mode, n.OS, n.Arch, n.AsRoot = h.Installation, h.Boot, h.Program, h.Mode, h.OS, h.Arch, h.AsRoot
	n.VersionMin, n.VersionMax = h.Versions.Min, h.Versions.Max
	n.AppliedGen, n.AppliedN = h.Applied.Generation, h.Applied.N
	n.Outbox, n.SkewSeconds = h.Outbox, skew.Seconds()
	n.NotAfter, n.RenewAfter, n.LastSeen = h.NotAfter.UTC(), h.RenewAfter.UTC(), tx.now
	if _, err := tx.prepared.helloOfNode.Exec(ctx, tx.q, n); err != nil {
		return nil, err
	}
	if err := tx.SetPolicyStatus(ctx, id, h.Policies); err != nil {
		return nil, err
	}
	tx.Wake(bus.Nodes)
	return n, tx.setOwnTags(ctx, n, h.Tags)
}

// maxOwnTags bounds the tags that a node sets itself, which is half of what it
// may have: room is left for those of the gateway.
const maxOwnTags = 128

// setOwnTags replaces the tags whose source is the node.
func (tx *Tx) setOwnTags(ctx context.Context, n *Node, tags map[string]string) error {
	rows, err := tx.NodeTags(ctx, n.ID)
	if err != nil {
		return err
	}
	own := map[string]string{}
	for _, t := range rows {
		if t.Source == TagNode {
			own[t.Key] = t.Value
		}
	}
	allowed := map[string]string{}
	for _, k := range slices.Sorted(maps.Keys(tags)) { // the same ones each time
		if v := tags[k]; len(allowed) < maxOwnTags && AllowsTag(n.AllowTags, k, v) && ValidTag(k, v) == nil {
			allowed[k] = v
		}
	}
	if maps.Equal(own, allowed) {
		return nil
	}
	return tx.replaceTags(ctx, n.ID, TagNode, allowed)
}

// RemoveNode takes a node off the list. Its row stays for its history.
func (tx *Tx) RemoveNode(ctx context.Context, id wire.ID) error {
	err := one(tx.q.NewRaw("UPDATE nodes SET removed_at = ?, state = ?, state_reason = ?, state_since = ?, version = version + 1 WHERE id = ? AND removed_at IS NULL",
		tx.now, wire.StateRevoked, "removed", tx.now, id).Exec(ctx))
	tx.Wake(bus.Nodes)
	return err
}

// TouchNode raises a node's version. With want not 0 it must be the current
// one, or nothing happens but [ErrChanged].
func (tx *Tx) TouchNode(ctx context.Context, id wire.ID, want int64) error {
	n, err := tx.Node(ctx, id)
	if err != nil {
		return err
	}
	if want != 0 && n.Version != want {
		return ErrChanged
	}
	tx.Wake(bus.Nodes)
	return one(tx.q.NewRaw("UPDATE nodes SET version = version + 1 WHERE id = ?", id).Exec(ctx))
}

// SetLastSeen writes when nodes were last heard of, many at once.
func (db *DB) SetLastSeen(ctx context.Context, seen map[wire.ID]time.Time) error {
	if len(seen) == 0 {
		return nil
	}
	return db.Update(ctx, func(ctx context.Context, tx *Tx) error {
		for _, id := range slices.Sorted(maps.Keys(seen)) {
			if _, err := tx.prepared.setSeen.Exec(ctx, tx.q, seen[id], id); err != nil {
				return err
			}
		}
		return nil
	})
}
