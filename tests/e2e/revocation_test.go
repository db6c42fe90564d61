package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/internal/local"
	"sallyport/internal/wire"
	"sallyport/tests/harness"
)

// cutWithin is how fast a revocation must be felt everywhere (PK-11).
const cutWithin = time.Second

func localDetail(r *harness.Role) (s local.Status, err error) {
	result := r.Local("status", "-o", "json")
	if err := result.Err(); err != nil {
		return s, err
	}
	result.JSON(&s)
	return s, nil
}

// holdsNodes wants an RCP to hold n nodes.
func holdsNodes(relay *harness.RCP, n int) func() error {
	return func() error {
		s, err := localDetail(relay.Role)
		if err == nil && s.Peers["node"] != n {
			err = fmt.Errorf("%s holds %d nodes, want %d", relay.Name, s.Peers["node"], n)
		}
		return err
	}
}

// TestRevocationCutsAtOnce: what runs through a node's channels, sessions,
// tunnels and lanes ends within a second of the operator's word. The set stays
// in force at RCPs and nodes that restart while no gateway is there, and at an
// RCP that the thief tries next.
func TestRevocationCutsAtOnce(t *testing.T) {
	harness.Long(t)
	site := harness.New(t)
	gateway := site.Gateway()
	lanes := site.RCP(gateway, "dmz-1")
	sealing := site.RCP(gateway, "dmz-2", harness.Env("SALLYPORT_RCP_LANES", "off"))
	node := func(name string, upstreams ...string) *harness.Node {
		n := site.Node(gateway, name, tagged(name), harness.Env("SALLYPORT_NODE_ALLOW_TARGETS", "127.0.0.1:*"), harness.Env("SALLYPORT_NODE_CARRIER", "h2"),
			harness.Env("SALLYPORT_NODE_UPSTREAMS", strings.Join(upstreams, ";")))
		n.WaitRunning(30 * time.Second)
		return n
	}
	byLane, bySealed := node("by-lane", lanes.Address), node("by-sealed", sealing.Address)
	other := node("other", lanes.Address, sealing.Address)
	addr := tcpService(t, func(c *net.TCPConn) { _, _ = io.Copy(c, c); _ = c.Close() })
	gateway.Apply(targetDocument("mirror", "address: '"+addr+"'")).Exits(0)
	nodes := map[string]*harness.Node{"by-lane": byLane, "by-sealed": bySealed}
	conns := map[string]net.Conn{}
	for name := range nodes {
		harness.Eventually(t, 30*time.Second, "a connection through "+name, func() error {
			var f api.Forward
			r := gateway.Run("target", "forward", name+"/mirror", "0", "-o", "json")
			if r.Code != 0 {
				return r.Err()
			}
			r.JSON(&f)
			c, err := net.Dial("tcp", f.Listen)
			if err != nil {
				return err
			}
			if err := errors.Join(c.SetDeadline(time.Now().Add(time.Minute)), echoes(c, 2<<20)); err != nil {
				return errors.Join(err, c.Close())
			}
			conns[name] = c
			return nil
		})
		defer func() { _ = conns[name].Close() }()
	}
	kind := regexp.MustCompile(`lane open.*sealed\W+(true|false)`)
	for sealed, relay := range map[string]*harness.RCP{"false": lanes, "true": sealing} {
		if m := kind.FindStringSubmatch(relay.Log()); m == nil || m[1] != sealed {
			t.Errorf("%s: want a lane with sealed %s, got %q", relay.Name, sealed, m)
		}
	}
	// The thief copies the node's files while it still is a node.
	stolen := site.Path("stolen")
	copyTree(t, byLane.Data, stolen)

	for name, n := range nodes {
		ended := make(chan time.Time, 1)
		go func() {
			_, _ = io.Copy(io.Discard, conns[name])
			ended <- time.Now()
		}()
		gateway.Run("node", "revoke", name).Exits(0)
		var log []api.AuditEntry
		gateway.Run("audit", "list", "--what", "node.revoke", "--limit", "1", "-o", "json").Exits(0).JSON(&log)
		if len(log) != 1 || log[0].Object != name {
			t.Fatalf("audit log: %+v", log)
		}
		select {
		case at := <-ended:
			if took := at.Sub(log[0].Time); took > cutWithin {
				t.Errorf("%s: its connection ended %v after the revocation", name, took)
			} else {
				t.Logf("%s: its connection ended %v after the revocation", name, took)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: its connection goes on", name)
		}
		harness.Eventually(t, cutWithin, name+"'s channel is cut", holdsNodes(map[string]*harness.RCP{"by-lane": lanes, "by-sealed": sealing}[name], 1))
		harness.Eventually(t, 5*time.Second, name+" knows", func() error {
			s, err := status(n.Role)
			if err == nil && s.State != "revoked" {
				err = errors.New(s.State + ": " + s.Reason)
			}
			return err
		})
	}
	var list []api.Revocation
	gateway.Run("revocation", "list", "-o", "json").Exits(0).JSON(&list)
	names := map[string]bool{} // they were revoked in any order
	for _, r := range list {
		names[r.Name] = true
	}
	if len(list) != 2 || !names["by-sealed"] || !names["by-lane"] || list[0].Revoked.Before(list[1].Revoked) || !list[0].InForce || list[0].Role != wire.RoleNode || list[0].Reason == "" || !strings.HasPrefix(list[0].Fingerprint, "SHA256:") {
		t.Errorf("revocation list: %+v", list)
	}

	// Nobody is there to ask any more.
	gateway.Kill()
	byLane.Kill()
	bySealed.Kill()
	lanes.Kill()
	lanes.Start()
	harness.Eventually(t, 45*time.Second, "a good node is back without a gateway", holdsNodes(lanes, 1))
	thief := site.Node(gateway, "thief", harness.Env("SALLYPORT_DATA", stolen), harness.Env("SALLYPORT_NODE_JOIN", ""), harness.Env("SALLYPORT_NODE_CARRIER", "h2"),
		harness.Env("SALLYPORT_NODE_UPSTREAMS", lanes.Address+";"+sealing.Address))
	for _, relay := range []*harness.RCP{lanes, sealing} {
		harness.Eventually(t, 30*time.Second, relay.Name+" refuses the thief", func() error {
			s, err := localDetail(thief.Role)
			if err != nil {
				return err
			}
			for _, u := range s.Upstreams {
				if u.Address == relay.Address && u.State != "connected" && u.Error != "" {
					return nil
				}
			}
			return fmt.Errorf("upstreams of the thief: %+v", s.Upstreams)
		})
		harness.Holds(t, 2*time.Second, relay.Name+" holds the good node only", holdsNodes(relay, 1))
		if !strings.Contains(relay.Log(), "revoked") {
			t.Errorf("%s does not say why it refused", relay.Name)
		}
	}

	// A revoked RCP, which was away when it was revoked, finds no node that
	// takes it, although it holds the older set and no gateway is there.
	sealing.Kill()
	gateway.Start()
	gateway.WaitAPI()
	other.WaitRunning(60 * time.Second)
	var removal api.Removal
	gateway.Run("rcp", "remove", "dmz-2", "-o", "json").Exits(0).JSON(&removal)
	harness.Eventually(t, 30*time.Second, "the node has the newer set", func() error { return keepsSet(other, removal.Revocations) })
	gateway.Kill()
	other.Kill()
	other.Start()
	sealing.Start()
	harness.Eventually(t, 45*time.Second, "the node is back at the good RCP", holdsNodes(lanes, 1))
	harness.Eventually(t, 30*time.Second, "the node refuses the revoked RCP", func() error {
		s, err := localDetail(other.Role)
		if err != nil {
			return err
		}
		for _, u := range s.Upstreams {
			if u.Address == sealing.Address && strings.Contains(u.Error, "revoked") {
				return nil
			}
		}
		return fmt.Errorf("upstreams: %+v", s.Upstreams)
	})
}

// echoes sends n bytes and wants them back.
func echoes(c net.Conn, n int64) error {
	sent := make(chan error, 1)
	go func() {
		_, err := io.CopyN(c, answer(), n)
		sent <- err
	}()
	_, err := io.CopyN(io.Discard, c, n)
	return errors.Join(err, <-sent)
}

// keepsSet wants a node to have a revocation set on its disk.
func keepsSet(n *harness.Node, number int64) error {
	found, err := filepath.Glob(filepath.Join(n.Data, "node", "*", "identity", "revocations.json"))
	if err != nil || len(found) != 1 {
		return fmt.Errorf("sets on disk: %v, %w", found, err)
	}
	b, err := os.ReadFile(found[0])
	if err != nil {
		return err
	}
	var env wire.Envelope
	var set wire.Revocations
	if err := json.Unmarshal(b, &env); err != nil {
		return err
	}
	if err := json.Unmarshal(env.Payload, &set); err != nil {
		return err
	}
	if set.Number != number {
		return fmt.Errorf("it has set %d, want %d", set.Number, number)
	}
	return nil
}
