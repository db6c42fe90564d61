package store

import (
	"context"

	"github.com/uptrace/bun"

	"sallyport/internal/sqldb"
)

// prepared are the queries that every visit of a node and every enrolment
// make, each for one party.
type prepared struct {
	node, anyNode, nodeByName, nodeKey               *sqldb.Prepared
	key, lastRequest, join                           *sqldb.Prepared
	desired, tags, statuses                          *sqldb.Prepared
	rcps, rcpByID                                    *sqldb.Prepared
	policyHeads, deployments, rules                  *sqldb.Prepared
	next, setApplied, setState, setPresence, setSeen *sqldb.Prepared
	clearTags, useJoin, moveRequest                  *sqldb.Prepared

	putKey, putNode, putTag, putDesired, putStatus, putIssuer *sqldb.Bound
	addRequest, addJoinUse, addCertificate, addAudit          *sqldb.Bound
	helloOfNode, leafOfNode                                   *sqldb.Bound
}

const setState = `UPDATE nodes SET state_since = CASE WHEN state = ? THEN state_since ELSE ? END, state = ?, state_reason = ?
			WHERE id = ? AND (state <> ? OR state_reason <> ?)`

const nextQuery = "UPDATE counters SET value = value + ? WHERE name = ? RETURNING value"

// prepare lets bun write the texts, so that each names the columns of its model.
func prepare(ctx context.Context, db *sqldb.DB) (p *prepared, err error) {
	value := bun.Safe("?")
	of := func(model any) *bun.SelectQuery { return db.Read().NewSelect().Model(model) }
	p = new(prepared)
	for _, q := range []struct {
		to    **sqldb.Prepared
		query *bun.SelectQuery
	}{
		{&p.node, of((*Node)(nil)).Where("id = ?", value).Where("removed_at IS NULL")},
		{&p.anyNode, of((*Node)(nil)).Where("id = ?", value)},
		{&p.nodeByName, of((*Node)(nil)).Where("tenant = ?", value).Where("name = ?", value).Where("removed_at IS NULL")},
		{&p.nodeKey, of((*Key)(nil)).Where("key_hash = (SELECT n.key_hash FROM nodes n WHERE n.id = ? AND n.removed_at IS NULL)", value)},
		{&p.key, of((*Key)(nil)).Where("key_hash = ?", value)},
		{&p.lastRequest, of((*Request)(nil)).Where("key_hash = ?", value).OrderExpr("requested_at DESC, id DESC").Limit(1)},
		{&p.join, of((*Join)(nil)).Where("id = ?", value)},
		{&p.desired, of((*Desired)(nil)).Where("node_id = ?", value)},
		{&p.tags, of((*NodeTag)(nil)).Where("node_id = ?", value).OrderExpr("key, source")},
		{&p.statuses, of((*PolicyStatus)(nil)).Where("node_id = ?", value).OrderExpr("policy")},
		{&p.rcps, of((*RCP)(nil)).OrderExpr("name")},
		{&p.rcpByID, of((*RCP)(nil)).Where("party_id = ?", value)},
		{&p.policyHeads, currentPolicies(of((*Policy)(nil)).ExcludeColumn("spec")).Where("policy.tenant = ?", value)},
		{&p.deployments, of((*Deployment)(nil)).Where("tenant = ?", value).OrderExpr("name")},
		{&p.rules, of((*Rule)(nil)).Where("tenant = ?", value).OrderExpr("name")},
	} {
		if *q.to, err = db.Prepare(ctx, q.query.String()); err != nil {
			return nil, err
		}
	}
	for _, q := range []struct {
		to   **sqldb.Prepared
		text string
	}{
		{&p.next, nextQuery},
		{&p.setApplied, "UPDATE nodes SET applied_gen = ?, applied_n = ? WHERE id = ?"},
		{&p.setState, setState},
		{&p.setPresence, setState + " AND state <> 'revoked'"},
		{&p.setSeen, "UPDATE nodes SET last_seen = ? WHERE id = ?"},
		{&p.clearTags, "DELETE FROM node_tags WHERE node_id = ? AND source = ?"},
		{&p.useJoin, `UPDATE joins SET used = used + 1 WHERE id = ? AND (manual OR used < max_uses)
			AND NOT EXISTS (SELECT 1 FROM join_uses u WHERE u.join_id = joins.id AND u.key_hash = ?)`},
		{&p.moveRequest, `UPDATE requests SET state = ?, reason = ?, seen_at = ?
			WHERE id = (SELECT q.id FROM requests q WHERE q.key_hash = ? ORDER BY q.requested_at DESC, q.id DESC LIMIT 1)
			AND state IN (SELECT value FROM json_each(?)) AND (state <> ? OR reason <> ?)`},
	} {
		if *q.to, err = db.Prepare(ctx, q.text); err != nil {
			return nil, err
		}
	}
	for _, q := range []struct {
		to         **sqldb.Bound
		model      any
		onConflict string
	}{
		{&p.putKey, (*Key)(nil), `ON CONFLICT (key_hash) DO UPDATE SET role = EXCLUDED.role, party_id = EXCLUDED.party_id, name = EXCLUDED.name,
			tenant = EXCLUDED.tenant, issued_at = EXCLUDED.issued_at, not_after = EXCLUDED.not_after,
			revoked_at = coalesce("key".revoked_at, EXCLUDED.revoked_at),
			reason = CASE WHEN "key".revoked_at IS NULL THEN EXCLUDED.reason ELSE "key".reason END`},
		{&p.putNode, (*Node)(nil), `ON CONFLICT (id) DO UPDATE SET tenant = EXCLUDED.tenant, name = EXCLUDED.name, state = EXCLUDED.state,
			state_reason = EXCLUDED.state_reason, state_since = EXCLUDED.state_since, key_hash = EXCLUDED.key_hash, join_id = EXCLUDED.join_id,
			allow_tags = EXCLUDED.allow_tags, installation = EXCLUDED.installation, boot = EXCLUDED.boot, program = EXCLUDED.program,
			not_after = EXCLUDED.not_after, renew_after = EXCLUDED.renew_after, removed_at = NULL, version = "node".version + 1`},
		{&p.putTag, (*NodeTag)(nil), `ON CONFLICT (node_id, key, source) DO UPDATE SET value = EXCLUDED.value, hidden = EXCLUDED.hidden`},
		{&p.putDesired, (*Desired)(nil), `ON CONFLICT (node_id) DO UPDATE SET generation = EXCLUDED.generation, n = EXCLUDED.n, digest = EXCLUDED.digest,
			content = EXCLUDED.content, changed_at = EXCLUDED.changed_at, refused = EXCLUDED.refused, reason = EXCLUDED.reason`},
		{&p.putStatus, (*PolicyStatus)(nil), `ON CONFLICT (node_id, policy) DO UPDATE SET type = EXCLUDED.type, digest = EXCLUDED.digest,
			state = EXCLUDED.state, error = EXCLUDED.error, since = EXCLUDED.since`},
		{&p.addRequest, (*Request)(nil), ""},
		{&p.addJoinUse, (*JoinUse)(nil), ""},
		{&p.addCertificate, (*Certificate)(nil), "ON CONFLICT (issuer, serial) DO NOTHING"},
		{&p.putIssuer, (*PartyTrust)(nil), "ON CONFLICT (party_id) DO UPDATE SET role = EXCLUDED.role, issuer = EXCLUDED.issuer, changed_at = EXCLUDED.changed_at"},
		{&p.addAudit, (*AuditEntry)(nil), ""},
	} {
		if *q.to, err = db.PrepareInsert(ctx, q.model, q.onConflict); err != nil {
			return nil, err
		}
	}
	p.helloOfNode, err = db.PrepareUpdate(ctx, (*Node)(nil),
		"installation", "boot", "program", "mode", "os", "arch", "as_root", "version_min", "version_max",
		"applied_gen", "applied_n", "outbox", "skew_seconds", "not_after", "renew_after", "last_seen")
	if err != nil {
		return nil, err
	}
	if p.leafOfNode, err = db.PrepareUpdate(ctx, (*Node)(nil), "key_hash", "not_after", "renew_after"); err != nil {
		return nil, err
	}
	return p, nil
}

// row returns the only row of a prepared query; an empty one with
// [ErrNotFound] where there is none.
func row[T any](ctx context.Context, r Queries, q *sqldb.Prepared, args ...any) (*T, error) {
	var rows []*T
	if err := q.Select(ctx, r.q, &rows, args...); err != nil {
		return nil, err
	}
	if len(rows) == 0 {
		return new(T), ErrNotFound
	}
	return rows[0], nil
}
