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

	"sallyport/gateway/api"
	"sallyport/internal/wire"
	"sallyport/tests/harness"
)

// noKeys fails when a CA key lies below a directory.
func noKeys(t *testing.T, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && (d.Name() == "pki" || strings.HasSuffix(d.Name(), ".key")) {
			t.Errorf("%s lies on the gateway's host", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestAuthorityOfItsOwn: with `run pki` the gateway holds no CA key, and
// enrols, renews and revokes as ever (PK-13). While the authority is away all
// that is enrolled works on; what needs it is done when it is back.
func TestAuthorityOfItsOwn(t *testing.T) {
	harness.LongWait(t)
	site := harness.New(t)
	secret := site.File("pki.pass", "correct horse battery\n")
	authority := site.PKI(harness.Env("SALLYPORT_PKI_PASSPHRASE_FILE", secret))
	gateway := site.Gateway(authority.Serves())
	site.RCP(gateway, "dmz-1")
	first := site.Node(gateway, "web-1")
	first.WaitRunning(runningWithin)
	gateway.Run("node", "renew", "web-1").Exits(0)
	noKeys(t, gateway.Data)

	authority.Kill()
	gateway.Run("action", "run", "--node", "web-1", "--", "/bin/true").Exits(0)
	second := site.Node(gateway, "web-2")
	harness.Eventually(t, 15*time.Second, "the request is granted, though nobody can issue", func() error {
		requests, err := gateway.Requests()
		for _, r := range requests {
			if r.Name == "web-2" && r.State == "granted" {
				return nil
			}
		}
		return errors.Join(err, fmt.Errorf("no granted request in %+v", requests))
	})
	gateway.Run("node", "renew", "web-1").Exits(1)
	gateway.Stop()
	gateway.Start()
	gateway.WaitAPI()
	first.WaitRunning(runningWithin)

	authority.Start()
	second.WaitRunning(90 * time.Second)
	gateway.Run("node", "revoke", "web-1").Exits(0)
	first.WaitState(15*time.Second, "revoked")
	harness.Eventually(t, 15*time.Second, "the node knows that it is revoked", func() error {
		s, err := status(first.Role)
		if err == nil && !strings.Contains(s.Reason, "revoked") {
			err = fmt.Errorf("%s: %s", s.State, s.Reason)
		}
		return err
	})
	noKeys(t, gateway.Data)

	// A gateway that its authority no longer knows: nodes keep it out too, as
	// soon as a gateway that remains spreads the word.
	var all []struct {
		ID wire.ID `json:"id"`
	}
	authority.Run("ca", "gateway", "list", "-o", "json").Exits(0).JSON(&all)
	if len(all) != 1 {
		t.Fatalf("the authority knows %d gateways", len(all))
	}
	authority.Run("ca", "gateway", "remove", string(all[0].ID)).Exits(0)
	gateway.Run("node", "renew", "web-2").Exits(1)
}

// TestAuthorityMovesOut: an installation whose gateway held the CA gives it to
// a process of its own; no party enrols again.
func TestAuthorityMovesOut(t *testing.T) {
	harness.LongWait(t)
	site := harness.New(t)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1")
	node.WaitRunning(runningWithin)
	before, err := gateway.Node("web-1")
	if err != nil {
		t.Fatal(err)
	}
	gateway.Stop()
	copyTree(t, filepath.Join(gateway.Data, "pki"), filepath.Join(site.Path("pki"), "pki"))
	if err := os.RemoveAll(filepath.Join(gateway.Data, "pki")); err != nil {
		t.Fatal(err)
	}
	authority := site.PKI()
	gateway.SetEnv("SALLYPORT_GATEWAY_PKI", authority.Address)
	gateway.SetEnv("SALLYPORT_GATEWAY_PKI_CODE_FILE", site.File("moved.code", authority.Run("ca", "gateway", "add").Exits(0).Stdout))
	gateway.Start()
	gateway.WaitAPI()
	harness.Eventually(t, 30*time.Second, "the node is renewed", func() error { return gateway.Run("node", "renew", "web-1").Err() })
	var after api.Node
	if after, err = gateway.Node("web-1"); err != nil || after.ID != before.ID {
		t.Errorf("the node is %s, was %s: %v", after.ID, before.ID, err)
	}
	noKeys(t, gateway.Data)
}
