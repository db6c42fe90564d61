package rcp

import (
	"context"
	"runtime/debug"
	"time"
)

const (
	// gcResting is the heap's growth between two collections, in percent, while
	// channels rest: they are most of an RCP's heap and allocate next to nothing,
	// so that the usual 100 would keep as much memory again for nothing. While
	// channels come and go by the hundred, and from the start until they do no
	// more, gcBusy spares the collector's work, and what it leaves is trimmed
	// afterwards.
	gcResting = 25
	gcBusy    = 100
	// busyMoves is how many channels come or go in one look of a busy time; a
	// calm one sees at most one in calmShare.
	busyMoves = 64
	calmShare = 256
	look      = time.Second
	// After this many channels came or went, and trimCalm calm looks, what they
	// needed meanwhile (handshakes above all) is given back.
	trimAfter = 256
	trimCalm  = 3
	// A collection halves a stack that grew and is little used now; those of a
	// handshake and a first request grew two or three times.
	trimRounds = 3
	// Streams leave buffers and grown stacks behind too: a gateway that proves
	// every node after a storm opens one for each of them, and keeps it for a
	// while. They are trimmed, at most every trimStreams, when a wave of them is
	// over: a sixteenth at most is open of what once was; or when as
	// many have ended as there are channels.
	trimStreams = time.Minute
	trimWave    = 256
)

// tide is what trimming depends on, looked at again and again.
type tide struct {
	moved, ended uint64 // channels that came or went, streams that ended: since the start
	open         int64  // streams
	channels     uint64
}

// trimmer decides when memory is worth giving back.
type trimmer struct {
	last  tide // of the look before
	done  tide // when it was last trimmed
	at    time.Time
	calm  int   // calm looks, one after the other
	rest  bool  // since the last storm was over
	crest int64 // most streams that were open at a look since
}

// see looks at the tide: due says that now is the time to trim, percent how
// much the heap may grow.
func (t *trimmer) see(now time.Time, is tide) (due bool, percent int) {
	moved := is.moved - t.last.moved
	if moved <= is.channels/calmShare {
		t.calm++
	} else {
		t.calm = 0
	}
	t.rest = t.calm >= trimCalm || t.rest && moved < busyMoves
	if percent = gcBusy; t.rest {
		percent = gcResting
	}
	t.last = is
	t.crest = max(t.crest, is.open)
	due = t.calm >= trimCalm && is.moved-t.done.moved >= trimAfter
	if !due && now.Sub(t.at) >= trimStreams && is.ended-t.done.ended >= trimAfter {
		due = is.ended-t.done.ended >= is.channels || t.crest >= trimWave && is.open <= t.crest/16
	}
	if due {
		t.done, t.at, t.crest = is, now, is.open
	}
	return due, percent
}

// tuneMemory keeps the process small between storms of channels. GOGC in the
// environment wins over both of ours: the runtime has read it already.
func (r *Relay) tuneMemory(ctx context.Context, gogc bool) error {
	percent := gcBusy
	if !gogc {
		defer debug.SetGCPercent(debug.SetGCPercent(percent))
	}
	tick := time.NewTicker(look)
	defer tick.Stop()
	t := trimmer{at: time.Now()}
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		is := tide{ended: r.ended.Load(), open: r.running.Load()}
		is.moved, is.channels = r.roster.moved()
		due, want := t.see(time.Now(), is)
		if want != percent && !gogc {
			percent = want
			debug.SetGCPercent(percent)
		}
		if due {
			for range trimRounds {
				debug.FreeOSMemory()
			}
		}
	}
}
