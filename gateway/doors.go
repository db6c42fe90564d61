package gateway

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"sallyport/config"
	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/doors"
	"sallyport/internal/httpserve"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

const (
	// doorRequests are served at a time: each takes at most a signature, a
	// look into the database, or a challenge at a node.
	doorRequests = 64
	// doorRate bounds the requests of one source, an address or a party's
	// proxy: a certificate takes about ten.
	doorRate, doorBurst = 20, 400
	// statusRate is the same for CRL and OCSP, of which a site behind one
	// address or proxy asks more, and which cost less.
	statusRate, statusBurst = 200, 2000
	maxDoorSources          = 10_000
	// doorsAtOnce are served to one source at a time: a client whose challenge
	// nobody answers waits long, and must not keep the others waiting.
	doorsAtOnce = 8
	// maxDoorBody bounds what a client sends.
	maxDoorBody = 128 << 10
	// doorRetry is when clients may try again, in seconds, what cannot be done now.
	doorRetry = "60"
	// doorUpkeep is how often what is over is forgotten.
	doorUpkeep = time.Hour
	// certificateMemory is how long a leaf is kept after its end: it may
	// still be asked for by clocks that are behind.
	certificateMemory = 4 * 24 * time.Hour
)

// doorway is where other programs get certificates, and learn which ones are
// revoked. It needs no API token: what it hands out is public, or its clients
// prove who they are by other means. A nil doorway is closed.
type doorway struct {
	s     *Server
	ca    doors.Authority
	open  config.Doors
	names *doorNames
	log   *slog.Logger

	mux    *http.ServeMux
	status *doorStatus
	est    *doorEST
	slots  chan struct{}
	stray  *rate.Limiter // of the log

	mu      sync.Mutex
	sources map[string]*doorSource

	certMu sync.Mutex
	cert   *tls.Certificate // of the name that clients at proxies ask for

	proxied *connQueue // from proxies of nodes and RCPs
}

// newDoorway opens the doors of the configuration. It does no I/O.
func newDoorway(s *Server, ca doors.Authority) (*doorway, error) {
	if len(s.cfg.Doors) == 0 {
		return nil, nil
	}
	if ca == nil {
		return nil, errors.New("gateway: SALLYPORT_GATEWAY_DOORS needs a certificate authority that certifies other programs, and this one does not: leave it off")
	}
	names, err := newDoorNames(s.store, s.cfg.DoorsAllow, s.cfg.DoorsName)
	if err != nil {
		return nil, fmt.Errorf("gateway: SALLYPORT_GATEWAY_DOORS_ALLOW: %w", err)
	}
	d := &doorway{s: s, ca: ca, open: s.cfg.Doors, names: names, log: s.log, mux: http.NewServeMux(), slots: make(chan struct{}, doorRequests),
		stray: rate.NewLimiter(1, 10), sources: map[string]*doorSource{}, proxied: newConnQueue()}
	d.mux.HandleFunc("GET /doors/ca.pem", d.serveCA)
	d.mux.HandleFunc("GET /root/{sum}", d.serveRoot)
	if d.open.Has(config.DoorStatus) {
		d.status = newDoorStatus(s.store, ca, s.log)
		d.status.external = s.external
		d.mux.HandleFunc("GET /crl/{name}", d.status.serveCRL)
		d.mux.HandleFunc("POST /ocsp", d.status.serveOCSP)
	}
	if d.open.Has(config.DoorEST) {
		d.est = &doorEST{d}
		d.est.routes()
	}
	if d.open.Has(config.DoorACME) {
		h, err := ca.ACME(d.acmeBackend())
		if err != nil {
			return nil, fmt.Errorf("gateway: %w", err)
		}
		d.mux.Handle("/acme/", h)
	}
	if d.open.Has(config.DoorBundle) {
		d.mux.HandleFunc("GET /spiffe/bundle.json", d.serveBundle)
	}
	return d, nil
}

// doorPaths begin the paths that are the doors'.
var doorPaths = []string{"/doors/", "/root/", "/crl/", "/ocsp", "/spiffe/", "/.well-known/est/", "/acme/"}

func isDoor(req *http.Request) bool {
	return slices.ContainsFunc(doorPaths, func(p string) bool { return strings.HasPrefix(req.URL.Path, p) })
}

// before serves the doors, and leaves the rest to next.
func (d *doorway) before(next http.Handler) http.Handler {
	if d == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if isDoor(req) && !isRelay(req) {
			d.ServeHTTP(w, req)
			return
		}
		next.ServeHTTP(w, req)
	})
}

