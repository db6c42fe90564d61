package gateway

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

// Events of nodes may not take the last of the disk: decisions, certificates and the
// audit log are on it too. While it is nearly full, they stay where they are safe,
// in the spools of their nodes, those of the nodes that brought most of all first.
const (
	// roomKept is what is kept free of a large disk, roomPart the part of a small one.
	roomKept = 256 << 20
	roomPart = 50
	// While less than twice that is free, a node is held that brought more than a
	// roomShare of it lately: what counts becomes half in roomHalf.
	roomShare = 4
	roomHalf  = 24 * time.Hour
	// eventCost is what an event takes beside its texts: its row and its indexes.
	eventCost = 700

	roomEvery = 5 * time.Second
	keyRoom   = "disk/events"
	roomTop   = 3 // nodes that are named
)

// room knows who fills the disk of the database.
type room struct {
	look  func(ctx context.Context) (free, total int64, err error) // at the disk
	every time.Duration

	mu         sync.Mutex
	free, kept int64 // as of the last look; kept 0: that is not known
	brought    map[wire.ID]*brought
}

// brought is what came of one node, in bytes, as of a moment.
type brought struct {
	bytes float64
	at    time.Time
}

func (b *brought) now(now time.Time) float64 {
	return b.bytes * math.Exp2(-float64(now.Sub(b.at))/float64(roomHalf))
}

// looked takes over what is free of a disk; total 0: that is not known.
func (r *room) looked(free, total int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.free, r.kept = free, min(total/roomPart, roomKept)
	now := time.Now()
	for id, b := range r.brought {
		if b.now(now) < eventCost { // also of nodes that are gone
			delete(r.brought, id)
		}
	}
}

// costOf is what a batch takes on disk, if all of it is new.
func costOf(batch []wire.OutboxUp) int64 {
	n := eventCost * len(batch)
	for _, up := range batch {
		if e := up.Event; e != nil {
			n += len(e.Application) + len(e.Object) + len(e.Key) + len(e.Text)
		}
	}
	return int64(n)
}

// took counts what was stored of a node, in bytes. The disk has as much less, until
// it is looked at again.
func (r *room) took(node wire.ID, n int64, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.free -= n
	b := r.brought[node]
	if b == nil {
		if r.brought == nil {
			r.brought = map[wire.ID]*brought{}
		}
		b = &brought{at: now}
		r.brought[node] = b
	}
	b.bytes, b.at = b.now(now)+float64(n), now
}

// holds tells whether the events of a node stay where they are for now.
func (r *room) holds(node wire.ID, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch b := r.brought[node]; {
	case r.kept == 0 || r.free >= 2*r.kept:
		return false
	case r.free < r.kept:
		return true
	default:
		return b != nil && b.now(now) > float64(r.kept/roomShare)
	}
}

// scarce says what is wrong, and who brought most; empty: nothing. What was wrong
// is over when there is half as much again as it takes.
func (r *room) scarce(was bool, now time.Time, name func(wire.ID) string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.kept == 0 || r.free >= 3*r.kept || !was && r.free >= 2*r.kept {
		return ""
	}
	type share struct {
		node  wire.ID
		bytes float64
	}
	var top []share
	for id, b := range r.brought {
		if n := b.now(now); n >= 1<<20 {
			top = append(top, share{id, n})
		}
	}
	slices.SortFunc(top, func(a, b share) int { return cmp.Compare(b.bytes, a.bytes) })
	var who []string
	for _, s := range top[:min(len(top), roomTop)] {
		who = append(who, fmt.Sprintf("%s (%d MiB)", name(s.node), int64(s.bytes)>>20))
	}
	text := fmt.Sprintf("the disk of the gateway's database has %d MiB left: below %d MiB the events of nodes that brought much lately stay at these nodes, below %d MiB those of all; "+
		"free some space there, or let events go sooner (SALLYPORT_GATEWAY_EVENT_RETENTION)", r.free>>20, 2*r.kept>>20, r.kept>>20)
	if len(who) > 0 {
		text += "; most came of " + strings.Join(who, ", ")
	}
	return text
}

// watchRoom looks at the disk until ctx ends, and tells when it is nearly full and
// when that is over.
func (s *Server) watchRoom(ctx context.Context) error {
	var told, known bool
	tick := time.NewTicker(s.room.every)
	defer tick.Stop()
	for {
		free, total, err := s.room.look(ctx)
		if err == nil {
			s.room.looked(free, total)
			if !known { // what stands open from before
				var before wire.Severity
				before, err = s.standsOpen(ctx, keyRoom)
				told, known = before != wire.SeverityNormal, err == nil
			}
		}
		if err != nil && ctx.Err() == nil {
			s.log.Error("the room for the database is not known; it is looked at again", "error", err)
		}
		if known {
			told = s.tellRoom(ctx, told)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (s *Server) tellRoom(ctx context.Context, told bool) bool {
	text := s.room.scarce(told, time.Now(), func(id wire.ID) string { return cmp.Or(s.fleet.Presence(id).Name, string(id)) })
	if (text != "") == told {
		return told
	}
	e := store.Internal{Severity: wire.SeverityMajor, Object: "disk", Key: keyRoom, Text: text}
	if told {
		e.Severity, e.Text = wire.SeverityNormal, "the disk of the gateway's database has room for the events of all nodes"
	} else {
		s.log.Warn("the disk is nearly full: events stay at their nodes", "detail", text)
	}
	if err := s.store.Raise(ctx, e); err != nil {
		if ctx.Err() == nil {
			s.log.Error("the state of the disk is not told; it is tried again", "error", err)
		}
		return told
	}
	return !told
}
