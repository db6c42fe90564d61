package channel

import (
	"sync"
	"time"
)

// deadline is a moment that others can wait for and move, as in net.Pipe.
type deadline struct {
	mu     sync.Mutex
	timer  *time.Timer
	passed chan struct{} // made on demand; closed when the moment has passed
	past   bool
}

// set moves the deadline; the zero time means never.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	wait := time.Until(t)
	switch {
	case !t.IsZero() && wait <= 0:
		d.expire()
		return
	case d.past:
		d.past, d.passed = false, nil
	}
	if t.IsZero() {
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(wait, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.timer == timer {
			d.expire()
		}
	})
	d.timer = timer
}

func (d *deadline) expire() {
	if d.past {
		return
	}
	d.past = true
	if d.passed == nil {
		d.passed = make(chan struct{})
	}
	close(d.passed)
}

// wait returns a channel that is closed once the deadline has passed.
func (d *deadline) wait() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.passed == nil {
		d.passed = make(chan struct{})
	}
	return d.passed
}

func (d *deadline) exceeded() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.past
}

// stop releases the timer.
func (d *deadline) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
}
