package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"sallyport/gateway/api"
	"sallyport/internal/local"
	"sallyport/internal/wire"
)

// demoNodes are the nodes with the tag that their join codes give them.
var demoNodes = []struct{ name, role string }{{"web-1", "web"}, {"web-2", "web"}, {"db-1", "db"}}

// story is the whole demo, in order.
func (d *demo) story() []scene {
	scenes := []scene{
		{"gateway", "A gateway with its certificate authority starts " + d.place.describe() + "; nobody can dial it.", d.startGateway, d.proveGateway},
		{"rcp", "An RCP joins with a code; the gateway dials it.", d.startRCP, d.proveRCP},
		{"nodes", "Three nodes dial the RCP and enrol through it, with codes of their own.", d.startNodes, d.proveNodes},
		{"policy", "Policies go out: a configuration file and a check of a log file for each node.", d.applyPolicies, d.provePolicies},
		{"action", "A program runs on one node; its output and its exit code come back.", d.runDemoAction, d.proveAction},
		{"events", "A check finds an error in a real log file, and a local user sends an event.", d.causeEvents, d.proveEvents},
		{"trace", "The way to a node, hop by hop, as it is right now.", d.showTrace, d.proveTrace},
		{"closed", "No party but the RCP listens for channels, and the RCP dials nobody.", nothing, d.proveClosed},
	}
	return append(scenes, d.place.scenes(d)...)
}

func nothing(context.Context) error { return nil }

func (d *demo) startGateway(context.Context) error {
	if err := d.start("gateway", gatewayParty, "SALLYPORT_GATEWAY_LISTEN=off"); err != nil {
		return err
	}
	return nil
}

// gateway returns the client of the public API, over its unix socket.
func (d *demo) gateway() (*api.Client, error) {
	if d.client == nil {
		c, err := api.NewClient(api.ClientConfig{URL: filepath.Join(d.data(gatewayParty), "gateway", "api.sock")})
		if err != nil {
			return nil, err
		}
		d.client = c
	}
	return d.client, nil
}

func (d *demo) proveGateway(ctx context.Context) (string, error) {
	c, err := d.gateway()
	if err != nil {
		return "", err
	}
	about, err := c.About(ctx)
	if err != nil {
		return "", err
	}
	if about.TrustDomain == "" || about.Installation == "" {
		return "", fmt.Errorf("the gateway names no trust domain or installation: %+v", about)
	}
	return "trust domain " + about.TrustDomain, nil
}

func (d *demo) startRCP(ctx context.Context) error {
	addr, err := d.place.address(rcpParty)
	if err != nil {
		return err
	}
	code, err := d.must(ctx, gatewayParty, "rcp", "add", rcpParty, addr)
	if err != nil {
		return err
	}
	file, err := d.secretFile(rcpParty, code)
	if err != nil {
		return err
	}
	return d.start("rcp", rcpParty, "SALLYPORT_RCP_LISTEN="+addr, "SALLYPORT_RCP_JOIN="+file)
}

func (d *demo) proveRCP(ctx context.Context) (string, error) {
	c, err := d.gateway()
	if err != nil {
		return "", err
	}
	r, err := c.RCP(ctx, rcpParty)
	if err != nil {
		return "", err
	}
	if r.State != api.RCPConnected || r.ID == "" {
		return "", fmt.Errorf("RCP %s is %s %s %s", r.Name, r.State, r.StateReason, r.LastError)
	}
	return fmt.Sprintf("RCP %s at %s is connected over %s", r.Name, r.Address, r.Carrier), nil
}

