package gateway

import (
	"context"
	"slices"

	"sallyport/gateway/api"
)

func (r *rest) listRevocations(ctx context.Context, in *Page) (*body[api.List[api.Revocation]], error) {
	keys, err := r.s.store.RevokedKeys(ctx)
	if err != nil {
		return nil, err
	}
	slices.Reverse(keys)
	out := make([]api.Revocation, len(keys))
	for i, k := range keys {
		out[i] = api.Revocation{Key: k.KeyHash, Fingerprint: k.KeyHash.Fingerprint(), Role: k.Role, ID: k.PartyID, Name: k.Name,
			Revoked: utc(k.RevokedAt), Reason: k.Reason, NotAfter: utc(k.NotAfter), InForce: r.s.id.Revoked(k.KeyHash)}
	}
	l, err := slicePage(out, *in, func(v api.Revocation) string { return string(v.Key) })
	return answer(l), err
}
