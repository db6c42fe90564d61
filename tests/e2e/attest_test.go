package e2e

import (
	"strings"
	"testing"

	"sallyport/internal/attest/attesttest"
	"sallyport/tests/harness"
)

// TestDeviceCertificate: a node with a certificate of the factory's CA comes in
// through the RCP without a token, by a rule; one of another factory waits.
func TestDeviceCertificate(t *testing.T) {
	harness.LongWait(t)
	site := harness.New(t)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1")
	factory, other := attesttest.NewFactory(t, "Acme"), attesttest.NewFactory(t, "Elsewhere")
	code := site.File("plant.join", gateway.Run("join", "create", "--manual").Exits(0).Stdout)
	node := func(f *attesttest.Factory, name string) *harness.Node {
		certFile, keyFile, _ := f.Device(t, name, nil)
		return site.Node(gateway, name, harness.Env("SALLYPORT_NODE_JOIN", code),
			harness.Env("SALLYPORT_NODE_ATTESTATION_CERT", certFile), harness.Env("SALLYPORT_NODE_ATTESTATION_KEY", keyFile))
	}
	pump := node(factory, "pump-1")
	node(other, "pump-2")
	waiting := request(t, gateway, "pump-1")
	if waiting.Device == nil || !strings.Contains(waiting.Device.Subject, "CN=pump-1") {
		t.Errorf("the request shows the device %+v", waiting.Device)
	}
	foreign := request(t, gateway, "pump-2")

	ca := "    " + strings.ReplaceAll(strings.TrimSpace(string(attesttest.PEM(factory.CA))), "\n", "\n    ")
	rule := "kind: rule\nname: factory\nattestation:\n  type: x509\n  name: CN\n  ca: |\n" + ca + "\n"
	dry := gateway.RunInput(rule, "rule", "apply", "-f", "-", "--dry-run").Exits(0)
	if !strings.Contains(dry.Stdout, waiting.ID) || !strings.Contains(dry.Stdout, "CN=pump-1") || !strings.Contains(dry.Stdout, "not of these CAs") {
		t.Errorf("the rehearsal says: %s", dry.Stdout)
	}
	gateway.RunInput(rule, "rule", "apply", "-f", "-").Exits(0)
	pump.WaitRunning(runningWithin)
	if r := request(t, gateway, "pump-2"); r.ID != foreign.ID {
		t.Errorf("pump-2 waits as %s, was %s", r.ID, foreign.ID)
	}
}
