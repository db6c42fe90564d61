package attest_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"sallyport/internal/attest"
	"sallyport/internal/attest/attesttest"
	"sallyport/internal/wire"
)

func statement() wire.AttestationStatement {
	return wire.AttestationStatement{Challenge: bytes.Repeat([]byte{7}, wire.ChallengeSize), Key: wire.HashSPKI([]byte("key")), Role: wire.RoleNode, ID: wire.NewID(), TrustDomain: "a.sallyport"}
}

func signed(t testing.TB, certFile, keyFile string, s wire.AttestationStatement) wire.Envelope {
	t.Helper()
	d, err := attest.Load(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	env, err := d.Sign(s)
	if err != nil {
		t.Fatal(err)
	}
	return *env
}

// TestKinds: every kind of key that devices have.
func TestKinds(t *testing.T) {
	f := attesttest.NewFactory(t, "Acme")
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ecKey, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.Signer{"rsa": rsaKey, "p384": ecKey, "ed25519": edKey} {
		s := statement()
		certFile, keyFile, leaf := f.DeviceOf(t, key, name, nil)
		chain, err := attest.Open(signed(t, certFile, keyFile, s), s)
		if err != nil || !chain[0].Equal(leaf) || len(chain) != 2 {
			t.Errorf("%s: %d certificates, %v", name, len(chain), err)
		}
	}
}

// TestStatementIsForOneSession: what was said of another key, UUID or trust
// domain, or to another challenge, proves nothing.
func TestStatementIsForOneSession(t *testing.T) {
	f := attesttest.NewFactory(t, "Acme")
	certFile, keyFile, _ := f.Device(t, "pump-1", nil)
	s := statement()
	env := signed(t, certFile, keyFile, s)
	for name, want := range map[string]func(*wire.AttestationStatement){
		"another challenge":    func(s *wire.AttestationStatement) { s.Challenge = bytes.Repeat([]byte{8}, wire.ChallengeSize) },
		"no challenge":         func(s *wire.AttestationStatement) { s.Challenge = nil },
		"another key":          func(s *wire.AttestationStatement) { s.Key = wire.HashSPKI([]byte("thief")) },
		"another UUID":         func(s *wire.AttestationStatement) { s.ID = wire.NewID() },
		"another role":         func(s *wire.AttestationStatement) { s.Role = wire.RoleRCP },
		"another trust domain": func(s *wire.AttestationStatement) { s.TrustDomain = "b.sallyport" },
	} {
		other := s
		want(&other)
		if _, err := attest.Open(env, other); !errors.Is(err, attest.ErrStatement) {
			t.Errorf("%s: %v, want ErrStatement", name, err)
		}
	}
	for name, bend := range map[string]func(*wire.Envelope){
		"changed": func(e *wire.Envelope) {
			e.Payload = bytes.Replace(e.Payload, []byte("a.sallyport"), []byte("b.sallyport"), 1)
		},
		"another device":   func(e *wire.Envelope) { e.Chain = [][]byte{f.Line.Raw} },
		"another document": func(e *wire.Envelope) { e.Type = wire.TypeReidentify },
		"no certificate":   func(e *wire.Envelope) { e.Chain = nil },
		"too many":         func(e *wire.Envelope) { e.Chain = slices7(f.Line.Raw) },
	} {
		bent := env
		bend(&bent)
		if _, err := attest.Open(bent, s); !errors.Is(err, attest.ErrStatement) {
			t.Errorf("%s: %v, want ErrStatement", name, err)
		}
	}
}

func slices7(b []byte) (out [][]byte) {
	for range 7 {
		out = append(out, b)
	}
	return out
}

func TestAnchors(t *testing.T) {
	f, other := attesttest.NewFactory(t, "Acme"), attesttest.NewFactory(t, "Elsewhere")
	now := time.Now()
	_, _, good := f.Device(t, "pump-1", nil)
	_, _, late := f.Device(t, "pump-2", func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Minute) })
	_, _, early := f.Device(t, "pump-3", func(c *x509.Certificate) { c.NotBefore = now.Add(time.Minute) })
	_, _, mute := f.Device(t, "pump-4", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement })
	check := func(name string, cas, crls []byte, revoked []string, leaf *x509.Certificate, want error) {
		t.Helper()
		a, err := attest.ParseAnchors(cas, crls, revoked)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := a.Check([]*x509.Certificate{leaf, f.Line}, now); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
	ca := attesttest.PEM(f.CA)
	soon := now.Add(time.Hour)
	check("good", ca, nil, nil, good, nil)
	check("the intermediate is trusted itself", attesttest.PEM(f.Line), nil, nil, good, nil)
	check("another factory", attesttest.PEM(other.CA), nil, nil, good, attest.ErrIssuer)
	check("expired", ca, nil, nil, late, attest.ErrTime)
	check("not yet valid", ca, nil, nil, early, attest.ErrTime)
	check("may not sign", ca, nil, nil, mute, attest.ErrIssuer)
	check("a CA", ca, nil, nil, f.Line, attest.ErrIssuer)
	check("on nobody's list", ca, f.CRLs(t, soon), nil, good, nil)
	check("on the list", ca, f.CRLs(t, soon, good), nil, good, attest.ErrRevoked)
	check("on an old list", ca, f.CRLs(t, now.Add(-time.Minute), good), nil, good, attest.ErrRevoked)
	check("an old list does not clear", ca, f.CRLs(t, now.Add(-time.Minute)), nil, good, attest.ErrUnknown)
	check("another's list does not clear", ca, other.CRLs(t, soon), nil, good, attest.ErrUnknown)
	check("named by the rule", ca, nil, []string{good.SerialNumber.Text(16)}, good, attest.ErrRevoked)
	for text, why := range map[string]string{"": "no certificate", string(attesttest.PEM(good)): "no CA certificate", string(ca) + "x": "something else"} {
		if _, err := attest.ParseAnchors([]byte(text), nil, nil); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%q: %v, want %q", text[:min(len(text), 20)], err, why)
		}
	}
}

// TestLoadNamesWhatIsWrong: a key of another certificate is found at once.
func TestLoadNamesWhatIsWrong(t *testing.T) {
	f := attesttest.NewFactory(t, "Acme")
	certFile, keyFile, _ := f.Device(t, "pump-1", nil)
	_, otherKey, _ := f.Device(t, "pump-2", nil)
	for _, c := range []struct{ cert, key, why string }{
		{certFile, otherKey, "is not the key of"}, {keyFile, keyFile, "want certificates only"}, {certFile, certFile, "no private key"},
		{certFile + "x", keyFile, "no such file"}, {certFile, keyFile + "x", "no such file"},
	} {
		if _, err := attest.Load(c.cert, c.key); err == nil || !strings.Contains(err.Error(), c.why) {
			t.Errorf("%v, want %q", err, c.why)
		}
	}
}

func FuzzOpen(f *testing.F) {
	factory := attesttest.NewFactory(f, "Acme")
	certFile, keyFile, _ := factory.Device(f, "pump-1", nil)
	s := statement()
	env := signed(f, certFile, keyFile, s)
	b, err := json.Marshal(env)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		var got wire.Envelope
		if json.Unmarshal(b, &got) != nil {
			return
		}
		if _, err := attest.Open(got, s); err == nil && !bytes.Equal(got.Payload, env.Payload) {
			t.Fatalf("a statement that the device never made: %s", got.Payload)
		}
	})
}
