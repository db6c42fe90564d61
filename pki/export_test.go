package pki

import (
	"context"

	"sallyport/internal/wire"
)

// KeepNow is one turn of Keep, for tests that need not wait for its clock.
func (a *Authority) KeepNow(ctx context.Context) error {
	a.look(ctx)
	return a.keepNow(ctx)
}

// SignAsBefore asks for a revocation set as gateways did that did not say yet which
// one it follows.
func SignAsBefore(ctx context.Context, c *Client, set wire.Revocations) (wire.Envelope, error) {
	return ask[wire.Envelope](ctx, c, pathRevocations, set, maxState)
}
