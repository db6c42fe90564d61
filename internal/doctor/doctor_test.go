package doctor

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/local"
	"sallyport/internal/wire"
)

// healthy makes the identity of an enrolled node on disk.
func healthy(t *testing.T, ca *identitytest.CA, role wire.Role) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "identity")
	id, err := identity.Open(dir, role)
	if err != nil {
		t.Fatal(err)
	}
	if err := id.Pin(wire.KeyOf(ca.Root), ca.TrustDomain); err != nil {
		t.Fatal(err)
	}
	ca.Certify(t, id)
	return dir
}

func failed(checks []local.Check) map[string]local.Check {
	out := map[string]local.Check{}
	for _, c := range checks {
		if !c.OK {
			out[c.Check] = c
		}
	}
	return out
}

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, dir, name string) {
	t.Helper()
	if err := os.Remove(filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

func TestClassicBreakages(t *testing.T) {
	ca, other := identitytest.NewCA(t), identitytest.NewCA(t)
	copyFrom := func(t *testing.T, from, to, name string) {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(from, name))
		if err != nil {
			t.Fatal(err)
		}
		write(t, to, name, string(b))
	}
	signedLater, err := json.Marshal(wire.Revocations{Issued: time.Now().Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	env, err := json.Marshal(wire.Envelope{Payload: signedLater})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		damage func(t *testing.T, dir string)
		at     time.Duration // our clock, less the true time
		check  string        // that fails; empty: none
		says   string
	}{
		"healthy":      {damage: func(*testing.T, string) {}},
		"no directory": {damage: func(t *testing.T, dir string) { _ = os.RemoveAll(dir) }, check: "identity", says: "never started"},
		"missing key":  {damage: func(t *testing.T, dir string) { remove(t, dir, "key.pem") }, check: "key", says: "no key.pem"},
		"an empty directory": {damage: func(t *testing.T, dir string) {
			_, _ = os.RemoveAll(dir), os.Mkdir(dir, 0o700)
		}, check: "identity", says: "neither a key nor a certificate"},
		"corrupt key":         {damage: func(t *testing.T, dir string) { write(t, dir, "key.pem", "x") }, check: "key", says: "corrupt"},
		"open key":            {damage: func(t *testing.T, dir string) { _ = os.Chmod(filepath.Join(dir, "key.pem"), 0o644) }, check: "key", says: "read by others"},
		"missing certificate": {damage: func(t *testing.T, dir string) { remove(t, dir, "chain.pem") }, check: "certificate", says: "none yet"},
		"corrupt certificate": {damage: func(t *testing.T, dir string) { write(t, dir, "chain.pem", "-----BEGIN") }, check: "certificate", says: "corrupt"},
		"another's key":       {damage: func(t *testing.T, dir string) { copyFrom(t, healthy(t, ca, wire.RoleNode), dir, "key.pem") }, check: "certificate", says: "does not belong"},
		"missing trust":       {damage: func(t *testing.T, dir string) { remove(t, dir, "root.pem") }, check: "trust", says: "missing"},
		"corrupt trust":       {damage: func(t *testing.T, dir string) { write(t, dir, "root.pem", "x") }, check: "trust", says: "corrupt"},
		"wrong CA": {damage: func(t *testing.T, dir string) {
			write(t, dir, "root.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: other.Root.Raw})))
		}, check: "trust", says: "another CA"},
		"another gateway":  {damage: func(t *testing.T, dir string) { write(t, dir, "pin.json", `{"trust_domain":"other.sallyport"}`) }, check: "name", says: "another gateway"},
		"another's name":   {damage: func(t *testing.T, dir string) { write(t, dir, "id", string(wire.NewID())) }, check: "name", says: "the file id says"},
		"another role":     {damage: func(t *testing.T, dir string) { copyAll(t, healthy(t, ca, wire.RoleRCP), dir) }, check: "name", says: "for a rcp"},
		"clock behind":     {damage: func(*testing.T, string) {}, at: -100 * 24 * time.Hour, check: "clock", says: "behind"},
		"expired":          {damage: func(*testing.T, string) {}, at: 400 * 24 * time.Hour, check: "clock", says: "ended"},
		"behind a set":     {damage: func(t *testing.T, dir string) { write(t, dir, "revocations.json", string(env)) }, check: "clock", says: "signed at"},
		"corrupt set":      {damage: func(t *testing.T, dir string) { write(t, dir, "revocations.json", "x") }, check: "revocations", says: "corrupt"},
		"corrupt pin":      {damage: func(t *testing.T, dir string) { write(t, dir, "pin.json", "x") }, check: "trust", says: "pin.json"},
		"corrupt document": {damage: func(t *testing.T, dir string) { write(t, dir, "trust.json", "x") }, check: "trust", says: "trust.json is corrupt"},
		"another's document": {damage: func(t *testing.T, dir string) {
			doc, err := json.Marshal(other.Seal(t, wire.TypeTrust, wire.Trust{Number: 1, TrustDomain: other.TrustDomain, Roots: [][]byte{other.Root.Raw}, Issued: time.Now()}))
			if err != nil {
				t.Fatal(err)
			}
			write(t, dir, "trust.json", string(doc))
		}, check: "trust", says: "trust.json is corrupt"},
		"a certificate's lie": {damage: func(t *testing.T, dir string) {
			write(t, dir, "chain.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Root.Raw})))
		}, check: "certificate", says: "does not belong"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := healthy(t, ca, wire.RoleNode)
			c.damage(t, dir)
			got := failed(Identity(dir, wire.RoleNode, time.Now().Add(c.at)))
			if c.check == "" {
				if len(got) > 0 {
					t.Errorf("healthy, but %+v", got)
				}
				return
			}
			found := got[c.check]
			if !strings.Contains(found.Detail, c.says) || found.Fix == "" {
				t.Errorf("want %s to say %q and how to repair it; got %+v", c.check, c.says, got)
			}
		})
	}
}

func copyAll(t *testing.T, from, to string) {
	t.Helper()
	entries, err := os.ReadDir(from)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(from, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		write(t, to, e.Name(), string(b))
	}
}

// TestNothingIsChanged: the doctor only looks.
func TestNothingIsChanged(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "identity")
	Identity(dir, wire.RoleNode, time.Now())
	if _, err := os.Stat(dir); err == nil {
		t.Error("it made the directory")
	}
}

func TestAuthority(t *testing.T) {
	ca, other := identitytest.NewCA(t), identitytest.NewCA(t)
	dir := healthy(t, ca, wire.RoleGateway)
	chain, err := os.ReadFile(filepath.Join(dir, "chain.pem"))
	if err != nil {
		t.Fatal(err)
	}
	_, issuers := pem.Decode(chain) // what stands behind the leaf
	pki := t.TempDir()
	if got := Authority(pki, dir, time.Now()); got != nil {
		t.Errorf("elsewhere: %+v", got)
	}
	write(t, pki, "trust-domain", ca.TrustDomain)
	if got := failed(Authority(pki, dir, time.Now())); len(got) != 1 {
		t.Errorf("lost: %+v", got)
	}
	write(t, pki, "intermediate.pem", string(issuers))
	if got := failed(Authority(pki, dir, time.Now())); len(got) != 0 {
		t.Errorf("healthy: %+v", got)
	}
	if got := failed(Authority(pki, dir, time.Now().Add(100*365*24*time.Hour))); len(got) != 1 {
		t.Errorf("ended: %+v", got)
	}
	write(t, pki, "intermediate.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: other.Root.Raw})))
	if got := failed(Authority(pki, dir, time.Now())); !strings.Contains(got["authority"].Detail, "another one") {
		t.Errorf("another CA: %+v", got)
	}
	write(t, pki, "intermediate.pem", "x")
	if got := failed(Authority(pki, dir, time.Now())); !strings.Contains(got["authority"].Detail, "corrupt") {
		t.Errorf("corrupt: %+v", got)
	}
	write(t, pki, "intermediate.pem", string(issuers))
	for name, text := range map[string]string{"intermediate.key": "", "revocations.json": "{", "trust-domain": "other.sallyport"} {
		write(t, pki, name, text)
		if got := failed(Authority(pki, dir, time.Now()))["authority"]; !strings.Contains(got.Detail, name) || got.Fix == "" {
			t.Errorf("%s: %+v", name, got)
		}
		remove(t, pki, name)
	}
	write(t, pki, "root.key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY"})))
	if err := os.Chmod(filepath.Join(pki, "root.key"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := failed(Authority(pki, dir, time.Now()))["authority"]; !strings.Contains(got.Detail, "root.key can be read by others (mode 0644)") || !strings.Contains(got.Fix, "chmod 600") {
		t.Errorf("a key that others may read: %+v", got)
	}
	remove(t, pki, "root.key")
	if got := failed(Authority(pki, dir, time.Now())); len(got) != 0 {
		t.Errorf("repaired: %+v", got)
	}
	if got := Restoration(pki); got != nil {
		t.Errorf("restoration: %+v", got)
	}
	write(t, pki, "restoring", "2")
	if got := failed(Restoration(pki)); len(got) != 1 {
		t.Errorf("cut off: %+v", got)
	}
}

func TestState(t *testing.T) {
	for role, files := range keptBy {
		dir := t.TempDir()
		for _, k := range files {
			k.name = strings.ReplaceAll(k.name, "*", string(wire.NewID()))
			if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, k.name)), 0o700); err != nil {
				t.Fatal(err)
			}
			write(t, dir, k.name, "{}")
			if got := State(dir, role); len(got) != 0 {
				t.Errorf("healthy: %+v", got)
			}
			write(t, dir, k.name, "{")
			if got := failed(State(dir, role))["state"]; !strings.Contains(got.Detail, k.name) || !strings.Contains(got.Fix, k.fix) {
				t.Errorf("%s: %+v", k.name, got)
			}
			remove(t, dir, k.name)
		}
	}
}

