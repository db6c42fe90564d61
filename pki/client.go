package pki

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

const (
	dialTime    = 10 * time.Second
	callTime    = 30 * time.Second
	refreshTick = 15 * time.Second
	connectTick = 5 * time.Second

	// fileState is what a gateway keeps of its authority, so that it starts
	// and works while the authority is away.
	fileState = "pki-state.json"
)

// ClientConfig is where the authority of a gateway is.
type ClientConfig struct {
	Addr     string // host:port, or the path of a unix socket
	CodeFile string // with a gateway code; empty or missing once the gateway is known
	Dir      string // of the gateway's state
	Identity *identity.Identity
	Log      *slog.Logger
}

// Client is an Authority in another process, as a gateway uses it: it may do
// there what the authority lets a gateway do. It is safe for concurrent use.
type Client struct {
	cfg  ClientConfig
	http *http.Client
	td   string // never changes
	tls  *x509.CertPool

	doors atomic.Pointer[remoteDoors] // once they are open

	mu     sync.Mutex
	state  Snapshot
	root   *x509.Certificate
	away   time.Time // since when it does not answer
	behind bool      // its set is older than the one that is held
	// unkept says that state is not on disk: it holds all the same, above all what
	// is revoked in it.
	unkept bool
}

// Connect finds the authority, makes the gateway known to it if it has a code,
// and returns a client. While the authority does not answer it returns what is
// kept of it; a gateway that knows nothing of its authority yet waits for it.
func Connect(ctx context.Context, cfg ClientConfig) (*Client, error) {
	c := &Client{cfg: cfg}
	c.http = &http.Client{
		Timeout: callTime,
		Transport: &http.Transport{
			DialTLSContext: c.dial, MaxConnsPerHost: 16, MaxIdleConnsPerHost: 16, IdleConnTimeout: time.Minute,
			MaxResponseHeaderBytes: wire.MaxHeader,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	for {
		err := c.connect(ctx)
		if err == nil {
			return c, nil
		}
		err = fmt.Errorf("certificate authority at %s: %w", cfg.Addr, err)
		if temporary := (*net.OpError)(nil); !errors.As(err, &temporary) {
			return nil, err
		}
		cfg.Log.WarnContext(ctx, "the certificate authority does not answer; this gateway cannot start without what it says", "error", err, "again_in", connectTick)
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(connectTick):
		}
	}
}

func (c *Client) connect(ctx context.Context) error {
	code, err := c.code()
	if err != nil {
		return err
	}
	kept, err := c.load()
	if err != nil {
		return err
	}
	c.td, c.tls = c.cfg.Identity.TrustDomain(), nil
	switch {
	case c.td != "" && code != nil && code.TrustDomain != c.td:
		return fmt.Errorf("the gateway code is for %s, this gateway belongs to %s (a fresh SALLYPORT_DATA lets it start over)", wire.Quotable(code.TrustDomain), c.td)
	case c.td != "" && kept != nil && kept.TrustDomain != c.td:
		return fmt.Errorf("%s is of %s, this gateway belongs to %s; delete that file", filepath.Join(c.cfg.Dir, fileState), wire.Quotable(kept.TrustDomain), c.td)
	case c.td != "" || kept != nil || code != nil:
	default:
		return fmt.Errorf("%w yet: run `sallyport ca gateway add > gateway.code` where it runs, and set SALLYPORT_GATEWAY_PKI_CODE_FILE to a copy of that file here", ErrUnregistered)
	}
	var pool *x509.CertPool // of first contact; later the identity's roots
	for _, s := range []*Snapshot{kept, code.state()} {
		if s == nil {
			continue
		}
		root, err := s.root()
		if err != nil {
			return err
		}
		if c.td == "" {
			c.td = s.TrustDomain
		}
		if pool == nil {
			pool = x509.NewCertPool()
		}
		pool.AddCert(root)
	}
	c.tls = pool
	if kept != nil {
		if err := c.hold(*kept, 0); err != nil {
			return err
		}
	}
	err = c.refresh(ctx)
	if errors.Is(err, ErrUnregistered) && code != nil {
		if err = c.register(ctx, code); err == nil {
			err = c.refresh(ctx)
		}
	}
	if err != nil && kept != nil && ctx.Err() == nil {
		c.setAway(true)
		what := "does not answer"
		if errors.Is(err, ErrUnregistered) || errors.Is(err, ErrRefused) {
			what = "refuses this gateway (a code of `sallyport ca gateway add` makes it known again)"
		}
		c.cfg.Log.WarnContext(ctx, "the certificate authority "+what+"; the gateway works with what it knows, and issues nothing", "error", err)
		return nil
	}
	if errors.Is(err, ErrUnregistered) {
		return fmt.Errorf("%w: run `sallyport ca gateway add > gateway.code` where it runs, and set SALLYPORT_GATEWAY_PKI_CODE_FILE to a copy of that file here", err)
	}
	return err
}

// state is what a code says of the authority; of no code, nothing.
func (c *GatewayCode) state() *Snapshot {
	if c == nil {
		return nil
	}
	return &Snapshot{TrustDomain: c.TrustDomain, Root: c.Root}
}

// code reads the gateway code; nil if there is none.
func (c *Client) code() (*GatewayCode, error) {
	if c.cfg.CodeFile == "" {
		return nil, nil
	}
	f, err := os.Open(c.cfg.CodeFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("gateway code: %w", err)
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxCode+1))
	if err != nil {
		return nil, fmt.Errorf("gateway code: %w", err)
	}
	code, err := ParseGatewayCode(string(b))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.cfg.CodeFile, err)
	}
	return &code, nil
}

