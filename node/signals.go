package node

import (
	"net/http"
	"slices"
	"sync"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/wire"
)

// signalEvery spaces the lines of one stream; an RCP takes 10 a second.
const signalEvery = 150 * time.Millisecond

// signals tells the streams of all channels that there may be something new.
type signals struct {
	mu     sync.Mutex
	kicks  int64
	change chan struct{}
}

// wake makes every stream compare what it sent with what is.
func (s *signals) wake() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.change != nil {
		close(s.change)
		s.change = nil
	}
}

// kick makes every stream send a line, even the same: to a gateway a repeated
// hint is a new one.
func (s *signals) kick() {
	s.mu.Lock()
	s.kicks++
	s.mu.Unlock()
	s.wake()
}

func (s *signals) next() (kicks int64, changed <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.change == nil {
		s.change = make(chan struct{})
	}
	return s.kicks, s.change
}

// serveSignals answers GET /v1/signals: a line now, and one for each change,
// until the channel ends.
func (in *instance) serveSignals(w http.ResponseWriter, r *http.Request, c *channel.Conn, generation int64) {
	ctl := http.NewResponseController(w)
	w.Header().Set("Content-Type", "application/x-ndjson")
	drain := c.DrainRequested()
	var last wire.Signal
	lastKicks := int64(-1)
	for {
		kicks, changed := in.signals.next()
		s := in.signal(generation)
		s.Draining = c.Draining()
		if kicks != lastKicks || s.Digest != last.Digest || s.Draining != last.Draining || !slices.Equal(s.Hints, last.Hints) {
			line, err := wire.AppendLine(nil, s)
			if err != nil {
				in.log.Error("encode signal", "error", err)
				return
			}
			if _, err := w.Write(line); err != nil {
				return
			}
			if err := ctl.Flush(); err != nil {
				return
			}
			last, lastKicks = s, kicks
			pause := time.NewTimer(signalEvery)
			select {
			case <-pause.C:
			case <-r.Context().Done():
				pause.Stop()
				return
			}
		}
		select {
		case <-changed:
		case <-drain:
			drain = nil
		case <-r.Context().Done():
			return
		}
	}
}

// signal is the present hint.
func (in *instance) signal(generation int64) wire.Signal {
	h := in.hello()
	s := wire.Signal{ID: in.id.ID(), Boot: in.boot, Generation: generation, Digest: h.Digest()}
	if h.Outbox.Depth > 0 {
		s.Hints = append(s.Hints, wire.HintOutbox)
	}
	if in.actions.uncollected() {
		s.Hints = append(s.Hints, wire.HintAction)
	}
	if in.lot != nil && in.lot.Waits(in.td) {
		s.Hints = append(s.Hints, wire.HintParked)
	}
	return s
}
