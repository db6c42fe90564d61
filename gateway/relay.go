package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

// The HTTP relay: ANY /relay/{tenant}/{target}/{path...}, with target@node for
// one node. Whatever is not listed here passes as it is, both ways.
const (
	relayPrefix = "/relay/"
	// headerFailedHop says in every answer of the relay's own which hop failed:
	// "gateway", "rcp NAME", "node NAME" or "target NAME".
	headerFailedHop = "Sallyport-Failed-Hop"
	// headerNode names the node by which an answer of a target came.
	headerNode = "Sallyport-Node"
	// headerTargetAuth becomes the Authorization that the target sees. The
	// caller's own Authorization is for us, and ends here.
	headerTargetAuth = "Sallyport-Target-Authorization"
	ownHeaders       = "Sallyport-"

	relayBuffer     = 32 << 10
	statusGone      = 499 // in metrics: the caller went away before there was an answer
	relayAuditEvery = 10 * time.Minute
	maxRelayAudits  = 10_000
)

// relay passes HTTP requests on to targets.
type relay struct {
	t     *targets
	db    *store.DB
	log   *slog.Logger
	proxy *httputil.ReverseProxy
	plain *http.Transport // HTTP/1.1, also to targets that the node speaks TLS with
	h2c   *http.Transport

	running sync.WaitGroup
	cut     context.Context // ends what runs when the server stops

	mu      sync.Mutex
	audited map[relayUse]time.Time
}

// relayUse is what the audit log shows of relayed requests, once in a while.
type relayUse struct{ who, origin, target, node string }

func newRelay(t *targets, db *store.DB, log *slog.Logger) *relay {
	rl := &relay{t: t, db: db, log: log, cut: context.Background(), audited: map[relayUse]time.Time{}}
	rl.plain, rl.h2c = rl.transport(new(http.Protocols)), rl.transport(new(http.Protocols))
	rl.plain.Protocols.SetHTTP1(true)
	rl.h2c.Protocols.SetUnencryptedHTTP2(true)
	rl.proxy = &httputil.ReverseProxy{
		Rewrite: rl.rewrite, Transport: rl, FlushInterval: -1, BufferPool: new(bufferPool),
		ModifyResponse: rl.cleanResponse, ErrorHandler: rl.failed, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	return rl
}

// close ends the connections that are kept for later requests.
func (rl *relay) close() {
	rl.running.Wait()
	rl.plain.CloseIdleConnections()
	rl.h2c.CloseIdleConnections()
}

// isRelay tells whether a request is for the relay: as it is written, for what
// is escaped in a path is the target's affair.
func isRelay(req *http.Request) bool { return strings.HasPrefix(req.URL.EscapedPath(), relayPrefix) }

// relayed is one request.
type relayed struct {
	target string
	node   wire.ID // empty: any
	prefix string  // the path up to the target's own
	path   string  // the rest as it was written, escapes and all; empty, or with a slash
	query  string
	body   *relayBody // nil: none

	via     choice
	cleanup []func()
	result  string // failed hop, for metrics; empty: none
	status  int
}

type relayedKey struct{}

func relayedFrom(ctx context.Context) *relayed {
	x, _ := ctx.Value(relayedKey{}).(*relayed)
	return x
}

// relayError is why the relay answers itself.
type relayError struct {
	status int
	code   api.Code
	hop    string
	detail string
	cause  error
}

func (e *relayError) Error() string { return e.hop + ": " + e.detail }
func (e *relayError) Unwrap() error { return e.cause }

func relayFault(code api.Code, hop, format string, args ...any) *relayError {
	return &relayError{status: code.Status(), code: code, hop: hop, detail: fmt.Sprintf(format, args...)}
}

const hopGateway = "gateway"

// ServeHTTP relays one request of a caller who is known.
func (rl *relay) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	rl.running.Add(1)
	defer rl.running.Done()
	m := rl.t.metrics
	m.running.Inc()
	defer m.running.Dec()
	x, fault := rl.begin(req)
	if fault != nil {
		rl.answer(w, fault)
		m.requests.WithLabelValues(strconv.Itoa(fault.status), hopKind(fault.hop)).Inc()
		return
	}
	defer x.end()
	ctx, cancel := context.WithCancel(context.WithValue(req.Context(), relayedKey{}, x))
	defer cancel()
	defer context.AfterFunc(rl.cut, cancel)()
	rc := http.NewResponseController(w)
	_ = rc.EnableFullDuplex() // HTTP/2 always is
	// A stream may last for days. What is behind the caller's token was read
	// with deadlines; that a caller is gone, keep-alives tell.
	_, _ = rc.SetReadDeadline(time.Time{}), rc.SetWriteDeadline(time.Time{})
	defer func() { _ = rc.SetReadDeadline(time.Now().Add(apiReadTime)) }() // for what is left of the body
	for _, name := range []string{"X-Content-Type-Options", "Cache-Control"} {
		w.Header().Del(name) // the target's affair
	}
	defer func() {
		if v := recover(); v != nil { // the answer broke off
			m.requests.WithLabelValues(strconv.Itoa(x.status), cmp.Or(x.result, "broken")).Inc()
			panic(v)
		}
		m.requests.WithLabelValues(strconv.Itoa(x.status), x.result).Inc()
	}()
	if req.Body != nil && req.Body != http.NoBody && req.ContentLength != 0 {
		x.body = &relayBody{src: req.Body}
	}
	rl.proxy.ServeHTTP(w, req.WithContext(ctx))
}

func (x *relayed) end() {
	for _, f := range x.cleanup {
		f()
	}
}

