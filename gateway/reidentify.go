package gateway

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

const (
	// reidentifyTTL is the life of the join code that a node is given for its
	// new identity: it may have to restart first.
	reidentifyTTL = time.Hour
	// reidentifyWait is how long the caller waits for it to be used.
	reidentifyWait = 45 * time.Second
	// reidentifyAll bounds it with the time that it took to reach the node: an
	// API client waits for 60 s.
	reidentifyAll  = 55 * time.Second
	reidentifyLook = 200 * time.Millisecond
)

// reidentify gives the machine that answers as a node another UUID and another
// key (N-05). Without a name it keeps its own, and with it tags and history;
// the old identity is revoked, wherever else it lives. With a name it becomes a
// node beside the old one, which whoever else has it keeps. It returns the node
// that it became.
func (e *enrolment) reidentify(ctx context.Context, n *store.Node, in api.Reidentify) (*store.Node, error) {
	j, err := e.successor(ctx, n, in.Name)
	if err != nil {
		return nil, err
	}
	created, err := e.addJoin(ctx, j, reidentifyTTL, func(ctx context.Context, tx *store.Tx) error {
		tx.Audit(ctx, "node.reidentify", n.Name, fmt.Sprintf("%s becomes %s with join code %s", n.ID, j.Name, j.ID))
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reidentify %s: %w", n.Name, err)
	}
	env, err := e.id.Sign(wire.TypeReidentify, wire.Reidentify{Node: n.ID, Installation: e.store.Installation().UID, Boot: in.Boot, Join: created.Code, Issued: time.Now().UTC()})
	if err != nil {
		return nil, fmt.Errorf("reidentify %s: %w", n.Name, err)
	}
	began, told := time.Now(), false
	tell := func(ctx context.Context, call caller) error {
		// A session may be dead with nobody having noticed. What comes after an
		// answer has most likely arrived, what no answer came before has not.
		if err := call(ctx, http.MethodPost, wire.PathEcho, struct{}{}, nil, 0); err != nil {
			return err
		}
		told = true
		return call(ctx, http.MethodPost, wire.PathReidentify, env, nil, 0)
	}
	if in.Boot != "" && e.reach != nil {
		err = e.reach(ctx, n.ID, in.Boot, tell)
	} else {
		err = e.talk(ctx, wire.Party{Role: wire.RoleNode, ID: n.ID, TrustDomain: e.id.TrustDomain()}, tell)
	}
	var refused *statusError
	if errors.As(err, &refused) || !told { // it did not take the code
		if refused == nil && !errors.Is(err, ErrNotConnected) {
			err = fmt.Errorf("%w: %w", ErrNotConnected, err) // the gateway has not failed
		}
		err = errors.Join(err, e.store.Update(context.WithoutCancel(ctx), func(ctx context.Context, tx *store.Tx) error { return tx.RevokeJoin(ctx, j.ID) }))
		if refused != nil && refused.Status == http.StatusNotFound {
			err = fmt.Errorf("%w: the program there is too old for this: upgrade it, or delete its identity directory and give it a new join code", err)
		}
		return nil, fmt.Errorf("reidentify %s: %w", n.Name, err)
	}
	// Any other error: the session may have ended with the old identity, after
	// the node had taken the code.
	ctx, cancel := context.WithTimeout(ctx, min(reidentifyWait, reidentifyAll-time.Since(began)))
	defer cancel()
	return e.became(ctx, j, n, err)
}

// successor is the join code for what a node becomes.
func (e *enrolment) successor(ctx context.Context, n *store.Node, name string) (*store.Join, error) {
	j := &store.Join{Role: wire.RoleNode, Name: name, MaxUses: 1, AllowTags: n.AllowTags, Tags: map[string]string{}}
	rows, err := e.store.NodeTags(ctx, n.ID)
	if err != nil {
		return nil, err
	}
	sources := []string{store.TagJoin, store.TagGateway} // the stronger one last
	if name == "" || name == n.Name {
		j.Name, j.Replaces, sources = n.Name, true, sources[:1] // what the gateway set goes with the history
	} else {
		switch _, err := e.store.NodeByName(ctx, n.Tenant, name); {
		case err == nil:
			return nil, api.NewProblem(api.CodeNameInUse, fmt.Sprintf("a node %q is there already", wire.Quotable(name)))
		case !errors.Is(err, store.ErrNotFound):
			return nil, err
		}
	}
	for _, source := range sources {
		own := map[string]string{}
		for _, t := range rows {
			if t.Source == source && !t.Hidden {
				own[t.Key] = t.Value
			}
		}
		maps.Copy(j.Tags, own)
	}
	if p := checkJoin(j, e.id.TrustDomain()); p != nil {
		return nil, p
	}
	return j, nil
}

// became waits for a join code to be used, until ctx ends, and returns the node
// that did.
func (e *enrolment) became(ctx context.Context, j *store.Join, old *store.Node, asked error) (*store.Node, error) {
	tick := time.NewTicker(reidentifyLook)
	defer tick.Stop()
	for {
		n, err := e.store.NodeByName(ctx, old.Tenant, j.Name)
		if err == nil && n.JoinID == j.ID && n.ID != old.ID {
			return n, nil
		}
		if err != nil && !errors.Is(err, store.ErrNotFound) && ctx.Err() == nil {
			return nil, err
		}
		select {
		case <-ctx.Done():
			p := api.NewProblem(api.CodeTimeout, fmt.Sprintf("%s was told to enrol as %s and did not come back in time; its join code is good for %s: see `sallyport request list` and `sallyport node list`", old.Name, j.Name, wire.Duration(reidentifyTTL)))
			return nil, errors.Join(p, asked)
		case <-tick.C:
		}
	}
}
