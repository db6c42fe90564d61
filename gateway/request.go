package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

// write puts a decision into the database.
func (e *enrolment) write(ctx context.Context, tx *store.Tx, d *decision, key wire.KeyHash, req *wire.EnrollRequest, from origin) error {
	switch {
	case d.state == "" || d.state == wire.EnrollDenied:
		return e.noteDenial(ctx, tx, d)
	case d.known:
		return nil
	}
	if d.spot != nil {
		from.spot = *d.spot
	}
	q := d.prior
	if q == nil {
		if d.state == wire.EnrollPending {
			switch n, ofRCP, err := tx.CountWaiting(ctx, from.rcp); {
			case err != nil:
				return err
			case n >= maxWaiting || ofRCP >= maxWaitingPerRCP:
				d.reason = "too many requests wait for an operator; this one is not among them yet"
				return nil
			}
		}
		q = &store.Request{ID: string(wire.NewID())}
		d.fresh = true
	}
	q.Role, q.PartyID, q.KeyHash, q.Name, q.Tenant = d.party.Role, d.party.ID, key, clip(d.name), d.tenant
	q.RCP, q.Source, q.Tags, q.JoinID, q.CSR, q.Program = from.rcp, clip(from.address), requestTags(req.Tags, d.join), d.joinID(), req.CSR, clip(req.Program)
	q.DeviceKey, q.DeviceChain = from.device.key(), from.device.stored()
	q.State, q.Code, q.Reason, q.SeenAt = api.RequestPending, d.code, d.code, tx.Now()
	if d.state == wire.EnrollGranted {
		if err := e.grantIn(ctx, tx, d, q); err != nil {
			return err
		}
	}
	if d.fresh {
		return tx.AddRequest(ctx, q)
	}
	return tx.SaveRequest(ctx, q)
}

// noteDenial tells those who look at a request that its party came back with a
// code that is no good. The request waits on: were it over, whoever reaches an RCP
// could make one after the other. A bad code alone is not written down.
func (e *enrolment) noteDenial(ctx context.Context, tx *store.Tx, d *decision) error {
	if d.over != nil && tx.Now().Sub(d.over.SeenAt) >= noteEvery {
		return tx.SawRequest(ctx, d.over.ID)
	}
	q := d.prior
	if q == nil || d.state == "" {
		return nil
	}
	q.Code, q.Reason, q.SeenAt = d.code, d.reason, tx.Now()
	return tx.SaveRequest(ctx, q)
}

// noteEvery is how often it is written down that the party of a request that is
// over comes back: what an operator said of it is kept as long as it does.
const noteEvery = 24 * time.Hour

// maxTags bounds the tags of a request, and of a node without a row, that are
// kept to be looked at.
const maxTags = 64

func boundTags(tags map[string]string) map[string]string {
	out := make(map[string]string, min(len(tags), maxTags))
	for _, k := range slices.Sorted(maps.Keys(tags)) { // the same ones each time
		if v := tags[k]; len(out) < maxTags && store.ValidTag(k, v) == nil {
			out[k] = v
		}
	}
	return out
}

// requestTags are what operators select requests by: the tags of the join code,
// which the party cannot change, and those that it asks for and may have.
func requestTags(own map[string]string, j *store.Join) map[string]string {
	out := boundTags(own)
	if j == nil {
		return out
	}
	maps.DeleteFunc(out, func(k, v string) bool { return !store.AllowsTag(j.AllowTags, k, v) })
	maps.Copy(out, j.Tags)
	return out
}

