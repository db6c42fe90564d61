package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"sallyport/gateway/api"
)

const readyWait = 60 * time.Second

// site is one installation on loopback: real processes of the static build,
// each with its own data directory.
type site struct {
	dir, bin string
	gateway  *process
	rcp      *process
	node     *process
	client   *api.Client
	channel  string // address of the RCP
	metrics  string // address of the RCP's /metrics
	rcpEnv   []string
}

const (
	rcpName  = "dmz"
	nodeName = "bench"
)

// newSite starts a gateway and an RCP. rcpEnv are more variables of the RCP.
func newSite(ctx context.Context, bin, dir string, rcpEnv ...string) (*site, error) {
	s := &site{dir: dir, bin: bin, rcpEnv: rcpEnv}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	err := s.startGateway(ctx)
	if err == nil {
		err = s.startRCP(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *site) data(party string) string { return filepath.Join(s.dir, party) }

func (s *site) env(party string, extra ...string) []string {
	return environment(append(extra, "SALLYPORT_DATA="+s.data(party))...)
}

func (s *site) startGateway(ctx context.Context) error {
	var err error
	s.gateway, err = startProcess(s.dir, "gateway-process", s.env("gateway",
		"SALLYPORT_GATEWAY_LISTEN=off", "SALLYPORT_GATEWAY_ADMIN_LISTEN=off", "SALLYPORT_GATEWAY_CARRIER=h2"),
		filepath.Join(s.bin, "sallyport"), "run", "gateway")
	if err != nil {
		return err
	}
	if s.client, err = api.NewClient(api.ClientConfig{URL: filepath.Join(s.data("gateway"), "gateway", "api.sock")}); err != nil {
		return err
	}
	return s.until(ctx, "the gateway answers", func() error {
		_, err := s.client.RCPs(ctx)
		return err
	})
}

// until waits for a state of the site; a role that ends by itself ends the wait.
func (s *site) until(ctx context.Context, what string, ask func() error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	err := eventually(ctx, readyWait, what, func() error {
		for _, p := range []*process{s.gateway, s.rcp, s.node} {
			if p == nil {
				continue
			}
			if err := p.ended(); err != nil {
				cancel(err)
				return err
			}
		}
		return ask()
	})
	if cause := context.Cause(ctx); err != nil && cause != nil {
		return cause
	}
	return err
}

// cli runs the operator's program and returns what it prints.
func (s *site) cli(ctx context.Context, stdin string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(s.bin, "sallyport"), args...)
	cmd.Env = s.env("gateway")
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("sallyport %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// secret writes a join code for a party.
func (s *site) secret(name, code string) (string, error) {
	file := filepath.Join(s.dir, name+".join")
	return file, os.WriteFile(file, []byte(code), 0o600)
}

func (s *site) startRCP(ctx context.Context) error {
	var err error
	if s.channel, err = freeAddress(ctx); err != nil {
		return err
	}
	if s.metrics, err = freeAddress(ctx); err != nil {
		return err
	}
	code, err := s.cli(ctx, "", "rcp", "add", rcpName, s.channel)
	if err != nil {
		return err
	}
	join, err := s.secret(rcpName, code)
	if err != nil {
		return err
	}
	s.rcp, err = startProcess(s.dir, "rcp-process", s.env("rcp", append(s.rcpEnv,
		"SALLYPORT_RCP_LISTEN="+s.channel, "SALLYPORT_RCP_JOIN="+join, "SALLYPORT_RCP_ADMIN_LISTEN="+s.metrics)...),
		filepath.Join(s.bin, "sallyport-rcp"))
	if err != nil {
		return err
	}
	return s.until(ctx, "the RCP is connected", func() error {
		rcps, err := s.client.RCPs(ctx)
		if err != nil {
			return err
		}
		for _, r := range rcps {
			if r.Name == rcpName && r.State == "connected" {
				return nil
			}
		}
		return fmt.Errorf("%d RCPs, none of them connected", len(rcps))
	})
}

// startNode starts an agent that may reach every port of loopback.
func (s *site) startNode(ctx context.Context, extra ...string) error {
	code, err := s.cli(ctx, "", "join", "create", "--name", nodeName)
	if err != nil {
		return err
	}
	join, err := s.secret(nodeName, code)
	if err != nil {
		return err
	}
	s.node, err = startProcess(s.dir, "node-process", s.env("node", append(extra,
		"SALLYPORT_NODE_NAME="+nodeName, "SALLYPORT_NODE_JOIN="+join, "SALLYPORT_NODE_CARRIER=h2", "SALLYPORT_NODE_ADMIN_LISTEN=off")...),
		filepath.Join(s.bin, "sallyport-node"))
	if err != nil {
		return err
	}
	return s.until(ctx, "the node runs", func() error {
		nodes, err := s.client.Nodes(ctx, api.NodeQuery{})
		if err != nil {
			return err
		}
		if len(nodes) != 1 || nodes[0].State != "running" {
			return fmt.Errorf("%d nodes, want one that is running", len(nodes))
		}
		return nil
	})
}

// forward makes the backend's services reachable through the site: a target of
// the node each, and a forward of the gateway to it.
func (s *site) forward(ctx context.Context, back addresses) (front addresses, err error) {
	if err := s.startNode(ctx, "SALLYPORT_NODE_ALLOW_TARGETS=127.0.0.1:*"); err != nil {
		return front, err
	}
	services := []struct {
		name, to string
		front    *string
	}{
		{"sink", back.sink, &front.sink}, {"source", back.source, &front.source},
		{"http", back.http, &front.http}, {"echo", back.echo, &front.echo},
	}
	var doc strings.Builder
	var names []string
	for _, t := range services {
		fmt.Fprintf(&doc, "kind: policy\nname: %s\ntype: target\nspec:\n  address: %s\n---\n", t.name, t.to)
		names = append(names, t.name)
	}
	fmt.Fprintf(&doc, "kind: deployment\nname: bench\nselector: '*'\npolicies: [%s]\n", strings.Join(names, ", "))
	if _, err := s.cli(ctx, doc.String(), "apply", "-f", "-", "--wait", "30s"); err != nil {
		return front, err
	}
	for _, t := range services {
		if *t.front, err = freeAddress(ctx); err != nil {
			return front, err
		}
		if _, err := s.cli(ctx, "", "target", "forward", nodeName+"/"+t.name, *t.front); err != nil {
			return front, err
		}
	}
	return front, s.until(ctx, "the forwards answer", func() error {
		l, err := connections(ctx, front.echo, 1, time.Millisecond)
		if err == nil && l.count() == 0 {
			err = errors.New("no answer")
		}
		return err
	})
}

// carried is how many bytes went through streams of the RCP so far: what lanes
// carry is not in it.
func (s *site) carried(ctx context.Context) (int64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.metrics+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return 0, err
	}
	return sumMetric(string(b), "sallyport_rcp_bytes_total")
}

// sumMetric adds all series of a metric in the text format of Prometheus.
func sumMetric(text, name string) (int64, error) {
	var sum float64
	found := false
	for line := range strings.Lines(text) {
		rest, ok := strings.CutPrefix(line, name)
		if !ok || (rest[0] != '{' && rest[0] != ' ') {
			continue
		}
		fields := strings.Fields(rest)
		var v float64
		if _, err := fmt.Sscan(fields[len(fields)-1], &v); err != nil {
			return 0, fmt.Errorf("metric %s: %w", name, err)
		}
		sum += v
		found = true
	}
	if !found {
		return 0, fmt.Errorf("no metric %s", name)
	}
	return int64(sum), nil
}

// close ends the parties, nodes first, and waits for them.
func (s *site) close() error {
	if s == nil {
		return nil
	}
	if s.client != nil {
		s.client.Close()
	}
	return errors.Join(s.node.stop(syscall.SIGTERM), s.rcp.stop(syscall.SIGTERM), s.gateway.stop(syscall.SIGTERM))
}

// parties whose CPU time is counted one by one.
type spent struct {
	gateway, rcp, node time.Duration
}

func (s *site) cpu() (spent, error) {
	var out spent
	for _, p := range []struct {
		p  *process
		to *time.Duration
	}{{s.gateway, &out.gateway}, {s.rcp, &out.rcp}, {s.node, &out.node}} {
		if p.p == nil {
			continue
		}
		var err error
		if *p.to, err = cpuOf(p.p.pid()); err != nil {
			return out, fmt.Errorf("cpu of %s: %w", p.p.name, err)
		}
	}
	return out, nil
}

func (a spent) minus(b spent) spent {
	return spent{a.gateway - b.gateway, a.rcp - b.rcp, a.node - b.node}
}

// profile asks a role for a CPU profile over its local socket while d passes,
// and writes it to file.
func profile(ctx context.Context, socket, file string, d time.Duration) error {
	t := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	defer t.CloseIdleConnections()
	url := fmt.Sprintf("http://role/debug/pprof/profile?seconds=%d", max(1, int(d.Seconds())))
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	res, err := t.RoundTrip(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("profile: %s", res.Status)
	}
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	return os.WriteFile(file, b, 0o600)
}
