package proc

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestMatches(t *testing.T) {
	for _, c := range []struct {
		allow string
		path  string
		want  bool
	}{
		{"*", "/bin/sh", true},
		{"/usr/bin/*", "/usr/bin/dash", true},
		{"/usr/bin/*", "/usr/bin/sub/dash", false},
		{"/usr/**", "/usr/bin/sub/dash", true},
		{"/usr/**", "/usrlocal/x", false},
		{"/usr/bin/check_?", "/usr/bin/check_1", true},
		{"/usr/bin/[", "/usr/bin/[", false},
	} {
		if got := (Allow{c.allow}).Matches(c.path); got != c.want {
			t.Errorf("%s matches %s: %v", c.allow, c.path, got)
		}
	}
	if (Allow{}).Matches("/bin/true") {
		t.Error("an empty list allows something")
	}
}

func TestResolve(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	target := filepath.Join(dir, "real")
	if err := os.WriteFile(target, []byte("#!/bin/sh\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "ok"), 0o700); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "ok", "link")
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	allow := Allow{dir + "/ok/*"}
	if _, err := allow.Resolve(link, "X"); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), target) {
		t.Errorf("a link led out of what is allowed: %v", err)
	}
	if got, err := (Allow{target}).Resolve(link, "X"); err != nil || got != target {
		t.Errorf("got %s, %v", got, err)
	}
	if _, err := (Allow{"*"}).Resolve("./real", "X"); !errors.Is(err, ErrRefused) {
		t.Errorf("relative path: %v", err)
	}
	if _, err := (Allow{"*"}).Resolve("no-such-program-here", "X"); !errors.Is(err, ErrNotFound) {
		t.Errorf("missing: %v", err)
	}
}

func run(ctx context.Context, t *testing.T, script string) (Exit, string) {
	t.Helper()
	out := &Buffer{Limit: 1 << 10}
	exit, err := Run(ctx, Command{Path: "/bin/sh", Args: []string{"sh", "-c", script}, Stdout: out, Stderr: out})
	if err != nil {
		t.Fatal(err)
	}
	return exit, out.String()
}

func TestRun(t *testing.T) {
	t.Setenv("SALLYPORT_NODE_JOIN", "secret")
	t.Setenv("OTHER", "kept")
	exit, out := run(t.Context(), t, `echo "$OTHER-$SALLYPORT_NODE_JOIN"; pwd; exit 3`)
	if exit.Code != 3 || out != "kept-\n/\n" {
		t.Errorf("exit %+v, output %q", exit, out)
	}
	if exit, _ := run(t.Context(), t, `kill -9 $$`); exit != (Exit{Code: 137, Signal: 9}) {
		t.Errorf("signal: %+v", exit)
	}
	if _, err := Run(t.Context(), Command{Path: "/nonexistent", Args: []string{"x"}}); err == nil {
		t.Error("no error for a program that does not exist")
	}
}

// TestGroup: a cancelled program takes its children with it.
func TestGroup(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	pids := &Buffer{Limit: 100}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		b := make([]byte, 100)
		n, _ := r.Read(b)
		_, _ = pids.Write(b[:n])
		cancel()
	}()
	exit, err := Run(ctx, Command{Path: "/bin/sh", Args: []string{"sh", "-c", "sleep 1000 & echo $!; wait"}, Stdout: w})
	if err != nil || exit.Signal != int(syscall.SIGTERM) {
		t.Fatalf("exit %+v, %v", exit, err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(pids.String()))
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(5 * time.Second)
	for syscall.Kill(pid, 0) == nil && !zombie(pid) {
		if time.Now().After(deadline) {
			t.Fatalf("child %d lives", pid)
		}
	}
}

// zombie: nobody may reap orphans where the tests run.
func zombie(pid int) bool {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	return err != nil || strings.Contains(string(b), ") Z ")
}

// TestBackground: a child that keeps running does not hold up its parent.
func TestBackground(t *testing.T) {
	start := time.Now()
	exit, out := run(t.Context(), t, `sleep 100 & echo $!`)
	if exit.Code != 0 || time.Since(start) > 50*time.Second {
		t.Errorf("exit %+v, %q after %v", exit, out, time.Since(start))
	}
	child, err := strconv.Atoi(strings.TrimSpace(out))
	if err != nil {
		t.Fatalf("the child's PID: %q", out)
	}
	if err := syscall.Kill(child, syscall.SIGKILL); err != nil {
		t.Errorf("the child is not there any more: %v", err)
	}
}

// What runs here must not learn the password of the proxy, nor our secrets.
func TestEnvironHoldsNoSecrets(t *testing.T) {
	t.Setenv("SALLYPORT_NODE_JOIN", "sp1.secret")
	for name, v := range map[string]struct{ value, want string }{
		"HTTPS_PROXY": {"http://user:s3cr@t@proxy.example:3128/", "http://proxy.example:3128/"},
		"http_proxy":  {"user:s3cret@proxy.example:3128", "proxy.example:3128"},
		"ALL_PROXY":   {"socks5://user:s3cret@[::1]:1080", "socks5://[::1]:1080"},
		"no_proxy":    {"localhost,.example", "localhost,.example"},
		"FTP_PROXY":   {"http://proxy.example:3128", "http://proxy.example:3128"},
	} {
		t.Setenv(name, v.value)
		if !slices.Contains(Environ(), name+"="+v.want) {
			t.Errorf("%s=%s is not handed on as %s", name, v.value, v.want)
		}
	}
	for _, kv := range Environ() {
		if strings.Contains(kv, "s3cr") || strings.Contains(kv, "sp1.secret") {
			t.Errorf("handed on: %s", kv)
		}
	}
}
