package e2e

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"sallyport/tests/harness"
	"sallyport/tests/netlab"
)

// carrier limits all roles to one carrier.
func carrier(role, name string) harness.Option {
	return harness.Env("SALLYPORT_"+role+"_CARRIER", name)
}

// closed asserts that nobody tried to begin a connection against the rules,
// then shows that the counters count: from is a host that may not reach into
// the network of to.
func closed(t *testing.T, lab *netlab.Lab, from, to string) {
	t.Helper()
	counters, err := lab.Counters(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range counters.Violations() {
		t.Error(line)
	}
	if counters.Passed.Packets == 0 {
		t.Error("no connection passed the router at all")
	}
	if err := lab.Host(from).Knock(netip.AddrPortFrom(lab.Host(to).Addr(), 9443)); err != nil {
		t.Error(err)
	}
	after, err := lab.Counters(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(after.Violations()) == 0 {
		t.Errorf("a knock from %s at %s was not counted", from, to)
	}
}

// plant is one firewall on each side of an RCP that only listens.
func plant(t *testing.T) *netlab.Lab {
	t.Helper()
	return netlab.New(t,
		netlab.Network{Name: "trusted", Policy: netlab.NoInbound, Hosts: []string{"gateway"}},
		netlab.Network{Name: "dmz", Policy: netlab.NoOutbound, Hosts: []string{"dmz-1"}},
		netlab.Network{Name: "remote", Policy: netlab.NoInbound, Hosts: []string{"web-1", "web-2"}})
}

// usesCarrier is an error until the gateway shows the node on a carrier.
func usesCarrier(gateway *harness.Gateway, name, want string) error {
	n, err := gateway.Node(name)
	if err != nil {
		return err
	}
	if n.Carrier != want || n.State != "running" {
		return fmt.Errorf("%s is %s on %q", name, n.State, n.Carrier)
	}
	return nil
}

// TestFirewall tells the story over each carrier.
func TestFirewall(t *testing.T) {
	for _, c := range []string{"h2", "h3"} {
		t.Run(c, func(t *testing.T) {
			lab := plant(t)
			site := harness.In(t, lab)
			gateway := site.Gateway(carrier("GATEWAY", c))
			site.RCP(gateway, "dmz-1")
			for _, name := range []string{"web-1", "web-2"} {
				node := site.Node(gateway, name, tagged(name), carrier("NODE", c))
				node.WaitRunning(runningWithin)
				story(t, site, gateway, node)
				if err := usesCarrier(gateway, name, c); err != nil {
					t.Error(err)
				}
			}
			closed(t, lab, "dmz-1", "gateway")
		})
	}
}

// TestUDPCut: parties that found QUIC fall back to HTTP/2 when UDP is cut in
// the middle, and return when it is back; no event is lost.
func TestUDPCut(t *testing.T) {
	lab := plant(t)
	ctx := t.Context()
	site := harness.In(t, lab)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1", tagged("web-1"))
	node.WaitRunning(runningWithin)
	harness.Eventually(t, 30*time.Second, "the node is on QUIC", func() error { return usesCarrier(gateway, "web-1", "h3") })
	story(t, site, gateway, node)

	for _, network := range []string{"trusted", "remote"} {
		if err := lab.Cut(ctx, network, "dmz", netlab.UDP); err != nil {
			t.Fatal(err)
		}
	}
	node.Local("event", "send", "--severity", "minor", "sent while UDP is cut").Exits(0)
	// Dead after two missed keep-alives, 15 s each, then dialled again.
	harness.Eventually(t, time.Minute, "the node is on HTTP/2", func() error { return usesCarrier(gateway, "web-1", "h2") })
	harness.Eventually(t, 30*time.Second, "the event arrives", func() error { return gateway.HasEvent("sent while UDP is cut") })
	story(t, site, gateway, node)

	for _, network := range []string{"trusted", "remote"} {
		if err := lab.Restore(ctx, network, "dmz", netlab.UDP); err != nil {
			t.Fatal(err)
		}
	}
	harness.Eventually(t, 3*time.Minute, "the node is on QUIC again", func() error { return usesCarrier(gateway, "web-1", "h3") })
	story(t, site, gateway, node)
	closed(t, lab, "dmz-1", "gateway")
}

// TestRCPDialsGateway: a relay at the remote site; nothing ever dials into it
// from outside, and the gateway dials nobody.
func TestRCPDialsGateway(t *testing.T) {
	lab := netlab.New(t,
		netlab.Network{Name: "trusted", Policy: netlab.NoOutbound, Hosts: []string{"gateway"}},
		netlab.Network{Name: "remote", Policy: netlab.NoInbound, Hosts: []string{"edge-1", "web-1"}})
	site := harness.In(t, lab)
	gateway := site.Gateway(harness.DialIn())
	site.RCP(gateway, "edge-1", harness.Dials(gateway.Channel))
	node := site.Node(gateway, "web-1", tagged("web-1"))
	node.WaitRunning(runningWithin)
	story(t, site, gateway, node)
	closed(t, lab, "gateway", "web-1")
}

// TestChain: two RCPs; the outer one dials the inner one, as nodes do.
func TestChain(t *testing.T) {
	for _, c := range []string{"h2", "h3"} {
		t.Run(c, func(t *testing.T) {
			lab := netlab.New(t,
				netlab.Network{Name: "trusted", Policy: netlab.NoInbound, Hosts: []string{"gateway"}},
				netlab.Network{Name: "dmz", Policy: netlab.NoOutbound, Hosts: []string{"dmz-1"}},
				netlab.Network{Name: "remote", Policy: netlab.NoInbound, Hosts: []string{"edge-1", "web-1"}})
			site := harness.In(t, lab)
			gateway := site.Gateway(carrier("GATEWAY", c))
			inner := site.RCP(gateway, "dmz-1")
			site.RCP(gateway, "edge-1", harness.Dials(inner.Address), harness.AddFlags("--via", "dmz-1"), carrier("RCP", c))
			node := site.Node(gateway, "web-1", tagged("web-1"), harness.JoinFlags("--rcp", "edge-1"), carrier("NODE", c))
			node.WaitRunning(runningWithin)
			story(t, site, gateway, node)
			closed(t, lab, "dmz-1", "gateway")
		})
	}
}
