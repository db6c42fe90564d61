//go:build unix

package tunnel

import (
	"syscall"
	"testing"
	"time"
)

// reportCPU adds the process's user and system time to what a benchmark
// reports: on a machine that others use too it repeats where wall time does not.
func reportCPU(b *testing.B) func() {
	b.Helper()
	began := processCPU(b)
	return func() {
		b.ReportMetric(float64(processCPU(b)-began)/float64(b.N), "cpu-ns/op")
	}
}

func processCPU(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
