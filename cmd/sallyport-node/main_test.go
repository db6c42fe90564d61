package main

import (
	"bytes"
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"sallyport/internal/cli"
)

func run(t *testing.T, env []string, args ...string) (code int, out, errs string) {
	t.Helper()
	// A short path: the local socket below it has at most 107 bytes.
	dir, err := os.MkdirTemp("", "sp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	var stdout, stderr bytes.Buffer
	streams := cli.IO{In: strings.NewReader(""), Out: &stdout, Err: &stderr, Env: append([]string{"SALLYPORT_DATA=" + dir, "SALLYPORT_NODE_ADMIN_LISTEN=off"}, env...)}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // what should refuse must not run for ever
	defer cancel()
	code = cli.Execute(ctx, newRoot(streams), streams, args)
	return code, stdout.String(), stderr.String()
}

func TestRefusesToStart(t *testing.T) {
	for _, c := range []struct{ set, want string }{
		{"SALLYPORT_NODE_JOIN=sp1.c2VjcmV0", "malformed join code"},
		{"SALLYPORT_NODE_CARIER=h2", "did you mean SALLYPORT_NODE_CARRIER?"},
		{"SALLYPORT_NODE_ALLOW_TARGETS=db", "want host:port"},
		{"SALLYPORT_NODE_MODE=rw", "want managed or readonly"},
	} {
		code, _, errs := run(t, []string{c.set})
		if code != cli.ExitUsage || !strings.Contains(errs, c.want) {
			t.Errorf("%s: exit %d, %q", c.set, code, errs)
		}
		if strings.Contains(errs, "c2VjcmV0") {
			t.Errorf("the join code is repeated: %s", errs)
		}
	}
}

func TestCommands(t *testing.T) {
	for _, c := range []struct {
		args string
		code int
		want string
	}{
		{"version", cli.ExitOK, "sallyport-node "},
		{"config check", cli.ExitOK, "SALLYPORT_NODE_ALLOW_COMMANDS"},
		{"config check gateway", cli.ExitOK, "SALLYPORT_GATEWAY_LISTEN"},
		{"local status", cli.ExitFailed, "no role is running there"},
		{"local event send --severity normal x", cli.ExitFailed, "no role is running there"},
		{"node list", cli.ExitUsage, `unknown command "node"`},
	} {
		code, out, errs := run(t, nil, strings.Fields(c.args)...)
		if code != c.code || !strings.Contains(out+errs, c.want) {
			t.Errorf("%s: exit %d, want %d\n%s%s", c.args, code, c.code, out, errs)
		}
	}
}
