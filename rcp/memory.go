package rcp

import (
	"context"
	"runtime/debug"
	"time"
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
)

// tuneMemory keeps the process small between storms of channels. GOGC in the
// environment wins over gcPercent: the runtime has read it already.
func (r *Relay) tuneMemory(ctx context.Context, gogc bool) error {
	if !gogc {
		defer debug.SetGCPercent(debug.SetGCPercent(gcPercent))
	}
	tick := time.NewTicker(trimCalm)
	defer tick.Stop()
	var trimmed, last uint64
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		moved := r.roster.moved()
		if moved == last && moved-trimmed >= trimAfter {
			for range trimRounds {
				debug.FreeOSMemory()
			}
			trimmed = moved
		}
		last = moved
	}
}
