package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"
	"time"

	"sallyport/tests/harness"
)

// Deadlines of the contract.
const (
	runningWithin = 5 * time.Second
	appliedWithin = 2 * time.Second
	eventWithin   = time.Second
)

// marker makes a text that stands nowhere else, in any memory or traffic.
func marker(t *testing.T, what string) string {
	return fmt.Sprintf("%sMARKER%d", what, time.Now().UnixNano())
}

// documents are a files policy that writes content to path, and its deployment.
func documents(name, selector, path, content string) string {
	return fmt.Sprintf(`kind: policy
name: %[1]s
type: files
spec:
  files:
    - path: %[3]s
      content: %[4]q
      mode: "0644"
---
kind: deployment
name: %[1]s
selector: %[2]s
policies: [%[1]s]
`, name, selector, path, content+"\n")
}

// fileHolds is an error until the file has exactly the content.
func fileHolds(path, content string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if string(b) != content+"\n" {
		return fmt.Errorf("%s holds %q", path, b)
	}
	return nil
}

// story is what a newcomer sees, against a node that is running: a policy
// arrives, an action runs, an event comes back. It returns the markers that it used.
func story(t *testing.T, site *harness.Site, gateway *harness.Gateway, node *harness.Node) (markers []string) {
	t.Helper()
	policy, action, event := marker(t, "Policy"), marker(t, "Action"), marker(t, "Event")
	path := site.Path("files/" + node.Name + "/motd")
	began := time.Now()
	gateway.Apply(documents("motd-"+node.Name, "name="+node.Name, path, policy)).Exits(0)
	harness.Eventually(t, 30*time.Second, "the policy is applied", func() error {
		return errors.Join(fileHolds(path, policy), node.Applied())
	})
	if took := time.Since(began); took > appliedWithin {
		t.Errorf("apply reached %s after %v, want %v", node.Name, took, appliedWithin)
	}

	r := gateway.Run("action", "run", "--node", node.Name, "--", "sh", "-c", "echo "+action+"; exit 3").Exits(3)
	if r.Stdout != action+"\n" {
		t.Errorf("output of the action: %v", r)
	}

	node.Local("event", "send", "--severity", "major", event).Exits(0)
	if took := harness.Eventually(t, 30*time.Second, "the event arrives", func() error { return gateway.HasEvent(event) }); took > eventWithin {
		t.Errorf("the event was listed after %v, want %v", took, eventWithin)
	}
	return []string{policy, action, event}
}

// tagged gives a node the tag by which story selects it.
func tagged(name string) harness.Option { return harness.JoinFlags("--tag", "name="+name) }

func TestStory(t *testing.T) {
	site := harness.New(t)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1", tagged("web-1"))
	if took := node.WaitRunning(30 * time.Second); took > runningWithin {
		t.Errorf("the node was running %v after its start, want %v", took, runningWithin)
	}
	story(t, site, gateway, node)
}

// TestStorySlim: the slim programs do what `sallyport run` does.
func TestStorySlim(t *testing.T) {
	site := harness.New(t)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1", harness.Slim())
	node := site.Node(gateway, "web-1", tagged("web-1"), harness.Slim())
	node.WaitRunning(runningWithin)
	story(t, site, gateway, node)
}

// TestUndeploy: what a policy replaced comes back when the policy goes.
func TestUndeploy(t *testing.T) {
	site := harness.New(t)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1", tagged("web-1"))
	node.WaitRunning(runningWithin)
	replaced, made := site.File("files/replaced", "as it was\n"), site.Path("files/made")
	gateway.Apply(documents("one", "name=web-1", replaced, "ours")).Exits(0)
	gateway.Apply(documents("two", "name=web-1", made, "ours")).Exits(0)
	harness.Eventually(t, 10*time.Second, "both policies are applied", func() error {
		return errors.Join(fileHolds(replaced, "ours"), fileHolds(made, "ours"), node.Applied())
	})
	// Another tag: the node is no longer selected.
	gateway.Run("node", "tag", "web-1", "name=other").Exits(0)
	harness.Eventually(t, 10*time.Second, "the files are as they were", func() error {
		if _, err := os.Stat(made); !errors.Is(err, fs.ErrNotExist) {
			return errors.Join(fmt.Errorf("%s is still there", made), err)
		}
		return fileHolds(replaced, "as it was")
	})
}

// TestContractKeys: the keys that scripts rely on.
func TestContractKeys(t *testing.T) {
	site := harness.New(t)
	gateway := site.Gateway()
	relay := site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1", tagged("web-1"))
	node.WaitRunning(runningWithin)
	story(t, site, gateway, node)

	keys := func(r harness.Result, list bool, want ...string) {
		t.Helper()
		r.Exits(0)
		var object map[string]json.RawMessage
		if list {
			var objects []map[string]json.RawMessage
			r.JSON(&objects)
			if len(objects) == 0 {
				t.Fatalf("an empty list: %v", r)
			}
			object = objects[0]
		} else {
			r.JSON(&object)
		}
		for _, key := range want {
			if _, ok := object[key]; !ok {
				t.Errorf("%s: no key %s", r.Command, key)
			}
		}
	}
	keys(gateway.Run("node", "list", "-o", "json"), true, "id", "name", "state", "state_reason", "state_since", "tags", "rcps", "carrier", "version", "desired_revision", "applied_revision", "last_seen")
	keys(gateway.Run("request", "list", "-o", "json"), true, "id", "role", "name", "fingerprint", "source", "rcp", "tags", "state", "reason", "requested")
	keys(gateway.Run("event", "list", "-o", "json"), true, "id", "node_id", "node", "spool", "seq", "time", "received", "severity", "application", "object", "key", "text", "state", "count")
	keys(gateway.Run("deployment", "status", "motd-web-1", "-o", "json"), false, "name", "state", "revision", "counts", "nodes")
	status := []string{"role", "id", "name", "fingerprint", "state", "reason", "upstreams", "instances", "outbox"}
	for _, role := range []*harness.Role{node.Role, relay.Role} {
		keys(role.Local("status", "-o", "json"), false, status...)
	}

	// One fingerprint, byte by byte, wherever it is shown.
	var local struct{ Fingerprint string }
	node.Local("status", "-o", "json").JSON(&local)
	requests, err := gateway.Requests()
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, r := range requests {
		found = found || r.Fingerprint == local.Fingerprint
	}
	if !found || !strings.HasPrefix(local.Fingerprint, "SHA256:") || !strings.Contains(node.Log(), local.Fingerprint) {
		t.Errorf("fingerprint %s of local status: in request list %v, in the start-up log %v", local.Fingerprint, found, strings.Contains(node.Log(), local.Fingerprint))
	}
}
