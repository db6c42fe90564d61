package local

import (
	"net/http"
	"sync/atomic"
	"time"

	"sallyport/internal/wire"
)

// Clock compares this host's clock with that of its gateway, as far as the
// gateway's requests say it. Nothing is decided by it: it is shown (N-20).
type Clock struct{ last atomic.Pointer[Skew] }

// Skew is what a request showed: how far this host's clock was ahead, less
// what the request took on its way.
type Skew struct {
	Seconds  float64   `json:"seconds"`
	Measured time.Time `json:"measured"` // by this host's clock
}

// Heard takes the time that a gateway put into its request.
func (c *Clock) Heard(h http.Header) {
	theirs, err := time.Parse(time.RFC3339Nano, h.Get(wire.HeaderTime))
	if err != nil {
		return // an older gateway says none
	}
	now := time.Now()
	c.last.Store(&Skew{Seconds: now.Sub(theirs).Round(time.Millisecond).Seconds(), Measured: now.UTC()})
}

// Skew is nil before the first request.
func (c *Clock) Skew() *Skew { return c.last.Load() }
