package pki

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/netutil"
	"golang.org/x/sync/errgroup"

	"sallyport/internal/httpserve"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

const (
	maxConns    = 256
	serverLeaf  = time.Hour // how long one leaf of the listener serves
	removalTick = 5 * time.Second
)

// Server lets gateways on other hosts, or of other users, use an Authority.
// A gateway is known by its key, which the operator of the authority's host
// registers with a code; certificates do not count here, so that neither a
// clock nor a rollover locks a gateway out.
type Server struct {
	ca       *Authority
	gateways *Gateways
	ln       net.Listener
	log      *slog.Logger
	requests *prometheus.CounterVec

	mu     sync.Mutex
	leaf   *tls.Certificate
	made   time.Time
	signer *signer // that made it
}

// Listen opens the listener of an authority: host:port, or the path of a unix
// socket. The authority stays the caller's.
func Listen(ca *Authority, addr string, log *slog.Logger, reg prometheus.Registerer) (*Server, error) {
	s := &Server{ca: ca, gateways: OpenGateways(ca.dir), log: log, requests: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sallyport_pki_requests_total", Help: "Requests of gateways, by what they asked and whether it was done.",
	}, []string{"request", "result"})}
	if err := reg.Register(s.requests); err != nil {
		return nil, fmt.Errorf("pki: register metrics: %w", err)
	}
	ln, err := listen(addr)
	if err != nil {
		return nil, fmt.Errorf("pki: %w (choose another SALLYPORT_PKI_LISTEN)", err)
	}
	s.ln = netutil.LimitListener(ln, maxConns)
	return s, nil
}

func listen(addr string) (net.Listener, error) {
	if !strings.HasPrefix(addr, "/") {
		return net.Listen("tcp", addr)
	}
	if c, err := net.DialTimeout("unix", addr, time.Second); err == nil {
		_ = c.Close()
		return nil, fmt.Errorf("%s: another process answers there", addr)
	}
	if st, err := os.Lstat(addr); err == nil && st.Mode().Type() == fs.ModeSocket {
		if err := os.Remove(addr); err != nil {
			return nil, err
		}
	}
	ln, err := net.Listen("unix", addr)
	if err != nil {
		return nil, err
	}
	// The key of the TLS connection decides who may ask, not the socket's mode.
	if err := os.Chmod(addr, 0o666); err != nil {
		return nil, errors.Join(err, ln.Close())
	}
	return ln, nil
}

// Addr is the address in use.
func (s *Server) Addr() net.Addr { return s.ln.Addr() }

// Close frees the listener of a server that never ran.
func (s *Server) Close() error { return s.ln.Close() }

// Run serves until ctx ends; requests that run then get five seconds.
func (s *Server) Run(ctx context.Context) error {
	srv := &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: 10 * time.Second, // the TLS handshake too
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      time.Minute,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    wire.MaxHeader,
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := httpserve.Until(ctx, srv, &secured{s.ln, s.tlsConfig()}, 5*time.Second); err != nil {
			return fmt.Errorf("pki listener: %w", err)
		}
		return nil
	})
	g.Go(func() error { return s.revokeRemoved(ctx) })
	return g.Wait()
}

// secured makes TLS connections that net/http does not know for such: it would
// not serve a protocol of our own. The handshake is part of the first read, so
// that the time for the headers bounds it.
type secured struct {
	net.Listener
	cfg *tls.Config
}

type securedConn struct{ *tls.Conn }

type connKey struct{}

func (l *secured) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &securedConn{tls.Server(c, l.cfg)}, nil
}

// keyOf is the key that the peer of a request has proved to hold.
func keyOf(r *http.Request) (wire.KeyHash, bool) {
	c, ok := r.Context().Value(connKey{}).(*securedConn)
	if !ok {
		return "", false
	}
	certs := c.ConnectionState().PeerCertificates
	if len(certs) == 0 {
		return "", false
	}
	return wire.KeyOf(certs[0]), true
}

// Ready says why the authority cannot do its work now.
func (s *Server) Ready() error {
	if err := s.ca.over(); err != nil {
		return err
	}
	_, err := s.certificate(nil)
	return err
}

func (s *Server) tlsConfig() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{alpn},
		ClientAuth:             tls.RequireAnyClientCert,
		SessionTicketsDisabled: true,
		GetCertificate:         s.certificate,
		VerifyConnection: func(cs tls.ConnectionState) error {
			if cs.NegotiatedProtocol != alpn {
				return fmt.Errorf("pki: protocol %q, want %s", wire.Quotable(cs.NegotiatedProtocol), alpn)
			}
			if len(cs.PeerCertificates) == 0 {
				return errors.New("pki: the peer sent no certificate")
			}
			return nil // its key is looked up for each request: it may be removed meanwhile
		},
	}
}

