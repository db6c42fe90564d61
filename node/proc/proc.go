// Package proc starts the programs that a gateway asks for: only those that
// the node's own configuration allows, without the agent's secrets in their
// environment, in a process group of their own that ends as a whole.
package proc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Conditions that callers tell apart.
var (
	ErrRefused  = errors.New("refused by the node's configuration")
	ErrNotFound = errors.New("program not found")
)

// Grace is the time between SIGTERM and SIGKILL, and how long output may still
// come from children that a program left behind.
const Grace = 5 * time.Second

// lingering is how long a finished program's background children may hold its
// output open.
const lingering = time.Second

// Allow is a list of patterns of resolved absolute paths, as path.Match reads
// them: "*" does not cross "/". A pattern that ends with "/**" allows all
// below; "*" alone allows everything. An empty list allows nothing.
type Allow []string

// Matches reports whether a pattern allows the clean absolute path p.
func (a Allow) Matches(p string) bool {
	for _, pattern := range a {
		if pattern == "*" {
			return true
		}
		if dir, ok := strings.CutSuffix(pattern, "/**"); ok && strings.HasPrefix(p, dir+"/") {
			return true
		}
		if ok, err := path.Match(pattern, p); err == nil && ok {
			return true
		}
	}
	return false
}

// Resolve finds a program, follows symbolic links to the file that would run,
// and checks that file's path. variable names the setting in errors.
func (a Allow) Resolve(program, variable string) (string, error) {
	found := program
	if !strings.Contains(program, "/") {
		var err error
		if found, err = exec.LookPath(program); err != nil {
			return "", fmt.Errorf("%w: %q is not in the node's PATH", ErrNotFound, program)
		}
	}
	if !filepath.IsAbs(found) {
		return "", fmt.Errorf("%w: %q is a relative path; give the whole path", ErrRefused, program)
	}
	resolved, err := filepath.EvalSymlinks(found)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return "", fmt.Errorf("%w: %s does not exist on the node", ErrNotFound, program)
	case err != nil:
		return "", fmt.Errorf("resolve %s: %w", program, err)
	case !a.Matches(resolved):
		return "", fmt.Errorf("%w: %s is %s, which %s does not allow", ErrRefused, program, resolved, variable)
	}
	return resolved, nil
}

// Environ is the agent's environment without its secrets: SALLYPORT_*, which
// may hold join codes, and the user and password of an HTTP proxy.
func Environ() []string {
	env := os.Environ()
	kept := env[:0:0]
	for _, kv := range env {
		name, value, _ := strings.Cut(kv, "=")
		switch {
		case strings.HasPrefix(name, "SALLYPORT_"):
		case strings.HasSuffix(strings.ToLower(name), "_proxy"):
			kept = append(kept, name+"="+withoutUser(value))
		default:
			kept = append(kept, kv)
		}
	}
	return kept
}

// withoutUser takes user and password out of a proxy's URL, which may lack its
// scheme. What is no URL is cut the same way: too much rather than too little.
func withoutUser(proxy string) string {
	scheme, rest, found := strings.Cut(proxy, "://")
	if !found {
		scheme, rest = "", proxy
	} else {
		scheme += "://"
	}
	return scheme + rest[strings.LastIndexByte(rest, '@')+1:]
}

// Command is one program to run, already resolved.
type Command struct {
	Path   string   // the resolved file
	Args   []string // with the program as it was named first
	Stdout io.Writer
	Stderr io.Writer
	// Started is called once the process runs.
	Started func(pid int)
}

// Exit is how a program ended: its code, or 128+n after signal n.
type Exit struct {
	Code   int
	Signal int
}

// Run runs c to its end. When ctx ends first, the whole process group gets
// SIGTERM, and what is left after [Grace] SIGKILL; Exit then tells what the
// program made of it. An error means that it did not run.
func Run(ctx context.Context, c Command) (Exit, error) {
	cmd := &exec.Cmd{Path: c.Path, Args: c.Args, Env: Environ(), Dir: "/", Stdout: c.Stdout, Stderr: c.Stderr}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = lingering
	if err := cmd.Start(); err != nil {
		return Exit{}, err
	}
	if c.Started != nil {
		c.Started(cmd.Process.Pid)
	}
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		// The process stays a zombie until cmd.Wait, so that its number, which
		// is also its group's, cannot be given to another meanwhile.
		for {
			err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
			if !errors.Is(err, unix.EINTR) {
				return
			}
		}
	}()
	select {
	case <-exited:
	case <-ctx.Done():
		signal(cmd, syscall.SIGTERM)
		grace := time.NewTimer(Grace)
		select {
		case <-exited:
		case <-grace.C:
		}
		grace.Stop()
		signal(cmd, syscall.SIGKILL)
		<-exited
	}
	err := cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) && !errors.Is(err, exec.ErrWaitDelay) {
		return Exit{}, err
	}
	status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ok && status.Signaled() {
		return Exit{Code: 128 + int(status.Signal()), Signal: int(status.Signal())}, nil
	}
	return Exit{Code: cmd.ProcessState.ExitCode()}, nil
}

// signal reaches the whole group; one that is gone is no concern.
func signal(cmd *exec.Cmd, sig syscall.Signal) {
	_ = syscall.Kill(-cmd.Process.Pid, sig)
}

// Buffer keeps the first Limit bytes that are written to it.
type Buffer struct {
	Limit int
	b     []byte
}

// Write never fails: a program must not break because it says too much.
func (b *Buffer) Write(p []byte) (int, error) {
	n := min(len(p), b.Limit-len(b.b))
	b.b = append(b.b, p[:n]...)
	return len(p), nil
}

// String is what was kept.
func (b *Buffer) String() string { return string(b.b) }
