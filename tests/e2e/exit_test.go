package e2e

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/tests/harness"
)

func TestExitCodes(t *testing.T) {
	harness.Long(t)
	site := harness.New(t)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1")
	// Over TCP its end is noticed at once; how long silence takes is not the matter here.
	node := site.Node(gateway, "web-1", tagged("web-1"), harness.Env("SALLYPORT_NODE_CARRIER", "h2"))
	none := site.Node(gateway, "locked-down", harness.Env("SALLYPORT_NODE_ALLOW_COMMANDS", ""))
	node.WaitRunning(runningWithin)
	none.WaitRunning(runningWithin)

	run := func(args ...string) harness.Result { return gateway.Run(args...) }
	action := func(name string, command ...string) harness.Result {
		return gateway.Run(append([]string{"action", "run", "--node", name, "--"}, command...)...)
	}
	t.Run("of actions", func(t *testing.T) {
		action("web-1", "true").Exits(0)
		action("web-1", "sh", "-c", "exit 42").Exits(42)
		action("web-1", "sh", "-c", "kill -9 $$").Exits(128 + 9)
		action("web-1", "/no/such/program").Exits(125)
		action("nobody", "true").Exits(127)
		action("locked-down", "true").Exits(126)
		r := run("action", "run", "--selector", "*", "--yes", "--", "sh", "-c", "echo all").Exits(1)
		if !strings.Contains(r.Stdout, "web-1") || !strings.Contains(r.Stdout, "all") {
			t.Errorf("output of several nodes: %v", r)
		}
		run("action", "run", "--selector", "name=web-1", "--yes", "--", "true").Exits(0)
	})
	t.Run("of everything else", func(t *testing.T) {
		run("version").Exits(0)
		run("no-such-noun").Exits(2)
		run("node", "list", "--no-such-flag").Exits(2)
		run("action", "run", "--selector", "", "--", "true").Exits(2)
		run("join", "create", "--name", "a", "--uses", "2").Exits(2)
		run("node", "show", "nobody").Exits(3)
		run("node", "tag", "nobody", "a=b").Exits(3)
		run("apply", "-f", "/no/such/file").Exits(1)
		bad := site.File("bad.yaml", "kind: policy\nname: x\ntype: chekc\nspec: {}\n")
		if r := run("apply", "-f", bad).Exits(2); !strings.Contains(r.Stderr, bad+":3") {
			t.Errorf("a bad document is not named with its line: %v", r)
		}
		run("action", "run", "--selector", "*", "--", "true").Exits(4) // no terminal and no --yes
	})
	t.Run("of roles", func(t *testing.T) {
		second := func(env map[string]string, role string) harness.Result {
			return site.Run(env, "run", role)
		}
		// The directory is locked.
		second(node.Environment(), "node").Exits(4)
		second(gateway.Environment(), "gateway").Exits(4)
		// Unknown, unparsable and unsupported settings refuse to start and name the variable.
		for name, value := range map[string]string{
			"SALLYPORT_NODE_UPSTREAM":      "a:1",
			"SALLYPORT_NODE_MODE":          "sometimes",
			"SALLYPORT_NODE_TAGS":          "no-value",
			"SALLYPORT_NODE_ALLOW_TARGETS": "no-port",
		} {
			env := map[string]string{"SALLYPORT_DATA": filepath.Join(site.Path("bad"), name), "SALLYPORT_NODE_ADMIN_LISTEN": "off", name: value}
			if r := second(env, "node").Exits(2); !strings.Contains(r.Stderr, name) {
				t.Errorf("the variable is not named: %v", r)
			}
		}
		// A malformed join code.
		env := map[string]string{"SALLYPORT_DATA": site.Path("bad-join"), "SALLYPORT_NODE_ADMIN_LISTEN": "off", "SALLYPORT_NODE_JOIN": "sp1.garbage"}
		if r := second(env, "node").Exits(2); strings.Contains(r.Stderr, "garbage") {
			t.Errorf("the code, a secret, is repeated: %v", r)
		}
	})
	t.Run("of a node that is not connected", func(t *testing.T) {
		node.Kill()
		node.WaitState(40*time.Second, "down")
		action("web-1", "true").Exits(125)
		run("action", "run", "--node", "web-1", "--ttl", "1s", "--", "true").Exits(124)
		run("node", "trace", "web-1")
	})
}
