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
	"time"

	"golang.org/x/net/http/httpproxy"
)

// maxProxyAnswer bounds what an HTTP proxy may answer to CONNECT, in bytes.
const maxProxyAnswer = 32 << 10

// ErrProxy says that the HTTP proxy, not the party behind it, is the trouble.
var ErrProxy = errors.New("HTTP proxy")

// proxyFromEnvironment reads HTTPS_PROXY and NO_PROXY.
func proxyFromEnvironment(target *url.URL) (*url.URL, error) {
	return httpproxy.FromEnvironment().ProxyFunc()(target)
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
			err = context.Cause(ctx)
		}
		return nil, err
	}
	if !stop() {
		_ = conn.Close()
		return nil, context.Cause(ctx)
	}
	return tunnel, nil
}

func askProxy(conn net.Conn, proxy *url.URL, addr string) error {
	req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: addr}, Host: addr, Header: http.Header{"User-Agent": {"sallyport"}}}
	if u := proxy.User; u != nil {
		pass, _ := u.Password()
		req.Header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(u.Username()+":"+pass)))
	}
	if err := req.Write(conn); err != nil {
		return err
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
			return err
		}
		head = append(head, b[0])
	}
	res, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(head)), req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	switch {
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
