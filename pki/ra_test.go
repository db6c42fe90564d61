package pki_test

import (
	"cmp"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.step.sm/crypto/jose"

	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
	"sallyport/pki"
)

// stranger is an external CA that speaks what step-ca speaks, and that a test
// can make misbehave. (The real one is in tests/e2e.)
type stranger struct {
	t        *testing.T
	url      string
	root     *x509.Certificate
	rootKey  *ecdsa.PrivateKey
	inter    *x509.Certificate
	interKey *ecdsa.PrivateKey
	key      *ecdsa.PrivateKey // of the provisioner
	keyFile  string
	crosses  []*x509.Certificate // of interKey, from other roots
	offered  []*x509.Certificate // roots that it hands out beside its own
	web      *tls.Certificate
	server   *httptest.Server
	gone     []*big.Int // what it was told to revoke
	crl      []byte     // nil: it has none
	number   int64
	noDB     bool
	says     *x509.Certificate // nil: that it issues from inter
	broken   atomic.Int64      // status of what it answers to a request to sign; 0: it signs
	twist    atomic.Pointer[func(*x509.Certificate)]
	lies     atomic.Pointer[x509.Certificate] // the root that it says it has
}

const strangerDomain = "corp.example"

func signed(t *testing.T, tmpl, parent *x509.Certificate, pub any, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	tmpl.SerialNumber = big.NewInt(time.Now().UnixNano())
	return identitytest.Sign(t, tmpl, parent, pub, key)
}

func newStranger(t *testing.T) *stranger {
	t.Helper()
	s := &stranger{t: t, rootKey: identitytest.NewKey(t), key: identitytest.NewKey(t)}
	s.root = newRoot(t, "root", s.rootKey)
	s.newIntermediate()
	block, err := x509.MarshalPKCS8PrivateKey(s.key)
	if err != nil {
		t.Fatal(err)
	}
	s.keyFile = filepath.Join(t.TempDir(), "provisioner.pem")
	if err := os.WriteFile(s.keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: block}), 0o600); err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /intermediates.pem", func(w http.ResponseWriter, _ *http.Request) {
		for _, c := range append([]*x509.Certificate{cmp.Or(s.says, s.inter)}, s.crosses...) {
			_ = pem.Encode(w, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
		}
	})
	mux.HandleFunc("POST /1.0/sign", s.sign)
	mux.HandleFunc("POST /1.0/revoke", s.revoke)
	mux.HandleFunc("GET /1.0/crl", s.serveCRL)
	mux.HandleFunc("GET /root/{sum}", func(w http.ResponseWriter, r *http.Request) {
		root := s.root
		if other := s.lies.Load(); other != nil {
			root = other
		} else {
			for _, root = range append([]*x509.Certificate{s.root}, s.offered...) {
				if sumOf(root) == r.PathValue("sum") {
					break
				}
			}
			if sumOf(root) != r.PathValue("sum") {
				w.WriteHeader(http.StatusNotFound)
				return
			}
		}
		_ = json.NewEncoder(w).Encode(map[string]string{"ca": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw}))})
	})
	server := httptest.NewUnstartedServer(mux)
	server.TLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return &tls.Config{Certificates: []tls.Certificate{*s.web}}, nil
	}}
	server.StartTLS()
	t.Cleanup(server.Close)
	s.url, s.server = server.URL, server
	return s
}

func newRoot(t *testing.T, name string, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	tmpl := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-96 * time.Hour), NotAfter: time.Now().AddDate(10, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	return signed(t, tmpl, tmpl, &key.PublicKey, key)
}

func sumOf(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}

// newIntermediate has it issue from another one, as its own server too.
func (s *stranger) newIntermediate() {
	s.interKey = identitytest.NewKey(s.t)
	s.inter, s.crosses = s.intermediate(s.root, s.rootKey, s.interKey), nil
	key := identitytest.NewKey(s.t)
	web := signed(s.t, &x509.Certificate{
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}, s.root, &key.PublicKey, s.rootKey)
	s.web = &tls.Certificate{Certificate: [][]byte{web.Raw}, PrivateKey: key}
}

