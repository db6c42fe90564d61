package pki

import (
	"context"
	"errors"
	"sync"
	"time"
)

// trouble is what keeps somebody who signs for an authority, an external CA or a
// signer, from doing so. That it is away is noticed by asking how it is; that it
// refuses only by asking for a signature.
type trouble struct {
	mu      sync.Mutex
	why     string // empty: there is none
	since   time.Time
	refuses bool
	signed  time.Time // the last signature
}

// stopping tells whether it is us who gave up.
func stopping(ctx context.Context) bool { return errors.Is(ctx.Err(), context.Canceled) }

// problem is what it is, and since when; empty: nothing that we know of.
func (t *trouble) problem() (why string, since time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.why, t.since
}

func (t *trouble) refusing() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.refuses
}

// idle tells whether the last signature is longer ago than that; zero asks for none.
func (t *trouble) idle(than time.Duration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return than > 0 && (t.signed.IsZero() || time.Since(t.signed) > than)
}

// asked notes what came of asking for a signature.
func (t *trouble) asked(ctx context.Context, err error) {
	t.note(ctx, err, true)
	if err == nil {
		t.mu.Lock()
		t.signed = time.Now()
		t.mu.Unlock()
	}
}

// note takes over how it is now, but for what we did not wait for. Since when, and
// the first words, stay while it lasts; that it refuses is over with the next
// signature only.
func (t *trouble) note(ctx context.Context, err error, refuses bool) {
	if err != nil && stopping(ctx) {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case err == nil:
		t.why, t.since, t.refuses = "", time.Time{}, false
	case t.why == "":
		t.why, t.since, t.refuses = err.Error(), time.Now().UTC().Truncate(time.Second), refuses
	case refuses && !t.refuses:
		t.why, t.refuses = err.Error(), true
	}
}

// look asks how it is, and, if it refused the last time or was asked for no signature
// for a while (zero: for ever), for one: sign notes what comes of that.
func (t *trouble) look(ctx context.Context, while time.Duration, healthy, sign func(context.Context) error) error {
	err := healthy(ctx)
	if err == nil && (t.refusing() || t.idle(while)) {
		return sign(ctx)
	}
	t.note(ctx, err, false)
	return err
}
