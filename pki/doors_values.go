package pki

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/smallstep/nosql/database"

	"sallyport/internal/doors"
)

// acmeValues is what smallstep's ACME stores into, on the gateway's values.
// Tables need not be made. Of transactions there is only the one for nonces,
// which are kept elsewhere.
type acmeValues struct {
	values doors.Values
}

func (v *acmeValues) do(f func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), acmeTime) // the interface carries none
	defer cancel()
	err := f(ctx)
	if errors.Is(err, doors.ErrNoValue) {
		return database.ErrNotFound
	}
	return err
}

// Open does nothing: what is below is open.
func (v *acmeValues) Open(string, ...database.Option) error { return nil }

// Close does nothing: what is below is closed by its owner.
func (v *acmeValues) Close() error { return nil }

// CreateTable does nothing: a table is a name.
func (v *acmeValues) CreateTable([]byte) error { return nil }

// DeleteTable is not asked for by the ACME door.
func (v *acmeValues) DeleteTable([]byte) error { return database.ErrOpNotSupported }

// Update is not asked for by the ACME door.
func (v *acmeValues) Update(*database.Tx) error { return database.ErrOpNotSupported }

// Get returns a value, or database.ErrNotFound.
func (v *acmeValues) Get(bucket, key []byte) (value []byte, err error) {
	err = v.do(func(ctx context.Context) error {
		value, err = v.values.Value(ctx, string(bucket), string(key))
		return err
	})
	return value, err
}

// Set writes a value, whatever is there.
func (v *acmeValues) Set(bucket, key, value []byte) error {
	return v.replace(bucket, key, value)
}

// Del removes a value.
func (v *acmeValues) Del(bucket, key []byte) error { return v.replace(bucket, key, nil) }

// replace swaps until nobody was faster.
func (v *acmeValues) replace(bucket, key, value []byte) error {
	const tries = 100
	return v.do(func(ctx context.Context) error {
		old, err := v.values.Value(ctx, string(bucket), string(key))
		if err != nil && !errors.Is(err, doors.ErrNoValue) {
			return err
		}
		for range tries {
			var swapped bool
			if old, swapped, err = v.values.Swap(ctx, string(bucket), string(key), old, value); err != nil || swapped {
				return err
			}
		}
		return fmt.Errorf("value %s of %s changes all the time", key, bucket)
	})
}

// CmpAndSwap writes a value if the one there is old; nil is none.
func (v *acmeValues) CmpAndSwap(bucket, key, old, value []byte) (now []byte, swapped bool, err error) {
	err = v.do(func(ctx context.Context) error {
		now, swapped, err = v.values.Swap(ctx, string(bucket), string(key), old, value)
		return err
	})
	return now, swapped, err
}

// List returns a table.
func (v *acmeValues) List(bucket []byte) (list []*database.Entry, err error) {
	err = v.do(func(ctx context.Context) error {
		all, err := v.values.Values(ctx, string(bucket))
		for name, value := range all {
			list = append(list, &database.Entry{Bucket: bytes.Clone(bucket), Key: []byte(name), Value: value})
		}
		return err
	})
	return list, err
}

var _ database.DB = (*acmeValues)(nil)
