package spool

import (
	"errors"
	"fmt"
	"sort"
	"strconv"
	"strings"

	"sallyport/internal/wire"
)

const (
	segmentSuffix = ".seg"
	tempSuffix    = ".tmp"
	damagedSuffix = ".damaged"
)

func segmentName(index uint64, suffix string) string { return fmt.Sprintf("%016x%s", index, suffix) }

func parseName(name string) (uint64, bool) {
	digits, ok := strings.CutSuffix(name, segmentSuffix)
	if !ok || len(digits) != 16 {
		return 0, false
	}
	index, err := strconv.ParseUint(digits, 16, 64)
	return index, err == nil
}

// segment is one open file. All but the newest are immutable until they are
// rewritten as a whole or removed.
type segment struct {
	header
	file   File
	size   int64 // bytes that are known to be good; the file may be longer after a failed write
	next   int64 // position after the last record
	events [5]int64
	spots  []spot
}

// spot is one entry of a sparse index, about every 32 KiB.
type spot struct {
	pos, off, events int64 // position of the record at off; events before it
}

const spotDistance = 32 << 10

func (s *segment) count() int64 {
	var n int64
	for _, c := range s.events {
		n += c
	}
	return n
}

// note enters a record that was written or read at off.
func (s *segment) note(off int64, r record) {
	if n := len(s.spots); n == 0 || off-s.spots[n-1].off >= spotDistance {
		s.spots = append(s.spots, spot{pos: r.pos, off: off, events: s.count()})
	}
	if r.kind == kindEvent {
		s.events[r.severity()]++
	}
	s.next = max(s.next, r.last()+1)
	s.size = off + r.size()
}

// locate returns the best known start for reading from pos.
func (s *segment) locate(pos int64) spot {
	i := sort.Search(len(s.spots), func(i int) bool { return s.spots[i].pos > pos })
	if i == 0 {
		return spot{pos: s.first, off: headerSize}
	}
	return s.spots[i-1]
}

// before counts the events below pos.
func (s *segment) before(pos int64) (int64, error) {
	at := s.locate(pos)
	n := at.events
	err := s.read(at.off, func(_ int64, r record) bool {
		if r.last() >= pos {
			return false
		}
		if r.kind == kindEvent {
			n++
		}
		return true
	})
	return n, err
}

// read visits the good records from off on until visit returns false; it is
// told where the record ends. Holes left by damage are skipped. The record's
// body is only valid in visit.
func (s *segment) read(off int64, visit func(end int64, r record) bool) error {
	const chunk = 64 << 10
	buf := make([]byte, chunk)
	for off < s.size {
		n, err := readAt(s.file, buf[:min(int64(len(buf)), s.size-off)], off)
		if err != nil {
			return fmt.Errorf("read segment %016x: %w", s.index, err)
		}
		if n == 0 {
			return fmt.Errorf("read segment %016x: %w", s.index, errShort)
		}
		rest := buf[:n]
		for len(rest) > 0 {
			r, err := parseRecord(rest, s.index)
			if errors.Is(err, errShort) && off+int64(len(rest)) < s.size {
				break // the record goes on behind this chunk
			}
			if err != nil {
				rest, off = rest[1:], off+1
				continue
			}
			rest, off = rest[r.size():], off+r.size()
			if !visit(off, r) {
				return nil
			}
		}
		if len(rest) == len(buf) {
			buf = make([]byte, 2*len(buf)) // bounded by maxBody
		}
	}
	return nil
}

// load reads a whole segment at start. It keeps records below limit, in rising
// order only, and steps over damage: what follows a damaged place may have been
// acknowledged.
func (s *segment) load(limit int64) (damaged bool, last mark, hasMark bool, err error) {
	length, err := s.file.Size()
	if err != nil {
		return false, last, false, err
	}
	b := make([]byte, length)
	n, err := readAt(s.file, b, 0)
	if err != nil {
		return false, last, false, fmt.Errorf("read segment %016x: %w", s.index, err)
	}
	b = b[:n]
	s.size, s.next = headerSize, s.first
	bad := int64(-1)
	for off := int64(headerSize); off < int64(len(b)); {
		r, perr := parseRecord(b[off:], s.index)
		if perr != nil || r.pos < s.next || r.last() >= limit {
			if bad < 0 {
				bad = off
			}
			off++
			continue
		}
		if bad >= 0 {
			damaged, bad = true, -1
		}
		s.note(off, r)
		if r.kind == kindMark {
			last, hasMark = r.mark(), true
		}
		off += r.size()
	}
	return damaged, last, hasMark, nil
}

// rewrite writes a copy of old without the events of the severity rank drop
// and those up to acked, and with its first position lowered to from by a gap
// when from is below it. The caller renames the result over the old file.
func rewrite(d Dir, old *segment, drop int, acked, from, absorbed int64) (*segment, error) {
	s := &segment{header: old.header, next: from}
	s.first = from
	s.dropped += absorbed
	var (
		gapFrom, gapTo int64
		gapReason      byte
		body           []byte
	)
	flush := func() {
		if gapFrom > 0 {
			body = appendGap(body, s.index, gapFrom, gapTo, gapReason)
		}
		gapFrom = 0
	}
	gap := func(from, to int64, reason byte) {
		if gapFrom > 0 && (gapReason != reason || gapTo+1 != from) {
			flush()
		}
		if gapFrom == 0 {
			gapFrom, gapReason = from, reason
		}
		gapTo = to
	}
	if from < old.first {
		gap(from, old.first-1, gapQuota)
	}
	err := old.read(headerSize, func(_ int64, r record) bool {
		switch {
		case r.kind == kindEvent && r.pos <= acked: // delivered: lost only to a gateway that went back in time
			gap(r.pos, r.pos, gapLost)
		case r.kind == kindEvent && r.severity() == drop:
			s.dropped++
			gap(r.pos, r.pos, gapQuota)
		case r.kind == kindGap:
			gap(r.pos, r.last(), r.body[8])
		case r.kind == kindEvent:
			flush()
			start := len(body)
			body = append(beginRecord(body, kindEvent), r.body...)
			sealRecord(body[start:], s.index, r.pos)
		}
		return true // marks of older segments mean nothing
	})
	if err != nil {
		return nil, err
	}
	flush()
	name := segmentName(s.index, tempSuffix)
	if s.file, err = d.Create(name); err != nil {
		return nil, err
	}
	head := s.append(nil)
	if _, err = s.file.WriteAt(append(head, body...), 0); err == nil {
		err = s.file.Sync()
	}
	if err != nil {
		_ = s.file.Close()
		_ = d.Remove(name)
		return nil, err
	}
	s.size = headerSize
	for off := 0; off < len(body); {
		r, err := parseRecord(body[off:], s.index)
		if err != nil {
			return nil, fmt.Errorf("rewritten segment %016x at %d: %w", s.index, off, err)
		}
		s.note(int64(headerSize+off), r)
		off += int(r.size())
	}
	return s, nil
}

// lowest returns the lowest severity rank that a segment holds events of.
func (s *segment) lowest() int {
	for i, n := range s.events {
		if n > 0 {
			return i
		}
	}
	return len(wire.Severities)
}
