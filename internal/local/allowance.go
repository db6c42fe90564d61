package local

import (
	"context"
	"fmt"
	"math"
	"os"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// What one user may send in events, in units of one event and one KiB of it.
// Everybody who may log in may send, so that nobody but root and the service's
// own user may fill the spool with what drops the events of others.
const (
	eventsPerSecond = 50
	eventsBurst     = 5000
	maxAllowances   = 10_000
)

// allowances are the token buckets of the users.
type allowances struct {
	mu     sync.Mutex
	byUser map[uint32]*rate.Limiter
}

// spend takes an event of size bytes from the allowance of the user of ctx.
func (a *allowances) spend(ctx context.Context, size int) error {
	uid, ok := ctx.Value(userKey{}).(uint32)
	if !ok {
		uid = nobody
	}
	if uid == 0 || uid == uint32(os.Geteuid()) {
		return nil
	}
	cost := 1 + size>>10
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	l := a.byUser[uid]
	if l == nil {
		a.prune(now)
		l = rate.NewLimiter(eventsPerSecond, eventsBurst)
		a.byUser[uid] = l
	}
	if l.AllowN(now, cost) {
		return nil
	}
	wait := math.Ceil((float64(cost) - l.TokensAt(now)) / eventsPerSecond)
	return &Error{CodeBusy, fmt.Sprintf("uid %d sends too many events (%d per second, and %d at once, each KiB counting as one more): the event is not stored, try again in %.0f s",
		int32(uid), eventsPerSecond, eventsBurst, wait)}
}

// prune makes room for another user: those whose allowance is whole again are
// not remembered.
func (a *allowances) prune(now time.Time) {
	if a.byUser == nil {
		a.byUser = make(map[uint32]*rate.Limiter)
	}
	if len(a.byUser) < maxAllowances {
		return
	}
	for uid, l := range a.byUser {
		if l.TokensAt(now) >= eventsBurst {
			delete(a.byUser, uid)
		}
	}
}
