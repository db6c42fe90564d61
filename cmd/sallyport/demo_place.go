package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"sallyport/gateway/api"
)

// place is where the parties of a demo stand.
type place interface {
	// describe says where everything runs.
	describe() string
	// address is a free address of a party, as the others reach it.
	address(party string) (string, error)
	// command prepares a program on a party's host.
	command(ctx context.Context, party, program string, args ...string) *exec.Cmd
	// scenes are what only this place can show, at the end of the story.
	scenes(d *demo) []scene
	close() error
}

// loopback puts everything on this machine.
type loopback struct{}

func (loopback) describe() string { return "on loopback" }

// address returns a port that is free for TCP and UDP.
func (loopback) address(string) (string, error) {
	const tries = 100
	for range tries {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return "", err
		}
		addr := l.Addr().String()
		u, udpErr := net.ListenPacket("udp", addr)
		if udpErr == nil {
			_ = u.Close()
		}
		_ = l.Close()
		if udpErr == nil {
			return addr, nil
		}
	}
	return "", errors.New("no port of loopback is free for TCP and UDP")
}

func (loopback) command(ctx context.Context, _, program string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, program, args...)
}

func (loopback) scenes(*demo) []scene { return nil }
func (loopback) close() error         { return nil }

const (
	gatewayParty = "gateway"
	rcpParty     = "dmz"
)

// demo is one performance: its processes, its directory and what it remembers
// from one scene to the next.
type demo struct {
	program  string
	dir      string
	place    place
	say      func(format string, args ...any)
	patience time.Duration // for one proof

	parties []*party
	client  *api.Client
	action  ranCommand
}

// patience is far above what a scene takes on a slow machine: most take less
// than a second.
const patience = 30 * time.Second

func newDemo(program, dir string, where place, say func(string, ...any)) *demo {
	return &demo{program: program, dir: dir, place: where, say: say, patience: patience}
}

func (d *demo) data(party string) string    { return filepath.Join(d.dir, party) }
func (d *demo) logFile(party string) string { return filepath.Join(d.dir, party+"-app.log") }

// party is one running role.
type party struct {
	name string
	log  string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
}

// environment is ours without its SALLYPORT_ variables and without proxies,
// which would stand between the parties, and with the given ones.
func environment(extra ...string) []string {
	var env []string
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		if !strings.HasPrefix(name, "SALLYPORT_") && !strings.HasSuffix(strings.ToUpper(name), "_PROXY") {
			env = append(env, kv)
		}
	}
	return append(env, extra...)
}

// start starts a role of the program on the host of its own name.
func (d *demo) start(role, name string, env ...string) error {
	p := &party{name: name, log: filepath.Join(d.dir, name+".log"), done: make(chan struct{})}
	out, err := os.Create(p.log)
	if err != nil {
		return err
	}
	defer func() { _ = out.Close() }()
	// The context of the demo must not kill the parties: close ends them in order.
	p.cmd = d.place.command(context.Background(), name, d.program, "run", role)
	p.cmd.Env = environment(append(env, "SALLYPORT_DATA="+d.data(name), "SALLYPORT_"+strings.ToUpper(role)+"_ADMIN_LISTEN=off")...)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	// A group of its own: Ctrl-C on the terminal is for the demo, which then
	// ends the parties. Should the demo be killed, they go with it.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := p.cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait() // how it ended is in ProcessState
	}()
	d.parties = append(d.parties, p)
	return nil
}

// dead returns an error when a party has ended by itself.
func (d *demo) dead() error {
	for _, p := range d.parties {
		select {
		case <-p.done:
			return fmt.Errorf("%s ended by itself (%v):\n%s", p.name, p.cmd.ProcessState, lastLines(p.log))
		default:
		}
	}
	return nil
}

// lastLines shows the end of a log.
func lastLines(file string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	const most = 12
	return strings.Join(lines[max(0, len(lines)-most):], "\n")
}

// stopWait is how long the parties may take to end.
const stopWait = 5 * time.Second

// close ends the parties, nodes first, and removes the directory.
func (d *demo) close() error {
	if d.client != nil {
		d.client.Close()
	}
	deadline := time.NewTimer(stopWait)
	defer deadline.Stop()
	for i := len(d.parties) - 1; i >= 0; i-- {
		_ = d.parties[i].cmd.Process.Signal(syscall.SIGTERM) // it may have ended already
	}
	var errs []error
	for _, p := range d.parties {
		select {
		case <-p.done:
		case <-deadline.C:
			deadline.Reset(0)
			errs = append(errs, fmt.Errorf("%s did not end within %v; see its last lines:\n%s", p.name, stopWait, lastLines(p.log)))
			_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
			<-p.done
		}
	}
	return errors.Join(append(errs, d.place.close(), os.RemoveAll(d.dir))...)
}

// ranCommand is a command line and what it did.
type ranCommand struct {
	stdout, stderr string
	code           int
}

// cli runs the operator's program as a user would type it, on a party's host,
// and shows the command line.
func (d *demo) cli(ctx context.Context, name string, args ...string) (ranCommand, error) {
	d.say("   $ sallyport %s", shellLine(args))
	return d.quietCLI(ctx, name, args...)
}

func (d *demo) quietCLI(ctx context.Context, name string, args ...string) (ranCommand, error) {
	cmd := d.place.command(ctx, name, d.program, args...)
	cmd.Env = environment("SALLYPORT_DATA=" + d.data(name))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	r := ranCommand{stdout: stdout.String(), stderr: stderr.String()}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		r.code = exit.ExitCode()
		return r, nil
	}
	return r, err
}

// must is cli for commands that have to succeed.
func (d *demo) must(ctx context.Context, name string, args ...string) (string, error) {
	r, err := d.cli(ctx, name, args...)
	if err != nil {
		return "", err
	}
	if r.code != 0 {
		return "", fmt.Errorf("sallyport %s: exit code %d: %s", shellLine(args), r.code, strings.TrimSpace(r.stderr))
	}
	return r.stdout, nil
}

// shellLine shows arguments as one would type them.
func shellLine(args []string) string {
	out := make([]string, len(args))
	for i, a := range args {
		if a == "" || strings.ContainsAny(a, " ;'\"$*&|<>") {
			a = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
		out[i] = a
	}
	return strings.Join(out, " ")
}

// secretFile writes a join code for a party.
func (d *demo) secretFile(name, text string) (string, error) {
	path := filepath.Join(d.dir, name+".join")
	return path, os.WriteFile(path, []byte(text), 0o600)
}
