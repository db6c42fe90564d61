package harness

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// Tool returns the path of a program of the system. Without it the test is
// skipped at the desk and fails in CI.
func Tool(t testing.TB, program string) string {
	t.Helper()
	for _, name := range []string{program, filepath.Join("/usr/sbin", program), filepath.Join("/sbin", program)} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("%s is not installed: tests/run setup does it", program)
	}
	t.Skipf("%s is not installed", program)
	return ""
}

// Start starts another program than ours. It is killed when the test ends.
func (s *Site) Start(name, program string, args ...string) *Process {
	s.t.Helper()
	return start(s.t, nil, name, environment(nil), program, args...)
}

// Exec runs another program than ours to its end.
func (s *Site) Exec(program string, args ...string) Result {
	s.t.Helper()
	return runCommand(s.t, nil, environment(nil), "", program, args...)
}
