package gateway

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os/user"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"golang.org/x/sys/unix"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

// permission is what an operation needs.
type permission string

const (
	mayRead    permission = "read"
	mayOperate permission = "operate" // nodes, deployments, actions, events
	mayCertify permission = "certify" // join codes, requests, revocation
	mayAdmin   permission = "administer"
)

var permissions = map[api.Role]map[permission]bool{
	api.RoleViewer:             {mayRead: true},
	api.RoleOperator:           {mayRead: true, mayOperate: true},
	api.RoleCertificateOfficer: {mayRead: true, mayCertify: true},
	api.RoleAdmin:              {mayRead: true, mayOperate: true, mayCertify: true, mayAdmin: true},
}

// asker is who asks.
type asker struct {
	actor  store.Actor
	role   api.Role
	object string       // path of the request, for the audit log
	token  *store.Token // nil: who came by the socket
}

type askerKey struct{}

func askerFrom(ctx context.Context) asker {
	c, _ := ctx.Value(askerKey{}).(asker)
	return c
}

func objectFrom(ctx context.Context) string { return askerFrom(ctx).object }

func withAsker(req *http.Request, c asker) *http.Request {
	c.object = wire.Quotable(strings.TrimPrefix(req.URL.Path, api.Prefix+"/"))
	ctx := context.WithValue(req.Context(), askerKey{}, c)
	return req.WithContext(store.WithActor(ctx, c.actor))
}

// authorise refuses an operation that the caller's role does not allow.
func (r *rest) authorise(ctx huma.Context, next func(huma.Context)) {
	need, ok := ctx.Operation().Metadata["permission"].(permission)
	c := askerFrom(ctx.Context())
	refused := func(*api.Problem) {}
	if ctx.Operation().Method != http.MethodGet {
		refused = func(p *api.Problem) { r.auditFailure(ctx.Context(), ctx.Operation().OperationID, p) }
	}
	if ok && permissions[c.role][need] {
		next(huma.WithValue(ctx, refusedKey{}, refused))
		return
	}
	p := api.NewProblem(api.CodeForbidden, fmt.Sprintf("%s has the role %s, which does not allow to %s", c.actor.Who, c.role, need))
	refused(p)
	_, w := unwrap(ctx)
	writeProblem(w, p)
}

type connKey struct{}

func withConn(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, c)
}

// fromSocket takes the caller from the kernel: whom the permissions of the
// socket let in is an admin.
func (r *rest) fromSocket() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		c, ok := req.Context().Value(connKey{}).(*net.UnixConn)
		if !ok {
			writeProblem(w, api.NewProblem(api.CodeUnauthorized, "not a unix socket"))
			return
		}
		uid, err := peerUID(c)
		if err != nil {
			r.log.Error("api caller not known", "error", err)
			writeProblem(w, api.NewProblem(api.CodeUnauthorized, "the kernel does not say who you are"))
			return
		}
		r.route(w, withAsker(req, asker{actor: store.Actor{Who: userName(uid), Origin: "unix socket"}, role: api.RoleAdmin}))
	})
}

func peerUID(c *net.UnixConn) (uid uint32, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	return cred.Uid, nil
}

func userName(uid uint32) string {
	id := strconv.FormatUint(uint64(uid), 10)
	if u, err := user.LookupId(id); err == nil {
		return u.Username
	}
	return "uid " + id
}

// fromNetwork demands a token of every request, also from loopback.
func (r *rest) fromNetwork() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		c, no := r.tokens.admit(req)
		if no != nil {
			r.refused.add(req, no)
			if no.wait > 0 {
				w.Header().Set("Retry-After", strconv.Itoa(int(no.wait.Seconds())+1))
			}
			if no.problem.Code == api.CodeUnauthorized {
				w.Header().Set("WWW-Authenticate", `Bearer realm="sallyport"`)
			}
			if isRelay(req) {
				w.Header().Set(headerFailedHop, hopGateway)
			}
			writeProblem(w, no.problem)
			return
		}
		ctx, end := r.tokens.hold(req.Context(), c.token)
		defer end()
		r.route(w, withAsker(req.WithContext(ctx), c))
	})
}

// Bad tokens: so many from one source lock it out for so long. A good token is
// let in all the same: it has 256 bits, so guessing is hopeless, and a stranger
// behind the same address must not lock operators out.
const (
	maxBadTokens = 5
	lockoutTime  = 15 * time.Minute
	maxSources   = 10_000
	touchEvery   = time.Minute // last_used is written at most so often
)

// tokenPrefix makes API tokens easy to find in places where they do not belong.
const tokenPrefix = "spt_"

// tokenGate checks API tokens.
type tokenGate struct {
	db  *store.DB
	now func() time.Time

	mu   sync.Mutex
	bad  map[netip.Prefix]*badSource
	held map[string]map[*context.CancelCauseFunc]struct{} // requests under way, by the token that let them in
	over map[string]bool                                  // tokens that were revoked since the start
}

type badSource struct {
	count int
	until time.Time // the count is forgotten
}

func newTokenGate(db *store.DB) *tokenGate {
	return &tokenGate{db: db, now: time.Now, bad: make(map[netip.Prefix]*badSource),
		held: make(map[string]map[*context.CancelCauseFunc]struct{}), over: make(map[string]bool)}
}

// errToken ends what runs with a token when that is no longer good.
func errToken() *api.Problem {
	return api.NewProblem(api.CodeUnauthorized, "the API token is unknown, expired or revoked")
}

