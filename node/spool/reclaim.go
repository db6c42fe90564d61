package spool

import (
	"sallyport/internal/wire"
)

// reclaim drops events until the spool is a segment below its quota: lowest
// severity first, oldest segment first. It is called with writing held and
// returns how many it dropped. A failure (a full disk has no room for the copy)
// leaves the spool as it was, and is tried again after the next write.
func (s *Spool) reclaim() (dropped int64) {
	if s.Size() <= s.quota {
		return 0
	}
	for s.Size() > s.quota-s.segmentSize {
		n, more, err := s.dropOnce()
		dropped += n
		if err != nil {
			s.log.Error("make room in the spool", "error", err)
			break
		}
		if !more {
			break
		}
	}
	return dropped
}

// dropOnce drops all events of the lowest severity from the oldest segment
// that has any. More is false when only gaps are left.
func (s *Spool) dropOnce() (dropped int64, more bool, err error) {
	lowest := len(wire.Severities)
	at := 0
	for i, seg := range s.segments {
		if l := seg.lowest(); l < lowest {
			lowest, at = l, i
		}
	}
	if lowest == len(wire.Severities) {
		return 0, false, nil
	}
	if at == len(s.segments)-1 {
		if err := s.startSegment(); err != nil {
			return 0, false, err
		}
	}
	old := s.segments[at]
	first, absorbed, merged := old.first, int64(0), false
	if at > 0 && old.events[lowest] == old.count() && s.segments[at-1].count() == 0 {
		// Neighbours without events become one gap: a node that is cut off
		// for a year must not collect empty files.
		merged, first, absorbed = true, s.segments[at-1].first, s.segments[at-1].dropped
	}
	fresh, err := rewrite(s.dir, old, lowest, s.acked, first, absorbed)
	if err != nil {
		return 0, false, err
	}
	name := segmentName(old.index, segmentSuffix)
	err = s.dir.Rename(segmentName(old.index, tempSuffix), name)
	if err == nil {
		err = s.dir.Sync()
	}
	if err != nil {
		_ = fresh.file.Close()
		return 0, false, err
	}
	s.mu.Lock()
	s.segments[at] = fresh
	var dead *segment
	if merged {
		dead = s.segments[at-1]
		s.segments = append(s.segments[:at-1:at-1], s.segments[at:]...)
	}
	if r := s.reader; r != nil {
		r.relocate = true
	}
	s.mu.Unlock()
	_ = old.file.Close()
	if dead != nil {
		_ = dead.file.Close()
		if err := s.dir.Remove(segmentName(dead.index, segmentSuffix)); err != nil {
			s.log.Warn("remove a merged spool segment", "error", err) // Open removes it
		}
	}
	return fresh.dropped - old.dropped - absorbed, true, nil
}

// truncate removes the segments that the gateway has as a whole. Called with
// writing held.
func (s *Spool) truncate() error {
	var dead int
	var dropped int64
	for dead < len(s.segments)-1 && s.segments[dead].next-1 <= s.acked {
		dropped += s.segments[dead].dropped
		dead++
	}
	if dead == 0 {
		return nil
	}
	gone := s.segments[:dead]
	s.mu.Lock()
	s.segments, s.gone = s.segments[dead:], s.gone+dropped
	s.mu.Unlock()
	if dropped > 0 {
		// The count of dropped events lives in the segments: it moves to a new
		// one, whose tail declares these dead, before they go. A full disk must
		// not keep them: then the count waits in memory for the next segment.
		if err := s.startSegment(); err != nil {
			s.log.Warn("keep the count of dropped events", "error", err)
		}
	}
	for _, seg := range gone {
		_ = seg.file.Close()
		if err := s.dir.Remove(segmentName(seg.index, segmentSuffix)); err != nil {
			return err
		}
	}
	return nil
}
