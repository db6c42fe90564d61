package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"sallyport/tests/harness"
)

// stepCA is smallstep's own certificate authority on this machine, as what the
// row of enrolments is held against: one hop and one handshake for a
// certificate, and nothing is kept of it.
type stepCA struct {
	url         string
	root        *x509.Certificate
	provisioner *ecdsa.PrivateKey
	kid         string
}

// stepClients ask at the same time.
const stepClients = 16

// stepca measures certificates per second: a key, a request, a one-time token
// and a connection for each.
func (b *bench) stepca(ctx context.Context) (err error) {
	program, err := buildStepCA(ctx, b.dir)
	if err != nil {
		return err
	}
	ca, conf, err := newStepCA(ctx, b.dir)
	if err != nil {
		return err
	}
	p, err := startProcess(b.dir, "step-ca", environment(), program, conf)
	if err != nil {
		return err
	}
	defer func() { b.closing(p.stop(syscall.SIGTERM)) }()
	err = eventually(ctx, 30*time.Second, "step-ca answers", func() error {
		if err := p.ended(); err != nil {
			return err
		}
		return ca.enrol(ctx)
	})
	if err != nil {
		return err
	}
	var rates []float64
	for range b.rounds {
		n, took, err := ca.enrolFor(ctx, b.time)
		if err != nil {
			return err
		}
		rates = append(rates, float64(n)/took.Seconds())
		b.say("step-ca: %.0f/s", rates[len(rates)-1])
	}
	b.put("enrol.stepca", rates...)
	return nil
}

// buildStepCA builds it from the module of the end-to-end tests.
func buildStepCA(ctx context.Context, dir string) (string, error) {
	root, err := harness.Repository()
	if err != nil {
		return "", err
	}
	program := filepath.Join(dir, "step-ca")
	cmd := exec.CommandContext(ctx, "go", "build", "-tags", "nobadger,nomysql,nopgx", "-o", program, "github.com/smallstep/certificates/cmd/step-ca")
	cmd.Dir, cmd.Env = filepath.Join(root, "tests", "stepca"), append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build step-ca: %w\n%s", err, out)
	}
	return program, nil
}

// newStepCA makes keys, certificates and the configuration file.
func newStepCA(ctx context.Context, dir string) (ca *stepCA, conf string, err error) {
	ca = new(stepCA)
	keys := map[string]*ecdsa.PrivateKey{}
	for _, name := range []string{"root", "intermediate", "provisioner"} {
		if keys[name], err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return nil, "", err
		}
	}
	ca.provisioner = keys["provisioner"]
	issue := func(serial int64, name string, parent *x509.Certificate) (*x509.Certificate, error) {
		t := &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour),
			NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
		if parent == nil {
			parent = t
		}
		der, err := x509.CreateCertificate(rand.Reader, t, parent, keys[name].Public(), keys["root"])
		if err != nil {
			return nil, err
		}
		return x509.ParseCertificate(der)
	}
	if ca.root, err = issue(1, "root", nil); err != nil {
		return nil, "", err
	}
	inter, err := issue(2, "intermediate", ca.root)
	if err != nil {
		return nil, "", err
	}
	key, err := x509.MarshalPKCS8PrivateKey(keys["intermediate"])
	if err != nil {
		return nil, "", err
	}
	at := func(name string) string { return filepath.Join(dir, "step-ca-"+name) }
	for name, block := range map[string]*pem.Block{
		"root.pem": {Type: "CERTIFICATE", Bytes: ca.root.Raw}, "intermediate.pem": {Type: "CERTIFICATE", Bytes: inter.Raw},
		"intermediate.key": {Type: "PRIVATE KEY", Bytes: key},
	} {
		if err := os.WriteFile(at(name), pem.EncodeToMemory(block), 0o600); err != nil {
			return nil, "", err
		}
	}
	point, err := ca.provisioner.PublicKey.Bytes()
	if err != nil {
		return nil, "", err
	}
	x, y := base64.RawURLEncoding.EncodeToString(point[1:33]), base64.RawURLEncoding.EncodeToString(point[33:])
	print := sha256.Sum256([]byte(`{"crv":"P-256","kty":"EC","x":"` + x + `","y":"` + y + `"}`)) // RFC 7638
	ca.kid = base64.RawURLEncoding.EncodeToString(print[:])
	address, err := freeAddress(ctx)
	if err != nil {
		return nil, "", err
	}
	ca.url = "https://" + address
	text, err := json.Marshal(map[string]any{
		"root": at("root.pem"), "crt": at("intermediate.pem"), "key": at("intermediate.key"), "address": address, "dnsNames": []string{"127.0.0.1"},
		"authority": map[string]any{"provisioners": []any{map[string]any{"type": "JWK", "name": "bench", "key": map[string]string{
			"use": "sig", "kty": "EC", "kid": ca.kid, "crv": "P-256", "alg": "ES256", "x": x, "y": y,
		}}}},
	})
	if err != nil {
		return nil, "", err
	}
	return ca, at("ca.json"), os.WriteFile(at("ca.json"), text, 0o600)
}