func (c *Client) load() (*Snapshot, error) {
	path := filepath.Join(c.cfg.Dir, fileState)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var s Snapshot
	if err := json.Unmarshal(b, &s); err == nil {
		if _, err = s.root(); err == nil {
			return &s, nil
		}
	}
	return nil, fmt.Errorf("%s is damaged: delete it, the authority says it again", path)
}

// dial opens a TLS connection with the gateway's key. Any certificate of that
// key will do: the authority knows the key.
func (c *Client) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	cert, err := c.cfg.Identity.SelfSigned()
	if err != nil {
		return nil, err
	}
	network := "tcp"
	if strings.HasPrefix(c.cfg.Addr, "/") {
		network = "unix"
	}
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	raw, err := (&net.Dialer{}).DialContext(ctx, network, c.cfg.Addr)
	if err != nil {
		return nil, err
	}
	roots := c.cfg.Identity.Roots()
	if c.tls != nil && c.cfg.Identity.NotAfter().IsZero() {
		roots = c.tls
	}
	conn := tls.Client(raw, &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{alpn},
		RootCAs:    roots,
		ServerName: serverName(c.td),
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return cert, nil
		},
		VerifyConnection: func(cs tls.ConnectionState) error {
			if cs.NegotiatedProtocol != alpn {
				return fmt.Errorf("it speaks %q, not %s: is this the certificate authority?", wire.Quotable(cs.NegotiatedProtocol), alpn)
			}
			return nil
		},
	})
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, err
	}
	return conn, nil
}

// ask sends one request; in is nil for GET.
func ask[Out any](ctx context.Context, c *Client, path string, in any, limit int64) (out Out, err error) {
	method, body := http.MethodGet, io.Reader(http.NoBody)
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return out, err
		}
		method, body = http.MethodPost, bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "https://"+serverName(c.td)+path, body)
	if err != nil {
		return out, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if ue := (*url.Error)(nil); errors.As(err, &ue) { // the URL is made up: it says nothing of where the authority is
			ue.Op, ue.URL = "ask the certificate authority at", c.cfg.Addr
		}
		return out, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		var p problem
		if err := wire.DecodeJSON(resp.Body, maxSmall, &p); err != nil || p.Message == "" {
			return out, fmt.Errorf("the certificate authority answers %s", resp.Status)
		}
		if p.Code == codeFailed { // it may name files, which are on its host
			p.Message += " (at the certificate authority, " + c.cfg.Addr + ")"
		}
		return out, p.err()
	}
	return out, wire.DecodeJSON(resp.Body, limit, &out)
}

