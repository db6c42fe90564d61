package spool

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"sallyport/internal/wire"
)

// Defaults of [Config].
const (
	DefaultQuota   = 256 << 20
	maxBatch       = 2 << 20 // what waits for one fsync; more senders wait for the next
	segmentsPerCap = 32
	minSegment     = 4 << 10
	maxSegment     = 8 << 20
)

// ErrClosed is returned by a spool after [Spool.Close].
var ErrClosed = errors.New("spool is closed")

// Config of a spool. The zero value of a field means its default.
type Config struct {
	Dir   Dir
	Quota int64 // bytes on disk; soft by one batch
	Log   *slog.Logger
	// OnDrop is told, without locks held, how many events the quota dropped.
	OnDrop func(n int64)
}

// Spool is safe for concurrent use.
type Spool struct {
	dir         Dir
	quota       int64
	segmentSize int64
	log         *slog.Logger
	onDrop      func(int64)

	// writing serialises everything that changes files. It is taken before mu
	// and held over an fsync; mu never is.
	writing sync.Mutex
	broken  bool // the newest segment must not be appended to (writing)

	mu       sync.Mutex
	pending  *batch
	closed   bool
	segments []*segment // oldest first; the last is the active one
	spool    [16]byte
	base     int64
	gone     int64
	acked    int64 // highest position that the gateway has
	sent     int64 // highest position that may have been sent
	changed  chan struct{}
	reader   *Reader
}

// batch is what one fsync covers. Its first sender is its leader.
type batch struct {
	buf    []byte
	starts []int
	done   chan struct{}
	err    error
	first  int64 // position of its first event, when done without error
	base   int64
}

// Open reads the spool in cfg.Dir, or makes a new one, and repairs what a
// crash left behind. It closes cfg.Dir when it fails.
func Open(cfg Config) (*Spool, error) {
	s := &Spool{dir: cfg.Dir, quota: cfg.Quota, log: cfg.Log, onDrop: cfg.OnDrop}
	if s.quota == 0 {
		s.quota = DefaultQuota
	}
	s.segmentSize = min(max(s.quota/segmentsPerCap, minSegment), maxSegment)
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if err := s.open(); err != nil {
		for _, seg := range s.segments {
			_ = seg.file.Close()
		}
		_ = s.dir.Close()
		return nil, fmt.Errorf("open spool: %w", err)
	}
	return s, nil
}

func (s *Spool) open() error {
	names, err := s.dir.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if strings.HasSuffix(name, tempSuffix) {
			if err := s.dir.Remove(name); err != nil {
				return err
			}
		}
		index, ok := parseName(name)
		if !ok {
			continue
		}
		seg, err := s.openSegment(name, index)
		if err != nil {
			return err
		}
		if seg != nil {
			s.segments = append(s.segments, seg)
		}
	}
	slices.SortFunc(s.segments, func(a, b *segment) int {
		if a.index < b.index {
			return -1
		}
		return 1
	})
	if len(s.segments) == 0 {
		if _, err := rand.Read(s.spool[:]); err != nil {
			return err
		}
		return s.startSegment()
	}
	newest := s.active()
	s.spool, s.base, s.gone = newest.spool, newest.base, newest.gone
	if err := s.loadSegments(newest.tail); err != nil {
		return err
	}
	s.acked = max(s.acked, s.segments[0].first-1, s.base)
	s.sent = max(s.sent, s.acked)
	if s.broken {
		if err := s.startSegment(); err != nil {
			s.log.Warn("start a spool segment behind a torn one", "error", err) // the next write tries again
		}
		return nil
	}
	s.tryMark(s.mark(false))
	return nil
}

// mark returns what a restart has to know.
func (s *Spool) mark(open bool) mark {
	return mark{sent: max(s.sent, s.acked), acked: s.acked, open: open}
}

func (s *Spool) active() *segment { return s.segments[len(s.segments)-1] }

// openSegment returns nil for a file that never held an acknowledged record,
// or none that can be read; the hole in the positions becomes a gap.
func (s *Spool) openSegment(name string, index uint64) (*segment, error) {
	f, err := s.dir.Open(name)
	if err != nil {
		return nil, err
	}
	var b [headerSize]byte
	n, err := readAt(f, b[:], 0)
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	h, err := parseHeader(b[:n])
	if err == nil && h.index == index {
		return &segment{header: h, file: f, next: h.first, size: headerSize}, nil
	}
	length, err := f.Size()
	_ = f.Close()
	if err != nil {
		return nil, err
	}
	if length <= headerSize { // cut off while it was made
		return nil, s.dir.Remove(name)
	}
	s.log.Error("spool segment is damaged: its events are lost and will be reported as a gap", "segment", name)
	return nil, s.dir.Rename(name, name+damagedSuffix)
}

