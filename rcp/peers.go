package rcp

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"sallyport/internal/wire"
)

const (
	// keepAlive is the longest silence of a peers stream: its reader takes two
	// missing lines for a dead path.
	keepAlive = 15 * time.Second
	// coalesce is the shortest time between two writes of one stream: what
	// changes twice within it is sent once.
	coalesce = 20 * time.Millisecond
	// peersBatch bounds the lines that one stream holds in memory.
	peersBatch = 128
)

// errResumed ends a peers stream whose draining line is taken back: its reader
// opens another one, at the same place.
var errResumed = errors.New("no longer draining")

// servePeers answers GET /v1/peers?epoch=E&pos=N: the hello, then everything
// that changed since N (or a snapshot), the synced line, and changes as they
// come. A slow reader holds up nobody and is sent the last state of what it
// missed.
func (t *table) servePeers(w http.ResponseWriter, r *http.Request, hello wire.PeersHello) error {
	q := r.URL.Query()
	pos, err := strconv.ParseInt(q.Get("pos"), 10, 64)
	if err != nil && q.Get("pos") != "" {
		http.Error(w, "pos is not a number", http.StatusBadRequest)
		return fmt.Errorf("peers stream: pos: %w", err)
	}
	c := t.resume(q.Get("epoch"), pos)
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.Header().Set("Cache-Control", "no-store")
	flush := http.NewResponseController(w).Flush
	return t.follow(r.Context(), &c, hello, func(b []byte) error {
		if _, err := w.Write(b); err != nil {
			return err
		}
		return flush()
	})
}

// follow writes lines from c on until ctx ends or write fails.
func (t *table) follow(ctx context.Context, c *cursor, hello wire.PeersHello, write func([]byte) error) error {
	hello.Epoch = t.epoch
	var buf []byte
	send := func(lines ...wire.PeersLine) (err error) {
		buf = buf[:0]
		for _, l := range lines {
			if buf, err = wire.AppendLine(buf, l); err != nil {
				return err
			}
		}
		return write(buf)
	}
	greet := func() error {
		hello.Snapshot = c.snapshot
		return send(wire.PeersLine{Hello: &hello})
	}
	if err := greet(); err != nil {
		return err
	}
	timer := time.NewTimer(keepAlive)
	defer timer.Stop()
	var lines []wire.PeersLine
	for {
		var again bool
		var more <-chan struct{}
		lines, again, more = t.read(c, lines[:0], peersBatch)
		switch {
		case again:
			if err := greet(); err != nil {
				return err
			}
			continue
		case c.resumed:
			return errResumed
		case len(lines) > 0:
			if err := send(lines...); err != nil {
				return err
			}
			if len(lines) >= peersBatch {
				continue
			}
			lines, buf = nil, nil // an idle stream keeps no buffers
			timer.Reset(coalesce)
			select {
			case <-timer.C:
			case <-ctx.Done():
				return ctx.Err()
			}
			continue
		}
		timer.Reset(keepAlive)
		select {
		case <-more:
		case <-timer.C:
			if err := send(wire.PeersLine{Pos: c.pos}); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
