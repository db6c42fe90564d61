package pki

import (
	"context"
	"crypto"
	"crypto/x509"
	"fmt"
	"math/big"
	"net/http"
	"time"

	"sallyport/internal/doors"
	"sallyport/internal/wire"
)

// What a gateway asks of the doors of an authority in a process of its own,
// which keeps their keys too.
const (
	pathDoors     = "/v1/doors"
	pathDoorLeaf  = "/v1/doors/issue"
	pathDoorsCRL  = "/v1/doors/crl"
	pathDoorsOCSP = "/v1/doors/ocsp"

	pathExternalCRL = "/v1/external/crl"

	// maxDoorCSR bounds a request for a leaf, maxDoorCRL one for a CRL: some
	// hundred thousand entries.
	maxDoorCSR = 256 << 10
	maxDoorCRL = 64 << 20
	// maxDoorStatus is the furthest end of what is signed of revocations: a
	// gateway that was taken over must not make answers that outlive it.
	maxDoorStatus = 8 * 24 * time.Hour
	// maxSerial is the longest serial number (RFC 5280, 4.1.2.2).
	maxSerial = 20
)

// doorsAnswer is [doorIssuers] on the wire, in DER.
type doorsAnswer struct {
	Doors  [][]byte `json:"doors"`
	Chain  [][]byte `json:"chain"`
	Inters [][]byte `json:"inters"`
	Roots  [][]byte `json:"roots"`
	Status [][]byte `json:"status"`
}

func (i *doorIssuers) answer() doorsAnswer {
	return doorsAnswer{Doors: raws(i.doors), Chain: raws(i.chain), Inters: raws(i.inters), Roots: raws(i.roots), Status: raws(i.status)}
}

func (a doorsAnswer) issuers() (i *doorIssuers, err error) {
	i = &doorIssuers{}
	for _, l := range []struct {
		to   *[]*x509.Certificate
		from [][]byte
	}{{&i.doors, a.Doors}, {&i.chain, a.Chain}, {&i.inters, a.Inters}, {&i.roots, a.Roots}, {&i.status, a.Status}} {
		if *l.to, err = parseAll(l.from); err != nil {
			return nil, err
		}
		if len(*l.to) == 0 {
			return nil, fmt.Errorf("%w: an issuer of the doors is missing", wire.ErrMalformed)
		}
	}
	return i, nil
}

func raws(certs []*x509.Certificate) (out [][]byte) {
	for _, c := range certs {
		out = append(out, c.Raw)
	}
	return out
}

func parseAll(ders [][]byte) (certs []*x509.Certificate, err error) {
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", wire.ErrMalformed, err)
		}
		certs = append(certs, c)
	}
	return certs, nil
}

// crlRequest and ocspRequest are [doors.CRL] and [doors.Status] with the issuer
// that signs; serial numbers in hex.
type (
	crlRequest struct {
		Issuer  wire.KeyHash   `json:"issuer"`
		Number  int64          `json:"number"`
		This    time.Time      `json:"this"`
		Next    time.Time      `json:"next"`
		Revoked []revokedEntry `json:"revoked,omitempty"`
	}
	ocspRequest struct {
		Issuer  wire.KeyHash  `json:"issuer"`
		Serial  string        `json:"serial"`
		Hash    crypto.Hash   `json:"hash"`
		This    time.Time     `json:"this"`
		Next    time.Time     `json:"next"`
		Nonce   []byte        `json:"nonce,omitempty"`
		Revoked *revokedEntry `json:"revoked,omitempty"`
	}
	revokedEntry struct {
		Serial string    `json:"serial"`
		At     time.Time `json:"at"`
		Reason int       `json:"reason,omitempty"`
	}
	derAnswer struct {
		DER []byte `json:"der"`
	}
)

