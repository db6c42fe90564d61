package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/tests/harness"
)

// enrol has a certificate by EST, and verifies it by one root alone, with
// nothing but what the server of that certificate would show.
func (s *doorSite) enrol(name string) (cert, key string) {
	s.t.Helper()
	code := strings.TrimSpace(s.gateway.Run("join", "create", "--est", "--name", name).Exits(0).Stdout)
	key, csr := s.request(name, "DNS:"+name)
	status, body := s.enroll("simpleenroll", csr, "-u", "device:"+code)
	if status != "200" {
		s.t.Fatalf("simpleenroll of %s: %s %s", name, status, body)
	}
	return s.certificate(name, body), key
}

// cas fetches what clients of the doors trust: the file, and its certificates.
func (s *doorSite) cas(name string) (file string, parts []string) {
	s.t.Helper()
	file = s.Path(name)
	s.Exec("curl", "-sSf", "--max-time", "20", "-o", file, "http://"+s.plain+"/doors/ca.pem").Exits(0)
	b, err := os.ReadFile(file)
	if err != nil {
		s.t.Fatal(err)
	}
	const end = "-----END CERTIFICATE-----\n"
	for i, part := range strings.SplitAfter(string(b), end) {
		if strings.HasSuffix(part, end) {
			parts = append(parts, s.File(fmt.Sprintf("%s.%d", name, i), part))
		}
	}
	return file, parts
}

// TestDoorsOfThePKI: the certificate authority is a process of its own, which
// keeps the doors' key too (PK-13); EST, OCSP and CRL work as with one inside,
// and a new root takes the doors with it (PK-08).
func TestDoorsOfThePKI(t *testing.T) {
	harness.LongWait(t)
	site := harness.New(t)
	authority := site.PKI()
	s := openDoorSite(t, site, "est;status", "none", []harness.Option{authority.Serves()})
	keys, err := filepath.Glob(filepath.Join(s.gateway.Data, "*", "doors*"))
	if err != nil || len(keys) > 0 {
		t.Errorf("at the gateway: %v, %v", keys, err)
	}
	root, inter := s.split()
	verify := func(cas, cert string) harness.Result {
		return s.Exec("openssl", "verify", "-CAfile", cas, "-purpose", "sslserver", cert)
	}
	first, firstKey := s.enrol("first.plant.example")
	verify(s.ca, first).Exits(0)
	if got := s.ocsp(inter, first); got != "good" {
		t.Errorf("OCSP: %s", got)
	}
	pem, err := os.ReadFile(find(t, filepath.Join(s.node.Data, "node"), "chain.pem"))
	if err != nil {
		t.Fatal(err)
	}
	const end = "-----END CERTIFICATE-----\n"
	parts := strings.SplitAfter(string(pem), end)
	leaf, spiffe := s.File("leaf.pem", parts[0]), s.File("spiffe.pem", parts[1])
	if got := s.ocsp(spiffe, leaf); got != "good" {
		t.Errorf("OCSP of a node: %s", got)
	}

	// A rollover: both roots are handed out, and clients that know only the
	// old one take what is issued.
	s.gateway.Run("ca", "rotate", "root", "--yes").Exits(0)
	both, now := s.cas("both.pem")
	if len(now) != 5 { // two roots; the new intermediate, also from the old root; the old one
		t.Fatalf("%d certificates while the rollover lasts", len(now))
	}
	if fingerprint(t, now[0]) == fingerprint(t, root) || fingerprint(t, now[1]) != fingerprint(t, root) {
		t.Error("the new root does not come first, and the old one second")
	}
	s.ca = both
	next, _ := s.enrol("second.plant.example")
	verify(both, next).Exits(0)
	shown := s.Path("shown.pem") // by a server
	s.Exec("sh", "-c", "cat '"+now[2]+"' '"+now[3]+"' > '"+shown+"'").Exits(0)
	s.Exec("openssl", "verify", "-CAfile", root, "-untrusted", shown, "-purpose", "sslserver", next).Exits(0)
	s.Exec("openssl", "verify", "-CAfile", both, "-untrusted", shown, "-purpose", "sslserver", next).Exits(0)
	for _, c := range []struct{ issuer, cert string }{{inter, first}, {now[2], next}} {
		if got := s.ocsp(c.issuer, c.cert); got != "good" {
			t.Errorf("OCSP of %s: %s", filepath.Base(c.cert), got)
		}
	}
	// What the old one certified is renewed from the new one: until then the
	// rollover is not finished without --force.
	if r := s.gateway.Run("ca", "finish", "--yes"); r.Code != 4 || !strings.Contains(r.Stderr, "first.plant.example") || strings.Contains(r.Stderr, "second.plant.example") {
		t.Errorf("finished with a certificate that nobody renewed: %v", r)
	}
	code, body := s.enroll("simplereenroll", second(s.request("first.plant.example", "DNS:first.plant.example")), "--cert", first, "--key", firstKey)
	if code != "200" {
		t.Fatalf("simplereenroll: %s %s", code, body)
	}
	s.Exec("openssl", "verify", "-CAfile", now[0], "-untrusted", now[3], s.certificate("again", body)).Exits(0)

	harness.Eventually(t, 30*time.Second, "the rollover can be finished", func() error { return s.gateway.Run("ca", "finish", "--yes").Err() })
	if _, after := s.cas("after.pem"); len(after) != 3 || fingerprint(t, after[0]) != fingerprint(t, now[0]) || fingerprint(t, after[1]) != fingerprint(t, now[3]) {
		t.Errorf("%d certificates after the end", len(after))
	}
	if code, body := s.enroll("simplereenroll", second(s.request("first.plant.example", "DNS:first.plant.example")), "--cert", first, "--key", firstKey); code != "401" {
		t.Errorf("simplereenroll with what the old one certified: %s %s", code, body)
	}
	if got := s.ocsp(inter, first); !strings.Contains(got, "unauthorized") {
		t.Errorf("OCSP of what the old one certified: %s", got)
	}

	// While the authority is away the doors say what they know.
	s.ca, _ = s.cas("after.pem")
	authority.Kill()
	s.gateway.Stop()
	s.gateway.Start()
	s.gateway.WaitAPI()
	harness.Eventually(t, 30*time.Second, "the doors are open", func() error {
		return s.Exec("curl", "-sSf", "--max-time", "5", "-o", "/dev/null", "http://"+s.plain+"/doors/ca.pem").Err()
	})
}