func (c *Client) register(ctx context.Context, code *GatewayCode) error {
	_, err := ask[struct{}](ctx, c, pathRegister, registerRequest{ID: c.cfg.Identity.ID(), TokenID: code.TokenID, Token: code.Token}, maxSmall)
	if err == nil {
		c.cfg.Log.InfoContext(ctx, "the certificate authority knows this gateway now", "pki", c.cfg.Addr)
	}
	return err
}

// refresh asks for the state, and keeps it.
func (c *Client) refresh(ctx context.Context) error {
	before := c.held()
	s, err := ask[Snapshot](ctx, c, pathState, nil, maxState)
	if err != nil {
		return err
	}
	if s.TrustDomain != c.td {
		return fmt.Errorf("it is the authority of %s, this gateway belongs to %s", wire.Quotable(s.TrustDomain), c.td)
	}
	return c.hold(s, before)
}

// Reach asks the authority, and returns why it does not answer.
func (c *Client) Reach(ctx context.Context) error { return c.refresh(ctx) }

// hold takes a state over, in memory and on disk; what cannot be written is tried
// again with the next. A revocation set below the one that is held is not taken
// over. before is the number of the set that was held when the state was asked for:
// if another one is held by now, an answer with a lower one is old, and says nothing
// of what the authority knows.
func (c *Client) hold(s Snapshot, before int64) error {
	root, err := s.root()
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if held := c.state.number(); s.number() >= held {
		c.behind = false
	} else {
		c.behind = c.behind || held == before
		s.Revocations = c.state.Revocations
	}
	old, err := json.Marshal(c.state)
	if err != nil {
		return err
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if c.unkept || !bytes.Equal(old, b) {
		err := writeFile(c.cfg.Dir, fileState, b, 0o600)
		if err != nil && !c.unkept {
			c.cfg.Log.Error("what the certificate authority says holds, and cannot be written; it is tried again", "error", err)
		}
		c.unkept = err != nil
	}
	c.state, c.root = s, root
	return nil
}

// number is that of the revocation set; 0 before the first.
func (s *Snapshot) number() int64 {
	var set struct {
		Number int64 `json:"number"`
	}
	if s.Revocations == nil || json.Unmarshal(s.Revocations.Payload, &set) != nil {
		return 0
	}
	return set.Number
}

// held is the number of the revocation set that this gateway knows of.
func (c *Client) held() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state.number()
}

// Run keeps the state fresh until ctx ends.
func (c *Client) Run(ctx context.Context) error {
	defer c.http.CloseIdleConnections()
	tick := time.NewTicker(refreshTick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		err := c.refresh(ctx)
		if d := c.doors.Load(); err == nil && d != nil {
			d.look(ctx)
		}
		if ctx.Err() != nil {
			return nil
		}
		switch was := !c.Away().IsZero(); {
		case err != nil && !was:
			c.setAway(true)
			c.cfg.Log.ErrorContext(ctx, "without the certificate authority nothing is issued, renewed or revoked", "error", err)
		case err == nil && was:
			c.setAway(false)
			c.cfg.Log.InfoContext(ctx, "the certificate authority answers again")
		}
	}
}

// Away is since when the authority does not answer; zero while it does.
func (c *Client) Away() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.away
}

func (c *Client) setAway(away bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.away = time.Time{}
	if away {
		c.away = time.Now()
	}
}

// Close ends the idle connections of a client that never ran.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Issue is [Authority.Issue].
func (c *Client) Issue(ctx context.Context, r wire.IssueRequest) ([][]byte, error) {
	a, err := ask[chainAnswer](ctx, c, pathIssue, r, maxSmall)
	return a.Chain, err
}

