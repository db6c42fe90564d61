package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/tests/harness"
)

// doorSite is a gateway whose doors are open, and a node with a proxy.
type doorSite struct {
	*harness.Site
	t       *testing.T
	gateway *harness.Gateway
	rcp     *harness.RCP
	node    *harness.Node
	proxy   string // of the node
	atRCP   string // the proxy of the RCP
	plain   string // where the gateway serves CRL and OCSP
	api     string // the API's own port
	ca      string // file with the root and the doors' intermediate
}

func newDoorSite(t *testing.T, doors, allow string, opts ...harness.Option) *doorSite {
	return openDoorSite(t, harness.New(t), doors, allow, nil, opts...)
}

func openDoorSite(t *testing.T, site *harness.Site, doors, allow string, gateway []harness.Option, opts ...harness.Option) *doorSite {
	harness.Tool(t, "openssl")
	harness.Tool(t, "curl")
	local := func() string { return fmt.Sprintf("127.0.0.1:%d", harness.FreePort(t)) }
	s := &doorSite{Site: site, t: t, plain: local(), proxy: "http://" + local(), api: local()}
	s.gateway = s.Gateway(append(gateway, harness.Env("SALLYPORT_GATEWAY_LISTEN", s.api), harness.Env("SALLYPORT_GATEWAY_DOORS", doors), harness.Env("SALLYPORT_GATEWAY_DOORS_ALLOW", allow),
		harness.Env("SALLYPORT_GATEWAY_DOORS_LISTEN", s.plain), harness.Env("SALLYPORT_GATEWAY_DOORS_URL", "http://"+s.plain))...)
	at := local()
	s.atRCP = "http://" + at
	s.rcp = s.RCP(s.gateway, "dmz-1", harness.Env("SALLYPORT_RCP_PROXY_LISTEN", at))
	opts = append(opts, harness.Env("SALLYPORT_NODE_PROXY_LISTEN", strings.TrimPrefix(s.proxy, "http://")), harness.JoinFlags("--tag", "site=plant"))
	s.node = s.Node(s.gateway, "web-1", opts...)
	s.node.WaitRunning(runningWithin)
	harness.Eventually(t, 20*time.Second, "the CA's certificates come through the proxy", func() error {
		r := s.Exec("curl", "-sSkf", "--max-time", "20", "-x", s.proxy, "https://doors.sallyport/doors/ca.pem")
		if r.Code != 0 {
			return r.Err()
		}
		s.ca = s.File("ca.pem", r.Stdout)
		return nil
	})
	return s
}

// curl asks the doors through the node's proxy; code is the HTTP status.
func (s *doorSite) curl(args ...string) (code, body string) {
	s.t.Helper()
	r := s.Exec("curl", append([]string{"-sS", "--max-time", "30", "-x", s.proxy, "--cacert", s.ca, "-w", "\n%{http_code}"}, args...)...)
	if r.Code != 0 {
		return "0", r.String()
	}
	at := strings.LastIndexByte(r.Stdout, '\n')
	return r.Stdout[at+1:], r.Stdout[:at]
}

