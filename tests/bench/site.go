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
	"slices"
	"strconv"
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
	level    string // of logs
	gateway  *process
	rcp      *relay   // the first of rcps
	rcps     []*relay // one, but for the largest numbers of nodes
	node     *process
	client   *api.Client
	metrics  string // address of the gateway's /metrics
}

// relay is one RCP.
type relay struct {
	*process

	channel string // its address
	metrics string // of its /metrics
}

const nodeName = "bench"

// newSite starts a gateway and RCPs. rcpEnv are more variables of the RCPs.
func (b *bench) newSite(ctx context.Context, name string, rcps int, rcpEnv ...string) (*site, error) {
	dir, err := os.MkdirTemp(b.dir, name+"-")
	if err != nil {
		return nil, err
	}
	s := &site{dir: dir, bin: b.bin, level: b.level}
	err = s.startGateway(ctx)
	for i := 0; i < rcps && err == nil; i++ {
		err = s.startRCP(ctx, fmt.Sprintf("rcp-%d", i+1), rcpEnv)
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	s.rcp = s.rcps[0]
	return s, nil
}

func (s *site) data(party string) string { return filepath.Join(s.dir, party) }

func (s *site) env(party string, extra ...string) []string {
	return environment(append(extra, "SALLYPORT_DATA="+s.data(party), "SALLYPORT_LOG_LEVEL="+s.level)...)
}

func (s *site) startGateway(ctx context.Context) error {
	var err error
	if s.metrics, err = freeAddress(ctx); err != nil {
		return err
	}
	s.gateway, err = startProcess(s.dir, "gateway-process", s.env("gateway",
		"SALLYPORT_GATEWAY_LISTEN=off", "SALLYPORT_GATEWAY_ADMIN_LISTEN="+s.metrics, "SALLYPORT_GATEWAY_CARRIER=h2", "SALLYPORT_GATEWAY_WARM_SESSIONS=20000"),
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
		for _, p := range s.processes() {
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

func (s *site) startRCP(ctx context.Context, name string, more []string) error {
	r := &relay{}
	var err error
	if r.channel, err = freeAddress(ctx); err != nil {
		return err
	}
	if r.metrics, err = freeAddress(ctx); err != nil {
		return err
	}
	code, err := s.cli(ctx, "", "rcp", "add", name, r.channel)
	if err != nil {
		return err
	}
	join, err := s.secret(name, code)
	if err != nil {
		return err
	}
	env := append([]string{"SALLYPORT_RCP_LISTEN=" + r.channel, "SALLYPORT_RCP_JOIN=" + join, "SALLYPORT_RCP_ADMIN_LISTEN=" + r.metrics}, more...)
	if r.process, err = startProcess(s.dir, name+"-process", s.env(name, env...), filepath.Join(s.bin, "sallyport-rcp")); err != nil {
		return err
	}
	s.rcps = append(s.rcps, r)
	return s.until(ctx, "the RCP is connected", func() error {
		rcps, err := s.client.RCPs(ctx)
		if err != nil {
			return err
		}
		for _, r := range rcps {
			if r.Name == name && r.State == "connected" {
				return nil
			}
		}
		return fmt.Errorf("%d RCPs, %s is not connected", len(rcps), name)
	})
}

// processes of the site that run, or should.
func (s *site) processes() []*process {
	var all []*process
	for _, r := range s.rcps {
		all = append(all, r.process)
	}
	return slices.DeleteFunc(append(all, s.gateway, s.node), func(p *process) bool { return p == nil })
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
		{"bench-sink", back.sink, &front.sink}, {"bench-source", back.source, &front.source},
		{"bench-http", back.http, &front.http}, {"bench-echo", back.echo, &front.echo},
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

// carried is how many bytes the RCP has copied so far, between streams and
// between sealed legs: what bare lanes carry is not in it.
func (s *site) carried(ctx context.Context) (int64, error) {
	sum := 0.0
	for _, name := range []string{"sallyport_rcp_bytes_total", "sallyport_rcp_sealed_lane_bytes_total"} {
		v, err := metric(ctx, s.rcp.metrics, name, "")
		if err != nil {
			return 0, err
		}
		sum += v
	}
	return int64(sum), nil
}

// metric asks a role for the sum of the series of a metric that have the label.
func metric(ctx context.Context, addr, name, label string) (float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/metrics", nil)
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
	return sumMetric(string(b), name, label)
}

// sumMetric adds the series of a metric that have a label, in the text format of
// Prometheus. label is name="value", or empty for all.
func sumMetric(text, name, label string) (float64, error) {
	var sum float64
	found := false
	for line := range strings.Lines(text) {
		rest, ok := strings.CutPrefix(line, name)
		if !ok || (rest[0] != '{' && rest[0] != ' ') || !strings.Contains(rest, label) {
			continue
		}
		fields := strings.Fields(rest)
		v, err := strconv.ParseFloat(fields[len(fields)-1], 64)
		if err != nil {
			return 0, fmt.Errorf("metric %s: %w", name, err)
		}
		sum += v
		found = true
	}
	if !found {
		return 0, fmt.Errorf("no metric %s %s", name, label)
	}
	return sum, nil
}

// close ends the parties, nodes first, and waits for them.
func (s *site) close() error {
	if s == nil {
		return nil
	}
	if s.client != nil {
		s.client.Close()
	}
	err := s.node.stop(syscall.SIGTERM)
	for _, r := range s.rcps {
		err = errors.Join(err, r.stop(syscall.SIGTERM))
	}
	return errors.Join(err, s.gateway.stop(syscall.SIGTERM))
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
	}{{s.gateway, &out.gateway}, {s.rcp.process, &out.rcp}, {s.node, &out.node}} {
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
