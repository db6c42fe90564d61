// Package netlab builds networks behind a real firewall on one Linux machine:
// a network namespace for each host, one for the router between them, veth
// pairs, and nftables rules in the router. It proves that nobody dials into a
// network: every packet that begins a connection against the rules is dropped
// and counted, and a test asserts that the counter stayed zero.
//
//	lab := netlab.New(t,
//		netlab.Network{Name: "trusted", Policy: netlab.NoInbound, Hosts: []string{"gateway"}},
//		netlab.Network{Name: "dmz", Policy: netlab.NoOutbound, Hosts: []string{"rcp"}},
//		netlab.Network{Name: "remote", Policy: netlab.NoInbound, Hosts: []string{"node1", "node2"}})
//	cmd := lab.Host("gateway").Command(ctx, "sallyport", "run", "gateway")
//	lab.Cut("trusted", "dmz", netlab.UDP)
//
// A lab belongs to the process that opened it. What a killed process left
// behind is removed when the next lab opens.
package netlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
)

// Policy says which packets the router drops and counts at the border of a
// network. Hosts of one network always reach each other.
type Policy uint

// The policies; they may be combined.
const (
	// NoInbound drops packets from elsewhere that begin a connection into the network.
	NoInbound Policy = 1 << iota
	// NoOutbound drops packets from the network that begin a connection to
	// anywhere else, name lookups and unknown addresses included.
	NoOutbound
	// Unrestricted drops nothing.
	Unrestricted Policy = 0
)

// Network is what Open builds: a /24 with its hosts.
type Network struct {
	Name   string // letters and digits
	Policy Policy
	Hosts  []string // names, unique in the lab; at most 63
}

// Lab is a set of networks with a router between them.
type Lab struct {
	prefix string // of all namespace names
	router string // namespace
	nets   []*network
	hosts  map[string]*Host

	mu   sync.Mutex
	cuts map[cut]struct{}
}

type network struct {
	Network
	subnet netip.Prefix
}

// maxHosts is what a /24 holds in /30 subnets, the last left out for symmetry.
const maxHosts = 63

// resolver is the name server of every host. Nothing answers there, but the
// way leads through the router, so that a lookup is seen.
const resolver = "10.77.255.53"

var labs atomic.Int64 // numbers the labs of this process

// Open builds the networks. The caller closes the lab.
func Open(ctx context.Context, networks ...Network) (*Lab, error) {
	if err := Available(); err != nil {
		return nil, err
	}
	if err := removeLeftovers(ctx); err != nil {
		return nil, err
	}
	lab := &Lab{
		prefix: fmt.Sprintf("%s%d-%d-", namePrefix, os.Getpid(), labs.Add(1)),
		hosts:  make(map[string]*Host),
		cuts:   make(map[cut]struct{}),
	}
	lab.router = lab.prefix + "router"
	if err := lab.build(ctx, networks); err != nil {
		return nil, errors.Join(fmt.Errorf("build the network lab: %w", err), lab.Close())
	}
	return lab, nil
}

// Available says why no lab can be built here, if so.
func Available() error {
	if os.Geteuid() != 0 {
		return errors.New("network namespaces need root")
	}
	for _, program := range []string{"ip", "nft"} {
		if _, err := find(program); err != nil {
			return fmt.Errorf("%w: install iproute2 and nftables", err)
		}
	}
	return nil
}

// find looks for a program in PATH and in the sbin folders, which Debian
// leaves out of an ordinary user's PATH.
func find(program string) (string, error) {
	if p, err := exec.LookPath(program); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if p, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("no program %s", program)
}

