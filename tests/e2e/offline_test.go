package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sallyport/gateway/api"
	"sallyport/tests/harness"
)

// TestOfflineIssue: a host without any network makes its key and a request, a
// file goes to the gateway and one comes back, and the node that is started
// afterwards dials with its certificate. Another host gets key and all in an
// encrypted bundle.
func TestOfflineIssue(t *testing.T) {
	harness.LongWait(t)
	site := harness.New(t)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1")
	var pin api.Pin
	gateway.Run("ca", "pin", "-o", "json").Exits(0).JSON(&pin)

	host := func(name string) map[string]string {
		data := site.Path(name)
		if err := os.MkdirAll(data, 0o755); err != nil {
			t.Fatal(err)
		}
		return map[string]string{"SALLYPORT_DATA": data, "SALLYPORT_NODE_NAME": name, "SALLYPORT_NODE_TAGS": "role=vault"}
	}
	vault := host("vault-1")
	request, answer := site.Path("request.pem"), site.Path("answer.pem")
	site.Run(vault, "local", "csr", request).Exits(2) // whom to trust is not known
	site.Run(vault, "local", "csr", request, "--ca-pin", pin.Root).Exits(0)
	again := site.Run(vault, "local", "csr").Exits(0) // the key is made once

	var queued api.Request
	gateway.Run("request", "import", request, "-o", "json").Exits(0).JSON(&queued)
	if queued.Source != "file" || queued.State != "pending" || !strings.Contains(again.Stderr, queued.Fingerprint) || queued.Tags["role"] != "vault" {
		t.Errorf("queued %+v; the host says %s", queued, again.Stderr)
	}
	gateway.RunInput(again.Stdout, "request", "import", "-").Exits(0)
	gateway.Run("request", "export", queued.ID, answer).Exits(4)
	gateway.Stop()
	gateway.Start()
	gateway.WaitAPI()
	gateway.Run("request", "grant", "vault-1", "--fingerprint", queued.Fingerprint).Exits(0)
	gateway.Run("request", "export", "vault-1", answer).Exits(0)
	gateway.Run("request", "import", request).Exits(4)

	// Nobody else can install it, and another root is not what was pinned.
	stranger := host("vault-2")
	site.Run(stranger, "local", "certificate", "import", answer).Exits(4)
	site.Run(vault, "local", "certificate", "import", answer, "--ca-pin", "SHA256:"+strings.Repeat("A", 43)+"=").Exits(4)
	site.Run(vault, "local", "certificate", "import", answer, "--ca-pin", pin.Root).Exits(0)
	site.Run(vault, "local", "certificate", "import", answer).Exits(4) // it is there

	// The bundle: key and certificate, encrypted.
	passphrase := site.File("passphrase", "correct horse battery\n")
	bundle := site.Path("vault-2.bundle")
	gateway.Run("request", "bundle", "vault-2", bundle).Exits(2)
	gateway.Run("request", "bundle", "vault-2", bundle, "--passphrase-file", passphrase, "--tag", "site=vault", "--tag", "role=db").Exits(0)
	var tagged []struct{ Name string }
	gateway.Run("node", "list", "--selector", "site=vault,role=db", "-o", "json").Exits(0).JSON(&tagged)
	if len(tagged) != 1 || tagged[0].Name != "vault-2" {
		t.Errorf("nodes with the tags of the bundle: %+v", tagged)
	}
	if b, err := os.ReadFile(bundle); err != nil || strings.Contains(string(b), "PRIVATE") || strings.Contains(string(b), "vault-2") {
		t.Errorf("the bundle is not encrypted (%v)", err)
	}
	wrong := site.File("wrong", "incorrect horse battery\n")
	site.Run(stranger, "local", "certificate", "import", bundle, "--passphrase-file", wrong).Exits(4)
	site.Run(stranger, "local", "certificate", "import", bundle, "--passphrase-file", passphrase).Exits(0)

	first := site.Node(gateway, "vault-1", harness.Env("SALLYPORT_NODE_JOIN", ""))
	second := site.Node(gateway, "vault-2", harness.Env("SALLYPORT_NODE_JOIN", ""), harness.Slim())
	first.WaitRunning(runningWithin)
	second.WaitRunning(runningWithin)
	s, err := status(first.Role)
	if err != nil || s.Fingerprint != queued.Fingerprint || s.Name != "vault-1" {
		t.Errorf("%+v, %v; want the key %s", s, err, queued.Fingerprint)
	}
	site.Run(vault, "local", "csr").Exits(4) // it runs
	left, err := filepath.Glob(filepath.Join(first.Data, "node", "*", "identity", "imported.json"))
	if err != nil || len(left) != 0 {
		t.Errorf("the imported verdict was not taken over: %v, %v", left, err)
	}
}
