package gateway

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/manifest"
	"sallyport/gateway/store"
	"sallyport/internal/selector"
	"sallyport/internal/wire"
)

// rule is one rule, ready to be asked.
type rule struct {
	name string
	manifest.RuleSpec
	prefixes []netip.Prefix
	tags     selector.Selector
	vouching *vouching // nil: no attestation is asked for
}

// contender is what a rule looks at. Key, join and device are proven: the party
// holds the key, has shown the token of the code, and a device that holds the
// key of its certificate vouches for it.
type contender struct {
	key    wire.KeyHash
	join   string // empty: none, or a code without a token
	id     wire.ID
	name   string
	spots  []spot // all the places where it waits, as reported
	tags   map[string]string
	device attested
}

func newRule(name, spec string) (*rule, error) {
	r := &rule{name: name, tags: selector.Everything}
	if err := json.Unmarshal([]byte(spec), &r.RuleSpec); err != nil {
		return nil, fmt.Errorf("rule %s: %w", name, err)
	}
	var err error
	if r.vouching, err = newVouching(r.Attestation); err != nil {
		return nil, fmt.Errorf("rule %s: %w", name, err)
	}
	for _, c := range r.CIDRs {
		p, err := netip.ParsePrefix(c)
		if err != nil {
			return nil, fmt.Errorf("rule %s: %w", name, err)
		}
		if a := p.Addr(); a.Is4In6() && p.Bits() >= 96 { // sources are compared as what they are, IPv4
			p = netip.PrefixFrom(a.Unmap(), p.Bits()-96)
		}
		r.prefixes = append(r.prefixes, p.Masked())
	}
	if r.Tags != "" {
		if r.tags, err = selector.Parse(r.Tags); err != nil {
			return nil, fmt.Errorf("rule %s: %w", name, err)
		}
	}
	return r, nil
}

// fits tells what speaks against a rule; nothing: it grants. What has to be
// proven comes first: everything behind it is what the party or its RCP says.
func (r *rule) fits(c *contender) (against string) {
	match := func(globs []string) bool {
		return slices.ContainsFunc(globs, func(g string) bool { ok, err := path.Match(g, c.name); return ok && err == nil })
	}
	device := ""
	if r.vouching != nil {
		device = r.vouching.against(c.device, c.name, time.Now())
	}
	switch {
	case len(r.Joins) == 0 && len(r.Keys) == 0 && r.vouching == nil:
		return "it proves nothing"
	case len(r.Joins) > 0 && (c.join == "" || !slices.Contains(r.Joins, c.join)):
		return "it is for other join codes"
	case len(r.Keys) > 0 && !slices.Contains(r.Keys, c.key.Fingerprint()):
		return "its keys are others"
	case device != "":
		return device
	case len(r.IDs) > 0 && !slices.Contains(r.IDs, c.id):
		return "its UUIDs are others"
	case len(r.Names) > 0 && !match(r.Names):
		return fmt.Sprintf("the name %q is not among its names", c.name)
	case r.spot(c) == nil:
		return r.elsewhere(c.spots[0])
	case !r.tags.Matches(c.tags):
		return "the tags do not match " + r.Tags
	}
	return ""
}

// spot is the first place where a party waits that a rule takes it from; nil:
// none. One that waits at several RCPs may be met at any of them.
func (r *rule) spot(c *contender) *spot {
	i := slices.IndexFunc(c.spots, func(s spot) bool { return r.elsewhere(s) == "" })
	if i < 0 {
		return nil
	}
	return &c.spots[i]
}

// elsewhere tells why a rule takes nobody from a place; nothing: it does.
func (r *rule) elsewhere(s spot) string {
	switch {
	case len(r.RCPs) > 0 && !slices.Contains(r.RCPs, s.rcp):
		return "its RCPs are others"
	case len(r.prefixes) > 0 && !within(r.prefixes, s.address):
		return fmt.Sprintf("the source %q, as reported, is outside its networks", wire.Quotable(s.address))
	}
	return ""
}

