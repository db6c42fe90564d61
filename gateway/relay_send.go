package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

const (
	// relayIdle is how long a connection to a target is kept for the next
	// request, relayIdlePerTarget how many of them per node and target.
	relayIdle          = 30 * time.Second
	relayIdlePerTarget = 64
	maxRelayIdle       = 1024
	maxRelayHeader     = 256 << 10 // of a target's answer
	// expectTime is how long a target may take to say 100 Continue before the
	// body is sent all the same (RFC 9110, section 10.1.1).
	expectTime = 2 * time.Second
	// maxReplay is how much of a body is kept in case another node must take
	// the request over.
	maxReplay = 64 << 10
)

func (rl *relay) transport(p *http.Protocols) *http.Transport {
	return &http.Transport{
		DialContext: rl.dial, Protocols: p, DisableCompression: true, MaxIdleConns: maxRelayIdle, MaxIdleConnsPerHost: relayIdlePerTarget,
		IdleConnTimeout: relayIdle, ExpectContinueTimeout: expectTime, MaxResponseHeaderBytes: maxRelayHeader,
		// One stream that is not read must not stop the others of its connection.
		HTTP2: &http.HTTP2Config{MaxReceiveBufferPerStream: 512 << 10, MaxReceiveBufferPerConnection: 128 << 20, SendPingTimeout: 30 * time.Second},
	}
}

// place names a target at a node as a host, by which the transports keep
// connections apart; a new version of the target is another place.
func place(ch choice, target string) string {
	version := fnv.New32a()
	if ch.spec != nil {
		_, _ = io.WriteString(version, ch.spec.URL) // a hash takes everything
	}
	return fmt.Sprintf("%s.%08x.%s", ch.node, version.Sum32(), target)
}

// aloneKey is choice.alone on its way to dial.
type aloneKey struct{}

// dial opens a stream to a place.
func (rl *relay) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	node, rest, _ := strings.Cut(host, ".")
	_, target, ok := strings.Cut(rest, ".")
	if !ok {
		return nil, fmt.Errorf("%q is not a place", addr)
	}
	alone, _ := ctx.Value(aloneKey{}).(bool)
	stream, err := rl.t.open(ctx, wire.ID(node), target, alone)
	if err != nil {
		return nil, &openError{err}
	}
	m := rl.t.metrics.bytes
	c := &relayConn{targetStream: stream, broke: func() { rl.t.failed(wire.ID(node), "") }, to: m.WithLabelValues("relay", "to").Add, from: m.WithLabelValues("relay", "from").Add}
	return c, nil
}

// openError says that not even a stream could be opened.
type openError struct{ error }

func (e *openError) Unwrap() error { return e.error }

// relayConn is a stream under HTTP. It remembers how it ended: HTTP does not
// always repeat that.
type relayConn struct {
	targetStream
	to, from func(float64)
	broke    func() // the tunnel did, be it in the middle of an answer
	why      atomic.Pointer[error]
}

func (c *relayConn) note(err error) {
	if err == nil || errors.Is(err, io.EOF) || !c.why.CompareAndSwap(nil, &err) {
		return
	}
	if errors.Is(err, tunnel.ErrEnded) || errors.Is(err, tunnel.ErrSilent) {
		c.broke()
	}
}

func (c *relayConn) Read(p []byte) (int, error) {
	n, err := c.targetStream.Read(p)
	c.from(float64(n))
	c.note(err)
	return n, err
}

func (c *relayConn) Write(p []byte) (int, error) {
	n, err := c.targetStream.Write(p)
	c.to(float64(n))
	c.note(err)
	return n, err
}

// ReadFrom implements [io.ReaderFrom]: a body goes straight into what the
// stream sends.
func (c *relayConn) ReadFrom(r io.Reader) (int64, error) {
	to, ok := c.targetStream.(io.ReaderFrom)
	if !ok {
		return io.Copy(struct{ io.Writer }{c}, r)
	}
	n, err := to.ReadFrom(r)
	c.to(float64(n))
	var refused *tunnel.RefusedError
	if errors.As(err, &refused) { // other errors may be those of the body
		c.note(err)
	}
	return n, err
}

