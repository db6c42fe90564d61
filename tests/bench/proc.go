package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// clockTick is the unit of the CPU times in /proc: USER_HZ is 100 on every
// Linux that Go runs on.
const clockTick = time.Second / 100

// procStat is what the benchmark needs of one /proc/<pid>/stat, proc(5).
type procStat struct {
	parent int
	cpu    time.Duration // user and system, of all threads, ended ones included
	ended  time.Duration // user and system of children that were waited for
}

// parseStat reads a stat line. The program's name stands in parentheses and may
// itself hold spaces and parentheses, so fields count from the last one.
func parseStat(line []byte) (procStat, error) {
	i := bytes.LastIndexByte(line, ')')
	if i < 0 {
		return procStat{}, errors.New("stat: no program name")
	}
	f := strings.Fields(string(line[i+1:])) // f[0] is field 3, the state
	if len(f) < 15 {
		return procStat{}, fmt.Errorf("stat: %d fields", len(f)+2)
	}
	var n [5]int64
	for i, field := range []int{4, 14, 15, 16, 17} { // ppid, utime, stime, cutime, cstime
		v, err := strconv.ParseInt(f[field-3], 10, 64)
		if err != nil {
			return procStat{}, fmt.Errorf("stat: field %d: %w", field, err)
		}
		n[i] = v
	}
	return procStat{
		parent: int(n[0]),
		cpu:    time.Duration(n[1]+n[2]) * clockTick,
		ended:  time.Duration(n[3]+n[4]) * clockTick,
	}, nil
}

func readStat(pid int) (procStat, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return procStat{}, err
	}
	return parseStat(b)
}

// tree returns pid and its descendants.
func tree(pid int) ([]int, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	children := make(map[int][]int)
	for _, name := range stats {
		id, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err != nil {
			continue
		}
		if st, err := readStat(id); err == nil { // it may have ended meanwhile
			children[st.parent] = append(children[st.parent], id)
		}
	}
	all := []int{pid}
	for i := 0; i < len(all); i++ {
		all = append(all, children[all[i]]...)
	}
	return all, nil
}

// cpuOf returns the CPU time that a process tree has used so far.
func cpuOf(pid int) (time.Duration, error) {
	pids, err := tree(pid)
	if err != nil {
		return 0, err
	}
	var sum time.Duration
	for i, id := range pids {
		st, err := readStat(id)
		if err != nil {
			if i == 0 {
				return 0, err
			}
			continue // a child that just ended is in its parent's sum
		}
		sum += st.cpu + st.ended
	}
	return sum, nil
}

// memory of a process in bytes. Anonymous is what it wrote and the kernel
// cannot read again from a file; it includes what was swapped out, so that a
// kernel that pages out idle memory does not flatter it.
type memory struct {
	RSS, Anonymous int64
}

func (m memory) minus(o memory) memory { return memory{m.RSS - o.RSS, m.Anonymous - o.Anonymous} }

// per divides by a number of nodes or sessions.
func (m memory) per(n int) memory { return memory{m.RSS / int64(n), m.Anonymous / int64(n)} }

// parseRollup reads /proc/<pid>/smaps_rollup.
func parseRollup(text []byte) (memory, error) {
	var m memory
	seen := 0
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) != 3 || f[2] != "kB" {
			continue
		}
		kib, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			return m, fmt.Errorf("smaps_rollup: %w", err)
		}
		switch f[0] {
		case "Rss:":
			m.RSS = kib << 10
			seen++
		case "Anonymous:", "Swap:":
			m.Anonymous += kib << 10
			seen++
		}
	}
	if seen != 3 {
		return m, errors.New("smaps_rollup: Rss, Anonymous or Swap is missing")
	}
	return m, nil
}

func memoryOf(pid int) (memory, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return memory{}, err
	}
	return parseRollup(b)
}
