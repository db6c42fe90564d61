package simnode

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"sallyport/internal/wire"
)

// segmentSize is how long a file of events grows before the next begins.
const segmentSize = 64 << 20

// spools keeps the events of all nodes of a worker, in files that are deleted,
// oldest first, when the gateway has every event in them.
//
// A line is "<node> <seq> <what goes over the wire>"; "<node> <seq>" alone says
// what the highest seq was when the file began.
type spools struct {
	dir   string
	first int      // number of the first node
	of    []*spool // by number less first

	mu       sync.Mutex // guards the segments; taken before the mutex of a spool
	segments []*segment // oldest first; the last is written to
}

type segment struct {
	log  *appendLog
	left int // events that are not acknowledged
}

// spool is the events of one node.
type spool struct {
	all   *spools
	name  string
	given int64 // highest seq given; of the goroutine that adds

	mu      sync.Mutex
	stored  int64         // highest seq on disk
	pending []queued      // not acknowledged, by seq
	more    chan struct{} // closed when something is added; nil: nobody waits
}

type queued struct {
	seq  int64
	line []byte
	seg  *segment
	at   time.Time
}

func openSpools(dir string, first int, of []*spool) (*spools, error) {
	s := &spools{dir: dir, first: first, of: of}
	names, err := filepath.Glob(filepath.Join(dir, "events-*.log"))
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	for _, name := range names {
		seg := &segment{}
		log, err := openLog(name, func(line []byte) error { return s.load(seg, line) })
		if err != nil {
			return nil, fmt.Errorf("events: %w", err)
		}
		seg.log = log
		s.segments = append(s.segments, seg)
	}
	return s, nil
}

func (s *spools) load(seg *segment, line []byte) error {
	number, rest, _ := bytes.Cut(line, []byte{' '})
	place, text, event := bytes.Cut(rest, []byte{' '})
	node, err1 := strconv.Atoi(string(number))
	seq, err2 := strconv.ParseInt(string(place), 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if node < s.first || node >= s.first+len(s.of) {
		return fmt.Errorf("event of node %d, which is none of ours", node)
	}
	sp := s.of[node-s.first]
	sp.stored = max(sp.stored, seq)
	sp.given = sp.stored
	if event {
		sp.pending = append(sp.pending, queued{seq, append(bytes.Clone(text), '\n'), seg, time.Now()})
		seg.left++
	}
	return nil
}

// current is the segment to write to; mu is held.
func (s *spools) current() (*segment, error) {
	if n := len(s.segments); n > 0 && s.segments[n-1].log.size() < segmentSize {
		return s.segments[n-1], nil
	}
	number := 1
	if n := len(s.segments); n > 0 {
		base := filepath.Base(s.segments[n-1].log.file.Name())
		last, err := strconv.Atoi(strings.TrimSuffix(strings.TrimPrefix(base, "events-"), ".log"))
		if err != nil {
			return nil, err
		}
		number = last + 1
	}
	log, err := openLog(filepath.Join(s.dir, fmt.Sprintf("events-%08d.log", number)), func([]byte) error { return nil })
	if err != nil {
		return nil, err
	}
	var head []byte
	for i, sp := range s.of {
		sp.mu.Lock()
		if sp.stored > 0 {
			head = fmt.Appendf(head, "%d %d\n", s.first+i, sp.stored)
		}
		sp.mu.Unlock()
	}
	log.append(head)
	seg := &segment{log: log}
	s.segments = append(s.segments, seg)
	return seg, nil
}

// batch is one group of new events, on its way to the disk.
type batch struct {
	lines  []byte
	events []fresh
}

type fresh struct {
	sp *spool
	queued
}

// add gives the next place in a node's spool to an event. Only one goroutine
// adds.
func (b *batch) add(node int, sp *spool, encode func(dst []byte, seq int64) []byte) {
	sp.given++
	b.lines = strconv.AppendInt(b.lines, int64(node), 10)
	b.lines = append(b.lines, ' ')
	b.lines = strconv.AppendInt(b.lines, sp.given, 10)
	b.lines = append(b.lines, ' ')
	text := len(b.lines)
	b.lines = append(encode(b.lines, sp.given), '\n')
	b.events = append(b.events, fresh{sp, queued{seq: sp.given, line: bytes.Clone(b.lines[text:])}})
}

// store puts a batch on disk and then into the spools.
func (s *spools) store(b *batch) error {
	s.mu.Lock()
	seg, err := s.current()
	if err != nil {
		s.mu.Unlock()
		return err
	}
	seg.left += len(b.events)
	at := seg.log.append(b.lines)
	s.mu.Unlock()
	if err := seg.log.sync(at); err != nil {
		return err
	}
	now := time.Now()
	for _, e := range b.events {
		e.seg, e.at = seg, now
		e.sp.mu.Lock()
		e.sp.stored = e.seq
		e.sp.pending = append(e.sp.pending, e.queued)
		if e.sp.more != nil {
			close(e.sp.more)
			e.sp.more = nil
		}
		e.sp.mu.Unlock()
	}
	return nil
}

// state is what the gateway is told of a spool.
func (sp *spool) state() wire.OutboxState {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	st := wire.OutboxState{Spool: sp.name, First: sp.stored + 1, Next: sp.stored + 1, Depth: int64(len(sp.pending))}
	if len(sp.pending) > 0 {
		st.First, st.Oldest = sp.pending[0].seq, sp.pending[0].at.UTC()
	}
	return st
}

// after appends lines that follow a position, at most limit bytes of them
// unless the first is longer, and returns the position behind them. Without a
// line, more is closed by the next event.
func (sp *spool) after(pos int64, dst []byte, limit int) (_ []byte, next int64, more <-chan struct{}) {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	i, _ := slices.BinarySearchFunc(sp.pending, pos+1, func(q queued, seq int64) int { return cmp.Compare(q.seq, seq) })
	for ; i < len(sp.pending) && len(dst) < limit; i++ {
		dst = append(dst, sp.pending[i].line...)
		pos = sp.pending[i].seq
	}
	if sp.more == nil {
		sp.more = make(chan struct{})
	}
	return dst, pos, sp.more
}

// ack forgets what the gateway has on disk, up to seq, and counts it.
func (sp *spool) ack(seq int64) (n int, err error) {
	sp.mu.Lock()
	if seq > sp.stored {
		sp.mu.Unlock()
		return 0, fmt.Errorf("the gateway has event %d of spool %s, whose last is %d", seq, sp.name, sp.stored)
	}
	for n < len(sp.pending) && sp.pending[n].seq <= seq {
		n++
	}
	done := sp.pending[:n]
	if sp.pending = sp.pending[n:]; len(sp.pending) == 0 {
		sp.pending = nil
	}
	sp.mu.Unlock()
	return n, sp.all.done(done)
}

// done counts acknowledged events, and deletes the files that are only them.
func (s *spools) done(events []queued) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range events {
		e.seg.left--
	}
	for len(s.segments) > 1 && s.segments[0].left == 0 {
		old := s.segments[0].log
		s.segments = s.segments[1:]
		if err := errors.Join(old.close(), os.Remove(old.file.Name())); err != nil {
			return err
		}
	}
	return nil
}

func (s *spools) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, seg := range s.segments {
		errs = append(errs, seg.log.close())
	}
	return errors.Join(errs...)
}
