package e2e

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/internal/identity/identitytest"
	"sallyport/tests/harness"
)

// stepCA is a real step-ca with a SPIFFE intermediate.
type stepCA struct {
	*harness.Process

	url, root, key string // the files: of the root, and that a registration authority gets

	site        *harness.Site
	trustDomain string
	rootCert    *x509.Certificate
	rootKey     *ecdsa.PrivateKey
	config      map[string]any
}

// write writes ca.json.
func (s *stepCA) write(t *testing.T) string {
	t.Helper()
	b, err := json.Marshal(s.config)
	if err != nil {
		t.Fatal(err)
	}
	return s.site.File("stepca/ca.json", string(b))
}

// certify signs a CA certificate.
func certify(t *testing.T, tmpl, parent *x509.Certificate, pub any, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	tmpl.SerialNumber = big.NewInt(time.Now().UnixNano())
	tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-96*time.Hour), time.Now().AddDate(5, 0, 0)
	tmpl.IsCA, tmpl.BasicConstraintsValid, tmpl.KeyUsage = true, true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign
	return identitytest.Sign(t, tmpl, parent, pub, key)
}

// spiffeInter is the template of an intermediate for parties.
func spiffeInter(trustDomain string) *x509.Certificate {
	return &x509.Certificate{
		Subject: pkix.Name{CommonName: "Example Corp intermediate"}, MaxPathLenZero: true, URIs: []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
		PermittedDNSDomainsCritical: true, PermittedDNSDomains: []string{trustDomain}, PermittedURIDomains: []string{trustDomain},
	}
}

func pemFile(t *testing.T, site *harness.Site, name, typ string, der []byte) string {
	t.Helper()
	return site.File(name, string(pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der})))
}

func keyFile(t *testing.T, site *harness.Site, name string) (*ecdsa.PrivateKey, string) {
	t.Helper()
	key := identitytest.NewKey(t)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return key, pemFile(t, site, name, "PRIVATE KEY", der)
}

// publicJWK is the public half of a provisioner's key as ca.json has it
// (RFC 7517; the kid is the thumbprint of RFC 7638).
func publicJWK(t *testing.T, key *ecdsa.PrivateKey) map[string]string {
	t.Helper()
	point, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	x, y := b64(point[1:33]), b64(point[33:])
	sum := sha256.Sum256([]byte(`{"crv":"P-256","kty":"EC","x":"` + x + `","y":"` + y + `"}`))
	return map[string]string{"use": "sig", "kty": "EC", "kid": b64(sum[:]), "crv": "P-256", "alg": "ES256", "x": x, "y": y}
}

func startStepCA(t *testing.T, site *harness.Site, trustDomain string) *stepCA {
	t.Helper()
	program := site.StepCA()
	rootKey, _ := keyFile(t, site, "stepca/root.key")
	interKey, interKeyFile := keyFile(t, site, "stepca/intermediate.key")
	provisioner, provisionerFile := keyFile(t, site, "provisioner.key")
	tmpl := &x509.Certificate{Subject: pkix.Name{CommonName: "Example Corp root"}}
	root := certify(t, tmpl, tmpl, &rootKey.PublicKey, rootKey)
	inter := certify(t, spiffeInter(trustDomain), root, &interKey.PublicKey, rootKey)
	address := fmt.Sprintf("127.0.0.1:%d", harness.FreePort(t))
	s := &stepCA{url: "https://" + address, root: pemFile(t, site, "stepca/root.pem", "CERTIFICATE", root.Raw), key: provisionerFile,
		site: site, trustDomain: trustDomain, rootCert: root, rootKey: rootKey}
	s.config = map[string]any{
		"root": s.root, "crt": pemFile(t, site, "stepca/intermediate.pem", "CERTIFICATE", inter.Raw), "key": interKeyFile,
		"address": address, "dnsNames": []string{"127.0.0.1"}, "logger": map[string]string{"format": "text"},
		"db": map[string]string{"type": "bbolt", "dataSource": site.Path("stepca/db")}, "crl": map[string]any{"enabled": true, "generateOnRevoke": true},
		"authority": map[string]any{"provisioners": []any{map[string]any{
			"type": "JWK", "name": "sallyport", "key": publicJWK(t, provisioner), "claims": map[string]string{"maxTLSCertDuration": "800h"},
		}}},
	}
	s.Process = site.Start("step-ca", program, s.write(t))
	s.wait(t)
	return s
}

