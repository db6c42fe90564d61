package harness

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"sallyport/tests/netlab"
)

// Deadlines that are generous on purpose: those of the contract stand in the tests.
const (
	startTimeout  = 30 * time.Second
	enrolTimeout  = 30 * time.Second
	channelPort   = 9090 // of RCPs in a lab, where every host has its own ports
	gatewayPort   = 9443 // of a gateway that RCPs dial, in a lab
	loopback      = "127.0.0.1"
	directoryMode = 0o755
)

// Site is one installation: a gateway, RCPs and nodes.
type Site struct {
	t   testing.TB
	lab *netlab.Lab // nil: everything on loopback
	dir string
	bin string
}

// New prepares a site on loopback.
func New(t testing.TB) *Site { return In(t, nil) }

// Long skips a test that takes more than a few seconds, so that go test ./...
// stays quick at the desk. It runs with E2E=all, which `tests/run e2e` sets, and
// in CI.
func Long(t testing.TB) {
	t.Helper()
	if os.Getenv("E2E") != "all" && os.Getenv("CI") != "true" {
		t.Skip("takes long: run it with E2E=all, or by tests/run e2e")
	}
}

// LongWait is Long for a test that mostly waits, on loopback: it runs beside
// others of its kind.
func LongWait(t *testing.T) {
	t.Helper()
	Long(t)
	t.Parallel()
}

// In prepares a site on the hosts of a lab.
func In(t testing.TB, lab *netlab.Lab) *Site {
	t.Helper()
	bin, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	// Not t.TempDir: unix socket names are at most 107 bytes long.
	dir, err := os.MkdirTemp("", "sp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove the site: %v", err)
		}
	})
	return &Site{t: t, lab: lab, dir: dir, bin: bin}
}

// Program returns the path of one of our programs.
func (s *Site) Program(name string) string { return filepath.Join(s.bin, name) }

// File writes a file of the site and returns its name.
func (s *Site) File(name, content string) string {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), directoryMode); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// Path returns the name of a file of the site, without making it.
func (s *Site) Path(name string) string { return filepath.Join(s.dir, name) }

type options struct {
	env   map[string]string
	slim  bool
	join  []string
	add   []string
	clock time.Duration
}

// Option changes how a role is started.
type Option func(*options)

// Env sets one variable of the role.
func Env(name, value string) Option { return func(o *options) { o.env[name] = value } }

// Slim starts sallyport-rcp or sallyport-node instead of `sallyport run`.
func Slim() Option { return func(o *options) { o.slim = true } }

// JoinFlags are more flags of the node's `join create`.
func JoinFlags(flags ...string) Option {
	return func(o *options) { o.join = append(o.join, flags...) }
}

// AddFlags are more flags of the RCP's `rcp add`.
func AddFlags(flags ...string) Option {
	return func(o *options) { o.add = append(o.add, flags...) }
}

// Role is a running role with its data directory.
type Role struct {
	*Process

	Data string // SALLYPORT_DATA
	site *Site
	role string
	host *netlab.Host
	opts options
}

// prepare fills in what all roles have.
func (s *Site) prepare(role, name string, env map[string]string, opts []Option) *Role {
	s.t.Helper()
	o := options{env: env}
	o.env["SALLYPORT_DATA"] = filepath.Join(s.dir, name)
	o.env["SALLYPORT_LOG_LEVEL"] = "debug"
	if s.lab == nil {
		// One machine: the ports of two nodes would meet.
		for _, r := range []string{"GATEWAY", "RCP", "NODE", "PKI"} {
			o.env["SALLYPORT_"+r+"_ADMIN_LISTEN"] = "off"
		}
	}
	for _, opt := range opts {
		opt(&o)
	}
	r := &Role{Data: o.env["SALLYPORT_DATA"], site: s, role: role, opts: o}
	if s.lab != nil {
		r.host = s.lab.Host(name)
	}
	if err := os.MkdirAll(r.Data, directoryMode); err != nil {
		s.t.Fatal(err)
	}
	return r
}