// grantIn makes the party of a request: it consumes the token, ends the
// identities that give way, and writes the party's row. The leaf is issued
// when it can be delivered, which may be days later.
func (e *enrolment) grantIn(ctx context.Context, tx *store.Tx, d *decision, q *store.Request) error {
	q.State, q.Code, q.Reason, q.DecidedAt, q.DecidedBy = api.RequestGranted, "", "", tx.Now(), store.ActorFrom(ctx).Who
	if d.join != nil {
		// The operator's word counts more than a code that others have used
		// up while the request waited.
		if err := tx.UseJoin(ctx, d.join.ID, q.KeyHash, q.PartyID); err != nil && !errors.Is(err, store.ErrExists) {
			return err
		}
	}
	for _, v := range d.victims {
		if err := e.giveWay(ctx, tx, v, d); err != nil {
			return err
		}
	}
	var err error
	if q.Role == wire.RoleRCP {
		err = e.makeRCP(ctx, tx, d, q)
	} else {
		err = e.makeNode(ctx, tx, d, q)
	}
	if err != nil {
		return err
	}
	detail := fmt.Sprintf("%s, %s", d.party, q.KeyHash.Fingerprint())
	if d.rules.rule != nil {
		q.Rule = d.ruleName()
		detail += ", rule " + q.Rule
		if q.DeviceKey != "" {
			detail += ", device " + q.DeviceKey.Fingerprint()
		}
		if err := tx.CountRule(ctx, q.Tenant, q.Rule); err != nil {
			return err
		}
	}
	if d.join != nil {
		detail += ", join code " + d.join.ID
	}
	for _, k := range slices.Sorted(maps.Keys(d.tags)) {
		detail += fmt.Sprintf(", tag %s=%s", k, d.tags[k])
	}
	tx.Audit(ctx, "request.grant", q.Name, detail)
	return tx.PutKey(ctx, &store.Key{KeyHash: q.KeyHash, Role: q.Role, PartyID: q.PartyID, Name: q.Name, Tenant: q.Tenant, IssuedAt: tx.Now(), NotAfter: tx.Now()})
}

// giveWay ends an identity for the sake of another.
func (e *enrolment) giveWay(ctx context.Context, tx *store.Tx, v victim, d *decision) error {
	if _, err := tx.RevokeKeys(ctx, v.id, replacedBy+string(d.party.ID)); err != nil {
		return err
	}
	tx.Audit(ctx, string(v.role)+".replace", v.name, fmt.Sprintf("%s by %s", v.id, d.party.ID))
	if v.role == wire.RoleRCP || v.id == d.party.ID {
		return nil // the record stays and gets another key
	}
	return tx.RemoveNode(ctx, v.id)
}

func (e *enrolment) makeNode(ctx context.Context, tx *store.Tx, d *decision, q *store.Request) error {
	n := &store.Node{ID: q.PartyID, Tenant: q.Tenant, Name: q.Name, State: wire.StatePending, StateReason: "granted; it has not connected yet", KeyHash: q.KeyHash, Program: q.Program}
	var tags map[string]string
	if d.join != nil {
		n.JoinID, n.AllowTags, tags = d.join.ID, d.join.AllowTags, d.join.Tags
	} else {
		var err error
		if tags, err = e.stays(ctx, tx, n); err != nil {
			return err
		}
	}
	if r := d.rules.rule; r != nil {
		n.AllowTags = slices.Concat(n.AllowTags, slices.DeleteFunc(slices.Clone(r.Allow), func(g string) bool { return slices.Contains(n.AllowTags, g) }))
		tags = maps.Clone(tags)
		if tags == nil {
			tags = map[string]string{}
		}
		maps.Copy(tags, r.Set)
	}
	if err := tx.AddNode(ctx, n); err != nil {
		return err
	}
	if err := tx.SetJoinTags(ctx, n.ID, tags); err != nil {
		return err
	}
	for _, v := range d.victims {
		if v.keep && v.id != n.ID {
			if err := errors.Join(tx.CopyGatewayTags(ctx, v.id, n.ID), tx.MoveHistory(ctx, v.id, n.ID)); err != nil {
				return err
			}
		}
	}
	return tx.TagNode(ctx, n.ID, d.tags, nil)
}

