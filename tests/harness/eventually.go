package harness

import (
	"testing"
	"time"
)

// pollEvery is how often a condition is asked: often enough for deadlines of
// one second, seldom enough not to load what it waits for.
const pollEvery = 25 * time.Millisecond

// Eventually calls f until it returns nil and returns how long that took. When
// the time is over the test fails with the last error.
func Eventually(t testing.TB, within time.Duration, what string, f func() error) time.Duration {
	t.Helper()
	began := time.Now()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		err := f()
		took := time.Since(began)
		if err == nil {
			return took
		}
		if took > within {
			t.Fatalf("%s: not within %v: %v", what, within, err)
		}
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatalf("%s: %v: %v", what, t.Context().Err(), err)
		}
	}
}

// Holds calls f until the time is over and fails the test at its first error.
func Holds(t testing.TB, during time.Duration, what string, f func() error) {
	t.Helper()
	end := time.NewTimer(during)
	defer end.Stop()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		if err := f(); err != nil {
			t.Fatalf("%s: did not hold for %v: %v", what, during, err)
		}
		select {
		case <-tick.C:
		case <-end.C:
			return
		}
	}
}
