package wire

import (
	"testing"
	"time"
)

func TestParseDuration(t *testing.T) {
	for s, want := range map[string]time.Duration{
		"0": 0, "90s": 90 * time.Second, "1h30m": 90 * time.Minute, "2w": 14 * 24 * time.Hour, "1d12h": 36 * time.Hour, "250ms": 250 * time.Millisecond,
	} {
		if d, err := ParseDuration(s); err != nil || d.Std() != want {
			t.Errorf("ParseDuration(%q) = %v, %v; want %v", s, d.Std(), err, want)
		}
	}
	for _, s := range []string{"", "5", "-1s", "1.5h", "1 h", "h", "1y", "99999999999999999999s", "20000w", "15250w9999999999s"} {
		if d, err := ParseDuration(s); err == nil {
			t.Errorf("ParseDuration(%q) = %v; want an error", s, d)
		}
	}
}

func FuzzParseDuration(f *testing.F) {
	for _, s := range []string{"90s", "1h30m", "2w1d", "1ms5ns", "0s", "0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := ParseDuration(s)
		if err != nil {
			return
		}
		if again, err := ParseDuration(d.String()); err != nil || again != d {
			t.Fatalf("%q → %q → %v, %v", s, d.String(), again, err)
		}
	})
}
