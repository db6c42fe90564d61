package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// hearOut merges what an RCP holds, when it is met for the first time since this
// installation was restored, whatever the number. Sets that were signed after
// the backup and sets that were signed since the restoration count on from the
// same number: ours may be the higher one, or become it, and would give back the
// keys that only the other one names.
func (e *enrolment) hearOut(ctx context.Context, hello *wire.Hello) error {
	if hello.Party.Role != wire.RoleRCP || e.heardOut(hello.Party.ID) {
		return nil
	}
	if hello.Revocations > 0 {
		if err := e.mergeHeld(ctx, hello.Party); err != nil {
			return err
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.heard == nil {
		e.heard = map[wire.ID]bool{}
	}
	e.heard[hello.Party.ID] = true
	return nil
}

// heardOut tells whether an RCP may be brought our set: nothing that only it
// knows is lost by that.
func (e *enrolment) heardOut(rcp wire.ID) bool {
	if e.store.Installation().Generation <= 1 { // never restored: there is one row of sets
		return true
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.heard[rcp]
}

// mergeHeld merges the set of an RCP.
func (e *enrolment) mergeHeld(ctx context.Context, p wire.Party) error {
	env, err := e.heldBy(ctx, p)
	if err != nil {
		return err
	}
	if err := e.id.CheckRevocations(env); err != nil { // what nobody takes is replaced by ours
		e.log.Warn("the revocation set that an RCP holds is not of this authority", "rcp", p.String(), "error", err)
		return nil
	}
	return e.takeOver(ctx, p, env)
}

// heldBy is the set that a party holds.
func (e *enrolment) heldBy(ctx context.Context, p wire.Party) (env wire.Envelope, err error) {
	err = e.talk(ctx, p, func(ctx context.Context, call caller) error {
		return call(ctx, http.MethodGet, wire.PathRevocations, nil, &env, wire.MaxRevocations)
	})
	if err != nil {
		return env, fmt.Errorf("fetch revocations of %s: %w", p, err)
	}
	return env, nil
}

// fetchRevocations takes over a set that is newer than all we know: the pki
// directory was restored from a backup.
func (e *enrolment) fetchRevocations(ctx context.Context, p wire.Party) error {
	env, err := e.heldBy(ctx, p)
	if err != nil {
		return err
	}
	if err := e.id.CheckRevocations(env); err != nil {
		return err
	}
	if mine, _ := e.id.Revocations(); numberOf(env) < mine {
		return fmt.Errorf("%w: %s says that its set is newer, and it has number %d, below %d", identity.ErrOlder, p, numberOf(env), mine)
	}
	return e.takeOver(ctx, p, env)
}

// takeOver merges a verified set while parties are there: into the database
// first, so that a failure leaves it to be fetched again.
func (e *enrolment) takeOver(ctx context.Context, p wire.Party, env wire.Envelope) error {
	news, err := e.merge(ctx, env)
	if err != nil {
		return err
	}
	number, own := e.id.Revocations()
	newer, err := e.id.ApplyRevocations(env)
	switch {
	case errors.Is(err, identity.ErrOlder):
	case errors.Is(err, identity.ErrUnwritten): // in force; it is fetched again until it is on disk
		e.log.Error("a revocation set is taken over, and this gateway cannot write it", "party", p.String(), "number", numberOf(env), "error", err)
	case err != nil:
		return err
	case newer:
		e.log.Warn("a party held a newer revocation set than this gateway: it is merged (were the database and the pki directory restored from a backup?)", "party", p.String(), "number", numberOf(env))
	case own != nil && !bytes.Equal(env.Payload, own.Payload):
		e.signing.Lock()
		e.above = max(e.above, number) // two sets of one number: the next one says which holds
		e.signing.Unlock()
	}
	ctx = context.WithoutCancel(ctx) // what was written down is made known
	for _, r := range news {
		if r.Role == wire.RoleNode || r.Role == wire.RoleRCP {
			e.changed(ctx, r.Role, r.ID)
		}
	}
	e.warnOfIssuer()
	return e.publish(ctx, nil)
}

// warnOfIssuer says so when what issues here is no good.
func (e *enrolment) warnOfIssuer() {
	if problem := e.issuerProblem(); problem != "" {
		e.log.Error("the certificate authority issues what nobody takes", "problem", problem)
	}
}

// issuerProblem says so when the intermediate that issues here was given up, and
// what to do.
func (e *enrolment) issuerProblem() string {
	problem, way := e.issuerFault()
	if problem == "" {
		return ""
	}
	return problem + " " + way
}

// issuerFault is [enrolment.issuerProblem] in its two halves: this authority was
// restored from a backup from before the end of a rollover.
func (e *enrolment) issuerFault() (problem, way string) {
	ca, ok := e.issuers()
	if !ok {
		return "", ""
	}
	state := ca.State()
	if !e.id.Revoked(state.Issuing().Key) {
		return "", ""
	}
	way = "restore a newer one; without one, and if the root is still the same, `sallyport ca rotate intermediate` brings everybody back"
	switch {
	case state.External != "":
		way = "have " + state.External + " issue by another intermediate"
	case state.Rollover != nil:
		way = "restore a newer one; without one, `sallyport ca abort` and then `sallyport ca finish` may bring everybody back"
	}
	return "the intermediate that issues here stands in the revocation set, and nobody takes what it certifies: was the pki directory restored from a backup from before `sallyport ca finish`?", way
}

// merge writes the keys of a verified set into the database, and returns those
// that were not known.
func (e *enrolment) merge(ctx context.Context, env wire.Envelope) ([]wire.Revocation, error) {
	var set wire.Revocations
	if err := json.Unmarshal(env.Payload, &set); err != nil {
		return nil, err
	}
	known := map[wire.KeyHash]bool{}
	keys, err := e.store.RevokedKeys(ctx)
	if err != nil {
		return nil, err
	}
	for _, k := range keys {
		known[k.KeyHash] = true
	}
	next := successors(set)
	set.Revoked = slices.DeleteFunc(set.Revoked, func(r wire.Revocation) bool {
		return known[r.Key] || r.Role == rolePKI && e.retired(r.Key) // which the authority itself knows
	})
	if len(set.Revoked) == 0 {
		return nil, nil
	}
	return set.Revoked, e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		tx.Audit(ctx, "revocations.merge", "", fmt.Sprintf("number %d, %d keys that were not known", set.Number, len(set.Revoked)))
		for _, r := range set.Revoked {
			k, err := tx.Key(ctx, r.Key)
			if errors.Is(err, store.ErrNotFound) {
				k, err = &store.Key{KeyHash: r.Key, Role: r.Role, PartyID: r.ID, IssuedAt: r.At, NotAfter: tx.Now()}, nil
			}
			if err != nil {
				return err
			}
			k.RevokedAt, k.Reason = r.At, r.Reason
			if err := tx.PutKey(ctx, k); err != nil {
				return err
			}
			if err := revokeRow(ctx, tx, r, next[r.Key]); err != nil {
				return err
			}
		}
		return nil
	})
}

// replacedBy begins the reason of a key that a party has replaced; what follows
// is the fingerprint of the new one, or the UUID of another party.
const replacedBy = "replaced by "

// successors are the keys that are good in place of revoked ones, by these: a
// party that made a new key after the backup was never revoked itself.
func successors(set wire.Revocations) map[wire.KeyHash]wire.KeyHash {
	revoked := make(map[wire.KeyHash]wire.Revocation, len(set.Revoked))
	for _, r := range set.Revoked {
		revoked[r.Key] = r
	}
	out := map[wire.KeyHash]wire.KeyHash{}
	for _, first := range set.Revoked {
		at := first
		for range set.Revoked { // no longer than that, were it a circle
			fingerprint, ok := strings.CutPrefix(at.Reason, replacedBy)
			key, err := wire.ParseFingerprint(fingerprint)
			if !ok || err != nil {
				break
			}
			after, ended := revoked[key]
			if !ended {
				out[first.Key] = key
				break
			}
			at = after
		}
	}
	return out
}

// revokeRow marks the party whose key in use is in a merged set; with a
// successor of the key it notes that instead.
func revokeRow(ctx context.Context, tx *store.Tx, r wire.Revocation, successor wire.KeyHash) error {
	const reason = "its key is in the signed revocation set"
	switch r.Role {
	case wire.RoleNode:
		if n, err := tx.Node(ctx, r.ID); err == nil && n.KeyHash == r.Key {
			if successor != "" {
				return succeed(ctx, tx, n, successor)
			}
			return tx.SetNodeState(ctx, n.ID, wire.StateRevoked, reason)
		} else if err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
	case wire.RoleRCP:
		if p, err := tx.RCPByID(ctx, r.ID); err == nil && p.KeyHash == r.Key {
			return tx.SetRCPState(ctx, p.Name, api.RCPRevoked, reason)
		} else if err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
	}
	return nil
}

// succeed gives a node the key that it has made since this database was backed
// up, so that it is revoked with the node. How long its leaf lasts is not known:
// it is renewed at the next visit.
func succeed(ctx context.Context, tx *store.Tx, n *store.Node, key wire.KeyHash) error {
	switch k, err := tx.Key(ctx, key); {
	case errors.Is(err, store.ErrNotFound):
		k = &store.Key{KeyHash: key, Role: wire.RoleNode, PartyID: n.ID, Name: n.Name, Tenant: n.Tenant, IssuedAt: tx.Now(), NotAfter: tx.Now()}
		if err := tx.PutKey(ctx, k); err != nil {
			return err
		}
	case err != nil:
		return err
	case !k.RevokedAt.IsZero() || k.PartyID != n.ID:
		return tx.SetNodeState(ctx, n.ID, wire.StateRevoked, "the key that replaced its own is revoked")
	}
	return tx.SetNodeCertificate(ctx, n.ID, key, n.NotAfter, tx.Now())
}
