package pki

import "context"

// KeepNow is one turn of Keep, for tests that need not wait for its clock.
func (a *Authority) KeepNow(ctx context.Context) error {
	a.look(ctx)
	return a.keepNow(ctx)
}
