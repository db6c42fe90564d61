package gateway

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// portHolder names the program that listens on a TCP port of this machine, as
// far as /proc lets us see: without root only programs of the same user.
func portHolder(listen string) string {
	_, port, err := net.SplitHostPort(listen)
	if err != nil {
		return ""
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return ""
	}
	sockets := map[string]bool{}
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		b, err := os.ReadFile(table)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			if inode := listenerInode(line, uint16(n)); inode != "" {
				sockets["socket:["+inode+"]"] = true
			}
		}
	}
	if len(sockets) == 0 {
		return ""
	}
	files, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return ""
	}
	for _, file := range files {
		link, err := os.Readlink(file)
		if err != nil || !sockets[link] {
			continue
		}
		pid, _, _ := strings.Cut(strings.TrimPrefix(file, "/proc/"), "/")
		name, err := os.ReadFile(filepath.Join("/proc", pid, "comm"))
		if err != nil {
			continue
		}
		return fmt.Sprintf("%s (process %s)", strings.TrimSpace(string(name)), pid)
	}
	return ""
}

// listenerInode returns the inode in a line of /proc/net/tcp (proc(5)), if it
// is that of a listener on the port.
func listenerInode(line string, port uint16) string {
	const listening = "0A"
	f := strings.Fields(line)
	if len(f) < 10 || f[3] != listening || !strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) {
		return ""
	}
	return f[9]
}