func TestDatabase(t *testing.T) {
	ca := identitytest.NewCA(t)
	dir, fresh := healthy(t, ca, wire.RoleGateway), t.TempDir()
	head := make([]byte, 2*4096) // two pages of 4096 bytes, and the header is sure of it
	copy(head, "SQLite format 3\x00\x10\x00")
	head[31] = 2
	for _, c := range []struct{ name, text, says string }{
		{"lost", "", "new installation"},
		{"foreign", "no database at all", "no database"},
		{"cut", string(head[:5000]), "5000 of 8192"},
		{"whole", string(head), ""},
	} {
		write(t, fresh, c.name, c.text)
		got := failed(Database(filepath.Join(fresh, c.name), dir))["database"]
		if !strings.Contains(got.Detail, c.says) || (got.Fix == "") != (c.says == "") {
			t.Errorf("%s: %+v", c.name, got)
		}
	}
	if got := failed(Database(filepath.Join(fresh, "nothing"), dir)); len(got) != 1 {
		t.Errorf("missing: %+v", got)
	}
	if got := Database(filepath.Join(fresh, "nothing"), fresh); len(got) != 0 {
		t.Errorf("never started: %+v", got)
	}
}

// What is named is what works: only nodes and RCPs enrol with a code, and an
// RCP's name is taken by the identity that it has lost.
func TestLostIdentity(t *testing.T) {
	for role, want := range map[wire.Role]string{
		wire.RoleNode: "join create --name NAME --replace", wire.RoleRCP: "rcp join NAME --replace", wire.RoleGateway: "certificate authority makes it",
	} {
		dir := healthy(t, identitytest.NewCA(t), role)
		write(t, dir, "key.pem", "x")
		_, err := identity.Open(dir, role)
		fix := failed(Identity(dir, role, time.Now()))["key"].Fix
		if err == nil || !strings.Contains(fix, want) || strings.Contains(fix, "rejoin") != strings.Contains(err.Error(), "rejoin") || strings.Contains(fix, "rejoin") == (role == wire.RoleGateway) {
			t.Errorf("%s: %q, and it says: %v", role, fix, err)
		}
	}
}

