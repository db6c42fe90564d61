package rcp

import (
	"testing"
	"time"
)

// TestTrimmer follows an RCP with a thousand nodes through its day, look by
// look: memory is given back when a storm of channels or a wave of streams is
// over, and not while either lasts.
func TestTrimmer(t *testing.T) {
	now := time.Now()
	trim := trimmer{at: now}
	is := tide{}
	step := func(what string, change func(), wantDue, wantBusy bool) {
		t.Helper()
		if change != nil {
			change()
		}
		now = now.Add(look)
		if due, busy := trim.see(now, is); due != wantDue || busy != wantBusy {
			t.Errorf("%s: due %v, busy %v; want %v, %v", what, due, busy, wantDue, wantBusy)
		}
	}
	for range 5 {
		step("nodes come", func() { is.moved += 200; is.channels += 200 }, false, true)
	}
	step("the last of them", func() { is.moved += 10; is.channels += 10 }, false, false)
	step("calm", nil, false, false)
	step("calm", nil, false, false)
	step("calm for long enough", nil, true, false)
	for range 120 {
		step("rest", nil, false, false)
	}
	step("the gateway looks at every node", func() { is.open += 512 }, false, false)
	step("half of the sessions have ended", func() { is.open -= 256; is.ended += 256 }, false, false)
	step("all but a few", func() { is.open -= 200; is.ended += 200 }, true, false)
	step("the rest", func() { is.open -= 56; is.ended += 56 }, false, false)
	for range 58 {
		step("a second wave, too soon", func() { is.ended += 10 }, false, false)
	}
	step("as many as there are channels", func() { is.ended += 1010 }, true, false)
	for range 100 {
		step("sessions open and close, always as many", func() { is.open = 300; is.ended += 2 }, false, false)
	}
}
