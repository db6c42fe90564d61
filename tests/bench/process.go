package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// stopWait is how long a program may take to end after SIGTERM.
const stopWait = 10 * time.Second

// process is one program that the benchmark started. It dies with the benchmark.
type process struct {
	name string
	log  string // file with what it wrote

	program string
	args    []string
	env     []string
	cmd     *exec.Cmd
	done    chan struct{} // closed when it has ended
}

// startProcess starts a program whose output goes to dir/name.log.
func startProcess(dir, name string, env []string, program string, args ...string) (*process, error) {
	p := &process{name: name, log: filepath.Join(dir, name+".log"), program: program, args: args, env: env}
	return p, p.start()
}

func (p *process) start() error {
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = out.Close() }() // the child has its own
	p.cmd = exec.CommandContext(context.Background(), p.program, p.args...)
	p.cmd.Env = p.env
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	done := make(chan struct{})
	cmd := p.cmd
	go func() {
		defer close(done)
		_ = cmd.Wait() // how it ended is in ProcessState
	}()
	p.done = done
	return nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// ended is an error when the program ended by itself.
func (p *process) ended() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s ended (%v):\n%s", p.name, p.cmd.ProcessState, lastLines(p.log, 12))
	default:
		return nil
	}
}

// stop ends the program and returns when it is gone.
func (p *process) stop(sig syscall.Signal) error {
	if p == nil || p.cmd == nil || p.cmd.Process == nil {
		return nil
	}
	_ = p.cmd.Process.Signal(sig) // it may have ended already
	limit := time.NewTimer(stopWait)
	defer limit.Stop()
	select {
	case <-p.done:
		return nil
	case <-limit.C:
		_ = syscall.Kill(-p.pid(), syscall.SIGKILL)
		<-p.done
		return fmt.Errorf("%s did not end within %v", p.name, stopWait)
	}
}

func lastLines(file string, n int) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// environment is ours without variables of Sallyport, and without proxies,
// which would stand between the parties.
func environment(extra ...string) []string {
	var env []string
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		if !strings.HasPrefix(name, "SALLYPORT_") && !strings.HasSuffix(strings.ToUpper(name), "_PROXY") && name != helperVariable {
			env = append(env, kv)
		}
	}
	return append(env, extra...)
}

// eventually asks until the answer is no error, or the time is over.
func eventually(ctx context.Context, within time.Duration, what string, ask func() error) error {
	const pause = 50 * time.Millisecond
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	again := time.NewTicker(pause)
	defer again.Stop()
	for {
		err := ask()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return fmt.Errorf("wait until %s: not within %v: %w", what, within, err)
			}
			return ctx.Err()
		case <-again.C:
		}
	}
}

// pause waits, or ends early with ctx.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