func (s *stranger) intermediate(root *x509.Certificate, rootKey, key *ecdsa.PrivateKey) *x509.Certificate {
	return signed(s.t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "intermediate"}, NotBefore: time.Now().Add(-96 * time.Hour), NotAfter: time.Now().AddDate(5, 0, 0),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{{Scheme: "spiffe", Host: strangerDomain}},
	}, root, &key.PublicKey, rootKey)
}

func (s *stranger) sign(w http.ResponseWriter, r *http.Request) {
	fail := func(err error) {
		w.WriteHeader(http.StatusForbidden)
		_ = json.NewEncoder(w).Encode(map[string]string{"message": err.Error()})
	}
	var in struct {
		CSR       string    `json:"csr"`
		OTT       string    `json:"ott"`
		NotBefore time.Time `json:"notBefore"`
		NotAfter  time.Time `json:"notAfter"`
	}
	if status := s.broken.Load(); status != 0 {
		w.WriteHeader(int(status))
		_ = json.NewEncoder(w).Encode(map[string]string{"message": "not today"})
		return
	}
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		fail(err)
		return
	}
	token, err := jose.ParseSigned(in.OTT)
	if err != nil {
		fail(err)
		return
	}
	var claims struct {
		jose.Claims

		SANs []string `json:"sans"`
	}
	if err := token.Claims(&s.key.PublicKey, &claims); err != nil {
		fail(err)
		return
	}
	if err := claims.ValidateWithLeeway(jose.Expected{Issuer: "sallyport", Audience: jose.Audience{s.url + "/1.0/sign"}, Time: time.Now()}, time.Minute); err != nil {
		fail(err)
		return
	}
	block, _ := pem.Decode([]byte(in.CSR))
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		fail(err)
		return
	}
	leaf := &x509.Certificate{
		Subject: pkix.Name{CommonName: claims.Subject}, NotBefore: in.NotBefore, NotAfter: in.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, PublicKey: csr.PublicKey,
	}
	for _, n := range claims.SANs {
		if u, err := url.Parse(n); err == nil && u.Scheme != "" {
			leaf.URIs = append(leaf.URIs, u)
		} else {
			leaf.DNSNames = append(leaf.DNSNames, n)
		}
	}
	if f := s.twist.Load(); f != nil {
		(*f)(leaf)
	}
	c := signed(s.t, leaf, s.inter, leaf.PublicKey, s.interKey)
	w.WriteHeader(http.StatusCreated)
	pemOf := func(c *x509.Certificate) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	chain := []string{pemOf(c), pemOf(s.inter)}
	for _, x := range s.crosses {
		chain = append(chain, pemOf(x))
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"crt": pemOf(c), "ca": pemOf(s.inter), "certChain": chain})
}

func (s *stranger) option() pki.Option {
	return pki.WithExternal(pki.External{URL: s.url, Root: s.root, Provisioner: "sallyport", KeyFile: s.keyFile})
}

