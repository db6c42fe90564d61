package channel

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"golang.org/x/net/http/httpproxy"
)

// maxProxyAnswer bounds what an HTTP proxy may answer to CONNECT, in bytes.
const maxProxyAnswer = 32 << 10

// ErrProxy says that the HTTP proxy, not the party behind it, is the trouble.
var ErrProxy = errors.New("HTTP proxy")

var errProxyURL = errors.New("it is not of the form http://user:password@host:port; in user and password, write characters such as % / ? # \\ as %25 %2F %3F %23 %5C")

// proxyFromEnvironment reads HTTPS_PROXY and NO_PROXY. Where the former is no
// URL, because of a password with a slash for one, httpproxy would pass by the
// proxy, or take the password for a part of an address, which logs show.
func proxyFromEnvironment(target *url.URL) (*url.URL, error) {
	conf := httpproxy.FromEnvironment()
	if conf.HTTPSProxy == "" {
		return nil, nil
	}
	proxy, bad := parseProxy(conf.HTTPSProxy)
	conf.HTTPSProxy = "http://proxy.invalid" // whether there is one for target is all that is asked
	if found, err := conf.ProxyFunc()(target); found == nil || err != nil {
		return nil, err
	}
	return proxy, bad
}

// parseProxy reads the URL of a proxy, which may lack its scheme. Its errors
// show nothing of it.
func parseProxy(s string) (*url.URL, error) {
	if !strings.Contains(s, "://") {
		s = "http://" + s
	}
	u, err := url.Parse(s)
	if err != nil || u.Hostname() == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, errProxyURL
	}
	return u, nil
}

type dialFunc func(ctx context.Context, network, addr string) (net.Conn, error)

// dialTCP connects to addr, through a proxy if there is one for it; direct
// tells that there is none.
func (d *Dialer) dialTCP(ctx context.Context) (conn net.Conn, direct bool, err error) {
	dial := d.dialFunc()
	proxy, err := d.proxyURL()
	if err != nil {
		return nil, false, err
	}
	if proxy == nil {
		conn, err = dial(ctx, "tcp", d.Addr)
		return conn, true, err
	}
	if conn, err = dialProxy(ctx, dial, proxy, d.Addr); err != nil {
		return nil, false, fmt.Errorf("%w %s: %w", ErrProxy, proxy.Redacted(), err)
	}
	return conn, false, nil
}

func (d *Dialer) dialFunc() dialFunc {
	if d.DialContext != nil {
		return d.DialContext
	}
	return (&net.Dialer{}).DialContext
}

func (d *Dialer) proxyURL() (*url.URL, error) {
	find := d.Proxy
	if find == nil {
		find = proxyFromEnvironment
	}
	u, err := find(&url.URL{Scheme: "https", Host: d.Addr})
	if err != nil {
		return nil, fmt.Errorf("%w: HTTPS_PROXY: %w", ErrProxy, err)
	}
	return u, nil
}

// dialProxy asks a proxy for a tunnel (RFC 9110 section 9.3.6), with basic
// authentication if its URL has user and password.
func dialProxy(ctx context.Context, dial dialFunc, proxy *url.URL, addr string) (net.Conn, error) {
	port := proxy.Port()
	switch {
	case proxy.Scheme != "http" && proxy.Scheme != "https":
		return nil, fmt.Errorf("scheme %q, want http or https", proxy.Scheme)
	case port == "" && proxy.Scheme == "http":
		port = "80"
	case port == "":
		port = "443"
	}
	conn, err := dial(ctx, "tcp", net.JoinHostPort(proxy.Hostname(), port))
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	tunnel := conn
	if proxy.Scheme == "https" {
		// The proxy is no party of ours: the system's roots vouch for it.
		tc := tls.Client(conn, &tls.Config{ServerName: proxy.Hostname(), MinVersion: tls.VersionTLS12})
		if err := tc.HandshakeContext(ctx); err != nil {
			_ = conn.Close()
			return nil, err
		}
		tunnel = tc
	}
	if err := askProxy(tunnel, proxy, addr); err != nil {
		_ = conn.Close()
		if ctx.Err() != nil {
			err = noAnswer(context.Cause(ctx))
		}
		return nil, err
	}
	if !stop() {
		_ = conn.Close()
		return nil, context.Cause(ctx)
	}
	return tunnel, nil
}

func noAnswer(err error) error { return fmt.Errorf("no answer to CONNECT: %w", err) }

func askProxy(conn net.Conn, proxy *url.URL, addr string) error {
	req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: addr}, Host: addr, Header: http.Header{"User-Agent": {"sallyport"}}}
	if u := proxy.User; u != nil {
		pass, _ := u.Password()
		req.Header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(u.Username()+":"+pass)))
	}
	if err := req.Write(conn); err != nil {
		return noAnswer(err)
	}
	return readProxyAnswer(conn, req)
}

// readProxyAnswer reads the answer to CONNECT byte by byte, so that not one
// byte of the tunnel is taken.
func readProxyAnswer(r io.Reader, req *http.Request) error {
	var head []byte
	b := make([]byte, 1)
	for !headerEnds(head) {
		if len(head) == maxProxyAnswer {
			return fmt.Errorf("its answer is above %d bytes", maxProxyAnswer)
		}
		if _, err := io.ReadFull(r, b); err != nil {
			return noAnswer(err)
		}
		head = append(head, b[0])
	}
	res, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(head)), req)
	if err != nil {
		return fmt.Errorf("its answer to CONNECT is no HTTP: %w", err)
	}
	defer func() { _ = res.Body.Close() }()
	unknown := res.StatusCode == http.StatusProxyAuthRequired || res.StatusCode == http.StatusUnauthorized // tinyproxy's word for a wrong password
	switch {
	case unknown && req.Header.Get("Proxy-Authorization") != "":
		return fmt.Errorf("it does not take the user and the password in HTTPS_PROXY (%q)", headerText(res.Status))
	case res.StatusCode == http.StatusProxyAuthRequired:
		return errors.New("it wants authentication: put user and password into HTTPS_PROXY (http://user:password@host:port)")
	case res.StatusCode/100 != 2:
		return fmt.Errorf("it answered %q", headerText(res.Status))
	}
	return nil
}

func headerEnds(b []byte) bool {
	n := len(b)
	return n >= 4 && string(b[n-4:]) == "\r\n\r\n" || n >= 2 && string(b[n-2:]) == "\n\n"
}
