package gateway

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

// decision is what becomes of a certificate request.
type decision struct {
	state  string // of the verdict; empty: the party is told nothing
	code   string // of package wire; for requests that wait it is their reason
	reason string // for people, on both sides
	party  wire.Party
	name   string
	tenant string

	join    *store.Join       // the code that the party showed; nil without one
	victims []victim          // identities that give way
	known   bool              // the key was certified before: it is given a new leaf and nothing else happens
	prior   *store.Request    // the same key's last request, if it still waits
	over    *store.Request    // the same key's last request, if an operator has denied or discarded it
	fresh   bool              // a new request was written
	rules   ruleVerdict       // what the rules say of it
	spot    *spot             // where the party waits, as the rule that grants wants it; nil: where it was met
	tags    map[string]string // that an operator gives with the grant
	lapsed  time.Time         // end of the key's leaf, when the grace after it is over too
}

// victim is an identity that ends because another takes its name or UUID.
type victim struct {
	role  wire.Role
	id    wire.ID
	name  string
	keep  bool // tags that the gateway set, and history, go to the successor
	clash string
	ended bool // it was revoked or removed: nobody lives there
}

// what describes a victim for people.
func (v *victim) what() string {
	if v.ended {
		return fmt.Sprintf("%s that was revoked or removed (%s, %s)", v.role, v.name, v.id)
	}
	return fmt.Sprintf("live %s (%s, %s)", v.role, v.name, v.id)
}

func victimParties(victims []victim) []wire.Party {
	out := make([]wire.Party, len(victims))
	for i, v := range victims {
		out[i] = wire.Party{Role: v.role, ID: v.id}
	}
	return out
}

func (d *decision) joinID() string {
	if d.join == nil {
		return ""
	}
	return d.join.ID
}

func (d *decision) ruleName() string {
	if d.rules.rule == nil {
		return ""
	}
	return d.rules.rule.name
}

func (d *decision) is(state, code, format string, args ...any) *decision {
	d.state, d.code, d.reason = state, code, fmt.Sprintf(format, args...)
	return d
}

// decide judges a request whose key the party has proven. It changes nothing.
// The order is: what can never be, what was decided before, what the token
// says, and whose name and UUID it is.
func (e *enrolment) decide(ctx context.Context, q store.Queries, key wire.KeyHash, req *wire.EnrollRequest, from origin) (*decision, error) {
	d := &decision{party: wire.Party{Role: req.Role, ID: req.ID, TrustDomain: e.id.TrustDomain()}, name: req.Name, tenant: store.DefaultTenant}
	if e.impossible(d, key, req) {
		return d, nil
	}
	if done, err := e.knownKey(ctx, q, d, key); done || err != nil {
		return d, err
	}
	if done, err := e.decided(ctx, q, d, key, req); done || err != nil {
		return d, err
	}
	if done, err := e.token(ctx, q, d, key, req); done || err != nil {
		return d, err
	}
	if err := e.claims(ctx, q, d, key); err != nil || d.state != "" {
		return d, err
	}
	if err := e.byRules(ctx, q, d, key, req, from); err != nil || d.state != "" {
		return d, err
	}
	return e.conclude(d), nil
}

// impossible refuses what no operator could grant.
func (e *enrolment) impossible(d *decision, key wire.KeyHash, req *wire.EnrollRequest) bool {
	switch _, err := wire.ParseID(string(req.ID)); {
	case e.id.Revoked(key):
		d.is(wire.EnrollDenied, wire.EnrollRevoked, "this key is revoked: the party makes a new one when it is given a new join code")
	case req.Role != wire.RoleNode && req.Role != wire.RoleRCP:
		d.is(wire.EnrollDenied, wire.EnrollBadRequest, "role %q is not enrolled here", wire.Quotable(string(req.Role)))
	case err != nil || req.ID == e.id.ID():
		d.is(wire.EnrollDenied, wire.EnrollBadRequest, "%q cannot be the UUID of a party", wire.Quotable(string(req.ID)))
	case len(req.CSR) > maxCSR:
		d.is(wire.EnrollDenied, wire.EnrollBadRequest, "its certificate request has %d bytes, the limit is %d", len(req.CSR), maxCSR)
	case req.Name != "" && req.Role == wire.RoleNode && !wire.ValidPartyName(req.Name):
		d.is(wire.EnrollDenied, wire.EnrollBadRequest, "name %q: %s (see SALLYPORT_NODE_NAME)", wire.Quotable(req.Name), nameRule)
	default:
		if _, ok := req.Versions.Common(wire.OwnVersions); !ok {
			d.is(wire.EnrollDenied, wire.EnrollBadRequest, "the party speaks protocol versions %d to %d, this gateway %d to %d: upgrade the older one",
				req.Versions.Min, req.Versions.Max, wire.OwnVersions.Min, wire.OwnVersions.Max)
		}
	}
	return d.state != ""
}