// RoundTrip sends a request by the best node, and by another one as long as
// the target cannot have done anything for it.
func (rl *relay) RoundTrip(out *http.Request) (*http.Response, error) {
	x := relayedFrom(out.Context())
	var tried []wire.ID
	var last *relayError
	for {
		ch, err := rl.t.pick(x.target, x.node, tried...)
		if err != nil {
			if last != nil {
				return nil, last
			}
			return nil, rl.nobody(out.Context(), x, err)
		}
		if last != nil {
			rl.t.metrics.retries.Inc()
		}
		x.via = ch
		a := &sending{rl: rl, x: x, ch: ch}
		res, err := a.send(out)
		if err == nil {
			x.cleanup = append(x.cleanup, ch.done)
			rl.t.worked(ch.node, x.target)
			return res, nil
		}
		ch.done()
		if out.Context().Err() != nil {
			return nil, err
		}
		last = a.explain(err)
		tried = append(tried, ch.node)
		if !a.mayRepeat(out, err) || len(tried) == maxNodeTries {
			return nil, last
		}
	}
}

// sending is one request by way of one node.
type sending struct {
	rl *relay
	x  *relayed
	ch choice

	conn     atomic.Pointer[relayConn]
	timer    *time.Timer // to the headers of the answer
	late     atomic.Bool
	answered atomic.Bool
	view     *bodyView // nil: there is no body
}

// send returns the target's answer once its headers are there.
func (a *sending) send(out *http.Request) (*http.Response, error) {
	scheme, base, host := wire.SchemeHTTP, "", a.x.target
	timeout := wire.DefaultTargetTimeout
	if spec := a.ch.spec; spec != nil {
		if !spec.HTTP() {
			return nil, relayFault(api.CodeNotFound, hopGateway, "target %s is a TCP service: `sallyport target forward` leads to it", a.x.target)
		}
		u, err := url.Parse(spec.URL)
		if err != nil {
			return nil, err
		}
		scheme, base, host, timeout = spec.Scheme(), strings.TrimSuffix(u.EscapedPath(), "/"), u.Host, timeoutOf(spec)
	}
	ctx, cancel := context.WithCancel(context.WithValue(out.Context(), aloneKey{}, a.ch.alone))
	a.x.cleanup = append(a.x.cleanup, cancel) // it ends the answer's body too
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) {
		if c, ok := i.Conn.(*relayConn); ok {
			a.conn.Store(c)
		}
	}})
	a.timer = time.AfterFunc(timeout.Std(), func() {
		a.late.Store(true)
		cancel()
	})
	defer a.timer.Stop()
	req := out.WithContext(ctx)
	req.URL = targetURL(place(a.ch, a.x.target), cmp.Or(base+a.x.path, "/"), a.x.query)
	req.Host = host
	if a.x.body != nil {
		a.view = a.x.body.view(func() {
			if !a.answered.Load() { // the time is counted from the end of the body
				a.timer.Reset(timeout.Std())
			}
			if a.answered.Load() {
				a.timer.Stop()
			}
		})
		req.Body = a.view
	}
	t := a.rl.plain
	if scheme == wire.SchemeH2C {
		t = a.rl.h2c
	}
	res, err := t.RoundTrip(req)
	a.answered.Store(true)
	if err != nil {
		cancel()
		return nil, err
	}
	if a.view != nil {
		a.x.body.answered()
	}
	return res, nil
}

// targetURL keeps a path as it was written.
func targetURL(host, path, query string) *url.URL {
	u := &url.URL{Scheme: "http", Host: host, RawQuery: query}
	if p, err := url.PathUnescape(path); err == nil {
		u.Path, u.RawPath = p, path
		if u.EscapedPath() == path {
			return u
		}
	}
	if strings.HasPrefix(path, "//") { // it would be taken for a host
		return u
	}
	u.Path, u.RawPath, u.Opaque = "", "", path
	return u
}

// cause is how the stream below ended, if that is known.
func (a *sending) cause(err error) error {
	if refused, ok := errors.AsType[*tunnel.RefusedError](err); ok {
		return refused
	}
	if c := a.conn.Load(); c != nil {
		if why := c.why.Load(); why != nil {
			return *why
		}
	}
	return err
}

