package cli

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"sallyport/config"
	"sallyport/internal/local"
	"sallyport/internal/lockdir"
	"sallyport/internal/wire"
)

func streams(in string) (IO, *bytes.Buffer, *bytes.Buffer) {
	var out, errs bytes.Buffer
	return IO{In: strings.NewReader(in), Out: &out, Err: &errs, Env: []string{"SALLYPORT_DATA=/nowhere"}}, &out, &errs
}

func TestExitCodes(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("x"), ExitFailed},
		{Usage("x"), ExitUsage},
		{fmt.Errorf("a: %w", &config.Error{Variable: "SALLYPORT_X", Problem: "bad"}), ExitUsage},
		{fmt.Errorf("a: %w", wire.ErrJoinCode), ExitUsage},
		{fmt.Errorf("a: %w", wire.ErrJoinRole), ExitUsage},
		{fmt.Errorf("a: %w", lockdir.ErrLocked), ExitRefused},
		{&local.Error{Code: local.CodeNotFound}, ExitNotFound},
		{&local.Error{Code: local.CodeForbidden}, ExitRefused},
		{&local.Error{Code: local.CodeUnavailable}, ExitFailed},
		{fmt.Errorf("a: %w", local.ErrNotRunning), ExitFailed},
		{fmt.Errorf("a: %w", context.DeadlineExceeded), ExitTimeout},
		{fmt.Errorf("a: %w", Fail(ExitNotFound, "gone")), ExitNotFound},
		{&ExitError{Code: 42}, 42},
		{fs.ErrNotExist, ExitFailed},
	} {
		if got := Code(c.err); got != c.want {
			t.Errorf("%v: exit %d, want %d", c.err, got, c.want)
		}
	}
}

func hostile() Table {
	return Table{Columns: []string{"node_id", "text"}, Rows: [][]string{{"a", "say \x1b[31mred\x07\nnext, \"line\""}, {"b", ""}}}
}

func TestOutputForms(t *testing.T) {
	s, out, errs := streams("")
	o := NewOutput(s)
	v := []map[string]any{{"node_id": "a", "text": "<b>"}}
	for _, c := range []struct {
		format Format
		want   []string
		never  string
	}{
		{FormatTable, []string{"NODE ID  TEXT", "�[31mred� next", "b        -"}, "\x1b"},
		{FormatJSON, []string{`"node_id": "a"`, `"<b>"`}, "\\u003c"},
		{FormatCSV, []string{"node_id,text", `""line""`}, "NODE"},
	} {
		out.Reset()
		o.Format = c.format
		if err := o.Print(v, hostile()); err != nil {
			t.Fatal(err)
		}
		for _, w := range c.want {
			if !strings.Contains(out.String(), w) {
				t.Errorf("%s: %q is missing in\n%s", c.format, w, out)
			}
		}
		if strings.Contains(out.String(), c.never) {
			t.Errorf("%s: %q stands in\n%s", c.format, c.never, out)
		}
	}
	out.Reset()
	o.Format = FormatJSON
	o.Say("for people")
	if out.Len() != 0 || errs.String() != "for people\n" {
		t.Errorf("beside JSON, stdout holds %q and stderr %q", out, errs)
	}
}

// TestNothingObeysATerminal: what a node says does not become a command of the
// terminal on which it is shown, in no form and in no error.
func TestNothingObeysATerminal(t *testing.T) {
	s, out, errs := streams("")
	o := NewOutput(s)
	const evil = "a\x1b[2J\u009b31m\u202eb\x00\U000e0001\r\nc\td"
	for _, o.Format = range []Format{FormatTable, FormatJSON, FormatCSV} {
		table := Table{Columns: []string{"text"}}
		table.Add(evil)
		if err := errors.Join(o.Print(map[string]string{"text": evil}, table), o.Stream(table.Columns)(map[string]string{"text": evil}, evil)); err != nil {
			t.Fatal(err)
		}
		if strings.ContainsFunc(out.String(), func(r rune) bool { return r != '\n' && r != '\t' && obeyed(r) }) {
			t.Errorf("%s: %q", o.Format, out)
		}
		if o.Format == FormatJSON {
			var v map[string]string
			if err := json.NewDecoder(out).Decode(&v); err != nil || v["text"] != evil {
				t.Errorf("%q is read as %q, %v", evil, v["text"], err)
			}
		}
		out.Reset()
	}
	report(errs, Root("prog", "x", "", s), errors.New(evil))
	if strings.ContainsFunc(errs.String(), func(r rune) bool { return r != '\n' && obeyed(r) }) {
		t.Errorf("error: %q", errs)
	}
}

