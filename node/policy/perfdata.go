package policy

import (
	"math"
	"strconv"
	"strings"
)

// Perf is one value of a plugin's performance data, as the Monitoring Plugins
// guidelines define it: 'label'=value[unit];[warn];[crit];[min];[max].
type Perf struct {
	Label string
	Value float64 // NaN for "U": the plugin could not tell
	Unit  string  // "", s, us, ms, %, B, KB, MB, TB, c and what plugins invent
	Warn  string  // a range such as "10:20", as it stands there
	Crit  string
	Min   string
	Max   string
}

// Limits on what one check may bring.
const (
	maxPerf      = 64
	maxPerfLabel = 128
	maxPerfField = 64
	maxPerfUnit  = 16
)

// ParsePerfdata reads the part of a plugin's output behind "|". What does not
// parse is left out; its number is returned, so that somebody can be told.
func ParsePerfdata(s string) (values []Perf, bad int) {
	for s = strings.TrimSpace(s); s != ""; s = strings.TrimSpace(s) {
		var label string
		var ok bool
		if label, s, ok = cutLabel(s); !ok {
			return values, bad + 1
		}
		field := s
		if i := strings.IndexAny(s, " \t\r\n"); i >= 0 {
			field, s = s[:i], s[i:]
		} else {
			s = ""
		}
		p, ok := parsePerf(label, field)
		if !ok || len(values) == maxPerf {
			bad++
			continue
		}
		values = append(values, p)
	}
	return values, bad
}

// cutLabel takes a label up to "=". A quote inside a quoted label is doubled.
func cutLabel(s string) (label, rest string, ok bool) {
	if !strings.HasPrefix(s, "'") {
		label, rest, ok = strings.Cut(s, "=")
		return strings.TrimSpace(label), rest, ok
	}
	var b strings.Builder
	for s = s[1:]; ; {
		i := strings.IndexByte(s, '\'')
		if i < 0 {
			return "", "", false
		}
		b.WriteString(s[:i])
		s = s[i+1:]
		if !strings.HasPrefix(s, "'") {
			rest, ok = strings.CutPrefix(s, "=")
			return b.String(), rest, ok
		}
		b.WriteByte('\'')
		s = s[1:]
	}
}

func parsePerf(label, field string) (Perf, bool) {
	parts := strings.Split(field, ";")
	if label == "" || len(label) > maxPerfLabel || len(parts) > 5 {
		return Perf{}, false
	}
	for _, part := range parts {
		if len(part) > maxPerfField {
			return Perf{}, false
		}
	}
	p := Perf{Label: label}
	if parts[0] == "U" {
		p.Value = math.NaN()
	} else {
		n := len(parts[0])
		for i, c := range []byte(parts[0]) {
			exponent := (c == 'e' || c == 'E') && i > 0 && i+1 < n && strings.IndexByte("+-0123456789", parts[0][i+1]) >= 0
			if strings.IndexByte("+-.0123456789", c) < 0 && !exponent {
				n = i
				break
			}
		}
		v, err := strconv.ParseFloat(parts[0][:n], 64)
		if err != nil {
			return Perf{}, false
		}
		p.Value, p.Unit = v, parts[0][n:]
		if len(p.Unit) > maxPerfUnit || strings.ContainsAny(p.Unit, "0123456789+-.") {
			return Perf{}, false
		}
	}
	for i, dst := range []*string{&p.Warn, &p.Crit, &p.Min, &p.Max} {
		if i+1 < len(parts) {
			*dst = parts[i+1]
		}
	}
	return p, true
}

// String is the form that ParsePerfdata reads.
func (p Perf) String() string {
	var b strings.Builder
	b.WriteString("'" + strings.ReplaceAll(p.Label, "'", "''") + "'=")
	if math.IsNaN(p.Value) {
		b.WriteString("U")
	} else {
		b.WriteString(strconv.FormatFloat(p.Value, 'g', -1, 64) + p.Unit)
	}
	for _, f := range []string{p.Warn, p.Crit, p.Min, p.Max} {
		b.WriteString(";" + f)
	}
	return b.String()
}