func (l *Lab) build(ctx context.Context, networks []Network) error {
	if err := ip(ctx, "netns add "+l.router); err != nil {
		return err
	}
	var links strings.Builder
	for n, spec := range networks {
		if len(spec.Hosts) > maxHosts {
			return fmt.Errorf("network %s has more than %d hosts", spec.Name, maxHosts)
		}
		net := &network{Network: spec, subnet: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, byte(n + 1), 0}), 24)}
		l.nets = append(l.nets, net)
		for i, name := range spec.Hosts {
			if l.hosts[name] != nil {
				return fmt.Errorf("two hosts are called %s", name)
			}
			h := &Host{
				Name: name, Network: spec.Name, lab: l, namespace: l.prefix + name,
				addr:   netip.AddrFrom4([4]byte{10, 77, byte(n + 1), byte(4*i + 2)}),
				router: netip.AddrFrom4([4]byte{10, 77, byte(n + 1), byte(4*i + 1)}),
			}
			l.hosts[name] = h
			if err := writeResolver(h.namespace); err != nil {
				return err
			}
			// Both ends are made inside their namespaces: no name appears
			// in the machine's own.
			fmt.Fprintf(&links, "netns add %s\n", h.namespace)
			fmt.Fprintf(&links, "link add name eth0 netns %s type veth peer name n%dh%d netns %s\n", h.namespace, n, i, l.router)
		}
	}
	if err := ip(ctx, links.String()); err != nil {
		return err
	}
	if err := l.configure(ctx); err != nil {
		return err
	}
	return l.loadRules(ctx)
}

// configure gives addresses and routes. Every destination but a host's own
// /30 leads to the router.
func (l *Lab) configure(ctx context.Context) error {
	var router strings.Builder
	router.WriteString("link set lo up\n")
	for n, net := range l.nets {
		for i, name := range net.Hosts {
			h := l.hosts[name]
			if err := h.Do(func() error { return set("net/ipv6/conf/all/disable_ipv6", "1") }); err != nil {
				return err
			}
			batch := fmt.Sprintf("link set lo up\naddr add %s/30 dev eth0\nlink set eth0 up\nroute add default via %s\n", h.addr, h.router)
			if err := ipIn(ctx, h.namespace, batch); err != nil {
				return err
			}
			fmt.Fprintf(&router, "addr add %s/30 dev n%dh%d\nlink set n%dh%d up\n", h.router, n, i, n, i)
		}
	}
	err := inNamespace(l.router, func() error {
		return errors.Join(set("net/ipv6/conf/all/disable_ipv6", "1"), set("net/ipv4/ip_forward", "1"))
	})
	if err != nil {
		return err
	}
	return ipIn(ctx, l.router, router.String())
}

// Host returns a host of the lab. It panics when there is none of that name.
func (l *Lab) Host(name string) *Host {
	h := l.hosts[name]
	if h == nil {
		panic("netlab: no host " + name)
	}
	return h
}

func (l *Lab) network(name string) (*network, error) {
	for _, n := range l.nets {
		if n.Name == name {
			return n, nil
		}
	}
	return nil, fmt.Errorf("netlab: no network %s", name)
}

// Close kills what still runs in the lab's namespaces and removes them.
func (l *Lab) Close() error {
	names := []string{l.router}
	for _, h := range l.hosts {
		names = append(names, h.namespace)
	}
	var errs []error
	for _, name := range names {
		errs = append(errs, removeNamespace(context.Background(), name))
	}
	return errors.Join(errs...)
}

// set writes one sysctl of the calling thread's network namespace.
func set(name, value string) error {
	return os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0o644)
}

// ip runs a batch of ip commands, one a line.
func ip(ctx context.Context, batch string) error { return ipIn(ctx, "", batch) }

// ipIn runs the batch inside a namespace.
func ipIn(ctx context.Context, namespace, batch string) error {
	args := []string{"-batch", "-"}
	if namespace != "" {
		args = append([]string{"-netns", namespace}, args...)
	}
	_, err := run(ctx, batch, "ip", args...)
	return err
}

// run executes one program with the given standard input.
func run(ctx context.Context, stdin, program string, args ...string) ([]byte, error) {
	path, err := find(program)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s\n%s", program, strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()), stdin)
	}
	return stdout.Bytes(), nil
}
