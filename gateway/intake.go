package gateway

import (
	"context"
	"sync"
)

// intake holds what a stream brought while the last transaction was written:
// the next one takes all of it. It bounds what it holds by count and bytes.
type intake[T any] struct {
	maxItems, maxBytes int

	mu    sync.Mutex
	items []T
	bytes int
	room  chan struct{} // holds a wake-up when there is room again
	news  chan struct{} // holds a wake-up when there is something
}

func newIntake[T any](maxItems, maxBytes int) *intake[T] {
	return &intake[T]{maxItems: maxItems, maxBytes: maxBytes, room: make(chan struct{}, 1), news: make(chan struct{}, 1)}
}

// put adds an item, and waits while too much is there; the last one of a
// stream always fits. It reports false when ctx ended.
func (i *intake[T]) put(ctx context.Context, item T, size int, last bool) bool {
	for {
		i.mu.Lock()
		if last || len(i.items) < i.maxItems && i.bytes < i.maxBytes {
			i.items = append(i.items, item)
			i.bytes += size
			i.mu.Unlock()
			wake(i.news)
			return true
		}
		i.mu.Unlock()
		select {
		case <-i.room:
		case <-ctx.Done():
			return false
		}
	}
}

// take returns all that is there.
func (i *intake[T]) take() []T {
	i.mu.Lock()
	defer i.mu.Unlock()
	out := i.items
	i.items, i.bytes = nil, 0
	wake(i.room)
	return out
}