func TestRegistrationAuthority(t *testing.T) {
	s, dir := newStranger(t), t.TempDir()
	var said strings.Builder
	a, err := pki.Open(t.Context(), dir, slog.New(slog.NewTextHandler(&said, nil)), s.option())
	if err != nil {
		t.Fatal(err)
	}
	if text := said.String(); strings.Contains(text, "made a new certificate authority") || !strings.Contains(text, "registered with the external certificate authority") {
		t.Errorf("the log: %s", text)
	}
	if a.TrustDomain() != strangerDomain || !a.Root().Equal(s.root) {
		t.Fatalf("trust domain %s", a.TrustDomain())
	}
	if _, err := os.Stat(filepath.Join(dir, "intermediate.key")); !errors.Is(err, os.ErrNotExist) {
		t.Error("there is a CA key here")
	}
	id := fresh(t, a, wire.RoleNode)
	chain, err := a.Issue(t.Context(), request(t, a, id, "web-1"))
	if err != nil {
		t.Fatal(err)
	}
	if err := id.Install(chain); err != nil {
		t.Fatal(err)
	}
	near(t, "leaf from", leafOf(t, chain).NotBefore, time.Now().Add(-72*time.Hour))
	near(t, "leaf until", leafOf(t, chain).NotAfter, time.Now().Add(30*24*time.Hour))
	env, err := a.SignRevocations(t.Context(), wire.Revocations{Number: 7, Revoked: []wire.Revocation{{Key: strangerKey, Role: wire.RoleNode, ID: wire.NewID(), At: time.Now()}}}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if newer, err := id.ApplyRevocations(env); !newer || err != nil {
		t.Errorf("the party does not take the set: %v, %v", newer, err)
	}
	if _, err := a.Rotate(t.Context(), wire.RolloverRoot, 0); !errors.Is(err, pki.ErrRollover) {
		t.Errorf("rotate: %v", err)
	}
	closeIt(t, a)

	// It comes back without asking anybody, and not as another CA.
	before := keyFile(t, dir, "documents.pem")
	a = open(t, dir, s.option())
	if env, ok := a.Revocations(); !ok || number(t, env) != 7 {
		t.Error("the set is forgotten")
	}
	closeIt(t, a)
	if keyFile(t, dir, "documents.pem") != before {
		t.Error("it asked for another leaf at the start")
	}
	if _, err := pki.Open(t.Context(), dir, quiet); !errors.Is(err, pki.ErrExternal) || !strings.Contains(err.Error(), "SALLYPORT_PKI_CA") {
		t.Errorf("without its external CA: %v", err)
	}
	if _, err := pki.Open(t.Context(), dir, quiet, newStranger(t).option()); !errors.Is(err, pki.ErrExternal) {
		t.Errorf("another external CA: %v", err)
	}
	own := t.TempDir()
	closeIt(t, open(t, own))
	if _, err := pki.Open(t.Context(), own, quiet, s.option()); !errors.Is(err, pki.ErrExternal) {
		t.Errorf("an authority of its own became a registration authority: %v", err)
	}
	// A crash between the files of a renewal.
	if err := os.WriteFile(filepath.Join(dir, "documents.key"), []byte(keyFile(t, own, "root.key")), 0o600); err != nil {
		t.Fatal(err)
	}
	closeIt(t, open(t, dir, s.option()))
}

var strangerKey = wire.HashSPKI([]byte("somebody"))

// The root may be pinned by its fingerprint: it is fetched, and compared.
func TestExternalByFingerprint(t *testing.T) {
	s, other := newStranger(t), newStranger(t)
	sum := sha256.Sum256(s.root.Raw)
	pinned := func(change func(*pki.External)) pki.Option {
		e := pki.External{URL: s.url, Fingerprint: sum[:], Provisioner: "sallyport", KeyFile: s.keyFile}
		if change != nil {
			change(&e)
		}
		return pki.WithExternal(e)
	}
	dir := t.TempDir()
	s.lies.Store(other.root) // somebody between, with a root of his own
	if _, err := pki.Open(t.Context(), dir, quiet, pinned(nil)); !errors.Is(err, pki.ErrExternal) || !strings.Contains(err.Error(), "another one") {
		t.Errorf("with another root: %v", err)
	}
	s.lies.Store(nil)
	wrong := sha256.Sum256([]byte("x"))
	if _, err := pki.Open(t.Context(), dir, quiet, pinned(func(e *pki.External) { e.Fingerprint = wrong[:] })); !errors.Is(err, pki.ErrExternal) {
		t.Errorf("a fingerprint that it does not know: %v", err)
	}
	if _, err := pki.Open(t.Context(), dir, quiet, pinned(func(e *pki.External) { e.Root = other.root })); !errors.Is(err, pki.ErrExternal) {
		t.Errorf("a file with another root: %v", err)
	}
	a := open(t, dir, pinned(nil))
	if !a.Root().Equal(s.root) {
		t.Error("another root was taken")
	}
	certify(t, a, fresh(t, a, wire.RoleNode))
	closeIt(t, a)
	// Once it is known nobody is asked for it any more.
	s.lies.Store(other.root)
	a = open(t, dir, pinned(nil))
	if !a.Root().Equal(s.root) {
		t.Error("another root after the restart")
	}
	closeIt(t, a)
}

// What comes back must be what was asked for.
func TestExternalMisbehaves(t *testing.T) {
	s := newStranger(t)
	a := open(t, t.TempDir(), s.option())
	defer closeIt(t, a)
	other := identitytest.NewKey(t)
	for name, f := range map[string]func(*x509.Certificate){
		"another key": func(c *x509.Certificate) { c.PublicKey = &other.PublicKey },
		"a CA":        func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true },
		"another party": func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "spiffe", Host: strangerDomain, Path: "/gateway/" + string(wire.NewID())}}
		},
		"one more name":   func(c *x509.Certificate) { c.DNSNames = append(c.DNSNames, "example.com") },
		"an address":      func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(10, 0, 0, 1)} },
		"a year":          func(c *x509.Certificate) { c.NotAfter = time.Now().AddDate(1, 0, 0) },
		"over already":    func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) },
		"no signature":    func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement },
		"for servers":     func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] },
		"without a party": func(c *x509.Certificate) { c.URIs = nil },
	} {
		s.twist.Store(&f)
		id := fresh(t, a, wire.RoleNode)
		if chain, err := a.Issue(t.Context(), request(t, a, id, "web-1")); !errors.Is(err, pki.ErrExternal) {
			t.Errorf("%s: %d certificates, %v", name, len(chain), err)
		}
	}
	s.twist.Store(nil)
	// It says no, with its reason.
	foreign := filepath.Join(t.TempDir(), "other.pem")
	der, err := x509.MarshalPKCS8PrivateKey(other)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(foreign, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if _, err := pki.Open(t.Context(), dir, quiet, pki.WithExternal(pki.External{URL: s.url, Root: s.root, Provisioner: "sallyport", KeyFile: foreign})); !errors.Is(err, pki.ErrExternal) || !strings.Contains(err.Error(), "refuses") {
		t.Errorf("another provisioner's key: %v", err)
	}
	if _, err := pki.Open(t.Context(), dir, quiet, pki.WithExternal(pki.External{URL: s.url, Root: s.root, Provisioner: "sallyport", KeyFile: foreign + ".none"})); !errors.Is(err, os.ErrNotExist) || strings.Contains(err.Error(), "PASSWORD") {
		t.Errorf("without the key's file: %v", err)
	}
}