// stays gives a node that comes back with its own key and without a code, since its
// certificate ended too long ago, what the code before gave it; nil: it is new.
func (e *enrolment) stays(ctx context.Context, tx *store.Tx, n *store.Node) (tags map[string]string, err error) {
	old, err := tx.Node(ctx, n.ID)
	if errors.Is(err, store.ErrNotFound) || err == nil && old.KeyHash != n.KeyHash {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	rows, err := tx.NodeTags(ctx, n.ID)
	if err != nil {
		return nil, err
	}
	tags = map[string]string{}
	for _, t := range rows {
		if t.Source == store.TagJoin {
			tags[t.Key] = t.Value
		}
	}
	n.JoinID, n.AllowTags = old.JoinID, old.AllowTags
	return tags, nil
}

func (e *enrolment) makeRCP(ctx context.Context, tx *store.Tx, d *decision, q *store.Request) error {
	r, err := tx.RCP(ctx, q.Name)
	if err != nil {
		return fmt.Errorf("rcp %s: %w", q.Name, err)
	}
	r.PartyID, r.KeyHash, r.Program = q.PartyID, q.KeyHash, q.Program
	// It stays pending until it has its certificate: so long it is dialled
	// with the enrolment protocol.
	r.State, r.StateReason, r.StateSince = api.RCPPending, "granted; its certificate is not delivered yet", tx.Now()
	return tx.SaveRCP(ctx, r)
}

// find resolves what an operator calls a request. A name that two requests, or
// a request and a live party, have needs the fingerprint as well.
func (e *enrolment) find(ctx context.Context, q store.Queries, ref, fingerprint string) (*store.Request, error) {
	found, err := q.FindRequests(ctx, ref)
	if err != nil {
		return nil, err
	}
	if fingerprint != "" {
		var fit []*store.Request
		var have []string
		for _, r := range found {
			have = append(have, r.KeyHash.Fingerprint())
			if r.KeyHash.Fingerprint() == fingerprint {
				fit = append(fit, r)
			}
		}
		if len(found) > 0 && len(fit) == 0 {
			return nil, api.NewProblem(api.CodeConflict, fmt.Sprintf("request %s has the fingerprint %s, not %s", ref, strings.Join(have[:min(len(have), 10)], " or "), wire.Quotable(fingerprint)))
		}
		found = fit
	}
	switch {
	case len(found) == 0:
		return nil, noRequest(ctx, q, ref)
	case len(found) > 1:
		return nil, api.NewProblem(api.CodeAmbiguous, fmt.Sprintf("%d requests fit %q: name one by its ID, or by --fingerprint", len(found), wire.Quotable(ref)))
	case fingerprint == "" && found[0].ID != ref && found[0].Name == ref:
		return found[0], e.nameIsFree(ctx, q, found[0])
	}
	return found[0], nil
}

func (e *enrolment) nameIsFree(ctx context.Context, q store.Queries, r *store.Request) error {
	if r.Role != wire.RoleNode {
		return nil
	}
	n, err := q.NodeByName(ctx, r.Tenant, r.Name)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return nil
	case err != nil:
		return err
	case n.State == wire.StateRevoked:
		return nil
	}
	return api.NewProblem(api.CodeAmbiguous, fmt.Sprintf("%q is the name of a request and of a live node: name the request by its ID, or by --fingerprint %s", r.Name, r.KeyHash.Fingerprint()))
}

// grant is an operator's yes, for the request with an ID, or the one with a name.
// The party gets its certificate at once if it is there, else when it comes.
func (e *enrolment) grant(ctx context.Context, ref string, in api.Grant) (*store.Request, error) {
	var q *store.Request
	var d *decision
	if p := checkTags(in.Tags); p != nil {
		return nil, p
	}
	err := e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) (err error) {
		q, d, err = e.grantOne(ctx, tx, ref, in)
		return err
	})
	if err != nil {
		return nil, e.lastOfName(ctx, ref, err)
	}
	e.settle(ctx, []wire.Party{d.party}, d.victims)
	e.again(q.KeyHash)
	return q, nil
}

