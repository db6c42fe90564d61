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
	"sync"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

const (
	// farewell is how long a party that is revoked may take to be told so:
	// one that knows it can ask its operator for a new code.
	// Nobody else waits longer for its sake.
	farewell = 500 * time.Millisecond
	// spreadTime bounds the delivery of a revocation set to one RCP; one that
	// is slower gets it with the next visit.
	spreadTime = 5 * time.Second
)

// caller sends one request in a session, as conversation.call does.
type caller func(ctx context.Context, method, path string, in, out any, limit int64) error

// revokeNode ends the trust in a node's keys. A removed node also leaves the
// list; either may enrol again, with a new key.
func (e *enrolment) revokeNode(ctx context.Context, n *store.Node, remove bool) (number int64, err error) {
	party := wire.Party{Role: wire.RoleNode, ID: n.ID, TrustDomain: e.id.TrustDomain()}
	err = e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		if err := revokeKeys(ctx, tx, party, n.Name, n.Tenant, n.KeyHash, n.NotAfter); err != nil {
			return err
		}
		if remove {
			tx.Audit(ctx, "node.remove", n.Name, string(n.ID))
			return tx.RemoveNode(ctx, n.ID)
		}
		tx.Audit(ctx, "node.revoke", n.Name, string(n.ID))
		_, err := tx.SetNodeState(ctx, n.ID, wire.StateRevoked, "revoked by "+store.ActorFrom(ctx).Who)
		return err
	})
	if err != nil {
		return 0, err
	}
	return e.revocation(ctx, party, n.Name)
}

// revokeUnknown ends the trust in the key of a node that has no row.
func (e *enrolment) revokeUnknown(ctx context.Context, party wire.Party, name string, peer identity.Peer) (number int64, err error) {
	err = e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		tx.Audit(ctx, "node.revoke", name, string(party.ID)+", which this database does not know")
		return revokeKeys(ctx, tx, party, name, "", peer.Key, peer.Leaf.NotAfter)
	})
	if err != nil {
		return 0, err
	}
	return e.revocation(ctx, party, name)
}

// removeRCP ends the trust in an RCP's keys and takes it off the list.
func (e *enrolment) removeRCP(ctx context.Context, r *store.RCP) (number int64, err error) {
	party := wire.Party{Role: wire.RoleRCP, ID: r.PartyID, TrustDomain: e.id.TrustDomain()}
	err = e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		if r.PartyID != "" {
			if err := revokeKeys(ctx, tx, party, r.Name, "", r.KeyHash, r.NotAfter); err != nil {
				return err
			}
		}
		tx.Audit(ctx, "rcp.remove", r.Name, string(r.PartyID))
		return tx.RemoveRCP(ctx, r.Name)
	})
	if err != nil {
		return 0, err
	}
	if r.PartyID == "" { // it never had a key
		e.changed(ctx, party.Role, party.ID)
		return 0, nil
	}
	return e.revocation(ctx, party, r.Name)
}

// revokeKeys marks every key of a party, also one that was certified before
// this database was restored.
func revokeKeys(ctx context.Context, tx *store.Tx, party wire.Party, name, tenant string, current wire.KeyHash, notAfter time.Time) error {
	if current != "" {
		if _, err := tx.Key(ctx, current); errors.Is(err, store.ErrNotFound) {
			k := &store.Key{KeyHash: current, Role: party.Role, PartyID: party.ID, Name: name, Tenant: tenant, IssuedAt: tx.Now(), NotAfter: notAfter}
			if err := tx.PutKey(ctx, k); err != nil {
				return err
			}
		} else if err != nil {
			return err
		}
	}
	_, err := tx.RevokeKeys(ctx, party.ID, "by "+store.ActorFrom(ctx).Who)
	return err
}

