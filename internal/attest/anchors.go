package attest

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"sallyport/internal/wire"
)

// Conditions that callers match.
var (
	ErrIssuer  = errors.New("the device certificate is not of these CAs")
	ErrTime    = errors.New("the device certificate, or one above it, is not valid now")
	ErrRevoked = errors.New("the device certificate is revoked")
	ErrUnknown = errors.New("whether the device certificate is revoked is not known")
)

// Anchors are the CAs whose devices are believed, and what they have revoked.
type Anchors struct {
	roots   *x509.CertPool
	crls    []*x509.RevocationList
	revoked []*big.Int
}

// ParseAnchors reads CA certificates and CRLs in PEM. The certificates are
// trusted as they stand, whether they are roots or not. crls may be empty;
// otherwise every certificate of a device, up to the CA, must have a current
// one of its issuer. revoked are serial numbers of leaves, of whichever CA.
func ParseAnchors(cas, crls []byte, revoked []string) (*Anchors, error) {
	certs, err := ParseCertificates(cas)
	if err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	a := &Anchors{roots: x509.NewCertPool()}
	for _, c := range certs {
		if !c.IsCA || !c.BasicConstraintsValid {
			return nil, fmt.Errorf("ca: %q is no CA certificate", wire.Quotable(c.Subject.String()))
		}
		a.roots.AddCert(c)
	}
	if a.crls, err = parseCRLs(crls); err != nil {
		return nil, fmt.Errorf("crl: %w", err)
	}
	for _, text := range revoked {
		n, ok := new(big.Int).SetString(text, 16)
		if !ok || n.Sign() <= 0 {
			return nil, fmt.Errorf("revoked: %q is no serial number in hex", wire.Quotable(text))
		}
		a.revoked = append(a.revoked, n)
	}
	return a, nil
}

func parseCRLs(text []byte) (out []*x509.RevocationList, err error) {
	for len(bytes.TrimSpace(text)) > 0 {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil || block.Type != "X509 CRL" {
			return nil, errors.New("it holds something else than CRLs in PEM form")
		}
		l, err := x509.ParseRevocationList(block.Bytes)
		if err != nil {
			return nil, err
		}
		for _, e := range l.Extensions {
			if e.Critical { // a delta, or a part: RFC 5280, sections 5.2.4 and 5.2.5
				return nil, fmt.Errorf("the one of %q is not complete (critical extension %s): want whole CRLs", wire.Quotable(l.Issuer.String()), e.Id)
			}
		}
		out = append(out, l)
	}
	return out, nil
}

// subjectAltName is the extension of RFC 5280, section 4.2.1.6.
var subjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// Check tells whether a device's chain, leaf first, leads to one of the CAs and
// is neither expired nor revoked.
func (a *Anchors) Check(chain []*x509.Certificate, now time.Time) error {
	leaf := *chain[0]
	if leaf.IsCA {
		return fmt.Errorf("%w: it is one of a CA, no device's", ErrIssuer)
	}
	if leaf.KeyUsage != 0 && leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return fmt.Errorf("%w: its key may not sign", ErrIssuer)
	}
	if slices.ContainsFunc(a.revoked, func(n *big.Int) bool { return n.Cmp(leaf.SerialNumber) == 0 }) {
		return fmt.Errorf("%w: the rule names its serial number %x", ErrRevoked, leaf.SerialNumber)
	}
	// Names of hardware modules (IEEE 802.1AR, RFC 4108) stand in a form that
	// the library does not read; they restrict nothing.
	leaf.UnhandledCriticalExtensions = slices.DeleteFunc(slices.Clone(leaf.UnhandledCriticalExtensions), subjectAltName.Equal)
	opts := x509.VerifyOptions{Roots: a.roots, Intermediates: x509.NewCertPool(), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	chains, err := leaf.Verify(opts)
	if bad := (x509.CertificateInvalidError{}); errors.As(err, &bad) && bad.Reason == x509.Expired {
		return fmt.Errorf("%w: %w", ErrTime, err)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrIssuer, err)
	}
	var errs []error
	for _, c := range chains {
		if err := a.unrevoked(c, now); err != nil {
			errs = append(errs, err)
			continue
		}
		return nil
	}
	return errors.Join(errs...)
}

// unrevoked looks a verified chain up in the CRLs, and fails where none says.
func (a *Anchors) unrevoked(chain []*x509.Certificate, now time.Time) error {
	if len(a.crls) == 0 {
		return nil
	}
	for i, c := range chain[:len(chain)-1] {
		issuer := chain[i+1]
		said := false
		for _, l := range a.crls {
			if !bytes.Equal(l.RawIssuer, issuer.RawSubject) || l.CheckSignatureFrom(issuer) != nil {
				continue
			}
			if slices.ContainsFunc(l.RevokedCertificateEntries, func(e x509.RevocationListEntry) bool { return e.SerialNumber.Cmp(c.SerialNumber) == 0 }) {
				return fmt.Errorf("%w: by %q, serial number %x", ErrRevoked, wire.Quotable(issuer.Subject.String()), c.SerialNumber)
			}
			// An outdated list still revokes; it just does not clear.
			said = said || !l.NextUpdate.IsZero() && now.Before(l.NextUpdate) && !now.Before(l.ThisUpdate)
		}
		if !said {
			return fmt.Errorf("%w: the rule holds no current CRL of %q", ErrUnknown, wire.Quotable(issuer.Subject.String()))
		}
	}
	return nil
}
