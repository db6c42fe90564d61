package channel_test

import (
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
			if !errors.Is(err, channel.ErrProxy) || !strings.Contains(err.Error(), "HTTPS_PROXY") || strings.Contains(err.Error(), "wrong") {
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

func TestProxyThatMisbehaves(t *testing.T) {
	p := newPlant(t, variant{"h2", true}, ok)
	p.listen(t)
	for name, answer := range map[string]string{
		"endless header": "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 64<<10),
		"no HTTP":        "SSH-2.0-OpenSSH\r\n\r\n",
		"refusal":        "HTTP/1.1 403 Forbidden\r\n\r\n",
		"silence":        "",
	} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.ReadFull(c, make([]byte, 16))
			_, _ = io.WriteString(c, answer)
			_ = c.Close()
		}()
		if _, err := p.dialVia(t, &url.URL{Scheme: "http", Host: l.Addr().String()}); !errors.Is(err, channel.ErrProxy) {
			t.Errorf("%s gave %v", name, err)
		}
		_ = l.Close()
		<-done
	}
	if _, err := p.dialVia(t, &url.URL{Scheme: "socks5", Host: "127.0.0.1:1"}); !errors.Is(err, channel.ErrProxy) {
		t.Errorf("an unknown scheme gave %v", err)
	}
}