// checkTags says what is wrong with tags that an operator gives.
func checkTags(tags map[string]string) *api.Problem {
	if len(tags) > maxTags {
		return api.NewProblem(api.CodeInvalid, fmt.Sprintf("%d tags with a grant: want at most %d", len(tags), maxTags))
	}
	for _, k := range slices.Sorted(maps.Keys(tags)) {
		if err := store.ValidTag(k, tags[k]); err != nil {
			return api.NewProblem(api.CodeInvalid, err.Error())
		}
	}
	return nil
}

// grantOne writes nothing when it returns a *api.Problem.
func (e *enrolment) grantOne(ctx context.Context, tx *store.Tx, ref string, in api.Grant) (*store.Request, *decision, error) {
	q, err := e.find(ctx, tx.Queries, ref, in.Fingerprint)
	if err != nil {
		return nil, nil, err
	}
	d, err := e.judge(ctx, tx.Queries, q, in.Replace)
	if err != nil {
		return nil, nil, err
	}
	if len(in.Tags) > 0 && q.Role != wire.RoleNode {
		return nil, nil, api.NewProblem(api.CodeInvalid, fmt.Sprintf("request %s is of an RCP, which has no tags", q.ID))
	}
	d.tags = in.Tags
	if err := e.grantIn(ctx, tx, d, q); err != nil {
		return nil, nil, err
	}
	return q, d, tx.SaveRequest(ctx, q)
}

// judge looks again at what a waiting request claims: the world moved on.
func (e *enrolment) judge(ctx context.Context, q store.Queries, r *store.Request, replace bool) (*decision, error) {
	d := &decision{party: wire.Party{Role: r.Role, ID: r.PartyID, TrustDomain: e.id.TrustDomain()}, name: r.Name, tenant: r.Tenant}
	if k, err := q.Key(ctx, r.KeyHash); e.id.Revoked(r.KeyHash) || err == nil && !k.RevokedAt.IsZero() {
		return nil, api.NewProblem(api.CodeConflict, "the key of this request is revoked: give the party a new join code, which makes it use a new key")
	} else if err != nil && !errors.Is(err, store.ErrNotFound) {
		return nil, err
	}
	if r.JoinID != "" {
		j, err := q.Join(ctx, r.JoinID)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return nil, err
		}
		if err == nil {
			d.join = j
		}
	}
	if r.Role == wire.RoleNode && !wire.ValidPartyName(r.Name) {
		return nil, api.NewProblem(api.CodeConflict, fmt.Sprintf("name %q: %s: set SALLYPORT_NODE_NAME there", r.Name, nameRule))
	}
	if err := e.claims(ctx, q, d, r.KeyHash); err != nil {
		return nil, err
	}
	if d.state != "" {
		return nil, api.NewProblem(api.CodeConflict, d.reason)
	}
	if v := d.clash(); v != nil && !replace {
		return nil, api.NewProblem(api.CodeNameInUse, fmt.Sprintf("%s: the request claims what belongs to a %s; grant with --replace to revoke that and keep its tags and history", v.clash, v.what()))
	}
	return d, nil
}

// deny is an operator's no, which the party is told.
func (e *enrolment) deny(ctx context.Context, ref string, in api.Deny) (*store.Request, error) {
	return e.refuse(ctx, ref, ruling{verb: verbDeny, reason: clip(in.Reason)})
}

// discard forgets a request; the party is not told, and stays where it is.
func (e *enrolment) discard(ctx context.Context, ref string) (*store.Request, error) {
	return e.refuse(ctx, ref, ruling{verb: verbDiscard})
}

func (e *enrolment) refuse(ctx context.Context, ref string, v ruling) (q *store.Request, err error) {
	err = e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) (err error) {
		q, err = e.refuseOne(ctx, tx, ref, v)
		return err
	})
	if err != nil {
		return nil, e.lastOfName(ctx, ref, err)
	}
	if v.verb == verbDeny {
		e.again(q.KeyHash)
	}
	return q, nil
}

