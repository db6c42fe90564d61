package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// renewDue renews a party's leaf, after a verified hello, when two thirds of
// its life are over, or when its intermediate is given up. The clock is ours and so is the record of when it began:
// a party cannot ask for one leaf after the other. Nor does it have one made with
// each hello by refusing them: the hello after that minute is soon enough.
func (e *enrolment) renewDue(ctx context.Context, id wire.ID, hello *wire.Hello) error {
	due := hello.RenewAfter
	switch k, err := currentKey(ctx, e.store.Queries, hello.Party.Role, id); {
	case err == nil:
		due = k.IssuedAt.Add(k.NotAfter.Sub(k.IssuedAt) * 2 / 3)
	case !errors.Is(err, store.ErrNotFound):
		return err
	}
	if time.Now().Before(due) {
		if behind, err := e.behind(ctx, id); err != nil || !behind {
			return err
		}
	}
	if !e.mayRenew(id) {
		return nil
	}
	err := e.renew(ctx, hello.Party, false)
	if err == nil {
		e.mu.Lock()
		delete(e.renewals, id)
		e.mu.Unlock()
	}
	return err
}

// mayRenew counts a renewal that is due, and tells whether it is one too many.
func (e *enrolment) mayRenew(id wire.ID) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	a := e.renewals[id]
	if a == nil {
		if e.renewals == nil || len(e.renewals) >= maxAttempts {
			e.renewals = map[wire.ID]*attempt{}
		}
		a = new(attempt)
		e.renewals[id] = a
	}
	a.count(now)
	a.leaves++
	return a.leaves <= maxLeaves
}

// currentKey is what is known of the key in a party's leaf.
func currentKey(ctx context.Context, q store.Queries, role wire.Role, id wire.ID) (*store.Key, error) {
	if role != wire.RoleRCP {
		return q.NodeKey(ctx, id)
	}
	r, err := q.RCPByID(ctx, id)
	if err != nil {
		return nil, err
	}
	return q.Key(ctx, r.KeyHash)
}

// succeeds tells whether a key of a party takes the place of the one in its
// record: the party has its leaf, and the answer that would have told so was
// lost. One that was made before that, or is revoked, does not.
func succeeds(ctx context.Context, q store.Queries, party wire.Party, key wire.KeyHash) (bool, error) {
	k, err := q.Key(ctx, key)
	if err != nil {
		return false, err
	}
	if !k.RevokedAt.IsZero() { // another took its place meanwhile
		return false, identity.ErrRevoked
	}
	have, err := currentKey(ctx, q, party.Role, party.ID)
	if errors.Is(err, store.ErrNotFound) {
		return false, nil
	}
	return err == nil && have.KeyHash != key && k.IssuedAt.After(have.IssuedAt), err
}

// succeed notes a leaf that its party has, as record does, and revokes the keys
// whose place its key takes: after a rekey, or when it [succeeds] another.
// [enrolment.spreadEnded] follows.
func (c *issued) succeed(ctx context.Context, tx *store.Tx, party wire.Party, name, tenant string, rekey bool) (ended int64, err error) {
	next, err := succeeds(ctx, tx.Queries, party, c.key)
	if err != nil {
		return 0, err
	}
	if err := c.record(ctx, tx, party, name, tenant); err != nil || !rekey && !next {
		return 0, err
	}
	return tx.RevokeOtherKeys(ctx, party.ID, c.key, replacedBy+c.key.Fingerprint())
}

// lostAfter is when an answer that tells of a new key will not come any more.
const lostAfter = visitTime

