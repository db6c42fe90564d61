package netlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// namePrefix begins every namespace of a lab; the id of its process follows.
const namePrefix = "sallyport-"

// removeLeftovers removes the labs of processes that are gone.
func removeLeftovers(ctx context.Context) error {
	names := make(map[string]struct{})
	for _, dir := range []string{namespaces, netnsConfig} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, e := range entries {
			names[e.Name()] = struct{}{}
		}
	}
	for name := range names {
		pid, ok := ownerOf(name)
		if !ok || alive(pid) {
			continue
		}
		if err := removeNamespace(ctx, name); err != nil {
			return fmt.Errorf("remove what process %d left: %w", pid, err)
		}
	}
	return nil
}

// ownerOf returns the process that made a namespace, from its name.
func ownerOf(name string) (pid int, ok bool) {
	rest, ok := strings.CutPrefix(name, namePrefix)
	if !ok {
		return 0, false
	}
	digits, _, ok := strings.Cut(rest, "-")
	if !ok {
		return 0, false
	}
	pid, err := strconv.Atoi(digits)
	return pid, err == nil && pid > 0
}

func alive(pid int) bool {
	return !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH)
}

// removeNamespace kills the processes inside, then removes the name. One that
// is not there is removed already, perhaps by another test program.
func removeNamespace(ctx context.Context, name string) error {
	if _, err := os.Stat(filepath.Join(namespaces, name)); err == nil {
		pids, err := run(ctx, "", "ip", "netns", "pids", name)
		if err == nil {
			for _, field := range bytes.Fields(pids) {
				if pid, err := strconv.Atoi(string(field)); err == nil && pid != os.Getpid() {
					_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended by itself
				}
			}
		}
		if err := ip(ctx, "netns delete "+name); err != nil {
			if _, gone := os.Stat(filepath.Join(namespaces, name)); !errors.Is(gone, fs.ErrNotExist) {
				return err
			}
		}
	}
	return os.RemoveAll(filepath.Join(netnsConfig, name))
}

// netnsConfig holds the files that `ip netns exec` mounts over /etc.
const netnsConfig = "/etc/netns"

// writeResolver gives a namespace its resolv.conf.
func writeResolver(namespace string) error {
	dir := filepath.Join(netnsConfig, namespace)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	conf := "# " + namespace + "\nnameserver " + resolver + "\noptions timeout:1 attempts:1\n"
	return os.WriteFile(filepath.Join(dir, "resolv.conf"), []byte(conf), 0o644)
}
