package bus

import "testing"

func woken(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

func TestWakeUpsAreMergedAndReachTheirTopicOnly(t *testing.T) {
	var b Local
	b.Wake(Events) // nobody listens: must not block or panic
	one, cancelOne := b.Subscribe(Events)
	two, cancelTwo := b.Subscribe(Events)
	other, cancelOther := b.Subscribe(Action("a"))
	defer cancelTwo()
	defer cancelOther()

	for range 100 {
		b.Wake(Events) // never blocks, though nobody reads
	}
	if !woken(one) || !woken(two) {
		t.Fatal("a subscriber was not woken")
	}
	if woken(one) || woken(two) {
		t.Fatal("wake-ups were not merged into one")
	}
	if woken(other) {
		t.Fatal("a wake-up reached another topic")
	}

	cancelOne()
	cancelOne() // ending twice is harmless
	b.Wake(Events)
	if woken(one) {
		t.Fatal("woken after the subscription ended")
	}
	if !woken(two) {
		t.Fatal("ending one subscription ended another")
	}
}

func TestEndedSubscriptionsLeaveNothingBehind(t *testing.T) {
	var b Local
	for range 1000 {
		_, cancel := b.Subscribe(Action("x"))
		cancel()
	}
	if n := len(b.subs); n != 0 {
		t.Fatalf("%d topics are kept for nobody", n)
	}
}
