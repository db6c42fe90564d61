package cli

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf16"

	"charm.land/lipgloss/v2"
	"charm.land/lipgloss/v2/table"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"sallyport/config"
)

// Format of the output.
type Format string

// The formats.
const (
	FormatTable Format = "table"
	FormatJSON  Format = "json"
	FormatCSV   Format = "csv"
)

// Set makes a Format a flag.
func (f *Format) Set(s string) error {
	switch v := Format(s); v {
	case FormatTable, FormatJSON, FormatCSV:
		*f = v
		return nil
	}
	return fmt.Errorf("want table, json or csv")
}

// String returns the flag's value.
func (f *Format) String() string { return string(*f) }

// Type names the form in --help.
func (f *Format) Type() string { return "table|json|csv" }

// Output prints results on stdout in the format that was asked for.
type Output struct {
	Format Format
	w      io.Writer
	err    io.Writer
}

// NewOutput prints on the streams; AddFlag chooses the format.
func NewOutput(streams IO) *Output {
	return &Output{Format: FormatTable, w: streams.Out, err: streams.Err}
}

// AddFlag adds -o to a program.
func (o *Output) AddFlag(root *cobra.Command) {
	root.PersistentFlags().VarP(&o.Format, "output", "o", "form of the output")
	_ = root.RegisterFlagCompletionFunc("output", fixed(string(FormatTable), string(FormatJSON), string(FormatCSV)))
}

func fixed(values ...string) cobra.CompletionFunc {
	return cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)
}

// Table is what people and spreadsheets see of a value.
type Table struct {
	Columns []string // in snake_case, as CSV shows them
	Rows    [][]string
}

// Add appends one row.
func (t *Table) Add(cells ...string) { t.Rows = append(t.Rows, cells) }

// Print shows v as JSON, or its table. JSON is the whole value with stable
// keys; the table is a selection.
func (o *Output) Print(v any, t Table) error {
	switch o.Format {
	case FormatJSON:
		return o.json(v, "  ")
	case FormatCSV:
		return o.csv(t)
	}
	if fd, ok := terminal(o.w); ok {
		return o.styled(t, fd)
	}
	return o.plain(t)
}

// Stream shows one value at a time as it comes: JSON as one line each.
func (o *Output) Stream(columns []string) func(v any, cells ...string) error {
	first := true
	return func(v any, cells ...string) error {
		defer func() { first = false }()
		switch o.Format {
		case FormatJSON:
			return o.json(v, "")
		case FormatCSV:
			t := Table{Rows: [][]string{cells}}
			if first {
				t.Columns = columns
			}
			return o.csv(t)
		}
		clean := make([]string, len(cells))
		for i, c := range cells {
			clean[i] = dash(Clean(c))
		}
		_, err := fmt.Fprintln(o.w, strings.Join(clean, "  "))
		return err
	}
}

// Say prints a line for people: on stdout as a table would be, on stderr
// beside JSON and CSV.
func (o *Output) Say(format string, args ...any) {
	w := o.w
	if o.Format != FormatTable {
		w = o.err
	}
	_, _ = fmt.Fprintln(w, cleanText(fmt.Sprintf(format, args...)))
}

// Note prints a line on stderr in every format: advice beside a result.
func (o *Output) Note(format string, args ...any) {
	_, _ = fmt.Fprintln(o.err, cleanText(fmt.Sprintf(format, args...)))
}

// Raw prints bytes as they are.
func (o *Output) Raw(b []byte) error {
	_, err := o.w.Write(b)
	return err
}

// json escapes what it may print as it is, and a terminal obeys: C1 control
// characters and those that turn the direction of writing. The value is the same.
func (o *Output) json(v any, indent string) error {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetIndent("", indent)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return err
	}
	var out strings.Builder
	for _, r := range b.String() { // valid UTF-8: Encode sees to that
		if r != '\n' && obeyed(r) {
			for _, u := range utf16.AppendRune(nil, r) {
				_, _ = fmt.Fprintf(&out, `\u%04x`, u)
			}
			continue
		}
		out.WriteRune(r)
	}
	_, err := io.WriteString(o.w, out.String())
	return err
}

func (o *Output) csv(t Table) error {
	w := csv.NewWriter(o.w)
	if len(t.Columns) > 0 {
		if err := w.Write(t.Columns); err != nil {
			return err
		}
	}
	for _, row := range t.Rows {
		cells := make([]string, len(row))
		for i, c := range row {
			cells[i] = inert(cleanText(strings.ReplaceAll(c, "\r\n", "\n")))
		}
		if err := w.Write(cells); err != nil {
			return err
		}
	}
	w.Flush()
	return w.Error()
}

// number is what begins like a formula and is none: a skew of "+0.2 s".
var number = regexp.MustCompile(`^[+-][0-9.]+ ?[a-z%]*$`)

// inert keeps a spreadsheet from running what a node said: a cell with an
// apostrophe before it is text.
func inert(cell string) string {
	if cell == "" || !strings.ContainsRune("=+-@\t\n", rune(cell[0])) || cell == "-" || number.MatchString(cell) {
		return cell
	}
	return "'" + cell
}

