package gateway

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"math/big"
	"net/http/httptest"
	"reflect"
	"testing"
	"time"

	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

// bundled is a bundle as its readers see it.
type bundled struct {
	Keys     []map[string]any `json:"keys"`
	Sequence int64            `json:"spiffe_sequence"`
	Refresh  int              `json:"spiffe_refresh_hint"`
}

type bundleCA struct{ *rollingCA }

func (bundleCA) IssueGateway(context.Context, wire.ID, []byte) ([][]byte, error) { return nil, nil }
func (c bundleCA) TrustDomain() string                                           { return c.CA.TrustDomain }

// A bundle holds roots of every kind that an authority may have, and each list
// of roots has a sequence number above that of the one before.
func TestTrustBundle(t *testing.T) {
	t.Parallel()
	ca := &rollingCA{memoryCA: &memoryCA{CA: identitytest.NewCA(t)}}
	d := &doorway{s: &Server{ca: bundleCA{ca}}, log: testLog(t)}
	read := func() (b bundled) {
		t.Helper()
		req := httptest.NewRequestWithContext(t.Context(), "GET", "https://doors.sallyport/spiffe/bundle.json", nil)
		req.TLS = &tls.ConnectionState{}
		w := httptest.NewRecorder()
		d.serveBundle(w, req)
		if err := json.Unmarshal(w.Body.Bytes(), &b); err != nil || w.Code != 200 || b.Refresh <= 0 {
			t.Fatalf("%d %s: %v", w.Code, w.Body, err)
		}
		return b
	}
	first := read()
	if len(first.Keys) != 1 || first.Keys[0]["kty"] != "EC" {
		t.Fatalf("before any rollover: %+v", first)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	point, err := p384.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	text := base64.RawURLEncoding.EncodeToString
	doc := wire.Trust{Number: 1, Roots: [][]byte{ca.Root().Raw}}
	for _, key := range []crypto.Signer{p384, rsa2048, ed} {
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		doc.Roots = append(doc.Roots, der)
	}
	payload, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	ca.env = &wire.Envelope{Payload: payload}
	next := read()
	if next.Sequence <= first.Sequence || first.Sequence < 1 || len(next.Keys) != len(doc.Roots) {
		t.Fatalf("after a rollover: sequence %d, was %d; %d keys", next.Sequence, first.Sequence, len(next.Keys))
	}
	for i, want := range []map[string]any{
		{"kty": "EC", "crv": "P-256"},
		{"kty": "EC", "crv": "P-384", "x": text(point[1:49]), "y": text(point[49:])},
		{"kty": "RSA", "e": "AQAB", "n": text(rsa2048.N.Bytes())},
		{"kty": "OKP", "crv": "Ed25519", "x": text(ed.Public().(ed25519.PublicKey))},
	} {
		k := next.Keys[i]
		want["use"], want["x5c"] = "x509-svid", []any{base64.StdEncoding.EncodeToString(doc.Roots[i])}
		for name, v := range want {
			if !reflect.DeepEqual(k[name], v) {
				t.Errorf("key %d: %s is %v, want %v", i, name, k[name], v)
			}
		}
		if k["kid"] != nil {
			t.Errorf("key %d has a name, which is for JWT-SVIDs", i)
		}
	}
}
