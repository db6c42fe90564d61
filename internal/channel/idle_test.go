package channel_test

import (
	"context"
	"net"
	"net/http"
	"runtime"
	"testing"

	"sallyport/internal/channel"
	"sallyport/internal/channel/channeltest"
)

// BenchmarkIdleJoinedStream reports what one stream that carries nothing costs
// in all three processes together, here one: the upstream's end (Connect), the
// relay (Forward) and the downstream's end (AcceptConnect).
func BenchmarkIdleJoinedStream(b *testing.B) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	next, far := channeltest.Pair(b)
	up, near := channeltest.Pair(b)
	go func() {
		_ = far.Serve(ctx, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			c, err := channel.AcceptConnect(w, r)
			if err != nil {
				b.Error(err)
				return
			}
			<-r.Context().Done()
			_ = c.Close()
		}))
	}()
	go func() {
		_ = near.Serve(ctx, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = channel.Forward(w, r, next, r.Host, nil)
		}))
	}()
	var before, after runtime.MemStats
	const n = 1000
	for b.Loop() {
		var conns []net.Conn
		runtime.GC()
		runtime.ReadMemStats(&before)
		for range n {
			c, err := up.Connect(ctx, "x:443", nil)
			if err != nil {
				b.Fatal(err)
			}
			conns = append(conns, c)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/n, "heap-B/stream")
		b.ReportMetric(float64(after.StackInuse-before.StackInuse)/n, "stack-B/stream")
		for _, c := range conns {
			_ = c.Close()
		}
	}
}
