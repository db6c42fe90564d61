package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/uptrace/bun"

	"sallyport/gateway/api"
	"sallyport/gateway/bus"
	"sallyport/internal/wire"
)

// Request returns the certificate request with that ID.
func (r Queries) Request(ctx context.Context, id string) (*Request, error) {
	q := new(Request)
	err := r.q.NewSelect().Model(q).Where("id = ?", id).Scan(ctx)
	return q, notFound(err)
}

// LastRequest returns the newest request of a key.
func (r Queries) LastRequest(ctx context.Context, key wire.KeyHash) (*Request, error) {
	return row[Request](ctx, r, r.prepared.lastRequest, key)
}

// LastRequestOf returns the newest request of a name, whatever became of it. It
// reads requests until it finds one.
func (r Queries) LastRequestOf(ctx context.Context, name string) (*Request, error) {
	q := new(Request)
	err := r.q.NewSelect().Model(q).Where("name = ?", name).OrderExpr("requested_at DESC").Limit(1).Scan(ctx)
	return q, notFound(err)
}

// FindRequests returns the waiting requests that a reference may mean: the one
// with exactly that ID, those of exactly that name, else those whose ID begins
// with it.
func (r Queries) FindRequests(ctx context.Context, ref string) ([]*Request, error) {
	var out []*Request
	// One after the other, each by an index: many are looked for at a time.
	err := r.q.NewSelect().Model(&out).Where("id = ?", ref).Where("state = ?", api.RequestPending).Scan(ctx)
	if err != nil || len(out) > 0 {
		return out, err
	}
	err = r.q.NewSelect().Model(&out).Where("state = ?", api.RequestPending).Where("name = ?", ref).OrderExpr("requested_at").Scan(ctx)
	if err != nil || len(out) > 0 || len(ref) < minPrefix {
		return out, err
	}
	err = r.q.NewSelect().Model(&out).Where("state = ?", api.RequestPending).Where("substr(id, 1, ?) = ?", len(ref), ref).Limit(10).Scan(ctx)
	return out, err
}

// FindGranted is [Queries.FindRequests] among those that were granted; of the
// requests of one key the newest.
func (r Queries) FindGranted(ctx context.Context, ref string) ([]*Request, error) {
	granted := bun.List([]string{api.RequestGranted, api.RequestDelivered, api.RequestFailed})
	var out []*Request
	err := r.q.NewSelect().Model(&out).Where("id = ?", ref).Where("state IN (?)", granted).Scan(ctx)
	if err == nil && len(out) == 0 {
		err = r.q.NewSelect().Model(&out).Where("state IN (?)", granted).Where("name = ?", ref).OrderExpr("requested_at DESC, id DESC").Limit(100).Scan(ctx)
	}
	if err == nil && len(out) == 0 && len(ref) >= minPrefix {
		err = r.q.NewSelect().Model(&out).Where("state IN (?)", granted).Where("substr(id, 1, ?) = ?", len(ref), ref).OrderExpr("requested_at DESC, id DESC").Limit(10).Scan(ctx)
	}
	seen := map[wire.KeyHash]bool{}
	return slices.DeleteFunc(out, func(q *Request) bool {
		again := seen[q.KeyHash]
		seen[q.KeyHash] = true
		return again
	}), err
}

// minPrefix is the shortest beginning of an ID that a changing call takes.
const minPrefix = 8

// CountWaiting counts the requests that wait for an operator, and those of them
// that came by way of one RCP.
func (r Queries) CountWaiting(ctx context.Context, rcp string) (all, ofRCP int64, err error) {
	err = r.q.NewRaw("SELECT count(*), coalesce(sum(CASE WHEN rcp = ? THEN 1 ELSE 0 END), 0) FROM requests WHERE state = ?", rcp, api.RequestPending).Scan(ctx, &all, &ofRCP)
	return all, ofRCP, err
}

// AddRequest stores a new request.
func (tx *Tx) AddRequest(ctx context.Context, q *Request) error {
	q.RequestedAt, q.SeenAt = tx.now, tx.now
	if q.Tenant == "" {
		q.Tenant = DefaultTenant
	}
	_, err := tx.prepared.addRequest.Exec(ctx, tx.q, q)
	return err
}

