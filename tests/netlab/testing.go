package netlab

import (
	"context"
	"os"
)

// TB is what New needs of a test.
type TB interface {
	Helper()
	Context() context.Context
	Cleanup(func())
	Skipf(format string, args ...any)
	Fatalf(format string, args ...any)
	Errorf(format string, args ...any)
}

// New builds a lab for the length of a test. Where none can be built the test
// is skipped; with CI=true it fails.
func New(t TB, networks ...Network) *Lab {
	t.Helper()
	if err := Available(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("CI=true, but no network lab: %v", err)
		}
		t.Skipf("no network lab: %v", err)
	}
	lab, err := Open(t.Context(), networks...)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Errorf("close the network lab: %v", err)
		}
	})
	return lab
}
