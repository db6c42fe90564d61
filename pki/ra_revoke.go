package pki

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"slices"
	"time"

	"go.step.sm/crypto/jose"

	"sallyport/internal/doors"
	"sallyport/internal/wire"
)

// The key that certified a party signs its CRL, and it is with the external CA.
// We tell that CA what is revoked, and hand on the CRL that it makes; there is no
// OCSP: the external CA has none, and issues nobody a certificate to answer for
// it (id-kp-OCSPSigning, RFC 6960, 4.2.2.2).

const (
	// tellAtOnce are the revocations that are passed on in one turn, the rest
	// follow in the next.
	tellAtOnce = 64
	maxTold    = 100_000
	// maxRelayed bounds a CRL: some hundred thousand entries.
	maxRelayed = 16 << 20
)

// crlTold is what one issuer's CRL was when it was seen last.
type crlTold struct {
	number *big.Int
	told   map[string]struct{} // serials that the external CA took, or had already
}

// ExternalCRL tells the external CA which leaves of an intermediate are
// revoked, and returns its CRL if that intermediate signed it.
func (a *Authority) ExternalCRL(ctx context.Context, issuer wire.KeyHash, revoked []doors.Revoked) (wire.CAStatus, error) {
	if a.ra == nil {
		return wire.CAStatus{}, fmt.Errorf("%w: there is no external CA here", ErrRefused)
	}
	var inter *x509.Certificate
	for _, i := range a.mat().inters {
		if wire.KeyOf(i.certs[0]) == issuer {
			inter = i.certs[0]
		}
	}
	if inter == nil {
		return wire.CAStatus{}, fmt.Errorf("%w: no intermediate has the key %s", ErrRefused, issuer.Fingerprint())
	}
	r := a.ra
	r.telling.Lock()
	defer r.telling.Unlock()
	seen := r.lists[issuer]
	if seen == nil {
		seen = &crlTold{told: map[string]struct{}{}}
		if r.lists == nil {
			r.lists = map[wire.KeyHash]*crlTold{}
		}
		r.lists[issuer] = seen
	}
	list, problem := r.crl(ctx, inter, seen)
	told, err := r.tell(ctx, missing(list, revoked), seen)
	if err != nil {
		problem = errors.Join(err, problem)
	}
	if told > 0 && list != nil {
		if list, err = r.crl(ctx, inter, seen); err != nil {
			problem = errors.Join(problem, err)
		}
	}
	st := wire.CAStatus{Missing: len(missing(list, revoked))}
	if list != nil {
		st.CRL, st.Next = list.Raw, list.NextUpdate.UTC()
	}
	if problem != nil {
		st.Problem = problem.Error()
	}
	return st, nil
}

// missing are those of revoked that are not in a CRL; all, if there is none.
func missing(list *x509.RevocationList, revoked []doors.Revoked) (out []doors.Revoked) {
	in := map[string]struct{}{}
	if list != nil {
		for _, e := range list.RevokedCertificateEntries {
			in[e.SerialNumber.String()] = struct{}{}
		}
	}
	for _, r := range revoked {
		if _, ok := in[r.Serial.String()]; !ok {
			out = append(out, r)
		}
	}
	return out
}

// tell has leaves revoked, and returns how many were.
func (r *registrar) tell(ctx context.Context, list []doors.Revoked, seen *crlTold) (n int, err error) {
	list = slices.DeleteFunc(list, func(e doors.Revoked) bool { _, ok := seen.told[e.Serial.String()]; return ok })
	for _, e := range list[:min(len(list), tellAtOnce)] {
		if err := r.revoke(ctx, e); err != nil {
			return n, err
		}
		if len(seen.told) >= maxTold {
			clear(seen.told)
		}
		seen.told[e.Serial.String()] = struct{}{}
		n++
	}
	return n, nil
}

// stepRevoke is the body of step-ca's /1.0/revoke.
type stepRevoke struct {
	Serial  string `json:"serial"` // decimal
	OTT     string `json:"ott"`
	Code    int    `json:"reasonCode"` // RFC 5280, 5.3.1
	Reason  string `json:"reason"`
	Passive bool   `json:"passive"` // the only way that it knows
}