// doorRoutes are answered to registered gateways. A gateway says who may have
// which name, as it does of parties; what a leaf may be is decided here, and so
// is that none is a party's.
func (s *Server) doorRoutes(mux *http.ServeMux) {
	mux.HandleFunc("POST "+pathDoors, answer(s, "doors", maxSmall, known(s, func(ctx context.Context, _ Gateway, _ struct{}) (doorsAnswer, error) {
		k, err := s.ca.openDoorKeys(ctx)
		if err != nil {
			return doorsAnswer{}, err
		}
		return k.issuers().answer(), nil
	})))
	mux.HandleFunc("POST "+pathDoorLeaf, answer(s, "doors_issue", maxDoorCSR, known(s, func(ctx context.Context, gw Gateway, r doorRequest) (chainAnswer, error) {
		k, err := s.ca.openDoorKeys(ctx)
		if err != nil {
			return chainAnswer{}, err
		}
		chain, err := k.certify(ctx, r)
		if err != nil {
			return chainAnswer{}, err
		}
		s.log.Info("certificate of a door issued", "serial", doors.Serial(chain[0].SerialNumber), "names", r.Names, "addresses", r.Addresses, "gateway", gw.ID)
		return chainAnswer{raws(chain)}, nil
	})))
	mux.HandleFunc("POST "+pathDoorsCRL, answer(s, "doors_crl", maxDoorCRL, known(s, func(ctx context.Context, _ Gateway, r crlRequest) (derAnswer, error) {
		k, err := s.ca.openDoorKeys(ctx)
		if err != nil {
			return derAnswer{}, err
		}
		crl, err := r.crl()
		if err != nil {
			return derAnswer{}, err
		}
		der, err := k.SignCRL(ctx, r.Issuer, crl)
		return derAnswer{der}, err
	})))
	mux.HandleFunc("POST "+pathExternalCRL, answer(s, "external_crl", maxDoorCRL, known(s, func(ctx context.Context, _ Gateway, r crlRequest) (wire.CAStatus, error) {
		revoked, err := r.entries()
		if err != nil {
			return wire.CAStatus{}, err
		}
		return s.ca.ExternalCRL(ctx, r.Issuer, revoked)
	})))
	mux.HandleFunc("POST "+pathDoorsOCSP, answer(s, "doors_ocsp", maxSmall, known(s, func(ctx context.Context, _ Gateway, r ocspRequest) (derAnswer, error) {
		k, err := s.ca.openDoorKeys(ctx)
		if err != nil {
			return derAnswer{}, err
		}
		status, err := r.status()
		if err != nil {
			return derAnswer{}, err
		}
		der, err := k.SignOCSP(ctx, r.Issuer, status)
		return derAnswer{der}, err
	})))
}

func serialOf(s string) (*big.Int, error) {
	n, ok := doors.ParseSerial(s)
	if !ok || n.Sign() <= 0 || len(n.Bytes()) > maxSerial {
		return nil, fmt.Errorf("%w: serial number %q", wire.ErrMalformed, wire.Quotable(s))
	}
	return n, nil
}

// holds refuses a statement that holds for too long.
func holds(this, next time.Time) error {
	if limit := time.Now().Add(maxDoorStatus); next.After(limit) || !next.After(this) {
		return fmt.Errorf("%w: what is said of revocations holds for at most %v", ErrRefused, maxDoorStatus)
	}
	return nil
}

func (r crlRequest) crl() (crl doors.CRL, err error) {
	if err := holds(r.This, r.Next); err != nil {
		return crl, err
	}
	crl = doors.CRL{Number: big.NewInt(r.Number), This: r.This, Next: r.Next}
	crl.Revoked, err = r.entries()
	return crl, err
}

func (r crlRequest) entries() (out []doors.Revoked, err error) {
	for _, e := range r.Revoked {
		n, err := serialOf(e.Serial)
		if err != nil {
			return nil, err
		}
		out = append(out, doors.Revoked{Serial: n, At: e.At, Reason: e.Reason})
	}
	return out, nil
}

func (r ocspRequest) status() (s doors.Status, err error) {
	if err := holds(r.This, r.Next); err != nil {
		return s, err
	}
	if !r.Hash.Available() {
		return s, fmt.Errorf("%w: hash %d", wire.ErrMalformed, r.Hash)
	}
	if len(r.Nonce) > doors.MaxNonce {
		return s, fmt.Errorf("%w: a nonce of %d bytes", wire.ErrMalformed, len(r.Nonce))
	}
	n, err := serialOf(r.Serial)
	if err != nil {
		return s, err
	}
	s = doors.Status{Serial: n, Hash: r.Hash, This: r.This, Next: r.Next, Nonce: r.Nonce}
	if r.Revoked != nil {
		s.Revoked = &doors.Revoked{Serial: n, At: r.Revoked.At, Reason: r.Revoked.Reason}
	}
	return s, nil
}
