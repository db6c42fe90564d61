package tunnel

import (
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestCrewKeepsGoroutinesForTheNextTask(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := NewCrew()
		base := runtime.NumGoroutine()
		var ran atomic.Int32
		for range 100 {
			c.Go(func() { ran.Add(1) })
			synctest.Wait()
		}
		if n := runtime.NumGoroutine() - base; n != 1 || ran.Load() != 100 {
			t.Errorf("%d tasks ran, %d goroutines stayed", ran.Load(), n)
		}
		synctest.Wait()
		time.Sleep(2 * crewIdle)
		synctest.Wait()
		if n := runtime.NumGoroutine() - base; n != 0 {
			t.Errorf("%d goroutines stayed for ever", n)
		}
		c.Close()
	})
}

func TestCrewEndsWithItsTasks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := NewCrew()
		release := make(chan struct{})
		var ended atomic.Int32
		for range 10 { // each waits, so each has a goroutine of its own
			c.Go(func() {
				<-release
				c.Go(func() { ended.Add(1) }) // a task may start another
				ended.Add(1)
			})
		}
		closed := make(chan struct{})
		go func() {
			defer close(closed)
			c.Close()
		}()
		synctest.Wait()
		select {
		case <-closed:
			t.Error("closed before its tasks ended")
		default:
		}
		close(release)
		<-closed
		if n := ended.Load(); n != 20 {
			t.Errorf("%d of 20 tasks ended", n)
		}
	})
}
