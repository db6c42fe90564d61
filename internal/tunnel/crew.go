package tunnel

import (
	"sync"
	"time"
)

// crewIdle is how long a goroutine of a crew waits for another task.
const crewIdle = 2 * time.Second

// Crew runs tasks on goroutines that stay a while for the next one. What a
// connection needs grows a new goroutine's stack three times, which is a tenth
// of the cost of a short connection; a goroutine that stays has it already.
type Crew struct {
	tasks chan func()
	over  chan struct{}
	all   sync.WaitGroup
}

// NewCrew makes a crew without goroutines.
func NewCrew() *Crew {
	return &Crew{tasks: make(chan func()), over: make(chan struct{})}
}

// Go runs a task on a goroutine that waits for one, or on a new one. It must
// not be called after Close, but by a task of the crew.
func (c *Crew) Go(task func()) {
	select {
	case c.tasks <- task:
	default:
		c.all.Go(func() { c.work(task) })
	}
}

func (c *Crew) work(task func()) {
	idle := time.NewTimer(crewIdle)
	defer idle.Stop()
	for {
		task()
		idle.Reset(crewIdle)
		select {
		case task = <-c.tasks:
		case <-idle.C:
			return
		case <-c.over:
			return
		}
	}
}

// Close sends those home who wait, and returns when every task has ended.
func (c *Crew) Close() {
	close(c.over)
	c.all.Wait()
}
