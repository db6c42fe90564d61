package e2e

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"sallyport/tests/harness"
)

// passphraseFile writes the passphrase of a site's backups.
func passphraseFile(site *harness.Site) string {
	return site.File("passphrase", "correct horse battery staple\n")
}

// backUp makes a backup of a gateway that runs.
func backUp(t *testing.T, site *harness.Site, gateway *harness.Gateway, name string) string {
	t.Helper()
	file := site.Path(name)
	gateway.Run("backup", file, "--passphrase-file", passphraseFile(site)).Exits(0)
	return file
}

// restoreTo restores a backup into another data directory.
func restoreTo(site *harness.Site, data, file string) harness.Result {
	return site.Run(map[string]string{"SALLYPORT_DATA": data}, "restore", file, "--passphrase-file", passphraseFile(site))
}

// TestMoveTheGateway: moving to a new host is backup and restore. The RCP and
// the node are not touched, and obey the gateway where it is now (HA-07, OP-08).
func TestMoveTheGateway(t *testing.T) {
	harness.LongWait(t)
	site := harness.New(t)
	old := site.Gateway()
	relay := site.RCP(old, "dmz-1")
	node := site.Node(old, "web-1", tagged("web-1"))
	node.WaitRunning(runningWithin)
	path := site.Path("files/motd")
	old.Apply(documents("motd", "name=web-1", path, "one")).Exits(0)
	harness.Eventually(t, 10*time.Second, "the policy is applied", node.Applied)
	unused := old.Run("join", "create", "--name", "web-2").Exits(0).Stdout
	file := backUp(t, site, old, "moving.backup")
	sealed, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{"PRIVATE KEY", "CREATE TABLE", "web-1", "dmz-1"} {
		if strings.Contains(string(sealed), secret) {
			t.Errorf("%q can be read in the backup", secret)
		}
	}
	// The nodes see more than the backup knows.
	old.Apply(documents("motd", "name=web-1", path, "two")).Exits(0)
	harness.Eventually(t, 20*time.Second, "what came after the backup is applied", func() error { return errors.Join(fileHolds(path, "two"), node.Applied()) })
	was, relayed := node.PID(), relay.PID()
	before := mustStatus(t, node.Role)
	old.Kill()

	data := site.Path("elsewhere")
	restored := restoreTo(site, data, file).Exits(0)
	if !strings.Contains(restored.Stdout, "generation 2") {
		t.Errorf("restore says %q", restored.Stdout)
	}
	moved := site.Gateway(harness.Env("SALLYPORT_DATA", data))
	harness.Eventually(t, 45*time.Second, "the node runs for the gateway where it is now", func() error {
		return moved.Run("action", "run", "--node", "web-1", "--", "true").Err()
	})
	harness.Eventually(t, 45*time.Second, "the state of the backup is in force again", func() error { return fileHolds(path, "one") })
	moved.Apply(documents("motd", "name=web-1", path, "three")).Exits(0)
	harness.Eventually(t, 20*time.Second, "the node obeys", func() error { return fileHolds(path, "three") })
	node.Local("event", "send", "--severity", "minor", "after the move").Exits(0)
	harness.Eventually(t, 15*time.Second, "the node reports", func() error { return moved.HasEvent("after the move") })
	after := mustStatus(t, node.Role)
	if node.PID() != was || relay.PID() != relayed || after.ID != before.ID || after.Fingerprint != before.Fingerprint {
		t.Errorf("node %+v became %+v", before, after)
	}
	// A join code that was out is void: it may have been used after the backup.
	late := site.Node(moved, "web-2", harness.Env("SALLYPORT_NODE_JOIN", site.File("unused.join", unused)))
	harness.Eventually(t, 30*time.Second, "the old join code is refused", func() error {
		s, err := status(late.Role)
		if err == nil && !strings.Contains(s.Reason, "restored") && !strings.Contains(s.Reason, "token") {
			err = errors.New(s.State + ": " + s.Reason)
		}
		return err
	})
	// And new ones work.
	site.Node(moved, "web-3").WaitRunning(runningWithin + 20*time.Second)
}

// TestTwinGateway: the gateway that was backed up still runs when the backup is
// restored elsewhere. It stops itself when the RCP shows it the newer
// generation, does not start again, and pulls no event any more (HA-07).
func TestTwinGateway(t *testing.T) {
	harness.LongWait(t)
	site := harness.New(t)
	old := site.Gateway()
	relay := site.RCP(old, "dmz-1")
	node := site.Node(old, "web-1", tagged("web-1"))
	node.WaitRunning(runningWithin)
	file := backUp(t, site, old, "twin.backup")
	data := site.Path("elsewhere")
	restoreTo(site, data, file).Exits(0)
	moved := site.Gateway(harness.Env("SALLYPORT_DATA", data))
	if code := old.Wait(20 * time.Second); code != 4 {
		t.Errorf("the older twin ended with %d, want 4", code)
	}
	if log := old.Log(); !strings.Contains(log, "superseded") || !strings.Contains(log, "generation 2 is in use") {
		t.Errorf("the older twin does not say why:\n%s", log)
	}
	harness.Eventually(t, 45*time.Second, "the node obeys the newer one", func() error {
		return moved.Run("action", "run", "--node", "web-1", "--", "true").Err()
	})

	// It knows, although nobody tells it again.
	relay.Kill()
	old.Start()
	if code := old.Wait(20 * time.Second); code != 4 {
		t.Errorf("started again, the older twin ended with %d, want 4", code)
	}
	// A copy of the old state from before finds out from an RCP that was
	// restarted meanwhile, before it has pulled anything.
	moved.Stop()
	copied := site.Path("copied")
	restoreTo(site, copied, file).Exits(0) // generation 2 too, but later: it is the one that goes on
	relay.Start()
	third := site.Gateway(harness.Env("SALLYPORT_DATA", copied))
	harness.Eventually(t, 45*time.Second, "the node obeys the latest one", func() error {
		return third.Run("action", "run", "--node", "web-1", "--", "true").Err()
	})
	third.Stop()
	node.Local("event", "send", "--severity", "minor", "while the twins changed").Exits(0)
	moved.Start()
	if code := moved.Wait(30 * time.Second); code != 4 {
		t.Errorf("the second twin ended with %d, want 4", code)
	}
	third.Start()
	third.WaitAPI()
	harness.Eventually(t, 45*time.Second, "the event reaches the one that goes on", func() error { return third.HasEvent("while the twins changed") })
	// The way back: what is restored once more stands above all others.
	third.Stop()
	again := restoreTo(site, data, file).Exits(0)
	if !strings.Contains(again.Stdout, "generation 3") {
		t.Errorf("restore says %q", again.Stdout)
	}
	moved.Start()
	moved.WaitAPI()
	harness.Eventually(t, 45*time.Second, "the node obeys it", func() error {
		return moved.Run("action", "run", "--node", "web-1", "--", "true").Err()
	})
}