// plant is a gateway that has its certificates from this CA, with an RCP and the
// running nodes web-1 and web-2.
func (s *stepCA) plant(t *testing.T) (gateway *harness.Gateway, second *harness.Node) {
	t.Helper()
	gateway = s.site.Gateway(
		harness.Env("SALLYPORT_PKI_CA", s.url), harness.Env("SALLYPORT_PKI_CA_FINGERPRINT", fingerprint(t, s.root)),
		harness.Env("SALLYPORT_PKI_CA_PROVISIONER", "sallyport"), harness.Env("SALLYPORT_PKI_CA_KEY_FILE", s.key))
	s.site.RCP(gateway, "dmz-1")
	first, second := s.site.Node(gateway, "web-1"), s.site.Node(gateway, "web-2")
	first.WaitRunning(runningWithin)
	second.WaitRunning(runningWithin)
	return gateway, second
}

// restart has it take what stands in config now.
func (s *stepCA) restart(t *testing.T) {
	t.Helper()
	s.write(t)
	s.Kill()
	s.Start()
	s.wait(t)
}

func (s *stepCA) wait(t *testing.T) {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AddCert(s.rootCert)
	harness.Eventually(t, 30*time.Second, "step-ca listens", func() error {
		c, err := (&tls.Dialer{Config: &tls.Config{RootCAs: pool}}).DialContext(t.Context(), "tcp", strings.TrimPrefix(s.url, "https://"))
		if err == nil {
			err = c.Close()
		}
		return err
	})
}

// TestStepCA: a real external step-ca issues the certificates; the gateway is
// its registration authority and holds no CA key (PK-13). While it is away all
// that is enrolled works on, revocation included.
func TestStepCA(t *testing.T) {
	harness.LongWait(t)
	site := harness.New(t)
	ca := startStepCA(t, site, "corp.example")
	gateway, second := ca.plant(t)
	gateway.Run("node", "renew", "web-1").Exits(0)
	for _, name := range []string{"root.key", "intermediate.key"} {
		if found, err := filepath.Glob(filepath.Join(gateway.Data, "pki", name)); err != nil || len(found) > 0 {
			t.Errorf("%v, %v", found, err)
		}
	}

	ca.Kill()
	gateway.Run("action", "run", "--node", "web-1", "--", "/bin/true").Exits(0)
	gateway.Run("node", "renew", "web-1").Exits(1)
	if !strings.Contains(gateway.Log(), "external CA") {
		t.Error("the log does not say who is away")
	}
	gateway.Stop()
	gateway.Start()
	gateway.WaitAPI()
	harness.Eventually(t, 30*time.Second, "the gateway reaches its nodes again", func() error {
		return gateway.Run("action", "run", "--node", "web-2", "--", "/bin/true").Err()
	})
	gateway.Run("node", "revoke", "web-2").Exits(0)
	harness.Eventually(t, 30*time.Second, "the node knows that it is revoked", func() error {
		s, err := status(second.Role)
		if err == nil && !strings.Contains(s.Reason, "revoked") {
			err = fmt.Errorf("%s: %s", s.State, s.Reason)
		}
		return err
	})
	third := site.Node(gateway, "web-3")
	ca.Start()
	third.WaitRunning(90 * time.Second)
	// It is revoked there too, and stands in the CRL that the intermediate signs.
	harness.Eventually(t, 90*time.Second, "step-ca has the revocation in its CRL", func() error {
		if got := caOf(gateway).Status; len(got) != 1 || got[0].Next == nil || got[0].Missing != 0 || got[0].Problem != "" || !strings.Contains(got[0].OCSP, "none") {
			return fmt.Errorf("%+v", got)
		}
		return nil
	})
	pool := x509.NewCertPool()
	pool.AddCert(ca.rootCert)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, DisableKeepAlives: true}}
	resp, err := client.Get(ca.url + "/1.0/crl")
	if err != nil {
		t.Fatal(err)
	}
	der, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		t.Fatal(err)
	}
	if list, err := x509.ParseRevocationList(der); err != nil || len(list.RevokedCertificateEntries) == 0 {
		t.Errorf("its CRL: %v, %v", list, err)
	}
}
