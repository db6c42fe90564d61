package identity_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

func trustDoc(ca *identitytest.CA, number int64, others ...*identitytest.CA) wire.Trust {
	doc := wire.Trust{TrustDomain: ca.TrustDomain, Number: number, Issued: time.Now().UTC(), Roots: [][]byte{ca.Root.Raw}}
	for _, o := range others {
		doc.Roots = append(doc.Roots, o.Root.Raw)
	}
	return doc
}

func TestApplyTrust(t *testing.T) {
	ca, next, foreign := identitytest.NewCA(t), identitytest.NewCA(t), identitytest.NewCA(t)
	id := ca.Party(t, wire.RoleNode)
	if n, env := id.Trust(); n != 0 || env != nil {
		t.Errorf("trust document %d before the first", n)
	}
	changed := id.Changed()
	cert, err := id.Certificate()
	if err != nil {
		t.Fatal(err)
	}
	if newer, err := id.ApplyTrust(ca.Seal(t, wire.TypeTrust, trustDoc(ca, 3, next))); err != nil || !newer {
		t.Fatalf("the first: %v %v", newer, err)
	}
	<-changed
	if now, err := id.Certificate(); err != nil || now != cert {
		t.Error("the certificate counts as another: everybody would connect anew")
	}
	// A root that was vouched for vouches in its turn only for its own trust domain.
	if _, err := id.ApplyTrust(foreign.Seal(t, wire.TypeTrust, trustDoc(ca, 9, foreign))); !errors.Is(err, identity.ErrUntrusted) {
		t.Errorf("sealed by a stranger: %v", err)
	}
	if newer, err := id.ApplyTrust(ca.Seal(t, wire.TypeTrust, trustDoc(ca, 3, next))); err != nil || newer {
		t.Errorf("the same again: %v %v", newer, err)
	}
	if _, err := id.ApplyTrust(ca.Seal(t, wire.TypeTrust, trustDoc(ca, 2))); !errors.Is(err, identity.ErrOlder) {
		t.Errorf("a lower number: %v", err)
	}
	if err := id.Pin(wire.KeyOf(next.Root), ca.TrustDomain); err != nil {
		t.Errorf("a join code that pins the new root: %v", err)
	}
	if err := id.Pin(wire.KeyOf(foreign.Root), ca.TrustDomain); !errors.Is(err, identity.ErrWrongTrustDomain) {
		t.Errorf("a join code that pins a foreign root: %v", err)
	}
	again, err := identity.Open(id.Dir(), wire.RoleNode)
	if err != nil {
		t.Fatal(err)
	}
	if n, _ := again.Trust(); n != 3 || !again.Roots().Equal(id.Roots()) {
		t.Errorf("after a restart: number %d", n)
	}
}

func TestRefusesTrust(t *testing.T) {
	ca := identitytest.NewCA(t)
	gateway := ca.Party(t, wire.RoleGateway)
	byGateway, err := gateway.Sign(wire.TypeTrust, trustDoc(ca, 1))
	if err != nil {
		t.Fatal(err)
	}
	with := func(change func(*wire.Trust)) wire.Envelope {
		doc := trustDoc(ca, 1)
		change(&doc)
		return ca.Seal(t, wire.TypeTrust, doc)
	}
	altered := with(func(*wire.Trust) {})
	altered.Payload = []byte(strings.Replace(string(altered.Payload), `"number":1`, `"number":2`, 1))
	for name, c := range map[string]struct {
		env  wire.Envelope
		want error
	}{
		"a gateway's word":     {byGateway, identity.ErrUntrusted},
		"a revocation set":     {ca.Revoke(t, 1), identity.ErrSignature},
		"altered":              {altered, identity.ErrSignature},
		"another trust domain": {with(func(d *wire.Trust) { d.TrustDomain = "x.sallyport" }), identity.ErrWrongTrustDomain},
		"no number":            {with(func(d *wire.Trust) { d.Number = 0 }), nil},
		"no roots":             {with(func(d *wire.Trust) { d.Roots = nil }), nil},
		"too many roots":       {with(func(d *wire.Trust) { d.Roots = append(d.Roots, d.Roots[0], d.Roots[0], d.Roots[0]) }), nil},
		"an intermediate":      {with(func(d *wire.Trust) { d.Roots[0] = ca.Inter.Raw }), nil},
		"a leaf":               {with(func(d *wire.Trust) { d.Roots[0] = gateway.Chain()[0] }), nil},
		"rubbish":              {with(func(d *wire.Trust) { d.Roots[0] = []byte("root") }), nil},
	} {
		id := ca.Party(t, wire.RoleRCP)
		if _, err := id.ApplyTrust(c.env); err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if n, _ := id.Trust(); n != 0 {
			t.Errorf("%s is in force", name)
		}
	}
	if _, err := ca.Pending(t, wire.RoleNode).ApplyTrust(ca.Seal(t, wire.TypeTrust, trustDoc(ca, 1))); !errors.Is(err, identity.ErrNotPinned) {
		t.Errorf("a party without roots: %v", err)
	}
	// What lies on disk is damage when it does not hold together.
	id := ca.Party(t, wire.RoleNode)
	b, err := json.Marshal(altered)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(id.Dir(), "trust.json"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := identity.Open(id.Dir(), wire.RoleNode); !errors.Is(err, identity.ErrDamaged) {
		t.Errorf("an altered document on disk: %v", err)
	}
}

// A document comes from a peer: whatever it holds, it is refused or whole.
func FuzzVerifyTrust(f *testing.F) {
	ca := identitytest.NewCA(f)
	id := ca.Party(f, wire.RoleNode)
	good, err := json.Marshal(ca.Seal(f, wire.TypeTrust, trustDoc(ca, 1)))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"type":"sallyport/trust/1","payload":"e30=","chain":[],"signature":""}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var env wire.Envelope
		if json.Unmarshal(b, &env) != nil {
			return
		}
		if _, err := id.ApplyTrust(env); err == nil {
			if n, held := id.Trust(); n != 1 || held == nil {
				t.Errorf("number %d is in force", n)
			}
		}
	})
}
