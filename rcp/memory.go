package rcp

import (
	"context"
	"runtime/debug"
	"time"
)

const (
	// gcPercent is the heap's growth between two collections. Channels at rest
	// are most of an RCP's heap and allocate next to nothing, so that the usual
	// 100 would keep as much memory again for nothing; and what a storm of channels
	// leaves between what lives no trimming brings back. With 25, 50 and 100 a node at rest
	// is 35, 38 and 41 KiB, and 1,500 of them that come back at once cost 1.0, 0.8
	// and 0.7 ms of CPU each.
	gcPercent = 80
	look      = time.Second
	// A calm look sees at most one channel in calmShare come or go.
	calmShare = 256
	// After this many channels came or went, or a share of those that there are,
	// and trimCalm calm looks, what they needed meanwhile (handshakes above all) is
	// given back: trimming costs as much as there is of all of them.
	trimAfter = 256
	trimShare = 8
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
	crest int64 // most streams that were open at a look since
}

// see looks at the tide, and says whether now is the time to trim.
func (t *trimmer) see(now time.Time, is tide) (due bool) {
	if is.moved-t.last.moved <= is.channels/calmShare {
		t.calm++
	} else {
		t.calm = 0
	}
	t.last = is
	t.crest = max(t.crest, is.open)
	due = t.calm >= trimCalm && is.moved-t.done.moved >= max(trimAfter, is.channels/trimShare)
	if !due && now.Sub(t.at) >= trimStreams && is.ended-t.done.ended >= trimAfter {
		due = is.ended-t.done.ended >= is.channels || t.crest >= trimWave && is.open <= t.crest/16
	}
	if due {
		t.done, t.at, t.crest = is, now, is.open
	}
	return due
}

// tuneMemory keeps the process small between storms of channels. GOGC in the
// environment wins over gcPercent: the runtime has read it already.
func (r *Relay) tuneMemory(ctx context.Context, gogc bool) error {
	if !gogc {
		defer debug.SetGCPercent(debug.SetGCPercent(gcPercent))
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
		if t.see(time.Now(), is) {
			for range trimRounds {
				debug.FreeOSMemory()
			}
		}
	}
}
