package store

import (
	"context"
	"time"

	"github.com/uptrace/bun"

	"sallyport/internal/sqldb"
	"sallyport/internal/wire"
)

// Key is one key that was certified. RevokedAt ends the trust in it.
type Key struct {
	bun.BaseModel `bun:"table:keys"`
	KeyHash       wire.KeyHash `bun:",pk"`
	Role          wire.Role
	PartyID       wire.ID
	Name          string
	Tenant        string
	IssuedAt      time.Time
	NotAfter      time.Time
	RevokedAt     time.Time `bun:",nullzero"`
	Reason        string
}

// Join is one join code. Of its token only the hash is kept.
type Join struct {
	bun.BaseModel `bun:"table:joins"`
	ID            string `bun:",pk"`
	Role          wire.Role
	Tenant        string
	Name          string
	TokenHash     string // hex SHA-256; empty where an operator grants by hand
	TrustDomain   string
	Root          wire.KeyHash // that it pins; empty: the first one
	Tags          map[string]string
	AllowTags     []string
	RCPs          []string `bun:"rcps"`
	MaxUses       int
	Used          int
	Manual        bool
	Replaces      bool
	Generation    int64 // of the installation: a restore invalidates unused tokens
	CreatedAt     time.Time
	CreatedBy     string
	ExpiresAt     time.Time
	RevokedAt     time.Time `bun:",nullzero"`
}

// JoinUse binds one use of a join code to the key that used it: the same key
// may repeat it.
type JoinUse struct {
	bun.BaseModel `bun:"table:join_uses"`
	JoinID        string       `bun:",pk"`
	KeyHash       wire.KeyHash `bun:",pk"`
	PartyID       wire.ID
	UsedAt        time.Time
}

// Request is one certificate request. State is one of the Request* states of
// package api; Code says in one word why it waits or failed.
type Request struct {
	bun.BaseModel `bun:"table:requests"`
	ID            string `bun:",pk"`
	Role          wire.Role
	PartyID       wire.ID
	KeyHash       wire.KeyHash
	Name          string
	Tenant        string
	Source        string // address as reported by the RCP
	RCP           string `bun:"rcp"`
	Tags          map[string]string
	JoinID        string
	CSR           []byte `bun:"csr"`
	Program       string
	State         string
	Reason        string
	Code          string
	RequestedAt   time.Time
	SeenAt        time.Time // when it was last there
	DecidedAt     time.Time `bun:",nullzero"`
	DecidedBy     string
	Rule          string // that granted it
	// DeviceKey is that of the device which vouched for the party, DeviceChain
	// its certificates as a JSON list of DER; empty without one.
	DeviceKey   wire.KeyHash
	DeviceChain []byte
}

// Joins lists join codes, newest first.
func (r Queries) Joins(ctx context.Context) ([]*Join, error) {
	var out []*Join
	err := r.q.NewSelect().Model(&out).OrderExpr("created_at DESC, id").Scan(ctx)
	return out, err
}

// Join returns the join code with that ID.
func (r Queries) Join(ctx context.Context, id string) (*Join, error) {
	return row[Join](ctx, r, r.prepared.join, sqldb.Clean(id))
}

// AddJoin stores a new join code.
func (tx *Tx) AddJoin(ctx context.Context, j *Join) error {
	j.CreatedAt, j.Generation = tx.now, tx.db.inst.Generation
	_, err := tx.q.NewInsert().Model(j).Exec(ctx)
	return err
}

// RevokeJoin makes a join code useless; uses that were made stay granted.
func (tx *Tx) RevokeJoin(ctx context.Context, id string) error {
	return one(tx.q.NewRaw("UPDATE joins SET revoked_at = coalesce(revoked_at, ?) WHERE id = ?", tx.now, id).Exec(ctx))
}

// RevokeRCPJoins makes the join codes useless that an RCP of that name has not used.
func (tx *Tx) RevokeRCPJoins(ctx context.Context, name string) error {
	_, err := tx.q.NewRaw("UPDATE joins SET revoked_at = ? WHERE role = ? AND name = ? AND revoked_at IS NULL AND used < max_uses", tx.now, wire.RoleRCP, name).Exec(ctx)
	return err
}

// Requests lists certificate requests, newest first; state "" means all.
func (r Queries) Requests(ctx context.Context, state string) ([]*Request, error) {
	var out []*Request
	q := r.q.NewSelect().Model(&out).OrderExpr("requested_at DESC, id")
	if state != "" {
		q.Where("state = ?", state)
	}
	return out, q.Scan(ctx)
}

// WaitingRCPs lists the requests of RCPs that wait for an operator, newest first,
// without what they sent along.
func (r Queries) WaitingRCPs(ctx context.Context) ([]*Request, error) {
	var out []*Request
	err := r.q.NewSelect().Model(&out).ExcludeColumn("csr", "device_chain").Where("state = 'pending' AND role = ?", wire.RoleRCP).OrderExpr("requested_at DESC, id").Scan(ctx)
	return out, err
}

// Token is one API token. Of the secret only the hash is kept.
type Token struct {
	bun.BaseModel `bun:"table:tokens"`
	ID            string `bun:",pk"`
	Name          string
	Role          string
	Hash          string // hex SHA-256
	CreatedAt     time.Time
	CreatedBy     string
	ExpiresAt     time.Time
	RevokedAt     time.Time `bun:",nullzero"`
	LastUsed      time.Time `bun:",nullzero"`
}

// Tokens lists API tokens, newest first.
func (r Queries) Tokens(ctx context.Context) ([]*Token, error) {
	var out []*Token
	err := r.q.NewSelect().Model(&out).OrderExpr("created_at DESC, id").Scan(ctx)
	return out, err
}

// TokenByHash returns the token with that hash, valid or not.
func (r Queries) TokenByHash(ctx context.Context, hash string) (*Token, error) {
	t := new(Token)
	err := r.q.NewSelect().Model(t).Where("hash = ?", hash).Scan(ctx)
	return t, notFound(err)
}

// Token returns the token with that ID.
func (r Queries) Token(ctx context.Context, id string) (*Token, error) {
	t := new(Token)
	err := r.q.NewSelect().Model(t).Where("id = ?", id).Scan(ctx)
	return t, notFound(err)
}

// AddToken stores a new token.
func (tx *Tx) AddToken(ctx context.Context, t *Token) error {
	t.CreatedAt = tx.now
	_, err := tx.q.NewInsert().Model(t).Exec(ctx)
	return err
}

// RevokeToken makes a token useless.
func (tx *Tx) RevokeToken(ctx context.Context, id string) error {
	return one(tx.q.NewRaw("UPDATE tokens SET revoked_at = coalesce(revoked_at, ?) WHERE id = ?", tx.now, id).Exec(ctx))
}

// TouchToken writes when a token was last used.
func (tx *Tx) TouchToken(ctx context.Context, id string) error {
	return one(tx.q.NewRaw("UPDATE tokens SET last_used = ? WHERE id = ?", tx.now, id).Exec(ctx))
}
