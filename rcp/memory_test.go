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
	step := func(what string, change func(), want bool) {
		t.Helper()
		if change != nil {
			change()
		}
		now = now.Add(look)
		if due := trim.see(now, is); due != want {
			t.Errorf("%s: due %v, want %v", what, due, want)
		}
	}
	for range 5 {
		step("nodes come", func() { is.moved += 200; is.channels += 200 }, false)
	}
	step("the last of them", func() { is.moved += 10; is.channels += 10 }, false)
	step("calm", nil, false)
	step("calm", nil, false)
	step("calm for long enough", nil, true)
	for range 120 {
		step("rest, with a node now and then", func() { is.moved++ }, false)
	}
	step("the gateway looks at every node", func() { is.open += 512 }, false)
	step("half of the sessions have ended", func() { is.open -= 256; is.ended += 256 }, false)
	step("all but a few", func() { is.open -= 225; is.ended += 225 }, true)
	step("the rest", func() { is.open -= 31; is.ended += 31 }, false)
	for range 58 {
		step("a second wave, too soon", func() { is.ended += 10 }, false)
	}
	step("as many as there are channels", func() { is.ended += 1010 }, true)
	step("another storm", func() { is.moved += 300 }, false)
	for range 2 {
		step("it abates", func() { is.moved += 3 }, false)
	}
	step("it is over", func() { is.moved += 3 }, true)
	for range 100 {
		step("sessions open and close, always as many", func() { is.open = 300; is.ended += 2 }, false)
	}
}
