package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"sallyport/gateway/store"
	"sallyport/internal/doors"
)

const (
	// maxDoorValues bounds what the ACME door keeps of each kind; clients
	// beyond it are refused until something is forgotten.
	maxDoorValues = 200_000
	maxDoorValue  = 256 << 10 // bytes of one
	maxDoorList   = 10_000
	// orderLife is how long an order may be completed. An account's index of
	// its orders names none that is older when it is written, and is read with
	// every order that it names: it must be forgotten before they are.
	orderLife   = 24 * time.Hour
	indexMemory = orderLife + 2*doorUpkeep
	orderMemory = orderLife + indexMemory + 2*doorUpkeep
	// leafMemory is how long a leaf can be fetched and revoked by its client.
	leafMemory = doors.Life + certificateMemory
	// accountMemory is how long an account is kept that asks for nothing.
	accountMemory = 400 * 24 * time.Hour
)

// doorMemory says how long what is kept of ACME clients is kept. A bucket that
// does not stand here is not written to.
var doorMemory = map[string]time.Duration{
	"acme_orders": orderMemory, "acme_authzs": orderMemory, "acme_challenges": orderMemory, "acme_account_orders_index": indexMemory,
	"acme_certs": leafMemory, "acme_serial_certs_index": leafMemory,
	"acme_accounts": accountMemory, "acme_keyID_accountID_index": accountMemory,
}

// doorValues keeps what the ACME door knows in the database.
type doorValues struct{ db *store.DB }

// Value returns one value, or doors.ErrNoValue.
func (v doorValues) Value(ctx context.Context, bucket, name string) ([]byte, error) {
	b, err := v.db.DoorValue(ctx, bucket, name)
	if errors.Is(err, store.ErrNotFound) {
		return nil, doors.ErrNoValue
	}
	return b, err
}

// Values returns a bucket.
func (v doorValues) Values(ctx context.Context, bucket string) (map[string][]byte, error) {
	rows, err := v.db.DoorValues(ctx, bucket, maxDoorList)
	if err != nil {
		return nil, err
	}
	out := make(map[string][]byte, len(rows))
	for _, r := range rows {
		out[r.Name] = r.Value
	}
	return out, nil
}

// Swap writes a value if the one there is old.
func (v doorValues) Swap(ctx context.Context, bucket, name string, old, value []byte) (now []byte, swapped bool, err error) {
	if _, ok := doorMemory[bucket]; !ok || len(value) > maxDoorValue {
		return nil, false, fmt.Errorf("acme: %d bytes for %q are not kept", len(value), bucket)
	}
	err = v.db.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		now, err = tx.DoorValue(ctx, bucket, name)
		if errors.Is(err, store.ErrNotFound) {
			now, err = nil, nil
		}
		if err != nil || !bytes.Equal(now, old) {
			return err
		}
		if value == nil {
			if swapped = true; now == nil {
				return nil
			}
			return tx.DeleteDoorValue(ctx, bucket, name)
		}
		if now == nil {
			switch n, err := tx.CountDoorValues(ctx, bucket); {
			case err != nil:
				return err
			case n >= maxDoorValues:
				return fmt.Errorf("acme: %d values of %s are kept, the limit", n, bucket)
			}
		}
		swapped = true
		now = value
		return tx.PutDoorValue(ctx, bucket, name, value)
	})
	if err != nil {
		return nil, false, err
	}
	return now, swapped, nil
}

// forget drops what is over.
func (v doorValues) forget(ctx context.Context) error {
	return v.db.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		for bucket, memory := range doorMemory {
			if err := tx.ForgetDoorValues(ctx, bucket, tx.Now().Add(-memory)); err != nil {
				return err
			}
		}
		return nil
	})
}
