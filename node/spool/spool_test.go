package spool

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/wire"
)

func open(t testing.TB, dir Dir, quota int64) *Spool {
	t.Helper()
	s, err := Open(Config{Dir: dir, Quota: quota})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func appendN(t testing.TB, s *Spool, n int, sev wire.Severity, size int) []wire.Event {
	t.Helper()
	events := make([]wire.Event, n)
	for i := range events {
		events[i] = wire.Event{Severity: sev, Text: strings.Repeat("x", size)}
	}
	out, err := s.Append(events...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func state(t testing.TB, s *Spool) wire.OutboxState {
	t.Helper()
	st, err := s.State()
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// drain reads all there is from the watermark seq.
func drain(t testing.TB, s *Spool, seq int64) (r *Reader, lines []wire.OutboxUp, renewed bool) {
	t.Helper()
	r, renewed, err := s.Reader(wire.OutboxMark{Spool: state(t, s).Spool, Seq: seq})
	if err != nil {
		t.Fatal(err)
	}
	for {
		more, err := pull(r)
		if err != nil {
			t.Fatal(err)
		}
		if len(more) == 0 {
			return r, lines, renewed
		}
		lines = append(lines, more...)
	}
}

func TestRoundTripAndTruncate(t *testing.T) {
	dir := newForgetful(1)
	s := open(t, dir, 1<<20)
	sent := appendN(t, s, 500, wire.SeverityMinor, 300)
	if sent[0].Seq != 1 || sent[499].Seq != 500 || sent[7].ID == "" {
		t.Fatalf("seqs %d to %d", sent[0].Seq, sent[499].Seq)
	}
	r, lines, _ := drain(t, s, 0)
	if len(lines) != 500 {
		t.Fatalf("%d lines", len(lines))
	}
	for i, l := range lines {
		if l.Event == nil || *l.Event != sent[i] {
			t.Fatalf("line %d is %+v, want %+v", i, l.Event, sent[i])
		}
	}
	if st := state(t, s); st.Depth != 500 || st.First != 1 || st.Next != 501 || !st.Oldest.Equal(sent[0].Time) {
		t.Errorf("state %+v", st)
	}
	if err := r.Ack(wire.OutboxMark{Spool: state(t, s).Spool, Seq: 123}); err != nil {
		t.Fatal(err)
	}
	if st := state(t, s); st.Depth != 377 || st.First != 124 || !st.Oldest.Equal(sent[123].Time) {
		t.Errorf("state %+v", st)
	}
	before := s.Size()
	if err := r.Ack(wire.OutboxMark{Spool: state(t, s).Spool, Seq: 500}); err != nil {
		t.Fatal(err)
	}
	if st := state(t, s); st.Depth != 0 || st.First != st.Next || !st.Oldest.IsZero() {
		t.Errorf("state %+v", st)
	}
	if s.Size() > before/4 {
		t.Errorf("%d of %d bytes are left after everything was acknowledged", s.Size(), before)
	}
	for name, m := range map[string]wire.OutboxMark{
		"never sent":    {Spool: state(t, s).Spool, Seq: 501},
		"negative":      {Spool: state(t, s).Spool, Seq: -1},
		"another spool": {Spool: "other", Seq: 1},
	} {
		if err := r.Ack(m); !errors.Is(err, ErrMark) {
			t.Errorf("ack %s: %v", name, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, 1<<20)
	if st := state(t, s); st.First != 501 || st.Next != 501 || st.Depth != 0 {
		t.Errorf("after a restart: %+v", st)
	}
	if got := appendN(t, s, 1, wire.SeverityNormal, 1); got[0].Seq != 501 {
		t.Errorf("seq %d was used before", got[0].Seq)
	}
}

func TestReaderWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := open(t, newForgetful(1), 0)
		r, _, err := s.Reader(wire.OutboxMark{Spool: state(t, s).Spool})
		if err != nil {
			t.Fatal(err)
		}
		got := make(chan []wire.OutboxUp)
		go func() {
			lines, err := r.Next(t.Context())
			if err != nil {
				t.Error(err)
			}
			got <- lines
			_, err = r.Next(t.Context())
			if !errors.Is(err, ErrSuperseded) {
				t.Errorf("superseded reader: %v", err)
			}
			got <- nil
		}()
		synctest.Wait()
		appendN(t, s, 1, wire.SeverityMajor, 10)
		if lines := <-got; len(lines) != 1 || lines[0].Event.Seq != 1 {
			t.Errorf("got %+v", lines)
		}
		synctest.Wait()
		if _, _, err := s.Reader(wire.OutboxMark{Spool: state(t, s).Spool, Seq: 1}); err != nil {
			t.Fatal(err)
		}
		<-got
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if _, err := s.reader.Next(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("err %v", err)
		}
	})
}

// TestSnapshotReverted: the disk goes back to an older copy, and more events
// follow before the gateway is met again.
func TestSnapshotReverted(t *testing.T) {
	for _, more := range []int{0, 5, 100} { // below, below and above the watermark
		t.Run(fmt.Sprint(more), func(t *testing.T) {
			dir := newForgetful(1)
			s := open(t, dir, 0)
			appendN(t, s, 20, wire.SeverityMinor, 10)
			r, _, _ := drain(t, s, 0)
			spool := state(t, s).Spool
			if err := r.Ack(wire.OutboxMark{Spool: spool, Seq: 10}); err != nil {
				t.Fatal(err)
			}
			r.Close()
			snapshot := dir.reboot()
			// 30 more are delivered, then the host is taken back.
			s = open(t, snapshot, 0)
			kept := make([]wire.Event, 0, 110)
			for range more { // over several restarts
				kept = append(kept, appendN(t, s, 1, wire.SeverityMinor, 10)...)
				if len(kept)%7 == 0 {
					if err := s.Close(); err != nil {
						t.Fatal(err)
					}
					s = open(t, snapshot, 0)
				}
			}
			_, lines, renewed := drain(t, s, 50)
			if !renewed || state(t, s).Spool == spool {
				t.Fatal("the node must start a new spool")
			}
			if len(lines) != 10+more {
				t.Fatalf("%d lines, want the %d kept events", len(lines), 10+more)
			}
			for i, l := range lines {
				if l.Event.Seq != int64(i+1) {
					t.Errorf("seq %d at place %d", l.Event.Seq, i+1)
				}
				if i >= 10 && l.Event.ID != kept[i-10].ID {
					t.Errorf("event %d has another id", i)
				}
			}
			id := state(t, s).Spool
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if st := state(t, open(t, snapshot, 0)); st.Spool != id || st.Next != int64(11+more) || st.First != 1 {
				t.Errorf("after a restart: %+v, want spool %s", st, id)
			}
		})
	}
}

// TestWatermarkBelowFirst: the gateway's database was restored from a backup.
func TestWatermarkBelowFirst(t *testing.T) {
	s := open(t, newForgetful(1), 128<<10)
	for range 40 {
		appendN(t, s, 10, wire.SeverityMinor, 50)
	}
	r, _, _ := drain(t, s, 0)
	id := state(t, s).Spool
	for n := int64(100); n <= 300; n += 100 {
		if err := r.Ack(wire.OutboxMark{Spool: id, Seq: n}); err != nil {
			t.Fatal(err)
		}
	}
	_, lines, renewed := drain(t, s, 20)
	if renewed || lines[0].Gap == nil || lines[0].Gap.From != 21 || lines[0].Gap.Reason != "lost" {
		t.Fatalf("renewed %v, first line %+v", renewed, lines[0])
	}
	if first := lines[1].Event.Seq; first != lines[0].Gap.To+1 || first > 301 {
		t.Errorf("gap %+v, then event %d", lines[0].Gap, first)
	}
	if last := lines[len(lines)-1].Event.Seq; last != 400 {
		t.Errorf("last event %d", last)
	}
}

func TestQuotaDropsLowSeveritiesFirst(t *testing.T) {
	dir := newForgetful(1)
	const quota = 256 << 10
	var told int64
	s, err := Open(Config{Dir: dir, Quota: quota, OnDrop: func(n int64) { told += n }})
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(1, 1))
	total := map[wire.Severity]int{}
	for i := range 4000 {
		sev := wire.Severities[0]
		switch {
		case i%100 == 7:
			sev = wire.SeverityCritical
		case rnd.IntN(2) == 0:
			sev = wire.SeverityWarning
		}
		total[sev]++
		appendN(t, s, 1, sev, 100)
		if n := s.Size(); n > quota+8<<10 {
			t.Fatalf("spool has %d bytes after %d events", n, i)
		}
	}
	count := func(lines []wire.OutboxUp) (events map[wire.Severity]int, gaps int64) {
		events = map[wire.Severity]int{}
		next := int64(1)
		for _, l := range lines {
			if l.Gap != nil {
				if l.Gap.From != next {
					t.Fatalf("gap %+v, want it to begin at %d", l.Gap, next)
				}
				gaps += l.Gap.To - l.Gap.From + 1
				next = l.Gap.To + 1
				continue
			}
			if l.Event.Seq != next {
				t.Fatalf("event %d, want %d", l.Event.Seq, next)
			}
			next++
			events[l.Event.Severity]++
		}
		return events, gaps
	}
	r, lines, _ := drain(t, s, 0)
	events, gaps := count(lines)
	if events[wire.SeverityCritical] != total[wire.SeverityCritical] {
		t.Errorf("%d of %d critical events are left", events[wire.SeverityCritical], total[wire.SeverityCritical])
	}
	if events[wire.SeverityWarning] == total[wire.SeverityWarning] || events[wire.SeverityWarning] == 0 {
		t.Errorf("%d of %d warnings are left: the test does not reach them", events[wire.SeverityWarning], total[wire.SeverityWarning])
	}
	left := events[wire.SeverityNormal] + events[wire.SeverityWarning] + events[wire.SeverityCritical]
	if st := state(t, s); st.Dropped != gaps || int64(4000-left) != gaps || told != gaps || st.Depth != int64(left) {
		t.Errorf("dropped %d, told %d, gaps %d, left %d, depth %d", st.Dropped, told, gaps, left, st.Depth)
	}
	// The count outlives acknowledgement and restart.
	if err := r.Ack(wire.OutboxMark{Spool: state(t, s).Spool, Seq: 4000}); err != nil {
		t.Fatal(err)
	}
	if st := state(t, open(t, dir.reboot(), quota)); st.Dropped != gaps || st.Depth != 0 {
		t.Errorf("after a restart %+v, want %d dropped", st, gaps)
	}
}

// TestYearOffline: a spool that overflows for ever neither grows nor collects
// files.
func TestYearOffline(t *testing.T) {
	dir := newForgetful(1)
	s := open(t, dir, 64<<10)
	for range 3000 {
		appendN(t, s, 5, wire.SeverityNormal, 200)
	}
	names, err := dir.Names()
	if err != nil {
		t.Fatal(err)
	}
	if len(names) > 40 || s.Size() > 80<<10 {
		t.Errorf("%d files, %d bytes", len(names), s.Size())
	}
	_, lines, _ := drain(t, s, 0)
	if lines[0].Gap == nil || lines[0].Gap.From != 1 {
		t.Errorf("first line %+v", lines[0])
	}
}

func TestFullDisk(t *testing.T) {
	dir := newForgetful(3)
	s := open(t, dir, 64<<20)
	sent := appendN(t, s, 10, wire.SeverityMinor, 1000)
	dir.room = 5000
	if _, err := s.Append(slices.Repeat([]wire.Event{{Severity: wire.SeverityMinor, Text: strings.Repeat("y", 1000)}}, 20)...); !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "free some space") {
		t.Fatalf("full disk: %v", err)
	}
	// It can still drain, and restart.
	_, lines, _ := drain(t, s, 0)
	if len(lines) != 10 || lines[9].Event.ID != sent[9].ID {
		t.Fatalf("%d lines", len(lines))
	}
	dir = dir.reboot()
	s = open(t, dir, 64<<20)
	dir.room = -1
	if got := appendN(t, s, 1, wire.SeverityMinor, 10); got[0].Seq < 11 {
		t.Errorf("seq %d again", got[0].Seq)
	}
}

// TestFailedSync: after a failed fsync nobody knows what is on disk.
func TestFailedSync(t *testing.T) {
	dir := newForgetful(5)
	s := open(t, dir, 0)
	appendN(t, s, 3, wire.SeverityMinor, 10)
	dir.failing = true
	if _, err := s.Append(wire.Event{Severity: wire.SeverityMinor, Text: "refused"}); !errors.Is(err, syscall.EIO) {
		t.Fatalf("err %v", err)
	}
	dir.failing = false
	appendN(t, s, 3, wire.SeverityMinor, 10)
	s = open(t, dir.reboot(), 0)
	_, lines, _ := drain(t, s, 0)
	if len(lines) != 6 {
		t.Fatalf("%d lines", len(lines))
	}
	for _, l := range lines {
		if l.Event == nil || l.Event.Text == "refused" {
			t.Errorf("line %+v", l)
		}
	}
}

// TestDamage flips one byte in the middle: what follows is kept, what is lost
// is named.
func TestDamage(t *testing.T) {
	dir := newForgetful(1)
	s := open(t, dir, 0)
	appendN(t, s, 9, wire.SeverityMinor, 100)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	ino := dir.entries[segmentName(0, segmentSuffix)]
	ino.data[len(ino.data)/2] ^= 0x40
	s = open(t, dir, 0)
	_, lines, _ := drain(t, s, 0)
	var gaps []wire.Gap
	events := 0
	for _, l := range lines {
		if l.Gap != nil {
			gaps = append(gaps, *l.Gap)
		} else {
			events++
		}
	}
	if events != 8 || len(gaps) != 1 || gaps[0].From != gaps[0].To || gaps[0].Reason != "lost" {
		t.Errorf("%d events, gaps %+v", events, gaps)
	}
}

func TestConcurrentSenders(t *testing.T) {
	s := open(t, newForgetful(1), 0)
	var wg sync.WaitGroup
	var mu sync.Mutex
	seqs := map[int64]wire.ID{}
	for range 16 {
		wg.Go(func() {
			for range 50 {
				out, err := s.Append(wire.Event{Severity: wire.SeverityMinor, Text: "x"}, wire.Event{Severity: wire.SeverityMinor, Text: "y"})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				for _, e := range out {
					seqs[e.Seq] = e.ID
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	_, lines, _ := drain(t, s, 0)
	if len(seqs) != 1600 || len(lines) != 1600 {
		t.Fatalf("%d seqs, %d lines", len(seqs), len(lines))
	}
	for _, l := range lines {
		if seqs[l.Event.Seq] != l.Event.ID {
			t.Errorf("seq %d: event %s, sender was told %s", l.Event.Seq, l.Event.ID, seqs[l.Event.Seq])
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := s.Append(wire.Event{Severity: wire.SeverityMinor, Text: "x"}); !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

func TestRealDirectory(t *testing.T) {
	path := t.TempDir()
	for i := range 3 {
		dir, err := OpenDir(path)
		if err != nil {
			t.Fatal(err)
		}
		s := open(t, dir, 64<<10)
		if got := appendN(t, s, 100, wire.SeverityMinor, 250); got[0].Seq != int64(100*i+1) {
			t.Errorf("seq %d in life %d", got[0].Seq, i)
		}
		if i == 2 {
			r, lines, _ := drain(t, s, 0)
			if len(lines) == 0 {
				t.Error("nothing to read")
			}
			if err := r.Ack(wire.OutboxMark{Spool: state(t, s).Spool, Seq: 300}); err != nil {
				t.Error(err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func FuzzParseRecord(f *testing.F) {
	e, err := appendEvent(nil, wire.Event{ID: wire.NewID(), Severity: wire.SeverityMajor, Text: "disk is full"})
	if err != nil {
		f.Fatal(err)
	}
	sealRecord(e, 7, 42)
	f.Add(e, uint64(7))
	f.Add(appendGap(nil, 7, 3, 9, gapQuota), uint64(7))
	f.Add(appendMark(nil, 7, 3, mark{sent: 2, acked: 1, open: true}), uint64(7))
	f.Fuzz(func(t *testing.T, b []byte, index uint64) {
		r, err := parseRecord(b, index)
		if err != nil {
			return
		}
		again := append(beginRecord(nil, r.kind), r.body...)
		sealRecord(again, index, r.pos)
		if string(again) != string(b[:r.size()]) {
			t.Errorf("%x became %x", b[:r.size()], again)
		}
		if r.last() < r.pos-1 {
			t.Errorf("record at %d ends at %d", r.pos, r.last())
		}
		_, _ = r.event(0)
	})
}

func BenchmarkAppend(b *testing.B) {
	for _, batch := range []int{1, 100, 1000} {
		b.Run(fmt.Sprintf("batch-%d", batch), func(b *testing.B) {
			dir, err := OpenDir(b.TempDir())
			if err != nil {
				b.Fatal(err)
			}
			s := open(b, dir, 1<<40)
			defer func() { _ = s.Close() }()
			events := slices.Repeat([]wire.Event{{Severity: wire.SeverityMinor, Application: "bench", Text: strings.Repeat("x", 250)}}, batch)
			b.ReportAllocs()
			b.SetBytes(int64(batch) * 250)
			for b.Loop() {
				if _, err := s.Append(events...); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(batch)*float64(b.N)/b.Elapsed().Seconds(), "events/s")
		})
	}
}