// explain says which hop failed, and has others preferred where it is the
// node's failure.
func (a *sending) explain(err error) *relayError {
	node, target := "node "+a.rl.t.fleet.nameNow(a.ch.node), "target "+a.x.target
	if fault, ok := errors.AsType[*relayError](err); ok {
		return fault
	}
	var open *openError
	var refused *tunnel.RefusedError
	why := a.cause(err)
	fail := func(code api.Code, hop string) *relayError {
		e := relayFault(code, hop, "%s", wire.Quotable(why.Error()))
		e.cause = err
		return e
	}
	switch {
	case a.late.Load():
		return relayFault(api.CodeTimeout, target, "no answer within %s, by way of %s", timeoutOf(a.specOrZero()), node)
	case errors.As(err, &open):
		a.rl.t.failed(a.ch.node, "")
		if errors.Is(err, context.DeadlineExceeded) {
			return fail(api.CodeTimeout, node)
		}
		if errors.Is(err, ErrNotConnected) {
			return fail(api.CodeUnavailable, a.rl.t.fleet.brokenAt(a.ch.node))
		}
		return fail(api.CodeUnavailable, node)
	case errors.As(why, &refused):
		a.rl.t.failure(a.ch.node, a.x.target, refused)
		switch refused.Code {
		case tunnel.NotFound, tunnel.Locked, tunnel.Draining:
			return fail(api.CodeUnavailable, node)
		case tunnel.Forbidden:
			return fail(api.CodeForbidden, node)
		case tunnel.Overloaded:
			return fail(api.CodeBusy, node)
		case tunnel.Timeout:
			return fail(api.CodeTimeout, target)
		case tunnel.Unreachable, tunnel.Reset:
			return fail(api.CodeFailed, target)
		case tunnel.Failed:
		}
		return fail(api.CodeFailed, node)
	case errors.Is(why, tunnel.ErrEnded), errors.Is(why, tunnel.ErrSilent), errors.Is(why, tunnel.ErrClosed):
		a.rl.t.failed(a.ch.node, "")
		return fail(api.CodeFailed, node)
	}
	return fail(api.CodeFailed, target)
}

func (a *sending) specOrZero() *wire.TargetSpec {
	if a.ch.spec != nil {
		return a.ch.spec
	}
	return &wire.TargetSpec{}
}

// mayRepeat says whether another node can be asked: the request did not reach
// the target, or does nothing there.
func (a *sending) mayRepeat(out *http.Request, err error) bool {
	if a.view != nil && !a.x.body.again() {
		return false
	}
	var open *openError
	if errors.As(err, &open) || unreached(a.cause(err)) {
		return true
	}
	var fault *relayError
	if errors.As(err, &fault) || a.late.Load() {
		return false
	}
	switch out.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions:
		return a.view == nil
	}
	return false
}

// nobody says why there is no node to send a request to.
func (rl *relay) nobody(ctx context.Context, x *relayed, err error) *relayError {
	switch {
	case errors.Is(err, ErrNotConnected) && x.node != "":
		return relayFault(api.CodeUnavailable, rl.t.fleet.brokenAt(x.node), "node %s is not connected", rl.t.fleet.nameNow(x.node))
	case errors.Is(err, ErrNotConnected):
		hop := hopGateway
		if u := rl.t.usage(x.target); len(u.offered) > 0 {
			hop = rl.t.fleet.brokenAt(u.offered[0])
		}
		return relayFault(api.CodeUnavailable, hop, "no node that offers target %s is connected", x.target)
	case errors.Is(err, errNoTarget):
		switch p, err := rl.db.Policy(ctx, store.DefaultTenant, x.target); {
		case err == nil && p.Type == wire.PolicyTarget:
			return relayFault(api.CodeUnavailable, hopGateway, "no deployment brings target %s to a node", x.target)
		case err != nil && !errors.Is(err, store.ErrNotFound):
			return relayFault(api.CodeUnavailable, hopGateway, "the database does not answer")
		}
		return relayFault(api.CodeNotFound, hopGateway, "no target %q", wire.Quotable(x.target))
	case errors.Is(err, errNotOffered):
		return rl.notOffered(ctx, x)
	}
	return relayFault(api.CodeUnavailable, hopGateway, "target %s: %s", x.target, err)
}

// notOffered explains why one node does not have the target.
func (rl *relay) notOffered(ctx context.Context, x *relayed) *relayError {
	name := rl.t.fleet.nameNow(x.node)
	said, err := rl.db.TargetStatus(ctx, x.target)
	if s, ok := said[x.node]; err == nil && ok && s.State != wire.PolicyApplied {
		return relayFault(api.CodeUnavailable, "node "+name, "target %s is %s there: %s", x.target, wire.Quotable(s.State), wire.Quotable(s.Error))
	}
	return relayFault(api.CodeNotFound, hopGateway, "node %s does not offer target %s", name, x.target)
}
