package enroll_test

import (
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/enroll"
)

// A party with a certificate leaves its enrolment channel when the verdict is
// there, and not before: a minute is too long, and its answer must get out.
func TestLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		done, decided := make(chan struct{}), make(chan struct{})
		var after time.Duration
		time.AfterFunc(5*time.Second, func() { close(decided) })
		enroll.Leave(done, decided, func(cause error) {
			if after = time.Since(began); cause == nil {
				t.Error("no cause is given")
			}
		})
		if after <= 5*time.Second || after > 10*time.Second {
			t.Errorf("left after %v, want a moment after the verdict", after)
		}

		// A channel that ends by itself is left alone.
		for name, verdict := range map[string]chan struct{}{"before a verdict": make(chan struct{}), "after it": decided} {
			ended := make(chan struct{})
			time.AfterFunc(100*time.Millisecond, func() { close(ended) })
			enroll.Leave(ended, verdict, func(error) { t.Error(name + ": ended twice") })
		}
	})
}
