package e2e

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/internal/wire"
	"sallyport/tests/harness"
)

// localStatus is `local status -o json` of a role.
type localStatus struct {
	ID          wire.ID `json:"id"`
	Name        string  `json:"name"`
	Fingerprint string  `json:"fingerprint"`
	State       string  `json:"state"`
	Reason      string  `json:"reason"`
}

func status(r *harness.Role) (s localStatus, err error) {
	result := r.Local("status", "-o", "json")
	if err := result.Err(); err != nil {
		return s, err
	}
	result.JSON(&s)
	return s, nil
}

// says is an error until the role's local status gives a reason that holds the text.
func says(r *harness.Role, text string) error {
	s, err := status(r)
	if err != nil {
		return err
	}
	if s.State != "pending" || !strings.Contains(s.Reason, text) {
		return fmt.Errorf("%s is %s: %q", r.Name, s.State, s.Reason)
	}
	return nil
}

// request waits for the request of a name.
func request(t *testing.T, gateway *harness.Gateway, name string) (found api.Request) {
	t.Helper()
	harness.Eventually(t, 15*time.Second, "the request of "+name+" is listed", func() error {
		requests, err := gateway.Requests()
		for _, r := range requests {
			if r.Name == name && r.State == "pending" {
				found = r
				return nil
			}
		}
		return errors.Join(err, fmt.Errorf("no waiting request of %s in %d", name, len(requests)))
	})
	return found
}

// TestManualGrant: a code without a token makes a request that waits for an
// operator, who compares fingerprints.
func TestManualGrant(t *testing.T) {
	harness.Long(t)
	site := harness.New(t)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1", harness.JoinFlags("--manual"))
	r := request(t, gateway, "web-1")
	s, err := status(node.Role)
	if err != nil {
		t.Fatal(err)
	}
	if r.Fingerprint != s.Fingerprint || r.RCP != "dmz-1" || r.Role != wire.RoleNode {
		t.Errorf("request %+v of %+v", r, s)
	}
	gateway.Run("request", "grant", "web-1", "--fingerprint", "SHA256:AAAA").Exits(4)
	gateway.Run("request", "grant", "web-1", "--fingerprint", s.Fingerprint).Exits(0)
	node.WaitRunning(runningWithin)

	denied := site.Node(gateway, "web-2", harness.JoinFlags("--manual"))
	request(t, gateway, "web-2")
	gateway.Run("request", "deny", "web-2").Exits(0)
	harness.Eventually(t, 15*time.Second, "the denied node says so", func() error { return says(denied.Role, "refused") })
}

// TestBadCodes: expired, used, revoked and foreign codes are refused with a reason on
// the node, which stays up and takes a better code without a restart.
func TestBadCodes(t *testing.T) {
	harness.LongWait(t)
	site := harness.New(t)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1")
	good := site.Node(gateway, "good")
	good.WaitRunning(runningWithin)

	code := func(name string, flags ...string) string {
		return gateway.Run(append([]string{"join", "create", "--name", name}, flags...)...).Exits(0).Stdout
	}
	used, err := os.ReadFile(good.Environment()["SALLYPORT_NODE_JOIN"])
	if err != nil {
		t.Fatal(err)
	}
	expired := code("late", "--ttl", "1s")
	revoked := code("gone")
	var joins []api.Join
	gateway.Run("join", "list", "-o", "json").Exits(0).JSON(&joins)
	for _, j := range joins {
		if j.Name == "gone" {
			gateway.Run("join", "revoke", j.ID).Exits(0)
		}
	}
	began := time.Now()
	harness.Eventually(t, 10*time.Second, "the short code expires", func() error {
		if time.Since(began) < 2*time.Second {
			return errors.New("not yet")
		}
		return nil
	})

	nodes := map[string]*harness.Node{}
	for name, text := range map[string]string{"late": expired, "again": string(used), "gone": revoked} {
		nodes[name] = site.Node(gateway, name, harness.Env("SALLYPORT_NODE_JOIN", site.File(name+".join", text)))
	}
	for name, want := range map[string]string{"late": "expired", "again": "used", "gone": "revoked"} {
		harness.Eventually(t, 20*time.Second, name+" says why", func() error { return says(nodes[name].Role, want) })
	}
	// A better code in the same file; a refused party tries at most once a minute.
	site.File("late.join", code("late"))
	nodes["late"].WaitRunning(75 * time.Second)

	// A code of another installation: its root is not ours.
	other := harness.New(t)
	foreign := other.Gateway()
	foreign.Run("rcp", "add", "there", "127.0.0.1:1").Exits(0)
	text := foreign.Run("join", "create", "--name", "lost").Exits(0).Stdout
	relay, err := gateway.RCPs()
	if err != nil {
		t.Fatal(err)
	}
	lost := site.Node(gateway, "lost", harness.Env("SALLYPORT_NODE_JOIN", site.File("lost.join", text)), harness.Env("SALLYPORT_NODE_UPSTREAMS", relay[0].Address))
	harness.Holds(t, 5*time.Second, "the foreign node gets no certificate here", func() error {
		nodes, err := gateway.Nodes()
		for _, n := range nodes {
			if n.Name == "lost" {
				return errors.Join(err, errors.New("it is listed"))
			}
		}
		return err
	})
	if s, err := status(lost.Role); err != nil || s.State != "pending" {
		t.Errorf("the foreign node: %+v, %v", s, err)
	}
	// All of this harmed nobody else.
	if err := good.Applied(); err != nil && !strings.Contains(err.Error(), "applied 0.0 of 0.0") {
		t.Error(err)
	}
	gateway.Run("action", "run", "--node", "good", "--", "true").Exits(0)
}

