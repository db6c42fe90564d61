package store

import (
	"errors"
	"fmt"
	"sync"
	"testing"

	"sallyport/internal/wire"
)

// Batches of many nodes share transactions; one that breaks a limit fails
// alone, and a spool that two pulls store at once is stored once.
func TestOutboxesOfManyNodesAtOnce(t *testing.T) {
	db := temp(t)
	const nodes, rounds, lines = 20, 5, 30
	var wg sync.WaitGroup
	for n := range nodes {
		id := addNode(t, db, fmt.Sprint("n", n))
		pulls := 1 + n%2 // of the same events
		events := make([]wire.OutboxUp, rounds*lines)
		for i := range events {
			e := event(int64(i+1), "", "normal")
			events[i] = e
		}
		for range pulls {
			wg.Go(func() {
				for r := range rounds {
					got, err := db.StoreOutbox(t.Context(), id, "s", events[r*lines:(r+1)*lines])
					if err != nil {
						t.Error(err)
						return
					}
					if got.New+got.Duplicates != lines || got.Conflicts != 0 || got.Ack < int64((r+1)*lines) || pulls == 1 && got.New != lines {
						t.Errorf("node %d, round %d: %+v", n, r, got)
					}
				}
			})
		}
		wg.Go(func() {
			bad := event(1, "", "normal")
			bad.Event.Severity = "terrible"
			if _, err := db.StoreOutbox(t.Context(), wire.NewID(), "s", []wire.OutboxUp{bad}); !errors.Is(err, ErrInvalid) {
				t.Errorf("an invalid event gives %v", err)
			}
		})
	}
	wg.Wait()
	all := must[[]Event](t)(db.Events(t.Context(), EventFilter{Merged: true, Limit: 2 * nodes * rounds * lines}))
	seen := map[string]bool{}
	for _, e := range all {
		seen[fmt.Sprint(e.NodeID, e.Spool, e.Seq)] = true
	}
	if want := nodes * rounds * lines; len(all) != want || len(seen) != want {
		t.Errorf("%d events are stored, %d of them distinct; want %d", len(all), len(seen), want)
	}
}