// begin checks a request as far as that needs no node.
func (rl *relay) begin(req *http.Request) (*relayed, *relayError) {
	c := askerFrom(req.Context())
	if !permissions[c.role][mayOperate] {
		return nil, relayFault(api.CodeForbidden, hopGateway, "%s has the role %s, which does not allow to %s", c.actor.Who, c.role, mayOperate)
	}
	if req.Method == http.MethodConnect || req.Method == http.MethodTrace {
		return nil, &relayError{status: http.StatusMethodNotAllowed, code: api.CodeMalformed, hop: hopGateway, detail: "the method " + req.Method + " is not relayed"}
	}
	tenant, target, node, x, err := parseRelay(req)
	if err != nil {
		return nil, relayFault(api.CodeNotFound, hopGateway, "%v", err)
	}
	if tenant != store.DefaultTenant {
		return nil, relayFault(api.CodeNotFound, hopGateway, "no tenant %q", wire.Quotable(tenant))
	}
	if node != "" {
		id, ok := rl.t.node(node)
		if !ok {
			return nil, relayFault(api.CodeNotFound, hopGateway, "no node %q (its exact name or UUID is needed)", wire.Quotable(node))
		}
		x.node = id
	}
	x.target = target
	leave, ok := rl.t.enter(target, rl.t.limit)
	if !ok {
		return nil, relayFault(api.CodeBusy, hopGateway, "%d connections and requests run through target %s, which is the limit (SALLYPORT_GATEWAY_TARGET_LIMIT)", rl.t.limit, target)
	}
	x.cleanup = append(x.cleanup, leave)
	rl.audit(req.Context(), c, target, node)
	return x, nil
}

// parseRelay takes the path apart as it was written: what stands behind the
// target reaches it byte for byte.
func parseRelay(req *http.Request) (tenant, target, node string, x *relayed, err error) {
	raw, _, _ := strings.Cut(req.RequestURI, "?")
	if !strings.HasPrefix(raw, relayPrefix) { // absolute form, or made by a test
		raw = req.URL.EscapedPath()
	}
	rest, ok := strings.CutPrefix(raw, relayPrefix)
	first, rest, _ := strings.Cut(rest, "/")
	second, path, slash := strings.Cut(rest, "/")
	tenant, err1 := url.PathUnescape(first)
	target, err2 := url.PathUnescape(second)
	if i := strings.LastIndexByte(target, '@'); i >= 0 {
		target, node = target[:i], target[i+1:]
		ok = ok && node != ""
	}
	if !ok || errors.Join(err1, err2) != nil || tenant == "" || target == "" {
		return "", "", "", nil, errors.New("want /relay/TENANT/TARGET/PATH or /relay/TENANT/TARGET@NODE/PATH")
	}
	x = &relayed{prefix: relayPrefix + first + "/" + second, query: req.URL.RawQuery}
	if slash {
		x.path = "/" + path
	}
	return tenant, target, node, x, nil
}

// audit notes who used which target, once in a while: not each request.
func (rl *relay) audit(ctx context.Context, c asker, target, node string) {
	origin, _, _ := strings.Cut(c.actor.Origin, ":")
	use := relayUse{c.actor.Who, origin, target, node}
	now := time.Now()
	rl.mu.Lock()
	fresh := now.Sub(rl.audited[use]) >= relayAuditEvery
	if fresh {
		if len(rl.audited) >= maxRelayAudits {
			clear(rl.audited)
		}
		rl.audited[use] = now
	}
	rl.mu.Unlock()
	if !fresh {
		return
	}
	detail := "by any node"
	if node != "" {
		detail = "by node " + wire.Quotable(node)
	}
	err := rl.db.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		tx.Audit(ctx, "target.relay", "target "+wire.Quotable(target), detail)
		return nil
	})
	if err != nil && ctx.Err() == nil {
		rl.log.Error("audit log not written", "what", "target.relay", "target", wire.Quotable(target), "who", c.actor.Who, "error", err)
	}
}

// failed answers when no target did.
func (rl *relay) failed(w http.ResponseWriter, req *http.Request, err error) {
	x := relayedFrom(req.Context())
	var fault *relayError
	switch {
	case errors.As(err, &fault):
	case req.Context().Err() != nil: // the caller went away, or we are stopping
		fault = relayFault(api.CodeUnavailable, hopGateway, "the gateway is stopping")
		if rl.cut.Err() == nil {
			x.status, x.result = statusGone, "caller"
			return
		}
	default:
		fault = relayFault(api.CodeFailed, "target "+x.target, "%s", wire.Quotable(err.Error()))
	}
	x.status, x.result = fault.status, hopKind(fault.hop)
	rl.log.Debug("relayed request failed", "target", x.target, "hop", fault.hop, "status", fault.status, "error", err)
	rl.answer(w, fault)
}

// hopKind is the first word of a hop.
func hopKind(hop string) string {
	kind, _, _ := strings.Cut(hop, " ")
	return kind
}

func (rl *relay) answer(w http.ResponseWriter, e *relayError) {
	h := w.Header()
	h.Set(headerFailedHop, wire.Quotable(e.hop))
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	switch e.status {
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		h.Set("Retry-After", "1")
	case http.StatusMethodNotAllowed:
		h.Set("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
	}
	p := api.NewProblem(e.code, e.Error())
	p.Status, p.Title = e.status, http.StatusText(e.status)
	writeProblem(w, p)
}

// bufferPool are the buffers of response bodies.
type bufferPool struct{ pool sync.Pool }

func (p *bufferPool) Get() []byte {
	if b, ok := p.pool.Get().(*[relayBuffer]byte); ok {
		return b[:]
	}
	return make([]byte, relayBuffer)
}

func (p *bufferPool) Put(b []byte) { p.pool.Put((*[relayBuffer]byte)(b)) }
