package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/cli"
)

func (a *app) demoCommand() *cobra.Command {
	var exit, firewall bool
	cmd := &cobra.Command{
		Use:   "demo [--exit] [--firewall]",
		Short: "Show everything on this machine: a gateway, an RCP and three nodes",
		Long: "Start a gateway, an RCP and three nodes as separate processes in a temporary directory, enrol them with join codes,\n" +
			"apply a policy, run an action and receive events. Every step is checked through the public API; the exit code is 0\n" +
			"only if all of them were. Without --exit everything stays up to be played with, until Ctrl-C.\n" +
			"--firewall (root, Linux) puts each party into a network namespace of its own behind real nftables rules, and shows\n" +
			"at the end what the firewall counted.",
		Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.demo(cmd.Context(), exit, firewall)
		},
	}
	cmd.Flags().BoolVar(&exit, "exit", false, "end after the last step instead of staying up")
	cmd.Flags().BoolVar(&firewall, "firewall", false, "each party in a network namespace behind nftables rules (root)")
	return cmd
}

func (a *app) demo(ctx context.Context, exit, firewall bool) error {
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	dir, err := demoDir()
	if err != nil {
		return err
	}
	ctx, stop := whileRead(ctx)
	defer stop()
	where := place(loopback{})
	if firewall {
		if where, err = newWalls(ctx); err != nil {
			_ = os.RemoveAll(dir)
			return cli.Fail(cli.ExitFailed, "--firewall: %w", err)
		}
	}
	d := newDemo(program, dir, where, a.say)
	return a.perform(ctx, d, d.story(), exit)
}

// unread is the cause of a context whose output nobody reads any more.
type unread struct{ signal syscall.Signal }

func (u unread) Error() string { return "nobody reads this any more: " + u.signal.String() }

