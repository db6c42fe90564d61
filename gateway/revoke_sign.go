package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"sallyport/gateway/store"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// maxSigning is how often a set is made anew because another gateway had one
// signed in the meantime.
const maxSigning = 10

// signWithOthers is sign where an authority works for other gateways too: what
// they have revoked stays revoked in our set.
func (e *enrolment) signWithOthers(ctx context.Context) (env *wire.Envelope, news []wire.Party, err error) {
	for range maxSigning {
		if err := e.mergeOthers(ctx); err != nil {
			return nil, nil, err
		}
		if env, news, err = e.sign(ctx); !errors.Is(err, identity.ErrOlder) {
			break
		}
	}
	e.unsigned.note(ctx, err)
	return env, news, err
}

// revocationTrouble is why the authority did not sign a revocation set that has to
// be, and since when.
type revocationTrouble struct {
	mu    sync.Mutex
	why   string // empty: it did
	since time.Time
}

func (t *revocationTrouble) note(ctx context.Context, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case err == nil:
		t.why = ""
	case ctx.Err() != nil || !errors.Is(err, errAuthority): // whoever asked went away, or it is no fault of the authority
	default:
		if t.why == "" {
			t.since = time.Now()
		}
		t.why = err.Error()
	}
}

// concern is one while RCPs and nodes trust somebody who is revoked
// here, because the set that tells them is not signed.
func (t *revocationTrouble) concern(now time.Time, patience time.Duration) concern {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := concern{keyCA + "revocations", wire.SeverityNormal, "every revocation is signed", ""}
	if t.why != "" && now.Sub(t.since) >= patience {
		c.severity = wire.SeverityMajor
		c.text = fmt.Sprintf("the set of revocations could not be signed since %s: RCPs and nodes may still trust who is revoked (%s)", t.since.UTC().Format(time.RFC3339), t.why)
		c.fix = "see what is wrong where the certificate authority runs, above all whether its disk has room; it is asked again each minute"
	}
	return c
}

// mergeOthers merges the last set that the authority signed, if it is none of
// ours.
func (e *enrolment) mergeOthers(ctx context.Context) error {
	env, ok := e.ca.Revocations()
	if _, own := e.id.Revocations(); !ok || own != nil && bytes.Equal(own.Payload, env.Payload) {
		return nil
	}
	if err := e.id.CheckRevocations(env); err != nil { // what nobody takes is replaced by ours
		e.log.Warn("the last revocation set of the certificate authority is not taken over", "number", numberOf(env), "error", err)
		return nil
	}
	news, err := e.merge(ctx, env)
	if err != nil {
		return err
	}
	for _, r := range news {
		if r.Role == wire.RoleNode || r.Role == wire.RoleRCP {
			e.changed(ctx, r.Role, r.ID)
		}
	}
	return nil
}

// sign makes the next set; nil if the last one says it all. news are those whose
// keys are new in it.
func (e *enrolment) sign(ctx context.Context) (*wire.Envelope, []wire.Party, error) {
	e.signing.Lock()
	defer e.signing.Unlock()
	keys, err := e.store.RevokedKeys(ctx)
	if err != nil {
		return nil, nil, err
	}
	keys = append(keys, e.retiredKeys()...)
	held, last, err := e.heldSet()
	if err != nil {
		return nil, nil, err
	}
	if last != nil && e.lacks(keys, held, *last) {
		return nil, nil, fmt.Errorf("%w: %w: another gateway had number %d signed meanwhile", errAuthority, identity.ErrOlder, held.Number)
	}
	known := make(map[wire.KeyHash]bool, len(held.Revoked))
	for _, r := range held.Revoked {
		known[r.Key] = true
	}
	set := wire.Revocations{}
	var news []wire.Party
	for _, k := range keys {
		if !known[k.KeyHash] {
			news = append(news, wire.Party{Role: k.Role, ID: k.PartyID, TrustDomain: e.id.TrustDomain()})
		} else if time.Since(k.NotAfter) > max(e.grace, minRevoked) {
			continue // nobody would take it any more
		}
		set.Revoked = append(set.Revoked, wire.Revocation{Key: k.KeyHash, Role: k.Role, ID: k.PartyID, At: k.RevokedAt, Reason: k.Reason})
	}
	// A set that came from elsewhere, and is above ours or as high, may lack what
	// ours names.
	mine, _ := e.id.Revocations()
	if len(news) == 0 && mine <= held.Number && (e.above == 0 || e.above < held.Number) && !e.authorityBehind() {
		return nil, nil, nil
	}
	if problem := e.issuerProblem(); problem != "" { // what it seals nobody takes either
		return nil, nil, fmt.Errorf("%w: %s", errAuthority, problem)
	}
	err = e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) (err error) {
		set.Number, err = tx.NextRevocations(ctx, max(held.Number, mine))
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	env, err := e.ca.SignRevocations(ctx, set, held.Number)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", errAuthority, err)
	}
	e.auditSigned(context.WithoutCancel(ctx), set) // whoever asked may go away
	return &env, news, nil
}

// auditSigned notes a set that was signed: until the authority does, it is asked
// each minute.
func (e *enrolment) auditSigned(ctx context.Context, set wire.Revocations) {
	err := e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		tx.Audit(ctx, "revocations.sign", "", fmt.Sprintf("number %d, %d keys", set.Number, len(set.Revoked)))
		return nil
	})
	if err != nil { // it is in force all the same
		e.log.Error("audit log not written", "what", "revocations.sign", "error", err)
	}
}

// authorityBehind tells whether an authority in another process has lost the last
// set, which it learns again with the next.
func (e *enrolment) authorityBehind() bool {
	ca, ok := e.ca.(interface{ Behind() bool })
	return ok && ca.Behind()
}

// errAuthority says that it is the certificate authority that did not sign.
var errAuthority = errors.New("certificate authority")

// lacks tells whether the authority's last set came from elsewhere, and names a
// key that keys do not: it is to be merged first.
func (e *enrolment) lacks(keys []*store.Key, held wire.Revocations, env wire.Envelope) bool {
	if _, own := e.id.Revocations(); own != nil && bytes.Equal(own.Payload, env.Payload) || e.id.CheckRevocations(env) != nil {
		return false
	}
	have := make(map[wire.KeyHash]bool, len(keys))
	for _, k := range keys {
		have[k.KeyHash] = true
	}
	return slices.ContainsFunc(held.Revoked, func(r wire.Revocation) bool { return !have[r.Key] })
}

// heldSet is the last set that the authority signed; nil before the first.
func (e *enrolment) heldSet() (set wire.Revocations, env *wire.Envelope, err error) {
	last, ok := e.ca.Revocations()
	if !ok {
		return set, nil, nil
	}
	return set, &last, json.Unmarshal(last.Payload, &set)
}

func numberOf(env wire.Envelope) int64 {
	var set struct {
		Number int64 `json:"number"`
	}
	if err := json.Unmarshal(env.Payload, &set); err != nil {
		return 0
	}
	return set.Number
}
