package tunnel

import "sync/atomic"

// tunnelBudget is what the windows of one tunnel may grow by, in bytes.
const tunnelBudget = 32 << 20

// Budget bounds how far the windows of many streams grow together. It may be
// shared by the tunnels of a process.
type Budget struct{ left atomic.Int64 }

// NewBudget makes a budget of n bytes.
func NewBudget(n int64) *Budget {
	b := &Budget{}
	b.left.Store(n)
	return b
}

func (b *Budget) take(n int64) bool {
	if b.left.Add(-n) < 0 {
		b.left.Add(n)
		return false
	}
	return true
}

func (b *Budget) give(n int64) { b.left.Add(n) }
