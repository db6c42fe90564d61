package pki

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/smallstep/certificates/acme"
	acmeapi "github.com/smallstep/certificates/acme/api"
	acmenosql "github.com/smallstep/certificates/acme/db/nosql"
	"github.com/smallstep/certificates/authority"
	"github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/smallstep/certificates/db"
	"github.com/smallstep/certificates/logging"
	"golang.org/x/time/rate"

	"sallyport/internal/doors"
)

const (
	// acmeTime bounds what the door asks of a client's side.
	acmeTime = 20 * time.Second
	// maxKeyAuthorization is more than any (RFC 8555, 8.1) takes.
	maxKeyAuthorization = 4 << 10
	// maxNonces are remembered; an older one is no good any more, and its
	// client is given another (RFC 8555, 6.5).
	maxNonces = 20_000

	acmePrefix = "/acme"

	// What one side may have us keep: an account each accountPace, a challenge
	// each challengePace, and so many at once. A name takes two challenges.
	accountPace, accountBurst     = 10 * time.Minute, 20
	challengePace, challengeBurst = 5 * time.Second, 400
	maxSides                      = 10_000
)

// acmeDoor is the handler of the ACME door.
type acmeDoor struct {
	d      *Doors
	c      doors.ACME
	db     *acmenosql.DB
	nonces *nonces
	router http.Handler

	mu    sync.Mutex
	sides map[string]*acmePace
}

// acmePace bounds what one side has us keep.
type acmePace struct{ accounts, challenges *rate.Limiter }

func (a *acmeDoor) pace(side string) *acmePace {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.sides[side]
	if p == nil {
		if len(a.sides) >= maxSides {
			clear(a.sides)
		}
		p = &acmePace{rate.NewLimiter(rate.Every(accountPace), accountBurst), rate.NewLimiter(rate.Every(challengePace), challengeBurst)}
		a.sides[side] = p
	}
	return p
}

// tooMuch is made anew each time: smallstep's code adds to it.
func tooMuch() error {
	return acme.NewDetailedError(acme.ErrorRateLimitedType, "too much is asked for from this side; try again later")
}

// ACME makes the handler of the ACME door. The protocol is smallstep's; from
// where challenges are looked at, and who gets which name, says c.
func (d *Doors) ACME(c doors.ACME) (http.Handler, error) {
	d.revoked.set(c)
	store, err := acmenosql.New(&acmeValues{values: c.Values})
	if err != nil {
		return nil, fmt.Errorf("acme: %w", err)
	}
	router := chi.NewRouter()
	router.Route(acmePrefix, func(r chi.Router) { acmeapi.Route(r) })
	return &acmeDoor{d: d, c: c, db: store, nonces: &nonces{known: map[acme.Nonce]bool{}}, router: router, sides: map[string]*acmePace{}}, nil
}

// ServeHTTP serves one request. Everything about it hangs on the side that its
// URL names.
func (a *acmeDoor) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	name, path, _ := strings.Cut(strings.TrimPrefix(req.URL.Path, acmePrefix+"/"), "/")
	side, err := a.c.Side(req, name)
	if err != nil {
		problem := acme.NewDetailedError(acme.ErrorUnauthorizedType, "%s", err.Error())
		w.Header().Set("Content-Type", "application/problem+json")
		w.WriteHeader(http.StatusForbidden)
		_, _ = fmt.Fprintf(w, "{\"type\":%q,\"detail\":%q}\n", problem.Type, problem.Detail)
		return
	}
	p, err := newACMEProvisioner(side)
	if err != nil {
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	if path == "directory" && (req.Method == http.MethodGet || req.Method == http.MethodHead) {
		directory(w, req, p)
		return
	}
	ctx := authority.NewContext(req.Context(), a.d.ca)
	ctx = acme.NewContext(ctx, &acmeDB{DB: a.db, a: a, side: side}, &acmeClient{ctx: ctx, side: side},
		&acmeLinker{Linker: acme.NewLinker(req.Host, acmePrefix), p: p}, nil)
	said := logging.NewResponseLogger(w)
	a.router.ServeHTTP(said, req.WithContext(ctx))
	if err, ok := said.Fields()["error"].(error); ok && said.StatusCode() >= http.StatusInternalServerError && said.StatusCode() != http.StatusNotImplemented {
		a.c.Failed(err)
	}
}