// certificate is the listener's leaf, with a key that lives in memory only.
func (s *Server) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sg := s.ca.signer.Load()
	if s.leaf != nil && s.signer == sg && time.Since(s.made) < serverLeaf {
		return s.leaf, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, err
	}
	chain, err := s.ca.issueServer(context.Background(), csr)
	if err != nil {
		if s.leaf != nil { // it is good for much longer than it serves
			s.log.Warn("the listener keeps its certificate", "error", err)
			return s.leaf, nil
		}
		return nil, err
	}
	s.leaf, s.made, s.signer = &tls.Certificate{Certificate: chain, PrivateKey: key}, time.Now(), sg
	return s.leaf, nil
}

func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	// Only this one is answered to a key that is not registered.
	mux.HandleFunc("POST "+pathRegister, answer(s, "register", maxSmall, func(_ context.Context, key wire.KeyHash, r registerRequest) (struct{}, error) {
		if s.ca.isRevoked(key) {
			return struct{}{}, fmt.Errorf("register gateway %s: %w", key.Fingerprint(), identity.ErrRevoked)
		}
		gw, err := s.gateways.register(key, r)
		if err == nil {
			s.log.Info("gateway registered", "id", gw.ID, "fingerprint", key.Fingerprint())
		}
		return struct{}{}, err
	}))
	mux.HandleFunc("GET "+pathState, answer(s, "state", 0, known(s, func(context.Context, Gateway, struct{}) (Snapshot, error) { return s.ca.snapshot(), nil })))
	mux.HandleFunc("POST "+pathGateway, answer(s, "gateway", maxSmall, known(s, s.issueGateway)))
	mux.HandleFunc("POST "+pathIssue, answer(s, "issue", maxSmall, known(s, func(ctx context.Context, gw Gateway, r wire.IssueRequest) (chainAnswer, error) {
		chain, err := s.ca.Issue(ctx, r)
		if err == nil {
			s.log.Info("certificate issued", "party", r.Party.String(), "name", r.Name, "gateway", gw.ID)
		}
		return chainAnswer{chain}, err
	})))
	mux.HandleFunc("POST "+pathRevocations, answer(s, "revocations", wire.MaxRevocations, known(s, func(ctx context.Context, gw Gateway, r revocationsRequest) (wire.Envelope, error) {
		if err := s.addRemoved(&r.Revocations); err != nil {
			return wire.Envelope{}, err
		}
		after := int64(math.MaxInt64) // an older gateway has looked before it asked
		if r.After != nil {
			after = *r.After
		}
		env, err := s.ca.SignRevocations(ctx, r.Revocations, after)
		if err == nil {
			s.log.Info("revocation set signed", "number", r.Number, "revoked", len(r.Revoked), "gateway", gw.ID)
		}
		return env, err
	})))
	s.doorRoutes(mux)
	mux.HandleFunc("POST "+pathRollover, answer(s, "rollover", maxSmall, known(s, s.rollover)))
	return mux
}