// IssueGateway renews the leaf of this gateway. The authority knows its UUID
// and key; for others it issues none.
func (c *Client) IssueGateway(ctx context.Context, id wire.ID, csr []byte) ([][]byte, error) {
	if id != c.cfg.Identity.ID() {
		return nil, fmt.Errorf("%w: gateway %s is not this one", ErrRefused, id)
	}
	a, err := ask[chainAnswer](ctx, c, pathGateway, gatewayRequest{csr}, maxSmall)
	return a.Chain, err
}

// SignRevocations is [Authority.SignRevocations].
func (c *Client) SignRevocations(ctx context.Context, set wire.Revocations, after int64) (wire.Envelope, error) {
	before := c.held()
	env, err := ask[wire.Envelope](ctx, c, pathRevocations, revocationsRequest{set, &after}, maxState)
	if err != nil {
		if errors.Is(err, identity.ErrOlder) { // another one signed: its keys have to be in the next attempt
			return env, errors.Join(err, c.refresh(ctx))
		}
		return env, err
	}
	c.mu.Lock()
	s := c.state
	c.mu.Unlock()
	s.Revocations = &env
	return env, c.hold(s, before)
}

// Revocations is the highest set that this gateway knows of; false before the
// first.
func (c *Client) Revocations() (wire.Envelope, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state.Revocations == nil {
		return wire.Envelope{}, false
	}
	return *c.state.Revocations, true
}

// Behind tells whether the authority does not know the last set that it signed: it
// was restored from an older copy. Until it has signed another one it certifies
// keys that are revoked, and answers gateways that were removed.
func (c *Client) Behind() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.behind
}

// Root is the certificate whose key join codes pin.
func (c *Client) Root() *x509.Certificate {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.root
}

// TrustDomain is the name that every identity of the authority carries.
func (c *Client) TrustDomain() string { return c.td }

// State is [Authority.State], as it was when the authority was last asked.
func (c *Client) State() wire.CAState {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state.CA
}

// Trust is [Authority.Trust], as it was when the authority was last asked.
func (c *Client) Trust() (wire.Envelope, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state.Trust == nil {
		return wire.Envelope{}, false
	}
	return *c.state.Trust, true
}

// Rotate is [Authority.Rotate].
func (c *Client) Rotate(ctx context.Context, kind string, atLeast int64) (wire.CAState, error) {
	return c.rollover(ctx, rolloverRequest{Step: "rotate", Kind: kind, AtLeast: atLeast})
}

// Follow is [Authority.Follow].
func (c *Client) Follow(ctx context.Context, sum []byte, alone bool, atLeast int64) (wire.CAState, error) {
	return c.rollover(ctx, rolloverRequest{Step: "follow", Root: sum, Alone: alone, AtLeast: atLeast})
}

// Abort is [Authority.Abort].
func (c *Client) Abort(ctx context.Context, atLeast int64) (wire.CAState, error) {
	return c.rollover(ctx, rolloverRequest{Step: "abort", AtLeast: atLeast})
}

// Finish is [Authority.Finish].
func (c *Client) Finish(ctx context.Context, forget bool, atLeast int64) (wire.CAState, error) {
	return c.rollover(ctx, rolloverRequest{Step: "finish", Forget: forget, AtLeast: atLeast})
}

// rollover takes a step, and what it changed.
func (c *Client) rollover(ctx context.Context, r rolloverRequest) (wire.CAState, error) {
	s, err := ask[wire.CAState](ctx, c, pathRollover, r, maxState)
	if err != nil {
		return s, err
	}
	if err := errors.Join(c.refresh(ctx), c.refreshDoors(ctx)); err != nil { // the step is taken all the same
		c.cfg.Log.WarnContext(ctx, "the certificate authority changed its issuers, and went away; it is asked again", "step", r.Step, "error", err)
	}
	return s, nil
}

// refreshDoors asks for the doors' issuers, if they are open.
func (c *Client) refreshDoors(ctx context.Context) error {
	d := c.doors.Load()
	if d == nil {
		return nil
	}
	return d.refresh(ctx)
}
