package pki

import (
	"context"
	"fmt"
	"net/http"
)

// met notes what came of a request to sign: refused says that the external CA
// answered, and that it was this request that it did not like. That the CA is away
// is noticed by asking how it is; that it refuses whatever it is asked for (it does
// not know the provisioner's key any more, its database is full) only by asking for
// a certificate.
func (r *registrar) met(ctx context.Context, err error, refused bool) {
	if err == nil || !refused {
		r.trouble.asked(ctx, err)
	}
}

// healthy asks how the external CA is.
func (r *registrar) healthy(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.URL+"/health", http.NoBody)
	if err != nil {
		return err
	}
	resp, err := r.do(req)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrExternal, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode >= http.StatusInternalServerError {
		return fmt.Errorf("%w at %s answers %s", ErrExternal, r.URL, resp.Status)
	}
	return nil
}
