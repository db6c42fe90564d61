package sqldb

import (
	"context"
	"slices"
	"sync"
)

// Queue lets the work of many share a transaction: what comes while one is
// written waits, and whoever is next writes for the others too. Alone, a job
// waits for nobody.
type Queue[J any] struct {
	turn chan struct{} // holds a token while somebody writes

	mu      sync.Mutex
	waiting []*Job[J]
}

// Job is one piece of work in a Queue.
type Job[J any] struct {
	Work J
	Err  error
	done chan struct{} // closed when Err is final
}

// NewQueue makes an empty Queue.
func NewQueue[J any]() *Queue[J] { return &Queue[J]{turn: make(chan struct{}, 1)} }

// Do has a job done by write, which is called here or by another one who
// waits, with the job at the head of its group, and returns the job's error.
// Further members fit if fits, called in their order, says so; those that do
// not wait on. A job that still waits when ctx ends is not done.
func (q *Queue[J]) Do(ctx context.Context, work J, group func() (fits func(J) bool), write func([]*Job[J])) error {
	j := &Job[J]{Work: work, done: make(chan struct{})}
	q.mu.Lock()
	q.waiting = append(q.waiting, j)
	q.mu.Unlock()
	select {
	case <-j.done:
	case <-ctx.Done():
		if q.leave(j) {
			return context.Cause(ctx)
		}
		<-j.done // it is being written
	case q.turn <- struct{}{}:
		q.write(j, group, write)
	}
	return j.Err
}

// write writes the next group, unless own was in the one before.
func (q *Queue[J]) write(own *Job[J], group func() (fits func(J) bool), write func([]*Job[J])) {
	defer func() { <-q.turn }()
	if own.finished() {
		return
	}
	members := q.take(own, group())
	defer func() {
		for _, j := range members {
			close(j.done)
		}
	}()
	write(members)
}

func (j *Job[J]) finished() bool {
	select {
	case <-j.done:
		return true
	default:
		return false
	}
}

// leave takes a job back, unless it is being done.
func (q *Queue[J]) leave(j *Job[J]) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	i := slices.Index(q.waiting, j)
	if i < 0 {
		return false
	}
	q.waiting = slices.Delete(q.waiting, i, i+1)
	return true
}

// take takes own and those that fit.
func (q *Queue[J]) take(own *Job[J], fits func(J) bool) []*Job[J] {
	q.mu.Lock()
	defer q.mu.Unlock()
	group := []*Job[J]{own}
	fits(own.Work)
	rest := q.waiting[:0:0]
	for _, j := range q.waiting {
		switch {
		case j == own:
		case fits(j.Work):
			group = append(group, j)
		default:
			rest = append(rest, j)
		}
	}
	q.waiting = rest
	return group
}
