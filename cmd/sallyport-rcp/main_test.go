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
	streams := cli.IO{In: strings.NewReader(""), Out: &stdout, Err: &stderr, Env: append([]string{"SALLYPORT_DATA=" + dir, "SALLYPORT_RCP_ADMIN_LISTEN=off", "SALLYPORT_RCP_LISTEN=127.0.0.1:0"}, env...)}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // what should refuse must not run for ever
	defer cancel()
	code = cli.Execute(ctx, newRoot(streams), streams, args)
	return code, stdout.String(), stderr.String()
}

func TestRefusesToStart(t *testing.T) {
	for _, c := range []struct{ set, want string }{
		{"SALLYPORT_RCP_JOIN=sp1.c2VjcmV0", "malformed join code"},
		{"SALLYPORT_RCP_CARIER=h2", "did you mean SALLYPORT_RCP_CARRIER?"},
		{"SALLYPORT_RCP_LANES=yes", "want on or off"},
		{"SALLYPORT_RCP_LISTEN=nowhere", "is not an address"},
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
		{"version", cli.ExitOK, "sallyport-rcp "},
		{"config check", cli.ExitOK, "SALLYPORT_RCP_LISTEN"},
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