// hold ties a request to the token that let it in: a live stream must not
// outlast it. The caller calls end when the request is done.
func (g *tokenGate) hold(ctx context.Context, t *store.Token) (held context.Context, end func()) {
	held, cancel := context.WithCancelCause(ctx)
	expiry := time.AfterFunc(t.ExpiresAt.Sub(g.now()), func() { cancel(errToken()) })
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.over[t.ID] { // since it was looked up
		cancel(errToken())
	}
	if g.held[t.ID] == nil {
		g.held[t.ID] = make(map[*context.CancelCauseFunc]struct{})
	}
	g.held[t.ID][&cancel] = struct{}{}
	return held, func() {
		expiry.Stop()
		cancel(nil)
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.held[t.ID], &cancel)
		if len(g.held[t.ID]) == 0 {
			delete(g.held, t.ID)
		}
	}
}

// cut ends what runs with a token that was just revoked.
func (g *tokenGate) cut(id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.over[id] = true
	for cancel := range g.held[id] {
		(*cancel)(errToken())
	}
}

// hashSecret is what the database keeps of a token. It has 256 random bits, so
// that a fast hash is enough.
func hashSecret(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

// noEntry is why a request was not let in, and whose token it came with if that
// was one of ours.
type noEntry struct {
	problem *api.Problem
	why     string
	token   *store.Token
	wait    time.Duration // until the source is listened to again
	locked  bool          // out, by this very request
}

// Why a request was not let in, beside the state of its token.
const (
	noToken      = "none"
	tokenUnknown = "unknown"
	noAnswer     = "unchecked"
)

func (g *tokenGate) admit(req *http.Request) (c asker, no *noEntry) {
	scheme, secret, _ := strings.Cut(req.Header.Get("Authorization"), " ")
	secret = strings.TrimLeft(secret, " ")
	if !strings.EqualFold(scheme, "Bearer") || secret == "" { // RFC 9110, 11.1
		return c, &noEntry{why: noToken,
			problem: api.NewProblem(api.CodeUnauthorized, "https needs an API token: make one with `sallyport token create` on the gateway's host, and name its file in SALLYPORT_TOKEN_FILE")}
	}
	t, why, err := g.valid(req.Context(), secret)
	if err != nil {
		return c, &noEntry{why: noAnswer, problem: api.NewProblem(api.CodeInternal, "the gateway cannot check the token now")}
	}
	if why != tokenValid {
		no = &noEntry{why: why, token: t, problem: errToken()}
		if no.wait, no.locked = g.strike(sourceOf(req)); no.wait > 0 {
			no.problem = api.NewProblem(api.CodeLocked, "too many bad tokens from this address")
		}
		return c, no
	}
	return asker{actor: store.Actor{Who: tokenLabel(t), Origin: req.RemoteAddr}, role: api.Role(t.Role), token: t}, nil
}

func tokenLabel(t *store.Token) string {
	label := "token " + t.ID[:min(8, len(t.ID))]
	if t.Name != "" {
		label += " (" + t.Name + ")"
	}
	return label
}

// valid returns the token with this secret, and whether it is [tokenValid] or why
// not; nil if there is none.
func (g *tokenGate) valid(ctx context.Context, secret string) (t *store.Token, why string, err error) {
	t, err = g.db.TokenByHash(ctx, hashSecret(secret))
	if errors.Is(err, store.ErrNotFound) {
		return nil, tokenUnknown, nil
	}
	if err != nil {
		return nil, "", err
	}
	now := g.now()
	why = tokenState(t, now)
	if why == tokenValid && now.Sub(t.LastUsed) > touchEvery {
		err = g.db.Update(ctx, func(ctx context.Context, tx *store.Tx) error { return tx.TouchToken(ctx, t.ID) })
	}
	return t, why, err
}

const tokenValid = "valid"

func tokenState(t *store.Token, now time.Time) string {
	switch {
	case !t.RevokedAt.IsZero():
		return "revoked"
	case !now.Before(t.ExpiresAt):
		return "expired"
	}
	return tokenValid
}

// sourceOf is the caller's address; for IPv6 its /64, which one host may own.
func sourceOf(req *http.Request) netip.Prefix {
	ap, err := netip.ParseAddrPort(req.RemoteAddr)
	if err != nil {
		return netip.Prefix{}
	}
	addr := ap.Addr().Unmap()
	bits := 32
	if addr.Is6() {
		bits = 64
	}
	p, err := addr.WithZone("").Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return p
}

// strike counts a bad token; the answer is how long the source is locked out, and
// whether this one did it.
func (g *tokenGate) strike(source netip.Prefix) (wait time.Duration, locked bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.now()
	b := g.bad[source]
	if b == nil || now.After(b.until) {
		if len(g.bad) >= maxSources {
			g.sweep(now)
		}
		b = &badSource{}
		g.bad[source] = b
	}
	b.count++
	if b.count <= maxBadTokens {
		b.until = now.Add(lockoutTime)
		return 0, false
	}
	return b.until.Sub(now), b.count == maxBadTokens+1
}

// sweep makes room: what is over goes, and if that is nothing, everything.
func (g *tokenGate) sweep(now time.Time) {
	for s, b := range g.bad {
		if now.After(b.until) {
			delete(g.bad, s)
		}
	}
	if len(g.bad) >= maxSources {
		clear(g.bad)
	}
}