// directory is smallstep's (RFC 8555, 7.1.1) without the change of an account's
// key, which it names and does not have.
func directory(w http.ResponseWriter, req *http.Request, p *provisioner.ACME) {
	ctx, linker := acme.NewProvisionerContext(req.Context(), p), acme.NewLinker(req.Host, acmePrefix)
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]string{ // the client is gone, or not
		"newNonce":   linker.GetLink(ctx, acme.NewNonceLinkType),
		"newAccount": linker.GetLink(ctx, acme.NewAccountLinkType),
		"newOrder":   linker.GetLink(ctx, acme.NewOrderLinkType),
		"revokeCert": linker.GetLink(ctx, acme.RevokeCertLinkType),
	})
}

// newACMEProvisioner is a side in smallstep's words.
func newACMEProvisioner(side doors.Side) (*provisioner.ACME, error) {
	p := &provisioner.ACME{ID: "acme/" + side.ID, Type: "ACME", Name: side.Name, Challenges: []provisioner.ACMEChallenge{provisioner.HTTP_01, provisioner.TLS_ALPN_01},
		Claims: &provisioner.Claims{DefaultTLSDur: &provisioner.Duration{Duration: doors.Life}, MaxTLSDur: &provisioner.Duration{Duration: doors.Life + time.Hour}}}
	return p, p.Init(provisioner.Config{Claims: config.GlobalProvisionerClaims})
}

// acmeLinker makes links of the host that the client asked for.
type acmeLinker struct {
	acme.Linker
	p *provisioner.ACME
}

// Middleware says which side it is; smallstep's own would look it up in a
// configuration that we have not.
func (l *acmeLinker) Middleware(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		next.ServeHTTP(w, req.WithContext(acme.NewProvisionerContext(req.Context(), l.p)))
	})
}

// acmeClient looks at challenges from a client's side. It lives as long as the
// request that asks for it.
type acmeClient struct {
	ctx  context.Context
	side doors.Side
}

// Get fetches what a host answers to an http-01 challenge. It follows no
// redirect: that would lead the side's node to where its client likes.
func (c *acmeClient) Get(text string) (*http.Response, error) {
	u, err := url.Parse(text)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(c.ctx, acmeTime)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, text, nil)
	if err != nil {
		cancel()
		return nil, err
	}
	client := &http.Client{
		Transport: &http.Transport{
			DisableKeepAlives: true, MaxResponseHeaderBytes: 16 << 10,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return c.side.Dial(ctx, doors.ChallengeHTTP, u.Hostname())
			},
		},
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return errors.New("it answers with a redirect, which is not followed")
		},
	}
	res, err := client.Do(req)
	if err != nil {
		cancel()
		return nil, err
	}
	res.Body = &limitedBody{Reader: io.LimitReader(res.Body, maxKeyAuthorization), body: res.Body, done: cancel}
	return res, nil
}

// limitedBody is an answer that cannot be endless.
type limitedBody struct {
	io.Reader
	body io.Closer
	done func()
}

func (b *limitedBody) Close() error {
	defer b.done()
	return b.body.Close()
}

// TLSDial makes the handshake of a tls-alpn-01 challenge.
func (c *acmeClient) TLSDial(_, addr string, cfg *tls.Config) (*tls.Conn, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(c.ctx, acmeTime)
	defer cancel()
	conn, err := c.side.Dial(ctx, doors.ChallengeTLS, host)
	if err != nil {
		return nil, err
	}
	secure := tls.Client(conn, cfg)
	if err := secure.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return secure, nil
}

// LookupTxt is for dns-01, which is not offered: it would ask the name servers
// of the gateway's side about the names of another.
func (c *acmeClient) LookupTxt(string) ([]string, error) {
	return nil, errors.New("dns-01 is not offered")
}