// follow takes the key that a party has proven in a session for its key, when the
// answer that told of it was lost: people compare fingerprints, and the key before is
// promised to end.
func (e *enrolment) follow(ctx context.Context, peer identity.Peer) error {
	var ended int64
	err := e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		k, err := tx.Key(ctx, peer.Key)
		if errors.Is(err, store.ErrNotFound) || err == nil && (k.PartyID != peer.Party.ID || tx.Now().Sub(k.IssuedAt) < lostAfter) {
			return nil
		}
		next, nextErr := succeeds(ctx, tx.Queries, peer.Party, peer.Key)
		if err = errors.Join(err, nextErr); err != nil || !next {
			return err
		}
		name, tenant, err := e.nameOf(ctx, peer.Party)
		if err != nil {
			return err
		}
		tx.Audit(ctx, "certificate.renew", name, fmt.Sprintf("%s, %s; its answer was lost", peer.Party, peer.Key.Fingerprint()))
		c := issued{leaf: peer.Leaf, key: peer.Key, issuer: peer.Issuer}
		ended, err = c.succeed(ctx, tx, peer.Party, name, tenant, false)
		return err
	})
	if err != nil && !errors.Is(err, identity.ErrRevoked) { // then the session ends in a moment
		return fmt.Errorf("take over the key of %s: %w", peer, err)
	}
	e.tellEnded(ctx, peer.Party, ended)
	return nil
}

// tellEnded tells everybody of a party's keys that a newer one took the place of.
func (e *enrolment) tellEnded(ctx context.Context, party wire.Party, ended int64) {
	if err := e.spreadEnded(ctx, party, ended); err != nil { // it is repeated
		e.log.Error("keys that a newer one took the place of are not in the signed set yet", "party", party.String(), "error", err)
	}
}

// spreadEnded tells everybody of a party's keys that ended.
func (e *enrolment) spreadEnded(ctx context.Context, party wire.Party, ended int64) error {
	if ended == 0 {
		return nil
	}
	err := e.publish(ctx, nil) // it is repeated, if that fails
	e.changed(ctx, party.Role, party.ID)
	return err
}

// renew gives a connected party a new leaf in a session with it. Who it is
// says the session; of its request only the public key counts. The old leaf
// stays good until it ends, so that nothing is cut; with rekey the party makes a
// new key, and the old ones are revoked as soon as it has the leaf and is there
// by a channel with it, or a moment later: the RCPs cut what hangs on them.
func (e *enrolment) renew(ctx context.Context, party wire.Party, rekey bool) error {
	name, tenant, err := e.nameOf(ctx, party)
	if err != nil {
		return fmt.Errorf("renew certificate of %s: %w", party, err)
	}
	var ended int64 // keys that the new one takes the place of
	reached, returns := false, func(context.Context) {}
	if rekey && e.returns != nil {
		returns = e.returns(party.ID)
	}
	err = e.talk(ctx, party, func(ctx context.Context, call caller) error {
		var csr wire.CSR
		err := call(ctx, http.MethodPost, wire.PathCSR, wire.CSRRequest{Rekey: rekey}, &csr, wire.MaxEnrollBody)
		if refused := (*statusError)(nil); err == nil || errors.As(err, &refused) {
			reached = true
		}
		if err != nil {
			return err
		}
		_, key, err := identity.ParseCSR(csr.DER)
		if err != nil {
			return err
		}
		if e.id.Revoked(key) {
			return identity.ErrRevoked
		}
		if rekey {
			switch k, err := currentKey(ctx, e.store.Queries, party.Role, party.ID); {
			case err != nil && !errors.Is(err, store.ErrNotFound):
				return err
			case err == nil && k.KeyHash == key:
				return fmt.Errorf("%w: the party was asked for a new key and came with the one that it has", errKey)
			}
		}
		if err := e.keep(ctx, party, name, tenant, key); err != nil {
			return err
		}
		c, err := e.issue(ctx, wire.IssueRequest{Party: party, Name: name, Tenant: tenant, CSR: csr.DER})
		if err != nil {
			return err
		}
		if err := call(ctx, http.MethodPut, wire.PathCertificate, wire.Certificate{Chain: c.chain}, nil, 0); err != nil {
			return err
		}
		return e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) (err error) {
			tx.Audit(ctx, "certificate.renew", name, fmt.Sprintf("%s, %s", party, key.Fingerprint()))
			if ended, err = c.succeed(ctx, tx, party, name, tenant, rekey); err != nil {
				return err
			}
			// It also has the leaf that it was granted, if its answer to that was lost.
			return tx.MoveRequest(ctx, key, api.RequestDelivered, "")
		})
	})
	if err == nil {
		if ended > 0 { // the old key ends, whoever waits for the answer
			ctx = context.WithoutCancel(ctx)
			returns(ctx)
		}
		err = e.spreadEnded(ctx, party, ended)
	}
	if err != nil {
		if !reached && !errors.Is(err, ErrNotConnected) && !errors.Is(err, context.DeadlineExceeded) {
			err = fmt.Errorf("%w: %w", ErrNotConnected, err) // the gateway has not failed
		}
		return fmt.Errorf("renew certificate of %s (%s): %w", name, party, err)
	}
	e.log.Info("certificate renewed", "party", party.String(), "name", name)
	return nil
}