// knownKey gives a party that lost its leaf, or let it expire, a new one: it
// still has the key that was granted.
func (e *enrolment) knownKey(ctx context.Context, q store.Queries, d *decision, key wire.KeyHash) (bool, error) {
	k, err := q.Key(ctx, key)
	if errors.Is(err, store.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if !k.RevokedAt.IsZero() { // not in the signed set yet
		d.is(wire.EnrollDenied, wire.EnrollRevoked, "this key is revoked: the party makes a new one when it is given a new join code")
		return true, nil
	}
	if k.Role != d.party.Role || k.PartyID != d.party.ID {
		d.is(wire.EnrollDenied, wire.EnrollBadRequest, "this key belongs to %s %s", k.Role, k.PartyID)
		return true, nil
	}
	if time.Since(k.NotAfter) > e.grace && !undelivered(ctx, q, k) {
		d.lapsed = k.NotAfter
		if k.Role == wire.RoleRCP && d.name == "" {
			d.name = k.Name // an RCP does not know its name: its record is found by it when an operator grants
		}
		if k.Role == wire.RoleNode { // it asks for what its host is called
			n, err := q.Node(ctx, k.PartyID)
			if err != nil && !errors.Is(err, store.ErrNotFound) {
				return false, err
			}
			if err == nil && n.KeyHash == key {
				d.name, d.tenant = n.Name, n.Tenant
			}
		}
		return false, nil
	}
	var current wire.KeyHash
	switch k.Role {
	case wire.RoleNode:
		n, err := q.Node(ctx, k.PartyID)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return false, err
		}
		current, d.name, d.tenant = n.KeyHash, n.Name, n.Tenant
	case wire.RoleRCP:
		r, err := q.RCPByID(ctx, k.PartyID)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return false, err
		}
		current, d.name = r.KeyHash, r.Name
	}
	if current != key {
		// The party may have taken the leaf of a new key, and its answer was lost.
		// One that is older than that in the record has had its place taken.
		switch c, err := q.Key(ctx, current); {
		case errors.Is(err, store.ErrNotFound): // its record is gone
			return false, nil
		case err != nil:
			return false, err
		case !k.IssuedAt.After(c.IssuedAt):
			return false, nil
		}
	}
	d.known = true
	d.is(wire.EnrollGranted, "", "")
	return true, nil
}

// undelivered tells whether a key was granted and never had a leaf: it waits as
// long for it as a request waits for its grant, whatever the grace.
func undelivered(ctx context.Context, q store.Queries, k *store.Key) bool {
	r, err := q.LastRequest(ctx, k.KeyHash)
	if err != nil || r.State != api.RequestGranted && r.State != api.RequestFailed {
		return false
	}
	return k.NotAfter.Equal(k.IssuedAt) && time.Since(k.IssuedAt) <= maxUncollected
}

// decided repeats what an operator said of the same request.
func (e *enrolment) decided(ctx context.Context, q store.Queries, d *decision, key wire.KeyHash, req *wire.EnrollRequest) (bool, error) {
	prior, err := q.LastRequest(ctx, key)
	if errors.Is(err, store.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	switch {
	case prior.State == api.RequestPending:
		d.prior = prior
	case req.TokenID != "" && prior.JoinID != req.TokenID: // another code is another request
	case prior.State == api.RequestDenied:
		d.over = prior
		d.is(wire.EnrollDenied, wire.EnrollByOperator, "%s", prior.Reason)
		return true, nil
	case prior.State == api.RequestDiscarded:
		d.over = prior
		return true, nil
	}
	return false, nil
}

// token judges the join code that the party shows. One that was started again
// without its file, while it waits, has shown it: its request and its key are the
// same, so that name and tags of the code stay.
func (e *enrolment) token(ctx context.Context, q store.Queries, d *decision, key wire.KeyHash, req *wire.EnrollRequest) (bool, error) {
	id, shown := req.TokenID, false
	if id == "" && d.prior != nil {
		id, shown = d.prior.JoinID, true
	}
	if id == "" {
		return false, nil
	}
	j, err := q.Join(ctx, id)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return false, err
	}
	switch {
	case err != nil, !j.Manual && !shown && !tokenFits(j, req.Token):
		d.is(wire.EnrollDenied, wire.EnrollTokenUnknown, joinUnknown)
		return true, nil
	case j.Role != req.Role:
		d.is(wire.EnrollDenied, wire.EnrollTokenForeign, "the join code is for a %s, this is a %s", j.Role, req.Role)
		return true, nil
	case j.TrustDomain != d.party.TrustDomain:
		d.is(wire.EnrollDenied, wire.EnrollTokenForeign, "the join code is for trust domain %s", j.TrustDomain)
		return true, nil
	}
	if code, why := e.over(j); why != "" {
		d.spent(j, code, why)
		return true, nil
	}
	d.join, d.tenant = j, j.Tenant
	if j.Name != "" {
		d.name = j.Name
	}
	if j.Manual || j.Used < j.MaxUses {
		return false, nil
	}
	mine, err := q.JoinUsed(ctx, j.ID, key)
	if err != nil {
		return false, err
	}
	if !mine {
		d.spent(j, wire.EnrollTokenUsed, fmt.Sprintf("the join code is used up (%d of %d)%s", j.Used, j.MaxUses, askAnew))
	}
	return !mine, nil
}

