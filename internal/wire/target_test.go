package wire

import (
	"errors"
	"strings"
	"testing"
)

func TestTargetSpecValidate(t *testing.T) {
	for _, c := range []struct {
		spec TargetSpec
		want string // field and part of the error; empty: valid
	}{
		{TargetSpec{Address: "db.example.com:5432"}, ""},
		{TargetSpec{Address: "db_1:5432"}, ""},
		{TargetSpec{Address: "[::1]:22"}, ""},
		{TargetSpec{Address: "[fe80::1%eth0]:22"}, ""},
		{TargetSpec{URL: "http://10.0.0.1"}, ""},
		{TargetSpec{URL: "HTTPS://a.example/base/", Timeout: DefaultTargetTimeout}, ""},
		{TargetSpec{URL: "h2c://[2001:db8::1]:50051"}, ""},
		{TargetSpec{}, "address: either"},
		{TargetSpec{Address: "a:1", URL: "http://a"}, "url: an address and a url"},
		{TargetSpec{Address: "a:1", Timeout: 1}, "timeout: only"},
		{TargetSpec{URL: "http://a", Timeout: MaxTargetTimeout + 1}, "timeout:"},
		{TargetSpec{URL: "http://a", Timeout: -1}, "timeout:"},
		{TargetSpec{Address: "a"}, "address:"},
		{TargetSpec{Address: ":80"}, "address:"},
		{TargetSpec{Address: "a:0"}, "address:"},
		{TargetSpec{Address: "a:080"}, "address:"},
		{TargetSpec{Address: "a:65536"}, "address:"},
		{TargetSpec{Address: "a:http"}, "address:"},
		{TargetSpec{Address: "::1:80"}, "address:"},
		{TargetSpec{Address: "[::g]:80"}, "address:"},
		{TargetSpec{Address: "a b:80"}, "address:"},
		{TargetSpec{Address: "a/b:80"}, "address:"},
		{TargetSpec{Address: "*.example.com:80"}, "address:"},
		{TargetSpec{Address: "a..b:80"}, "address:"},
		{TargetSpec{Address: strings.Repeat("a", 64) + ":80"}, "address:"},
		{TargetSpec{URL: "ftp://a"}, "url: scheme"},
		{TargetSpec{URL: "a:80"}, "url: scheme"},
		{TargetSpec{URL: "//a"}, "url: scheme"},
		{TargetSpec{URL: "http:a"}, "url:"},
		{TargetSpec{URL: "http:///x"}, "url:"},
		{TargetSpec{URL: "http://a:0"}, "url:"},
		{TargetSpec{URL: "http://a:"}, "url:"},
		{TargetSpec{URL: "http://a?q=1"}, "url:"},
		{TargetSpec{URL: "http://a#f"}, "url:"},
		{TargetSpec{URL: "http://u:hunter2@a"}, "url: it holds credentials"},
		{TargetSpec{URL: "http://u:hunter2@a:x"}, "url:"},
		{TargetSpec{URL: "http://" + strings.Repeat("a", 3000)}, "url:"},
	} {
		err := c.spec.Validate()
		if (c.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v; want %q", c.spec, err, c.want)
		}
		var se *SpecError
		if err != nil && (!errors.As(err, &se) || strings.Contains(err.Error(), "hunter2")) {
			t.Errorf("%+v: %T %v", c.spec, err, err)
		}
	}
}

func TestTargetSpecParts(t *testing.T) {
	for _, c := range []struct {
		spec             TargetSpec
		scheme, hostPort string
	}{
		{TargetSpec{Address: "db:5432"}, SchemeTCP, "db:5432"},
		{TargetSpec{URL: "http://web/x"}, SchemeHTTP, "web:80"},
		{TargetSpec{URL: "HTTPS://web"}, SchemeHTTPS, "web:443"},
		{TargetSpec{URL: "h2c://[::1]"}, SchemeH2C, "[::1]:80"},
		{TargetSpec{URL: "http://[::1]:8080/"}, SchemeHTTP, "[::1]:8080"},
	} {
		if s, h := c.spec.Scheme(), c.spec.HostPort(); s != c.scheme || h != c.hostPort || c.spec.HTTP() != (s != SchemeTCP) {
			t.Errorf("%+v: %s %s", c.spec, s, h)
		}
	}
}
