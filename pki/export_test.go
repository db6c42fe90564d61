package pki

import (
	"context"
	"net/http"

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

// OnState calls f between an authority's answer with its state, and the client that
// asked for it.
func OnState(c *Client, f func()) {
	c.http.Transport = &spied{c.http.Transport.(*http.Transport), f}
}

type spied struct {
	*http.Transport
	f func()
}

func (s *spied) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := s.Transport.RoundTrip(r)
	if r.URL.Path == pathState {
		s.f()
	}
	return resp, err
}
