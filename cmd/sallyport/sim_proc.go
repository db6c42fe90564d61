package main

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// procFigures is what /proc says of some processes together. Sizes are KiB.
type procFigures struct {
	RSS     int64   `json:"rss_kib"`
	Anon    int64   `json:"anonymous_kib"` // RSS flatters: the kernel may page out what rests
	CPU     float64 `json:"cpu_seconds"`   // user and system
	Sockets int     `json:"sockets"`
}

// clockTicks is USER_HZ, which is 100 on every Linux that Go runs on.
const clockTicks = 100

// readProc adds up processes; without any it is nil.
func readProc(pids ...int) (*procFigures, error) {
	if len(pids) == 0 {
		return nil, nil
	}
	var sum procFigures
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d", pid)
		status, err := os.ReadFile(dir + "/status")
		if err != nil {
			return nil, fmt.Errorf("measure process %d: %w", pid, err)
		}
		for line := range strings.Lines(string(status)) {
			name, value, _ := strings.Cut(line, ":")
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
			switch {
			case err != nil:
			case name == "VmRSS":
				sum.RSS += kib
			case name == "RssAnon":
				sum.Anon += kib
			}
		}
		stat, err := os.ReadFile(dir + "/stat")
		if err != nil {
			return nil, fmt.Errorf("measure process %d: %w", pid, err)
		}
		// The name in the second field may hold anything: count from its end
		// (proc_pid_stat(5): utime is field 14).
		fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
		if len(fields) < 13 {
			return nil, fmt.Errorf("measure process %d: %s/stat has %d fields", pid, dir, len(fields))
		}
		for _, f := range fields[11:13] {
			ticks, err := strconv.ParseInt(string(f), 10, 64)
			if err != nil {
				return nil, fmt.Errorf("measure process %d: %w", pid, err)
			}
			sum.CPU += float64(ticks) / clockTicks
		}
		open, err := os.ReadDir(dir + "/fd")
		if err != nil {
			return nil, fmt.Errorf("measure process %d: %w", pid, err)
		}
		for _, fd := range open {
			if to, err := os.Readlink(dir + "/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, "socket:") {
				sum.Sockets++
			}
		}
	}
	return &sum, nil
}