// ServeHTTP serves one request within the limits of its source.
func (d *doorway) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	name, pace, burst := sourceName(req), rate.Limit(doorRate), doorBurst
	if p := req.URL.Path; strings.HasPrefix(p, "/crl/") || strings.HasPrefix(p, "/ocsp") {
		name, pace, burst = "status "+name, statusRate, statusBurst
	}
	source, ok := d.enter(name, pace, burst)
	if !ok {
		w.Header().Set("Retry-After", "10")
		writeProblem(w, api.NewProblem(api.CodeLocked, "too many requests from this address"))
		return
	}
	defer source.active.Add(-1)
	select {
	case d.slots <- struct{}{}:
		defer func() { <-d.slots }()
	case <-req.Context().Done():
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, req.Body, maxDoorBody))
	if large := (*http.MaxBytesError)(nil); errors.As(err, &large) {
		http.Error(w, fmt.Sprintf("the request has more than %d bytes", maxDoorBody), http.StatusRequestEntityTooLarge)
		return
	}
	if err != nil { // the client is gone
		http.Error(w, "the request broke off", http.StatusBadRequest)
		return
	}
	req.Body = io.NopCloser(bytes.NewReader(body))
	if d.status != nil && (req.Method == http.MethodGet || req.Method == http.MethodHead) && strings.HasPrefix(req.URL.Path, pathOCSP) {
		d.status.serveOCSPGet(w, req) // not by the mux, which would clean the path
		return
	}
	d.mux.ServeHTTP(w, req)
}

// sourceName is whom a request's limits are counted for.
func sourceName(req *http.Request) string {
	if p, ok := doorPartyFrom(req.Context()); ok {
		return string(p.ID)
	}
	return sourceOf(req).String()
}

// doorSource is what one source has under way.
type doorSource struct {
	*rate.Limiter
	active atomic.Int32
}

// enter lets a request in, if its source has not too many.
func (d *doorway) enter(name string, pace rate.Limit, burst int) (*doorSource, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.sources[name]
	if s == nil {
		if len(d.sources) >= maxDoorSources {
			clear(d.sources)
		}
		s = &doorSource{Limiter: rate.NewLimiter(pace, burst)}
		d.sources[name] = s
	}
	if s.active.Load() >= doorsAtOnce || !s.Allow() {
		return nil, false
	}
	s.active.Add(1)
	return s, true
}

// refused logs, not too often, what a stranger was refused.
func (d *doorway) refused(req *http.Request, door string, err error) {
	if d.stray.Allow() {
		d.log.Warn("certificate refused at a door", "door", door, "source", sourceName(req), "reason", err)
	}
}

// serveCA hands out what clients of the doors have to trust: the root, and the
// intermediates below it.
func (d *doorway) serveCA(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/x-pem-file")
	inters, roots := d.ca.Trust()
	for _, c := range append(slices.Clone(roots), inters...) {
		_ = pem.Encode(w, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // the client is gone, or not
	}
}

// serveRoot hands out a root to a client that knows its SHA-256, as step-ca
// does: `step ca root --fingerprint` takes what it gets for nothing else.
func (d *doorway) serveRoot(w http.ResponseWriter, req *http.Request) {
	_, roots := d.ca.Trust()
	for _, root := range roots {
		if sum := sha256.Sum256(root.Raw); req.PathValue("sum") == hex.EncodeToString(sum[:]) {
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(map[string]string{"ca": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw}))}) // the client is gone, or not
			return
		}
	}
	http.Error(w, "no such root", http.StatusNotFound)
}

// errDoorKey refuses a key that others may have.
var errDoorKey = fmt.Errorf("%w: a certificate of this key was revoked as key-compromise: make a new key", doors.ErrRefused)

// record notes a leaf that leaves by a door, with its audit row.
func (d *doorway) record(ctx context.Context, door string, leaf *x509.Certificate, via string, more func(ctx context.Context, tx *store.Tx) error) error {
	issuer := d.issuerOf(leaf)
	if issuer == nil { // it was given up this moment
		return fmt.Errorf("certificate of %v: its issuer is in use no longer; ask again", leaf.DNSNames)
	}
	names := slices.Clone(leaf.DNSNames)
	for _, ip := range leaf.IPAddresses {
		names = append(names, ip.String())
	}
	row := &store.Certificate{Issuer: wire.KeyOf(issuer), Serial: doors.Serial(leaf.SerialNumber), Door: door, KeyHash: wire.KeyOf(leaf), Names: names, Via: via, NotAfter: leaf.NotAfter}
	return d.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		if more != nil {
			if err := more(ctx, tx); err != nil {
				return err
			}
		}
		switch bad, err := tx.Compromised(ctx, row.KeyHash); {
		case err != nil:
			return err
		case bad:
			return errDoorKey
		}
		tx.Audit(ctx, "certificate.issue", strings.Join(names, " "), fmt.Sprintf("door %s, serial %s, %s", door, row.Serial, row.KeyHash.Fingerprint()))
		return tx.AddCertificate(ctx, row)
	})
}

