package node

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"

	"sallyport/internal/wire"
)

// TestOneChangeOfIdentityAtATime: of words that come at once one is taken, and
// the node shows the code of that one. With another's it would stay outside.
func TestOneChangeOfIdentityAtATime(t *testing.T) {
	p := newPlant(t)
	in := p.node().in()
	const words = 4
	codes := map[string]string{}
	var mu sync.Mutex
	var taken []string
	var all sync.WaitGroup
	begin := make(chan struct{})
	for range words {
		id := string(wire.NewID())
		code, err := wire.JoinCode{TrustDomain: p.ca.TrustDomain, Root: wire.KeyOf(p.ca.Root), Role: wire.RoleNode, Name: "web", TokenID: id, Token: "secret"}.Encode()
		if err != nil {
			t.Fatal(err)
		}
		codes[code] = id
		env, err := p.gateway.Sign(wire.TypeReidentify, wire.Reidentify{Node: in.id.ID(), Installation: installation, Join: code})
		if err != nil {
			t.Fatal(err)
		}
		body, err := json.Marshal(env)
		if err != nil {
			t.Fatal(err)
		}
		all.Go(func() {
			<-begin
			w := httptest.NewRecorder()
			in.takeReidentify(w, httptest.NewRequestWithContext(t.Context(), http.MethodPost, wire.PathReidentify, bytes.NewReader(body)))
			if w.Code == http.StatusNoContent {
				mu.Lock()
				defer mu.Unlock()
				taken = append(taken, codes[code])
			}
		})
	}
	close(begin)
	all.Wait()
	joins, err := in.join.Codes()
	if err != nil || len(joins) == 0 {
		t.Fatal(joins, err)
	}
	if len(taken) != 1 || joins[0].Code.TokenID != taken[0] {
		t.Errorf("taken %v, shown %s", taken, joins[0].Code.TokenID)
	}
}

// TestNoRenewalForWhoItWas: a renewal that has begun when the node becomes another,
// as each does in a rollover, gets none of its new keys. The gateway would write it
// down as one of the old node's and refuse the new one, which has no other, for ever.
func TestNoRenewalForWhoItWas(t *testing.T) {
	p := newPlant(t)
	in := p.node().in()
	for _, rekey := range []bool{false, true} {
		ask := func() *httptest.ResponseRecorder {
			body, err := json.Marshal(wire.CSRRequest{Rekey: rekey})
			if err != nil {
				t.Fatal(err)
			}
			w := httptest.NewRecorder()
			in.newSessionAPI().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodPost, wire.PathCSR, bytes.NewReader(body)))
			return w
		}
		if w := ask(); w.Code != http.StatusOK {
			t.Fatalf("before: %d %s", w.Code, w.Header().Get(wire.HeaderError))
		}
		if err := in.id.Reidentify(); err != nil {
			t.Fatal(err)
		}
		if w := ask(); w.Code != http.StatusConflict || w.Body.Len() > 0 {
			t.Errorf("rekey %t: %d %q", rekey, w.Code, w.Body)
		}
		p.ca.Certify(t, in.id)
	}
}
