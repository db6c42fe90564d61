package pki_test

import (
	"crypto/x509"
	"net/http"
	"strings"
	"testing"

	"sallyport/internal/wire"
)

// TestExternalInTrouble: what keeps the external CA from issuing is known to
// those who look at the state, and that it is over too.
func TestExternalInTrouble(t *testing.T) {
	s := newStranger(t)
	a := open(t, t.TempDir(), s.option())
	defer closeIt(t, a)
	expect := func(when, problem string) {
		t.Helper()
		err := a.Reach(t.Context())
		st := a.State()
		if (problem == "") != (err == nil) || (problem == "") != (st.Problem == "") || !strings.Contains(st.Problem, problem) || st.Since.IsZero() != (problem == "") {
			t.Errorf("%s: %v, state %q since %v", when, err, st.Problem, st.Since)
		}
	}
	ask := func() {
		t.Helper()
		if chain, err := a.Issue(t.Context(), request(t, a, fresh(t, a, wire.RoleNode), "web-1")); err == nil {
			t.Errorf("it is issued, with a chain of %d", len(chain))
		}
	}
	expect("all is well", "")
	s.broken.Store(http.StatusForbidden)
	ask()
	expect("one certificate is refused", "")
	for _, status := range []int64{http.StatusUnauthorized, http.StatusInternalServerError} {
		s.broken.Store(status)
		ask()
		expect("it refuses", "refuses: not today")
		expect("it refuses still", "refuses: not today")
		s.broken.Store(0)
		expect("it issues again", "")
	}
	f := func(c *x509.Certificate) { c.DNSNames = nil }
	s.twist.Store(&f)
	ask()
	expect("its template was changed", "look at the provisioner's template")
	s.twist.Store(nil)
	expect("and changed back", "")
	s.server.Close()
	expect("it is away", "connection refused")
}
