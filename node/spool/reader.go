package spool

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"

	"sallyport/internal/wire"
)

// Reasons why a [Reader] ends.
var (
	ErrSuperseded = errors.New("another outbox was opened")
	ErrMark       = errors.New("acknowledgement does not fit the spool")
)

// readChunk bounds what one Next returns, in bytes on disk.
const readChunk = 128 << 10

// Reader hands the events on, in order, from a watermark. A spool has one at a
// time: the newest outbox wins.
type Reader struct {
	s        *Spool
	cursor   int64 // next position to read
	seg      *segment
	off      int64
	relocate bool
	err      error
}

// Reader begins to read behind the gateway's watermark. Renewed says that the
// watermark proved this spool older than what the gateway has seen (or claims
// a seq that was never sent): the spool has a new id, nothing of it is
// acknowledged, and the gateway needs the new state.
func (s *Spool) Reader(watermark wire.OutboxMark) (r *Reader, renewed bool, err error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	closed, previous := s.closed, s.reader
	id, pos := hex.EncodeToString(s.spool[:]), watermark.Seq+s.base
	next, sent := s.active().next, s.sent
	s.mu.Unlock()
	switch {
	case closed:
		return nil, false, ErrClosed
	case watermark.Spool != id:
		return nil, false, fmt.Errorf("%w: watermark of spool %q, this is %s", ErrMark, wire.Quotable(watermark.Spool), id)
	case watermark.Seq < 0 || watermark.Seq > 1<<61:
		return nil, false, fmt.Errorf("%w: watermark %d", ErrMark, watermark.Seq)
	}
	if previous != nil {
		s.endReader(previous, ErrSuperseded)
	}
	if next <= pos || sent < pos {
		if err := s.renew(); err != nil {
			return nil, false, fmt.Errorf("start a new spool: %w", err)
		}
		renewed, pos = true, s.base
	}
	if err := s.acknowledge(pos); err != nil {
		return nil, false, err
	}
	s.mu.Lock()
	m := s.mark(true)
	s.mu.Unlock()
	s.tryMark(m)
	r = &Reader{s: s, cursor: pos + 1, relocate: true}
	s.mu.Lock()
	s.reader = r
	s.mu.Unlock()
	return r, renewed, nil
}

// renew gives the spool a new id; what is kept begins again at seq 1.
func (s *Spool) renew() error {
	s.mu.Lock()
	oldID, oldBase, oldGone, oldSent := s.spool, s.base, s.gone, s.sent
	if _, err := rand.Read(s.spool[:]); err != nil {
		s.mu.Unlock()
		return err
	}
	s.base, s.gone, s.sent = s.acked, 0, s.acked
	s.mu.Unlock()
	if err := s.startSegment(); err != nil {
		s.mu.Lock()
		s.spool, s.base, s.gone, s.sent = oldID, oldBase, oldGone, oldSent
		s.mu.Unlock()
		return err
	}
	s.log.Warn("the gateway has seen a newer state of this spool: it was restored from an older copy; kept events are sent again under a new spool id",
		"spool", hex.EncodeToString(s.spool[:]))
	return nil
}

// writeMark appends a mark. Called with writing held.
func (s *Spool) writeMark(m mark) error {
	if err := s.room(recordHeader + markSize); err != nil {
		return err
	}
	seg := s.active()
	b := appendMark(nil, seg.index, seg.next, m)
	if err := s.persist(seg, b); err != nil {
		return err
	}
	s.mu.Lock()
	seg.size += int64(len(b))
	s.mu.Unlock()
	return nil
}

// tryMark carries on without: a full disk must be able to drain. What a missing
// mark costs is a needless new spool id after a crash.
func (s *Spool) tryMark(m mark) {
	if err := s.writeMark(m); err != nil {
		s.log.Warn("remember how far the outbox was sent", "error", err)
	}
}

// endReader stops r and remembers how far it came. Called with writing held.
func (s *Spool) endReader(r *Reader, cause error) {
	s.mu.Lock()
	if s.reader != r {
		s.mu.Unlock()
		return
	}
	s.reader = nil
	r.err = cause
	m := s.mark(false)
	s.wake()
	s.mu.Unlock()
	s.tryMark(m)
}