// acmeDB adds to what is stored who may have it.
type acmeDB struct {
	acme.DB
	a    *acmeDoor
	side doors.Side
}

// CreateNonce and DeleteNonce keep nonces in memory: a client whose nonce is
// forgotten is given another.
func (d *acmeDB) CreateNonce(context.Context) (acme.Nonce, error) { return d.a.nonces.create() }

// DeleteNonce uses a nonce up.
func (d *acmeDB) DeleteNonce(_ context.Context, n acme.Nonce) error { return d.a.nonces.use(n) }

// CreateChallenge is the first that an order leads to.
func (d *acmeDB) CreateChallenge(ctx context.Context, ch *acme.Challenge) error {
	if err := d.allow(ctx, ch.Value); err != nil {
		return err
	}
	if !d.a.pace(d.side.ID).challenges.Allow() {
		return tooMuch()
	}
	return d.DB.CreateChallenge(ctx, ch)
}

// UpdateChallenge ends an authorization whose challenge failed: it is looked at
// once, and a client that waits for a better answer waits in vain.
func (d *acmeDB) UpdateChallenge(ctx context.Context, ch *acme.Challenge) error {
	if ch.Status == acme.StatusPending && ch.Error != nil {
		ch.Status = acme.StatusInvalid
	}
	if err := d.DB.UpdateChallenge(ctx, ch); err != nil || ch.Status != acme.StatusInvalid {
		return err
	}
	az, err := d.GetAuthorization(ctx, ch.AuthorizationID)
	if err != nil {
		return err
	}
	az.Status, az.Error = acme.StatusInvalid, ch.Error
	return d.UpdateAuthorization(ctx, az)
}

// CreateAuthorization refuses what no challenge can prove here.
func (d *acmeDB) CreateAuthorization(ctx context.Context, az *acme.Authorization) error {
	if az.Wildcard {
		return acme.NewDetailedError(acme.ErrorRejectedIdentifierType, "wildcard names are not certified: they need dns-01, which is not offered")
	}
	if az.Identifier.Type == acme.DNS && net.ParseIP(az.Identifier.Value) != nil { // old clients do; its certificate could not be made
		return acme.NewDetailedError(acme.ErrorRejectedIdentifierType, "%s is an address: ask for it as an identifier of type ip (RFC 8738)", az.Identifier.Value)
	}
	if err := d.allow(ctx, az.Identifier.Value); err != nil {
		return err
	}
	return d.DB.CreateAuthorization(ctx, az)
}

// CreateOrder looks at all names once more.
func (d *acmeDB) CreateOrder(ctx context.Context, o *acme.Order) error {
	if len(o.Identifiers) > doors.MaxNames {
		return acme.NewDetailedError(acme.ErrorRejectedIdentifierType, "more than %d names", doors.MaxNames)
	}
	for _, id := range o.Identifiers {
		if id.Type != acme.DNS && id.Type != acme.IP {
			return acme.NewDetailedError(acme.ErrorRejectedIdentifierType, "identifiers of type %s are not certified", id.Type)
		}
		if err := d.allow(ctx, id.Value); err != nil {
			return err
		}
	}
	if err := d.DB.CreateOrder(ctx, o); err != nil {
		return err
	}
	return d.touch(ctx, o.AccountID)
}

// CreateAccount keeps a new account, if its side has not too many.
func (d *acmeDB) CreateAccount(ctx context.Context, acc *acme.Account) error {
	if !d.a.pace(d.side.ID).accounts.Allow() {
		return tooMuch()
	}
	return d.DB.CreateAccount(ctx, acc)
}

// touch says that an account is in use: others are forgotten in the end.
func (d *acmeDB) touch(ctx context.Context, account string) error {
	acc, err := d.GetAccount(ctx, account)
	if err != nil {
		return err
	}
	key, err := acme.KeyToID(acc.Key)
	if err != nil {
		return err
	}
	for bucket, name := range map[string]string{"acme_accounts": account, "acme_keyID_accountID_index": key} {
		v, err := d.a.c.Values.Value(ctx, bucket, name)
		if err != nil {
			return err
		}
		if _, _, err := d.a.c.Values.Swap(ctx, bucket, name, v, v); err != nil {
			return err
		}
	}
	return nil
}

