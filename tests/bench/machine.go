package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// machine is where the figures come from.
type machine struct {
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"` // that the run may use
	Memory int64  `json:"memory_bytes"`
	Kernel string `json:"kernel"`
	Go     string `json:"go"`

	commit string // of this run: each figure has its own
}

func (m machine) same(o machine) bool {
	return m.CPU == o.CPU && m.Cores == o.Cores && m.Kernel == o.Kernel && m.Go == o.Go && m.Memory>>30 == o.Memory>>30
}

func (m machine) String() string {
	return fmt.Sprintf("%s, %d cores, %.0f GiB, Linux %s, %s", m.CPU, m.Cores, float64(m.Memory)/gib, m.Kernel, m.Go)
}

func thisMachine(ctx context.Context, root string) (machine, error) {
	m := machine{Go: runtime.Version(), Cores: runtime.NumCPU()}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return m, fmt.Errorf("uname: %w", err)
	}
	m.Kernel = unix.ByteSliceToString(u.Release[:])
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return m, fmt.Errorf("sysinfo: %w", err)
	}
	m.Memory = int64(info.Totalram) * int64(info.Unit)
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return m, err
	}
	m.CPU = cpuModel(string(b))
	m.commit, err = commit(ctx, root)
	return m, err
}

// cpuModel finds the first model name in /proc/cpuinfo, with the numbers that
// tell virtual CPUs of one name apart.
func cpuModel(info string) string {
	field := func(name string) string {
		for line := range strings.Lines(info) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == name {
				return strings.TrimSpace(v)
			}
		}
		return ""
	}
	model := field("model name")
	if model == "" {
		return "unknown CPU"
	}
	if mhz := field("cpu MHz"); mhz != "" && !strings.Contains(model, "@") {
		whole, _, _ := strings.Cut(mhz, ".")
		model += " (family " + field("cpu family") + ", model " + field("model") + ", " + whole + " MHz)"
	}
	return model
}

// commit names what is measured; "+" says that the working tree has changes
// that are in no commit.
func commit(ctx context.Context, root string) (string, error) {
	out, err := exec.CommandContext(ctx, "git", "-C", root, "rev-parse", "--short=10", "HEAD").Output()
	if err != nil {
		return "", fmt.Errorf("git rev-parse: %w", err)
	}
	changes, err := exec.CommandContext(ctx, "git", "-C", root, "status", "--porcelain", "--untracked-files=no", "--", "*.go", "go.mod").Output()
	if err != nil {
		return "", fmt.Errorf("git status: %w", err)
	}
	name := strings.TrimSpace(string(out))
	if len(changes) > 0 {
		name += "+"
	}
	return name, nil
}

// coresVariable marks a program that keeps to its cores already.
const coresVariable = "BENCH_CORES"

// keepToCores makes this program, and with it everything that it starts, run on
// the first n of the cores that it may use, by executing itself again: the
// affinity of a thread is inherited across exec, one set later is not shared by
// threads that exist already. It returns only when there is nothing to do.
func keepToCores(n int) error {
	if os.Getenv(coresVariable) != "" || n <= 0 {
		return nil
	}
	var have, want unix.CPUSet
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.SchedGetaffinity(0, &have); err != nil {
		return fmt.Errorf("cores: %w", err)
	}
	if have.Count() <= n {
		return nil
	}
	for cpu := 0; want.Count() < n; cpu++ {
		if have.IsSet(cpu) {
			want.Set(cpu)
		}
	}
	if err := unix.SchedSetaffinity(0, &want); err != nil {
		return fmt.Errorf("cores: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return unix.Exec(self, os.Args, append(os.Environ(), coresVariable+"=1"))
}
