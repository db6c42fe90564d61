package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/tests/harness"
)

const acmeDirectory = "https://doors.sallyport/acme/here/directory"

// acme runs an ACME client behind the node's proxy.
func (s *doorSite) acme(program string, args ...string) harness.Result {
	s.t.Helper()
	env := []string{"PATH=" + os.Getenv("PATH"), "HOME=" + s.Path("home"), "HTTPS_PROXY=" + s.proxy, "REQUESTS_CA_BUNDLE=" + s.ca, "LEGO_CA_CERTIFICATES=" + s.ca, program}
	return s.Exec("env", append(env, args...)...)
}

func (s *doorSite) certbot(args ...string) harness.Result {
	s.t.Helper()
	dir := s.Path("certbot")
	return s.acme("certbot", append(args, "--server", acmeDirectory, "--non-interactive", "--config-dir", dir, "--work-dir", dir, "--logs-dir", dir)...)
}

func (s *doorSite) lego(args ...string) harness.Result {
	s.t.Helper()
	return s.acme("lego", append([]string{"--server", acmeDirectory, "--accept-tos", "--email", "ops@plant.example", "--path", s.Path("lego")}, args...)...)
}

// TestDoorACME: Debian's certbot and lego get, renew and revoke certificates
// through a node's proxy and the RCP. Their challenges are looked at from the
// node, within what both ends allow.
func TestDoorACME(t *testing.T) {
	t.Parallel()
	harness.Tool(t, "certbot")
	harness.Tool(t, "lego")
	http, legoHTTP, legoTLS := harness.FreePort(t), harness.FreePort(t), harness.FreePort(t)
	s := newDoorSite(t, "acme;status", "*.plant.example@site=plant;*.claimed.example@claimed=yes;10.1.2.3",
		harness.Env("SALLYPORT_NODE_CHALLENGES", fmt.Sprintf("web.plant.example=127.0.0.1:%d;lego.plant.example=127.0.0.1:%d;alpn.plant.example=127.0.0.1:%d;*.claimed.example=127.0.0.1:%d", http, legoHTTP, legoTLS, http)),
		harness.Env("SALLYPORT_NODE_TAGS", "claimed=yes"))
	root, inter := s.split()
	verify := func(cert, name string) {
		t.Helper()
		s.Exec("openssl", "verify", "-CAfile", root, "-untrusted", inter, "-verify_hostname", name, "-purpose", "sslserver", cert).Exits(0)
	}

	// An RCP dials nobody, and no client chooses the node that does.
	for _, c := range []struct{ proxy, url, want string }{
		{s.atRCP, acmeDirectory, "proxy of an RCP"},
		{s.proxy, "https://doors.sallyport/acme/web-1/directory", "/acme/here/directory"},
	} {
		harness.Eventually(t, 20*time.Second, "the door answers at "+c.proxy, func() error {
			if code, body := s.curl("-x", c.proxy, c.url); code != "403" || !strings.Contains(body, c.want) {
				return fmt.Errorf("%s: %s %s", c.url, code, body)
			}
			return nil
		})
	}

	issue := func(name string) harness.Result {
		return s.certbot("certonly", "--standalone", "--http-01-port", fmt.Sprint(http), "--register-unsafely-without-email", "--agree-tos", "-d", name)
	}
	issue("web.plant.example").Exits(0)
	cert := filepath.Join(s.Path("certbot"), "live", "web.plant.example", "cert.pem")
	verify(cert, "web.plant.example")
	first := s.serial(cert)
	if got := s.ocsp(inter, cert); got != "good" {
		t.Errorf("OCSP: %s", got)
	}
	s.certbot("renew", "--no-random-sleep-on-renew", "--force-renewal", "--http-01-port", fmt.Sprint(http)).Exits(0)
	if s.serial(cert) == first {
		t.Error("certbot renew left the certificate as it was")
	}

	for what, name := range map[string]string{
		"a name that no rule holds":                       "www.other.example",
		"a name for a tag that the node claims":           "a.claimed.example",
		"a name whose challenges the node does not serve": "else.plant.example",
		"a wildcard": "*.plant.example",
		"a party":    "x.node." + trustDomain(t, s),
	} {
		if r := issue(name); r.Code == 0 {
			t.Errorf("%s (%s): certbot has a certificate", what, name)
		} else {
			t.Logf("%s, after %s: %s", what, r.Took.Round(time.Millisecond), r.Stdout)
		}
	}

	s.lego("--domains", "lego.plant.example", "--http", "--http.port", fmt.Sprintf("127.0.0.1:%d", legoHTTP), "run").Exits(0)
	verify(filepath.Join(s.Path("lego"), "certificates", "lego.plant.example.crt"), "lego.plant.example")
	s.lego("--domains", "alpn.plant.example", "--tls", "--tls.port", fmt.Sprintf("127.0.0.1:%d", legoTLS), "run").Exits(0)
	alpn := filepath.Join(s.Path("lego"), "certificates", "alpn.plant.example.crt")
	verify(alpn, "alpn.plant.example")
	s.lego("--domains", "alpn.plant.example", "revoke", "--keep").Exits(0)
	if got := s.ocsp(inter, alpn); got != "revoked" {
		t.Errorf("OCSP after lego revoke: %s", got)
	}
	s.certbot("revoke", "--cert-path", cert, "--reason", "superseded", "--no-delete-after-revoke").Exits(0)
	if got := s.ocsp(inter, cert); got != "revoked" {
		t.Errorf("OCSP after certbot revoke: %s", got)
	}

	// The gateway survives its restart with what its clients know of it.
	s.gateway.Stop()
	s.gateway.Start()
	s.gateway.WaitAPI()
	s.node.WaitRunning(runningWithin)
	harness.Eventually(t, time.Minute, "certbot renews at the gateway that was restarted", func() error {
		return s.certbot("certonly", "--standalone", "--http-01-port", fmt.Sprint(http), "--force-renewal", "-d", "web.plant.example").Err()
	})

	var list []api.Certificate
	s.gateway.Run("certificate", "list", "-o", "json").Exits(0).JSON(&list)
	count := map[string]int{}
	for _, c := range list {
		if c.Door == "acme" {
			count[strings.Join(c.Names, ",")+" "+c.State]++
			if c.Via != "web-1" {
				t.Errorf("%v came via %q", c.Names, c.Via)
			}
		}
	}
	if len(count) != 4 || count["web.plant.example valid"] != 2 || count["web.plant.example revoked"] != 1 || count["lego.plant.example valid"] != 1 || count["alpn.plant.example revoked"] != 1 {
		t.Errorf("certificates: %v", count)
	}
}

func trustDomain(t *testing.T, s *doorSite) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(s.gateway.Data, "pki", "trust-domain"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}