// requestMoves says from which states a request comes into one (PK-03). A
// state that stands in its own list may be written again: the party was seen,
// or the reason changed. Denied, discarded and expired are final; a granted
// request that failed was refused by its party, and is delivered when that
// takes it after all.
var requestMoves = map[string][]string{
	api.RequestPending:   {api.RequestPending},
	api.RequestGranted:   {api.RequestPending, api.RequestGranted},
	api.RequestDelivered: {api.RequestGranted, api.RequestFailed, api.RequestDelivered},
	api.RequestDenied:    {api.RequestPending},
	api.RequestDiscarded: {api.RequestPending},
	api.RequestFailed:    {api.RequestPending, api.RequestGranted, api.RequestFailed},
	api.RequestExpired:   {api.RequestPending},
}

// SaveRequest writes a request back. [ErrChanged] says that its state is one
// that does not lead to the new one: somebody else decided in the meantime.
func (tx *Tx) SaveRequest(ctx context.Context, q *Request) error {
	from, known := requestMoves[q.State]
	if !known {
		return fmt.Errorf("request %s: no state %q", q.ID, q.State)
	}
	err := one(tx.q.NewUpdate().Model(q).WherePK().Where("state IN (?)", bun.List(from)).Exec(ctx))
	if !errors.Is(err, ErrNotFound) {
		return err
	}
	now, err := tx.Request(ctx, q.ID)
	if err != nil {
		return err
	}
	return fmt.Errorf("request %s is %s and cannot become %s: %w", q.ID, now.State, q.State, ErrChanged)
}

// SawRequest notes that the party of a request came back.
func (tx *Tx) SawRequest(ctx context.Context, id string) error {
	return one(tx.q.NewRaw("UPDATE requests SET seen_at = ? WHERE id = ?", tx.now, id).Exec(ctx))
}

// MoveRequest moves on the last request of a key, if there is one and its state
// leads to the new one.
func (tx *Tx) MoveRequest(ctx context.Context, key wire.KeyHash, state, reason string) error {
	from, err := json.Marshal(requestMoves[state])
	if err == nil {
		_, err = tx.prepared.moveRequest.Exec(ctx, tx.q, state, reason, tx.now, key, string(from), state, reason)
	}
	return err
}

// ExpireRequests ends the requests of parties that were not seen since.
func (tx *Tx) ExpireRequests(ctx context.Context, since time.Time) (n int64, err error) {
	return affected(tx.q.NewRaw("UPDATE requests SET state = ?, reason = ?, decided_at = ?, decided_by = ? WHERE state = ? AND seen_at < ?",
		api.RequestExpired, "the party was not seen since "+since.UTC().Format(time.RFC3339), tx.now, "gateway", api.RequestPending, since.UTC()).Exec(ctx))
}

// JoinUsed tells whether a key has used a join code.
func (r Queries) JoinUsed(ctx context.Context, join string, key wire.KeyHash) (bool, error) {
	return r.q.NewSelect().Model((*JoinUse)(nil)).Where("join_id = ?", join).Where("key_hash = ?", key).Exists(ctx)
}

// UseJoin counts a use of a join code by a key, once for each key. A token that
// is used up is [ErrExists].
func (tx *Tx) UseJoin(ctx context.Context, join string, key wire.KeyHash, party wire.ID) error {
	err := one(tx.prepared.useJoin.Exec(ctx, tx.q, join, key))
	if errors.Is(err, ErrNotFound) {
		if used, err := tx.JoinUsed(ctx, join, key); err != nil || used {
			return err
		}
		return fmt.Errorf("join code %s: %w: all uses are taken", join, ErrExists)
	}
	if err != nil {
		return err
	}
	_, err = tx.prepared.addJoinUse.Exec(ctx, tx.q, &JoinUse{JoinID: join, KeyHash: key, PartyID: party, UsedAt: tx.now})
	return err
}

// Key returns what is known of a certified key.
func (r Queries) Key(ctx context.Context, key wire.KeyHash) (*Key, error) {
	return row[Key](ctx, r, r.prepared.key, key)
}

// NodeKey returns what is known of the key in a node's leaf.
func (r Queries) NodeKey(ctx context.Context, id wire.ID) (*Key, error) {
	return row[Key](ctx, r, r.prepared.nodeKey, id)
}

// CountKeys counts the keys of a party that are not revoked.
func (r Queries) CountKeys(ctx context.Context, party wire.ID) (int64, error) {
	return r.q.NewSelect().Model((*Key)(nil)).Where("party_id = ?", party).Where("revoked_at IS NULL").Count(ctx)
}