// start starts the role's program.
func (r *Role) start(name string) {
	r.site.t.Helper()
	program, args := r.program("sallyport"), []string{"run", r.role}
	if r.opts.slim {
		program, args = r.site.Program("sallyport-"+r.role), nil
	}
	r.Process = start(r.site.t, r.host, name, r.environment(r.opts.env), program, args...)
}

// address is where the role is reached: on its host in a lab, else on a free
// port of loopback.
func (r *Role) address(port uint16) string {
	r.site.t.Helper()
	if r.host != nil {
		return r.host.AddrPort(port)
	}
	return netip.AddrPortFrom(netip.MustParseAddr(loopback), FreePort(r.site.t)).String()
}

// Local runs a `local` verb on the role's host.
func (r *Role) Local(args ...string) Result {
	r.site.t.Helper()
	env := r.environment(map[string]string{"SALLYPORT_DATA": r.Data})
	return runCommand(r.site.t, r.host, env, "", r.program("sallyport"), append([]string{"local"}, args...)...)
}

// Host returns the lab's host of the role; nil on loopback.
func (r *Role) Host() *netlab.Host { return r.host }

// portsGiven are those that another test of this process may be about to use.
var portsGiven sync.Map

// FreePort returns a loopback port that nothing uses, neither TCP nor UDP, and
// that was not given to anybody yet. It is none of those that the kernel gives
// to clients: a program that is down for a moment must find its port again.
func FreePort(t testing.TB) uint16 {
	t.Helper()
	const first, last = 10_000, 32_767 // net.ipv4.ip_local_port_range begins at 32768
	for range 1000 {
		port := uint16(first + rand.IntN(last-first+1))
		addr := netip.AddrPortFrom(netip.MustParseAddr(loopback), port)
		if _, given := portsGiven.LoadOrStore(port, true); given {
			continue
		}
		l, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(addr))
		if err != nil {
			continue
		}
		u, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(addr))
		_ = l.Close()
		if err != nil {
			continue
		}
		_ = u.Close()
		return port
	}
	t.Fatal("no port is free for TCP and UDP")
	return 0
}

// Gateway is a running gateway.
type Gateway struct {
	*Role

	// Channel is its address for RCPs that dial it; empty without DialIn.
	Channel string
}

// DialIn makes the gateway listen for RCPs and nodes that dial it.
func DialIn() Option { return Env("SALLYPORT_GATEWAY_CHANNEL_LISTEN", "harness") }

// Gateway starts a gateway, on the host "gateway" of a lab, and waits for its API.
func (s *Site) Gateway(opts ...Option) *Gateway {
	s.t.Helper()
	g := &Gateway{Role: s.prepare("gateway", "gateway", map[string]string{"SALLYPORT_GATEWAY_LISTEN": "off"}, opts)}
	if _, dialIn := g.opts.env["SALLYPORT_GATEWAY_CHANNEL_LISTEN"]; dialIn {
		g.Channel = g.address(gatewayPort)
		g.opts.env["SALLYPORT_GATEWAY_CHANNEL_LISTEN"] = g.Channel
		g.opts.env["SALLYPORT_GATEWAY_CHANNEL_PUBLIC"] = g.Channel
	}
	g.start("gateway")
	g.WaitAPI()
	return g
}

// WaitAPI waits until the gateway answers.
func (g *Gateway) WaitAPI() {
	g.site.t.Helper()
	Eventually(g.site.t, startTimeout, "the gateway answers", func() error {
		return g.Run("node", "list", "-o", "json").Err()
	})
}

// Run runs the operator's command line against the gateway.
func (g *Gateway) Run(args ...string) Result {
	g.site.t.Helper()
	return g.RunInput("", args...)
}

