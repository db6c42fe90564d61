package pki

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"
)

// raTrouble is what keeps the external CA from issuing. That one is away is
// noticed by asking how it is; that it refuses whatever it is asked for (it does
// not know the provisioner's key any more, its database is full) only by asking
// for a certificate.
type raTrouble struct {
	why     string // empty: there is none
	since   time.Time
	refuses bool
}

// problem is what keeps the external CA from issuing, and since when; empty:
// nothing that we know of.
func (r *registrar) problem() (why string, since time.Time) {
	r.troubleMu.Lock()
	defer r.troubleMu.Unlock()
	return r.trouble.why, r.trouble.since
}

func (r *registrar) refuses() bool {
	r.troubleMu.Lock()
	defer r.troubleMu.Unlock()
	return r.trouble.refuses
}

// met notes what came of a request to sign: refused says that the external CA
// answered, and that it was this request that it did not like.
func (r *registrar) met(ctx context.Context, err error, refused bool) {
	switch {
	case err == nil:
		r.note(raTrouble{})
	case refused || stopping(ctx):
	default:
		r.note(raTrouble{why: err.Error(), refuses: true})
	}
}

// stopping tells whether it is us who gave up.
func stopping(ctx context.Context) bool { return errors.Is(ctx.Err(), context.Canceled) }

// note takes over how it is now. Since when, and the first words, stay while it
// lasts; that it refuses is over with the next certificate only.
func (r *registrar) note(now raTrouble) {
	r.troubleMu.Lock()
	defer r.troubleMu.Unlock()
	switch {
	case now.why == "":
		r.trouble = raTrouble{}
	case r.trouble.why == "":
		now.since = time.Now().UTC().Truncate(time.Second)
		r.trouble = now
	case now.refuses && !r.trouble.refuses:
		now.since = r.trouble.since
		r.trouble = now
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
