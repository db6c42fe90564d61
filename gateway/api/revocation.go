package api

import (
	"context"
	"time"

	"sallyport/internal/wire"
)

// Revocation is one line of `revocation list`: one key that is not trusted any
// more. A party that was revoked may be back with another one.
type Revocation struct {
	Key         wire.KeyHash `json:"key"`
	Fingerprint string       `json:"fingerprint"`
	Role        wire.Role    `json:"role"`
	ID          wire.ID      `json:"id"`
	Name        string       `json:"name"`
	Revoked     time.Time    `json:"revoked"`
	Reason      string       `json:"reason"`
	// NotAfter is the end of the last leaf for this key.
	NotAfter time.Time `json:"not_after"`
	// InForce is false until the signed set that names the key is out.
	InForce bool `json:"in_force"`
}

// Revocations lists the revoked keys, newest first.
func (c *Client) Revocations(ctx context.Context) ([]Revocation, error) {
	return list[Revocation](ctx, c, "/revocations", values(), Page{})
}
