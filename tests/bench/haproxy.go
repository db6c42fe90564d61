package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// yardstick is Debian's haproxy as a plain TCP proxy, one hop: what the same
// load costs without encryption, identity and a second and third process.
type yardstick struct {
	proc    *process
	version string
	front   addresses
}

const haproxyConfig = `global
	nbthread 2
	maxconn 2000
defaults
	mode tcp
	option splice-auto
	timeout connect 5s
	timeout client 1m
	timeout server 1m
`

func startHaproxy(ctx context.Context, dir string, back addresses) (*yardstick, error) {
	path, err := exec.LookPath("haproxy")
	if err != nil {
		path = "/usr/sbin/haproxy"
		if _, err := os.Stat(path); err != nil {
			return nil, errors.New("haproxy is not installed: apt-get install haproxy")
		}
	}
	out, err := exec.CommandContext(ctx, path, "-v").Output()
	if err != nil {
		return nil, fmt.Errorf("haproxy -v: %w", err)
	}
	y := &yardstick{version: haproxyVersion(string(out))}
	var conf strings.Builder
	conf.WriteString(haproxyConfig)
	for name, s := range map[string]struct {
		to    string
		front *string
	}{
		"sink": {back.sink, &y.front.sink}, "source": {back.source, &y.front.source},
		"http": {back.http, &y.front.http}, "echo": {back.echo, &y.front.echo},
	} {
		if *s.front, err = freeAddress(ctx); err != nil {
			return nil, err
		}
		fmt.Fprintf(&conf, "listen %s\n\tbind %s\n\tserver backend %s\n", name, *s.front, s.to)
	}
	file := filepath.Join(dir, "haproxy.cfg")
	if err := os.WriteFile(file, []byte(conf.String()), 0o600); err != nil {
		return nil, err
	}
	if y.proc, err = startProcess(dir, "haproxy", environment(), path, "-db", "-f", file); err != nil {
		return nil, err
	}
	return y, eventually(ctx, 10*time.Second, "haproxy listens", func() error {
		if err := y.proc.ended(); err != nil {
			return err
		}
		c, err := dial(ctx, y.front.echo)
		if err != nil {
			return err
		}
		return c.Close()
	})
}

// haproxyVersion is the number in the first line of haproxy -v.
func haproxyVersion(text string) string {
	for _, f := range strings.Fields(text) {
		if strings.Contains(f, ".") && f[0] >= '0' && f[0] <= '9' {
			return f
		}
	}
	return "unknown"
}

// freeAddress returns a loopback address that is free for TCP and UDP.
func freeAddress(ctx context.Context) (string, error) {
	const tries = 100
	for range tries {
		l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
		if err != nil {
			return "", err
		}
		addr := l.Addr().String()
		u, udpErr := new(net.ListenConfig).ListenPacket(ctx, "udp", addr)
		if udpErr == nil {
			_ = u.Close()
		}
		_ = l.Close()
		if udpErr == nil {
			return addr, nil
		}
	}
	return "", errors.New("no port of loopback is free for TCP and UDP")
}
