package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/tests/harness"
)

// caOf is `ca show`.
func caOf(gateway *harness.Gateway) api.CA {
	var ca api.CA
	gateway.Run("ca", "show", "-o", "json").Exits(0).JSON(&ca)
	return ca
}

func names(parties []api.CAParty) string {
	var out []string
	for _, p := range parties {
		out = append(out, p.Name)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// left waits until `ca show` says that exactly these parties are left.
func left(t *testing.T, gateway *harness.Gateway, want string) {
	t.Helper()
	took := harness.Eventually(t, 60*time.Second, "left in the rollover: "+want, func() error {
		if ca := caOf(gateway); names(ca.Left) != want {
			return fmt.Errorf("left are %q: %+v", names(ca.Left), ca.Left)
		}
		return nil
	})
	t.Logf("left: %q after %v", want, took.Round(time.Millisecond))
}

// TestRootRollover: a new root takes over while one node is offline for a part
// of it, and another node and an RCP for all of it. Nobody is lost, and nobody
// is touched but by the gateway (PK-09, PK-10).
func TestRootRollover(t *testing.T) {
	harness.LongWait(t)
	site := harness.New(t)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1")
	second := site.RCP(gateway, "dmz-2")
	var nodes []*harness.Node
	for _, name := range []string{"web-1", "web-2", "web-3"} {
		nodes = append(nodes, site.Node(gateway, name, tagged(name)))
	}
	for _, n := range nodes {
		n.WaitRunning(runningWithin)
	}
	code := site.File("old.join", gateway.Run("join", "create", "--name", "web-4").Exits(0).Stdout)
	before := caOf(gateway)
	if before.Parties != 6 || before.Moved != 6 || before.Rollover != nil {
		t.Fatalf("before: %+v", before)
	}
	second.Stop()
	nodes[1].Stop()
	nodes[2].Stop()

	var plan api.CAChange
	harness.Eventually(t, 30*time.Second, "the rehearsal lists those that are offline", func() error {
		gateway.Run("ca", "rotate", "root", "--dry-run", "-o", "json").Exits(0).JSON(&plan)
		if names(plan.Offline) != "dmz-2 web-2 web-3" {
			return fmt.Errorf("offline are %q", names(plan.Offline))
		}
		return nil
	})
	if !plan.DryRun || len(plan.Joins) != 1 || plan.Joins[0].Name != "web-4" || len(plan.CA.Roots) != 1 {
		t.Fatalf("rehearsal: %+v", plan)
	}
	if r := gateway.Run("ca", "rotate", "root"); r.Code != 4 || !strings.Contains(r.Stderr, "--yes") {
		t.Errorf("without --yes: %v", r)
	}
	gateway.Run("ca", "rotate", "root", "--yes").Exits(0)
	left(t, gateway, "dmz-2 web-2 web-3")
	if r := gateway.Run("ca", "rotate", "intermediate", "--yes"); r.Code == 0 || !strings.Contains(r.Stderr, "under way") {
		t.Errorf("a second rollover: %v", r)
	}
	if r := gateway.Run("ca", "finish", "--yes"); r.Code == 0 || !strings.Contains(r.Stderr, "web-2") || !strings.Contains(r.Stderr, "--force") {
		t.Errorf("finished while parties are left: %v", r)
	}

	// During the overlap: an old join code, a new one, and a node that comes back.
	fourth := site.Node(gateway, "web-4", tagged("web-4"), harness.Env("SALLYPORT_NODE_JOIN", code))
	fifth := site.Node(gateway, "web-5", tagged("web-5"))
	fourth.WaitRunning(30 * time.Second)
	fifth.WaitRunning(30 * time.Second)
	nodes[2].Start()
	nodes[2].WaitRunning(30 * time.Second)
	left(t, gateway, "dmz-2 web-2")

	gateway.Run("ca", "finish", "--force", "--yes").Exits(0)
	after := caOf(gateway)
	if after.Rollover != nil || len(after.Roots) != 2 || after.Roots[0].State != "retired" || after.Roots[1].State != "issuing" {
		t.Fatalf("after finish: %+v", after)
	}
	for _, n := range []*harness.Node{nodes[0], nodes[2], fourth, fifth} {
		n.WaitRunning(30 * time.Second)
		gateway.Run("action", "run", "--node", n.Name, "--", "true").Exits(0)
	}

	// Those that missed all of it.
	nodes[1].Start()
	left(t, gateway, "dmz-2")
	nodes[1].WaitRunning(30 * time.Second)
	second.Start()
	took := second.WaitConnected(60 * time.Second)
	t.Logf("an RCP that missed the rollover is connected again after %v", took.Round(time.Millisecond))
	left(t, gateway, "")
	gateway.Run("action", "run", "--node", "web-2", "--", "true").Exits(0)

	// All of it holds across restarts.
	gateway.Stop()
	gateway.Start()
	gateway.WaitAPI()
	for _, n := range append(nodes, fourth, fifth) {
		n.WaitRunning(30 * time.Second)
	}
	if ca := caOf(gateway); ca.Moved != 8 || ca.Parties != 8 {
		t.Errorf("after a restart: %+v", ca)
	}
	gateway.Run("audit", "list", "--what", "ca.rotate").Exits(0)
}

// TestIntermediateRollover: a new intermediate takes over, goes back, and takes
// over again, under nodes that run (PK-10).
func TestIntermediateRollover(t *testing.T) {
	harness.LongWait(t)
	site := harness.New(t)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1")
	one, two := site.Node(gateway, "web-1", tagged("web-1")), site.Node(gateway, "web-2", tagged("web-2"))
	one.WaitRunning(runningWithin)
	two.WaitRunning(runningWithin)
	if r := gateway.Run("ca", "finish", "--yes"); r.Code == 0 || !strings.Contains(r.Stderr, "no rollover") {
		t.Errorf("finish of nothing: %v", r)
	}
	gateway.Run("ca", "rotate", "intermediate", "--yes").Exits(0)
	left(t, gateway, "")
	gateway.Run("ca", "abort").Exits(0)
	left(t, gateway, "")
	gateway.Run("ca", "finish", "--yes").Exits(0)
	if ca := caOf(gateway); ca.Intermediates[0].State != "issuing" || ca.Intermediates[1].State != "retired" {
		t.Fatalf("after abort and finish: %+v", ca)
	}

	two.Stop()
	two.WaitState(30*time.Second, "down")
	gateway.Run("ca", "rotate", "intermediate", "--yes").Exits(0)
	left(t, gateway, "web-2")
	gateway.Run("ca", "finish", "--force", "--yes").Exits(0)
	one.WaitRunning(30 * time.Second)
	gateway.Run("action", "run", "--node", "web-1", "--", "true").Exits(0)
	two.Start()
	left(t, gateway, "")
	two.WaitRunning(30 * time.Second)
}