// request makes a key and a CSR in DER and base64, as EST wants it.
func (s *doorSite) request(name, san string) (key, csr string) {
	s.t.Helper()
	key, der := s.Path(name+".key"), s.Path(name+".der")
	if _, err := os.Stat(key); err != nil {
		s.Exec("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key).Exits(0)
	}
	s.Exec("openssl", "req", "-new", "-key", key, "-subj", "/", "-addext", "subjectAltName="+san, "-outform", "DER", "-out", der).Exits(0)
	s.Exec("openssl", "base64", "-in", der, "-out", s.Path(name+".csr")).Exits(0)
	return key, s.Path(name + ".csr")
}

// enroll asks for a certificate by EST.
func (s *doorSite) enroll(path, csr string, auth ...string) (code, body string) {
	s.t.Helper()
	return s.curl(append([]string{"-H", "Content-Type: application/pkcs10", "--data-binary", "@" + csr, "https://doors.sallyport/.well-known/est/" + path}, auth...)...)
}

// certificate reads what EST answered, with openssl.
func (s *doorSite) certificate(name, body string) string {
	s.t.Helper()
	p7, der, out := s.File(name+".p7.b64", body), s.Path(name+".p7.der"), s.Path(name+".pem")
	s.Exec("openssl", "base64", "-d", "-in", p7, "-out", der).Exits(0)
	s.Exec("openssl", "pkcs7", "-inform", "DER", "-in", der, "-print_certs", "-out", out).Exits(0)
	return out
}

func (s *doorSite) serial(cert string) string {
	s.t.Helper()
	out := s.Exec("openssl", "x509", "-in", cert, "-noout", "-serial").Exits(0).Stdout
	return strings.TrimSpace(strings.TrimPrefix(out, "serial="))
}

// ocsp asks for the status of a certificate, and returns openssl's one line.
func (s *doorSite) ocsp(issuer, cert string) string {
	s.t.Helper()
	r := s.Exec("openssl", "ocsp", "-issuer", issuer, "-cert", cert, "-url", "http://"+s.plain+"/ocsp", "-CAfile", s.ca)
	if !strings.Contains(r.Stderr, "Response verify OK") {
		return r.String()
	}
	if strings.Contains(r.Stderr, "no nonce in response") {
		s.t.Error("the OCSP response does not repeat the nonce of openssl")
	}
	for line := range strings.Lines(r.Stdout) {
		if status, ok := strings.CutPrefix(line, cert+": "); ok {
			return strings.TrimSpace(status)
		}
	}
	return r.String()
}

// crl fetches the CRL of an issuer, has openssl verify it, and returns its text.
func (s *doorSite) crl(issuer string) (file, text string) {
	s.t.Helper()
	spki := s.Exec("sh", "-c", "openssl x509 -in '"+issuer+"' -noout -pubkey | openssl pkey -pubin -outform DER | openssl dgst -sha256 -r").Exits(0).Stdout
	der := s.Path(filepath.Base(issuer) + ".crl")
	s.Exec("curl", "-sSf", "--max-time", "20", "-o", der, "http://"+s.plain+"/crl/"+spki[:16]+".crl").Exits(0)
	file = der + ".pem"
	r := s.Exec("openssl", "crl", "-inform", "DER", "-in", der, "-CAfile", issuer, "-out", file, "-text").Exits(0)
	if !strings.Contains(r.Stderr, "verify OK") {
		s.t.Errorf("the CRL does not verify: %v", r)
	}
	return file, s.Exec("openssl", "crl", "-in", file, "-noout", "-text").Exits(0).Stdout
}

// split writes the certificates of the CA file into files of their own.
func (s *doorSite) split() (root, inter string) {
	s.t.Helper()
	b, err := os.ReadFile(s.ca)
	if err != nil {
		s.t.Fatal(err)
	}
	const end = "-----END CERTIFICATE-----\n"
	parts := strings.SplitAfter(string(b), end)
	return s.File("root.pem", parts[0]), s.File("doors.pem", parts[1])
}

// TestDoorEST: openssl and curl enrol and renew by EST through a node's proxy,
// and OCSP and CRL say at once what was revoked.
func TestDoorEST(t *testing.T) {
	t.Parallel()
	s := newDoorSite(t, "est;status;bundle", "*.plant.example;*.only.example@site=plant")
	root, inter := s.split()

	// cacerts is the same as what the file says.
	code, body := s.curl("https://doors.sallyport/.well-known/est/cacerts")
	if code != "200" {
		t.Fatalf("cacerts: %s %s", code, body)
	}
	if got := s.Exec("openssl", "x509", "-in", s.certificate("cacerts", body), "-noout", "-subject").Exits(0).Stdout; !strings.Contains(got, "Sallyport doors intermediate") {
		t.Errorf("cacerts begins with %s", got)
	}

	// The same through the proxy of the RCP.
	harness.Eventually(t, 20*time.Second, "EST at the proxy of the RCP", func() error {
		if code, body := s.curl("-x", s.atRCP, "https://doors.sallyport/.well-known/est/cacerts"); code != "200" {
			return fmt.Errorf("%s %s", code, body)
		}
		return nil
	})

	password := strings.TrimSpace(s.gateway.Run("join", "create", "--est", "--name", "www.plant.example").Exits(0).Stdout)
	auth := []string{"-u", "device:" + password}
	key, csr := s.request("www", "DNS:www.plant.example")
	for what, try := range map[string]struct {
		want string
		csr  string
		auth []string
	}{
		"nobody":          {"401", csr, nil},
		"a wrong code":    {"401", csr, []string{"-u", "device:" + password[:len(password)-2] + "xx"}},
		"a node's code":   {"401", csr, []string{"-u", "device:" + strings.TrimSpace(s.gateway.Run("join", "create").Exits(0).Stdout)}},
		"another name":    {"403", second(s.request("other", "DNS:ftp.plant.example")), auth},
		"one more name":   {"403", second(s.request("more", "DNS:www.plant.example,DNS:ftp.plant.example")), auth},
		"a party's URI":   {"400", second(s.request("uri", "DNS:www.plant.example,URI:spiffe://x/gateway/y")), auth},
		"no CSR":          {"400", s.File("garbage", "garbage"), auth},
		"a broken base64": {"400", s.File("garbage2", "!!!!"), auth},
	} {
		if code, body := s.enroll("simpleenroll", try.csr, try.auth...); code != try.want {
			t.Errorf("%s: %s %s, want %s", what, code, body, try.want)
		}
	}
	code, body = s.enroll("simpleenroll", csr, auth...)
	if code != "200" {
		t.Fatalf("simpleenroll: %s %s", code, body)
	}
	cert := s.certificate("www", body)
	s.Exec("openssl", "verify", "-CAfile", root, "-untrusted", inter, "-verify_hostname", "www.plant.example", "-purpose", "sslserver", cert).Exits(0)
	if code, _ := s.enroll("simpleenroll", csr, auth...); code != "200" {
		t.Errorf("the same key with the same code again: %s", code)
	}
	if code, _ := s.enroll("simpleenroll", second(s.request("thief", "DNS:www.plant.example")), auth...); code != "401" {
		t.Errorf("a code that is used up, with another key: %s", code)
	}
	// A code without a name takes what the rules hold for everybody.
	free := strings.TrimSpace(s.gateway.Run("join", "create", "--est", "--uses", "5").Exits(0).Stdout)
	for name, want := range map[string]string{"a.plant.example": "200", "a.only.example": "403", "plant.example.org": "403"} {
		if code, body := s.enroll("simpleenroll", second(s.request(name, "DNS:"+name)), "-u", "x:"+free); code != want {
			t.Errorf("%s with a code for no certain name: %s %s, want %s", name, code, body, want)
		}
	}

	// Renewal: the certificate itself, for its names and no others.
	show := []string{"--cert", cert, "--key", key}
	if code, body := s.enroll("simplereenroll", second(s.request("www", "DNS:www.plant.example")), show...); code != "200" {
		t.Errorf("simplereenroll: %s %s", code, body)
	}
	if code, _ := s.enroll("simplereenroll", second(s.request("other", "DNS:ftp.plant.example")), show...); code != "403" {
		t.Errorf("simplereenroll for another name: %s", code)
	}
	if code, _ := s.enroll("simplereenroll", csr, auth...); code != "401" {
		t.Errorf("simplereenroll with a code: %s", code)
	}
	identity := filepath.Join(s.node.Data, "node")
	if nodeKey, nodeCert := find(t, identity, "key.pem"), find(t, identity, "chain.pem"); nodeKey != "" {
		if code, _ := s.enroll("simpleenroll", csr, "--cert", nodeCert, "--key", nodeKey); code != "401" {
			t.Errorf("a node's certificate at the door: %s", code)
		}
	}

	if got := s.ocsp(inter, cert); got != "good" {
		t.Errorf("OCSP before the revocation: %s", got)
	}
	if _, text := s.crl(inter); !strings.Contains(text, "No Revoked Certificates") {
		t.Errorf("CRL before the revocation: %s", text)
	}
	serial := s.serial(cert)
	s.gateway.Run("certificate", "revoke", serial, "--reason", "key-compromise").Exits(0)
	began := time.Now()
	if got := s.ocsp(inter, cert); got != "revoked" {
		t.Errorf("OCSP after the revocation: %s", got)
	}
	harness.Eventually(t, 3*time.Second, "the CRL names it", func() error {
		if _, text := s.crl(inter); !strings.Contains(text, strings.TrimLeft(serial, "0")) || !strings.Contains(text, "Key Compromise") {
			return fmt.Errorf("%s is not in %s", serial, text)
		}
		return nil
	})
	t.Logf("the CRL named it after %v", time.Since(began))
	crl, _ := s.crl(inter)
	if r := s.Exec("openssl", "verify", "-crl_check", "-CAfile", root, "-untrusted", inter, "-CRLfile", crl, cert); r.Code == 0 || !strings.Contains(r.Stderr, "revoked") {
		t.Errorf("openssl takes it all the same: %v", r)
	}
	if code, _ := s.enroll("simplereenroll", csr, show...); code != "401" {
		t.Errorf("simplereenroll with a revoked certificate: %s", code)
	}
	s.gateway.Run("certificate", "revoke", serial).Exits(4)
	var list []api.Certificate
	s.gateway.Run("certificate", "list", "-o", "json").Exits(0).JSON(&list)
	found := false
	for _, c := range list {
		if strings.EqualFold(c.Serial, strings.TrimLeft(serial, "0")) {
			found = c.State == "revoked" && c.Door == "est" && c.Via == "web-1" && c.Reason == "key-compromise"
		}
	}
	if !found {
		t.Errorf("certificate list: %+v", list)
	}

	// The SPIFFE trust bundle.
	code, body = s.curl("https://doors.sallyport/spiffe/bundle.json")
	var bundle struct {
		Keys []struct {
			Use string   `json:"use"`
			Kty string   `json:"kty"`
			X5C [][]byte `json:"x5c"`
		} `json:"keys"`
	}
	if err := json.Unmarshal([]byte(body), &bundle); err != nil || code != "200" || len(bundle.Keys) != 1 || bundle.Keys[0].Use != "x509-svid" {
		t.Fatalf("bundle: %s %s %v", code, body, err)
	}
	if err := os.WriteFile(s.Path("bundle.der"), bundle.Keys[0].X5C[0], 0o600); err != nil {
		t.Fatal(err)
	}
	print := func(args ...string) string {
		return s.Exec("openssl", append([]string{"x509", "-noout", "-fingerprint", "-sha256"}, args...)...).Exits(0).Stdout
	}
	if print("-inform", "DER", "-in", s.Path("bundle.der")) != print("-in", root) {
		t.Error("the bundle holds another root")
	}
	// What needs no https is served without; the rest is not.
	if r := s.Exec("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "http://"+s.plain+"/.well-known/est/cacerts"); r.Stdout != "403" {
		t.Errorf("EST without https: %v", r)
	}
	if code, _ := s.curl("http://doors.sallyport/.well-known/est/cacerts"); code != "403" {
		t.Errorf("EST without https at a proxy: %s", code)
	}
}

// TestDoorStatusOfParties: OCSP and CRL know nodes too, and their revocation.
func TestDoorStatusOfParties(t *testing.T) {
	t.Parallel()
	s := newDoorSite(t, "status", "none")
	root, _ := s.split()
	pem, err := os.ReadFile(find(t, filepath.Join(s.node.Data, "node"), "chain.pem"))
	if err != nil {
		t.Fatal(err)
	}
	const end = "-----END CERTIFICATE-----\n"
	parts := strings.SplitAfter(string(pem), end)
	leaf, inter := s.File("leaf.pem", parts[0]), s.File("spiffe.pem", parts[1])
	if got := s.ocsp(inter, leaf); got != "good" {
		t.Errorf("OCSP of a node: %s", got)
	}
	s.gateway.Run("node", "revoke", "web-1").Exits(0)
	if got := s.ocsp(inter, leaf); got != "revoked" {
		t.Errorf("OCSP of a revoked node: %s", got)
	}
	harness.Eventually(t, 3*time.Second, "the CRL names the node", func() error {
		if _, text := s.crl(inter); !strings.Contains(text, strings.TrimLeft(s.serial(leaf), "0")) {
			return fmt.Errorf("not in %s", text)
		}
		return nil
	})
	// Of what was not issued here nothing is said.
	if got := s.ocsp(root, inter); !strings.Contains(got, "unauthorized") {
		t.Errorf("OCSP of what the root issued: %s", got)
	}
}

func second(_, b string) string { return b }

// find returns the file of that name below a directory.
func find(t *testing.T, dir, name string) string {
	t.Helper()
	var found string
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Name() == name {
			found = path
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if found == "" {
		t.Fatalf("no %s below %s", name, dir)
	}
	return found
}
