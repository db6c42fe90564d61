package enroll

import (
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// request is what the gateway reads; mu is not held.
func (a *Applicant) request() (wire.EnrollRequest, error) {
	csr, err := a.id.CSR(false)
	if err != nil {
		return wire.EnrollRequest{}, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	r := wire.EnrollRequest{
		Role: a.id.Role(), ID: a.id.ID(), Name: a.cfg.Name, Tags: maps.Clone(a.cfg.Tags), CSR: csr,
		Program: a.cfg.Program, Versions: wire.OwnVersions, Time: time.Now().UTC(),
	}
	if _, enrolled := a.id.Party(); enrolled {
		r.Expired = a.id.Chain()
	}
	// A renewal needs no token; a new one is there in case the gateway
	// no longer wants to renew.
	if a.code != nil && (r.Expired == nil || a.codeID != a.memory.Used) {
		r.TokenID, r.Token = a.code.Code.TokenID, a.code.Code.Token
		if a.code.Code.Name != "" {
			r.Name = a.code.Code.Name // the gateway's word for us wins
		}
	}
	a.asked, a.shown = a.codeID, true
	return r, nil
}

// verdict does what the gateway decided.
func (a *Applicant) verdict(v wire.EnrollVerdict) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.status.State == StateEnrolled && v.State != wire.EnrollGranted {
		// The leaf that we have is good. What ends it is the signed set.
		a.cfg.Log.Warn("a gateway does not renew this certificate", "state", wire.Quotable(v.State), "code", wire.Quotable(v.Code), "reason", reasonOf(v))
		a.decide()
		return nil
	}
	if _, enrolled := a.id.Party(); !enrolled {
		a.refused = "" // of the upstreams one at least takes the key
	}
	switch v.State {
	case wire.EnrollGranted:
		return a.grant(v)
	case wire.EnrollPending:
		delete(a.denied, a.codeID)
		s := Status{State: StateWaiting, Code: v.Code, Reason: reasonOf(v)}
		if _, enrolled := a.id.Party(); enrolled {
			s.State = StateExpired
		}
		a.set(s)
		return nil
	case wire.EnrollDenied:
		if a.asked != a.codeID {
			return nil // that was the code before this one
		}
		if v.Code == wire.EnrollRevoked {
			a.revoked(v)
			return nil
		}
		now := time.Now()
		a.denied[a.codeID] = now
		a.set(Status{State: StateDenied, Code: v.Code, Reason: reasonOf(v), Retry: now.Add(retryAfter).UTC()})
		a.cfg.Log.Warn("enrolment is refused", "code", v.Code, "reason", reasonOf(v), "retry_in", retryAfter)
		a.decide()
		return nil
	}
	return fmt.Errorf("%w: %q", errVerdict, wire.Quotable(v.State))
}

// revoked takes the news that the key is no longer good: with the signed set,
// or, for a party that holds no root yet to check it by, on the word of the
// gateway that it is talking to. mu is held.
func (a *Applicant) revoked(v wire.EnrollVerdict) {
	if v.Revocations != nil {
		if _, err := a.id.ApplyRevocations(*v.Revocations); err != nil && !errors.Is(err, identity.ErrOlder) && !errors.Is(err, identity.ErrNotPinned) {
			a.cfg.Log.Warn("the revocation set of the refusal is not used", "error", err)
		}
	}
	now := time.Now()
	a.gone, a.denied[a.codeID] = true, now // a minute's rest, also for the next key
	a.set(Status{State: StateDenied, Code: v.Code, Reason: reasonOf(v), Retry: now.Add(retryAfter).UTC()})
	a.settle()
	a.decide()
}

func (a *Applicant) grant(v wire.EnrollVerdict) error {
	if a.cfg.OnGrant != nil {
		if err := a.cfg.OnGrant(v); err != nil {
			return fmt.Errorf("keep the grant: %w", err)
		}
	}
	m := a.memory
	if a.code != nil {
		m.Used = a.codeID
	}
	if err := a.remember(m); err != nil {
		return err
	}
	if err := a.id.Install(v.Chain); err != nil {
		return err
	}
	if v.Trust != nil { // before the revocations: a root that is new to us may have signed them
		if _, err := a.id.ApplyTrust(*v.Trust); err != nil && !errors.Is(err, identity.ErrOlder) {
			a.cfg.Log.Warn("the trust document of the grant is not used", "error", err)
		}
	}
	if v.Revocations != nil {
		if _, err := a.id.ApplyRevocations(*v.Revocations); err != nil && !errors.Is(err, identity.ErrOlder) {
			a.cfg.Log.Warn("the revocation set of the grant is not used", "error", err)
		}
	}
	a.gone, a.refused = false, ""
	clear(a.denied)
	a.status.State = "" // an expired leaf's status does not outlive it
	a.settle()
	a.cfg.Log.Info("enrolled", "id", a.id.ID(), "name", wire.Quotable(v.Name), "trust_domain", a.id.TrustDomain(), "not_after", a.id.NotAfter())
	close(a.granted)
	a.granted = make(chan struct{})
	a.decide()
	return nil
}

// maxReason bounds the gateway's reason, in bytes.
const maxReason = 512

// reasonOf is why a gateway decided so: it says what to do, so that little of
// it may be cut off.
func reasonOf(v wire.EnrollVerdict) string {
	if len(v.Reason) > maxReason {
		return strings.ToValidUTF8(v.Reason[:maxReason], "") + "…"
	}
	return v.Reason
}

var errVerdict = errors.New("unknown verdict")
