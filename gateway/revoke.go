package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
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
	// lateFarewell is farewell where nobody has just asked for a revocation, and
	// maxLate how many parties are told at once that were revoked before.
	lateFarewell = 3 * time.Second
	maxLate      = 256
	// spreadTime bounds the delivery of a revocation set to one RCP; one that
	// is slower gets it with the next visit.
	spreadTime = 5 * time.Second
)

// caller sends one request in a session, as conversation.call does.
type caller func(ctx context.Context, method, path string, in, out any, limit int64) error

// talker has f speak with a party in a session.
type talker func(ctx context.Context, p wire.Party, f func(ctx context.Context, call caller) error) error

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
		return tx.SetNodeState(ctx, n.ID, wire.StateRevoked, "revoked by "+store.ActorFrom(ctx).Who)
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
		// Whoever holds a code of it must not be the one that is added by its name later.
		if err := tx.RevokeRCPJoins(ctx, r.Name); err != nil {
			return err
		}
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
		return number, api.NewProblem(api.CodeUnavailable, fmt.Sprintf("%s is revoked here, but the signed set that tells others is not out yet, and is tried again each minute: %v", name, err))
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
	env, news, err := e.signWithOthers(ctx)
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
	e.bid(ctx, ended, news, *env)
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
	if slices.ContainsFunc(news, func(p wire.Party) bool { return p.Role != wire.RoleNode }) {
		e.push() // nodes trust no other roles; news of nodes reach them with the next visit
	}
	return err
}

// bid tells parties that are there that it is over for them. They need not
// listen; the RCPs will not let them in. Of those whose keys are new in the set,
// some were revoked before, when it could not be signed: this gateway speaks with
// them no more, but for this.
func (e *enrolment) bid(ctx context.Context, ended, news []wire.Party, env wire.Envelope) {
	limit := farewell
	if len(ended) == 0 {
		limit = lateFarewell
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var wg sync.WaitGroup
	tell := func(p wire.Party, talk talker) {
		p.TrustDomain = e.id.TrustDomain()
		wg.Go(func() {
			if err := putRevocations(ctx, talk, p, env); err != nil {
				e.log.Debug("a revoked party was not told", "party", p.String(), "error", err)
			}
		})
	}
	told := map[wire.ID]bool{}
	for _, p := range ended {
		told[p.ID] = true
		tell(p, e.talk)
	}
	for _, p := range news {
		if e.lastWord != nil && p.Role == wire.RoleNode && !told[p.ID] && len(told) < maxLate {
			told[p.ID] = true
			tell(p, e.lastWord)
		}
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
			switch err := putRevocations(ctx, e.talk, p, env); {
			case errors.Is(err, ErrNotConnected): // it gets the set when it comes
			case err != nil:
				e.log.Warn("an RCP does not have the new revocation set yet", "rcp", r.Name, "error", err)
			}
		})
	}
	wg.Wait()
}

func putRevocations(ctx context.Context, talk talker, p wire.Party, env wire.Envelope) error {
	return talk(ctx, p, func(ctx context.Context, call caller) error {
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
		return putRevocations(ctx, e.talk, hello.Party, *env)
	case hello.Revocations > number && hello.Party.Role == wire.RoleRCP: // what a node holds, it had from one
		return e.fetchRevocations(ctx, hello.Party)
	}
	return nil
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
	e.unsigned.note(ctx, err)
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
