package channel

import (
	"math/rand/v2"
	"time"
)

// Backoff spaces attempts out, so that a thousand diallers do not come at once
// when what they dial comes back.
type Backoff struct {
	First time.Duration // the first attempt, and each one after a lost connection, waits for a random part of it; default 1 s
	Min   time.Duration // around which the wait after the first failure lies; default 500 ms
	Max   time.Duration // which no wait exceeds; default 60 s
	Probe time.Duration // the first wait, roughly, before an attempt to return to QUIC, or to reach a party that is there already; it doubles up to 15 min; default 30 s
}

func (b Backoff) withDefaults() Backoff {
	set(&b.First, time.Second)
	set(&b.Min, 500*time.Millisecond)
	set(&b.Max, time.Minute)
	set(&b.Probe, 30*time.Second)
	return b
}

// first is the wait before a first attempt.
func (b Backoff) first() time.Duration { return rand.N(b.First + 1) }

// after is the wait after so many failures in a row (1 or more): it doubles
// from Min to Max, and each lies anywhere between its half and its whole.
func (b Backoff) after(failures int) time.Duration {
	d := b.Max
	if shift := failures - 1; shift < 20 {
		d = min(b.Max, b.Min<<shift)
	}
	return d/2 + rand.N(d/2+1)
}
