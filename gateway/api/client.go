package api

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// ErrPlainHTTP refuses an http:// address: the API has no plaintext form.
var ErrPlainHTTP = errors.New("http:// is refused: use https://, or the gateway's unix socket")

// Limits of the client: what a gateway may make it hold in memory.
const (
	maxAnswer  = 64 << 20
	maxProblem = 1 << 20
)

// ClientConfig says which gateway to talk to, and as whom.
type ClientConfig struct {
	// URL is https://host[:port], unix:///path/of/the/socket, or the bare
	// absolute path of the socket.
	URL string
	// Token is the API token that https needs. It is not sent over a unix
	// socket, where the kernel says who asks.
	Token string
	// Roots are the authorities that the gateway's https certificate is
	// verified against; nil means the system's.
	Roots *x509.CertPool
	// Timeout bounds every call that does not stream; 0 means 60 s.
	Timeout time.Duration
}

// Client is a typed client of one gateway, safe for concurrent use.
type Client struct {
	http    *http.Client
	base    string
	token   string
	timeout time.Duration
	ifMatch string
}

// NewClient makes a client; nothing is dialled before the first call.
func NewClient(cfg ClientConfig) (*Client, error) {
	c := &Client{token: cfg.Token, timeout: cfg.Timeout}
	if c.timeout == 0 {
		c.timeout = time.Minute
	}
	t := &http.Transport{MaxIdleConns: 4, IdleConnTimeout: 30 * time.Second, MaxResponseHeaderBytes: 64 << 10, TLSHandshakeTimeout: 15 * time.Second}
	dialer := &net.Dialer{Timeout: 15 * time.Second}
	if path, ok := socketPath(cfg.URL); ok {
		c.base, c.token = "http://gateway", ""
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) { return dialer.DialContext(ctx, "unix", path) }
	} else {
		u, err := url.Parse(cfg.URL)
		switch {
		case err != nil:
			return nil, fmt.Errorf("gateway address: %w", err)
		case u.Scheme == "http":
			return nil, fmt.Errorf("gateway address %q: %w", cfg.URL, ErrPlainHTTP)
		case u.Scheme != "https" || u.Host == "" || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "":
			return nil, fmt.Errorf("gateway address %q: want https://host[:port], or the path of a unix socket", cfg.URL)
		}
		c.base = "https://" + u.Host
		t.DialContext, t.ForceAttemptHTTP2 = dialer.DialContext, true
		t.Proxy = http.ProxyFromEnvironment
		t.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: cfg.Roots}
	}
	c.http = &http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return c, nil
}

func socketPath(s string) (string, bool) {
	if p, ok := strings.CutPrefix(s, "unix://"); ok {
		return p, true
	}
	return s, strings.HasPrefix(s, "/")
}

// Close ends the idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// IfMatch returns a client whose changes are refused with [CodeChanged] unless
// the object still has this ETag.
func (c *Client) IfMatch(etag string) *Client {
	d := *c
	d.ifMatch = etag
	return &d
}

// request sends one call and returns its answer, whose status is a success.
func (c *Client) request(ctx context.Context, method, path string, query url.Values, in any, accept string) (*http.Response, error) {
	for part := range strings.SplitSeq(strings.TrimPrefix(path, "/"), "/") {
		if part == "" || part == "." || part == ".." {
			// A path with it is another path, to the server as to any proxy.
			return nil, &Problem{Title: http.StatusText(http.StatusNotFound), Status: http.StatusNotFound, Code: CodeNotFound, Detail: fmt.Sprintf("nothing is called %q", part)}
		}
	}
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(b)
	}
	target := c.base + Prefix + path
	if len(query) > 0 {
		target += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, target, body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", accept)
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	if c.ifMatch != "" && method != http.MethodGet {
		req.Header.Set("If-Match", c.ifMatch)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if ue, ok := errors.AsType[*url.Error](err); ok {
			err = ue.Err // the URL of a unix socket is made up, and says nothing to the reader
		}
		return nil, fmt.Errorf("ask gateway: %w", err)
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer func() { _ = resp.Body.Close() }()
	return nil, problemOf(resp)
}

func problemOf(resp *http.Response) error {
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxProblem))
	var p Problem
	if err == nil && json.Unmarshal(b, &p) == nil && p.Detail != "" {
		p.Status = resp.StatusCode
		return &p
	}
	code := CodeInternal
	for c, s := range codeStatus {
		if s == resp.StatusCode && s != http.StatusConflict && s != http.StatusUnprocessableEntity {
			code = c
		}
	}
	return &Problem{Title: resp.Status, Status: resp.StatusCode, Code: code, Detail: fmt.Sprintf("gateway answered %s", resp.Status)}
}

// noAnswer is the [context.DeadlineExceeded] of a gateway that took so long.
type noAnswer time.Duration

func (e noAnswer) Error() string {
	return fmt.Sprintf("no answer within %s: is its process stopped, or its disk?", time.Duration(e))
}

func (noAnswer) Is(target error) bool { return target == context.DeadlineExceeded }

// call sends in, if not nil, and decodes the answer into out, if not nil.
func (c *Client) call(ctx context.Context, method, path string, query url.Values, in, out any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, c.timeout, noAnswer(c.timeout))
	defer cancel()
	resp, err := c.request(ctx, method, path, query, in, "application/json")
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if out == nil {
		_, err := io.Copy(io.Discard, io.LimitReader(resp.Body, maxAnswer))
		return err
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(out); err != nil {
		return fmt.Errorf("ask gateway: answer to %s %s: %w", method, path, err)
	}
	return nil
}

func get[T any](ctx context.Context, c *Client, path string, query url.Values) (out T, err error) {
	err = c.call(ctx, http.MethodGet, path, query, nil, &out)
	return out, err
}

func post[T any](ctx context.Context, c *Client, path string, in any) (out T, err error) {
	err = c.call(ctx, http.MethodPost, path, nil, in, &out)
	return out, err
}

// list follows the cursors until limit items are there; limit 0 means all.
func list[T any](ctx context.Context, c *Client, path string, query url.Values, page Page) ([]T, error) {
	all := []T{}
	for cursor := page.Cursor; ; {
		size := MaxPage
		if page.Limit > 0 {
			size = min(size, page.Limit-len(all))
		}
		query.Set("limit", fmt.Sprint(size))
		query.Del("cursor")
		if cursor != "" {
			query.Set("cursor", cursor)
		}
		part, err := get[List[T]](ctx, c, path, query)
		if err != nil {
			return nil, err
		}
		all = append(all, part.Items...)
		if cursor = part.Next; cursor == "" || (page.Limit > 0 && len(all) >= page.Limit) {
			return all, nil
		}
	}
}

// values makes a query of the pairs whose value is not empty.
func values(pairs ...string) url.Values {
	q := url.Values{}
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			q.Set(pairs[i], pairs[i+1])
		}
	}
	return q
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}

// at joins path elements, escaping what callers name.
func at(collection string, elements ...string) string {
	for i, e := range elements {
		elements[i] = url.PathEscape(e)
	}
	return collection + "/" + strings.Join(elements, "/")
}
