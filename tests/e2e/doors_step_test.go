package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/tests/harness"
)

// stepper runs smallstep's command line as somebody who uses it would.
type stepper struct {
	*doorSite
	program string
	env     []string
}

func (s *doorSite) stepper(env ...string) *stepper {
	s.t.Helper()
	return &stepper{s, s.Step(), append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + s.Path("home"), "STEPPATH=" + s.Path("home/.step")}, env...)}
}

func (s *stepper) run(args ...string) harness.Result {
	s.t.Helper()
	return s.Exec("env", append(append(append([]string{"-i"}, s.env...), s.program), args...)...)
}

// issue asks for a certificate by ACME; its challenges are answered at port.
func (s *stepper) issue(directory, name string, port uint16, flags ...string) (cert string, r harness.Result) {
	s.t.Helper()
	cert = s.Path("step-" + name + ".pem")
	return cert, s.run(append([]string{"ca", "certificate", name, cert, s.Path("step-" + name + ".key"), "--acme", directory, "--standalone",
		"--http-listen", fmt.Sprintf("127.0.0.1:%d", port), "--force"}, flags...)...)
}

// fingerprint is the SHA-256 of the one certificate in a file.
func fingerprint(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		t.Fatalf("%s: %s", file, b)
	}
	sum := sha256.Sum256(block.Bytes)
	return hex.EncodeToString(sum[:])
}

// TestDoorStep: smallstep's own command line, behind a node's proxy, gets the
// root by its fingerprint and a certificate by ACME, and verifies both, with
// CRL and OCSP, until it is revoked.
func TestDoorStep(t *testing.T) {
	harness.LongWait(t)
	port := harness.FreePort(t)
	s := newDoorSite(t, "acme;status", "*.plant.example", harness.Env("SALLYPORT_NODE_CHALLENGES", fmt.Sprintf("*.plant.example=127.0.0.1:%d", port)))
	root, inter := s.split()
	// With --root, step takes no proxy: the root comes from the environment.
	step := s.stepper("HTTPS_PROXY="+s.proxy, "SSL_CERT_FILE="+root)

	sum := fingerprint(t, root)
	got := s.Path("step-root.pem")
	step.run("ca", "root", got, "--ca-url", "https://doors.sallyport", "--fingerprint", sum).Exits(0)
	if fingerprint(t, got) != sum {
		t.Error("step ca root fetched another root")
	}
	step.run("ca", "root", "--ca-url", "https://doors.sallyport", "--fingerprint", strings.Repeat("0", 64)).Exits(1)

	const name = "step.plant.example"
	cert, r := step.issue(acmeDirectory, name, port, "--san", name, "--san", "alt.plant.example")
	r.Exits(0)
	if _, r := step.issue(acmeDirectory, "www.other.example", port); r.Code == 0 || !strings.Contains(r.Stderr, "rejectedIdentifier") && !strings.Contains(r.Stderr, "SALLYPORT_GATEWAY_DOORS_ALLOW") {
		t.Errorf("a name that no rule holds: %v", r)
	}
	var seen struct {
		SubjectDN  string `json:"subject_dn"`
		Extensions struct {
			SubjectAltName struct {
				DNSNames []string `json:"dns_names"`
			} `json:"subject_alt_name"`
			CRL []string `json:"crl_distribution_points"`
		} `json:"extensions"`
	}
	step.run("certificate", "inspect", cert, "--format", "json").Exits(0).JSON(&seen)
	if seen.SubjectDN != "CN="+name && seen.SubjectDN != "CN=alt.plant.example" || len(seen.Extensions.SubjectAltName.DNSNames) != 2 || len(seen.Extensions.CRL) != 1 {
		t.Fatalf("step certificate inspect: %+v", seen)
	}
	crl := seen.Extensions.CRL[0]
	for _, host := range []string{name, "alt.plant.example"} {
		step.run("certificate", "verify", cert, "--roots", root, "--host", host).Exits(0)
	}
	step.run("certificate", "verify", cert, "--roots", root, "--host", "www.other.example").Exits(1)
	if r := step.run("certificate", "needs-renewal", cert); r.Code != 1 { // 1: it does not
		t.Errorf("step certificate needs-renewal: %v", r)
	}

	status := func(how string) harness.Result {
		return step.run("certificate", "verify", cert, "--roots", root, "--issuing-ca", inter, how, "--verbose")
	}
	revoked := func() (serials []string, valid bool) {
		var list struct {
			Revoked []struct {
				Serial string `json:"serial_number"`
			} `json:"revoked_certificates"`
			Signature struct {
				Valid bool `json:"valid"`
			} `json:"signature"`
		}
		if err := json.Unmarshal([]byte(step.run("crl", "inspect", crl, "--ca", inter, "--format", "json").Exits(0).Stdout), &list); err != nil {
			t.Fatal(err)
		}
		for _, r := range list.Revoked {
			serials = append(serials, r.Serial)
		}
		return serials, list.Signature.Valid
	}
	status("--verify-ocsp").Exits(0)
	status("--verify-crl").Exits(0)
	if serials, valid := revoked(); len(serials) != 0 || !valid {
		t.Errorf("step crl inspect: %v, its signature is valid: %v", serials, valid)
	}
	s.gateway.Run("certificate", "revoke", s.serial(cert)).Exits(0)
	if r := status("--verify-ocsp"); r.Code == 0 || !strings.Contains(r.Stderr, "revoked") {
		t.Errorf("step on OCSP of what was revoked: %v", r)
	}
	harness.Eventually(t, 3*time.Second, "the CRL names it for step", func() error {
		if r := status("--verify-crl"); r.Code == 0 || !strings.Contains(r.Stderr, "revoked") {
			return fmt.Errorf("%v", r)
		}
		return nil
	})
	if serials, valid := revoked(); len(serials) != 1 || !valid {
		t.Errorf("step crl inspect after the revocation: %v, its signature is valid: %v", serials, valid)
	}
}

