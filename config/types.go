package config

import (
	"fmt"
	"log/slog"
	"math"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Secret is text that never shows itself: not in an error, not in a log line,
// not inside a printed struct. Read it with [Secret.Reveal].
type Secret string

const hidden = "(hidden)"

// String hides the secret.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return hidden
}

// GoString hides the secret from %#v.
func (s Secret) GoString() string { return strconv.Quote(s.String()) }

// LogValue hides the secret from slog.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalText hides the secret from JSON and YAML.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Reveal returns the secret itself.
func (s Secret) Reveal() string { return string(s) }

// Duration is a time span in whole numbers of w, d, h, m and s, such as 365d or
// 1h30m.
type Duration time.Duration

var durationUnits = []struct {
	name string
	unit time.Duration
}{{"w", 7 * 24 * time.Hour}, {"d", 24 * time.Hour}, {"h", time.Hour}, {"m", time.Minute}, {"s", time.Second}}

// maxDuration keeps sums of durations and times representable: 100 years.
const maxDuration = 100 * 365 * 24 * time.Hour

// UnmarshalText reads one or more numbers with their units.
func (d *Duration) UnmarshalText(b []byte) error {
	var total time.Duration
	rest := string(b)
	for first := true; first || rest != ""; first = false {
		digits := len(rest) - len(strings.TrimLeft(rest, "0123456789"))
		n, err := strconv.ParseInt(rest[:digits], 10, 64)
		rest = rest[digits:]
		i := slices.IndexFunc(durationUnits, func(u struct {
			name string
			unit time.Duration
		}) bool {
			return strings.HasPrefix(rest, u.name)
		})
		if err != nil || i < 0 {
			return fmt.Errorf("%s is not a duration: want a number with s, m, h, d or w, such as 90s or 2d", quote(string(b)))
		}
		u := durationUnits[i]
		if n > int64((maxDuration-total)/u.unit) {
			return fmt.Errorf("%s is longer than 100 years", quote(string(b)))
		}
		total += time.Duration(n) * u.unit
		rest = rest[len(u.name):]
	}
	*d = Duration(total)
	return nil
}

// MarshalText writes a form that UnmarshalText reads.
func (d Duration) MarshalText() ([]byte, error) {
	var b strings.Builder
	rest := time.Duration(d).Truncate(time.Second)
	for _, u := range durationUnits {
		if n := rest / u.unit; n > 0 {
			fmt.Fprintf(&b, "%d%s", n, u.name)
			rest %= u.unit
		}
	}
	if b.Len() == 0 {
		return []byte("0s"), nil
	}
	return []byte(b.String()), nil
}

// LogLevel is the least level that is logged.
type LogLevel slog.Level

// UnmarshalText accepts the four names, in any case.
func (l *LogLevel) UnmarshalText(b []byte) error {
	name, err := oneOf(strings.ToLower(string(b)), "debug", "info", "warn", "error")
	if err != nil {
		return err
	}
	return (*slog.Level)(l).UnmarshalText([]byte(name))
}

// MarshalText writes the form that UnmarshalText reads.
func (l LogLevel) MarshalText() ([]byte, error) {
	return []byte(strings.ToLower(slog.Level(l).String())), nil
}

// Level makes a LogLevel a slog.Leveler.
func (l LogLevel) Level() slog.Level { return slog.Level(l) }

// LogFormat is "text" or "json".
type LogFormat string

// UnmarshalText accepts text and json.
func (f *LogFormat) UnmarshalText(b []byte) error {
	v, err := oneOf(string(b), "text", "json")
	*f = LogFormat(v)
	return err
}

// Size is a number of bytes.
type Size int64

// UnmarshalText reads a number with an optional K, M or G (powers of 1,024).
func (z *Size) UnmarshalText(b []byte) error {
	s := string(b)
	digits := strings.TrimRight(s, "KMG")
	shift, ok := map[string]int{"": 0, "K": 10, "M": 20, "G": 30}[s[len(digits):]]
	n, err := strconv.ParseInt(digits, 10, 64)
	if !ok || err != nil || n <= 0 || n > math.MaxInt64>>shift {
		return fmt.Errorf("%s is not a size; want a positive number of bytes, with K, M or G if you like, such as 256M", quote(s))
	}
	*z = Size(n << shift)
	return nil
}

