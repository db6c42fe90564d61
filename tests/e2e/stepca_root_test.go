package e2e

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"sallyport/internal/wire"
	"sallyport/tests/harness"
)

// TestStepCARoot: a real step-ca gets a new root. It is followed from the moment
// that the operator names it, and not before; a node that was away for all of it
// and a join code that pins the old root lose nothing.
func TestStepCARoot(t *testing.T) {
	harness.LongWait(t)
	site := harness.New(t)
	ca := startStepCA(t, site, "corp.example")
	gateway, second := ca.plant(t)
	code := site.File("old.join", gateway.Run("join", "create", "--name", "web-3").Exits(0).Stdout)
	second.Stop()

	// The new root, beside the old one; an intermediate below it, for which the
	// old one vouches too.
	rootKey, _ := keyFile(t, site, "stepca/root-2.key")
	interKey, interKeyFile := keyFile(t, site, "stepca/intermediate-2.key")
	tmpl := &x509.Certificate{Subject: pkix.Name{CommonName: "Example Corp root 2"}}
	root := certify(t, tmpl, tmpl, &rootKey.PublicKey, rootKey)
	inter := certify(t, spiffeInter(ca.trustDomain), root, &interKey.PublicKey, rootKey)
	cross := certify(t, spiffeInter(ca.trustDomain), ca.rootCert, &interKey.PublicKey, ca.rootKey)
	rootFile := pemFile(t, site, "stepca/root-2.pem", "CERTIFICATE", root.Raw)
	crt := pemFile(t, site, "stepca/intermediate-2.pem", "CERTIFICATE", inter.Raw)
	f, err := os.OpenFile(crt, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := pem.Encode(f, &pem.Block{Type: "CERTIFICATE", Bytes: cross.Raw}); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	ca.config["root"] = []string{ca.root, rootFile}
	ca.restart(t)

	if r := gateway.Run("ca", "rotate", "root", "--yes"); r.Code != 4 || !strings.Contains(r.Stderr, "--fingerprint") {
		t.Errorf("a root of our own: %v", r)
	}
	if r := gateway.Run("ca", "rotate", "root", "--yes", "--fingerprint", strings.Repeat("0", 64)); r.Code != 4 {
		t.Errorf("a root that step-ca does not have: %v", r)
	}
	gateway.Run("ca", "rotate", "root", "--yes", "--fingerprint", fingerprint(t, rootFile)).Exits(0)
	left(t, gateway, "web-2")
	if got := caOf(gateway); got.Rollover == nil || !got.Rollover.Named || got.Trust != 1 || len(got.Roots) != 2 || got.External != ca.url {
		t.Fatalf("after it was named: %+v", got)
	}
	if r := gateway.Run("ca", "finish", "--yes", "--force"); r.Code != 4 {
		t.Errorf("finished while the old root issues: %v", r)
	}

	ca.config["crt"], ca.config["key"] = crt, interKeyFile
	ca.restart(t)
	harness.Eventually(t, 60*time.Second, "the new intermediate is taken over", func() error {
		if got := caOf(gateway); got.Rollover.Named || got.Rollover.To != wire.KeyOf(inter).Fingerprint() {
			return fmt.Errorf("%+v", got.Rollover)
		}
		return nil
	})
	left(t, gateway, "web-2")
	gateway.Run("action", "run", "--node", "web-1", "--", "/bin/true").Exits(0)
	if r := gateway.Run("ca", "finish", "--yes"); r.Code != 4 || !strings.Contains(r.Stderr, "web-2") {
		t.Errorf("finished without web-2: %v", r)
	}
	gateway.Run("ca", "finish", "--yes", "--force").Exits(0)
	gateway.Run("action", "run", "--node", "web-1", "--", "/bin/true").Exits(0)
	second.Start()
	second.WaitRunning(90 * time.Second)
	left(t, gateway, "")
	third := site.Node(gateway, "web-3", harness.Env("SALLYPORT_NODE_JOIN", code))
	third.WaitRunning(90 * time.Second)
	gateway.Run("action", "run", "--node", "web-2", "--", "/bin/true").Exits(0)
}