// loadSegments reads all segments, newest first, because the first position of
// one bounds the one before it: what lies above is the rest of a failed write
// or was merged away.
func (s *Spool) loadSegments(tail uint64) error {
	limit := int64(1) << 62
	var live []*segment
	known := false
	for i := len(s.segments) - 1; i >= 0; i-- {
		seg := s.segments[i]
		if seg.index < tail || seg.first >= limit {
			_ = seg.file.Close()
			if err := s.dir.Remove(segmentName(seg.index, segmentSuffix)); err != nil {
				return err
			}
			continue
		}
		damaged, last, hasMark, err := seg.load(limit)
		if err != nil {
			return err
		}
		if damaged {
			s.log.Error("spool segment has a damaged place: the events in it are lost and will be reported as a gap", "segment", seg.index)
		}
		if length, err := seg.file.Size(); err != nil {
			return err
		} else if len(live) == 0 && length != seg.size {
			s.broken = true // torn tail: leave it, go on in a new segment
		}
		if hasMark && !known {
			known = true
			s.acked, s.sent = last.acked, last.sent
			if last.open {
				s.sent = 1 << 62
			}
		}
		limit = seg.first
		live = append(live, seg)
	}
	slices.Reverse(live)
	s.segments = live
	s.sent = min(s.sent, s.active().next-1)
	return nil
}

// startSegment makes the next segment durable and active.
func (s *Spool) startSegment() error {
	h := header{spool: s.spool, base: s.base, first: 1, gone: s.gone}
	if n := len(s.segments); n > 0 {
		h.index, h.first, h.tail = s.active().index+1, s.active().next, s.segments[0].index
	} else {
		h.tail = h.index
	}
	name := segmentName(h.index, segmentSuffix)
	f, err := s.dir.Create(name)
	if errors.Is(err, fs.ErrExist) { // left by a failed attempt of this process
		if err = s.dir.Remove(name); err == nil {
			f, err = s.dir.Create(name)
		}
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	m := s.mark(s.reader != nil)
	s.mu.Unlock()
	b := appendMark(h.append(nil), h.index, h.first, m) // a mark in a removed segment would be forgotten
	_, err = f.WriteAt(b, 0)
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = s.dir.Sync()
	}
	if err != nil {
		_ = f.Close()
		_ = s.dir.Remove(name)
		return err
	}
	s.mu.Lock()
	s.segments = append(s.segments, &segment{header: h, file: f, next: h.first, size: int64(len(b))})
	s.mu.Unlock()
	s.broken = false
	return nil
}

// Append puts events on disk, in order, with the next seqs, and returns once
// they are safe. Events without an ID get one, without a time the present one.
// On an error none of them was accepted, and the caller may try again.
func (s *Spool) Append(events ...wire.Event) ([]wire.Event, error) {
	events = slices.Clone(events)
	size := 0
	bodies := make([][]byte, len(events))
	for i := range events {
		e := &events[i]
		if e.ID == "" {
			e.ID = wire.NewEventID()
		}
		if e.Time.IsZero() {
			e.Time = time.Now().UTC()
		}
		if err := e.Validate(); err != nil {
			return nil, err
		}
		b, err := appendEvent(make([]byte, 0, 384), *e)
		if err != nil {
			return nil, err
		}
		bodies[i] = b
		size += len(b)
	}
	if len(events) == 0 {
		return events, nil
	}
	b, leader, at, err := s.join(bodies, size)
	if err != nil {
		return nil, err
	}
	if leader {
		s.commit(b)
	} else {
		<-b.done
	}
	if b.err != nil {
		return nil, b.err
	}
	for i := range events {
		events[i].Seq = b.first + int64(at+i) - b.base
	}
	return events, nil
}

// join adds records to the pending batch.
func (s *Spool) join(bodies [][]byte, size int) (b *batch, leader bool, at int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.pending != nil && len(s.pending.buf)+size > maxBatch && !s.closed {
		full := s.pending
		s.mu.Unlock()
		<-full.done
		s.mu.Lock()
	}
	if s.closed {
		return nil, false, 0, ErrClosed
	}
	if s.pending == nil {
		s.pending = &batch{done: make(chan struct{})}
		leader = true
	}
	b = s.pending
	at = len(b.starts)
	for _, body := range bodies {
		b.starts = append(b.starts, len(b.buf))
		b.buf = append(b.buf, body...)
	}
	return b, leader, at, nil
}