// MarshalText writes the form that UnmarshalText reads.
func (z Size) MarshalText() ([]byte, error) {
	for _, u := range []struct {
		name  string
		shift int
	}{{"G", 30}, {"M", 20}, {"K", 10}} {
		if z > 0 && z%(1<<u.shift) == 0 {
			return []byte(strconv.FormatInt(int64(z)>>u.shift, 10) + u.name), nil
		}
	}
	return []byte(strconv.FormatInt(int64(z), 10)), nil
}

// Count is a positive number.
type Count int

// UnmarshalText accepts 1 and more.
func (c *Count) UnmarshalText(b []byte) error {
	n, err := strconv.Atoi(string(b))
	if err != nil || n < 1 {
		return fmt.Errorf("%s is not accepted; want a whole number of at least 1", quote(string(b)))
	}
	*c = Count(n)
	return nil
}

// none is how an allow list is written that allows nothing.
const none = "none"

// Globs is a list of shell patterns, separated by ";". An empty list matches
// nothing; the single pattern "*" matches everything.
type Globs []string

// UnmarshalText splits, checks each pattern and drops empty parts.
func (g *Globs) UnmarshalText(b []byte) error {
	*g = nil
	for _, p := range split(string(b)) {
		if p == none {
			continue
		}
		if _, err := path.Match(p, "/"); err != nil {
			return fmt.Errorf("%s is not a pattern; want paths with *, ? and [a-z], separated by ;, or none", quote(p))
		}
		*g = append(*g, p)
	}
	return nil
}

// MarshalText writes the form that UnmarshalText reads.
func (g Globs) MarshalText() ([]byte, error) {
	if len(g) == 0 {
		return []byte(none), nil
	}
	return []byte(strings.Join(g, ";")), nil
}

// Any reports whether everything is allowed.
func (g Globs) Any() bool { return slices.Contains(g, "*") }

// Tags are key=value pairs, separated by ",".
type Tags map[string]string

var (
	tagKey   = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9_./-]{0,61}[A-Za-z0-9])?$`)
	tagValue = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$`)
)

// ParseTag reads one key=value. The characters are those of Kubernetes labels,
// because selectors are written in that language.
func ParseTag(s string) (key, value string, err error) {
	key, value, ok := strings.Cut(s, "=")
	if !ok || !tagKey.MatchString(key) || !tagValue.MatchString(value) {
		return "", "", fmt.Errorf("%s is not a tag; want key=value of letters, digits, '-', '_' and '.', at most 63 each", quote(s))
	}
	return key, value, nil
}

// UnmarshalText reads "role=web,env=prod".
func (t *Tags) UnmarshalText(b []byte) error {
	m := Tags{}
	for _, p := range strings.Split(string(b), ",") {
		p = strings.TrimSpace(p)
		if p == "" {
			continue
		}
		if err := m.Add(p); err != nil {
			return err
		}
	}
	*t = m
	return nil
}

// Add puts one key=value among the tags. A key has one value: which of two was
// meant cannot be known.
func (t Tags) Add(pair string) error {
	k, v, err := ParseTag(pair)
	if err != nil {
		return err
	}
	if old, ok := t[k]; ok && old != v {
		return fmt.Errorf("tag %s has two values, %s and %s", quote(k), quote(old), quote(v))
	}
	t[k] = v
	return nil
}

// MarshalText writes the pairs sorted by key.
func (t Tags) MarshalText() ([]byte, error) {
	pairs := make([]string, 0, len(t))
	for k, v := range t {
		pairs = append(pairs, k+"="+v)
	}
	slices.Sort(pairs)
	return []byte(strings.Join(pairs, ",")), nil
}

// split cuts a list at ";" and drops empty parts and white space.
func split(s string) []string {
	var parts []string
	for _, p := range strings.Split(s, ";") {
		if p = strings.TrimSpace(p); p != "" {
			parts = append(parts, p)
		}
	}
	return parts
}

// join writes a list that split cuts; empty stands for one of no parts.
func join[T any](l []T, empty string, text func(T) string) ([]byte, error) {
	if len(l) == 0 {
		return []byte(empty), nil
	}
	parts := make([]string, len(l))
	for i, p := range l {
		parts[i] = text(p)
	}
	return []byte(strings.Join(parts, ";")), nil
}

// with is a part that may have more behind it.
func with(part, sep, more string) string {
	if more == "" {
		return part
	}
	return part + sep + more
}
