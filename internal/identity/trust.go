package identity

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"sallyport/internal/wire"
)

// Trust is the newest trust document held: its number and the signed document
// to hand on. Number 0 and nil before the first, while the root of the join
// code is the only one.
func (i *Identity) Trust() (number int64, env *wire.Envelope) {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.trustNumber, i.trustEnv
}

// ApplyTrust takes a trust document sealed by a SPIFFE intermediate below a
// root that is trusted now, whoever brought it: its roots take the place of
// those held. It tells whether the document is newer than the one held, which
// is then on disk; the same again is no error, a lower number is ErrOlder.
func (i *Identity) ApplyTrust(env wire.Envelope) (bool, error) {
	i.write.Lock()
	defer i.write.Unlock()
	i.mu.RLock()
	doc, roots, err := VerifyTrust(env, i.roots, i.trustDomain(), time.Now())
	held, ever := i.trustNumber, i.everTrusted
	i.mu.RUnlock()
	if err == nil {
		err = i.sealerRevoked(env)
	}
	switch {
	case err != nil:
		return false, err
	case doc.Number < held:
		return false, fmt.Errorf("trust document: %w: number %d is below %d", ErrOlder, doc.Number, held)
	case doc.Number == held:
		return false, nil
	}
	// The roots go first: without the document they are more than is
	// trusted, and the next upstream brings it again.
	if all := union(ever, roots); len(all) > len(ever) {
		if err := i.store.Write(fileRoots, encodeCerts(all), 0o644); err != nil {
			return false, err
		}
		ever = all
	}
	b, err := json.Marshal(env)
	if err != nil {
		return false, err
	}
	if err := i.store.Write(fileTrust, b, 0o644); err != nil {
		return false, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.everTrusted = ever
	i.setTrust(doc, roots, env)
	i.notify()
	return true, nil
}

// loadTrust takes the document that was verified when it came.
func (i *Identity) loadTrust(b []byte) error {
	env, doc, roots, err := openTrust(b, i.trustDomain())
	if err != nil {
		return err
	}
	i.everTrusted = union(i.everTrusted, roots)
	i.setTrust(doc, roots, env)
	return nil
}

// CheckTrust says what is wrong with the file of a trust document.
func CheckTrust(b []byte, trustDomain string) error {
	_, _, _, err := openTrust(b, trustDomain)
	return err
}

// openTrust reads a document that was verified when it came. Its signer is below
// one of its own roots, which shows damage.
func openTrust(b []byte, trustDomain string) (env wire.Envelope, doc wire.Trust, roots []*x509.Certificate, err error) {
	if err := json.Unmarshal(b, &env); err != nil {
		return env, doc, nil, err
	}
	if err := json.Unmarshal(env.Payload, &doc); err != nil {
		return env, doc, nil, err
	}
	if roots, err = parseRoots(doc.Roots); err != nil {
		return env, doc, nil, err
	}
	doc, roots, err = VerifyTrust(env, roots, trustDomain, doc.Issued)
	return env, doc, roots, err
}

// setTrust changes memory only; mu is held or the identity is not shared yet.
func (i *Identity) setTrust(doc wire.Trust, roots []*x509.Certificate, env wire.Envelope) {
	i.trustNumber, i.trustEnv = doc.Number, &env
	i.setTrusted(roots)
	if i.pin.Root != "" && !slices.ContainsFunc(roots, func(r *x509.Certificate) bool { return wire.KeyOf(r) == i.pin.Root }) {
		i.pin.Root = wire.KeyOf(roots[0]) // the pinned root is dropped
	}
	i.setCertificate()
}

// VerifyTrust checks a trust document against roots that are trusted already,
// and returns its own.
func VerifyTrust(env wire.Envelope, trusted []*x509.Certificate, trustDomain string, at time.Time) (wire.Trust, []*x509.Certificate, error) {
	var doc wire.Trust
	certs, err := openEnvelope(env, wire.TypeTrust)
	if err != nil {
		return doc, nil, err
	}
	if err := checkSealer(certs, trusted, trustDomain, at); err != nil {
		return doc, nil, fmt.Errorf("trust document: %w", err)
	}
	if err := json.Unmarshal(env.Payload, &doc); err != nil {
		return doc, nil, fmt.Errorf("trust document: payload: %w", err)
	}
	if doc.TrustDomain != trustDomain {
		return doc, nil, fmt.Errorf("trust document: %w: it is for %q", ErrWrongTrustDomain, wire.Quotable(doc.TrustDomain))
	}
	if doc.Number < 1 {
		return doc, nil, fmt.Errorf("trust document: number %d, want 1 or more", doc.Number)
	}
	roots, err := parseRoots(doc.Roots)
	if err != nil {
		return doc, nil, fmt.Errorf("trust document: %w", err)
	}
	return doc, roots, nil
}

func parseRoots(list [][]byte) ([]*x509.Certificate, error) {
	if len(list) == 0 || len(list) > wire.MaxRoots {
		return nil, fmt.Errorf("it names %d roots, want 1 to %d", len(list), wire.MaxRoots)
	}
	roots, err := parseChain(list)
	if err != nil {
		return nil, err
	}
	for _, r := range roots {
		if err := CheckRootKey(r.PublicKey); err != nil {
			return nil, err
		}
		if !r.IsCA {
			return nil, errors.New("it names a root that is no CA certificate")
		}
		if err := r.CheckSignatureFrom(r); err != nil {
			return nil, fmt.Errorf("root: %w", err)
		}
	}
	return roots, nil
}

// checkSealer checks that a document's signer, the first of certs, is a SPIFFE
// intermediate below one of roots, or the leaf that one has for documents. The intermediate may have a certificate from
// each of several roots.
func checkSealer(certs, roots []*x509.Certificate, trustDomain string, at time.Time) error {
	if len(roots) == 0 {
		return ErrNotPinned
	}
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	for _, r := range roots {
		opts.Roots.AddCert(r)
	}
	if isDocumentLeaf(certs[0], trustDomain) {
		return checkDocumentLeaf(certs, trustDomain, opts)
	}
	var errs []error
	for _, c := range certs {
		if !bytes.Equal(c.RawSubjectPublicKeyInfo, certs[0].RawSubjectPublicKeyInfo) {
			continue
		}
		if !isSPIFFECA(c, trustDomain) {
			return fmt.Errorf("%w: not signed by a SPIFFE intermediate of %s", ErrUntrusted, trustDomain)
		}
		_, err := c.Verify(opts)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return fmt.Errorf("%w: %w", ErrUntrusted, errors.Join(errs...))
}

// sealerRevoked refuses what an intermediate signed that was given up, or a leaf
// for documents below it: its key may be in a stolen backup.
func (i *Identity) sealerRevoked(env wire.Envelope) error {
	certs, err := parseChain(env.Chain)
	if err != nil {
		return err
	}
	for _, c := range certs {
		if key := wire.KeyOf(c); i.Revoked(key) {
			return fmt.Errorf("signed document: signer: %w (%s)", ErrRevoked, key.Fingerprint())
		}
	}
	return nil
}

// Ended tells whether nothing that peer has open may go on: its key is revoked,
// or the key of the intermediate that vouched for it.
func (i *Identity) Ended(p Peer) bool {
	i.mu.RLock()
	defer i.mu.RUnlock()
	_, bad := i.revoked[p.Key]
	if !bad && p.Issuer != "" {
		_, bad = i.revoked[p.Issuer]
	}
	return bad
}

// union adds to a those of b that are not in it.
func union(a, b []*x509.Certificate) []*x509.Certificate {
	out := slices.Clip(a)
	for _, c := range b {
		if !slices.ContainsFunc(out, c.Equal) {
			out = append(out, c)
		}
	}
	return out
}