// within tells whether an address, with or without a port, lies in a network.
func within(prefixes []netip.Prefix, source string) bool {
	host, _, err := net.SplitHostPort(source)
	if err != nil {
		host = source
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return false
	}
	addr = addr.Unmap().WithZone("")
	return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// ruleVerdict is what the rules of a tenant say of a party that asks.
type ruleVerdict struct {
	rule  *rule  // that grants; nil: none
	bound bool   // some rule names the join code: its token alone does not do
	shown bool   // a device vouches for the party, and some rule asks for that
	known bool   // some rule names its key
	why   string // of bound, shown or known: what speaks against each
}

// askRules finds the first rule, by name, that grants. A join code that any
// rule names grants by such a rule only, so that its token is narrowed by it.
func askRules(rules []*rule, c *contender) (v ruleVerdict) {
	var against []string
	for _, r := range rules {
		no := r.fits(c)
		if no == "" {
			v.rule = r
			return v
		}
		if r.vouching != nil && (len(c.device.chain) > 0 || c.device.err != nil) && (len(r.Joins) == 0 || slices.Contains(r.Joins, c.join)) {
			v.shown = true
			against = append(against, r.name+": "+no)
			v.bound = v.bound || c.join != "" && slices.Contains(r.Joins, c.join)
			continue
		}
		if c.join != "" && slices.Contains(r.Joins, c.join) {
			v.bound = true
			against = append(against, r.name+": "+no)
			continue
		}
		if len(r.Joins) == 0 && slices.Contains(r.Keys, c.key.Fingerprint()) {
			v.known = true
			against = append(against, r.name+": "+no)
		}
	}
	v.why = strings.Join(against, "; ")
	return v
}

// rulesOf reads the rules of a tenant. One that cannot be read grants nothing,
// and still binds the codes that it named: that is an error, not a gap. Parsed
// rules are kept while their text is the same: CRLs may be large.
func (e *enrolment) rulesOf(ctx context.Context, q store.Queries, tenant string) ([]*rule, error) {
	rows, err := q.Rules(ctx, tenant)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	out := make([]*rule, len(rows))
	kept := make(map[string]*rule, len(rows))
	for i, row := range rows {
		key := tenant + "\x00" + row.Name + "\x00" + row.Spec
		if out[i] = e.rules[key]; out[i] == nil {
			if out[i], err = newRule(row.Name, row.Spec); err != nil {
				return nil, err
			}
		}
		kept[key] = out[i]
	}
	e.rules = kept
	return out, nil
}

// byRules looks whether a rule grants a request, or keeps its code from it.
func (e *enrolment) byRules(ctx context.Context, q store.Queries, d *decision, key wire.KeyHash, req *wire.EnrollRequest, from origin) error {
	if d.party.Role != wire.RoleNode {
		return nil
	}
	rules, err := e.rulesOf(ctx, q, d.tenant)
	if err != nil || len(rules) == 0 {
		return err
	}
	c := &contender{key: key, id: d.party.ID, name: d.name, spots: append([]spot{from.spot}, from.also...), tags: requestTags(req.Tags, d.join), device: from.device}
	if d.join != nil && !d.join.Manual {
		c.join = d.join.ID
	}
	d.rules = askRules(rules, c)
	if d.rules.rule != nil {
		d.spot = d.rules.rule.spot(c)
	}
	if d.rules.rule == nil || d.rules.rule.vouching == nil || d.protected() != nil {
		return nil
	}
	why, err := d.deviceTaken(q.NodeOfDevice(ctx, from.device.key(), d.party.ID))
	if err != nil || why == "" {
		return err
	}
	bound := c.join != "" && slices.Contains(d.rules.rule.Joins, c.join)
	d.rules = ruleVerdict{}
	if bound || c.join == "" { // a token that no rule narrows grants by itself
		d.is(wire.EnrollPending, wire.EnrollDeviceInUse, "%s", why)
	}
	return nil
}

// applyRules creates and changes rules, and says which waiting requests they
// let in.
func (e *enrolment) applyRules(ctx context.Context, in api.ApplyRules) (api.AppliedRules, error) {
	out := api.AppliedRules{DryRun: in.DryRun, Objects: []api.AppliedObject{}, Grants: []api.RuleGrant{}}
	set, err := parseManifests(in.Manifests)
	if err != nil {
		return out, err
	}
	out.Skipped = len(set.Policies) + len(set.Deployments)
	if len(set.Rules) == 0 {
		return out, api.NewProblem(api.CodeInvalid, fmt.Sprintf("there is no rule to apply (%d documents of another kind)", out.Skipped))
	}
	run := e.store.Update
	if in.DryRun {
		run = e.store.Try
	}
	err = run(ctx, func(ctx context.Context, tx *store.Tx) error {
		out.Objects = []api.AppliedObject{}
		for _, d := range set.Rules {
			if err := e.checkRule(ctx, tx.Queries, d); err != nil {
				return err
			}
			spec, err := json.Marshal(d.Spec)
			if err != nil {
				return err
			}
			change, err := tx.PutRule(ctx, store.DefaultTenant, d.Name, string(spec))
			if err != nil {
				return err
			}
			if change != "unchanged" {
				tx.Audit(ctx, "rule.apply", d.Name, change+": "+clip(string(spec)))
			}
			out.Objects = append(out.Objects, api.AppliedObject{Kind: manifest.KindRule, Name: d.Name, Change: change})
		}
		return nil
	})
	if err != nil {
		return out, err
	}
	grants, let, err := e.rehearse(ctx, e.store.Queries, set.Rules)
	if err != nil {
		return out, err
	}
	out.Grants = grants
	if in.DryRun {
		return out, nil
	}
	for _, q := range let {
		e.lookAgain(ctx, q, out.Grants)
	}
	e.freed(ctx)
	return out, nil
}

// freed looks again at those that wait because no rule fits, and whose join codes
// no rule names any more: their token alone does now. The rules are in force, so that
// no failure is theirs.
func (e *enrolment) freed(ctx context.Context) {
	rules, err := e.rulesOf(ctx, e.store.Queries, store.DefaultTenant)
	waiting, werr := e.store.Requests(ctx, api.RequestPending)
	if err := errors.Join(err, werr); err != nil {
		e.log.Error("who waited for a rule is looked at later", "error", err)
		return
	}
	for _, q := range waiting {
		if q.Code == wire.EnrollNoRule && !slices.ContainsFunc(rules, func(r *rule) bool { return slices.Contains(r.Joins, q.JoinID) }) {
			e.lookAgain(ctx, q, nil)
		}
	}
}

// lookAgain decides anew on a request that waits.
func (e *enrolment) lookAgain(ctx context.Context, q *store.Request, grants []api.RuleGrant) {
	if q.Source == sourceFile && q.RCP == "" { // an RCP may call a source what it likes
		e.letFile(ctx, q, grants)
	}
	e.again(q.KeyHash)
}

// letFile grants a request that came by a file, and notes among grants what
// became of it. The rules are in force, so that no failure ends the rest.
func (e *enrolment) letFile(ctx context.Context, q *store.Request, grants []api.RuleGrant) {
	i := slices.IndexFunc(grants, func(g api.RuleGrant) bool { return g.Request.ID == q.ID })
	done, err := e.registerFile(ctx, q)
	switch {
	case err != nil:
		e.log.Error("a request from a file is not granted; it is when the rules are applied again", "request", q.ID, "error", err)
		if i >= 0 {
			grants[i].Why = "the gateway failed at this; its log says why"
		}
	case i >= 0:
		if grants[i].Request = requestView(done); done.State != api.RequestGranted && done.State != api.RequestDelivered {
			grants[i].Why = cmp.Or(done.Reason, done.Code, done.State)
		}
	}
}

// registerFile decides again on a request that came by a file: no session with
// its party will ever ask for that.
func (e *enrolment) registerFile(ctx context.Context, q *store.Request) (*store.Request, error) {
	req := &wire.EnrollRequest{Role: q.Role, ID: q.PartyID, Name: q.Name, Tags: q.Tags, CSR: q.CSR, Program: q.Program, Versions: wire.OwnVersions} // with the code of the request that waits
	if _, err := e.register(ctx, q.KeyHash, req, origin{spot: spot{address: sourceFile}}); err != nil {
		return nil, err
	}
	return e.store.LastRequest(ctx, q.KeyHash)
}

// checkRule finds what only the database knows to be wrong with a rule.
func (e *enrolment) checkRule(ctx context.Context, q store.Queries, d manifest.Rule) error {
	fault := func(format string, args ...any) error {
		return manifest.Errors{{Pos: d.Pos, Message: fmt.Sprintf("rule %s: ", d.Name) + fmt.Sprintf(format, args...)}}
	}
	for _, id := range d.Spec.Joins {
		switch j, err := q.Join(ctx, id); {
		case errors.Is(err, store.ErrNotFound):
			return fault("no join code %s", id)
		case err != nil:
			return err
		case j.Manual:
			return fault("join code %s holds no token (--manual): whoever has seen it could come with it", id)
		case j.Role != wire.RoleNode || j.Tenant != store.DefaultTenant:
			return fault("join code %s is not for nodes of this tenant", id)
		}
	}
	for k, v := range d.Spec.Set {
		if err := store.ValidTag(k, v); err != nil {
			return fault("set: %v", err)
		}
	}
	return nil
}

// rehearse says of the waiting requests what the rules make of them, with those
// of changed in the place of what the database has: a dry run finds the old
// ones there. It takes no lock: ten thousand may wait. let are those that get
// in, oldest first, as if each had come after the one before it was in.
func (e *enrolment) rehearse(ctx context.Context, q store.Queries, changed []manifest.Rule) (grants []api.RuleGrant, let []*store.Request, err error) {
	rules, err := e.rulesOf(ctx, q, store.DefaultTenant)
	if err != nil {
		return nil, nil, err
	}
	for _, m := range changed {
		spec, err := json.Marshal(m.Spec)
		if err != nil {
			return nil, nil, err
		}
		r, err := newRule(m.Name, string(spec))
		if err != nil {
			return nil, nil, err
		}
		rules = append(slices.DeleteFunc(rules, func(old *rule) bool { return old.name == m.Name }), r)
	}
	slices.SortFunc(rules, func(a, b *rule) int { return cmp.Compare(a.name, b.name) })
	waiting, err := q.Requests(ctx, api.RequestPending)
	if err != nil {
		return nil, nil, err
	}
	grants = []api.RuleGrant{}
	before := rehearsal{e: e, q: q, joins: map[string]*store.Join{}, used: map[string]int{}, claimed: map[string]*store.Request{}}
	for _, r := range slices.Backward(waiting) {
		if r.Role != wire.RoleNode || r.Tenant != store.DefaultTenant {
			continue
		}
		c := &contender{key: r.KeyHash, id: r.PartyID, name: r.Name, spots: []spot{{r.RCP, r.Source}}, tags: r.Tags, device: attestedBefore(r)}
		if e.ways != nil {
			c.spots = append(c.spots, e.spots(ctx, e.ways(r.KeyHash))...)
		}
		j, err := before.join(ctx, r.JoinID)
		if err != nil {
			return nil, nil, err
		}
		if j != nil && !j.Manual { // its token was shown, or the request would not wait
			c.join = r.JoinID
		}
		v := askRules(rules, c)
		g := api.RuleGrant{Request: requestView(r), Why: v.why}
		if v.rule != nil {
			g.Rule, g.Proof = v.rule.name, v.rule.proof(c)
			if g.Why, err = before.against(ctx, r, j, v.rule); err != nil {
				return nil, nil, err
			}
			if g.Why == "" {
				let = append(let, r)
			}
		}
		if slices.ContainsFunc(changed, func(m manifest.Rule) bool { return m.Name == g.Rule }) || g.Rule == "" && (v.bound || v.shown || v.known) {
			grants = append(grants, g)
		}
	}
	slices.Reverse(grants)
	return grants, let, nil
}

// rehearsal remembers what the requests took that were let in before.
type rehearsal struct {
	e       *enrolment
	q       store.Queries
	joins   map[string]*store.Join
	used    map[string]int            // uses of join codes
	claimed map[string]*store.Request // names, UUIDs and devices, each after a word for what it is
}

// join reads a join code once; nil: there is none.
func (h *rehearsal) join(ctx context.Context, id string) (*store.Join, error) {
	j, known := h.joins[id]
	if known || id == "" {
		return j, nil
	}
	j, err := h.q.Join(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		j, err = nil, nil
	}
	if err == nil {
		h.joins[id] = j
	}
	return j, err
}

// against says what keeps a request from what a rule grants, and writes down
// what it takes if nothing does: the same things as decide looks at.
func (h *rehearsal) against(ctx context.Context, r *store.Request, j *store.Join, by *rule) (string, error) {
	if r.JoinID != "" && j == nil {
		return joinUnknown, nil
	}
	uses := false
	if j != nil {
		if _, why := h.e.over(j); why != "" {
			return why, nil
		}
		mine, err := h.q.JoinUsed(ctx, j.ID, r.KeyHash)
		if err != nil {
			return "", err
		}
		if uses = !j.Manual && !mine; uses && j.Used+h.used[j.ID] >= j.MaxUses {
			return fmt.Sprintf("the join code is used up (%d of %d) by those before", j.Used+h.used[j.ID], j.MaxUses), nil
		}
	}
	switch r.Code {
	case wire.EnrollTokenUnknown, wire.EnrollTokenForeign, wire.EnrollTokenExpired, wire.EnrollTokenUsed:
		return "its party came back with a code that is no good: " + r.Reason, nil
	}
	// A name or UUID that is taken waits for an operator, whatever a rule says.
	d, err := h.e.judge(ctx, h.q, r, true)
	var p *api.Problem
	switch {
	case errors.As(err, &p):
		return p.Error(), nil
	case err != nil:
		return "", err
	}
	if v := d.protected(); v != nil {
		return fmt.Sprintf("%s: the request claims what belongs to a %s", v.clash, v.what()), nil
	}
	if by.vouching != nil {
		if why, err := d.deviceTaken(h.q.NodeOfDevice(ctx, r.DeviceKey, r.PartyID)); err != nil || why != "" {
			return why, err
		}
	}
	claims := []string{"name " + r.Name, "UUID " + string(r.PartyID)}
	if by.vouching != nil {
		claims = append(claims, "device "+string(r.DeviceKey))
	}
	for _, c := range claims {
		if first := h.claimed[c]; first != nil {
			return fmt.Sprintf("request %s, which came before, gets the same %s", first.ID, c), nil
		}
	}
	for _, c := range claims {
		h.claimed[c] = r
	}
	if uses {
		h.used[j.ID]++
	}
	return "", nil
}

// deleteRule forgets a rule. A join code that no other rule names grants by its
// token alone again.
func (e *enrolment) deleteRule(ctx context.Context, name string) error {
	err := e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		tx.Audit(ctx, "rule.delete", name, "")
		return tx.DeleteRule(ctx, store.DefaultTenant, name)
	})
	if errors.Is(err, store.ErrNotFound) {
		return api.NewProblem(api.CodeNotFound, fmt.Sprintf("no rule %q", wire.Quotable(name)))
	}
	if err == nil {
		e.freed(ctx)
	}
	return err
}

func ruleView(r *store.Rule) api.Rule {
	return api.Rule{Name: r.Name, Spec: json.RawMessage(cmp.Or(r.Spec, "{}")), Granted: r.Granted, GrantedAt: when(r.GrantedAt),
		Created: utc(r.CreatedAt), CreatedBy: r.CreatedBy, Updated: utc(r.UpdatedAt), UpdatedBy: r.UpdatedBy}
}