func (d *demo) startNodes(ctx context.Context) error {
	for _, n := range demoNodes {
		code, err := d.must(ctx, gatewayParty, "join", "create", "--name", n.name, "--tag", "role="+n.role, "--tag", "host="+n.name)
		if err != nil {
			return err
		}
		file, err := d.secretFile(n.name, code)
		if err != nil {
			return err
		}
		if err := d.start("node", n.name, "SALLYPORT_NODE_NAME="+n.name, "SALLYPORT_NODE_JOIN="+file, "SALLYPORT_NODE_ALLOW_COMMANDS=*"); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) proveNodes(ctx context.Context) (string, error) {
	c, err := d.gateway()
	if err != nil {
		return "", err
	}
	nodes, err := c.Nodes(ctx, api.NodeQuery{})
	if err != nil {
		return "", err
	}
	carriers := map[string]int{}
	for _, want := range demoNodes {
		i := slices.IndexFunc(nodes, func(n api.Node) bool { return n.Name == want.name })
		if i < 0 {
			return "", fmt.Errorf("%s is not listed", want.name)
		}
		n := nodes[i]
		if n.State != wire.StateRunning || n.Tags["role"] != want.role || !slices.Contains(n.RCPs, rcpParty) {
			return "", fmt.Errorf("%s is %s (%s), tags %v, RCPs %v", n.Name, n.State, n.StateReason, n.Tags, n.RCPs)
		}
		s, err := d.localStatus(ctx, n.Name)
		if err != nil {
			return "", err
		}
		if s.Fingerprint != n.Fingerprint || s.ID != n.ID {
			return "", fmt.Errorf("%s says that it is %s %s, the gateway says %s %s", n.Name, s.ID, s.Fingerprint, n.ID, n.Fingerprint)
		}
		carriers[n.Carrier]++
	}
	return fmt.Sprintf("%d nodes are running, over %s; their fingerprints are the same on both sides", len(demoNodes), count(carriers)), nil
}

func count(m map[string]int) string {
	var parts []string
	for k, n := range m {
		parts = append(parts, fmt.Sprintf("%s (%d)", k, n))
	}
	slices.Sort(parts)
	return strings.Join(parts, " and ")
}

// localStatus asks a party on its own host.
func (d *demo) localStatus(ctx context.Context, name string) (local.Status, error) {
	var s local.Status
	r, err := d.quietCLI(ctx, name, "local", "status", "-o", "json")
	if err != nil {
		return s, err
	}
	if r.code != 0 {
		return s, fmt.Errorf("local status on %s: %s", name, strings.TrimSpace(r.stderr))
	}
	return s, json.Unmarshal([]byte(r.stdout), &s)
}

func (d *demo) configFile(node string) string { return filepath.Join(d.dir, node+"-etc", "app.conf") }

func configContent(node string) string {
	return "# written by a Sallyport policy\nlisten = 127.0.0.1\nname = " + node + "\n"
}

// checkScript keeps the Nagios plugin contract: a line with performance data
// after the bar, and 0 or 2 as exit code.
const checkScript = `#!/bin/sh
# usage: check_log.sh FILE: critical while FILE holds a line with ERROR
n=$(grep -c ERROR "$1") || [ "$n" = 0 ] || { echo "LOG UNKNOWN - cannot read $1"; exit 3; }
if [ "$n" -gt 0 ]; then
	echo "LOG CRITICAL - $n errors, last: $(grep ERROR "$1" | tail -n 1) | errors=$n;;0"
	exit 2
fi
echo "LOG OK - no errors | errors=0;;0"
`

// manifest writes, for each node, a files policy, a check and the deployment
// that brings them there. All nodes share one file system here, so that the
// paths carry the node's name.
func (d *demo) manifest(script string) string {
	var b strings.Builder
	for _, n := range demoNodes {
		fmt.Fprintf(&b, `kind: policy
name: conf-%[1]s
type: files
spec:
  files:
    - path: %[2]q
      content: %[3]q
      mode: "0640"
  validate: [grep, -q, %[1]q, %[2]q]
---
kind: policy
name: log-%[1]s
type: check
spec:
  command: [/bin/sh, %[4]q, %[5]q]
  interval: 1s
---
kind: deployment
name: app-%[1]s
selector: host=%[1]s
policies: [conf-%[1]s, log-%[1]s]
---
`, n.name, d.configFile(n.name), configContent(n.name), script, d.logFile(n.name))
	}
	return b.String()
}

func (d *demo) applyPolicies(ctx context.Context) error {
	script := filepath.Join(d.dir, "check_log.sh")
	if err := os.WriteFile(script, []byte(checkScript), 0o700); err != nil {
		return err
	}
	for _, n := range demoNodes {
		if err := os.WriteFile(d.logFile(n.name), []byte("INFO "+n.name+" started\n"), 0o600); err != nil {
			return err
		}
		if err := os.Mkdir(filepath.Dir(d.configFile(n.name)), 0o700); err != nil {
			return err
		}
	}
	file := filepath.Join(d.dir, "demo.yaml")
	if err := os.WriteFile(file, []byte(d.manifest(script)), 0o600); err != nil {
		return err
	}
	dry, err := d.must(ctx, gatewayParty, "apply", "-f", file, "--dry-run")
	if err != nil {
		return err
	}
	lines := strings.Split(strings.TrimSpace(dry), "\n")
	d.say("     %s", lines[len(lines)-1])
	_, err = d.must(ctx, gatewayParty, "apply", "-f", file, "--wait", "30s")
	return err
}

func (d *demo) provePolicies(ctx context.Context) (string, error) {
	c, err := d.gateway()
	if err != nil {
		return "", err
	}
	for _, n := range demoNodes {
		s, err := c.DeploymentStatus(ctx, "app-"+n.name)
		if err != nil {
			return "", err
		}
		if s.Counts != (api.DeploymentCounts{Applied: 1}) {
			return "", fmt.Errorf("deployment %s: %+v", s.Name, s.Counts)
		}
		node, err := c.Node(ctx, n.name)
		if err != nil {
			return "", err
		}
		if node.AppliedRevision != node.DesiredRevision || node.DesiredRevision.IsZero() {
			return "", fmt.Errorf("%s has applied %v of %v", n.name, node.AppliedRevision, node.DesiredRevision)
		}
		got, err := os.ReadFile(d.configFile(n.name))
		if err != nil {
			return "", err
		}
		if string(got) != configContent(n.name) {
			return "", fmt.Errorf("%s holds %q", d.configFile(n.name), got)
		}
	}
	return fmt.Sprintf("%d policies are applied, and the files are on disk, such as %s", 2*len(demoNodes), d.configFile("web-1")), nil
}

// What the action prints and how it ends.
const (
	actionOutput = "hello from the other side"
	actionCode   = 3
)

func (d *demo) runDemoAction(ctx context.Context) (err error) {
	d.action, err = d.cli(ctx, gatewayParty, "action", "run", "--node", "web-1", "--", "sh", "-c", fmt.Sprintf("echo %s; exit %d", actionOutput, actionCode))
	return err
}

func (d *demo) proveAction(ctx context.Context) (string, error) {
	if strings.TrimSpace(d.action.stdout) != actionOutput || d.action.code != actionCode {
		return "", fmt.Errorf("want output %q and exit code %d, got %q and %d: %s", actionOutput, actionCode, d.action.stdout, d.action.code, d.action.stderr)
	}
	c, err := d.gateway()
	if err != nil {
		return "", err
	}
	all, err := c.Actions(ctx, api.ActionQuery{Node: "web-1"})
	if err != nil {
		return "", err
	}
	for _, x := range all {
		if x.State == wire.ActionFailed && x.ExitCode != nil && *x.ExitCode == actionCode {
			return fmt.Sprintf("it printed %q and exited with %d, here too", actionOutput, actionCode), nil
		}
	}
	return "", fmt.Errorf("action list shows no action with exit code %d among %d", actionCode, len(all))
}

// The two events.
const (
	logError  = "ERROR the cellar is flooded"
	localText = "the backup took too long"
)

func (d *demo) causeEvents(ctx context.Context) error {
	d.say("     echo '%s' >> %s", logError, d.logFile("web-2"))
	f, err := os.OpenFile(d.logFile("web-2"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(f, logError)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	_, err = d.must(ctx, "db-1", "local", "event", "send", "--severity", "minor", "--object", "backup", localText)
	return err
}

func (d *demo) proveEvents(ctx context.Context) (string, error) {
	c, err := d.gateway()
	if err != nil {
		return "", err
	}
	all, err := c.Events(ctx, api.EventQuery{})
	if err != nil {
		return "", err
	}
	has := func(node string, severity wire.Severity, text string) bool {
		return slices.ContainsFunc(all, func(e api.Event) bool {
			return e.Node == node && e.Severity == severity && strings.Contains(e.Text, text)
		})
	}
	if !has("web-2", wire.SeverityCritical, logError) {
		return "", fmt.Errorf("no critical event of the check on web-2 among %d", len(all))
	}
	if !has("db-1", wire.SeverityMinor, localText) {
		return "", fmt.Errorf("no event from the local user of db-1 among %d", len(all))
	}
	return "both events are in the gateway's database", nil
}

func (d *demo) showTrace(ctx context.Context) error {
	out, err := d.must(ctx, gatewayParty, "node", "trace", "web-1")
	for line := range strings.SplitSeq(strings.TrimSpace(out), "\n") {
		d.say("     %s", line)
	}
	return err
}

func (d *demo) proveTrace(ctx context.Context) (string, error) {
	c, err := d.gateway()
	if err != nil {
		return "", err
	}
	tr, err := c.TraceNode(ctx, "web-1")
	if err != nil {
		return "", err
	}
	if !tr.OK || len(tr.Hops) < 2 {
		return "", fmt.Errorf("the trace says: %s (%d hops)", tr.Verdict, len(tr.Hops))
	}
	return tr.Verdict, nil
}

// proveClosed reads what each party itself says that it listens on and dials.
func (d *demo) proveClosed(ctx context.Context) (string, error) {
	for _, p := range d.parties {
		s, err := d.localStatus(ctx, p.name)
		if err != nil {
			return "", err
		}
		switch {
		case p.name == rcpParty && len(s.DialTargets) > 0:
			return "", fmt.Errorf("the RCP would dial %v", s.DialTargets)
		case p.name == rcpParty && len(s.Listen) == 0:
			return "", errors.New("the RCP says that it listens nowhere")
		case p.name != rcpParty && len(s.Listen) > 0:
			return "", fmt.Errorf("%s listens on %v", p.name, s.Listen)
		}
	}
	return "gateway and nodes listen nowhere, the RCP has no dialler", nil
}
