package tunnel

import (
	"context"
	"io"
	"runtime"
	"testing"
)

// BenchmarkIdle shows what a tunnel costs that has carried something and is
// idle now: memory of both ends together.
func BenchmarkIdle(b *testing.B) {
	memory := func() uint64 {
		for range 3 {
			runtime.GC()
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.StackInuse
	}
	before := memory()
	for range b.N {
		w := newWorld(b, "tls on tcp", func(_ context.Context, _ string, s *Stream) { _, _ = s.WriteTo(io.Discard) }, Config{})
		s := w.open(b, "sink")
		if _, err := s.Write(make([]byte, 1<<20)); err != nil {
			b.Fatal(err)
		}
		_ = s.CloseWrite()
		if _, err := io.ReadAll(s); err != nil {
			b.Fatal(err)
		}
		_ = s.Close()
	}
	b.ReportMetric(float64(memory()-before)/float64(b.N), "bytes/tunnel")
}