func TestReach(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	if c := Reach(t.Context(), addr); !c.OK {
		t.Errorf("%+v", c)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if c := Reach(t.Context(), addr); c.OK || !strings.Contains(c.Fix, "nothing listens") {
		t.Errorf("refused: %+v", c)
	}
	if c := Reach(t.Context(), "no-such-host.invalid:9090"); c.OK || !strings.Contains(c.Fix, "not known here") {
		t.Errorf("no name: %+v", c)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if c := Reach(ended, "192.0.2.1:9"); c.OK || c.Fix == "" {
		t.Errorf("silence: %+v", c)
	}
}

func TestUpstream(t *testing.T) {
	for text, want := range map[string]string{
		"x: " + identity.ErrRevoked.Error() + " y":                           "revoked",
		"the other side refuses us (its log says why): tls":                  "revocation list",
		identity.ErrWrongTrustDomain.Error():                                 "another installation",
		identity.ErrUntrusted.Error():                                        "another CA",
		identity.ErrUntrusted.Error() + ": the peer " + identity.WaitsItself: "it waits for its own certificate",
		"remote error: tls: unknown certificate authority":                   "right gateway",
		"x509: certificate signed by unknown authority":                      "right gateway",
		identity.ErrExpired.Error():                                          "clocks",
		"dial 192.0.2.1:9090: HTTP proxy http://192.0.2.2:3128: dial tcp 192.0.2.2:3128: connect: connection refused":           "the proxy itself",
		"dial 192.0.2.1:9090: HTTP proxy http://p.invalid:3128: dial tcp: lookup p.invalid on 192.0.2.53:53: no such host":      "the proxy itself",
		"dial 192.0.2.1:9090: HTTP proxy http://192.0.2.2:3128: it wants authentication: put user":                              "the user and the password",
		"dial 192.0.2.1:9090: HTTP proxy http://192.0.2.2:3128: it answered \"502 Bad Gateway\"":                                "CONNECT to that address",
		"dial 192.0.2.1:9090: no such carrier: h3 is demanded, and an HTTP proxy (HTTPS_PROXY) stands in the way":               "CARRIER",
		"dial 192.0.2.1:9090: HTTP proxy http://192.0.2.2:3128: it does not take the user and the password in HTTPS_PROXY (\"4": "the user and the password",
		"dial 192.0.2.1:9090: HTTP proxy http://192.0.2.2:22: its answer to CONNECT is no HTTP: malformed HTTP response":        "port of an HTTP proxy",
		"dial 192.0.2.1:9090: HTTP proxy http://192.0.2.2:3128: no answer to CONNECT: context deadline exceeded":                "port of an HTTP proxy",
		"dial 192.0.2.1:9090: HTTP proxy: HTTPS_PROXY: it is not of the form http://user:password@host:port":                    "correct HTTPS_PROXY",
		"dial 192.0.2.1:9090: through the HTTP proxy: handshake: read tcp 192.0.2.9:1->192.0.2.2:3128: connection reset by":     "have it leave this address alone",
		"dial 192.0.2.1:9090: through the HTTP proxy: " + identity.ErrUntrusted.Error():                                         "have it leave this address alone",
		"dial 192.0.2.1:9090: through the HTTP proxy: " + identity.ErrRevoked.Error():                                           "revoked",
		"dial 192.0.2.1:8443: the other side refuses us (its log says why): remote error: tls: no application protocol\nQUIC h": "right port",
		"dial 192.0.2.1:22: handshake: EOF\nQUIC handshake: timeout: no recent network activity":                                "right port",
		"dial tcp 192.0.2.1:9090: i/o timeout":              "firewall",
		"dial tcp 127.0.0.1:1: connect: connection refused": "nothing listens",
		"lookup rcp.invalid on 192.0.2.53:53: no such host": "not known here",
		"tls: failed to verify certificate: " + x509.HostnameError{Certificate: &x509.Certificate{DNSNames: []string{"b.sallyport"}}, Host: "a.sallyport"}.Error(): "another installation",
		"node x: " + identity.ErrWrongRole.Error() + ": want [gateway]":                                                                                            "another role",
	} {
		if got := Upstream(text); !strings.Contains(got, want) {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

// One that is late is found before it has ended: a third of what was left when its
// renewal was due has passed.
func TestCertificate(t *testing.T) {
	issued := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	day := func(n int) time.Time { return issued.AddDate(0, 0, n) }
	for _, c := range []struct {
		end, now  time.Time
		ok        bool
		says, fix string
	}{
		{time.Time{}, day(1), false, "there is none yet", "see identity"},
		{day(14), day(1), true, "good for another 312h0m0s; renewed from 2026-03-08T00:00:00Z on", ""},
		{day(14), day(9), true, "good for another", ""},
		{day(14), day(10), false, "it ends in 96h0m0s and should have been renewed", "reaches this node"},
		{day(14), day(14), false, "it ended on 2026-03-15T00:00:00Z", "let the gateway reach this node"},
	} {
		got := Certificate(c.end, day(7), c.now, "this node")
		if got.OK != c.ok || !strings.HasPrefix(got.Detail, c.says) || !strings.Contains(got.Fix, c.fix) || c.ok && got.Fix != "" {
			t.Errorf("until %v, at %v: %+v", c.end, c.now, got)
		}
	}
}

// A party that waits for its certificate is told to look there, and not for a
// firewall.
func TestChannel(t *testing.T) {
	for _, c := range []struct {
		u         wire.UpstreamStatus
		waits, ok bool
		says, fix string
	}{
		{wire.UpstreamStatus{Address: "a:1", State: "enrolling", Carrier: "h3", Role: wire.RoleRCP}, true, true, "enrolling over h3, rcp", ""},
		{wire.UpstreamStatus{Address: "a:1", State: "enrolling", Carrier: "h3", Role: wire.RoleRCP}, false, false, "enrolling", "does not know the other's CA"},
		{wire.UpstreamStatus{Address: "a:1", State: "connecting"}, true, false, "connecting", "see identity"},
		{wire.UpstreamStatus{Address: "a:1", State: "failed", Error: "dial tcp: connection refused"}, false, false, "failed: dial tcp", "nothing listens"},
	} {
		got := Channel(c.u, c.waits)
		if got.OK != c.ok || !strings.HasPrefix(got.Detail, c.says) || !strings.Contains(got.Fix, c.fix) || c.ok && got.Fix != "" {
			t.Errorf("%+v: %+v", c.u, got)
		}
	}
}
