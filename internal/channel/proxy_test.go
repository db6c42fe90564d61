package channel_test

import (
	"context"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"sallyport/internal/channel"
)

// newProxy is an HTTP proxy that wants the password "open sesame" from user u.
func newProxy(t *testing.T) *url.URL {
	t.Helper()
	want := "Basic " + base64.StdEncoding.EncodeToString([]byte("u:open sesame"))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method != http.MethodConnect:
			http.Error(w, "CONNECT only", http.StatusMethodNotAllowed)
			return
		case r.Header.Get("Proxy-Authorization") != want:
			w.Header().Set("Proxy-Authenticate", "Basic")
			w.WriteHeader(http.StatusProxyAuthRequired)
			return
		}
		out, err := net.Dial("tcp", r.Host)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		in, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		_, _ = io.WriteString(in, "HTTP/1.1 200 Connection established\r\nX-Proxy: yes\r\n\r\n")
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = io.Copy(out, in)
			_ = out.Close()
		}()
		_, _ = io.Copy(in, out)
		_ = in.Close()
		<-done
	}))
	t.Cleanup(s.Close)
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword("u", "open sesame")
	return u
}

func TestHTTPProxy(t *testing.T) {
	for name, ordinary := range map[string]bool{"ordinary": true, "reversed": false} {
		t.Run(name, func(t *testing.T) {
			p := newPlant(t, variant{"h2", ordinary}, ok)
			p.listen(t)
			proxy := newProxy(t)
			d := p.dialler(t)
			d.Carrier = channel.CarrierAuto
			d.Proxy = func(u *url.URL) (*url.URL, error) {
				if u.Host != d.Addr || u.Scheme != "https" {
					t.Errorf("asked for %s", u)
				}
				return proxy, nil
			}
			c, err := d.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if c.Carrier() != "h2" || "http://"+c.RemoteAddr() != "http://"+proxy.Host {
				t.Errorf("on %s through %s", c.Carrier(), c.RemoteAddr())
			}
			c.Close(nil)

			proxy.User = url.UserPassword("u", "wrong")
			_, err = p.dialVia(t, proxy)
			if !errors.Is(err, channel.ErrProxy) || !strings.Contains(err.Error(), "does not take the user and the password in HTTPS_PROXY") || strings.Contains(err.Error(), "wrong") {
				t.Errorf("a wrong password gave %v", err)
			}
		})
	}
}

func (p *plant) dialVia(t *testing.T, proxy *url.URL) (*channel.Conn, error) {
	d := p.dialler(t)
	d.Carrier = channel.CarrierAuto
	d.Proxy = func(*url.URL) (*url.URL, error) { return proxy, nil }
	return d.Dial(t.Context())
}

// A value that is no URL is an error that shows nothing of it: its password
// would stand in the log otherwise, or the proxy be passed by.
func TestProxyThatIsNoURL(t *testing.T) {
	p := newPlant(t, variant{"h2", true}, ok)
	p.listen(t)
	for _, value := range []string{
		"http://joe:s3/cret@proxy.example:3128", "http://joe:12/s3cret@proxy.example:3128", "http://joe:s3#cret@proxy.example:3128", "http://joe:s3?cret@proxy.example:3128",
		"http://joe:s3cret%zz@proxy.example:3128", `http://dom\joe:s3cret@proxy.example:3128`, "joe:s3/cret@proxy.example:3128", "http://",
	} {
		t.Setenv("HTTPS_PROXY", value)
		d := p.dialler(t)
		d.Addr = "192.0.2.1:9090"
		_, err := d.Dial(t.Context())
		if !errors.Is(err, channel.ErrProxy) || !strings.Contains(err.Error(), "user:password@host:port") {
			t.Errorf("%s gave %v", value, err)
			continue
		}
		if text := err.Error(); strings.Contains(text, "s3") || strings.Contains(text, "cret") || strings.Contains(text, "joe") {
			t.Errorf("%s is shown: %s", value, text)
		}
	}
	t.Setenv("NO_PROXY", "192.0.2.1")
	d := p.dialler(t)
	d.Addr, d.Carrier = "192.0.2.1:9090", channel.CarrierH2
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.Dial(ctx); err == nil || errors.Is(err, channel.ErrProxy) {
		t.Errorf("an address that no proxy leads to gave %v", err)
	}
}

// TestProxyFromEnvironment: a proxy's URL may lack its scheme, and have a user
// of a domain and a password of anything, once these are escaped.
func TestProxyFromEnvironment(t *testing.T) {
	p := newPlant(t, variant{"h2", true}, ok)
	p.listen(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user, password, _ := (&http.Request{Header: http.Header{"Authorization": r.Header["Proxy-Authorization"]}}).BasicAuth()
		http.Error(w, "no", map[bool]int{true: http.StatusTeapot, false: http.StatusProxyAuthRequired}[user == `dom\joe` && password == "p@ss/w#rd"])
	}))
	_ = s.Listener.Close()
	s.Listener = l
	s.Start()
	t.Cleanup(s.Close)
	for _, scheme := range []string{"", "http://"} {
		t.Setenv("HTTPS_PROXY", scheme+"dom%5Cjoe:p%40ss%2Fw%23rd@"+l.Addr().String()+"/")
		d := p.dialler(t)
		d.Addr = "192.0.2.1:9090"
		if _, err := d.Dial(t.Context()); !errors.Is(err, channel.ErrProxy) || !strings.Contains(err.Error(), "teapot") {
			t.Errorf("scheme %q: %v", scheme, err)
		}
	}
}

// TestBehindProxy: what fails behind a proxy that said yes says that one is on
// the way.
func TestBehindProxy(t *testing.T) {
	p := newPlant(t, variant{"h2", true}, ok)
	p.listen(t)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		c, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n<html>log in first</html>")
		_ = c.Close()
	}))
	t.Cleanup(s.Close)
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.dialVia(t, u); err == nil || !strings.Contains(err.Error(), "through the HTTP proxy: ") {
		t.Errorf("a proxy's own page gave %v", err)
	}
}

func TestProxyThatMisbehaves(t *testing.T) {
	p := newPlant(t, variant{"h2", true}, ok)
	p.listen(t)
	for name, c := range map[string]struct{ answer, says string }{
		"endless header": {"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 64<<10), "its answer is above"},
		"no HTTP":        {"SSH-2.0-OpenSSH\r\n\r\n", "its answer to CONNECT is no HTTP"},
		"refusal":        {"HTTP/1.1 403 Forbidden\r\n\r\n", "it answered"},
		"silence":        {"", "no answer to CONNECT"},
	} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.ReadFull(conn, make([]byte, 16))
			_, _ = io.WriteString(conn, c.answer)
			_ = conn.Close()
		}()
		if _, err := p.dialVia(t, &url.URL{Scheme: "http", Host: l.Addr().String()}); !errors.Is(err, channel.ErrProxy) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s gave %v", name, err)
		}
		_ = l.Close()
		<-done
	}
	if _, err := p.dialVia(t, &url.URL{Scheme: "socks5", Host: "127.0.0.1:1"}); !errors.Is(err, channel.ErrProxy) {
		t.Errorf("an unknown scheme gave %v", err)
	}
}
