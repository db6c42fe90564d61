package gateway

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ocsp"
	"golang.org/x/time/rate"

	"sallyport/gateway/store"
	"sallyport/internal/doors"
	"sallyport/internal/wire"
)

const (
	pathOCSP = "/ocsp/"

	// statusLife is how long a CRL and an OCSP response say that they hold;
	// statusBackdate makes them good for clocks that are behind.
	statusLife     = 24 * time.Hour
	statusBackdate = time.Hour
	// crlAge is the oldest CRL that is handed out, crlLook the time between
	// two looks whether more is revoked.
	crlAge  = time.Hour
	crlLook = time.Second
	// signTime bounds one signature. Clients of a CRL wait for it in turn, and
	// each takes a place at the doors.
	signTime = 5 * time.Second
	// ocspAge is how long a signed response is handed out again as long as
	// nothing changed; maxOCSP bounds how many are kept.
	ocspAge = 10 * time.Minute
	// nonceRate bounds the responses that repeat a nonce, which are signed one
	// by one. Beyond it they are given without (RFC 9654, 2.1).
	nonceRate, nonceBurst = 100, 200
	maxOCSP               = 4096
	maxOCSPIn             = 4 << 10
	// statusCache is what caches between are told.
	statusCache = "public, max-age=60"
)

// doorStatus says which leaves are revoked: those of our own parties, and
// those that left by a door.
type doorStatus struct {
	store *store.DB
	ca    doors.Authority
	log   *slog.Logger
	now   func() time.Time

	external *externalStatus // nil: the keys of all issuers are ours

	mu     sync.Mutex
	crls   map[wire.KeyHash]*signedCRL
	number int64 // of the last CRL

	nonces *rate.Limiter

	ocspMu    sync.Mutex
	responses map[ocspKey]signedOCSP
}

type signedCRL struct {
	der    []byte
	names  string // what is in it
	made   time.Time
	looked time.Time
	err    error // why there is none
}

type ocspKey struct {
	issuer  wire.KeyHash
	serial  string
	hash    crypto.Hash
	revoked bool
	reason  int
}

type signedOCSP struct {
	der  []byte
	made time.Time
}

func newDoorStatus(db *store.DB, ca doors.Authority, log *slog.Logger) *doorStatus {
	return &doorStatus{store: db, ca: ca, log: log, now: time.Now, crls: map[wire.KeyHash]*signedCRL{}, nonces: rate.NewLimiter(nonceRate, nonceBurst), responses: map[ocspKey]signedOCSP{}}
}

// revokedOf are the revoked leaves of an issuer that are good after since, as
// its CRL lists them.
func revokedOf(ctx context.Context, db *store.DB, issuer wire.KeyHash, since time.Time) ([]doors.Revoked, error) {
	rows, err := db.RevokedCertificates(ctx, issuer, since)
	if err != nil {
		return nil, err
	}
	list := make([]doors.Revoked, 0, len(rows))
	for _, r := range rows {
		serial, ok := new(big.Int).SetString(r.Serial, 16)
		if !ok {
			return nil, fmt.Errorf("serial number %q in the database", wire.Quotable(r.Serial))
		}
		list = append(list, doors.Revoked{Serial: serial, At: r.RevokedAt, Reason: r.Reason})
	}
	return list, nil
}

// serveCRL answers GET /crl/<issuer>.crl in DER.
func (d *doorStatus) serveCRL(w http.ResponseWriter, req *http.Request) {
	for _, issuer := range d.ca.Issuers() {
		if req.PathValue("name") != doors.IssuerName(issuer)+".crl" {
			continue
		}
		der, err := d.crl(req.Context(), wire.KeyOf(issuer))
		if err != nil {
			http.Error(w, "no CRL now", http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("Content-Type", "application/pkix-crl")
		w.Header().Set("Cache-Control", statusCache)
		_, _ = w.Write(der) // the client is gone, or not
		return
	}
	if d.external.serveCRL(w, req.PathValue("name")) {
		return
	}
	http.Error(w, "no such CRL", http.StatusNotFound)
}

// crl returns the CRL of an issuer, which is at most crlLook behind. While no
// other can be made, because the authority is away, the last one holds until
// the end that it names.
func (d *doorStatus) crl(ctx context.Context, issuer wire.KeyHash) ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.now()
	have := d.crls[issuer]
	if have != nil && now.Sub(have.looked) < crlLook && !now.Before(have.looked) {
		return have.der, have.err
	}
	der, err := d.newCRL(ctx, issuer, have, now)
	if err == nil {
		return der, nil
	}
	if have == nil {
		have = &signedCRL{}
		d.crls[issuer] = have
	}
	have.looked, have.err = d.now(), nil // those who wait for us need not try again
	if now.Before(have.made) || !now.Before(have.made.Add(statusLife)) {
		have.der, have.err = nil, err
	}
	d.log.Error("no new CRL", "issuer", issuer.Fingerprint(), "last_is_served", have.err == nil, "error", err)
	return have.der, have.err
}

// newCRL returns the CRL that there is if it is still right, or another; d.mu
// is held.
func (d *doorStatus) newCRL(ctx context.Context, issuer wire.KeyHash, have *signedCRL, now time.Time) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), signTime) // others wait for it too
	defer cancel()
	list, err := revokedOf(ctx, d.store, issuer, now.Add(-certificateMemory))
	if err != nil {
		return nil, err
	}
	var names strings.Builder
	for _, r := range list {
		fmt.Fprintf(&names, "%s %d\n", doors.Serial(r.Serial), r.Reason)
	}
	if have != nil && have.der != nil && have.names == names.String() && now.Sub(have.made) < crlAge && !now.Before(have.made) {
		have.looked, have.err = now, nil
		return have.der, nil
	}
	// Numbers rise with the clock, so that they need no memory and a restored
	// gateway does not repeat one.
	d.number = max(d.number+1, now.UnixMilli())
	der, err := d.ca.SignCRL(ctx, issuer, doors.CRL{Number: big.NewInt(d.number), This: now.Add(-statusBackdate), Next: now.Add(statusLife), Revoked: list})
	if err != nil {
		return nil, err
	}
	d.crls[issuer] = &signedCRL{der: der, names: names.String(), made: now, looked: now}
	return der, nil
}

