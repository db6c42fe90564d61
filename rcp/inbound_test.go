package rcp

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"sallyport/internal/wire"
)

// TestClientsOfAClosedRCP: see the node's.
func TestClientsOfAClosedRCP(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(func(cfg *Config) { cfg.ProxyListen = "127.0.0.1:0" })
	expect := func(reason string) {
		t.Helper()
		req := httptest.NewRequestWithContext(t.Context(), http.MethodConnect, "acme:443", nil)
		req.RemoteAddr = "10.0.0.1:5"
		rec, began := httptest.NewRecorder(), time.Now()
		r.lot.ServeHTTP(rec, req)
		if rec.Code != http.StatusServiceUnavailable || !strings.Contains(rec.Body.String(), reason) || time.Since(began) > 10*time.Second {
			t.Errorf("after %s: %d %s; want that %s", time.Since(began), rec.Code, rec.Body, reason)
		}
	}
	if why := r.closedToClients(); why != "" {
		t.Fatalf("closed: %s", why)
	}
	r.setDraining(&wire.Drain{})
	expect("drained")
	r.setDraining(nil)
	if _, err := r.id.ApplyRevocations(p.ca.Revoke(t, 1, r.id.KeyHash())); err != nil {
		t.Fatal(err)
	}
	expect("the RCP is revoked")
}