const askAnew = "; ask for a new one"

// spent is for a code that is over, or that others have used up. It lets nobody in;
// a party that has shown it in time waits on for an operator, as days may pass. That
// a code was revoked is somebody's word.
func (d *decision) spent(j *store.Join, code, why string) {
	if d.prior == nil || d.prior.JoinID != j.ID || !j.RevokedAt.IsZero() {
		d.is(wire.EnrollDenied, code, "%s", why)
		return
	}
	d.join, d.tenant, d.name = j, j.Tenant, cmp.Or(j.Name, d.name, d.prior.Name)
	d.is(wire.EnrollPending, code, "%s, and this request came before that; an operator has to grant it: sallyport request grant", strings.TrimSuffix(why, askAnew))
}

const joinUnknown = "the join code is not known here: it is of another gateway, or of one that was set up anew; ask for a new one"

// over says why a join code does not count any more; nothing: it does, as long
// as it is not used up.
func (e *enrolment) over(j *store.Join) (code, reason string) {
	switch {
	case !j.RevokedAt.IsZero():
		return wire.EnrollTokenUnknown, fmt.Sprintf("the join code was revoked on %s%s", j.RevokedAt.UTC().Format(time.RFC3339), askAnew)
	case j.Generation != e.store.Installation().Generation:
		return wire.EnrollTokenExpired, "the join code is void since this gateway was restored from a backup" + askAnew
	case time.Now().After(j.ExpiresAt):
		return wire.EnrollTokenExpired, fmt.Sprintf("the join code expired on %s%s", j.ExpiresAt.UTC().Format(time.RFC3339), askAnew)
	}
	return "", ""
}

// hashToken is what the database keeps of a token: 256 random bits need no salt.
func hashToken(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])
}

func tokenFits(j *store.Join, token string) bool {
	return j.TokenHash != "" && subtle.ConstantTimeCompare([]byte(j.TokenHash), []byte(hashToken(token))) == 1
}

// claims finds out whose name and UUID the party asks for.
func (e *enrolment) claims(ctx context.Context, q store.Queries, d *decision, key wire.KeyHash) error {
	if d.party.Role == wire.RoleRCP {
		return e.claimsRCP(ctx, q, d, key)
	}
	if d.name == "" {
		d.name = "node-" + d.party.ID.Short()
	}
	switch r, err := q.RCPByID(ctx, d.party.ID); {
	case err == nil:
		d.is(wire.EnrollDenied, wire.EnrollUUIDInUse, "the UUID is that of rcp %s", r.Name)
		return nil
	case !errors.Is(err, store.ErrNotFound):
		return err
	}
	switch n, err := q.AnyNode(ctx, d.party.ID); {
	case errors.Is(err, store.ErrNotFound):
	case err != nil:
		return err
	case n.KeyHash != "" && n.KeyHash != key && !d.returns(n):
		if n.Tenant != d.tenant { // nobody's code reaches into another tenant
			d.is(wire.EnrollDenied, wire.EnrollUUIDInUse, "the UUID belongs to a node of another tenant: delete the identity directory of this one, which makes it a new UUID")
			return nil
		}
		d.victims = append(d.victims, victim{role: wire.RoleNode, id: n.ID, name: n.Name, clash: wire.EnrollUUIDInUse, keep: true, ended: ended(n)})
	}
	n, err := q.NodeByName(ctx, d.tenant, d.name)
	if errors.Is(err, store.ErrNotFound) || err == nil && n.ID == d.party.ID {
		return nil
	}
	if err != nil {
		return err
	}
	v := victim{role: wire.RoleNode, id: n.ID, name: n.Name, clash: wire.EnrollNameInUse, keep: true}
	if n.State == wire.StateRevoked { // nobody lives there: the name is free
		v.clash, v.keep = "", false
	}
	d.victims = append(d.victims, v)
	return nil
}

// ended tells whether nobody holds a node's UUID by right any more.
func ended(n *store.Node) bool { return n.State == wire.StateRevoked || !n.RemovedAt.IsZero() }

