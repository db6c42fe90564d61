package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/user"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/httpserve"
	"sallyport/internal/wire"
)

// Limits of the REST interface. Live streams move their own deadlines.
const (
	apiHeaderTime = 10 * time.Second
	apiReadTime   = 30 * time.Second
	apiWriteTime  = 3 * time.Minute // a trace or a renewal speaks to a node first
	apiIdleTime   = 2 * time.Minute
	maxApply      = 24 << 20 // body of an apply, JSON around 8 MiB of manifests

	apiStreams      = 250 // of one HTTP/2 connection
	apiStreamWindow = 256 << 10
)

// rest is the REST interface of one gateway. What it calls writes the audit row of
// a change in the transaction of the change, with the actor that ctx carries (see
// [store.WithActor]). Errors that a caller can do something about are *api.Problem,
// or one of the sentinels that [rest.problem] knows.
type rest struct {
	s       *Server
	log     *slog.Logger
	api     huma.API
	mux     *http.ServeMux
	tokens  *tokenGate
	refused *refusals
	relay   *relay
	pages   nodePages
	streams context.Context // ends the live streams when the server stops
}

// newREST registers every operation. It opens nothing.
func newREST(s *Server) *rest {
	r := &rest{s: s, log: s.log, mux: http.NewServeMux(), tokens: newTokenGate(s.store), refused: newRefusals(s.store, s.metrics.refused, s.log), streams: context.Background(),
		relay: newRelay(s.targets, s.store, s.log)}
	cfg := huma.Config{
		OpenAPI: &huma.OpenAPI{
			OpenAPI: "3.1.0",
			Info:    &huma.Info{Title: "Sallyport gateway", Version: s.cfg.Program},
			Components: &huma.Components{
				Schemas:         huma.NewMapRegistry("#/components/schemas/", huma.DefaultSchemaNamer),
				SecuritySchemes: map[string]*huma.SecurityScheme{"token": {Type: "http", Scheme: "bearer"}},
			},
		},
		OpenAPIPath: "/api/openapi", Formats: huma.DefaultFormats, DefaultFormat: "application/json",
	}
	r.api = humago.New(r.mux, cfg)
	r.api.UseMiddleware(r.authorise, knownParameters)
	r.adminRoutes()
	r.nodeRoutes()
	r.rcpRoutes()
	r.enrollRoutes()
	r.certificateRoutes()
	r.caRoutes()
	r.deployRoutes()
	r.actionRoutes()
	r.eventRoutes()
	r.targetRoutes()
	r.mux.HandleFunc(everyPath, r.noOperation)
	return r
}

// serveAPI serves the REST interface on the unix socket and, unless it is off,
// over https, until ctx ends and the requests that run then are answered.
func (s *Server) serveAPI(ctx context.Context) error {
	r := newREST(s)
	streams, end := context.WithCancel(ctx) // so that live streams end with the server
	defer end()
	r.streams = streams
	relayed, cut := context.WithCancel(context.WithoutCancel(ctx))
	r.relay.cut = relayed
	defer r.relay.close() // connections that were upgraded are not the server's any more
	defer cut()
	g, ctx := errgroup.WithContext(ctx)
	if s.cfg.Socket != "" {
		ln, err := listenSocket(s.cfg.Socket)
		if err != nil {
			return fmt.Errorf("api socket: %w", err)
		}
		g.Go(func() error { return r.serve(ctx, ln, r.fromSocket()) })
		s.log.Info("api listens", "socket", s.cfg.Socket)
	}
	if addr := string(s.cfg.Listen); addr != "" {
		g.Go(func() error { return r.serveTLS(ctx, addr) })
	}
	return g.Wait()
}

