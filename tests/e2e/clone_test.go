package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"sallyport/tests/harness"
)

// TestClone: a virtual machine is copied with its node, and both live. The
// gateway finds out end to end, stops what it would tell them, and reports it;
// when one is gone, an operator ends the quarantine (N-05).
func TestClone(t *testing.T) {
	harness.LongWait(t)
	site := harness.New(t)
	gateway := site.Gateway()
	relay := site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1", tagged("web-1"))
	node.WaitRunning(runningWithin)
	// A restart is no clone.
	node.Stop()
	again(t, node)
	node.WaitRunning(45 * time.Second)
	node.Stop()
	copied := site.Path("copied")
	copyTree(t, node.Data, copied)
	again(t, node)
	node.WaitRunning(45 * time.Second)
	clone := site.Node(gateway, "copy", harness.Env("SALLYPORT_DATA", copied), harness.Env("SALLYPORT_NODE_JOIN", ""),
		harness.Env("SALLYPORT_NODE_UPSTREAMS", relay.Address))
	took := node.WaitState(90*time.Second, "quarantined")
	t.Logf("two hosts with one identity at one RCP were found after %v", took)
	n, err := gateway.Node("web-1")
	if err != nil || !strings.Contains(n.StateReason, "two live hosts") {
		t.Errorf("%+v, %v", n, err)
	}
	if err := gateway.HasEvent("node web-1 is quarantined: " + n.StateReason + "; give one of them another identity (node reidentify --boot), or stop it (local status shows the boot on each host), then node resume"); err != nil {
		t.Error(err)
	}
	gateway.Run("action", "run", "--node", "web-1", "--ttl", "20s", "--", "true").Exits(126)
	path := site.Path("files/motd")
	gateway.Apply(documents("motd", "name=web-1", path, "not for clones")).Exits(0)
	harness.Holds(t, 3*time.Second, "a clone gets no desired state", func() error {
		if fileHolds(path, "not for clones") == nil {
			return errors.New("it was applied")
		}
		return nil
	})
	clone.Stop()
	gateway.Run("node", "resume", "web-1").Exits(0)
	harness.Eventually(t, 60*time.Second, "the one that is left gets what it should have", func() error {
		n, err := gateway.Node("web-1")
		if err == nil && n.State != "running" {
			err = fmt.Errorf("it is %s (%s)", n.State, n.StateReason)
		}
		return errors.Join(err, fileHolds(path, "not for clones"))
	})
}