// TestNameInUse: a second node with a living node's name waits; --replace gives it the
// name and revokes the first.
func TestNameInUse(t *testing.T) {
	harness.Long(t)
	site := harness.New(t)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1")
	first := site.Node(gateway, "web-1", tagged("web-1"))
	first.WaitRunning(runningWithin)
	gateway.Run("node", "tag", "web-1", "kept=yes").Exits(0)
	before, err := gateway.Node("web-1")
	if err != nil {
		t.Fatal(err)
	}

	code := gateway.Run("join", "create", "--name", "web-1").Exits(0).Stdout
	second := site.Node(gateway, "second", harness.Env("SALLYPORT_NODE_NAME", "web-1"), harness.Env("SALLYPORT_NODE_JOIN", site.File("second.join", code)))
	r := request(t, gateway, "web-1")
	if !strings.Contains(r.Reason, "name-in-use") {
		t.Errorf("the request waits for %q", r.Reason)
	}
	gateway.Run("request", "grant", r.ID).Exits(4)
	gateway.Run("request", "grant", r.ID, "--replace").Exits(0)
	harness.Eventually(t, 15*time.Second, "the new node has the name and the tags", func() error {
		n, err := gateway.Node("web-1")
		if err != nil {
			return err
		}
		if n.ID == before.ID || n.State != "running" || n.Tags["kept"] != "yes" {
			return fmt.Errorf("%+v", n)
		}
		return nil
	})
	gateway.Run("action", "run", "--node", "web-1", "--", "true").Exits(0)
	_ = second
	harness.Eventually(t, 15*time.Second, "the old node knows that it is revoked", func() error {
		s, err := status(first.Role)
		if err != nil {
			return err
		}
		if s.State != "revoked" {
			return fmt.Errorf("it is %s (%s)", s.State, s.Reason)
		}
		return nil
	})
}

// TestRemoveAndReturn: a removed node is cut off at once, keeps its UUID, and
// comes back with a new code and a new key.
func TestRemoveAndReturn(t *testing.T) {
	harness.Long(t)
	site := harness.New(t)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1")
	node.WaitRunning(runningWithin)
	before, err := status(node.Role)
	if err != nil {
		t.Fatal(err)
	}
	gateway.Run("node", "remove", "web-1").Exits(0)
	harness.Eventually(t, 10*time.Second, "the node knows", func() error {
		s, err := status(node.Role)
		if err == nil && s.State != "revoked" {
			err = fmt.Errorf("it is %s (%s)", s.State, s.Reason)
		}
		return err
	})
	gateway.Run("action", "run", "--node", "web-1", "--", "true").Exits(127)

	site.File("web-1.join", gateway.Run("join", "create", "--name", "web-1").Exits(0).Stdout)
	node.WaitRunning(30 * time.Second)
	after, err := status(node.Role)
	if err != nil {
		t.Fatal(err)
	}
	if after.ID != before.ID || after.Fingerprint == before.Fingerprint {
		t.Errorf("before %+v, after %+v: want the same UUID and another key", before, after)
	}
}

// TestTagPrecedence: gateway over code over node, each with its source.
func TestTagPrecedence(t *testing.T) {
	harness.Long(t)
	site := harness.New(t)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1", harness.JoinFlags("--tag", "a=code", "--tag", "b=code"), harness.Env("SALLYPORT_NODE_TAGS", "a=node,b=node,c=node"))
	node.WaitRunning(runningWithin)
	gateway.Run("node", "tag", "web-1", "a=gateway").Exits(0)
	harness.Eventually(t, 5*time.Second, "the tags are merged", func() error {
		n, err := gateway.Node("web-1")
		if err != nil {
			return err
		}
		if n.Tags["a"] != "gateway" || n.Tags["b"] != "code" || n.Tags["c"] != "node" {
			return fmt.Errorf("tags %v", n.Tags)
		}
		return nil
	})
	gateway.Run("node", "tag", "web-1", "a-").Exits(0)
	// Removed is removed: neither the code nor the node brings it back.
	harness.Eventually(t, 5*time.Second, "the tag is gone", func() error {
		n, err := gateway.Node("web-1")
		if _, there := n.Tags["a"]; err == nil && (there || n.Tags["b"] != "code") {
			err = fmt.Errorf("tags %v", n.Tags)
		}
		return err
	})
}
