package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sallyport/internal/cli"
)

// demoLimit is the contract's for `demo --exit`.
const demoLimit = 20 * time.Second

func programUnderTest(t *testing.T) string {
	t.Helper()
	// TestMain has put this test binary into the path under the program's name.
	program, err := exec.LookPath("sallyport")
	if err != nil {
		t.Fatal(err)
	}
	return program
}

func TestDemo(t *testing.T) {
	if testing.Short() {
		t.Skip("starts five processes")
	}
	began := time.Now()
	cmd := exec.CommandContext(t.Context(), programUnderTest(t), "demo", "--exit", "-o", "json")
	cmd.Env = environment()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s\n%s", err, stdout.String(), stderr.String())
	}
	took := time.Since(began)
	var report demoReport
	if err := json.Unmarshal(stdout.Bytes(), &report); err != nil {
		t.Fatalf("%v in %s", err, stdout.String())
	}
	var names []string
	for _, s := range report.Scenes {
		names = append(names, s.Name)
		if !s.OK {
			t.Errorf("%s: %s", s.Name, s.Detail)
		}
	}
	want := []string{"gateway", "rcp", "nodes", "policy", "action", "events", "trace", "closed"}
	if !report.OK || !slices.Equal(names, want) {
		t.Errorf("ok %t, scenes %v, want %v", report.OK, names, want)
	}
	if took > demoLimit && !raceEnabled {
		t.Errorf("took %v, the contract says %v", took, demoLimit)
	}
	if !strings.Contains(stderr.String(), "$ sallyport action run") {
		t.Errorf("no commentary on stderr:\n%s", stderr.String())
	}
}

// TestDemoUnread plays to a pipe whose reader leaves after one line, as with
// `sallyport demo | head -1`, and to a terminal that is closed.
func TestDemoUnread(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	// Under nohup SIGHUP is ignored, by what is started too; what is caught here is not.
	hung := make(chan os.Signal, 1)
	signal.Notify(hung, syscall.SIGHUP)
	t.Cleanup(func() { signal.Stop(hung) })
	for name, gone := range map[string]func(*os.Process, io.Closer) error{
		"pipe":     func(_ *os.Process, reader io.Closer) error { return reader.Close() },
		"terminal": func(p *os.Process, _ io.Closer) error { return p.Signal(syscall.SIGHUP) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			parent, err := os.MkdirTemp("", "unread-") // short, for demoDir
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.RemoveAll(parent) })
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, programUnderTest(t), "demo")
			cmd.Env = environment("TMPDIR=" + parent)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			if err := gone(cmd.Process, out); err != nil {
				t.Fatal(err)
			}
			if name == "terminal" {
				_, _ = io.Copy(io.Discard, out) // or it waits for a reader
			}
			if err := cmd.Wait(); cmd.ProcessState.ExitCode() <= 128 {
				t.Errorf("it ended with %v, want the code of the signal", err)
			}
			left, err := os.ReadDir(parent)
			if err != nil || len(left) > 0 {
				t.Errorf("it left %v (%v)", left, err)
			}
		})
	}
}

// TestDemoSabotage spoils one scene after the other: each proof has to notice,
// and the demo has to exit with 1.
func TestDemoSabotage(t *testing.T) {
	if testing.Short() {
		t.Skip("starts many processes")
	}
	if raceEnabled {
		t.Skip("starts sixty processes, which the race detector makes several times slower: tests/run runs it without")
	}
	for _, c := range []struct {
		scene string // whose proof must fail
		how   string
		spoil func(d *demo, at func(string) *scene)
	}{
		{"gateway", "never started", func(_ *demo, at func(string) *scene) { at("gateway").do = nothing }},
		{"rcp", "never started", func(_ *demo, at func(string) *scene) { at("rcp").do = nothing }},
		{"nodes", "never started", func(_ *demo, at func(string) *scene) { at("nodes").do = nothing }},
		{"policy", "never applied", func(_ *demo, at func(string) *scene) { at("policy").do = nothing }},
		{"policy", "a file is altered", func(d *demo, at func(string) *scene) {
			prove := at("policy").prove
			at("policy").prove = func(ctx context.Context) (string, error) {
				if err := os.WriteFile(d.configFile("web-2"), []byte("altered"), 0o600); err != nil {
					return "", err
				}
				return prove(ctx)
			}
		}},
		{"action", "never run", func(_ *demo, at func(string) *scene) { at("action").do = nothing }},
		{"action", "another exit code", func(d *demo, at func(string) *scene) {
			at("action").do = func(ctx context.Context) (err error) {
				d.action, err = d.cli(ctx, gatewayParty, "action", "run", "--node", "web-1", "--", "echo", actionOutput)
				return err
			}
		}},
		{"events", "none caused", func(_ *demo, at func(string) *scene) { at("events").do = nothing }},
		{"events", "no error in the log", func(d *demo, at func(string) *scene) {
			at("events").do = func(ctx context.Context) error {
				_, err := d.must(ctx, "db-1", "local", "event", "send", "--severity", "minor", localText)
				return err
			}
		}},
		{"trace", "the node is killed", func(d *demo, at func(string) *scene) {
			at("trace").do = func(context.Context) error {
				i := slices.IndexFunc(d.parties, func(p *party) bool { return p.name == "web-1" })
				dead := d.parties[i]
				d.parties = slices.Delete(d.parties, i, i+1)
				if err := dead.cmd.Process.Kill(); err != nil {
					return err
				}
				<-dead.done
				return nil
			}
		}},
		{"closed", "a node that listens", func(d *demo, at func(string) *scene) {
			at("closed").do = func(context.Context) error {
				return d.start("node", "db-2", "SALLYPORT_NODE_LISTEN=127.0.0.1:0")
			}
		}},
	} {
		t.Run(c.scene+" "+c.how, func(t *testing.T) {
			t.Parallel()
			dir, err := demoDir()
			if err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			streams := cli.IO{In: strings.NewReader(""), Out: &out, Err: &out}
			a := &app{streams: streams, out: cli.NewOutput(streams)}
			d := newDemo(programUnderTest(t), dir, loopback{}, a.say)
			scenes := d.story()
			at := func(name string) *scene {
				return &scenes[slices.IndexFunc(scenes, func(s scene) bool { return s.name == name })]
			}
			c.spoil(d, at)
			// Only the spoilt scene is bound to fail: it need not be waited for long.
			spoilt := at(c.scene)
			do := spoilt.do
			spoilt.do = func(ctx context.Context) error {
				d.patience = 1500 * time.Millisecond
				return do(ctx)
			}
			err = a.perform(t.Context(), d, scenes, true)
			if cli.Code(err) != cli.ExitFailed || !strings.Contains(err.Error(), c.scene) {
				t.Errorf("got %v (exit %d), want exit 1 at %s\n%s", err, cli.Code(err), c.scene, out.String())
			}
			if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s is left behind: %v", dir, err)
			}
			for _, p := range d.parties {
				select {
				case <-p.done:
				default:
					t.Errorf("%s still runs", p.name)
				}
			}
		})
	}
}