// TestDoorsOfTheAPI: clients in the trusted network use the API's own port:
// lego and step by ACME, with the challenges looked at from the node that the
// directory names, and curl by EST.
func TestDoorsOfTheAPI(t *testing.T) {
	harness.LongWait(t)
	harness.Tool(t, "lego")
	port, stepPort := harness.FreePort(t), harness.FreePort(t)
	s := newDoorSite(t, "acme;est;status", "*.plant.example", harness.Env("SALLYPORT_NODE_CHALLENGES", fmt.Sprintf("lego.plant.example=127.0.0.1:%d;step.plant.example=127.0.0.1:%d", port, stepPort)))
	root, inter := s.split()
	api := "https://" + s.api
	trust := filepath.Join(s.gateway.Data, "gateway", "api-tls", "cert.pem")
	verify := func(cert, name string) {
		t.Helper()
		s.Exec("openssl", "verify", "-CAfile", root, "-untrusted", inter, "-verify_hostname", name, "-purpose", "sslserver", cert).Exits(0)
	}
	ask := func(args ...string) (code, body string) {
		t.Helper()
		r := s.Exec("curl", append([]string{"-sS", "--max-time", "30", "--cacert", trust, "-w", "\n%{http_code}"}, args...)...).Exits(0)
		at := strings.LastIndexByte(r.Stdout, '\n')
		return r.Stdout[at+1:], r.Stdout[:at]
	}

	// ACME: the node is the one that the directory names, and nobody else's.
	for side, want := range map[string]string{"here": "403", "nobody": "403", "web-1": "200"} {
		if code, body := ask(api + "/acme/" + side + "/directory"); code != want {
			t.Errorf("the directory of %s: %s %s, want %s", side, code, body, want)
		}
	}
	directory := api + "/acme/web-1/directory"
	lego := func(args ...string) harness.Result {
		return s.Exec("env", append([]string{"-i", "PATH=" + os.Getenv("PATH"), "LEGO_CA_CERTIFICATES=" + trust, "lego", "--server", directory, "--accept-tos",
			"--email", "ops@plant.example", "--path", s.Path("lego")}, args...)...)
	}
	lego("--domains", "lego.plant.example", "--http", "--http.port", fmt.Sprintf("127.0.0.1:%d", port), "run").Exits(0)
	cert := filepath.Join(s.Path("lego"), "certificates", "lego.plant.example.crt")
	verify(cert, "lego.plant.example")
	if r := lego("--domains", "lego.other.example", "--http", "--http.port", fmt.Sprintf("127.0.0.1:%d", port), "run"); r.Code == 0 {
		t.Error("lego has a certificate for a name that no rule holds")
	}
	step := s.stepper()
	cert, r := step.issue(directory, "step.plant.example", stepPort, "--root", trust)
	r.Exits(0)
	verify(cert, "step.plant.example")

	// EST.
	enroll := func(path, csr string, auth ...string) (code, body string) {
		t.Helper()
		return ask(append([]string{"-H", "Content-Type: application/pkcs10", "--data-binary", "@" + csr, api + "/.well-known/est/" + path}, auth...)...)
	}
	code, body := ask(api + "/.well-known/est/cacerts")
	if code != "200" {
		t.Fatalf("cacerts: %s %s", code, body)
	}
	if fingerprint(t, s.certificate("cacerts", body)) != fingerprint(t, inter) {
		t.Error("cacerts does not begin with the doors' intermediate")
	}
	auth := []string{"-u", "device:" + strings.TrimSpace(s.gateway.Run("join", "create", "--est", "--name", "est.plant.example").Exits(0).Stdout)}
	key, csr := s.request("est", "DNS:est.plant.example")
	if code, body := enroll("simpleenroll", csr); code != "401" {
		t.Errorf("nobody: %s %s", code, body)
	}
	if code, body = enroll("simpleenroll", csr, auth...); code != "200" {
		t.Fatalf("simpleenroll: %s %s", code, body)
	}
	cert = s.certificate("est", body)
	verify(cert, "est.plant.example")
	if code, body = enroll("simplereenroll", csr, "--cert", cert, "--key", key); code != "200" {
		t.Fatalf("simplereenroll: %s %s", code, body)
	}
	again := s.certificate("est-again", body)
	verify(again, "est.plant.example")
	if s.serial(again) == s.serial(cert) {
		t.Error("simplereenroll gave the same certificate")
	}
	// A certificate of a door opens the API to nobody.
	if code, _ := ask("--cert", cert, "--key", key, api+"/api/v1/nodes"); code != "401" {
		t.Errorf("a certificate of a door at the API: %s", code)
	}
}
