package rcp

import (
	"context"
	"runtime/debug"
	"time"

	"sallyport/internal/wire"
)

const (
	// gcPercent is the heap's growth between two collections. Channels at rest
	// are most of an RCP's heap and allocate next to nothing, so that the usual
	// 100 would keep as much memory again for nothing. Measured with 10,000
	// nodes at rest: it costs no CPU time that could be seen.
	gcPercent = 50
	// After this many channels came or went, and nothing more happened for a
	// moment, what they needed meanwhile (handshakes above all) is given back.
	trimAfter = 256
	trimCalm  = 3 * time.Second
	// A collection halves a stack that grew and is little used now; those of a
	// handshake and a first request grew two or three times.
	trimRounds = 3
	// Streams leave buffers and grown stacks behind too: a gateway that proves
	// every node after a storm opens one for each of them, and keeps it for a
	// while. They are trimmed after at least trimStreams: when as many as half
	// of the channels have ended and the storm is over, or as many as there are.
	trimStreams = time.Minute
	// calmShare: less than one end for so many channels in trimCalm is no
	// storm.
	calmShare = 100
)

// tuneMemory keeps the process small between storms of channels. GOGC in the
// environment wins over gcPercent: the runtime has read it already.
func (r *Relay) tuneMemory(ctx context.Context, gogc bool) error {
	if !gogc {
		defer debug.SetGCPercent(debug.SetGCPercent(gcPercent))
	}
	tick := time.NewTicker(trimCalm)
	defer tick.Stop()
	var trimmed, streams, lastMoved, lastEnded uint64
	at := time.Now()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		moved, ended := r.roster.moved(), r.ended.Load()
		due := moved == lastMoved && moved-trimmed >= trimAfter
		if n := ended - streams; !due && n >= trimAfter && time.Since(at) >= trimStreams {
			nodes, _ := r.roster.count()
			channels := uint64(nodes[wire.RoleNode])
			due = n >= channels || n >= channels/2 && ended-lastEnded <= channels/calmShare
		}
		if due {
			for range trimRounds {
				debug.FreeOSMemory()
			}
			trimmed, streams, at = moved, ended, time.Now()
		}
		lastMoved, lastEnded = moved, ended
	}
}
