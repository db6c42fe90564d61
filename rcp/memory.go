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
	// Streams leave buffers behind too, of which a plant at rest opens some for
	// each node now and then: as many as there are channels are trimmed after
	// at least trimStreams, calm or not.
	trimStreams = time.Minute
)

// tuneMemory keeps the process small between storms of channels. GOGC in the
// environment wins over gcPercent: the runtime has read it already.
func (r *Relay) tuneMemory(ctx context.Context, gogc bool) error {
	if !gogc {
		defer debug.SetGCPercent(debug.SetGCPercent(gcPercent))
	}
	tick := time.NewTicker(trimCalm)
	defer tick.Stop()
	var trimmed, last, streams uint64
	at := time.Now()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		moved, opened := r.roster.moved(), r.opened.Load()
		due := moved == last && moved-trimmed >= trimAfter
		if !due && opened-streams >= trimAfter && time.Since(at) >= trimStreams {
			nodes, _ := r.roster.count()
			due = opened-streams >= uint64(nodes[wire.RoleNode])
		}
		if due {
			for range trimRounds {
				debug.FreeOSMemory()
			}
			trimmed, streams, at = moved, opened, time.Now()
		}
		last = moved
	}
}
