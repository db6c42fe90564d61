package main

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"sallyport/tests/netlab"
)

// TestDemoFirewall plays the demo behind nftables. Where no network lab can be
// built it is skipped; with CI=true it fails.
func TestDemoFirewall(t *testing.T) {
	if err := netlab.Available(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("CI=true, but no network lab: %v", err)
		}
		t.Skipf("no network lab: %v", err)
	}
	cmd := exec.CommandContext(t.Context(), programUnderTest(t), "demo", "--exit", "--firewall")
	cmd.Env = environment()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"none: 0 packets", "dropped and counted"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("%q is missing in\n%s", want, out)
		}
	}
}