// RevokedKeys lists the keys that are not to be trusted, oldest first.
func (r Queries) RevokedKeys(ctx context.Context) ([]*Key, error) {
	var out []*Key
	err := r.q.NewSelect().Model(&out).Where("revoked_at IS NOT NULL").OrderExpr("revoked_at, key_hash").Scan(ctx)
	return out, err
}

// PutKey stores a key, or what has changed of one. A revocation is never taken
// back.
func (tx *Tx) PutKey(ctx context.Context, k *Key) error {
	if k.Tenant == "" {
		k.Tenant = DefaultTenant
	}
	k.IssuedAt, k.NotAfter, k.RevokedAt = k.IssuedAt.UTC(), k.NotAfter.UTC(), k.RevokedAt.UTC()
	_, err := tx.prepared.putKey.Exec(ctx, tx.q, k)
	return err
}

// RevokeKeys ends the trust in every key of a party and reports how many that
// were.
func (tx *Tx) RevokeKeys(ctx context.Context, party wire.ID, reason string) (n int64, err error) {
	res, err := tx.q.NewRaw("UPDATE keys SET revoked_at = ?, reason = ? WHERE party_id = ? AND revoked_at IS NULL", tx.now, reason, party).Exec(ctx)
	if err != nil {
		return 0, err
	}
	if n, err = res.RowsAffected(); err != nil {
		return n, err
	}
	return n, tx.failUncollected(ctx, party, reason)
}

// failUncollected ends the grants of revoked keys whose party has not come for
// its certificate: it never gets one.
func (tx *Tx) failUncollected(ctx context.Context, party wire.ID, reason string) error {
	_, err := tx.q.NewRaw("UPDATE requests SET state = ?, reason = ? WHERE state = ? AND key_hash IN (SELECT key_hash FROM keys WHERE party_id = ? AND revoked_at IS NOT NULL)",
		api.RequestFailed, "its key was revoked first, "+reason, api.RequestGranted, party).Exec(ctx)
	return err
}

// RevokeOtherKeys ends the trust in every key of a party but one.
func (tx *Tx) RevokeOtherKeys(ctx context.Context, party wire.ID, keep wire.KeyHash, reason string) (n int64, err error) {
	res, err := tx.q.NewRaw("UPDATE keys SET revoked_at = ?, reason = ? WHERE party_id = ? AND key_hash <> ? AND revoked_at IS NULL", tx.now, reason, party, keep).Exec(ctx)
	if err != nil {
		return 0, err
	}
	if n, err = res.RowsAffected(); err != nil {
		return n, err
	}
	return n, tx.failUncollected(ctx, party, reason)
}

// NextRevocations returns the number of the next revocation set: above every
// one before, and above atLeast, the highest that was seen elsewhere.
func (tx *Tx) NextRevocations(ctx context.Context, atLeast int64) (n int64, err error) {
	err = tx.q.NewRaw("UPDATE counters SET value = CASE WHEN value < ? THEN ? ELSE value END + 1 WHERE name = 'revocations' RETURNING value", atLeast, atLeast).Scan(ctx, &n)
	return n, err
}

// SetNodeCertificate writes the key and the life of a node's leaf.
func (tx *Tx) SetNodeCertificate(ctx context.Context, id wire.ID, key wire.KeyHash, notAfter, renewAfter time.Time) error {
	tx.Wake(bus.Nodes)
	return one(tx.prepared.leafOfNode.Exec(ctx, tx.q, &Node{ID: id, KeyHash: key, NotAfter: notAfter.UTC(), RenewAfter: renewAfter.UTC()}))
}

// SetRCPCertificate writes the key and the life of an RCP's leaf.
func (tx *Tx) SetRCPCertificate(ctx context.Context, name string, key wire.KeyHash, notAfter, renewAfter time.Time) error {
	p := &RCP{Name: name, KeyHash: key, NotAfter: notAfter.UTC(), RenewAfter: renewAfter.UTC()}
	tx.Wake(bus.RCPs)
	return one(tx.q.NewUpdate().Model(p).Column("key_hash", "not_after", "renew_after").WherePK().Exec(ctx))
}

// MoveHistory gives a replacement what the node before it reported and did.
func (tx *Tx) MoveHistory(ctx context.Context, from, to wire.ID) error {
	for _, table := range []string{"events", "gaps", "actions"} {
		if _, err := tx.q.NewRaw("UPDATE ? SET node_id = ? WHERE node_id = ?", bun.Ident(table), to, from).Exec(ctx); err != nil {
			return fmt.Errorf("move %s of node %s: %w", table, from.Short(), err)
		}
	}
	return nil
}
