package identity

import (
	"crypto/x509"
	"encoding/json"
	"fmt"
	"time"

	"sallyport/internal/wire"
)

// Revocations is the highest set held: its number and the signed document to
// hand on. Number 0 and nil before the first.
func (i *Identity) Revocations() (number int64, env *wire.Envelope) {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.revNumber, i.revEnv
}

// Revoked tells whether a key is in the set held.
func (i *Identity) Revoked(key wire.KeyHash) bool {
	i.mu.RLock()
	defer i.mu.RUnlock()
	_, bad := i.revoked[key]
	return bad
}

// ApplyRevocations takes a set signed by the trust domain's SPIFFE
// intermediate, whoever brought it. It tells whether the set is newer than the
// one held, which is then on disk; the same set again is no error, a lower
// number is ErrOlder. One that cannot be written, ErrUnwritten, is in force until
// the next start, and counts as not held: it is brought again.
func (i *Identity) ApplyRevocations(env wire.Envelope) (bool, error) {
	i.write.Lock()
	defer i.write.Unlock()
	set, err := i.checkRevocations(env)
	if err != nil {
		return false, err
	}
	i.mu.RLock()
	held, inForce := i.revNumber, i.revInForce
	i.mu.RUnlock()
	if set.Number < inForce {
		return false, fmt.Errorf("%w: number %d is below %d", ErrOlder, set.Number, inForce)
	}
	if set.Number == held {
		return false, nil
	}
	b, err := json.Marshal(env)
	if err != nil {
		return false, err
	}
	err = i.store.Write(fileRevocations, b, 0o644)
	i.mu.Lock()
	defer i.mu.Unlock()
	if err != nil {
		i.setRevoked(set)
		err = fmt.Errorf("%w: %w", ErrUnwritten, err)
	} else {
		i.setRevocations(set, env)
	}
	i.notify()
	return err == nil, err
}

// CheckRevocations verifies a set as [Identity.ApplyRevocations] does, whatever
// its number, and does not take it.
func (i *Identity) CheckRevocations(env wire.Envelope) error {
	_, err := i.checkRevocations(env)
	return err
}

// checkRevocations opens a set that is good now: its signer is one of ours, and
// was not given up.
func (i *Identity) checkRevocations(env wire.Envelope) (wire.Revocations, error) {
	i.mu.RLock()
	set, err := i.verifyRevocations(env, time.Now())
	i.mu.RUnlock()
	if err == nil {
		err = i.sealerRevoked(env)
	}
	return set, err
}

func (i *Identity) loadRevocations(b []byte) error {
	var env wire.Envelope
	if err := json.Unmarshal(b, &env); err != nil {
		return err
	}
	var at struct{ Issued time.Time }
	if err := json.Unmarshal(env.Payload, &at); err != nil {
		return err
	}
	// It was verified when it came; the intermediate may have expired since,
	// and its root may have been dropped.
	set, err := VerifyRevocations(env, i.everTrusted, i.trustDomain(), at.Issued)
	if err != nil {
		return err
	}
	i.setRevocations(set, env)
	return nil
}

func (i *Identity) setRevocations(set wire.Revocations, env wire.Envelope) {
	i.setRevoked(set)
	i.revNumber, i.revEnv = set.Number, &env
}

func (i *Identity) setRevoked(set wire.Revocations) {
	i.revoked = make(map[wire.KeyHash]struct{}, len(set.Revoked))
	for _, r := range set.Revoked {
		i.revoked[r.Key] = struct{}{}
	}
	i.revInForce = set.Number
}

// verifyRevocations checks the signature and that the signer is a SPIFFE
// intermediate below a trusted root; mu is held.
func (i *Identity) verifyRevocations(env wire.Envelope, at time.Time) (wire.Revocations, error) {
	return VerifyRevocations(env, i.roots, i.trustDomain(), at)
}

// VerifyRevocations checks a revocation set against the roots of a trust domain.
func VerifyRevocations(env wire.Envelope, roots []*x509.Certificate, trustDomain string, at time.Time) (wire.Revocations, error) {
	var set wire.Revocations
	certs, err := openEnvelope(env, wire.TypeRevocations)
	if err != nil {
		return set, err
	}
	if err := checkSealer(certs, roots, trustDomain, at); err != nil {
		return set, fmt.Errorf("revocations: %w", err)
	}
	if err := json.Unmarshal(env.Payload, &set); err != nil {
		return set, fmt.Errorf("revocations: payload: %w", err)
	}
	if set.TrustDomain != trustDomain {
		return set, fmt.Errorf("revocations: %w: the set is for %q", ErrWrongTrustDomain, wire.Quotable(set.TrustDomain))
	}
	if set.Number < 1 {
		return set, fmt.Errorf("revocations: number %d, want 1 or more", set.Number)
	}
	return set, nil
}