// commit writes b, once the batch before it is done; until then others join b.
func (s *Spool) commit(b *batch) {
	s.writing.Lock()
	s.mu.Lock()
	s.pending = nil
	s.mu.Unlock()
	b.err = s.write(b)
	close(b.done)
	var dropped int64
	if b.err == nil {
		dropped = s.reclaim()
	}
	s.writing.Unlock()
	if dropped > 0 && s.onDrop != nil {
		s.onDrop(dropped)
	}
}

// write makes one batch durable. Called with writing held.
func (s *Spool) write(b *batch) error {
	if s.closed {
		return ErrClosed
	}
	if err := s.room(int64(len(b.buf))); err != nil {
		return s.hint(err)
	}
	seg := s.active()
	recs := make([]record, len(b.starts))
	for i, start := range b.starts {
		end := len(b.buf)
		if i+1 < len(b.starts) {
			end = b.starts[i+1]
		}
		rec := b.buf[start:end]
		recs[i] = record{kind: kindEvent, pos: seg.next + int64(i), body: rec[recordHeader:]}
		sealRecord(rec, seg.index, recs[i].pos)
	}
	if err := s.persist(seg, b.buf); err != nil {
		return s.hint(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b.first, b.base = seg.next, s.base
	for _, r := range recs {
		seg.note(seg.size, r)
	}
	s.wake()
	return nil
}

// room makes sure that the active segment takes n more bytes.
func (s *Spool) room(n int64) error {
	seg := s.active()
	if s.broken || (seg.next > seg.first && seg.size+n > s.segmentSize) {
		return s.startSegment()
	}
	return nil
}

// persist writes and syncs at the end of seg. After an error nobody knows what
// the file holds, so nothing is ever appended to it again.
func (s *Spool) persist(seg *segment, b []byte) error {
	_, err := seg.file.WriteAt(b, seg.size)
	if err == nil {
		err = seg.file.Sync()
	}
	if err != nil {
		s.broken = true
		_ = seg.file.Truncate(seg.size) // gives a full disk its room back; positions guard against the rest
	}
	return err
}

// hint adds what to do about a failed write.
func (s *Spool) hint(err error) error {
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("event is not on disk: %w: free some space, then send it again", err)
	default:
		return fmt.Errorf("event is not on disk: %w: check the data directory, then send it again", err)
	}
}

// wake tells readers that something changed. Called with mu held.
func (s *Spool) wake() {
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

// Changed returns a channel that is closed at the next change of the spool's
// content.
func (s *Spool) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.changed == nil {
		s.changed = make(chan struct{})
	}
	return s.changed
}

// State describes the spool.
func (s *Spool) State() (wire.OutboxState, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state()
}

func (s *Spool) state() (wire.OutboxState, error) {
	st := wire.OutboxState{
		Spool:   hex.EncodeToString(s.spool[:]),
		First:   s.acked + 1 - s.base,
		Next:    s.active().next - s.base,
		Dropped: s.gone,
	}
	if s.closed {
		return st, ErrClosed
	}
	for _, seg := range s.segments {
		st.Dropped += seg.dropped
		n := seg.count()
		if seg.first <= s.acked {
			done, err := seg.before(s.acked + 1)
			if err != nil {
				return st, err
			}
			n -= done
		}
		if n > 0 && st.Depth == 0 {
			if err := s.oldest(seg, &st.Oldest); err != nil {
				return st, err
			}
		}
		st.Depth += n
	}
	return st, nil
}

// oldest finds the time of the first event in seg that is not acknowledged.
func (s *Spool) oldest(seg *segment, t *time.Time) error {
	var derr error
	err := seg.read(seg.locate(s.acked+1).off, func(_ int64, r record) bool {
		if r.kind != kindEvent || r.pos <= s.acked {
			return true
		}
		e, err := r.event(s.base)
		*t, derr = e.Time, err
		return false
	})
	return errors.Join(err, derr)
}

// Size returns the bytes on disk.
func (s *Spool) Size() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	var n int64
	for _, seg := range s.segments {
		n += seg.size
	}
	return n
}

// Close waits for the write in progress and closes the files.
func (s *Spool) Close() error {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	reader := s.reader
	s.mu.Unlock()
	var errs []error
	if reader != nil {
		s.endReader(reader, ErrClosed)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.wake()
	for _, seg := range s.segments {
		errs = append(errs, seg.file.Close())
	}
	return errors.Join(append(errs, s.dir.Close())...)
}
