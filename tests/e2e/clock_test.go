package e2e

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/tests/harness"
)

// TestClocksOff: a gateway, RCPs and nodes whose clocks are two days off,
// ahead or behind, enrol, work, renew and start again like any other, and how
// far a clock is off is measured and reported (N-20).
func TestClocksOff(t *testing.T) {
	const off = 48 * time.Hour
	type role struct {
		name  string
		clock time.Duration // 0: right
	}
	for name, c := range map[string]struct {
		gateway time.Duration
		rcps    []role
		nodes   []role
	}{
		"gateway ahead":  {gateway: off, rcps: []role{{"dmz-1", 0}}, nodes: []role{{"web-1", 0}}},
		"gateway behind": {gateway: -off, rcps: []role{{"dmz-1", 0}}, nodes: []role{{"web-1", 0}}},
		"the others": {rcps: []role{{"dmz-ahead", off}, {"dmz-behind", -off}},
			nodes: []role{{"web-ahead", off}, {"web-behind", -off}}},
	} {
		t.Run(name, func(t *testing.T) {
			harness.LongWait(t)
			site := harness.New(t)
			gateway := site.Gateway(harness.Clock(c.gateway))
			var relays []*harness.RCP
			for _, r := range c.rcps {
				relays = append(relays, site.RCP(gateway, r.name, harness.Clock(r.clock)))
			}
			var nodes []*harness.Node
			for i, r := range c.nodes {
				// Each by one RCP, the one whose clock is wrong the other way.
				relay := relays[len(relays)-1-i]
				nodes = append(nodes, site.Node(gateway, r.name, tagged(r.name), harness.Clock(r.clock), harness.Env("SALLYPORT_NODE_UPSTREAMS", relay.Address)))
			}
			for i, n := range nodes {
				n.WaitRunning(30 * time.Second)
				goesOn(t, site, gateway, n, "first")
				measured(t, gateway, n, c.nodes[i].clock-c.gateway)
			}
			clocks := map[string]time.Duration{}
			for _, r := range c.rcps {
				clocks[r.name] = r.clock - c.gateway
			}
			measuredRCPs(t, gateway, clocks)

			// Everybody's certificate is renewed, from a new intermediate.
			gateway.Run("ca", "rotate", "intermediate", "--yes").Exits(0)
			left(t, gateway, "")
			if ca := caOf(gateway); ca.Moved != ca.Parties || ca.Parties != 1+len(relays)+len(nodes) {
				t.Errorf("%d of %d parties have a certificate of the new intermediate", ca.Moved, ca.Parties)
			}
			gateway.Run("ca", "finish", "--yes").Exits(0)
			for _, n := range nodes {
				n.WaitRunning(30 * time.Second)
				gateway.Run("node", "renew", n.Name).Exits(0)
				goesOn(t, site, gateway, n, "second")
			}

			// A clock that jumps from one wrong time to another, as without a
			// battery, over what was written down before.
			for i, n := range nodes {
				if c.nodes[i].clock == 0 {
					continue
				}
				n.Stop()
				n.SetClock(-c.nodes[i].clock)
				again(t, n)
				goesOn(t, site, gateway, n, "third")
				measured(t, gateway, n, -c.nodes[i].clock)
			}
			for i, r := range relays {
				if c.rcps[i].clock != 0 {
					r.Stop()
					r.SetClock(-c.rcps[i].clock)
					clocks[r.Name] = -c.rcps[i].clock
					r.Start()
				}
			}
			measuredRCPs(t, gateway, clocks)
			for _, n := range nodes {
				n.WaitRunning(60 * time.Second)
				goesOn(t, site, gateway, n, "fourth")
			}
		})
	}
}