// Close ends the reader. It may be called twice.
func (r *Reader) Close() {
	r.s.writing.Lock()
	defer r.s.writing.Unlock()
	r.s.endReader(r, ErrClosed)
}

// Next waits until there is something behind the last call's, and returns a
// bounded part of it: events and gaps, one member set in each line.
func (r *Reader) Next(ctx context.Context) ([]wire.OutboxUp, error) {
	for {
		r.s.mu.Lock()
		lines, err := r.next()
		var changed <-chan struct{}
		if err == nil && len(lines) == 0 {
			if r.s.changed == nil {
				r.s.changed = make(chan struct{})
			}
			changed = r.s.changed
		}
		r.s.mu.Unlock()
		if err != nil || len(lines) > 0 {
			return lines, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// next reads without waiting. Called with the spool's mu held.
func (r *Reader) next() ([]wire.OutboxUp, error) {
	s := r.s
	if r.err != nil {
		return nil, r.err
	}
	var lines []wire.OutboxUp
	gap := func(from, to int64, reason string) {
		lines = append(lines, wire.OutboxUp{Gap: &wire.Gap{From: from - s.base, To: to - s.base, Reason: reason}})
	}
	for budget := int64(readChunk); budget > 0 && r.cursor < s.active().next; {
		r.place()
		if r.cursor < r.seg.first {
			gap(r.cursor, r.seg.first-1, "lost")
			r.cursor = r.seg.first
			continue
		}
		var derr error
		err := r.seg.read(r.off, func(end int64, rec record) bool {
			r.off = end
			budget -= rec.size()
			if rec.last() < r.cursor {
				return budget > 0 || len(lines) == 0
			}
			if rec.pos > r.cursor {
				gap(r.cursor, rec.pos-1, "lost")
			}
			if rec.kind == kindGap {
				gap(max(rec.pos, r.cursor), rec.last(), rec.reason())
			} else {
				var e wire.Event
				if e, derr = rec.event(s.base); derr != nil {
					return false
				}
				lines = append(lines, wire.OutboxUp{Event: &e})
			}
			r.cursor = rec.last() + 1
			return budget > 0
		})
		if err = errors.Join(err, derr); err != nil {
			return nil, err
		}
		if budget > 0 { // end of the segment
			if next := s.after(r.seg); next != nil && r.cursor < next.first {
				gap(r.cursor, next.first-1, "lost")
				r.cursor = next.first
			}
			r.relocate = r.cursor < s.active().next
		}
	}
	s.sent = max(s.sent, r.cursor-1)
	return lines, nil
}

// place finds the segment and offset of the cursor.
func (r *Reader) place() {
	if !r.relocate {
		return
	}
	for _, seg := range r.s.segments {
		if r.seg = seg; r.cursor < seg.next {
			break
		}
	}
	r.off = r.seg.locate(r.cursor).off
	r.relocate = false
}

// after returns the segment behind seg.
func (s *Spool) after(seg *segment) *segment {
	for i, v := range s.segments[:len(s.segments)-1] {
		if v == seg {
			return s.segments[i+1]
		}
	}
	return nil
}

// Ack truncates the spool: the gateway has everything up to the mark on disk.
func (r *Reader) Ack(m wire.OutboxMark) error {
	s := r.s
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	err, id, pos, sent := r.err, hex.EncodeToString(s.spool[:]), m.Seq+s.base, s.sent
	s.mu.Unlock()
	switch {
	case err != nil:
		return err
	case m.Spool != id || m.Seq < 0 || pos > sent:
		return fmt.Errorf("%w: %d of spool %q, sent was up to %d of %s", ErrMark, m.Seq, wire.Quotable(m.Spool), sent-s.base, id)
	}
	return s.acknowledge(pos)
}

// acknowledge is called with writing held.
func (s *Spool) acknowledge(pos int64) error {
	s.mu.Lock()
	s.acked = max(s.acked, pos)
	s.wake()
	s.mu.Unlock()
	return s.truncate()
}
