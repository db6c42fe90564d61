package main

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"sallyport/internal/cli"
)

// TestMain lets scripts call the program by its name: the test binary is it.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"sallyport": main})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(e *testscript.Env) error {
			dir, err := demoDir() // a short path, for sockets
			if err != nil {
				return err
			}
			e.Defer(func() { _ = os.RemoveAll(dir) })
			addr, err := loopback{}.address(rcpParty)
			if err != nil {
				return err
			}
			e.Setenv("SALLYPORT_DATA", dir)
			e.Setenv("HOME", e.WorkDir)
			e.Setenv("RCP", addr)
			free, err := loopback{}.address(rcpParty)
			if err != nil {
				return err
			}
			e.Setenv("PORT", portOf(free))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits, "answers": answers, "jsonkeys": jsonKeys, "until": until},
	})
}

// exits CODE PROGRAM ARG... runs a program and wants exactly this exit code.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM ARG...")
	}
	err := ts.Exec(args[1], args[2:]...)
	got := "0"
	if err != nil {
		got = exitCode(err)
	}
	if got != args[0] {
		ts.Fatalf("%v exited with %s, want %s", args[1:], got, args[0])
	}
}

// answers SOCKET waits until somebody listens on a unix socket.
func answers(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: answers SOCKET")
	}
	const limit = 20 * time.Second
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(limit); ; <-tick.C {
		c, err := net.Dial("unix", args[0])
		if err == nil {
			ts.Check(c.Close())
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("after %v: %v", limit, err)
		}
	}
}

// until TEXT PROGRAM ARG... runs a program until it exits with 0 and its output
// matches the regular expression.
func until(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: until TEXT PROGRAM ARG...")
	}
	want := regexp.MustCompile(args[0])
	const limit = 20 * time.Second
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(limit); ; <-tick.C {
		program, err := exec.LookPath(args[1])
		ts.Check(err)
		cmd := exec.CommandContext(context.Background(), program, args[2:]...)
		cmd.Env = environment("SALLYPORT_DATA=" + ts.Getenv("SALLYPORT_DATA"))
		out, err := cmd.CombinedOutput()
		if err == nil && want.Match(out) {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("after %v: %v\n%s", limit, err, out)
		}
	}
}

// jsonKeys KEY... wants the object, or every object of the list, that the last
// command printed to have these keys; an empty list has none.
func jsonKeys(ts *testscript.TestScript, neg bool, keys []string) {
	text := []byte(ts.ReadFile("stdout"))
	var list []map[string]json.RawMessage
	if err := json.Unmarshal(text, &list); err != nil {
		var one map[string]json.RawMessage
		ts.Check(json.Unmarshal(text, &one))
		list = append(list, one)
	}
	if neg || len(list) == 0 {
		ts.Fatalf("no object to look at")
	}
	for _, object := range list {
		for _, k := range keys {
			if _, ok := object[k]; !ok {
				ts.Fatalf("no key %s in %v", k, object)
			}
		}
	}
}

// TestTree walks the whole command tree: every command says what it does and
// refuses arguments that it has no use for.
func TestTree(t *testing.T) {
	root := newRoot(cli.IO{Env: []string{}})
	walk(root, func(path string, short string, runnable, checked bool) {
		if short == "" {
			t.Errorf("%s has no short help", path)
		}
		if runnable && !checked {
			t.Errorf("%s does not check its arguments", path)
		}
	})
}

// TestFlags looks at the form of each flag's value in --help, which a
// backquoted word of the description would take the place of.
func TestFlags(t *testing.T) {
	root := newRoot(cli.IO{Env: []string{}})
	walkFlags(root, func(path, name, form string) {
		if strings.ContainsRune(form, ' ') {
			t.Errorf("%s --%s %s: its description quotes a command", path, name, form)
		}
	})
}
