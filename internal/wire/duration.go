package wire

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Duration is a time span that people write: whole numbers with s, m, h, d or
// w ("90s", "1h30m", "2w"). In JSON it is that text.
type Duration time.Duration

// Std returns the standard library's type.
func (d Duration) Std() time.Duration { return time.Duration(d) }

var durationUnits = []struct {
	name string
	unit time.Duration
}{
	{"w", 7 * 24 * time.Hour}, {"d", 24 * time.Hour}, {"h", time.Hour}, {"m", time.Minute},
	{"s", time.Second}, {"ms", time.Millisecond}, {"us", time.Microsecond}, {"ns", 1},
}

// ParseDuration reads one or more numbers with their units, without sign or
// space. "0" needs no unit. Also understood are ms, us and ns, which String
// needs for a full round trip.
func ParseDuration(s string) (Duration, error) {
	if s == "0" {
		return 0, nil
	}
	bad := func() (Duration, error) {
		return 0, fmt.Errorf("%q is not a duration (want a number with s, m, h, d or w, such as 90s or 2d)", Quotable(s))
	}
	if s == "" {
		return bad()
	}
	var total time.Duration
	for rest := s; rest != ""; {
		digits := len(rest) - len(strings.TrimLeft(rest, "0123456789"))
		n, err := strconv.ParseInt(rest[:digits], 10, 64)
		if err != nil {
			return bad()
		}
		rest = rest[digits:]
		letters := len(rest) - len(strings.TrimLeft(rest, "abcdefghijklmnopqrstuvwxyz"))
		unit := time.Duration(0)
		for _, u := range durationUnits {
			if u.name == rest[:letters] {
				unit = u.unit
			}
		}
		const longest = time.Duration(1<<63 - 1)
		if unit == 0 || n > int64(longest/unit) || time.Duration(n)*unit > longest-total {
			return bad()
		}
		total += time.Duration(n) * unit
		rest = rest[letters:]
	}
	return Duration(total), nil
}

// String returns the shortest form that ParseDuration reads back.
func (d Duration) String() string {
	if d <= 0 {
		return "0"
	}
	var b strings.Builder
	rest := time.Duration(d)
	for _, u := range durationUnits {
		if n := rest / u.unit; n > 0 {
			b.WriteString(strconv.FormatInt(int64(n), 10))
			b.WriteString(u.name)
			rest %= u.unit
		}
	}
	return b.String()
}

// MarshalText writes the form of [Duration.String].
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads what [ParseDuration] reads.
func (d *Duration) UnmarshalText(b []byte) (err error) {
	*d, err = ParseDuration(string(b))
	return err
}
