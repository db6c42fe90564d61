package gateway

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/doors"
	"sallyport/internal/wire"
)

func (r *rest) certificateRoutes() {
	handle(r, huma.Operation{OperationID: "certificate.list", Method: http.MethodGet, Path: "/certificates", Summary: "List the certificates of other programs, newest first"}, mayRead, r.listCertificates)
	handle(r, huma.Operation{OperationID: "certificate.revoke", Method: http.MethodPost, Path: "/certificates/{serial}/revoke", Summary: "Revoke a certificate of another program"}, mayCertify, r.revokeCertificate)
}

func (r *rest) certificateView(c *store.Certificate) api.Certificate {
	v := api.Certificate{Serial: c.Serial, Door: c.Door, Names: list(c.Names), State: "valid", Key: c.KeyHash.Fingerprint(), Issued: c.IssuedAt.UTC(), Expires: c.NotAfter.UTC()}
	if c.Via != "" {
		v.Via = r.s.fleet.nameNow(wire.ID(c.Via))
	}
	switch {
	case !c.RevokedAt.IsZero():
		at := c.RevokedAt.UTC()
		v.State, v.Revoked = "revoked", &at
		for name, n := range api.RevocationReasons {
			if n == c.Reason {
				v.Reason = name
			}
		}
	case time.Now().After(c.NotAfter):
		v.State = "expired"
	}
	return v
}

func (r *rest) listCertificates(ctx context.Context, in *Page) (*body[api.List[api.Certificate]], error) {
	rows, err := r.s.store.DoorCertificates(ctx, time.Now().Add(-certificateMemory))
	if err != nil {
		return nil, err
	}
	out := make([]api.Certificate, len(rows))
	for i, c := range rows {
		out[i] = r.certificateView(c)
	}
	l, err := slicePage(out, *in, func(c api.Certificate) string { return c.Serial })
	return answer(l), err
}

type bySerial struct {
	Serial string `path:"serial" maxLength:"128" doc:"serial number in hex, or at least 8 digits of it"`
	Body   api.RevokeCertificate
}

func (r *rest) revokeCertificate(ctx context.Context, in *bySerial) (*body[api.Certificate], error) {
	reason, ok := api.RevocationReasons[in.Body.Reason]
	if in.Body.Reason != "" && !ok {
		return nil, api.NewProblem(api.CodeInvalid, fmt.Sprintf("reason %q: want one of %s", wire.Quotable(in.Body.Reason), strings.Join(slices.Sorted(maps.Keys(api.RevocationReasons)), ", ")))
	}
	const least = 8 // digits of a serial number that mean one
	n, ok := doors.ParseSerial(in.Serial)
	digits := strings.ToLower(strings.ReplaceAll(in.Serial, ":", ""))
	if !ok || len(digits) < least || n.Sign() == 0 {
		return nil, api.NewProblem(api.CodeInvalid, fmt.Sprintf("%q is no serial number: want at least %d hex digits", wire.Quotable(in.Serial), least))
	}
	found, err := r.s.store.FindCertificates(ctx, doors.Serial(n))
	if err != nil {
		return nil, err
	}
	// Other programs write whole bytes: a zero before an odd number of digits.
	found = slices.DeleteFunc(found, func(c *store.Certificate) bool {
		return c.Serial != doors.Serial(n) && !strings.HasPrefix(strings.Repeat("0", len(c.Serial)%2)+c.Serial, digits) && !strings.HasPrefix(c.Serial, digits)
	})
	switch len(found) {
	case 0:
		return nil, api.NewProblem(api.CodeNotFound, fmt.Sprintf("no certificate %q: see `sallyport certificate list`; those of nodes and RCPs are revoked with them", wire.Quotable(in.Serial)))
	case 1:
	default:
		return nil, api.NewProblem(api.CodeAmbiguous, fmt.Sprintf("%q may be any of %d certificates: say more of it", wire.Quotable(in.Serial), len(found)))
	}
	c := found[0]
	err = r.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		if err := tx.RevokeCertificate(ctx, c.Issuer, c.Serial, reason); err != nil {
			return err
		}
		tx.Audit(ctx, "certificate.revoke", strings.Join(c.Names, " "), "serial "+c.Serial)
		c, err = tx.Certificate(ctx, c.Issuer, c.Serial)
		return err
	})
	if errors.Is(err, store.ErrExists) {
		return nil, api.NewProblem(api.CodeConflict, "certificate "+c.Serial+" is revoked already")
	}
	if err != nil {
		return nil, err
	}
	r.s.doors.gaveUp(c)
	return answer(r.certificateView(c)), nil
}