func (e *enrolment) revocation(ctx context.Context, party wire.Party, name string) (number int64, err error) {
	err = e.publish(ctx, []wire.Party{party})
	e.changed(ctx, party.Role, party.ID)
	number, _ = e.id.Revocations()
	if errors.Is(err, errAuthority) { // run tries again; whoever asked must know that the rest is done
		e.log.Error("a revocation is not signed yet; it is tried again in a minute", "party", party.String(), "error", err)
		return number, api.NewProblem(api.CodeUnavailable, name+" is revoked here, but the signed set that tells others is not out yet: the certificate authority is away, or failed (the gateway's log says why); it is tried again each minute")
	}
	if errors.Is(err, identity.ErrUnwritten) {
		e.log.Error("a revocation set is spread, and this gateway cannot write it; it is tried again in a minute", "party", party.String(), "error", err)
		return number, api.NewProblem(api.CodeUnavailable, name+" is revoked, here and at the RCPs that are connected, but the gateway could not write the signed set to its disk (its log says why); it is tried again each minute")
	}
	if err != nil {
		return number, fmt.Errorf("%s is revoked here, but the signed set that tells others is not out yet: %w", name, err)
	}
	return number, nil
}

// publish signs the set of all revoked keys, if it holds one that was not in
// the last, tells the parties that are ended, and spreads it.
func (e *enrolment) publish(ctx context.Context, ended []wire.Party) error {
	env, roles, err := e.signWithOthers(ctx)
	if err != nil {
		return fmt.Errorf("publish revocations: %w", err)
	}
	if env == nil { // perhaps the last one was signed, and could not be taken over
		held, ok := e.ca.Revocations()
		if mine, _ := e.id.Revocations(); !ok || numberOf(held) <= mine {
			return nil
		}
		env = &held
	}
	ctx = context.WithoutCancel(ctx) // whoever asked may go away: what was signed is spread
	e.bid(ctx, ended, *env)
	_, err = e.id.ApplyRevocations(*env)
	if errors.Is(err, identity.ErrOlder) { // who revoked at the same time came first, with a set that names these keys too
		_, env = e.id.Revocations()
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("publish revocations: %w", err)
	}
	if err != nil && !errors.Is(err, identity.ErrUnwritten) {
		return err
	}
	e.log.Info("revocation set signed", "number", numberOf(*env), "revoked", ended)
	for _, p := range ended { // before the others: an RCP that hangs must not keep the door here open
		e.changed(ctx, p.Role, p.ID)
	}
	e.spread(ctx, *env)
	if slices.Contains(roles, wire.RoleRCP) || slices.Contains(roles, wire.RoleGateway) || slices.Contains(roles, rolePKI) {
		e.push() // nodes trust no other roles; news of nodes reach them with the next visit
	}
	return err
}

// maxSigning is how often a set is made anew because another gateway had one
// signed in the meantime.
const maxSigning = 10

