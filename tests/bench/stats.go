package main

import (
	"cmp"
	"math"
	"slices"
	"time"
)

// number is what rounds measure.
type number interface {
	~int | ~int64 | ~float64
}

// median of the rounds; of an even number of them the lower middle one, so that
// it is always a value that was measured. It is 0 of none.
func median[T number](values []T) T {
	if len(values) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(values))
	return s[(len(s)-1)/2]
}

// percentile of sorted values by the nearest-rank method, p in (0, 1].
func percentile[T cmp.Ordered](sorted []T, p float64) T {
	var zero T
	if len(sorted) == 0 {
		return zero
	}
	i := int(math.Ceil(p*float64(len(sorted)))) - 1
	return sorted[min(max(i, 0), len(sorted)-1)]
}

// spread is how far apart the rounds are, as a share of their median.
func spread(values []float64) float64 {
	if len(values) < 2 {
		return 0
	}
	m := median(values)
	if m == 0 {
		return 0
	}
	return (slices.Max(values) - slices.Min(values)) / m
}

// column takes one measure of all rounds.
func column[R any, T number](rounds []R, get func(R) T) []T {
	out := make([]T, len(rounds))
	for i, r := range rounds {
		out[i] = get(r)
	}
	return out
}

const gib = 1 << 30

// perGiB is CPU seconds per GiB.
func perGiB(cpu time.Duration, bytes int64) float64 {
	if bytes == 0 {
		return 0
	}
	return cpu.Seconds() / (float64(bytes) / gib)
}

// perOperation is CPU microseconds per operation.
func perOperation(cpu time.Duration, n int) float64 {
	if n == 0 {
		return 0
	}
	return float64(cpu) / float64(time.Microsecond) / float64(n)
}