// serveTLS answers on the https address.
func (r *rest) serveTLS(ctx context.Context, addr string) error {
	cert, err := loadAPICertificate(r.s.apiTLSDir(), addr, r.log)
	if err != nil {
		return fmt.Errorf("api certificate: %w", err)
	}
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
	if err != nil {
		return fmt.Errorf("api listener: %w (set SALLYPORT_GATEWAY_LISTEN to another address, or to off)", err)
	}
	r.log.Info("api listens", "address", "https://"+ln.Addr().String(), "ca_file", cert.certFile())
	cfg := r.s.doors.tlsConfig(&tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: cert.get, NextProtos: []string{"h2", "http/1.1"}})
	return r.serve(ctx, tls.NewListener(newCrowd(ln, r.log), cfg), r.s.doors.before(r.fromNetwork()))
}

// serve answers on one listener until ctx ends.
func (r *rest) serve(ctx context.Context, ln net.Listener, h http.Handler) error {
	srv := &http.Server{
		Handler: r.limits(h), ReadHeaderTimeout: apiHeaderTime, IdleTimeout: apiIdleTime, MaxHeaderBytes: wire.MaxHeader,
		ConnContext: withConn, ErrorLog: slog.NewLogLogger(r.log.Handler(), slog.LevelDebug),
		// A relayed body that its target does not take must not stop the
		// others of its connection; a caller that is gone must not hold one.
		HTTP2: &http.HTTP2Config{MaxConcurrentStreams: apiStreams, MaxReceiveBufferPerStream: apiStreamWindow,
			MaxReceiveBufferPerConnection: apiStreams * apiStreamWindow, SendPingTimeout: apiIdleTime / 4},
		Protocols: new(http.Protocols),
	}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetHTTP2(true)
	srv.Protocols.SetUnencryptedHTTP2(ln.Addr().Network() == "unix") // where the kernel says who asks
	if err := httpserve.Until(ctx, srv, ln, drainTime); err != nil {
		return fmt.Errorf("api on %s: %w", ln.Addr(), err)
	}
	return nil
}

// limits bounds each request in time. Sizes of bodies are limits of the
// operations.
func (r *rest) limits(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		defer func() {
			if v := recover(); v != nil {
				if err, ok := v.(error); ok && errors.Is(err, http.ErrAbortHandler) { // a relayed answer broke off
					panic(v)
				}
				r.log.Error("api call panicked", "method", req.Method, "path", wire.Quotable(req.URL.Path), "panic", v, "stack", string(debug.Stack()))
				panic(http.ErrAbortHandler) // the answer may have begun
			}
		}()
		rc := http.NewResponseController(w)
		now := time.Now()
		if err := errors.Join(rc.SetReadDeadline(now.Add(apiReadTime)), rc.SetWriteDeadline(now.Add(apiWriteTime))); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return // the connection is gone
		}
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("Cache-Control", "no-store")
		h.ServeHTTP(w, req)
	})
}

// route serves a request whose caller is known.
func (r *rest) route(w http.ResponseWriter, req *http.Request) {
	if isRelay(req) { // not by the mux, which would clean its path
		r.relay.ServeHTTP(w, req)
		return
	}
	r.mux.ServeHTTP(w, req)
}

// everyPath is the pattern of what no operation is for.
const everyPath = "/"

// noOperation says whether it is the path or the method that does not exist.
func (r *rest) noOperation(w http.ResponseWriter, req *http.Request) {
	path := wire.Quotable(req.URL.Path)
	var allow []string
	for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete} {
		if _, pattern := r.mux.Handler(&http.Request{Method: method, URL: req.URL, Host: req.Host}); pattern != everyPath {
			allow = append(allow, method)
		}
	}
	if allow == nil {
		writeProblem(w, api.NewProblem(api.CodeNotFound, "no such path: "+path))
		return
	}
	methods := strings.Join(allow, ", ")
	w.Header().Set("Allow", methods)
	writeProblem(w, api.NewProblem(api.CodeMethod, fmt.Sprintf("%s is not for the method %s, but for %s", path, wire.Quotable(req.Method), methods)))
}

