package store

import (
	"context"
	"fmt"
	"time"

	"github.com/uptrace/bun"

	"sallyport/gateway/bus"
	"sallyport/internal/wire"
)

// RCP is one reverse channel proxy that an operator named. PartyID is empty
// until it enrolled, and pinned for ever after.
type RCP struct {
	bun.BaseModel `bun:"table:rcps"`
	Name          string  `bun:",pk"`
	PartyID       wire.ID `bun:"party_id"`
	Address       string  // host:port that the gateway dials; empty: it dials us, or hangs on Via
	Public        []string
	Via           string // name of the RCP before it
	Source        string // RCPAdded, RCPConfigured
	State         string // one of the RCP* states of package api
	StateReason   string
	StateSince    time.Time
	KeyHash       wire.KeyHash
	Program       string
	Draining      bool
	NotAfter      time.Time `bun:",nullzero"`
	RenewAfter    time.Time `bun:",nullzero"`
	LastSeen      time.Time `bun:",nullzero"`
	CreatedAt     time.Time
	Version       int64
	SkewSeconds   float64 // of its clock against ours
}

// Where the record of an RCP comes from.
const (
	RCPAdded      = "added"
	RCPConfigured = "configured"
)

// RCPs lists all of them by name.
func (r Queries) RCPs(ctx context.Context) ([]*RCP, error) {
	var out []*RCP
	err := r.prepared.rcps.Select(ctx, r.q, &out)
	return out, err
}

// RCP returns the one of that name.
func (r Queries) RCP(ctx context.Context, name string) (*RCP, error) {
	p := new(RCP)
	err := r.q.NewSelect().Model(p).Where("name = ?", name).Scan(ctx)
	return p, notFound(err)
}

// RCPByID returns the one with that UUID.
func (r Queries) RCPByID(ctx context.Context, id wire.ID) (*RCP, error) {
	if id == "" {
		return nil, ErrNotFound
	}
	return row[RCP](ctx, r, r.prepared.rcpByID, id)
}

// AddRCP stores a new record; the name must be free.
func (tx *Tx) AddRCP(ctx context.Context, p *RCP) error {
	p.CreatedAt, p.StateSince, p.Version = tx.now, tx.now, 1
	res, err := tx.q.NewInsert().Model(p).On("CONFLICT (name) DO NOTHING").Exec(ctx)
	if err != nil {
		return err
	}
	if n, err := res.RowsAffected(); err != nil || n == 0 {
		return fmt.Errorf("rcp %q: %w", p.Name, ErrExists)
	}
	tx.Wake(bus.RCPs)
	return nil
}

// SaveRCP writes a record back. Its Version must still be the one that was
// read, else [ErrChanged].
func (tx *Tx) SaveRCP(ctx context.Context, p *RCP) error {
	read := p.Version
	p.Version++
	res, err := tx.q.NewUpdate().Model(p).WherePK().Where("version = ?", read).Exec(ctx)
	if err != nil {
		return err
	}
	if n, err := res.RowsAffected(); err != nil || n == 0 {
		return fmt.Errorf("rcp %q: %w", p.Name, ErrChanged)
	}
	tx.Wake(bus.RCPs)
	return nil
}

// SetRCPState writes a transition of presence; it does not count as a change
// by an operator.
func (tx *Tx) SetRCPState(ctx context.Context, name, state, reason string) error {
	tx.Wake(bus.RCPs)
	_, err := tx.q.NewRaw(`UPDATE rcps SET state_since = CASE WHEN state = ? THEN state_since ELSE ? END, state = ?, state_reason = ?
		WHERE name = ?`, state, tx.now, state, reason, name).Exec(ctx)
	return err
}

// SetRCPSeen writes what a verified session with an RCP said.
func (tx *Tx) SetRCPSeen(ctx context.Context, name, program string, notAfter, renewAfter time.Time, skew time.Duration) error {
	p := &RCP{Name: name, Program: program, NotAfter: notAfter.UTC(), RenewAfter: renewAfter.UTC(), LastSeen: tx.now, SkewSeconds: skew.Seconds()}
	if notAfter.IsZero() {
		p.NotAfter, p.RenewAfter = time.Time{}, time.Time{}
	}
	return one(tx.q.NewUpdate().Model(p).Column("program", "not_after", "renew_after", "last_seen", "skew_seconds").WherePK().Exec(ctx))
}

// RemoveRCP deletes a record. It wakes nobody: whoever hears of it ends the
// RCP's channel, by which the RCP has yet to be told that it is revoked.
func (tx *Tx) RemoveRCP(ctx context.Context, name string) error {
	return one(tx.q.NewRaw("DELETE FROM rcps WHERE name = ?", name).Exec(ctx))
}