// RunInput is Run with a standard input.
func (g *Gateway) RunInput(stdin string, args ...string) Result {
	g.site.t.Helper()
	env := g.environment(map[string]string{"SALLYPORT_DATA": g.Data})
	return runCommand(g.site.t, g.host, env, stdin, g.program("sallyport"), args...)
}

// Apply applies policy and deployment documents.
func (g *Gateway) Apply(yaml string, flags ...string) Result {
	g.site.t.Helper()
	return g.RunInput(yaml, append([]string{"apply", "-f", "-"}, flags...)...)
}

// RCP is a running relay.
type RCP struct {
	*Role

	Address string // of its channel listener
	gateway *Gateway
}

// Dials makes an RCP dial its upstream; without it it only listens.
func Dials(upstream string) Option { return Env("SALLYPORT_RCP_UPSTREAMS", upstream) }

// RCP adds an RCP to the gateway, starts it with its join code and waits until
// the gateway is connected with it.
func (s *Site) RCP(g *Gateway, name string, opts ...Option) *RCP {
	s.t.Helper()
	r := &RCP{Role: s.prepare("rcp", name, map[string]string{}, opts), gateway: g}
	r.Address = r.address(channelPort)
	r.opts.env["SALLYPORT_RCP_LISTEN"] = r.Address
	add := []string{"rcp", "add", name}
	if _, dials := r.opts.env["SALLYPORT_RCP_UPSTREAMS"]; dials {
		add = append(add, "--public", r.Address)
	} else {
		add = append(add, r.Address)
	}
	code := g.Run(append(add, r.opts.add...)...).Exits(0).Stdout
	r.opts.env["SALLYPORT_RCP_JOIN"] = s.File(name+".join", code)
	r.start(name)
	r.WaitConnected(enrolTimeout)
	return r
}

// WaitConnected waits until the gateway says that the RCP is connected.
func (r *RCP) WaitConnected(within time.Duration) time.Duration {
	r.site.t.Helper()
	return Eventually(r.site.t, within, r.Name+" is connected", func() error {
		return r.gateway.rcpIs(r.Name, "connected")
	})
}

// Node is a running agent.
type Node struct {
	*Role

	gateway *Gateway
}

// Node makes a join code, starts a node with it and returns at once.
func (s *Site) Node(g *Gateway, name string, opts ...Option) *Node {
	s.t.Helper()
	n := &Node{Role: s.prepare("node", name, map[string]string{"SALLYPORT_NODE_NAME": name, "SALLYPORT_NODE_ALLOW_COMMANDS": "*"}, opts), gateway: g}
	if _, given := n.opts.env["SALLYPORT_NODE_JOIN"]; !given {
		code := g.Run(append([]string{"join", "create", "--name", name}, n.opts.join...)...).Exits(0).Stdout
		n.opts.env["SALLYPORT_NODE_JOIN"] = s.File(name+".join", code)
	}
	n.start(name)
	return n
}

// WaitRunning waits until `node list` shows the node as running.
func (n *Node) WaitRunning(within time.Duration) time.Duration {
	n.site.t.Helper()
	return n.WaitState(within, "running")
}

// WaitState waits until `node list` shows the node in a state.
func (n *Node) WaitState(within time.Duration, state string) time.Duration {
	n.site.t.Helper()
	return Eventually(n.site.t, within, n.Name+" is "+state, func() error {
		return n.gateway.nodeIs(n.Name, state)
	})
}

// Environment returns a copy of the variables that the role was started with.
func (r *Role) Environment() map[string]string { return maps.Clone(r.opts.env) }

// Err is an error when the command failed.
func (r Result) Err() error {
	if r.Code != 0 {
		return fmt.Errorf("%v", r)
	}
	return nil
}

// Run runs `sallyport` to its end with the given variables of ours.
func (s *Site) Run(env map[string]string, args ...string) Result {
	s.t.Helper()
	return runCommand(s.t, nil, environment(env), "", s.Program("sallyport"), args...)
}