// maxKeys bounds the keys of one party that are good at a time. Parties renew
// with the key that they have, so that one or two are all there are.
const maxKeys = 8

// errKey says that a party may not be certified with a key.
var errKey = errors.New("the key cannot be certified")

// keep writes a key down before a leaf for it leaves our hands: a party that
// takes the leaf and says that it failed must not have a key that a revocation
// of the party does not name.
func (e *enrolment) keep(ctx context.Context, party wire.Party, name, tenant string, key wire.KeyHash) error {
	return e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		if err := notRevoked(ctx, tx.Queries, party); err != nil { // since it was asked
			return err
		}
		k, err := tx.Key(ctx, key)
		switch {
		case err == nil && !k.RevokedAt.IsZero():
			return identity.ErrRevoked
		case err == nil && (k.Role != party.Role || k.PartyID != party.ID):
			return fmt.Errorf("%w: %s belongs to %s %s", errKey, key.Fingerprint(), k.Role, k.PartyID)
		case err == nil:
			return nil
		case !errors.Is(err, store.ErrNotFound):
			return err
		}
		switch n, err := tx.CountKeys(ctx, party.ID); {
		case err != nil:
			return err
		case n >= maxKeys:
			return fmt.Errorf("%w: %s came with %d others before", errKey, key.Fingerprint(), n)
		}
		return tx.PutKey(ctx, &store.Key{KeyHash: key, Role: party.Role, PartyID: party.ID, Name: name, Tenant: tenant, IssuedAt: tx.Now(), NotAfter: tx.Now()})
	})
}

// notRevoked refuses a party whose record is gone or revoked.
func notRevoked(ctx context.Context, q store.Queries, party wire.Party) error {
	if party.Role == wire.RoleRCP {
		r, err := q.RCPByID(ctx, party.ID)
		if err == nil && r.State == api.RCPRevoked {
			err = identity.ErrRevoked
		}
		return err
	}
	n, err := q.Node(ctx, party.ID)
	if err == nil && n.State == wire.StateRevoked {
		err = identity.ErrRevoked
	}
	return err
}

func (e *enrolment) nameOf(ctx context.Context, party wire.Party) (name, tenant string, err error) {
	if party.Role == wire.RoleRCP {
		r, err := e.store.RCPByID(ctx, party.ID)
		if err != nil {
			return "", "", err
		}
		return r.Name, "", nil
	}
	n, err := e.store.Node(ctx, party.ID)
	if err != nil {
		return "", "", err
	}
	return n.Name, n.Tenant, nil
}

// renewNow renews the leaf of a node because an operator wants it.
func (e *enrolment) renewNow(ctx context.Context, id wire.ID, rekey bool) error {
	return e.renew(ctx, wire.Party{Role: wire.RoleNode, ID: id, TrustDomain: e.id.TrustDomain()}, rekey)
}
