package store

import (
	"context"
	"errors"
	"testing"
	"time"

	"sallyport/internal/wire"
)

func TestCertificates(t *testing.T) {
	db := temp(t)
	const spiffe, other = wire.KeyHash("aa"), wire.KeyHash("bb")
	end := time.Now().Add(time.Hour)
	node := wire.NewID()
	update(t, db, func(tx *Tx) error {
		return errors.Join(
			tx.PutKey(ctx, &Key{KeyHash: "k1", Role: wire.RoleNode, PartyID: node, IssuedAt: tx.Now(), NotAfter: end}),
			tx.AddCertificate(ctx, &Certificate{Issuer: spiffe, Serial: "1", KeyHash: "k1", NotAfter: end}),
			tx.AddCertificate(ctx, &Certificate{Issuer: spiffe, Serial: "2", KeyHash: "k1", NotAfter: time.Now().Add(-time.Hour)}),
			tx.AddCertificate(ctx, &Certificate{Issuer: other, Serial: "1", Door: "acme", KeyHash: "k1", Names: []string{"a.example"}, NotAfter: end}),
			tx.AddCertificate(ctx, &Certificate{Issuer: other, Serial: "1f", Door: "est", KeyHash: "k2", Names: []string{"b.example"}, NotAfter: end}),
		)
	})
	revoked := func(issuer wire.KeyHash) int {
		t.Helper()
		list, err := db.RevokedCertificates(ctx, issuer, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	if n := revoked(spiffe) + revoked(other); n != 0 {
		t.Errorf("%d are revoked before anything was", n)
	}
	// A party's revocation is that of its leaves, and not of what another
	// program has with the same key.
	update(t, db, func(tx *Tx) error {
		_, err := tx.RevokeKeys(ctx, node, "test")
		return err
	})
	if a, b := revoked(spiffe), revoked(other); a != 1 || b != 0 {
		t.Errorf("%d and %d, want the one leaf that did not end", a, b)
	}
	// A leaf of a door is revoked by itself, once.
	update(t, db, func(tx *Tx) error { return tx.RevokeCertificate(ctx, other, "1f", 1) })
	for key, want := range map[wire.KeyHash]bool{"k2": true, "k1": false} {
		if bad, err := db.Compromised(ctx, key); err != nil || bad != want {
			t.Errorf("the key %s is compromised: %v, %v", key, bad, err)
		}
	}
	err := db.Update(ctx, func(ctx context.Context, tx *Tx) error { return tx.RevokeCertificate(ctx, other, "1f", 4) })
	if !errors.Is(err, ErrExists) {
		t.Errorf("twice: %v", err)
	}
	for what, serial := range map[string]string{"of a party": "1", "unknown": "7"} {
		err := db.Update(ctx, func(ctx context.Context, tx *Tx) error { return tx.RevokeCertificate(ctx, spiffe, serial, 1) })
		if err == nil {
			t.Errorf("%s: revoked by its serial number", what)
		}
	}
	c, err := db.Certificate(ctx, other, "1f")
	if err != nil || c.Reason != 1 || c.RevokedAt.IsZero() || len(c.Names) != 1 || c.Names[0] != "b.example" {
		t.Errorf("%+v %v", c, err)
	}
	if list, err := db.DoorCertificates(ctx, time.Now()); err != nil || len(list) != 2 {
		t.Errorf("%d leaves of doors, %v", len(list), err)
	}
	if list, err := db.FindCertificates(ctx, "1f"); err != nil || len(list) != 1 {
		t.Errorf("%d found, %v", len(list), err)
	}
	update(t, db, func(tx *Tx) error { return tx.ForgetCertificates(ctx, time.Now()) })
	if _, err := db.Certificate(ctx, spiffe, "2"); !errors.Is(err, ErrNotFound) {
		t.Errorf("one that ended is still there: %v", err)
	}
}

func TestDoorValues(t *testing.T) {
	db := temp(t)
	update(t, db, func(tx *Tx) error {
		return errors.Join(tx.PutDoorValue(ctx, "b", "x", []byte("1")), tx.PutDoorValue(ctx, "b", "x", []byte("2")), tx.PutDoorValue(ctx, "c", "x", []byte("3")))
	})
	if v, err := db.DoorValue(ctx, "b", "x"); err != nil || string(v) != "2" {
		t.Errorf("%q %v", v, err)
	}
	if n, err := db.CountDoorValues(ctx, "b"); err != nil || n != 1 {
		t.Errorf("%d %v", n, err)
	}
	if list, err := db.DoorValues(ctx, "c", 5); err != nil || len(list) != 1 || string(list[0].Value) != "3" {
		t.Errorf("%v %v", list, err)
	}
	update(t, db, func(tx *Tx) error {
		return errors.Join(tx.ForgetDoorValues(ctx, "b", time.Now().Add(time.Minute)), tx.DeleteDoorValue(ctx, "c", "x"))
	})
	for _, bucket := range []string{"b", "c"} {
		if _, err := db.DoorValue(ctx, bucket, "x"); !errors.Is(err, ErrNotFound) {
			t.Errorf("bucket %s: %v", bucket, err)
		}
	}
	err := db.Update(ctx, func(ctx context.Context, tx *Tx) error { return tx.DeleteDoorValue(ctx, "c", "x") })
	if !errors.Is(err, ErrNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
}