// enrolFor has stepClients enrol for d.
func (ca *stepCA) enrolFor(ctx context.Context, d time.Duration) (n int64, took time.Duration, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	began := time.Now()
	var count atomic.Int64
	var clients sync.WaitGroup
	for range stepClients {
		clients.Go(func() {
			for time.Since(began) < d && ctx.Err() == nil {
				if err := ca.enrol(ctx); err != nil {
					cancel(err)
					return
				}
				count.Add(1)
			}
		})
	}
	clients.Wait()
	return count.Load(), time.Since(began), context.Cause(ctx)
}

// enrol gets one certificate for a new key by a connection of its own.
func (ca *stepCA) enrol(ctx context.Context) error {
	const name = "node.example"
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}}, key)
	if err != nil {
		return err
	}
	token, err := ca.token(name)
	if err != nil {
		return err
	}
	body, err := json.Marshal(map[string]string{"csr": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})), "ott": token})
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.root)
	transport := &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots}, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, ca.url+"/1.0/sign", bytes.NewReader(body))
	if err != nil {
		return err
	}
	res, err := transport.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("step-ca: %w", err)
	}
	defer func() { _ = res.Body.Close() }()
	answer, err := io.ReadAll(io.LimitReader(res.Body, 64<<10))
	if err != nil {
		return fmt.Errorf("step-ca: %w", err)
	}
	if res.StatusCode != http.StatusCreated || !bytes.Contains(answer, []byte("BEGIN CERTIFICATE")) {
		return fmt.Errorf("step-ca answers %s: %.200s", res.Status, answer)
	}
	return nil
}

// token is a one-time token of the provisioner (RFC 7519, ES256).
func (ca *stepCA) token(name string) (string, error) {
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return "", err
	}
	print := sha256.Sum256(ca.root.Raw)
	now := time.Now()
	var parts [2]string
	for i, part := range []any{
		map[string]string{"alg": "ES256", "kid": ca.kid, "typ": "JWT"},
		map[string]any{"iss": "bench", "sub": name, "sans": []string{name}, "aud": ca.url + "/1.0/sign", "jti": hex.EncodeToString(id), "sha": hex.EncodeToString(print[:]),
			"iat": now.Unix(), "nbf": now.Add(-time.Minute).Unix(), "exp": now.Add(4 * time.Minute).Unix()},
	} {
		b, err := json.Marshal(part)
		if err != nil {
			return "", err
		}
		parts[i] = base64.RawURLEncoding.EncodeToString(b)
	}
	text := parts[0] + "." + parts[1]
	sum := sha256.Sum256([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, ca.provisioner, sum[:])
	if err != nil {
		return "", err
	}
	var sig [64]byte
	r.FillBytes(sig[:32])
	s.FillBytes(sig[32:])
	return text + "." + base64.RawURLEncoding.EncodeToString(sig[:]), nil
}
