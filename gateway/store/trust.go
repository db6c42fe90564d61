package store

import (
	"context"
	"time"

	"github.com/uptrace/bun"

	"sallyport/internal/wire"
)

// PartyTrust is what a party has of the certificate authority.
type PartyTrust struct {
	bun.BaseModel `bun:"table:party_trust"`
	PartyID       wire.ID `bun:",pk"`
	Role          wire.Role
	Issuer        wire.KeyHash // the intermediate of its leaf; empty: not known, the first one
	Trust         int64        // number of its trust document; 0: none
	ChangedAt     time.Time
}

// PartyTrust returns what is known of one party, and nothing but its UUID for
// one that nothing is known of.
func (r Queries) PartyTrust(ctx context.Context, id wire.ID) (*PartyTrust, error) {
	var rows []*PartyTrust
	err := r.q.NewSelect().Model(&rows).Where("party_id = ?", id).Scan(ctx)
	if err != nil || len(rows) == 0 {
		return &PartyTrust{PartyID: id}, err
	}
	return rows[0], nil
}

// PartyTrusts returns what is known of every party.
func (r Queries) PartyTrusts(ctx context.Context) (map[wire.ID]PartyTrust, error) {
	var rows []PartyTrust
	if err := r.q.NewSelect().Model(&rows).Scan(ctx); err != nil {
		return nil, err
	}
	out := make(map[wire.ID]PartyTrust, len(rows))
	for _, t := range rows {
		out[t.PartyID] = t
	}
	return out, nil
}

// SetIssuer notes which intermediate issued a party's leaf.
func (tx *Tx) SetIssuer(ctx context.Context, party wire.Party, issuer wire.KeyHash) error {
	_, err := tx.prepared.putIssuer.Exec(ctx, tx.q, &PartyTrust{PartyID: party.ID, Role: party.Role, Issuer: issuer, ChangedAt: tx.now})
	return err
}

// SetTrust notes the number of the trust document that a party holds.
func (tx *Tx) SetTrust(ctx context.Context, party wire.Party, number int64) error {
	_, err := tx.q.NewInsert().Model(&PartyTrust{PartyID: party.ID, Role: party.Role, Trust: number, ChangedAt: tx.now}).
		On("CONFLICT (party_id) DO UPDATE").Set("role = EXCLUDED.role, trust = EXCLUDED.trust, changed_at = EXCLUDED.changed_at").Exec(ctx)
	return err
}
