package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/tests/harness"
)

// copyTree copies a data directory of a role that does not run.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	if err := os.RemoveAll(to); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(from, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, name)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		switch {
		case d.IsDir():
			return os.MkdirAll(target, info.Mode().Perm())
		case !info.Mode().IsRegular():
			return nil // sockets
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		return os.WriteFile(target, b, info.Mode().Perm())
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestWipedDatabase: the gateway lost its database but not its pki directory.
// Nodes are shown as locked, keep what they have, report, and obey nothing
// until they are unlocked on their own host (PD-09, PD-10).
func TestWipedDatabase(t *testing.T) {
	harness.Long(t)
	site := harness.New(t)
	gateway := site.Gateway()
	relay := site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1", tagged("web-1"))
	node.WaitRunning(runningWithin)
	path := site.Path("files/motd")
	gateway.Apply(documents("motd", "name=web-1", path, "before the loss")).Exits(0)
	harness.Eventually(t, 10*time.Second, "the policy is applied", node.Applied)

	gateway.Kill()
	removed, err := filepath.Glob(filepath.Join(gateway.Data, "gateway", "sallyport.db*"))
	if err != nil || len(removed) == 0 {
		t.Fatalf("no database in %s: %v", gateway.Data, err)
	}
	for _, name := range removed {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	gateway.Start()
	gateway.WaitAPI()
	// The RCP's record is lost too: it is reached again by its address.
	gateway.SetEnv("SALLYPORT_GATEWAY_RCPS", relay.Address)
	gateway.Kill()
	gateway.Start()
	gateway.WaitAPI()

	id := mustStatus(t, node.Role).ID
	harness.Eventually(t, 60*time.Second, "the node is shown as locked", func() error {
		nodes, err := gateway.Nodes()
		if err != nil {
			return err
		}
		for _, n := range nodes {
			if n.ID == id {
				if n.State != "locked" {
					return fmt.Errorf("it is %s (%s)", n.State, n.StateReason)
				}
				return nil
			}
		}
		return fmt.Errorf("it is not among %d", len(nodes))
	})
	if err := fileHolds(path, "before the loss"); err != nil {
		t.Errorf("the locked node did not keep what it had: %v", err)
	}
	refused := gateway.Run("action", "run", "--node", string(id), "--", "touch", site.Path("files/obeyed")).Exits(127)
	if !strings.Contains(refused.Stderr, "locked (unknown)") {
		t.Errorf("the refusal does not say why: %s", refused.Stderr)
	}
	if _, err := os.Stat(site.Path("files/obeyed")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the locked node obeyed: %v", err)
	}
	traced := gateway.Run("node", "trace", string(id)).Exits(0)
	if !strings.Contains(traced.Stdout, "answers end to end") || !strings.Contains(traced.Stdout, "its state is locked") {
		t.Errorf("the way to a node that nobody knows is not shown: %s", traced.Stdout)
	}
	node.Local("event", "send", "--severity", "minor", "reported while locked").Exits(0)
	harness.Eventually(t, 15*time.Second, "the locked node reports", func() error { return gateway.HasEvent("reported while locked") })

	// Without a backup it is enrolled anew, as docs/troubleshooting.md says.
	if code := node.Stop(); code != 0 {
		t.Fatalf("the node ended with %d", code)
	}
	before := mustIdentity(t, node.Data)
	node.Local("rejoin").Exits(4) // nobody is there to ask
	aside := node.Local("rejoin", "--yes", "-o", "json").Exits(0)
	var moved struct {
		SetAside string `json:"set_aside"`
	}
	aside.JSON(&moved)
	if kept := mustIdentity(t, moved.SetAside); kept != before {
		t.Errorf("the key that was set aside is another one")
	}
	if fi, err := os.Stat(moved.SetAside); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("%s: %v, %v", moved.SetAside, fi, err)
	}
	node.Local("rejoin", "--yes").Exits(3)
	site.File("web-1.join", gateway.Run("join", "create", "--name", "web-1").Exits(0).Stdout)
	node.Start()
	harness.Eventually(t, 30*time.Second, "the node is enrolled anew and obeys", func() error {
		return gateway.Run("action", "run", "--node", "web-1", "--", "true").Err()
	})
}

// mustIdentity reads the one key below a directory.
func mustIdentity(t *testing.T, dir string) (key string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.Name() != "key.pem" {
			return err
		}
		if key != "" {
			t.Errorf("%s holds several keys", dir)
		}
		b, err := os.ReadFile(name)
		key = string(b)
		return err
	})
	if err != nil || key == "" {
		t.Fatalf("no key in %s: %v", dir, err)
	}
	return key
}