// refuseOne writes nothing when it returns a *api.Problem.
func (e *enrolment) refuseOne(ctx context.Context, tx *store.Tx, ref string, v ruling) (*store.Request, error) {
	found, err := tx.FindRequests(ctx, ref)
	switch {
	case err != nil:
		return nil, err
	case len(found) == 0:
		return nil, noRequest(ctx, tx.Queries, ref)
	case len(found) > 1:
		return nil, api.NewProblem(api.CodeAmbiguous, fmt.Sprintf("%d requests fit %q: name one by its ID", len(found), wire.Quotable(ref)))
	}
	q := found[0]
	q.State, q.Code, q.Reason, q.DecidedAt, q.DecidedBy = api.RequestDiscarded, "", "", tx.Now(), store.ActorFrom(ctx).Who
	if v.verb == verbDeny {
		q.State, q.Reason = api.RequestDenied, cmp.Or(v.reason, "an operator refused the request")
	}
	tx.Audit(ctx, "request."+v.verb, q.Name, fmt.Sprintf("%s %s, %s %s", q.Role, q.PartyID, q.KeyHash.Fingerprint(), q.Reason))
	return q, tx.SaveRequest(ctx, q)
}

// noRequest says why there is nothing to decide under that name: of a request
// that is named by its ID, what became of it.
func noRequest(ctx context.Context, q store.Queries, ref string) error {
	r, err := q.Request(ctx, ref)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return api.NewProblem(api.CodeNotFound, fmt.Sprintf("no request %q waits", wire.Quotable(ref)))
	case err != nil:
		return err
	}
	return api.NewProblem(api.CodeNotFound, fmt.Sprintf("request %s waits no more: it %s", r.ID, became(r)))
}

// lastOfName adds to the error of a name that no request waits under what
// became of the last one. Nothing but its age leads to it: that is not looked
// for in a transaction, nor for each of many.
func (e *enrolment) lastOfName(ctx context.Context, ref string, cause error) error {
	if !api.Is(cause, api.CodeNotFound) {
		return cause
	}
	r, err := e.store.LastRequestOf(ctx, ref)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return cause
	case err != nil:
		return err
	}
	return api.NewProblem(api.CodeNotFound, fmt.Sprintf("%v: the last one, %s, %s", cause, r.ID, became(r)))
}

// became says what was decided of a request that does not wait any more, and
// what can be done.
func became(r *store.Request) string {
	who := cmp.Or(r.DecidedBy, "the gateway")
	if r.Rule != "" {
		who = "the rule " + r.Rule
	}
	by := fmt.Sprintf("by %s on %s", who, r.DecidedAt.UTC().Format(time.RFC3339))
	switch r.State {
	case api.RequestDenied:
		return fmt.Sprintf("was denied %s (%s), which is final: with another join code the party asks anew", by, r.Reason)
	case api.RequestDiscarded:
		return fmt.Sprintf("was discarded %s: with another join code the party asks anew", by)
	case api.RequestGranted:
		return fmt.Sprintf("was granted %s: its party gets the certificate when it comes, or by `sallyport request export`", by)
	case api.RequestDelivered:
		if r.Reason != "" { // by a file, of which nobody knows whether it arrived
			return fmt.Sprintf("was granted %s, and its certificate was %s", by, r.Reason)
		}
		return fmt.Sprintf("was granted %s, and its party has the certificate", by)
	case api.RequestFailed:
		return fmt.Sprintf("was granted %s, and its party has no certificate by it (%s)", by, cmp.Or(r.Reason, r.Code))
	case api.RequestExpired:
		return "expired: its party was not seen for long, and asks anew when it comes back"
	}
	return "is " + r.State
}

// expire ends requests whose party was not seen for long.
func (e *enrolment) expire(ctx context.Context) error {
	return e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		n, err := tx.ExpireRequests(ctx, tx.Now().Add(-requestLife))
		if n > 0 {
			tx.Audit(ctx, "request.expire", "", fmt.Sprintf("%d requests", n))
		}
		return err
	})
}
