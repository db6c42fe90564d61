package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"sallyport/tests/netlab"
)

// runTimeout bounds one command: nothing that a test runs takes longer.
const runTimeout = 2 * time.Minute

// Result is what a command that ended left.
type Result struct {
	Command string
	Stdout  string
	Stderr  string
	Code    int
	Took    time.Duration

	t testing.TB
}

// runCommand runs a program to its end. Failing to start fails the test; an exit code
// does not.
func runCommand(t testing.TB, host *netlab.Host, env []string, stdin, program string, args ...string) Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), runTimeout)
	defer cancel()
	cmd := command(ctx, host, env, program, args...)
	cmd.Stdin = strings.NewReader(stdin)
	cmd.WaitDelay = time.Second
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	began := time.Now()
	err := cmd.Run()
	r := Result{
		Command: program[strings.LastIndex(program, "/")+1:] + " " + strings.Join(args, " "),
		Stdout:  stdout.String(), Stderr: stderr.String(), Took: time.Since(began), t: t,
	}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		t.Fatalf("%s: %v\n%s", r.Command, ctx.Err(), r.Stderr)
	case errors.As(err, &exit):
		r.Code = exit.ExitCode()
	case err != nil:
		t.Fatalf("%s: %v", r.Command, err)
	}
	return r
}

func (r Result) String() string {
	return fmt.Sprintf("%s: exit code %d after %v\nstdout: %s\nstderr: %s", r.Command, r.Code, r.Took.Round(time.Millisecond), r.Stdout, r.Stderr)
}

// Exits fails the test when the exit code is another one.
func (r Result) Exits(code int) Result {
	r.t.Helper()
	if r.Code != code {
		r.t.Fatalf("want exit code %d of %v", code, r)
	}
	return r
}

// JSON reads the standard output into v.
func (r Result) JSON(v any) {
	r.t.Helper()
	if err := json.Unmarshal([]byte(r.Stdout), v); err != nil {
		r.t.Fatalf("no JSON on stdout: %v: %v", err, r)
	}
}