// serveOCSP answers POST /ocsp (RFC 6960, appendix A.1).
func (d *doorStatus) serveOCSP(w http.ResponseWriter, req *http.Request) {
	b, err := io.ReadAll(io.LimitReader(req.Body, maxOCSPIn+1))
	if err != nil || len(b) > maxOCSPIn {
		d.answerOCSP(w, ocsp.MalformedRequestErrorResponse)
		return
	}
	der, _ := d.ocsp(req.Context(), b)
	d.answerOCSP(w, der)
}

// serveOCSPGet answers GET /ocsp/<request in base64>.
func (d *doorStatus) serveOCSPGet(w http.ResponseWriter, req *http.Request) {
	text, err := url.PathUnescape(strings.TrimPrefix(req.URL.EscapedPath(), pathOCSP))
	if err != nil || len(text) > maxOCSPIn {
		d.answerOCSP(w, ocsp.MalformedRequestErrorResponse)
		return
	}
	b, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		d.answerOCSP(w, ocsp.MalformedRequestErrorResponse)
		return
	}
	der, keep := d.ocsp(req.Context(), b)
	if keep {
		w.Header().Set("Cache-Control", statusCache)
	}
	d.answerOCSP(w, der)
}

func (d *doorStatus) answerOCSP(w http.ResponseWriter, der []byte) {
	w.Header().Set("Content-Type", "application/ocsp-response")
	_, _ = w.Write(der) // the client is gone, or not
}

// ocsp answers one request in DER. What was not issued here is answered
// without a signature (RFC 5019, 2.2.3), so that nobody has us sign at will.
// Caches may keep it unless it repeats the request's nonce, and is good for
// nobody else, or says to try again. While the authority is away, the last
// answer holds until the end that it names.
func (d *doorStatus) ocsp(ctx context.Context, in []byte) (der []byte, keep bool) {
	req, err := ocsp.ParseRequest(in)
	if err != nil {
		return ocsp.MalformedRequestErrorResponse, true
	}
	nonce, err := doors.NonceOf(in)
	if err != nil {
		return ocsp.MalformedRequestErrorResponse, true
	}
	issuer := d.named(req)
	if issuer == nil {
		return ocsp.UnauthorizedErrorResponse, true
	}
	key := wire.KeyOf(issuer)
	row, err := d.store.Certificate(ctx, key, doors.Serial(req.SerialNumber))
	if errors.Is(err, store.ErrNotFound) {
		return ocsp.UnauthorizedErrorResponse, true
	}
	if err != nil {
		d.log.Error("no OCSP response", "error", err)
		return ocsp.TryLaterErrorResponse, false
	}
	if nonce != nil && !d.nonces.Allow() {
		nonce = nil
	}
	cached := ocspKey{issuer: key, serial: row.Serial, hash: req.HashAlgorithm, revoked: !row.RevokedAt.IsZero(), reason: row.Reason}
	now := d.now()
	d.ocspMu.Lock()
	have, ok := d.responses[cached]
	d.ocspMu.Unlock()
	if ok && nonce == nil && now.Sub(have.made) < ocspAge && !now.Before(have.made) {
		return have.der, true
	}
	s := doors.Status{Serial: req.SerialNumber, Hash: req.HashAlgorithm, This: now.Add(-statusBackdate), Next: now.Add(statusLife), Nonce: nonce}
	if cached.revoked {
		s.Revoked = &doors.Revoked{Serial: req.SerialNumber, At: row.RevokedAt, Reason: row.Reason}
	}
	ctx, cancel := context.WithTimeout(ctx, signTime)
	defer cancel()
	der, err = d.ca.SignOCSP(ctx, key, s)
	if err != nil && ok && now.Before(have.made.Add(statusLife)) && !now.Before(have.made) {
		d.log.Warn("no new OCSP response; the last one is served", "error", err)
		return have.der, nonce == nil
	}
	if err != nil {
		d.log.Error("no OCSP response", "error", err)
		return ocsp.TryLaterErrorResponse, false
	}
	if nonce != nil {
		return der, false
	}
	d.ocspMu.Lock()
	defer d.ocspMu.Unlock()
	if len(d.responses) >= maxOCSP {
		clear(d.responses)
	}
	d.responses[cached] = signedOCSP{der: der, made: now}
	return der, true
}

// named finds the issuer that a request means.
func (d *doorStatus) named(req *ocsp.Request) *x509.Certificate {
	if !req.HashAlgorithm.Available() || req.SerialNumber.Sign() <= 0 {
		return nil
	}
	for _, c := range d.ca.Issuers() {
		var spki struct {
			Algorithm pkix.AlgorithmIdentifier
			Key       asn1.BitString
		}
		if _, err := asn1.Unmarshal(c.RawSubjectPublicKeyInfo, &spki); err != nil {
			continue
		}
		if bytes.Equal(digest(req.HashAlgorithm, c.RawSubject), req.IssuerNameHash) && bytes.Equal(digest(req.HashAlgorithm, spki.Key.RightAlign()), req.IssuerKeyHash) {
			return c
		}
	}
	return nil
}

func digest(hash crypto.Hash, b []byte) []byte {
	h := hash.New()
	_, _ = h.Write(b) // a hash takes everything
	return h.Sum(nil)
}