// CreateCertificate notes a leaf before its client can fetch it, if its names
// are still allowed.
func (d *acmeDB) CreateCertificate(ctx context.Context, cert *acme.Certificate) error {
	for _, name := range cert.Leaf.DNSNames {
		if err := d.allow(ctx, name); err != nil {
			return err
		}
	}
	for _, ip := range cert.Leaf.IPAddresses {
		if err := d.allow(ctx, ip.String()); err != nil {
			return err
		}
	}
	err := d.a.c.Record(ctx, d.side, cert.Leaf)
	if errors.Is(err, doors.ErrRefused) {
		return acme.NewDetailedError(acme.ErrorBadPublicKeyType, "%s", err.Error())
	}
	if err != nil {
		return err
	}
	return d.DB.CreateCertificate(ctx, cert)
}

func (d *acmeDB) allow(ctx context.Context, name string) error {
	name = strings.ToLower(name)
	if !doors.ValidHost(name) && net.ParseIP(name) == nil {
		return acme.NewDetailedError(acme.ErrorRejectedIdentifierType, "this is not the name of a host")
	}
	if td := d.a.d.signer.trustDomain(); name == td || strings.HasSuffix(name, "."+td) {
		return acme.NewDetailedError(acme.ErrorRejectedIdentifierType, "%s is a name of the trust domain", name)
	}
	if err := d.side.Allow(ctx, name); err != nil {
		return acme.NewDetailedError(acme.ErrorRejectedIdentifierType, "%s", err.Error())
	}
	return nil
}

// nonces are the anti-replay values that are out.
type nonces struct {
	mu    sync.Mutex
	known map[acme.Nonce]bool
	order []acme.Nonce // oldest first; some of them used
}

func (n *nonces) create() (acme.Nonce, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", err
	}
	nonce := acme.Nonce(base64.RawURLEncoding.EncodeToString(b[:]))
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.order) >= maxNonces {
		delete(n.known, n.order[0])
		n.order = append(n.order[:0], n.order[1:]...)
	}
	n.known[nonce] = true
	n.order = append(n.order, nonce)
	return nonce, nil
}

func (n *nonces) use(nonce acme.Nonce) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.known[nonce] {
		return acme.NewError(acme.ErrorBadNonceType, "the nonce is not known, or was used")
	}
	delete(n.known, nonce)
	return nil
}

// revocations is the part of smallstep's database that says what is revoked.
type revocations struct {
	db.AuthDB
	mu sync.Mutex
	c  doors.ACME // of the ACME door; its functions are nil without one
}

func (r *revocations) set(c doors.ACME) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.c = c
}

func (r *revocations) get() doors.ACME {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.c
}

// IsRevoked takes a serial number in decimal.
func (r *revocations) IsRevoked(serial string) (bool, error) {
	c := r.get()
	n, ok := new(big.Int).SetString(serial, 10)
	if !ok || c.Revoked == nil {
		return false, fmt.Errorf("serial number %q cannot be looked up", serial)
	}
	ctx, cancel := context.WithTimeout(context.Background(), acmeTime)
	defer cancel()
	return c.Revoked(ctx, n)
}

// Revoke notes a revocation that the ACME door has verified.
func (r *revocations) Revoke(rci *db.RevokedCertificateInfo) error {
	c := r.get()
	n, ok := new(big.Int).SetString(rci.Serial, 10)
	if !ok || c.Revoke == nil {
		return fmt.Errorf("serial number %q cannot be revoked", rci.Serial)
	}
	ctx, cancel := context.WithTimeout(context.Background(), acmeTime)
	defer cancel()
	return c.Revoke(ctx, n, rci.ReasonCode)
}

// StoreCertificate keeps nothing: the gateway has noted the leaf.
func (r *revocations) StoreCertificate(*x509.Certificate) error { return nil }