// whileRead ends the context when the reader of a pipe or the terminal has gone
// away. Such a signal would end the process on the spot, and leave a directory
// with keys behind.
func whileRead(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	gone := make(chan os.Signal, 1)
	signal.Notify(gone, syscall.SIGPIPE)
	if !signal.Ignored(syscall.SIGHUP) { // as nohup has it
		signal.Notify(gone, syscall.SIGHUP)
	}
	go func() {
		select {
		case s := <-gone:
			cancel(unread{s.(syscall.Signal)})
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		signal.Stop(gone)
		cancel(nil)
	}
}

// perform plays the scenes, and leaves nothing behind.
func (a *app) perform(ctx context.Context, d *demo, scenes []scene, exit bool) (err error) {
	defer func() {
		if closed := d.close(); err == nil && closed != nil {
			err = closed
		}
	}()
	report := d.play(ctx, scenes)
	defer func() {
		if gone := (unread{}); errors.As(context.Cause(ctx), &gone) {
			err = &cli.ExitError{Code: 128 + int(gone.signal)} // there is nobody to tell
		}
	}()
	if a.out.Format != cli.FormatTable {
		if err := a.printReport(report); err != nil {
			return err
		}
	}
	if report.err != nil {
		return &cli.ExitError{Code: cli.ExitFailed, Err: report.err}
	}
	if exit {
		return nil
	}
	d.invite()
	<-ctx.Done()
	return nil
}

// say prints the commentary: beside JSON and CSV on stderr.
func (a *app) say(format string, args ...any) { a.out.Say(format, args...) }

// demoDir makes a short directory: unix sockets have names of at most 107
// bytes, and TMPDIR may be deep.
func demoDir() (string, error) {
	const longest = 60
	parent := os.TempDir()
	if len(parent) > longest {
		parent = "/tmp"
	}
	dir, err := os.MkdirTemp(parent, "sallyport-demo-")
	if err != nil {
		return "", fmt.Errorf("demo: %w", err)
	}
	// Traversable, not listable: the sockets below are for local users.
	if err := os.Chmod(dir, 0o711); err != nil {
		return "", err
	}
	return filepath.Abs(dir)
}

// scene is one step of the story: what is done, and how it is seen through the
// public interfaces that it happened. They are apart so that a test can leave
// the deed out and watch the proof fail.
type scene struct {
	name  string
	title string
	do    func(context.Context) error
	prove func(context.Context) (detail string, err error)
}

// demoReport is the outcome, and what -o json prints.
type demoReport struct {
	OK      bool         `json:"ok"`
	Seconds float64      `json:"seconds"`
	Scenes  []demoResult `json:"scenes"`
	err     error
}

type demoResult struct {
	Name    string  `json:"name"`
	OK      bool    `json:"ok"`
	Seconds float64 `json:"seconds"`
	Detail  string  `json:"detail"`
}

// play runs the scenes in order and stops at the first that cannot be proved.
func (d *demo) play(ctx context.Context, scenes []scene) demoReport {
	began := time.Now()
	report := demoReport{Scenes: []demoResult{}}
	for i, s := range scenes {
		start := time.Now()
		d.say("%d. %s", i+1, s.title)
		err := s.do(ctx)
		detail := ""
		if err == nil {
			detail, err = d.eventually(ctx, s.prove)
		}
		r := demoResult{Name: s.name, OK: err == nil, Seconds: seconds(start), Detail: detail}
		if err != nil {
			r.Detail = err.Error()
			report.err = fmt.Errorf("scene %d, %s: %w", i+1, s.name, err)
		}
		report.Scenes = append(report.Scenes, r)
		if err != nil {
			d.say("   FAILED after %.1f s", r.Seconds)
			break
		}
		d.say("   ok after %.1f s: %s", r.Seconds, detail)
	}
	report.Seconds = seconds(began)
	report.OK = report.err == nil
	if report.OK {
		d.say("All %d scenes were proved through the public API, in %.1f s.", len(scenes), report.Seconds)
	}
	return report
}

func seconds(since time.Time) float64 { return float64(time.Since(since).Milliseconds()) / 1000 }

func (a *app) printReport(r demoReport) error {
	t := cli.Table{Columns: []string{"name", "ok", "seconds", "detail"}}
	for _, s := range r.Scenes {
		t.Add(s.Name, fmt.Sprint(s.OK), fmt.Sprintf("%.3f", s.Seconds), s.Detail)
	}
	return a.out.Print(r, t)
}

// proofEvery is how often a proof is tried again.
const proofEvery = 50 * time.Millisecond

// eventually repeats a proof until it holds, or patience ends. A party that
// ended by itself ends the waiting.
func (d *demo) eventually(ctx context.Context, prove func(context.Context) (string, error)) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, d.patience)
	defer cancel()
	tick := time.NewTicker(proofEvery)
	defer tick.Stop()
	for {
		detail, err := prove(ctx)
		if err == nil {
			return detail, nil
		}
		if dead := d.dead(); dead != nil {
			return "", dead
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("not seen within %v: %w", d.patience, err)
		case <-tick.C:
		}
	}
}

// invite prints what to try next.
func (d *demo) invite() {
	d.say("")
	d.say("Everything stays up until Ctrl-C. In another terminal:")
	d.say("")
	d.say("  export PATH=%s:$PATH SALLYPORT_DATA=%s", filepath.Dir(d.program), d.data(gatewayParty))
	for _, line := range []string{
		"sallyport node list",
		"sallyport node show web-1",
		"sallyport node trace web-1",
		"sallyport action run --selector role=web --yes -- uname -a",
		"sallyport event list",
		"sallyport event tail",
		"sallyport deployment status app-web-1",
		"sallyport audit list",
		"SALLYPORT_DATA=" + d.data("web-1") + " sallyport local status",
		"SALLYPORT_DATA=" + d.data("db-1") + " sallyport local event send --severity minor 'hello, gateway'",
		"echo ERROR once more >> " + d.logFile("web-2"),
	} {
		d.say("  %s", line)
	}
	d.say("")
	d.say("The parties log to %s.", filepath.Join(d.dir, "*.log"))
}
