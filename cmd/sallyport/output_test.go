package main

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/spf13/cobra"

	"sallyport/gateway/api"
	"sallyport/internal/cli"
	"sallyport/internal/sqldb"
	"sallyport/internal/wire"
)

func testApp(format cli.Format) (*app, *bytes.Buffer, *bytes.Buffer) {
	var out, errs bytes.Buffer
	streams := cli.IO{In: strings.NewReader(""), Out: &out, Err: &errs}
	a := &app{streams: streams, out: cli.NewOutput(streams)}
	a.out.Format = format
	return a, &out, &errs
}

func ended(id, node, state string, code int) *api.Action {
	return &api.Action{ID: wire.ID(id), Node: node, State: state, ExitCode: &code}
}

// The output of several nodes comes in pieces that end anywhere; lines stay
// whole and carry the node's name.
func TestSeveralNodesKeepTheirLines(t *testing.T) {
	a, out, errs := testApp(cli.FormatTable)
	r := newRunOutput(a, []api.Action{{ID: "1", Node: "web-1"}, {ID: "2", Node: "web-2"}})
	for _, o := range []api.Output{
		{Action: "1", Stream: "stdout", Data: []byte("on")},
		{Action: "2", Stream: "stdout", Data: []byte("two\nthr")},
		{Action: "1", Stream: "stdout", Data: []byte("e\n")},
		{Action: "2", Stream: "stderr", Data: []byte("oops\n")},
		{Action: "9", Stream: "stdout", Data: []byte("of nobody\n")},
		{Action: "1", End: ended("1", "web-1", wire.ActionSucceeded, 0)},
		{Action: "2", End: ended("2", "web-2", wire.ActionFailed, 7)},
	} {
		if err := r.add(o); err != nil {
			t.Fatal(err)
		}
	}
	err := r.finish()
	if cli.Code(err) != 1 {
		t.Errorf("one of two failed: exit %d, want 1", cli.Code(err))
	}
	if want := "web-2: two\nweb-1: one\nweb-2: thr\n"; out.String() != want {
		t.Errorf("stdout %q, want %q", out, want)
	}
	if want := "web-2: oops\nweb-2: failed\n"; !strings.HasPrefix(errs.String(), "web-2: oops\n") {
		t.Errorf("stderr %q, want %q", errs, want)
	}
}

func TestOneNodePassesItsExitCode(t *testing.T) {
	for _, c := range []struct {
		end  api.Action
		want int
	}{
		{api.Action{State: wire.ActionSucceeded}, 0},
		{api.Action{State: wire.ActionFailed, ExitCode: ptr(42)}, 42},
		{api.Action{State: wire.ActionFailed, ExitCode: ptr(137), Signal: 9}, 137},
		{api.Action{State: wire.ActionTimedOut}, 124},
		{api.Action{State: wire.ActionExpired, Code: api.ActionCodeExpired}, 124},
		{api.Action{State: wire.ActionExpired, Code: api.ActionCodeNotConnected}, 125},
		{api.Action{State: wire.ActionLost}, 125},
		{api.Action{State: wire.ActionRefused}, 126},
	} {
		a, _, _ := testApp(cli.FormatTable)
		c.end.ID, c.end.Node = "1", "web-1"
		r := newRunOutput(a, []api.Action{{ID: "1", Node: "web-1"}})
		if err := r.add(api.Output{Action: "1", End: &c.end}); err != nil {
			t.Fatal(err)
		}
		if got := cli.Code(r.finish()); got != c.want {
			t.Errorf("%s %s: exit %d, want %d", c.end.State, c.end.Code, got, c.want)
		}
	}
}

func ptr[T any](v T) *T { return &v }

func TestBytesOfOneNodeAreNotTouched(t *testing.T) {
	a, out, _ := testApp(cli.FormatTable)
	r := newRunOutput(a, []api.Action{{ID: "1", Node: "web-1"}})
	raw := []byte("\x00\x1b[31m\xff no newline")
	if err := r.add(api.Output{Action: "1", Stream: "stdout", Data: raw}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out.Bytes(), raw) {
		t.Errorf("got %q", out)
	}
}

func TestProblemsHaveExitCodes(t *testing.T) {
	for code, want := range map[api.Code]int{
		api.CodeInvalid: 2, api.CodeMalformed: 2, api.CodeUnsupported: 2, api.CodeNotFound: 3, api.CodeForbidden: 4, api.CodeUnauthorized: 4,
		api.CodeAmbiguous: 4, api.CodeNameInUse: 4, api.CodeExists: 4, api.CodeConflict: 4, api.CodeChanged: 4, api.CodeTooLarge: 4,
		api.CodeLocked: 4, api.CodeTimeout: 5, api.CodeUnavailable: 1, api.CodeInternal: 1,
	} {
		err := explain(fmt.Errorf("grant: %w", api.NewProblem(code, "because")))
		if got := cli.Code(err); got != want {
			t.Errorf("%s: exit %d, want %d", code, got, want)
		}
		if !strings.Contains(err.Error(), "because") {
			t.Errorf("%s: the reason is lost: %v", code, err)
		}
	}
	plain := errors.New("x")
	if !errors.Is(explain(plain), plain) || explain(nil) != nil {
		t.Error("explain changes what it does not know")
	}
}

func TestDiff(t *testing.T) {
	for _, c := range []struct{ old, new, want string }{
		{"a\nb\nc\n", "a\nb\nc\n", " a| b| c"},
		{"a\nb\nc\n", "a\nx\nc\n", " a|-b|+x| c"},
		{"a\nb\nc\nd\n", "a\nc\nd\ne\n", " a|-b| c| d|+e"},
		{"a\n", "b\n", "-a|+b"},
		{"a\nb\n", "a\n", " a|-b"},
	} {
		if got := strings.Join(diff(c.old, c.new), "|"); got != c.want {
			t.Errorf("%q to %q: %s, want %s", c.old, c.new, got, c.want)
		}
	}
}

func TestShellLineCanBeTyped(t *testing.T) {
	got := shellLine([]string{"action", "run", "--", "sh", "-c", "echo 'a b'; exit 3", ""})
	if want := `action run -- sh -c 'echo '\''a b'\''; exit 3' ''`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// TestRolesAreNotToldOfTheAPI: a role that cannot reach its CA is not advised to look
// for the gateway's API; an operator's command is.
func TestRolesAreNotToldOfTheAPI(t *testing.T) {
	root, action := &cobra.Command{Use: "sallyport"}, &cobra.Command{Use: "action"}
	refused := func(*cobra.Command, []string) error { return fmt.Errorf("dial: %w", syscall.ECONNREFUSED) }
	role, order := &cobra.Command{Use: nameRun + " ROLE...", RunE: refused}, &cobra.Command{Use: nameRun, RunE: refused}
	action.AddCommand(order)
	root.AddCommand(role, action)
	explainErrors(root)
	if err := role.RunE(role, nil); strings.Contains(err.Error(), "SALLYPORT_URL") {
		t.Errorf("a role: %v", err)
	}
	if err := order.RunE(order, nil); !strings.Contains(err.Error(), "SALLYPORT_URL") {
		t.Errorf("an operator's command: %v", err)
	}
	var exit *cli.ExitError
	if err := explainRole(fmt.Errorf("pki: %w", sqldb.ErrLocked)); !errors.As(err, &exit) || exit.Code != cli.ExitRefused {
		t.Errorf("a locked directory: %v", err)
	}
}