// issuerOf is the intermediate in use that signed a leaf of the doors; nil is
// none.
func (d *doorway) issuerOf(leaf *x509.Certificate) *x509.Certificate {
	for _, c := range d.ca.Doors() {
		if leaf.CheckSignatureFrom(c) == nil {
			return c
		}
	}
	return nil
}

// run serves clients at the proxies of nodes and RCPs, and the plain listener,
// until ctx ends.
func (d *doorway) run(ctx context.Context) error {
	if d == nil {
		return nil
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.keep(ctx) })
	g.Go(func() error { return d.serve(ctx, d.proxied, d.atProxies()) })
	if addr := string(d.s.cfg.DoorsListen); addr != "" {
		ln, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
		if err != nil {
			d.proxied.close()
			return errors.Join(fmt.Errorf("doors listener: %w (set SALLYPORT_GATEWAY_DOORS_LISTEN to another address, or to off)", err), g.Wait())
		}
		d.log.Info("doors listen", "address", "http://"+ln.Addr().String())
		g.Go(func() error { return d.serve(ctx, ln, d.plain()) })
	}
	return g.Wait()
}

// plain serves what carries its own signature.
func (d *doorway) plain() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if p := req.URL.Path; strings.HasPrefix(p, "/crl/") || strings.HasPrefix(p, "/ocsp") || p == "/doors/ca.pem" {
			d.ServeHTTP(w, req)
			return
		}
		http.Error(w, "this is served over https only", http.StatusForbidden)
	})
}

// atProxies serves clients at proxies, who may come without TLS: there, a hostile
// proxy could give a client of EST another CA.
func (d *doorway) atProxies() http.Handler {
	plain := d.plain()
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.TLS == nil {
			plain.ServeHTTP(w, req)
			return
		}
		d.ServeHTTP(w, req)
	})
}

// serve answers on one listener until ctx ends.
func (d *doorway) serve(ctx context.Context, ln net.Listener, h http.Handler) error {
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: apiHeaderTime, ReadTimeout: apiReadTime, WriteTimeout: apiWriteTime, IdleTimeout: apiIdleTime,
		MaxHeaderBytes: wire.MaxHeader, ErrorLog: slog.NewLogLogger(d.log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if p, ok := partyOfConn(c); ok {
				return context.WithValue(ctx, doorPartyKey{}, p)
			}
			return ctx
		},
	}
	if err := httpserve.Until(ctx, srv, ln, drainTime); err != nil {
		return fmt.Errorf("doors on %s: %w", ln.Addr(), err)
	}
	return nil
}

// keep forgets what is over, until ctx ends.
func (d *doorway) keep(ctx context.Context) error {
	tick := time.NewTicker(doorUpkeep)
	defer tick.Stop()
	for {
		err := d.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
			return tx.ForgetCertificates(ctx, tx.Now().Add(-certificateMemory))
		})
		err = errors.Join(err, doorValues{d.s.store}.forget(ctx))
		if err != nil && ctx.Err() == nil {
			d.log.Error("what is over is not forgotten; it is tried again", "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// certificate is that of the name under which clients at proxies come. It is
// one of the doors' own, so that their clients trust one root.
func (d *doorway) certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	d.certMu.Lock()
	defer d.certMu.Unlock()
	if d.cert != nil && time.Now().Before(identity.RenewAfter(d.cert.Leaf)) && d.cert.Leaf.CheckSignatureFrom(d.ca.Chain()[0]) == nil {
		return d.cert, nil
	}
	cert, err := d.ownCertificate(hello.Context())
	if err != nil {
		if d.cert != nil && time.Now().Before(d.cert.Leaf.NotAfter) {
			d.log.Error("certificate of the doors not renewed; the old one stays in use", "error", err)
			return d.cert, nil
		}
		return nil, fmt.Errorf("certificate of %s: %w", d.s.cfg.DoorsName, err)
	}
	d.cert = cert
	return cert, nil
}
