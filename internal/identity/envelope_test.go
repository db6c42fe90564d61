package identity_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

func TestEnvelope(t *testing.T) {
	ca := identitytest.NewCA(t)
	gw, node, rcp := ca.Party(t, wire.RoleGateway), ca.Party(t, wire.RoleNode), ca.Party(t, wire.RoleRCP)
	doc := wire.Desired{Node: node.ID(), Name: "web"}
	env, err := gw.Sign(wire.TypeDesired, doc)
	if err != nil {
		t.Fatal(err)
	}
	var got wire.Desired
	peer, err := node.VerifyEnvelope(env, wire.TypeDesired, wire.RoleGateway, &got)
	if err != nil || got.Name != "web" || peer.Party.ID != gw.ID() {
		t.Fatalf("%+v %v %v", got, peer, err)
	}
	for name, c := range map[string]struct {
		change func(*wire.Envelope)
		typ    string
		want   error
	}{
		"payload":          {func(e *wire.Envelope) { e.Payload = bytes.Replace(e.Payload, []byte("web"), []byte("wob"), 1) }, wire.TypeDesired, identity.ErrSignature},
		"type of envelope": {func(e *wire.Envelope) { e.Type = wire.TypeAction }, wire.TypeAction, identity.ErrSignature},
		"type wanted":      {func(*wire.Envelope) {}, wire.TypeAction, identity.ErrSignature},
		"signature":        {func(e *wire.Envelope) { e.Signature = nil }, wire.TypeDesired, identity.ErrSignature},
		"chain":            {func(e *wire.Envelope) { e.Chain = e.Chain[:1] }, wire.TypeDesired, identity.ErrUntrusted},
		"another's chain":  {func(e *wire.Envelope) { e.Chain = rcp.Chain()[:2] }, wire.TypeDesired, identity.ErrSignature},
		"no chain":         {func(e *wire.Envelope) { e.Chain = nil }, wire.TypeDesired, nil},
		"long chain":       {func(e *wire.Envelope) { e.Chain = make([][]byte, 1000) }, wire.TypeDesired, nil},
	} {
		e := env
		c.change(&e)
		if _, err := node.VerifyEnvelope(e, c.typ, wire.RoleGateway, &got); err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	forged, err := rcp.Sign(wire.TypeDesired, doc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := node.VerifyEnvelope(forged, wire.TypeDesired, wire.RoleGateway, &got); !errors.Is(err, identity.ErrWrongRole) {
		t.Errorf("signed by an RCP: %v", err)
	}
	if _, err := ca.Pending(t, wire.RoleGateway).Sign(wire.TypeDesired, doc); !errors.Is(err, identity.ErrNoCertificate) {
		t.Errorf("signed without a certificate: %v", err)
	}
	if _, err := node.ApplyRevocations(ca.Revoke(t, 1, gw.KeyHash())); err != nil {
		t.Fatal(err)
	}
	if _, err := node.VerifyEnvelope(env, wire.TypeDesired, wire.RoleGateway, &got); !errors.Is(err, identity.ErrRevoked) {
		t.Errorf("signed by a revoked gateway: %v", err)
	}
}

func TestPAESeparates(t *testing.T) {
	a := identity.AppendPAE(nil, "a b", []byte("c"))
	b := identity.AppendPAE(nil, "a", []byte("b c"))
	if bytes.Equal(a, b) {
		t.Errorf("two documents have one encoding: %q", a)
	}
	if got := string(identity.AppendPAE(nil, "http://example.com/HelloWorld", []byte("hello world"))); got != "DSSEv1 29 http://example.com/HelloWorld 11 hello world" {
		t.Errorf("not the encoding of the DSSE specification: %q", got)
	}
}

func TestRevocations(t *testing.T) {
	ca, foreign := identitytest.NewCA(t), identitytest.NewCA(t)
	node, gw := ca.Party(t, wire.RoleNode), ca.Party(t, wire.RoleGateway)
	victim := wire.KeyHash(strings.Repeat("ab", 32))
	five := ca.Revoke(t, 5, victim)
	changed := node.Changed()
	if newer, err := node.ApplyRevocations(five); err != nil || !newer {
		t.Fatalf("%v %v", newer, err)
	}
	select {
	case <-changed:
	default:
		t.Error("a new set did not close Changed")
	}
	if newer, err := node.ApplyRevocations(five); err != nil || newer {
		t.Errorf("the same set again: %v %v", newer, err)
	}
	if _, err := node.ApplyRevocations(ca.Revoke(t, 4)); !errors.Is(err, identity.ErrOlder) {
		t.Errorf("an older set: %v", err)
	}
	if _, err := node.ApplyRevocations(foreign.Revoke(t, 9)); !errors.Is(err, identity.ErrUntrusted) {
		t.Errorf("a set of another CA: %v", err)
	}
	byGateway, err := gw.Sign(wire.TypeRevocations, wire.Revocations{TrustDomain: ca.TrustDomain, Number: 10})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := node.ApplyRevocations(byGateway); !errors.Is(err, identity.ErrUntrusted) {
		t.Errorf("a set signed by a gateway: %v", err)
	}
	again := reopen(t, node)
	n, env := again.Revocations()
	if n != 5 || env == nil || !again.Revoked(victim) || again.Revoked(gw.KeyHash()) {
		t.Errorf("after restart: number %d, revoked %v", n, again.Revoked(victim))
	}
	if other := ca.Party(t, wire.RoleRCP); env != nil {
		if newer, err := other.ApplyRevocations(*env); err != nil || !newer {
			t.Errorf("handed on: %v %v", newer, err)
		}
	}
}

func FuzzEnvelope(f *testing.F) {
	ca := identitytest.NewCA(f)
	gw, node := ca.Party(f, wire.RoleGateway), ca.Party(f, wire.RoleNode)
	env, err := gw.Sign(wire.TypeDesired, wire.Desired{Name: "seed"})
	if err != nil {
		f.Fatal(err)
	}
	seed, err := json.Marshal(env)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, b []byte) {
		var e wire.Envelope
		if json.Unmarshal(b, &e) != nil {
			return
		}
		var d wire.Desired
		if _, err := node.VerifyEnvelope(e, wire.TypeDesired, wire.RoleGateway, &d); err == nil && !bytes.Equal(e.Payload, env.Payload) {
			t.Fatalf("a payload that nobody signed was accepted: %s", e.Payload)
		}
		_, _ = node.ApplyRevocations(e)
	})
}

func FuzzParseCSR(f *testing.F) {
	id, err := identity.Open(f.TempDir(), wire.RoleNode)
	if err != nil {
		f.Fatal(err)
	}
	der, err := id.CSR(false)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(der)
	f.Fuzz(func(t *testing.T, b []byte) {
		if pub, key, err := identity.ParseCSR(b); err == nil && (pub == nil || len(key) != 64) {
			t.Fatalf("accepted without a key: %v %q", pub, key)
		}
	})
}
