package gateway

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"net/http/httptest"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"sallyport/gateway/store"
	"sallyport/internal/doors"
	"sallyport/internal/wire"
)

// strayingCA signs the status of leaves while it is there.
type strayingCA struct {
	doors.Authority

	inter  *x509.Certificate
	away   error
	signed int
}

func (c *strayingCA) Issuers() []*x509.Certificate { return []*x509.Certificate{c.inter} }

func (c *strayingCA) sign(what string) ([]byte, error) {
	c.signed++
	if c.away != nil {
		return nil, c.away
	}
	return fmt.Appendf(nil, "%s %d", what, c.signed), nil
}

func (c *strayingCA) SignCRL(context.Context, wire.KeyHash, doors.CRL) ([]byte, error) {
	return c.sign("CRL")
}

func (c *strayingCA) SignOCSP(_ context.Context, _ wire.KeyHash, s doors.Status) ([]byte, error) {
	return c.sign(fmt.Sprintf("revoked %t", s.Revoked != nil))
}

// What was signed last holds until its end while the authority is away.
func TestStatusWhileTheAuthorityIsAway(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	defer func() { _ = w.db.Close() }()
	ca, now := &strayingCA{inter: w.ca.Inter}, time.Now()
	d := newDoorStatus(w.db, ca, testLog(t))
	d.now = func() time.Time { return now }
	issuer := wire.KeyOf(ca.inter)
	serials := []*big.Int{big.NewInt(0x11), big.NewInt(0x12)}
	w.update(func(ctx context.Context, tx *store.Tx) error {
		var errs []error
		for _, s := range serials {
			errs = append(errs, tx.AddCertificate(ctx, &store.Certificate{Issuer: issuer, Serial: doors.Serial(s), Door: "est", KeyHash: issuer, NotAfter: now.Add(30 * 24 * time.Hour)}))
		}
		return errors.Join(errs...)
	})
	ask := func(serial *big.Int) (answer, cache string) {
		t.Helper()
		req, err := ocsp.CreateRequest(&x509.Certificate{SerialNumber: serial}, ca.inter, nil)
		if err != nil {
			t.Fatal(err)
		}
		rec := httptest.NewRecorder()
		d.serveOCSPGet(rec, httptest.NewRequestWithContext(t.Context(), "GET", pathOCSP+base64.StdEncoding.EncodeToString(req), nil))
		return rec.Body.String(), rec.Header().Get("Cache-Control")
	}
	crl := func(want string) {
		t.Helper()
		got, err := d.crl(t.Context(), issuer)
		if string(got) != want || (err == nil) != (want != "") {
			t.Errorf("CRL: %q, %v; want %q", got, err, want)
		}
	}
	later := func(by time.Duration) { now = now.Add(by) }

	ca.away = errors.New("it is away")
	crl("")
	ca.away = nil
	later(2 * crlLook)
	crl("CRL 2")
	if got, cache := ask(serials[0]); got != "revoked false 3" || cache != statusCache {
		t.Errorf("OCSP: %q, %q", got, cache)
	}

	ca.away = errors.New("it is away")
	later(crlAge)
	w.update(func(ctx context.Context, tx *store.Tx) error {
		return tx.RevokeCertificate(ctx, issuer, doors.Serial(serials[1]), 0)
	})
	crl("CRL 2")
	crl("CRL 2")
	if ca.signed != 4 {
		t.Errorf("the authority was asked %d times, want no two within %s", ca.signed, crlLook)
	}
	if got, _ := ask(serials[0]); got != "revoked false 3" {
		t.Errorf("OCSP while the authority is away: %q", got)
	}
	if got, cache := ask(serials[1]); got != string(ocsp.TryLaterErrorResponse) || cache != "" {
		t.Errorf("OCSP of what was never signed: %q, to be kept %q", got, cache)
	}
	w.update(func(ctx context.Context, tx *store.Tx) error {
		return tx.RevokeCertificate(ctx, issuer, doors.Serial(serials[0]), 0)
	})
	if got, _ := ask(serials[0]); got != string(ocsp.TryLaterErrorResponse) {
		t.Errorf("OCSP of what was revoked since: %q", got)
	}
	later(statusLife)
	crl("")
	ca.away, ca.signed = nil, 10
	later(2 * crlLook)
	crl("CRL 11")
	if got, _ := ask(serials[0]); got != "revoked true 12" {
		t.Errorf("OCSP when it is back: %q", got)
	}
}
