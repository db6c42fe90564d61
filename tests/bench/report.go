package main

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
)

// The generated part of docs/performance.md stands between these lines. What
// people write stands outside, and stays.
const (
	markBegin = "<!-- bench:begin: written by tests/bench; a new run replaces everything down to bench:end -->"
	markEnd   = "<!-- bench:end -->"
)

const skeleton = "# Performance\n\n" + markBegin + "\n" + markEnd + "\n"

// report writes state, page and plot.
func (b *bench) report(root, state string) error {
	if err := b.results.save(state); err != nil {
		return err
	}
	plot := filepath.Join(root, "docs", "performance.svg")
	if err := os.WriteFile(plot, []byte(b.results.plot()), 0o644); err != nil {
		return err
	}
	page := filepath.Join(root, "docs", "performance.md")
	old, err := os.ReadFile(page)
	if errors.Is(err, fs.ErrNotExist) {
		old, err = []byte(skeleton), nil
	}
	if err != nil {
		return err
	}
	text, err := splice(string(old), b.results.markdown())
	if err != nil {
		return fmt.Errorf("%s: %w", page, err)
	}
	return os.WriteFile(page, []byte(text), 0o644)
}

// splice replaces what stands between the marks.
func splice(page, generated string) (string, error) {
	head, rest, ok := strings.Cut(page, markBegin)
	_, tail, ok2 := strings.Cut(rest, markEnd)
	if !ok || !ok2 {
		return "", fmt.Errorf("the lines %q and %q must stand there", markBegin, markEnd)
	}
	return head + markBegin + "\n\n" + strings.TrimSpace(generated) + "\n\n" + markEnd + tail, nil
}

// amount shows a value with its unit, with three digits that count.
func amount(v float64, unit string) string {
	s := digits(v)
	if unit == "" {
		return s
	}
	if unit == unitRate {
		return s + unit
	}
	return s + " " + unit
}

func digits(v float64) string {
	switch a := math.Abs(v); {
	case a == math.Trunc(a) && a < 1000:
		return fmt.Sprintf("%.0f", v)
	case a >= 100:
		return thousands(fmt.Sprintf("%.0f", v))
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	case a >= 0.095:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

// thousands puts commas into a whole number.
func thousands(s string) string {
	sign := ""
	if strings.HasPrefix(s, "-") {
		sign, s = "-", s[1:]
	}
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return sign + s
}

func (f figure) limit(v float64) string {
	switch {
	case !f.judged(), v == 0 && !f.exact, f.exact && v != f.must:
		return ""
	case f.exact:
		return digits(v)
	case f.higher:
		return "≥ " + digits(v)
	}
	return "≤ " + digits(v)
}

var marks = map[string]string{verdictStretch: "✔✔", verdictMet: "✔", verdictMissed: "✘"}

func (r results) markdown() string {
	var s strings.Builder
	fmt.Fprintf(&s, "Measured on %s; yardstick haproxy %s. Each value is the median of its rounds; `±` is half the distance between the best and the worst of them. ✔ must reached, ✔✔ stretch reached, ✘ missed.\n\n", r.Machine, r.Haproxy)
	s.WriteString("![How far each figure is from its goal, and how cost grows with the number of nodes](performance.svg)\n\n")
	s.WriteString("| row | figure | must | stretch | measured | | commit |\n|---|---|---|---|---|---|---|\n")
	row := ""
	missing := 0
	for _, f := range figures {
		m, ok := r.Figures[f.id]
		if !f.judged() {
			continue
		}
		if !ok {
			missing++
		}
		name := f.row
		if name == row {
			name = ""
		} else {
			row = name
		}
		value, mark, commit := "not measured", "", ""
		if ok {
			value, mark, commit = amount(m.value(), f.unit)+plusMinus(m.Rounds), marks[f.verdict(m.value())], m.Commit
		}
		fmt.Fprintf(&s, "| %s | %s | %s | %s | %s | %s | %s |\n", name, f.name, f.limit(f.must), f.limit(f.stretch), value, mark, commit)
	}
	if missing > 0 {
		fmt.Fprintf(&s, "\n%d figures are not measured yet.\n", missing)
	}
	s.WriteString("\nMeasured beside, without a goal of their own:\n\n| row | figure | measured | commit |\n|---|---|---|---|\n")
	row = ""
	for _, f := range figures {
		m, ok := r.Figures[f.id]
		if f.judged() || !ok {
			continue
		}
		name := f.row
		if name == row {
			name = ""
		} else {
			row = name
		}
		fmt.Fprintf(&s, "| %s | %s | %s | %s |\n", name, f.name, amount(m.value(), f.unit)+plusMinus(m.Rounds), m.Commit)
	}
	if len(r.Scale) > 0 {
		s.WriteString("\nWhat grows with the number of nodes:\n\n| nodes | RCPs | enrol and connect | reconnect | RCP memory per node, RSS / anonymous | desired state to all, warm or cold as it comes | commit |\n|---|---|---|---|---|---|---|\n")
		for _, p := range r.Scale {
			fmt.Fprintf(&s, "| %s | %d | %s | %s | %s / %s | %s | %s |\n", thousands(fmt.Sprint(p.Nodes)), p.RCPs,
				known(p.Connect, unitSecond), known(p.Reconnect, unitSecond), known(p.RSS, unitKiB), known(p.Anonymous, unitKiB), known(p.Desired, unitSecond), p.Commit)
		}
	}
	return s.String()
}

// known shows a value that a scale point may not have.
func known(v float64, unit string) string {
	if v < 0 {
		return "–"
	}
	return amount(v, unit)
}

func plusMinus(rounds []float64) string {
	if s := spread(rounds); s > 0 {
		return fmt.Sprintf(" ± %.0f %%", s*50)
	}
	return ""
}

// plain is the table for a terminal.
func (r results) plain() string {
	var s strings.Builder
	w := tabwriter.NewWriter(&s, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ROW\tFIGURE\tMUST\tSTRETCH\tMEASURED\tVERDICT\tCOMMIT")
	for _, f := range figures {
		if m, ok := r.Figures[f.id]; ok {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", f.row, f.name, f.limit(f.must), f.limit(f.stretch),
				amount(m.value(), f.unit)+plusMinus(m.Rounds), f.verdict(m.value()), m.Commit)
		}
	}
	_ = w.Flush() // into memory
	return s.String()
}