// TestCSVHasNoFormulas: a spreadsheet takes what a node said for text.
func TestCSVHasNoFormulas(t *testing.T) {
	for cell, want := range map[string]string{
		"=cmd|' /C calc'!A0": "'=cmd|' /C calc'!A0", "+cmd|x": "'+cmd|x", "-1+cmd|x": "'-1+cmd|x", "@SUM(A1)": "'@SUM(A1)", "\t=1": "'\t=1",
		"": "", "-": "-", "+0.2 s": "+0.2 s", "-12%": "-12%", "a=b": "a=b",
	} {
		s, out, _ := streams("")
		o := NewOutput(s)
		o.Format = FormatCSV
		table := Table{Columns: []string{"text"}}
		table.Add(cell)
		if err := o.Print(nil, table); err != nil {
			t.Fatal(err)
		}
		rows, err := csv.NewReader(strings.NewReader(out.String() + "\"\"\n")).ReadAll()
		if err != nil || rows[1][0] != want {
			t.Errorf("%q is written as %q, %v", cell, out, err)
		}
	}
}

func TestStreamIsOneLineEach(t *testing.T) {
	s, out, _ := streams("")
	o := NewOutput(s)
	for format, want := range map[Format]string{
		FormatJSON: "{\"n\":1}\n{\"n\":2}\n", FormatCSV: "n\n1\n2\n", FormatTable: "1\n2\n",
	} {
		out.Reset()
		o.Format = format
		show := o.Stream([]string{"n"})
		for n := 1; n <= 2; n++ {
			if err := show(map[string]int{"n": n}, fmt.Sprint(n)); err != nil {
				t.Fatal(err)
			}
		}
		if out.String() != want {
			t.Errorf("%s: %q, want %q", format, out, want)
		}
	}
}

func TestStreamShowsWhatIsEmpty(t *testing.T) {
	s, out, _ := streams("")
	if err := NewOutput(s).Stream([]string{"node", "object", "text"})(nil, "web-1", "", "x"); err != nil || out.String() != "web-1  -  x\n" {
		t.Errorf("%q, %v: a column is missing", out, err)
	}
}

func TestConfirmNeedsAPersonOrYes(t *testing.T) {
	s, _, _ := streams("y\n")
	if err := Confirm(s, false, "change %d nodes", 3); Code(err) != ExitRefused || !strings.Contains(err.Error(), "change 3 nodes") || !strings.Contains(err.Error(), "--yes") {
		t.Errorf("a pipe was taken for a person: %v", err)
	}
	if err := Confirm(s, true, "change"); err != nil {
		t.Errorf("--yes: %v", err)
	}
}

func TestExecuteReportsOnce(t *testing.T) {
	s, out, errs := streams("")
	root := Root("prog", "x", "", s)
	o := NewOutput(s)
	o.AddFlag(root)
	root.AddCommand(VersionCommand(o), LocalCommand(o, s, nil, wire.RoleNode))
	if code := Execute(t.Context(), root, s, []string{"version"}); code != 0 || !strings.HasPrefix(out.String(), "prog ") {
		t.Errorf("version: %d, %q", code, out)
	}
	if code := Execute(t.Context(), root, s, []string{"vesrion"}); code != ExitUsage || strings.Count(errs.String(), "vesrion") != 1 {
		t.Errorf("typing slip: %d, %q", code, errs)
	}
	errs.Reset()
	if code := Execute(t.Context(), root, s, []string{"local", "status"}); code != ExitFailed || !strings.Contains(errs.String(), "/nowhere/node/local.sock") {
		t.Errorf("status without a role: %d, %q", code, errs)
	}
	s.Env = append(s.Env, "SALLYPORT_TYPO=1")
	root = Root("prog", "x", "", s)
	root.AddCommand(VersionCommand(o), LocalCommand(o, s, nil, wire.RoleNode))
	if code := Execute(t.Context(), root, s, []string{"local", "status"}); code != ExitUsage {
		t.Errorf("unknown variable: %d", code)
	}
	if code := Execute(t.Context(), root, s, []string{"version"}); code != ExitOK {
		t.Errorf("version must work in any environment: %d", code)
	}
}

