package gateway

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"net/http"

	"sallyport/internal/wire"
)

// bundleRefresh is how often holders of the bundle should look for a newer
// one, in seconds.
const bundleRefresh = 3600

// bundleKey is one root as a JWK (RFC 7517; SPIFFE trust domain and bundle,
// 4.2.1).
type bundleKey struct {
	Kty string   `json:"kty"`
	Use string   `json:"use"`
	Crv string   `json:"crv,omitempty"`
	X   string   `json:"x,omitempty"`
	Y   string   `json:"y,omitempty"`
	N   string   `json:"n,omitempty"`
	E   string   `json:"e,omitempty"`
	X5C [][]byte `json:"x5c"`
}

// serveBundle answers with the trust bundle of our parties, as the SPIFFE
// bundle endpoint does it (https_web profile). Its sequence rises with each
// list of roots; before the first it is 1 (SPIFFE trust domain and bundle,
// 4.1.1).
func (d *doorway) serveBundle(w http.ResponseWriter, req *http.Request) {
	if req.TLS == nil {
		http.Error(w, "the trust bundle is served over https only", http.StatusForbidden)
		return
	}
	number, roots, err := d.trustedRoots()
	if err != nil {
		d.log.Error("no trust bundle", "error", err)
		http.Error(w, "no trust bundle now", http.StatusServiceUnavailable)
		return
	}
	out := struct {
		Keys     []bundleKey `json:"keys"`
		Sequence int64       `json:"spiffe_sequence"`
		Refresh  int         `json:"spiffe_refresh_hint"`
	}{Keys: []bundleKey{}, Sequence: number + 1, Refresh: bundleRefresh}
	for _, r := range roots {
		k, err := jwkOf(r)
		if err != nil {
			d.log.Error("no trust bundle", "error", err)
			http.Error(w, "no trust bundle now", http.StatusServiceUnavailable)
			return
		}
		out.Keys = append(out.Keys, k)
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(out) // the client is gone, or not
}

// trustedRoots are the root, or all of them while the authority is rolled over,
// and the number of the list; 0 before the first.
func (d *doorway) trustedRoots() (number int64, roots []*x509.Certificate, err error) {
	rolled, ok := d.s.ca.(interface{ Trust() (wire.Envelope, bool) })
	if !ok {
		return 0, []*x509.Certificate{d.s.ca.Root()}, nil
	}
	env, ok := rolled.Trust()
	if !ok {
		return 0, []*x509.Certificate{d.s.ca.Root()}, nil
	}
	var trust wire.Trust
	if err := json.Unmarshal(env.Payload, &trust); err != nil {
		return 0, nil, err
	}
	for _, der := range trust.Roots {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return 0, nil, err
		}
		roots = append(roots, c)
	}
	return trust.Number, roots, nil
}

func jwkOf(root *x509.Certificate) (bundleKey, error) {
	k := bundleKey{Use: "x509-svid", X5C: [][]byte{root.Raw}}
	number := func(n *big.Int) string { return base64.RawURLEncoding.EncodeToString(n.Bytes()) }
	switch pub := root.PublicKey.(type) {
	case *ecdsa.PublicKey:
		point, err := pub.Bytes() // 4, x, y (SEC 1, 2.3.3)
		if err != nil {
			return k, fmt.Errorf("root %s: %w", root.Subject, err)
		}
		half := (len(point) - 1) / 2
		k.Kty, k.Crv = "EC", pub.Params().Name
		k.X, k.Y = base64.RawURLEncoding.EncodeToString(point[1:1+half]), base64.RawURLEncoding.EncodeToString(point[1+half:])
	case *rsa.PublicKey:
		k.Kty, k.N, k.E = "RSA", number(pub.N), number(big.NewInt(int64(pub.E)))
	case ed25519.PublicKey: // of a root that is kept elsewhere (RFC 8037, 2)
		k.Kty, k.Crv, k.X = "OKP", "Ed25519", base64.RawURLEncoding.EncodeToString(pub)
	default:
		return k, fmt.Errorf("root %s has a key of type %T", root.Subject, pub)
	}
	return k, nil
}
