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

// due tells whether a signature is asked for to know: it was refused the last time, or
// the last one is longer ago than while (zero: that does not count).
func (t *trouble) due(while time.Duration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.refuses || while > 0 && time.Since(t.signed) > while
}

// asked notes what came of asking for a signature.
func (t *trouble) asked(ctx context.Context, err error) { t.note(ctx, err, true) }

// note takes over how it is now, but for what we did not wait for. Since when, and
// the first words, stay while it lasts; that it refuses is over with the next
// signature only. signing says that one was asked for.
func (t *trouble) note(ctx context.Context, err error, signing bool) {
	if err != nil && stopping(ctx) {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case err == nil:
		t.why, t.since, t.refuses = "", time.Time{}, false
		if signing {
			t.signed = time.Now()
		}
	case t.why == "":
		t.why, t.since, t.refuses = err.Error(), time.Now().UTC().Truncate(time.Second), signing
	case signing && !t.refuses:
		t.why, t.refuses = err.Error(), true
	}
}

// look asks how it is, and, if it refused the last time or was asked for no signature
// for a while (zero: for ever), for one: sign notes what comes of that.
func (t *trouble) look(ctx context.Context, while time.Duration, healthy, sign func(context.Context) error) error {
	err := healthy(ctx)
	if err == nil && t.due(while) {
		return sign(ctx)
	}
	t.note(ctx, err, false)
	return err
}
