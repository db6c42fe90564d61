package local

import (
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/wire"
)

func TestClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c Clock
		if c.Skew() != nil {
			t.Error("it knows a gateway's clock before it heard of one")
		}
		for _, ahead := range []time.Duration{0, 48 * time.Hour, -48 * time.Hour, 1500 * time.Millisecond} {
			c.Heard(http.Header{wire.HeaderTime: {time.Now().Add(-ahead).UTC().Format(time.RFC3339Nano)}})
			c.Heard(http.Header{wire.HeaderTime: {"soon"}})
			if s := c.Skew(); s == nil || s.Seconds != ahead.Seconds() || !s.Measured.Equal(time.Now()) {
				t.Errorf("%v ahead: %+v", ahead, s)
			}
		}
	})
}
