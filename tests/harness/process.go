package harness

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sallyport/tests/netlab"
)

// stopTimeout is how long a program may take to end after SIGTERM.
const stopTimeout = 20 * time.Second

// Process is one running role. It is killed when the test ends, or when the
// test program dies.
type Process struct {
	Name string

	t       testing.TB
	host    *netlab.Host // nil: this machine
	program string
	args    []string
	env     []string
	log     *log

	mu   sync.Mutex
	cmd  *exec.Cmd
	done chan struct{} // closed when cmd has ended
}

// log keeps what all runs of one process wrote.
type log struct {
	mu   sync.Mutex
	text []byte
}

// maxLog is how much of a log is kept: the last part tells why a test failed.
const maxLog = 4 << 20

func (l *log) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, b...)
	if over := len(l.text) - maxLog; over > 0 {
		l.text = append(l.text[:0], l.text[over:]...)
	}
	return len(b), nil
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.text)
}

// start makes a process and starts it. env is the whole environment.
func start(t testing.TB, host *netlab.Host, name string, env []string, program string, args ...string) *Process {
	t.Helper()
	p := &Process{Name: name, t: t, host: host, program: program, args: args, env: env, log: new(log)}
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("log of %s:\n%s", name, tail(p.log.String(), 150))
		}
	})
	p.Start()
	return p
}

// tail returns the last n lines.
func tail(text string, n int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	if len(lines) > n {
		lines = append([]string{"… (" + strconv.Itoa(len(lines)-n) + " lines before)"}, lines[len(lines)-n:]...)
	}
	return strings.Join(lines, "\n")
}

// command prepares a program on a host, or on this machine.
func command(ctx context.Context, host *netlab.Host, env []string, program string, args ...string) *exec.Cmd {
	var cmd *exec.Cmd
	if host != nil {
		cmd = host.Command(ctx, program, args...)
	} else {
		cmd = exec.CommandContext(ctx, program, args...)
	}
	cmd.Env = env
	return cmd
}

// Start starts the process again with what it was first started with.
func (p *Process) Start() {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd != nil {
		p.t.Fatalf("%s runs already", p.Name)
	}
	cmd := command(context.Background(), p.host, p.env, p.program, p.args...)
	cmd.Stdout, cmd.Stderr = p.log, p.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		p.t.Fatalf("start %s: %v", p.Name, err)
	}
	done := make(chan struct{})
	go func() {
		_ = cmd.Wait() // the exit code is in cmd.ProcessState
		close(done)
	}()
	p.cmd, p.done = cmd, done
}

// SetEnv changes the environment of the next Start. An empty value removes the
// variable.
func (p *Process) SetEnv(name, value string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var env []string
	for _, kv := range p.env {
		if !strings.HasPrefix(kv, name+"=") {
			env = append(env, kv)
		}
	}
	if value != "" {
		env = append(env, name+"="+value)
	}
	p.env = env
}

// PID of the running process.
func (p *Process) PID() int {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		p.t.Fatalf("%s does not run", p.Name)
	}
	return p.cmd.Process.Pid
}

// Kill ends the process with SIGKILL and returns when it is gone.
func (p *Process) Kill() { p.end(syscall.SIGKILL) }

// Stop ends the process with SIGTERM and returns its exit code.
func (p *Process) Stop() int {
	p.t.Helper()
	return p.end(syscall.SIGTERM)
}

// Signal sends a signal to the running process.
func (p *Process) Signal(sig syscall.Signal) {
	p.t.Helper()
	if err := syscall.Kill(p.PID(), sig); err != nil {
		p.t.Fatalf("signal %v to %s: %v", sig, p.Name, err)
	}
}

func (p *Process) end(sig syscall.Signal) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return 0
	}
	if err := syscall.Kill(p.cmd.Process.Pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		p.t.Errorf("end %s: %v", p.Name, err)
	}
	limit := time.NewTimer(stopTimeout)
	defer limit.Stop()
	select {
	case <-p.done:
	case <-limit.C:
		p.t.Errorf("%s did not end within %v of %v", p.Name, stopTimeout, sig)
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) // its children too
		<-p.done
	}
	code := p.cmd.ProcessState.ExitCode()
	p.cmd = nil
	return code
}

// Wait waits until the process ends by itself and returns its exit code.
func (p *Process) Wait(within time.Duration) int {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		p.t.Fatalf("%s does not run", p.Name)
	}
	limit := time.NewTimer(within)
	defer limit.Stop()
	select {
	case <-p.done:
		code := p.cmd.ProcessState.ExitCode()
		p.cmd = nil
		return code
	case <-limit.C:
		p.t.Fatalf("%s did not end within %v", p.Name, within)
		return -1
	}
}

// Log returns what the process wrote so far, over all its runs.
func (p *Process) Log() string { return p.log.String() }

// environment is what every program gets: nothing of ours from the outside.
func environment(extra map[string]string) []string {
	var env []string
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		if !strings.HasPrefix(name, "SALLYPORT_") && !strings.HasSuffix(strings.ToUpper(name), "_PROXY") {
			env = append(env, kv)
		}
	}
	for name, value := range extra {
		env = append(env, name+"="+value)
	}
	return env
}
