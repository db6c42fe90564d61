package harness

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestProcess(t *testing.T) {
	dir := t.TempDir()
	ready := filepath.Join(dir, "ready")
	p := start(t, nil, "a shell", environment(map[string]string{"READY": ready}), "/bin/sh", "-c",
		`echo run; trap 'exit 7' TERM; touch "$READY"; while :; do sleep 0.01; done`)
	up := func() error { _, err := os.Stat(ready); return err }
	Eventually(t, 10*time.Second, "the shell starts", up)
	pid := p.PID()
	p.Kill()
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("process %d after Kill: %v", pid, err)
	}
	if err := os.Remove(ready); err != nil {
		t.Fatal(err)
	}
	p.Start()
	Eventually(t, 10*time.Second, "the shell starts again", up)
	if code := p.Stop(); code != 7 {
		t.Errorf("exit code after SIGTERM is %d, want the program's 7", code)
	}
	if n := strings.Count(p.Log(), "run\n"); n != 2 {
		t.Errorf("the log holds %d runs, want 2: %q", n, p.Log())
	}
	p = start(t, nil, "a short one", environment(map[string]string{"CODE": "5"}), "/bin/sh", "-c", `exit "$CODE"`)
	if code := p.Wait(10 * time.Second); code != 5 {
		t.Errorf("exit code %d, want 5", code)
	}
	p.SetEnv("CODE", "6")
	p.Start()
	if code := p.Wait(10 * time.Second); code != 6 {
		t.Errorf("exit code %d, want 6", code)
	}
}

func TestRunCommand(t *testing.T) {
	r := runCommand(t, nil, environment(nil), `{"in":1}`, "/bin/sh", "-c", "cat; echo oops >&2; exit 3").Exits(3)
	var v struct{ In int }
	r.JSON(&v)
	if v.In != 1 || r.Stderr != "oops\n" {
		t.Errorf("%v", r)
	}
}

func TestEnvironmentIsClean(t *testing.T) {
	t.Setenv("SALLYPORT_URL", "https://elsewhere")
	t.Setenv("HTTPS_PROXY", "http://elsewhere")
	env := strings.Join(environment(map[string]string{"SALLYPORT_DATA": "/x"}), "\n")
	if strings.Contains(env, "elsewhere") || !strings.Contains(env, "SALLYPORT_DATA=/x") {
		t.Errorf("environment: %s", env)
	}
}
