package gateway

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

// While the disk is nearly full, the events of a node that brought most stay there
// first, then those of all, and nothing is lost; operators are told who it is.
func TestEventsStayAtTheirNodesWhileTheDiskIsNearlyFull(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r := w.rcp("dmz")
	greedy, honest := w.enrolled(w.node("greedy")), w.enrolled(w.node("honest"))
	var free atomic.Int64
	free.Store(roomKept * 3 / 2)
	w.before = func(s *Server) {
		s.room.every = 10 * time.Millisecond
		s.room.look = func(context.Context) (int64, int64, error) { return free.Load(), roomKept * 2 * roomPart, nil }
		s.room.looked(free.Load(), roomKept*2*roomPart)
		s.room.took(greedy.id.ID(), roomKept/roomShare+2<<20, time.Now())
	}
	greedy.emit(3)
	honest.emit(3)
	r.hold(greedy, honest)
	w.run()
	acked := func(n *fakeNode, want int64) func() bool {
		return func() bool {
			n.mu.Lock()
			defer n.mu.Unlock()
			return n.acked == want
		}
	}
	told := func(state string) func() bool {
		return func() bool {
			e, err := w.db.Events(t.Context(), store.EventFilter{Own: true, Key: keyRoom, Limit: 5})
			return err == nil && len(e) > 0 && e[len(e)-1].State == state && strings.Contains(e[len(e)-1].Text, "most came of greedy (6")
		}
	}
	eventually(t, "the events of the other node are there", acked(honest, 3))
	eventually(t, "operators are told", told(api.EventOpen))
	if !acked(greedy, 0)() {
		t.Error("the one who brought most was asked for more")
	}
	free.Store(roomKept / 2)
	eventually(t, "the disk is looked at", func() bool { return w.s.room.holds(honest.id.ID(), time.Now()) })
	honest.emit(2)
	held := func() float64 {
		reg := prometheus.NewPedanticRegistry()
		if err := reg.Register(w.s.metrics.visits); err != nil {
			t.Fatal(err)
		}
		all, err := reg.Gather()
		if err != nil || len(all) != 1 {
			t.Fatalf("%d metrics, %v", len(all), err)
		}
		for _, m := range all[0].GetMetric() {
			if l := m.GetLabel(); l[0].GetValue() == "outbox" && l[1].GetValue() == "held" {
				return m.GetCounter().GetValue()
			}
		}
		return 0
	}
	before := held()
	r.hint(honest, "other", wire.HintOutbox)
	eventually(t, "both are held", func() bool { return held() >= before+10 })
	if !acked(honest, 3)() {
		t.Error("events were taken with the last of the disk")
	}
	free.Store(roomKept * 4)
	eventually(t, "all events are there", func() bool { return acked(greedy, 3)() && acked(honest, 5)() })
	eventually(t, "operators are told that it is over", told(api.EventClosed))
}

func TestWhatANodeBroughtIsForgotten(t *testing.T) {
	t.Parallel()
	var r room
	now := time.Now()
	batch := []wire.OutboxUp{{Event: &wire.Event{Text: strings.Repeat("x", roomKept/roomShare/2)}}, {Gap: &wire.Gap{}}}
	took := func() {
		r.took("a", costOf(batch), now)
		r.looked(roomKept, 1<<40)
	}
	took()
	if r.holds("a", now) {
		t.Error("held with half of its share")
	}
	took()
	if !r.holds("a", now) || r.holds("b", now) || r.holds("a", now.Add(roomHalf)) {
		t.Errorf("with all of it: %v, another one: %v, a day later: %v", r.holds("a", now), r.holds("b", now), r.holds("a", now.Add(roomHalf)))
	}
	if r.looked(2*roomKept, 1<<40); r.holds("a", now) {
		t.Error("held though there is room")
	}
	r.looked(1<<20, 16<<20) // a small disk
	if r.holds("a", now) || r.scarce(false, now, nil) != "" {
		t.Error("held on a small disk that is far from full")
	}
	r.looked(0, 0) // a file system that does not say how large it is
	r.took("a", roomKept, now)
	if r.holds("a", now) || r.scarce(false, now, nil) != "" {
		t.Error("held on a disk of which nothing is known")
	}
}

// Between two looks at the disk, what was stored counts.
func TestRoomShrinksBetweenLooks(t *testing.T) {
	t.Parallel()
	var r room
	now := time.Now()
	r.looked(2*roomKept, 1<<40)
	if r.holds("a", now) {
		t.Fatal("held though there is room")
	}
	r.took("a", roomKept/2, now)
	if !r.holds("a", now) || r.holds("b", now) {
		t.Error("want the node held that took it, and no other")
	}
	if r.took("a", roomKept, now); !r.holds("b", now) {
		t.Error("the last of the disk is not kept")
	}
}