// returns tells whether a node that was revoked or removed may have its UUID
// back, and with it the tags that operators set and its history: an operator
// made the code for it, or for one machine. A code for many is in many hands.
func (d *decision) returns(n *store.Node) bool {
	return ended(n) && n.Tenant == d.tenant && d.join != nil && !d.join.Manual && (d.join.MaxUses == 1 || d.join.Name == n.Name)
}

func (e *enrolment) claimsRCP(ctx context.Context, q store.Queries, d *decision, key wire.KeyHash) error {
	switch n, err := q.Node(ctx, d.party.ID); {
	case err == nil:
		d.is(wire.EnrollDenied, wire.EnrollUUIDInUse, "the UUID is that of node %s", n.Name)
		return nil
	case !errors.Is(err, store.ErrNotFound):
		return err
	}
	r, err := q.RCP(ctx, d.name)
	if errors.Is(err, store.ErrNotFound) {
		if d.join != nil && !d.join.Manual {
			d.is(wire.EnrollDenied, wire.EnrollTokenUnknown, "rcp %s was removed; add it again", wire.Quotable(d.name))
		} else {
			d.is(wire.EnrollPending, wire.EnrollManual, "no rcp %q is known: sallyport rcp add makes its record and a join code", wire.Quotable(d.name))
		}
		return nil
	}
	if err != nil {
		return err
	}
	if r.State != api.RCPRevoked {
		switch {
		case r.PartyID != "" && r.PartyID != d.party.ID:
			d.victims = append(d.victims, victim{role: wire.RoleRCP, id: r.PartyID, name: r.Name, clash: wire.EnrollNameInUse})
		case r.PartyID != "" && r.KeyHash != "" && r.KeyHash != key:
			d.victims = append(d.victims, victim{role: wire.RoleRCP, id: r.PartyID, name: r.Name, clash: wire.EnrollUUIDInUse})
		}
	}
	switch other, err := q.RCPByID(ctx, d.party.ID); {
	case errors.Is(err, store.ErrNotFound), err == nil && other.Name == r.Name:
	case err != nil:
		return err
	default:
		d.is(wire.EnrollDenied, wire.EnrollUUIDInUse, "the UUID is that of rcp %s", other.Name)
	}
	return nil
}

// succeeds tells whether a living node gives way to this party, as the code for
// its name says: its device is the party's then, and lets in nobody else.
func (d *decision) succeeds(n *store.Node) bool {
	return slices.ContainsFunc(d.victims, func(v victim) bool { return v.id == n.ID && v.clash != "" && !v.ended })
}

// clash returns the first identity that does not give way of itself.
func (d *decision) clash() *victim {
	for i := range d.victims {
		if d.victims[i].clash != "" {
			return &d.victims[i]
		}
	}
	return nil
}

// protected returns the first identity that a token alone does not replace. A
// code made with --replace ends who has its name, and nobody else: its holder
// may claim any UUID.
func (d *decision) protected() *victim {
	for i := range d.victims {
		if v := &d.victims[i]; v.clash != "" && (d.join == nil || d.join.Manual || !d.join.Replaces || d.join.Name != v.name) {
			return v
		}
	}
	return nil
}

// conclude turns claims and token into a verdict.
func (e *enrolment) conclude(d *decision) *decision {
	manual := d.join == nil || d.join.Manual
	if v := d.protected(); v != nil {
		what := "name " + d.name
		if v.clash == wire.EnrollUUIDInUse {
			what = "UUID " + string(v.id)
		}
		return d.is(wire.EnrollPending, v.clash, "the %s belongs to a %s; an operator can replace it: sallyport request grant --replace", what, v.what())
	}
	if d.rules.rule != nil {
		return d.is(wire.EnrollGranted, "", "")
	}
	if d.rules.bound {
		return d.is(wire.EnrollPending, wire.EnrollNoRule, "the join code grants by rule only, and none fits (%s); an operator has to grant this request: sallyport request grant", d.rules.why)
	}
	if manual && !d.lapsed.IsZero() {
		return d.is(wire.EnrollPending, wire.EnrollManual, "the certificate ended on %s, and the gateway renews none that ended more than %s ago (SALLYPORT_GATEWAY_RENEWAL_GRACE); an operator has to grant this request: sallyport request grant",
			d.lapsed.UTC().Format(time.RFC3339), wire.Duration(e.grace))
	}
	if manual && d.rules.shown {
		return d.is(wire.EnrollPending, wire.EnrollManual, "no rule takes what its device says (%s); an operator has to grant this request: sallyport request grant", d.rules.why)
	}
	if manual {
		return d.is(wire.EnrollPending, wire.EnrollManual, "an operator has to grant this request: sallyport request grant")
	}
	return d.is(wire.EnrollGranted, "", "")
}