// issueGateway renews the leaf of the gateway that asks: its own UUID, with
// the key that is registered, and nothing else.
func (s *Server) issueGateway(ctx context.Context, gw Gateway, r gatewayRequest) (chainAnswer, error) {
	_, key, err := identity.ParseCSR(r.CSR)
	if err != nil {
		return chainAnswer{}, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	if key != gw.Key {
		return chainAnswer{}, fmt.Errorf("%w: gateway %s asks for another key (%s) than its own", ErrRefused, gw.ID, key.Fingerprint())
	}
	chain, err := s.ca.IssueGateway(ctx, gw.ID, r.CSR)
	if err != nil {
		return chainAnswer{}, err
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return chainAnswer{}, err
	}
	s.log.Info("gateway certificate issued", "id", gw.ID, "not_after", leaf.NotAfter)
	return chainAnswer{chain}, s.gateways.issued(key, leaf.NotAfter)
}

// known lets only registered gateways through.
func known[In, Out any](s *Server, f func(context.Context, Gateway, In) (Out, error)) func(context.Context, wire.KeyHash, In) (Out, error) {
	return func(ctx context.Context, key wire.KeyHash, in In) (out Out, err error) {
		gw, err := s.admit(key)
		if err != nil {
			return out, err
		}
		return f(ctx, gw, in)
	}
}

func (s *Server) admit(key wire.KeyHash) (Gateway, error) {
	gw, err := s.gateways.admit(key)
	if err == nil && s.ca.isRevoked(key) {
		err = fmt.Errorf("gateway %s: %w", gw.ID, identity.ErrRevoked)
	}
	return gw, err
}

// answer is one request: JSON in (none with limit 0), JSON out.
func answer[In, Out any](s *Server, name string, limit int64, f func(context.Context, wire.KeyHash, In) (Out, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		limit := limit
		key, ok := keyOf(r)
		if !ok {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		if _, err := s.admit(key); err != nil {
			limit = min(limit, maxSmall)
			w.Header().Set("Connection", "close") // a stranger keeps no connection
		}
		var in In
		var out Out
		var err error
		if limit > 0 {
			if err = wire.DecodeJSON(r.Body, limit, &in); err != nil && !errors.Is(err, wire.ErrTooLarge) {
				err = fmt.Errorf("%w: %w", wire.ErrMalformed, err)
			}
		}
		if err == nil {
			out, err = f(r.Context(), key, in)
		}
		result, status, body := "done", http.StatusOK, any(out)
		if err != nil {
			result = "refused"
			p := problem{Message: err.Error()}
			if status = p.classify(err); status == http.StatusInternalServerError {
				result = "failed"
			}
			body = p
			s.log.Warn("request refused", "request", name, "fingerprint", key.Fingerprint(), "error", err)
		}
		s.requests.WithLabelValues(name, result).Inc()
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(body) // the peer is gone: it asks again
	}
}

func (p *problem) classify(err error) (status int) {
	for _, c := range codes {
		if errors.Is(err, c.err) {
			p.Code = c.code
			return c.status
		}
	}
	p.Code = codeFailed
	return http.StatusInternalServerError
}

// addRemoved puts the gateways that were removed here into a set: no gateway
// can take them out.
func (s *Server) addRemoved(set *wire.Revocations) error {
	all, err := s.gateways.List()
	if err != nil {
		return err
	}
	in := make(map[wire.KeyHash]bool, len(set.Revoked))
	for _, r := range set.Revoked {
		in[r.Key] = true
	}
	for _, gw := range all {
		if !gw.Removed.IsZero() && !in[gw.Key] {
			set.Revoked = append(set.Revoked, wire.Revocation{Key: gw.Key, Role: wire.RoleGateway, ID: gw.ID, At: gw.Removed, Reason: "removed by the operator of the certificate authority"})
		}
	}
	return nil
}

// revokeRemoved signs a set of its own when a gateway was removed. The others
// find it when they ask for the state, and spread it.
func (s *Server) revokeRemoved(ctx context.Context) error {
	tick := time.NewTicker(removalTick)
	defer tick.Stop()
	for {
		if err := s.revokeRemovedNow(ctx); err != nil && ctx.Err() == nil {
			s.log.Error("the keys of removed gateways are not revoked yet; it is tried again in some seconds", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (s *Server) revokeRemovedNow(ctx context.Context) error {
	all, err := s.gateways.List()
	if err != nil {
		return err
	}
	missing := false
	for _, gw := range all {
		missing = missing || !gw.Removed.IsZero() && !s.ca.isRevoked(gw.Key)
	}
	if !missing {
		return nil
	}
	var set wire.Revocations
	if env, ok := s.ca.Revocations(); ok {
		if err := json.Unmarshal(env.Payload, &set); err != nil {
			return err
		}
	}
	after := set.Number
	set.Number++
	if err := s.addRemoved(&set); err != nil {
		return err
	}
	if _, err := s.ca.SignRevocations(ctx, set, after); err != nil {
		return err
	}
	s.log.Info("revocation set signed", "number", set.Number, "revoked", len(set.Revoked), "why", "a gateway was removed")
	return nil
}

// snapshot is what gateways in other processes must know.
func (a *Authority) snapshot() Snapshot {
	st := Snapshot{TrustDomain: a.TrustDomain(), Root: a.Root().Raw, CA: a.State()}
	if env, ok := a.Revocations(); ok {
		st.Revocations = &env
	}
	if env, ok := a.Trust(); ok {
		st.Trust = &env
	}
	return st
}

// rollover is a step that an operator takes at a gateway, where it is known
// who still is on the old issuer.
func (s *Server) rollover(ctx context.Context, gw Gateway, r rolloverRequest) (wire.CAState, error) {
	s.log.Warn("a gateway asks for a step of a rollover", "step", r.Step, "kind", r.Kind, "forget", r.Forget, "gateway", gw.ID)
	switch r.Step {
	case "rotate":
		return s.ca.Rotate(ctx, r.Kind, r.AtLeast)
	case "follow":
		return s.ca.Follow(ctx, r.Root, r.Alone, r.AtLeast)
	case "abort":
		return s.ca.Abort(ctx, r.AtLeast)
	case "finish":
		return s.ca.Finish(ctx, r.Forget, r.AtLeast)
	}
	return wire.CAState{}, fmt.Errorf("%w: no step of a rollover: %q", wire.ErrMalformed, wire.Quotable(r.Step))
}