// signWithOthers is sign where an authority works for other gateways too: what
// they have revoked stays revoked in our set.
func (e *enrolment) signWithOthers(ctx context.Context) (env *wire.Envelope, roles []wire.Role, err error) {
	for range maxSigning {
		if err := e.mergeOthers(ctx); err != nil {
			return nil, nil, err
		}
		if env, roles, err = e.sign(ctx); !errors.Is(err, identity.ErrOlder) {
			break
		}
	}
	return env, roles, err
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

// sign makes the next set; nil if the last one says it all. roles are those of
// the keys that are new in it.
func (e *enrolment) sign(ctx context.Context) (*wire.Envelope, []wire.Role, error) {
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
	var roles []wire.Role
	for _, k := range keys {
		if !known[k.KeyHash] {
			roles = append(roles, k.Role)
		} else if time.Since(k.NotAfter) > max(e.grace, minRevoked) {
			continue // nobody would take it any more
		}
		set.Revoked = append(set.Revoked, wire.Revocation{Key: k.KeyHash, Role: k.Role, ID: k.PartyID, At: k.RevokedAt, Reason: k.Reason})
	}
	// A set that came from elsewhere, and is above ours or as high, may lack what
	// ours names.
	mine, _ := e.id.Revocations()
	if len(roles) == 0 && mine <= held.Number && (e.above == 0 || e.above < held.Number) {
		return nil, nil, nil
	}
	if problem := e.issuerProblem(); problem != "" { // what it seals nobody takes either
		return nil, nil, fmt.Errorf("%w: %s", errAuthority, problem)
	}
	err = e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) (err error) {
		set.Number, err = tx.NextRevocations(ctx, max(held.Number, mine))
		tx.Audit(ctx, "revocations.sign", "", fmt.Sprintf("number %d, %d keys", set.Number, len(set.Revoked)))
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	env, err := e.ca.SignRevocations(ctx, set, held.Number)
	if err != nil {
		err = fmt.Errorf("%w: %w", errAuthority, err)
	}
	return &env, roles, err
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

// bid tells parties that are there that it is over for them. They need not
// listen; the RCPs will not let them in.
func (e *enrolment) bid(ctx context.Context, ended []wire.Party, env wire.Envelope) {
	ctx, cancel := context.WithTimeout(ctx, farewell)
	defer cancel()
	var wg sync.WaitGroup
	for _, p := range ended {
		p.TrustDomain = e.id.TrustDomain()
		wg.Go(func() {
			if err := e.putRevocations(ctx, p, env); err != nil {
				e.log.Debug("a revoked party was not told", "party", p.String(), "error", err)
			}
		})
	}
	wg.Wait()
}

// spread brings a set to every RCP that can be reached, at once: they are the
// ones that keep revoked parties out. The others get it when they come.
func (e *enrolment) spread(ctx context.Context, env wire.Envelope) {
	rcps, err := e.store.RCPs(ctx)
	if err != nil {
		e.log.Error("revocation set not spread; RCPs get it with the next visit", "error", err)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, spreadTime)
	defer cancel()
	var wg sync.WaitGroup
	for _, r := range rcps {
		if r.PartyID == "" || r.State == api.RCPRevoked || !e.heardOut(r.PartyID) {
			continue
		}
		wg.Go(func() {
			p := wire.Party{Role: wire.RoleRCP, ID: r.PartyID, TrustDomain: e.id.TrustDomain()}
			switch err := e.putRevocations(ctx, p, env); {
			case errors.Is(err, ErrNotConnected): // it gets the set when it comes
			case err != nil:
				e.log.Warn("an RCP does not have the new revocation set yet", "rcp", r.Name, "error", err)
			}
		})
	}
	wg.Wait()
}

func (e *enrolment) putRevocations(ctx context.Context, p wire.Party, env wire.Envelope) error {
	return e.talk(ctx, p, func(ctx context.Context, call caller) error {
		return call(ctx, http.MethodPut, wire.PathRevocations, env, nil, 0)
	})
}

// deliverRevocations compares, after a verified hello, what a party holds with
// what we hold: it gets the newer set, or we take its.
func (e *enrolment) deliverRevocations(ctx context.Context, _ wire.ID, hello *wire.Hello) error {
	if err := e.hearOut(ctx, hello); err != nil {
		return err
	}
	number, env := e.id.Revocations()
	switch {
	case hello.Revocations < number:
		return e.putRevocations(ctx, hello.Party, *env)
	case hello.Revocations > number && hello.Party.Role == wire.RoleRCP: // what a node holds, it had from one
		return e.fetchRevocations(ctx, hello.Party)
	}
	return nil
}

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
			_, err := tx.SetNodeState(ctx, n.ID, wire.StateRevoked, reason)
			return err
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
		_, err := tx.SetNodeState(ctx, n.ID, wire.StateRevoked, "the key that replaced its own is revoked")
		return err
	}
	return tx.SetNodeCertificate(ctx, n.ID, key, n.NotAfter, tx.Now())
}

// start brings database, authority and our own identity to one set, before
// anybody is let in.
func (e *enrolment) start(ctx context.Context) error {
	if env, ok := e.ca.Revocations(); ok {
		if _, err := e.id.ApplyRevocations(env); err != nil && !errors.Is(err, identity.ErrOlder) {
			return fmt.Errorf("revocations of the certificate authority: %w", err)
		}
	}
	if _, env := e.id.Revocations(); env != nil {
		if _, err := e.merge(ctx, *env); err != nil {
			return fmt.Errorf("merge revocations: %w", err)
		}
	}
	e.warnOfIssuer()
	env, _, err := e.sign(ctx)
	if errors.Is(err, errAuthority) { // one in another process may be away: run tries again, and our own records hold meanwhile
		e.log.Error("revocation set not signed; it is tried again in a minute", "error", err)
		return nil
	}
	if err != nil || env == nil {
		return err
	}
	_, err = e.id.ApplyRevocations(*env)
	return err
}

// run repeats what could not be done at once, until ctx ends.
func (e *enrolment) run(ctx context.Context) error {
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		if err := errors.Join(e.expire(ctx), e.publish(ctx, nil)); err != nil && ctx.Err() == nil {
			e.log.Error("certificate upkeep failed; it is tried again in a minute", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