// revoke has one leaf revoked. That it is already is no error.
func (r *registrar) revoke(ctx context.Context, e doors.Revoked) error {
	ott, err := r.claim(e.Serial.String(), "/1.0/revoke", nil)
	if err != nil {
		return fmt.Errorf("%w: token: %w", ErrExternal, err)
	}
	body, err := json.Marshal(stepRevoke{Serial: e.Serial.String(), OTT: ott, Code: e.Reason, Reason: "revoked by Sallyport", Passive: true})
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.URL+"/1.0/revoke", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := r.do(req)
	if err != nil {
		return fmt.Errorf("%w: revoke: %w", ErrExternal, err)
	}
	defer func() { _ = resp.Body.Close() }()
	var a stepAnswer
	if err := wire.DecodeJSON(resp.Body, maxSign, &a); err != nil {
		return fmt.Errorf("%w at %s answers a revocation with %s: %w", ErrExternal, r.URL, resp.Status, err)
	}
	switch resp.StatusCode {
	case http.StatusOK, http.StatusBadRequest: // step-ca refuses what is revoked already with the same status as nonsense, which this is not
		return nil
	case http.StatusNotImplemented:
		return fmt.Errorf("%w at %s revokes nothing: it has no database (`db` in ca.json)", ErrExternal, r.URL)
	}
	return fmt.Errorf("%w at %s does not revoke %s: %s (%s)", ErrExternal, r.URL, doors.Serial(e.Serial), wire.Quotable(a.Message), resp.Status)
}

// claim makes a token of the provisioner for one path.
func (r *registrar) claim(subject, path string, more map[string]any) (string, error) {
	id, err := tokenID()
	if err != nil {
		return "", err
	}
	now := time.Now()
	b := jose.Signed(r.signer).Claims(jose.Claims{
		ID: id, Issuer: r.Provisioner, Subject: subject, Audience: jose.Audience{r.URL + path},
		IssuedAt: jose.NewNumericDate(now), NotBefore: jose.NewNumericDate(now), Expiry: jose.NewNumericDate(now.Add(otpLife)),
	})
	if more != nil {
		b = b.Claims(more)
	}
	return b.CompactSerialize()
}

// crl asks for the external CA's CRL. It counts if the intermediate signed it,
// it is in force, and none before it was newer.
func (r *registrar) crl(ctx context.Context, inter *x509.Certificate, seen *crlTold) (*x509.RevocationList, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.URL+"/1.0/crl", http.NoBody)
	if err != nil {
		return nil, err
	}
	resp, err := r.do(req)
	if err != nil {
		return nil, fmt.Errorf("%w: CRL: %w", ErrExternal, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%w at %s has no CRL (%s): set `crl` in its ca.json to enabled and generateOnRevoke", ErrExternal, r.URL, resp.Status)
	}
	der, err := io.ReadAll(io.LimitReader(resp.Body, maxRelayed+1))
	if err != nil {
		return nil, fmt.Errorf("%w: CRL: %w", ErrExternal, err)
	}
	if len(der) > maxRelayed {
		return nil, fmt.Errorf("%w: CRL: %w", ErrExternal, wire.ErrTooLarge)
	}
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return nil, fmt.Errorf("%w: its CRL: %w", ErrExternal, err)
	}
	if err := list.CheckSignatureFrom(inter); err != nil {
		return nil, fmt.Errorf("%w: its CRL is not that of the intermediate %s: %w", ErrExternal, wire.KeyOf(inter).Fingerprint(), err)
	}
	switch {
	case time.Now().After(list.NextUpdate):
		return nil, fmt.Errorf("%w: its CRL ended at %s", ErrExternal, list.NextUpdate.UTC().Format(time.RFC3339))
	case list.Number == nil:
		return nil, fmt.Errorf("%w: its CRL has no number", ErrExternal)
	case seen.number != nil && list.Number.Cmp(seen.number) < 0:
		return nil, fmt.Errorf("%w: its CRL has the number %s, there was %s already: was its database restored?", ErrExternal, list.Number, seen.number)
	}
	seen.number = list.Number
	return list, nil
}
