package store

import (
	"context"
	"fmt"
	"time"

	"github.com/uptrace/bun"

	"sallyport/gateway/api"
	"sallyport/internal/wire"
)

// Certificate is one leaf, as the lists of revoked ones name it.
type Certificate struct {
	bun.BaseModel `bun:"table:certificates"`
	Issuer        wire.KeyHash `bun:",pk"` // of the intermediate
	Serial        string       `bun:",pk"` // lower-case hex
	Door          string       // by which it left; empty: of a party of ours
	KeyHash       wire.KeyHash
	Names         []string
	Via           string // UUID of the party on whose side its client is, or who vouched
	IssuedAt      time.Time
	NotAfter      time.Time
	RevokedAt     time.Time `bun:",nullzero"`
	Reason        int       // RFC 5280, 5.3.1
}

// AddCertificate notes a leaf. Nothing of it changes afterwards but its
// revocation.
func (tx *Tx) AddCertificate(ctx context.Context, c *Certificate) error {
	c.IssuedAt, c.NotAfter = tx.now, c.NotAfter.UTC()
	if c.Names == nil {
		c.Names = []string{}
	}
	_, err := tx.prepared.addCertificate.Exec(ctx, tx.q, c)
	return err
}

// revocation joins what is known of a party's key: the party's revocation is
// that of every leaf for it.
const revocation = "coalesce(c.revoked_at, CASE WHEN c.door = '' THEN k.revoked_at END)"

func (r Queries) certificates() *bun.SelectQuery {
	return r.q.NewSelect().ColumnExpr("c.issuer, c.serial, c.door, c.key_hash, c.names, c.via, c.issued_at, c.not_after, c.reason").
		ColumnExpr(revocation + " AS revoked_at").
		TableExpr("certificates AS c").Join("LEFT JOIN keys AS k ON k.key_hash = c.key_hash")
}

// Certificate returns the leaf of an issuer with that serial number.
func (r Queries) Certificate(ctx context.Context, issuer wire.KeyHash, serial string) (*Certificate, error) {
	c := new(Certificate)
	err := r.certificates().Where("c.issuer = ?", issuer).Where("c.serial = ?", serial).Scan(ctx, c)
	return c, notFound(err)
}

// RevokedCertificates lists the leaves of an issuer that are revoked and did
// not end before since.
func (r Queries) RevokedCertificates(ctx context.Context, issuer wire.KeyHash, since time.Time) ([]*Certificate, error) {
	var out []*Certificate
	err := r.certificates().Where("c.issuer = ?", issuer).Where("c.not_after >= ?", since.UTC()).
		Where(revocation+" IS NOT NULL").OrderExpr("c.serial").Scan(ctx, &out)
	return out, err
}

// DoorCertificates lists the leaves that left by a door and did not end before
// since, newest first.
func (r Queries) DoorCertificates(ctx context.Context, since time.Time) ([]*Certificate, error) {
	var out []*Certificate
	err := r.certificates().Where("c.door <> ''").Where("c.not_after >= ?", since.UTC()).OrderExpr("c.issued_at DESC, c.serial").Scan(ctx, &out)
	return out, err
}

// FindCertificates returns the leaves of doors whose serial number is, or
// begins with, serial.
func (r Queries) FindCertificates(ctx context.Context, serial string) ([]*Certificate, error) {
	var out []*Certificate
	err := r.certificates().Where("c.door <> ''").Where("substr(c.serial, 1, ?) = ?", len(serial), serial).Limit(10).Scan(ctx, &out)
	return out, err
}

// RevokeCertificate revokes one leaf that left by a door. One that is revoked
// already stays as it is: [ErrExists].
func (tx *Tx) RevokeCertificate(ctx context.Context, issuer wire.KeyHash, serial string, reason int) error {
	n, err := affected(tx.q.NewRaw("UPDATE certificates SET revoked_at = ?, reason = ? WHERE issuer = ? AND serial = ? AND door <> '' AND revoked_at IS NULL",
		tx.now, reason, issuer, serial).Exec(ctx))
	if err != nil || n > 0 {
		return err
	}
	if _, err := tx.Certificate(ctx, issuer, serial); err != nil {
		return err
	}
	return fmt.Errorf("certificate %s: %w: it is revoked", serial, ErrExists)
}

// Compromised tells whether a leaf of a door with that key was revoked because
// others may have the key.
func (r Queries) Compromised(ctx context.Context, key wire.KeyHash) (bool, error) {
	return r.q.NewSelect().TableExpr("certificates").Where("key_hash = ?", key).Where("door <> ''").Where("revoked_at IS NOT NULL").Where("reason = ?", api.RevocationReasons["key-compromise"]).Exists(ctx)
}

// ForgetCertificates drops the leaves that ended before.
func (tx *Tx) ForgetCertificates(ctx context.Context, before time.Time) error {
	_, err := tx.q.NewRaw("DELETE FROM certificates WHERE not_after < ?", before.UTC()).Exec(ctx)
	return err
}

// DoorValue is one value that the ACME door keeps.
type DoorValue struct {
	bun.BaseModel `bun:"table:door_values"`
	Bucket        string `bun:",pk"`
	Name          string `bun:",pk"`
	Value         []byte
	ChangedAt     time.Time
}

// DoorValue returns one value.
func (r Queries) DoorValue(ctx context.Context, bucket, name string) ([]byte, error) {
	v := new(DoorValue)
	err := r.q.NewSelect().Model(v).Where("bucket = ?", bucket).Where("name = ?", name).Scan(ctx)
	return v.Value, notFound(err)
}

// DoorValues lists a bucket, at most limit of it.
func (r Queries) DoorValues(ctx context.Context, bucket string, limit int64) ([]*DoorValue, error) {
	var out []*DoorValue
	err := r.q.NewSelect().Model(&out).Where("bucket = ?", bucket).OrderExpr("name").Limit(limit).Scan(ctx)
	return out, err
}

// CountDoorValues counts a bucket.
func (r Queries) CountDoorValues(ctx context.Context, bucket string) (int64, error) {
	return r.q.NewSelect().Model((*DoorValue)(nil)).Where("bucket = ?", bucket).Count(ctx)
}

// PutDoorValue writes a value.
func (tx *Tx) PutDoorValue(ctx context.Context, bucket, name string, value []byte) error {
	v := &DoorValue{Bucket: bucket, Name: name, Value: value, ChangedAt: tx.now}
	_, err := tx.q.NewInsert().Model(v).On("CONFLICT (bucket, name) DO UPDATE").
		Set("value = EXCLUDED.value, changed_at = EXCLUDED.changed_at").Exec(ctx)
	return err
}

// DeleteDoorValue removes a value; one that is not there is [ErrNotFound].
func (tx *Tx) DeleteDoorValue(ctx context.Context, bucket, name string) error {
	return one(tx.q.NewRaw("DELETE FROM door_values WHERE bucket = ? AND name = ?", bucket, name).Exec(ctx))
}

// ForgetDoorValues drops what did not change since.
func (tx *Tx) ForgetDoorValues(ctx context.Context, bucket string, since time.Time) error {
	_, err := tx.q.NewRaw("DELETE FROM door_values WHERE bucket = ? AND changed_at < ?", bucket, since.UTC()).Exec(ctx)
	return err
}