// A node, or an RCP, has its words in an error: they neither rewrite the screen
// nor look like ours.
func TestErrorsAreSafeForATerminal(t *testing.T) {
	s, _, errs := streams("")
	root := Root("prog", "x", "", s)
	o := NewOutput(s)
	root.AddCommand(&cobra.Command{Use: "ask", RunE: func(*cobra.Command, []string) error {
		o.Note("%s\tsays\n\x1b[2Jit", "n1\r")
		return errors.New("refused: \x1b[2J\x1b]0;mine\a\u009b2J")
	}})
	if code := Execute(t.Context(), root, s, []string{"ask"}); code != ExitFailed {
		t.Errorf("exit code %d", code)
	}
	if want := "n1 \tsays\n�[2Jit\nprog: refused: �[2J�]0;mine��2J\n"; errs.String() != want {
		t.Errorf("stderr is %q, want %q", errs, want)
	}
}

func TestVersionOf(t *testing.T) {
	commit := []debug.BuildSetting{{Key: "vcs.revision", Value: "0123456789abcdef"}, {Key: "vcs.modified", Value: "true"}}
	for _, c := range []struct {
		info debug.BuildInfo
		want string
	}{
		{debug.BuildInfo{Main: debug.Module{Version: "v1.2.3"}}, "v1.2.3"},
		{debug.BuildInfo{Main: debug.Module{Version: "(devel)"}, Settings: commit}, "devel+0123456789ab.modified"},
		{debug.BuildInfo{}, "devel"},
	} {
		if got := versionOf(&c.info); got != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}

func TestAge(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for d, want := range map[time.Duration]string{0: "0s", -time.Hour: "0s", 59 * time.Second: "59s", 3 * time.Minute: "3m", 47 * time.Hour: "47h", 72 * time.Hour: "3d"} {
		if got := Age(now.Add(-d), now); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
	if Age(time.Time{}, now) != "" || Time(time.Time{}) != "" {
		t.Error("no time must be empty")
	}
}

func TestRunRolesOnAFullDisk(t *testing.T) {
	full := Role{Name: "node", Run: func(context.Context) error {
		return fmt.Errorf("node: %w", &fs.PathError{Op: "write", Path: "/data/node/x", Err: syscall.ENOSPC})
	}}
	err := RunRoles(t.Context(), full)
	if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "/data/node/x") || !strings.Contains(err.Error(), "free some space") {
		t.Errorf("%v: want the file and what to do", err)
	}
}

// An ordinary user who names no directory and has no role of his own asks those
// of the system; whoever names one is taken at his word.
func TestLocalFindsTheSystemsRoles(t *testing.T) {
	home, system := t.TempDir(), t.TempDir()
	defer func(was string) { systemData = was }(systemData)
	systemData = system
	if err := os.MkdirAll(filepath.Join(system, "node"), 0o700); err != nil {
		t.Fatal(err)
	}
	found := func(env ...string) string {
		t.Helper()
		s, _, _ := streams("")
		s.Env = append(env, "XDG_DATA_HOME="+home)
		l := &localRole{streams: s, out: NewOutput(s), roles: []wire.Role{wire.RoleGateway, wire.RoleNode}}
		c, err := l.operator()
		if err != nil {
			t.Fatal(err)
		}
		return c.Data
	}
	own := filepath.Join(home, "sallyport")
	if os.Geteuid() == 0 {
		own = config.SystemData // which is root's own
	}
	if got := found("SALLYPORT_DATA=" + home); got != home {
		t.Errorf("named: %s", got)
	}
	for _, role := range []string{"gateway", "node"} {
		if _, err := os.Stat(filepath.Join(own, role)); err == nil {
			t.Skip("a role is on this host")
		}
	}
	if got := found(); got != system {
		t.Errorf("none of his own: %s", got)
	}
	if os.Geteuid() == 0 {
		return
	}
	if err := os.MkdirAll(filepath.Join(own, "gateway"), 0o700); err != nil {
		t.Fatal(err)
	}
	if got := found(); got != own {
		t.Errorf("his own: %s", got)
	}
}
