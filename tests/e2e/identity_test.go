package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/tests/harness"
)

// TestReidentify: a node gets a new key, and then another identity, over the
// channel that is there; its name, tags and unsent events go along.
func TestReidentify(t *testing.T) {
	harness.LongWait(t)
	site := harness.New(t)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1")
	node.WaitRunning(runningWithin)
	gateway.Run("node", "tag", "web-1", "tier=gold").Exits(0)
	show := func() (n api.NodeDetail) {
		gateway.Run("node", "show", "web-1", "-o", "json").Exits(0).JSON(&n)
		return n
	}
	before := show()

	if out := node.Local("status").Exits(0).Stdout; !strings.Contains(out, "s against the gateway's at") {
		t.Errorf("local status says nothing of the clock:\n%s", out)
	}
	gateway.Run("node", "renew", "web-1", "--rekey").Exits(0)
	rekeyed := show()
	if rekeyed.Fingerprint == before.Fingerprint || rekeyed.ID != before.ID {
		t.Errorf("after the new key: %s %s, before: %s %s", rekeyed.ID, rekeyed.Fingerprint, before.ID, before.Fingerprint)
	}
	same := func() error {
		s, err := status(node.Role)
		if err == nil && (s.Fingerprint != show().Fingerprint || s.ID != show().ID || s.State != "running") {
			err = fmt.Errorf("the node says %+v", s)
		}
		return err
	}
	harness.Eventually(t, 30*time.Second, "the node is back with its new key", same)
	node.WaitRunning(runningWithin)

	node.Local("event", "send", "--severity", "minor", "of the first identity").Exits(0)
	harness.Eventually(t, 30*time.Second, "the event is there", func() error { return gateway.HasEvent("of the first identity") })
	gateway.Run("node", "reidentify", "web-1").Exits(0)
	node.WaitRunning(runningWithin)
	harness.Eventually(t, 30*time.Second, "the node has its new identity", same)
	after := show()
	if after.ID == before.ID || after.Fingerprint == rekeyed.Fingerprint || after.Tags["tier"] != "gold" {
		t.Errorf("after: %s %s %v", after.ID, after.Fingerprint, after.Tags)
	}
	node.Local("event", "send", "--severity", "minor", "of the second identity").Exits(0)
	harness.Eventually(t, 30*time.Second, "the events of both are there", func() error {
		return errors.Join(gateway.HasEvent("of the first identity"), gateway.HasEvent("of the second identity"))
	})

	gateway.Run("node", "reidentify", "web-1", "--as", "web-2").Exits(0)
	harness.Eventually(t, runningWithin, "it is a node beside the old one", func() error {
		n, err := gateway.Node("web-2")
		if err == nil && (n.State != "running" || n.ID == after.ID) {
			err = fmt.Errorf("web-2 is %s", n.State)
		}
		return err
	})
	harness.Eventually(t, time.Minute, "the old node is there, and gone", func() error {
		if old := show(); old.ID != after.ID || old.State != "down" {
			return fmt.Errorf("the old node is %s %s", old.ID, old.State)
		}
		return nil
	})
}