func mustStatus(t *testing.T, r *harness.Role) localStatus {
	t.Helper()
	s, err := status(r)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestOlderDatabase: a gateway that came back with an older database stops
// pushing to nodes that know more, and says so.
func TestOlderDatabase(t *testing.T) {
	harness.Long(t)
	site := harness.New(t)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1", tagged("web-1"))
	node.WaitRunning(runningWithin)
	path := site.Path("files/motd")
	gateway.Apply(documents("motd", "name=web-1", path, "one")).Exits(0)
	harness.Eventually(t, 10*time.Second, "the first policy is applied", node.Applied)

	if code := gateway.Stop(); code != 0 {
		t.Fatalf("the gateway ended with %d", code)
	}
	backup := site.Path("backup")
	copyTree(t, filepath.Join(gateway.Data, "gateway"), backup)
	gateway.Start()
	gateway.WaitAPI()
	for _, text := range []string{"two", "three"} {
		gateway.Apply(documents("motd", "name=web-1", path, text)).Exits(0)
		harness.Eventually(t, 20*time.Second, text+" is applied", func() error { return errors.Join(fileHolds(path, text), node.Applied()) })
	}
	gateway.Stop()
	copyTree(t, backup, filepath.Join(gateway.Data, "gateway"))
	gateway.Start()
	gateway.WaitAPI()

	harness.Eventually(t, 60*time.Second, "the gateway says that the node knows more", func() error {
		n, err := gateway.Node("web-1")
		if err != nil {
			return err
		}
		if !strings.Contains(n.StateReason, n.AppliedRevision.String()) || !strings.Contains(n.StateReason, "older") {
			return fmt.Errorf("it is %s (%s), applied %v of %v", n.State, n.StateReason, n.AppliedRevision, n.DesiredRevision)
		}
		return nil
	})
	if err := fileHolds(path, "three"); err != nil {
		t.Errorf("the node went back: %v", err)
	}
}

// again starts a node that was ended and waits until it has a channel. The
// gateway's own view is no help: it forgives a short absence.
func again(t *testing.T, node *harness.Node) {
	t.Helper()
	node.Start()
	harness.Eventually(t, 30*time.Second, node.Name+" is connected again", func() error {
		var s struct {
			Instances []struct {
				Upstreams []struct{ State string } `json:"upstreams"`
			} `json:"instances"`
		}
		r := node.Local("status", "-o", "json")
		if err := r.Err(); err != nil {
			return err
		}
		r.JSON(&s)
		for _, i := range s.Instances {
			for _, u := range i.Upstreams {
				if u.State == "connected" {
					return nil
				}
			}
		}
		return fmt.Errorf("upstreams %+v", s)
	})
}

// TestRevertedNode: a node whose disk went back in time starts a new spool: its
// events are neither lost nor taken for old ones.
func TestRevertedNode(t *testing.T) {
	harness.Long(t)
	site := harness.New(t)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1", tagged("web-1"))
	node.WaitRunning(runningWithin)
	emit := func(text string) {
		t.Helper()
		node.Local("event", "send", "--severity", "minor", text).Exits(0)
		harness.Eventually(t, 5*time.Second, text+" arrives", func() error { return gateway.HasEvent(text) })
	}
	emit("before the snapshot")
	node.Stop()
	snapshot := site.Path("snapshot")
	copyTree(t, node.Data, snapshot)
	again(t, node)
	emit("after the snapshot, one")
	emit("after the snapshot, two")
	node.Kill()
	copyTree(t, snapshot, node.Data)
	again(t, node)
	emit("after the revert, one")
	emit("after the revert, two")
	emit("after the revert, three")

	events, err := gateway.Events("--node", "web-1", "--limit", "0")
	if err != nil {
		t.Fatal(err)
	}
	spools := map[string]bool{}
	for _, e := range events {
		if e.Spool != "" {
			spools[e.Spool] = true
		}
	}
	if len(spools) != 2 {
		t.Errorf("the events came from %d spools, want the old one and a new one", len(spools))
	}
	for _, text := range []string{"before the snapshot", "after the snapshot, one", "after the snapshot, two", "after the revert, one"} {
		if err := gateway.HasEvent(text); err != nil {
			t.Error(err)
		}
	}
}

// TestRCPOutage: one event for the RCP that failed and one for its recovery,
// none per node.
func TestRCPOutage(t *testing.T) {
	harness.Long(t)
	site := harness.New(t)
	gateway := site.Gateway()
	relay := site.RCP(gateway, "dmz-1")
	var nodes []*harness.Node
	for i := range 3 {
		nodes = append(nodes, site.Node(gateway, fmt.Sprintf("web-%d", i)))
	}
	for _, n := range nodes {
		n.WaitRunning(10 * time.Second)
	}
	relay.Kill()
	for _, n := range nodes {
		n.WaitState(45*time.Second, "unreachable")
	}
	relay.Start()
	for _, n := range nodes {
		n.WaitRunning(45 * time.Second)
	}
	events, err := gateway.Events("--limit", "0")
	if err != nil {
		t.Fatal(err)
	}
	rcp, perNode := 0, 0
	for _, e := range events {
		if e.NodeID != "" && (strings.Contains(e.Text, "down") || strings.Contains(e.Text, "unreachable")) {
			perNode++
		}
		if e.NodeID == "" && strings.Contains(e.Text, "dmz-1") {
			rcp++
		}
	}
	if rcp < 2 || perNode > 0 {
		t.Errorf("%d events of the RCP, want failed and recovered; %d of nodes, want none", rcp, perNode)
		for _, e := range events {
			t.Logf("%s %s %s: %s", e.Severity, e.Node, e.Object, e.Text)
		}
	}
}
