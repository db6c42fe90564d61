package rcp

import (
	"sync"
	"time"
)

// ear hears the signals of one node, as listenTo does, without a goroutine that
// waits for them; of a party that waits for a certificate it hears nothing but
// the end. Thousands of channels are at rest nearly all of the time: what
// waits for each of them is what an RCP's memory is made of.
type ear struct {
	r *Relay
	a *attached

	// Of the one who is at work.
	s     *signals // nil: there is no stream
	began time.Time
	retry time.Duration

	mu   sync.Mutex
	shut bool
	wake *time.Timer // of the next try
	work sync.WaitGroup
}

// open asks for the stream of signals, and reads it.
func (e *ear) open() {
	if e.a.peer.Pending {
		return
	}
	e.began = time.Now()
	s, err := e.r.openSignals(e.a.listening, e.a)
	if err != nil {
		e.lost(err)
		return
	}
	e.s = s
	e.hear()
}

// hear takes the lines that are there, and has itself called again when there are more.
func (e *ear) hear() {
	for {
		if n, ok := e.s.body.(notifier); ok && e.s.lines.Buffered() == 0 && n.Notify(func() { e.do(e.hear) }) {
			return
		}
		if err := e.r.nextSignal(e.a.listening, e.a, e.s); err != nil {
			_ = e.s.body.Close()
			e.s = nil
			e.lost(err)
			return
		}
	}
}

// lost follows the end of a stream: another is asked for later, unless the channel must
// be cut, drains, or has ended.
func (e *ear) lost(err error) {
	if why := forged(err); why != nil {
		e.r.cut(e.a, why)
		return
	}
	if e.a.listening.Err() != nil {
		return
	}
	if time.Since(e.began) > retryMost {
		e.retry = retryFirst
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.shut {
		return
	}
	e.wake = time.AfterFunc(e.retry, func() {
		e.do(func() {
			e.r.log.Debug("stream of the peer ended; asking again", "peer", e.a.peer.String(), "error", err)
			e.open()
		})
	})
	e.retry = min(2*e.retry, retryMost)
}

// do does the next piece of work, one at a time: each is called for by the one before.
func (e *ear) do(f func()) {
	e.mu.Lock()
	if e.shut {
		e.mu.Unlock()
		return
	}
	e.work.Add(1)
	e.mu.Unlock()
	defer e.work.Done()
	f()
}

// end is called when the channel has ended.
func (e *ear) end() {
	e.a.hush()
	e.mu.Lock()
	e.shut = true
	if e.wake != nil {
		e.wake.Stop()
	}
	e.mu.Unlock()
	e.work.Wait()
	if e.s != nil {
		_ = e.s.body.Close()
	}
	e.r.farewell(e.a)
}
