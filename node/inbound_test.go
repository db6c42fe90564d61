package node

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"sallyport/internal/wire"
)

// TestClientsOfAClosedNode: where no gateway may accept a client of the local
// proxy it hears so at once, and not after the time of a gateway that is away.
func TestClientsOfAClosedNode(t *testing.T) {
	p := newPlant(t)
	ag := p.node("SALLYPORT_NODE_PROXY_LISTEN=127.0.0.1:0")
	in := ag.in()
	expect := func(reason string) {
		t.Helper()
		req := httptest.NewRequestWithContext(t.Context(), http.MethodConnect, "acme:443", nil)
		req.RemoteAddr = "10.0.0.1:5"
		rec, began := httptest.NewRecorder(), time.Now()
		ag.a.lot.ServeHTTP(rec, req)
		if rec.Code != http.StatusServiceUnavailable || !strings.Contains(rec.Body.String(), reason) || time.Since(began) > 10*time.Second {
			t.Errorf("after %s: %d %s; want that %s", time.Since(began), rec.Code, rec.Body, reason)
		}
	}
	if why := ag.a.closedToClients(); why != "" {
		t.Fatalf("closed: %s", why)
	}
	if err := in.lock.drain("maintenance", time.Time{}); err != nil {
		t.Fatal(err)
	}
	expect("maintenance")
	if err := in.lock.resume(); err != nil {
		t.Fatal(err)
	}
	if err := in.lock.obey(installation); err != nil {
		t.Fatal(err)
	}
	if err := in.lock.obey(string(wire.NewID())); err == nil {
		t.Fatal("not locked")
	}
	expect("this node belongs to")
	if err := in.lock.unlock(""); err != nil {
		t.Fatal(err)
	}
	if _, err := in.id.ApplyRevocations(p.ca.Revoke(t, 1, in.id.KeyHash())); err != nil {
		t.Fatal(err)
	}
	expect("the node is revoked")
}