// Only the leaf for documents seals documents, and it is no party.
func TestDocumentLeaf(t *testing.T) {
	s, dir := newStranger(t), t.TempDir()
	a := open(t, dir, s.option())
	defer closeIt(t, a)
	node := fresh(t, a, wire.RoleNode)
	chain, err := a.Issue(t.Context(), request(t, a, node, "web-1"))
	if err != nil {
		t.Fatal(err)
	}
	if err := node.Install(chain); err != nil {
		t.Fatal(err)
	}
	set := wire.Revocations{TrustDomain: strangerDomain, Number: 1000, Issued: time.Now()}
	forged, err := node.Sign(wire.TypeRevocations, set)
	if err != nil {
		t.Fatal(err)
	}
	roots := []*x509.Certificate{s.root}
	if _, err := identity.VerifyRevocations(forged, roots, strangerDomain, time.Now()); !errors.Is(err, identity.ErrUntrusted) {
		t.Errorf("a set that a node sealed: %v", err)
	}
	// A leaf with the names, from an intermediate that is none of ours.
	key := identitytest.NewKey(t)
	alien := signed(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "doors"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, s.root, &key.PublicKey, s.rootKey)
	leaf := signed(t, &x509.Certificate{
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(0, 1, 0), KeyUsage: x509.KeyUsageDigitalSignature,
		DNSNames: []string{identity.DocumentName(strangerDomain)}, URIs: []*url.URL{identity.DocumentURI(strangerDomain)},
	}, alien, &key.PublicKey, key)
	forged, err = identity.Seal(key, [][]byte{leaf.Raw, alien.Raw}, wire.TypeRevocations, set)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := identity.VerifyRevocations(forged, roots, strangerDomain, time.Now()); !errors.Is(err, identity.ErrUntrusted) {
		t.Errorf("a set sealed below another intermediate: %v", err)
	}
	// The real one, in another trust domain and after its end.
	env, err := a.SignRevocations(t.Context(), wire.Revocations{Number: 1}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := identity.VerifyRevocations(env, roots, "other.example", time.Now()); err == nil {
		t.Error("it is taken in another trust domain")
	}
	if _, err := identity.VerifyRevocations(env, roots, strangerDomain, time.Now().AddDate(0, 2, 0)); err == nil {
		t.Error("it is taken after its end")
	}
}