func titles(columns []string) []string {
	out := make([]string, len(columns))
	for i, c := range columns {
		out[i] = strings.ToUpper(strings.ReplaceAll(c, "_", " "))
	}
	return out
}

// plain is for pipes and files: columns, nothing else.
func (o *Output) plain(t Table) error {
	w := tabwriter.NewWriter(o.w, 0, 0, 2, ' ', 0)
	for _, row := range append([][]string{titles(t.Columns)}, t.Rows...) {
		cells := make([]string, len(row))
		for i, c := range row {
			cells[i] = dash(Clean(c))
		}
		if _, err := fmt.Fprintln(w, strings.Join(cells, "\t")); err != nil {
			return err
		}
	}
	return w.Flush()
}

// prose are the columns that may be cut on a terminal. The others hold what
// people copy and compare, fingerprints above all: the terminal wraps them.
var prose = map[string]bool{"text": true, "reason": true, "detail": true, "error": true, "last_error": true, "spec": true}

// leastProse is what stays of a cell that is cut.
const leastProse = 30

// fit cuts prose as far as lines of that width need it.
func fit(t Table, width int) {
	widths := make([]int, len(t.Columns))
	for _, row := range append([][]string{t.Columns}, t.Rows...) {
		for i, c := range row {
			widths[i] = max(widths[i], lipgloss.Width(c))
		}
	}
	over := -width - gap
	for _, w := range widths {
		over += w + gap
	}
	for over > 0 {
		longest := -1
		for i, c := range t.Columns {
			if prose[c] && widths[i] > leastProse && (longest < 0 || widths[i] > widths[longest]) {
				longest = i
			}
		}
		if longest < 0 {
			break
		}
		to := max(widths[longest]-over, leastProse)
		over -= widths[longest] - to
		widths[longest] = to
		for _, row := range t.Rows {
			row[longest] = cut(row[longest], to)
		}
	}
}

// cut shortens a text to a number of columns.
func cut(s string, to int) string {
	if lipgloss.Width(s) <= to {
		return s
	}
	r := []rune(s)
	r = r[:min(len(r), to)]
	for len(r) > 0 && lipgloss.Width(string(r)) >= to {
		r = r[:len(r)-1]
	}
	return string(r) + "…"
}

// gap stands between two columns.
const gap = 2

// styled is for terminals.
func (o *Output) styled(t Table, fd int) error {
	shown := Table{Columns: t.Columns}
	for _, row := range t.Rows {
		cells := make([]string, len(row))
		for i, c := range row {
			cells[i] = dash(Clean(c))
		}
		shown.Add(cells...)
	}
	if width, _, err := term.GetSize(fd); err == nil && width > 0 {
		fit(shown, width)
	}
	header := lipgloss.NewStyle().Bold(true).PaddingRight(gap)
	cell := lipgloss.NewStyle().PaddingRight(gap)
	view := table.New().Headers(titles(t.Columns)...).Wrap(false).
		Border(lipgloss.HiddenBorder()).BorderTop(false).BorderBottom(false).BorderLeft(false).
		BorderRight(false).BorderColumn(false).BorderHeader(false).
		StyleFunc(func(row, col int) lipgloss.Style {
			if row == table.HeaderRow {
				return header
			}
			return cell.Foreground(colour(shown.Rows[row][col]))
		})
	for _, row := range shown.Rows {
		view.Row(row...)
	}
	lines := strings.Split(view.Render(), "\n")
	for i, line := range lines {
		lines[i] = strings.TrimRight(line, " ") // what pads a long column would wrap into empty lines
	}
	_, err := lipgloss.Fprintln(o.w, strings.Join(lines, "\n"))
	return err
}

// colour marks states and severities; everything else keeps the terminal's.
func colour(cell string) (c interface{ RGBA() (r, g, b, a uint32) }) {
	switch cell {
	case "running", "applied", "active", "succeeded", "connected", "granted", "ok", "ready", "listening":
		return lipgloss.Green
	case "failing", "readonly", "draining", "pending", "unavailable", "queued", "sent", "warning", "minor", "degraded", "deploying", "connecting", "enrolling":
		return lipgloss.Yellow
	case "down", "unreachable", "failed", "locked", "quarantined", "revoked", "denied", "critical", "major", "error", "lost", "refused":
		return lipgloss.Red
	}
	return lipgloss.NoColor{}
}

// Clean makes text that came from a node safe for a terminal: control
// characters, escape sequences among them, would let it rewrite the screen.
func Clean(s string) string { return strings.Map(cleanRune, s) }

func cleanRune(r rune) rune {
	switch {
	case r == '\n', r == '\r', r == '\t':
		return ' '
	case obeyed(r):
		return '�'
	}
	return r
}

// cleanText is [Clean] for text of several lines, whose tabs stay.
func cleanText(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return r
		}
		return cleanRune(r)
	}, s)
}

func obeyed(r rune) bool { return unicode.IsControl(r) || unicode.Is(unicode.Cf, r) }

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// Time prints an instant as RFC 3339 in UTC; zero is empty.
func Time(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// Pairs prints a map as k=v, sorted by key.
func Pairs(m map[string]string) string {
	b, err := config.Tags(m).MarshalText()
	if err != nil {
		return ""
	}
	return string(b)
}
