package gateway

import (
	"slices"
	"time"

	"sallyport/internal/wire"
)

// Bounds on what is remembered of one boot. What is forgotten is found later,
// and never wrongly.
const (
	maxEnds  = 4
	maxGiven = 4
)

// thread follows one process through its answers. Each request for a hello
// brings it a fresh nonce, and each answer gives the one that it held before:
// what the last request brought, of whichever gateway, or random from its start.
// One process gives each of them once, and gives none that it held before
// something that it was brought since. Copies hold the same one when they part,
// and different ones from then on.
//
// Answers that get lost, other gateways in between and a restart of this one
// leave ends that nobody ever takes up, and prove nothing.
type thread struct {
	ends  []told       // what was brought, answered, and not given back yet
	given []wire.Nonce // the last ones that were given back
}

// told is a nonce that a process held when its answer was there.
type told struct {
	nonce     wire.Nonce
	sent, got time.Time
}

// breaks takes an answer over, and tells whether it cannot come from the one
// process that gave those before.
func (t *thread) breaks(a *greeting) (broken bool) {
	previous := a.hello.Previous
	if previous.IsZero() {
		return false // too old to know
	}
	broken = slices.Contains(t.given, previous)
	if i := slices.IndexFunc(t.ends, func(e told) bool { return e.nonce == previous }); i >= 0 {
		end := t.ends[i]
		for _, e := range t.ends {
			// It held end; then it was brought e, and only then was it asked.
			if end.got.Before(e.sent) && e.got.Before(a.sent) {
				broken = true
			}
		}
		t.ends = slices.Delete(t.ends, i, i+1)
	}
	if !slices.Contains(t.given, previous) {
		t.given = keepLast(t.given, previous, maxGiven)
	}
	t.ends = keepLast(t.ends, told{nonce: a.nonce, sent: a.sent, got: a.got}, maxEnds)
	return broken
}

// keepLast appends to a list of at most limit; the oldest goes.
func keepLast[T any](list []T, x T, limit int) []T {
	if len(list) >= limit {
		list = slices.Delete(list, 0, len(list)-limit+1)
	}
	return append(list, x)
}
