package doors

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
)

func TestValidHost(t *testing.T) {
	for name, want := range map[string]bool{
		"www.example.org": true, "localhost": true, "a-b.1c.example": true, strings.Repeat("a", 63) + ".x": true,
		"": false, ".": false, "a..b": false, "a.": false, "-a.x": false, "a-.x": false, "*.example.org": false, "A.example": false,
		"a_b.example": false, "1.2.3.4": false, "a.123": false, "::1": false, "a b": false, "ä.example": false, "a\x00.example": false,
		strings.Repeat("a", 64) + ".x": false, strings.Repeat("a.", 126) + "a": true, strings.Repeat("a.", 126) + "ab": false,
	} {
		if ValidHost(name) != want {
			t.Errorf("%q: %v, want %v", name, !want, want)
		}
	}
}

func TestNamesOf(t *testing.T) {
	names, addrs, err := NamesOf(&x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "WWW.example.org"}, DNSNames: []string{"www.example.org", "b.example"}, IPAddresses: []net.IP{net.IPv4(192, 0, 2, 1)},
	})
	if err != nil || strings.Join(names, " ") != "www.example.org b.example" || len(addrs) != 1 || addrs[0].String() != "192.0.2.1" {
		t.Errorf("%v %v %v", names, addrs, err)
	}
	if _, addrs, err := NamesOf(&x509.CertificateRequest{Subject: pkix.Name{CommonName: "::ffff:192.0.2.1"}}); err != nil || !slices.Equal([]string{addrs[0].String()}, []string{"192.0.2.1"}) {
		t.Errorf("a mapped address: %v %v", addrs, err)
	}
	for what, csr := range map[string]*x509.CertificateRequest{
		"nothing":             {},
		"a URI":               {DNSNames: []string{"a.example"}, URIs: []*url.URL{{Scheme: "spiffe", Host: "x"}}},
		"e-mail":              {DNSNames: []string{"a.example"}, EmailAddresses: []string{"a@example.org"}},
		"a person":            {Subject: pkix.Name{CommonName: "John Doe"}, DNSNames: []string{"a.example"}},
		"a wildcard":          {DNSNames: []string{"*.example"}},
		"broken address":      {IPAddresses: []net.IP{{1, 2}}},
		"more than there are": {DNSNames: slices.Repeat([]string{"a.example"}, MaxNames+1)},
	} {
		if names, addrs, err := NamesOf(csr); err == nil {
			t.Errorf("%s: %v %v", what, names, addrs)
		}
	}
}

func TestSerial(t *testing.T) {
	n, _ := new(big.Int).SetString("0123456789abcdef0123456789abcdef01234567", 16)
	for _, s := range []string{Serial(n), "01:23:45:67:89:AB:CD:EF:01:23:45:67:89:AB:CD:EF:01:23:45:67"} {
		if got, ok := ParseSerial(s); !ok || got.Cmp(n) != 0 {
			t.Errorf("%s: %v %v", s, got, ok)
		}
	}
	for _, s := range []string{"", "xyz", "-1", strings.Repeat("1", 41), "0x12"} {
		if _, ok := ParseSerial(s); ok {
			t.Errorf("%q is taken", s)
		}
	}
}