// knownParameters refuses parameters that an operation does not have: a misspelled
// filter would select everything, a misspelled option do something else, and who
// sends a condition that nobody looks at relies on it.
func knownParameters(ctx huma.Context, next func(huma.Context)) {
	req, w := unwrap(ctx)
	refuse := func(p *api.Problem) {
		tellRefused(ctx, p)
		writeProblem(w, p)
	}
	given, err := url.ParseQuery(req.URL.RawQuery)
	if err != nil {
		refuse(api.NewProblem(api.CodeMalformed, "the query is malformed: "+wire.Quotable(err.Error())))
		return
	}
	var known []string
	conditional := req.Method == http.MethodGet
	for _, p := range ctx.Operation().Parameters {
		switch p.In {
		case "query":
			known = append(known, p.Name)
		case "header":
			conditional = conditional || p.Name == headerIfMatch
		}
	}
	var faults []api.ProblemError
	if !conditional && len(req.Header.Values(headerIfMatch)) > 0 {
		faults = append(faults, api.ProblemError{Location: "header." + headerIfMatch, Message: "this call changes nothing that has an ETag: leave the condition out"})
	}
	for _, name := range slices.Sorted(maps.Keys(given)) {
		why := ""
		switch {
		case !slices.Contains(known, name) && known == nil:
			why = "unknown parameter: there are none"
		case !slices.Contains(known, name):
			why = "unknown parameter: there are " + strings.Join(known, ", ")
		case len(given[name]) > 1:
			why = "given more than once"
		}
		if why != "" {
			faults = append(faults, api.ProblemError{Location: "query." + wire.Quotable(name), Message: why})
		}
	}
	if faults != nil {
		refuse(api.NewProblem(api.CodeInvalid, "nothing was done", faults...))
		return
	}
	next(ctx)
}

const headerIfMatch = "If-Match"

// listenSocket opens the unix socket for its owner and the group sallyport, if
// there is one that it can be given to. A socket that a dead process left is taken over.
func listenSocket(path string) (net.Listener, error) {
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		_ = c.Close()
		return nil, fmt.Errorf("%s: another process answers there", path)
	}
	if st, err := os.Lstat(path); err == nil && st.Mode().Type() == os.ModeSocket {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error { // before it has a name
		var failed error
		err := c.Control(func(fd uintptr) { failed = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, failed)
	}}
	ln, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	st, err := os.Stat(path)
	if err != nil {
		return nil, errors.Join(err, ln.Close())
	}
	owner, ok := st.Sys().(*syscall.Stat_t) // the group may be the directory's
	shared := ok && owner.Gid == 0
	if g, err := user.LookupGroup("sallyport"); err == nil {
		if gid, err := strconv.Atoi(g.Gid); err == nil && os.Chown(path, -1, gid) == nil {
			shared = true
		}
	}
	if shared { // with another group of ours, which may be everybody's, it is not
		if err := os.Chmod(path, 0o660); err != nil {
			return nil, errors.Join(err, ln.Close())
		}
	}
	return ln, nil
}

// handle registers one operation. Errors become problems; a changing call that
// came to nothing is written to the audit log.
func handle[I, O any](r *rest, op huma.Operation, need permission, f func(ctx context.Context, in *I) (*O, error)) {
	op.Path = api.Prefix + op.Path
	op.Metadata = map[string]any{"permission": need}
	op.Security = []map[string][]string{{"token": {}}}
	op.Description = "Needs the permission to " + string(need) + "."
	huma.Register(r.api, op, func(ctx context.Context, in *I) (*O, error) {
		out, err := f(ctx, in)
		if err == nil {
			return out, nil
		}
		p := r.problem(ctx, op.OperationID, err)
		if op.Method != http.MethodGet {
			r.auditFailure(ctx, op.OperationID, p)
		}
		return nil, p
	})
}

// auditFailure logs a changing call that was refused or failed.
func (r *rest) auditFailure(ctx context.Context, what string, p *api.Problem) {
	result := store.ResultRefused
	if p.Status >= http.StatusInternalServerError {
		result = store.ResultFailed
	}
	if err := r.s.store.AuditRefusal(context.WithoutCancel(ctx), what, objectFrom(ctx), result, wire.Quotable(p.Error())); err != nil {
		r.log.Error("audit log not written", "what", what, "error", err)
	}
}