// TestAwayUntilTheCertificateEnded: a site that was switched off until all its
// certificates had ended comes back by itself, and so does one whose clocks
// were far ahead for a while and are put right: what was certified meanwhile is
// not good yet (PK-10, N-20).
func TestAwayUntilTheCertificateEnded(t *testing.T) {
	harness.LongWait(t)
	site := harness.New(t)
	gateway := site.Gateway(harness.Clock(time.Second))
	relay := site.RCP(gateway, "dmz-1", harness.Clock(time.Second))
	node := site.Node(gateway, "web-1", tagged("web-1"), harness.Clock(time.Second))
	node.WaitRunning(30 * time.Second)
	first := keyOf(t, gateway)
	for _, c := range []struct {
		clock time.Duration
		text  string
	}{{40 * 24 * time.Hour, "after forty days"}, {time.Second, "clocks put right"}} {
		node.Stop()
		relay.Stop()
		gateway.Stop()
		for _, r := range []interface{ SetClock(time.Duration) }{gateway, relay, node} {
			r.SetClock(c.clock)
		}
		gateway.Start()
		relay.Start()
		again(t, node)
		goesOn(t, site, gateway, node, c.text)
		if key := keyOf(t, gateway); key != first {
			t.Errorf("%s: another key, %s", c.text, key)
		}
	}
}

// keyOf is the fingerprint of web-1's key, of which there is one request.
func keyOf(t *testing.T, gateway *harness.Gateway) string {
	t.Helper()
	var n api.NodeDetail
	gateway.Run("node", "show", "web-1", "-o", "json").Exits(0).JSON(&n)
	var all []api.Request
	gateway.Run("request", "list", "-o", "json").Exits(0).JSON(&all)
	for _, r := range all {
		if r.Name == "web-1" && r.Fingerprint != n.Fingerprint {
			t.Errorf("request %+v", r)
		}
	}
	return n.Fingerprint
}

// goesOn is what a node has to do for its gateway: a policy, an action, an event.
func goesOn(t *testing.T, site *harness.Site, gateway *harness.Gateway, node *harness.Node, text string) {
	t.Helper()
	path := site.Path("files/" + node.Name + "/motd")
	gateway.Apply(documents("motd-"+node.Name, "name="+node.Name, path, text)).Exits(0)
	harness.Eventually(t, 30*time.Second, node.Name+" applies the policy", func() error {
		return errors.Join(fileHolds(path, text), node.Applied())
	})
	if r := gateway.Run("action", "run", "--node", node.Name, "--ttl", "20s", "--", "echo", text).Exits(0); r.Stdout != text+"\n" {
		t.Errorf("output of the action: %v", r)
	}
	event := text + " of " + node.Name
	node.Local("event", "send", "--severity", "minor", event).Exits(0)
	harness.Eventually(t, 30*time.Second, "the event arrives", func() error { return gateway.HasEvent(event) })
}

// off is an error when a measured clock is not where it should be, to a minute.
func off(what string, seconds float64, want time.Duration) error {
	if math.Abs(seconds-want.Seconds()) > 60 {
		return fmt.Errorf("%s is off by %.1f s, want %v", what, seconds, want)
	}
	return nil
}

// measured waits until node show, local status and the events say how far the
// clock of a node is off its gateway's.
func measured(t *testing.T, gateway *harness.Gateway, node *harness.Node, want time.Duration) {
	t.Helper()
	harness.Eventually(t, 30*time.Second, "the clock of "+node.Name+" is measured", func() error {
		var n api.NodeDetail
		gateway.Run("node", "show", node.Name, "-o", "json").Exits(0).JSON(&n)
		var own struct {
			Instances []struct {
				Clock *struct{ Seconds float64 }
			}
		}
		node.Local("status", "-o", "json").Exits(0).JSON(&own)
		if len(own.Instances) != 1 || own.Instances[0].Clock == nil {
			return fmt.Errorf("local status of %s: %+v", node.Name, own)
		}
		events, err := gateway.Events("--node", node.Name)
		if err != nil {
			return err
		}
		told := errors.New("no event tells of the clock of " + node.Name)
		for _, e := range events {
			if strings.Contains(e.Text, "clock") && strings.Contains(e.Text, node.Name) {
				told = nil
			}
		}
		return errors.Join(off("node show", n.SkewSeconds, want), off("local status", own.Instances[0].Clock.Seconds, want), told)
	})
}

// measuredRCPs waits until rcp list says the same of each RCP.
func measuredRCPs(t *testing.T, gateway *harness.Gateway, want map[string]time.Duration) {
	t.Helper()
	harness.Eventually(t, 30*time.Second, "the clocks of the RCPs are measured", func() error {
		all, err := gateway.RCPs()
		for _, r := range all {
			err = errors.Join(err, off(r.Name, r.SkewSeconds, want[r.Name]))
		}
		return err
	})
}
