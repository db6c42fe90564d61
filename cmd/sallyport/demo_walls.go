package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"

	"sallyport/tests/netlab"
)

// walls puts each party into a network namespace of its own, behind a router
// that lets nobody begin a connection into the trusted or the remote network,
// and the RCP begin none at all. Only this process's network lab knows how.
type walls struct {
	lab *netlab.Lab
}

// The networks of DESIGN's picture.
const (
	trusted = "trusted"
	dmz     = "dmz"
	remote  = "remote"
)

// wallsPort is the RCP's: each host has all ports to itself.
const wallsPort = 9090

func newWalls(ctx context.Context) (*walls, error) {
	var nodes []string
	for _, n := range demoNodes {
		nodes = append(nodes, n.name)
	}
	lab, err := netlab.Open(ctx,
		netlab.Network{Name: trusted, Policy: netlab.NoInbound, Hosts: []string{gatewayParty}},
		netlab.Network{Name: dmz, Policy: netlab.NoOutbound, Hosts: []string{rcpParty}},
		netlab.Network{Name: remote, Policy: netlab.NoInbound, Hosts: nodes})
	if err != nil {
		return nil, err
	}
	return &walls{lab}, nil
}

func (w *walls) describe() string { return "behind a firewall that drops and counts" }

func (w *walls) address(party string) (string, error) {
	return w.lab.Host(party).AddrPort(wallsPort), nil
}

func (w *walls) command(ctx context.Context, party, program string, args ...string) *exec.Cmd {
	return w.lab.Host(party).Command(ctx, program, args...)
}

func (w *walls) close() error { return w.lab.Close() }

// scenes read the firewall's counters, then knock: a counter that does not
// count proves nothing.
func (w *walls) scenes(*demo) []scene {
	return []scene{
		{"firewall", "The firewall counted every packet that tried to begin a connection into trusted or remote, or out of the DMZ.", nothing, w.proveZero},
		{"control", "The RCP's host knocks at the gateway and at a node: now the counters must count.", w.knock, w.proveCounted},
	}
}

func (w *walls) proveZero(ctx context.Context) (string, error) {
	c, err := w.lab.Counters(ctx)
	if err != nil {
		return "", err
	}
	if bad := c.Violations(); len(bad) > 0 {
		return "", errors.New(strings.Join(bad, "; "))
	}
	return fmt.Sprintf("none: 0 packets; %d that began a connection the allowed way passed", c.Passed.Packets), nil
}

func (w *walls) knock(context.Context) error {
	for _, host := range []string{gatewayParty, demoNodes[0].name} {
		if err := w.lab.Host(rcpParty).Knock(netip.AddrPortFrom(w.lab.Host(host).Addr(), wallsPort)); err != nil {
			return err
		}
	}
	return nil
}

func (w *walls) proveCounted(ctx context.Context) (string, error) {
	c, err := w.lab.Counters(ctx)
	if err != nil {
		return "", err
	}
	in, out := c.Inbound, c.Outbound[dmz]
	if in[trusted].Packets == 0 || in[remote].Packets == 0 || out.Packets == 0 {
		return "", fmt.Errorf("knocks were not counted: into trusted %d, into remote %d, out of the DMZ %d", in[trusted].Packets, in[remote].Packets, out.Packets)
	}
	return fmt.Sprintf("%d packets into trusted and %d into remote were dropped and counted", in[trusted].Packets, in[remote].Packets), nil
}
