package gateway

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"path"
	"strings"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/bus"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

const (
	defaultJoinTTL = 24 * time.Hour
	maxJoinTTL     = 366 * 24 * time.Hour
	maxJoinUses    = 1_000_000
	tokenBytes     = 32 // 256 random bits
)

// createJoin makes a join code for nodes.
func (e *enrolment) createJoin(ctx context.Context, in api.CreateJoin) (api.CreatedJoin, error) {
	j := &store.Join{Role: cmp.Or(in.Role, wire.RoleNode), Name: in.Name, Tags: in.Tags, AllowTags: in.AllowTags, RCPs: in.RCPs, MaxUses: in.Uses, Manual: in.Manual, Replaces: in.Replace}
	if j.MaxUses == 0 {
		j.MaxUses = 1
	}
	if p := checkJoin(j, e.id.TrustDomain()); p != nil {
		return api.CreatedJoin{}, p
	}
	return e.addJoin(ctx, j, time.Duration(in.TTL), nil)
}

// nameRule says what wire.ValidPartyName takes.
var nameRule = fmt.Sprintf("want letters, digits, '.', '-' and '_', at most %d, and not what reads as the first 8 digits of a UUID", wire.MaxName)

// checkJoin finds every fault of a join code. The name of one for EST it writes
// in the one way in which that reads it.
func checkJoin(j *store.Join, trustDomain string) *api.Problem {
	var faults []api.ProblemError
	fault := func(where, format string, args ...any) {
		faults = append(faults, api.ProblemError{Location: where, Message: fmt.Sprintf(format, args...)})
	}
	if j.Role == api.JoinEST {
		return checkESTCode(j, trustDomain)
	}
	if j.Role != wire.RoleNode {
		fault("role", "%q: want node or est", wire.Quotable(string(j.Role)))
	}
	if j.Name != "" && !wire.ValidPartyName(j.Name) {
		fault("name", "%q: %s", wire.Quotable(j.Name), nameRule)
	}
	if j.MaxUses < 1 || j.MaxUses > maxJoinUses {
		fault("uses", "%d: want 1 to %d", j.MaxUses, maxJoinUses)
	}
	if j.Manual && j.MaxUses > 1 {
		fault("uses", "a code without a token serves any number of parties: an operator grants each")
	}
	if j.Name != "" && j.MaxUses > 1 {
		fault("uses", "one name cannot be used %d times: leave out the name, or the uses", j.MaxUses)
	}
	if j.Replaces && j.Name == "" {
		fault("replace", "it needs the name that is to be replaced")
	}
	for k, v := range j.Tags {
		if err := store.ValidTag(k, v); err != nil {
			fault("tags", "%v", err)
		}
	}
	for _, g := range j.AllowTags {
		if _, err := path.Match(g, ""); err != nil || g == "" {
			fault("allow_tags", "%q is no glob", wire.Quotable(g))
		}
	}
	if len(faults) == 0 {
		return nil
	}
	return api.NewProblem(api.CodeInvalid, "the join code cannot be made", faults...)
}

// addJoin stores a join code and returns it with its secret, which is never
// shown again. more, if not nil, runs in the same transaction.
func (e *enrolment) addJoin(ctx context.Context, j *store.Join, ttl time.Duration, more func(ctx context.Context, tx *store.Tx) error) (api.CreatedJoin, error) {
	if ttl == 0 {
		ttl = defaultJoinTTL
	}
	if ttl < time.Second || ttl > maxJoinTTL {
		return api.CreatedJoin{}, api.NewProblem(api.CodeInvalid, fmt.Sprintf("ttl %s: want 1s to %s", ttl, maxJoinTTL))
	}
	var token string
	if !j.Manual {
		b := make([]byte, tokenBytes)
		if _, err := rand.Read(b); err != nil {
			return api.CreatedJoin{}, err
		}
		token = base64.RawURLEncoding.EncodeToString(b)
		j.TokenHash = hashToken(token)
	}
	j.ID, j.Tenant, j.TrustDomain, j.Root = string(wire.NewID()), store.DefaultTenant, e.id.TrustDomain(), wire.KeyOf(e.ca.Root())
	j.CreatedBy = store.ActorFrom(ctx).Who
	var addresses []string
	err := e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) (err error) {
		if more != nil {
			if err := more(ctx, tx); err != nil {
				return err
			}
		}
		if j.Role == wire.RoleNode { // a code never makes a dialler of an RCP
			if addresses, err = e.joinAddresses(ctx, tx.Queries, j.RCPs); err != nil {
				return err
			}
		}
		j.ExpiresAt = tx.Now().Add(ttl)
		tx.Audit(ctx, "join.create", j.ID, fmt.Sprintf("role %s, name %q, %d uses, until %s", j.Role, j.Name, j.MaxUses, j.ExpiresAt.Format(time.RFC3339)))
		return tx.AddJoin(ctx, j)
	})
	if err != nil {
		return api.CreatedJoin{}, err
	}
	if j.Role == api.JoinEST {
		return api.CreatedJoin{Join: joinView(j, j.Generation), Code: j.ID + "." + token}, nil
	}
	code, err := wire.JoinCode{TrustDomain: j.TrustDomain, Root: j.Root, Role: j.Role, Name: j.Name, Addresses: addresses, TokenID: j.ID, Token: token}.Encode()
	if err != nil {
		return api.CreatedJoin{}, err
	}
	return api.CreatedJoin{Join: joinView(j, j.Generation), Code: code, Addresses: addresses}, nil
}

// joinAddresses are the upstreams that stand in a code: of the parties that it
// names, or every way in.
func (e *enrolment) joinAddresses(ctx context.Context, q store.Queries, names []string) ([]string, error) {
	rcps, err := q.RCPs(ctx)
	if err != nil {
		return nil, err
	}
	known := map[string][]string{}
	if e.public != "" {
		known[wayInGateway] = strings.Split(e.public, ";")
	}
	for _, r := range rcps {
		known[r.Name] = r.Public
	}
	out := []string{}
	for _, name := range names {
		addrs, ok := known[name]
		if !ok {
			return nil, api.NewProblem(api.CodeNotFound, fmt.Sprintf("no rcp %q", wire.Quotable(name)))
		}
		out = append(out, addrs...)
	}
	if len(names) > 0 {
		return out, nil
	}
	for _, way := range waysIn(rcps, usableRCP, e.id.ID(), e.public) {
		out = append(out, way.Addresses...)
	}
	return out, nil
}

// wayInGateway names the gateway itself among the RCPs of a join code.
const wayInGateway = "gateway"

// waysIn says where nodes may dial: the public addresses of the RCPs that fit,
// and those of a gateway that listens only where there is no RCP. A network
// whose nodes have an RCP lets none of them reach the gateway: telling them its
// address would have every firewall report attempts. A join code that names
// the gateway (--rcp gateway) is for nodes that may.
func waysIn(rcps []*store.RCP, fits func(*store.RCP) bool, gateway wire.ID, public string) []wire.RCPAddresses {
	out := []wire.RCPAddresses{}
	for _, r := range rcps {
		if len(r.Public) > 0 && fits(r) {
			out = append(out, wire.RCPAddresses{ID: r.PartyID, Name: r.Name, Addresses: r.Public})
		}
	}
	if len(out) == 0 && public != "" {
		out = append(out, wire.RCPAddresses{ID: gateway, Name: wayInGateway, Addresses: strings.Split(public, ";")})
	}
	return out
}

// usableRCP fits an RCP that nodes will be able to use: it may still enrol.
func usableRCP(r *store.RCP) bool { return r.State != api.RCPRevoked && !r.Draining }

// enrolledRCP fits one that they can use now.
func enrolledRCP(r *store.RCP) bool { return usableRCP(r) && r.PartyID != "" }

// rcpJoin adds to an RCP's join code what else must be set for its channel: the
// gateway dials an address, an RCP behind another is dialled by that one or
// dials it, and what has no address dials.
func (e *enrolment) rcpJoin(ctx context.Context, r *store.RCP, created api.CreatedJoin) (api.RCPJoin, error) {
	out := api.RCPJoin{RCP: rcpRecordView(r), Join: created, Upstreams: []string{}, Downstreams: []string{}}
	if r.Via == "" {
		if r.Address == "" && e.public != "" {
			out.Upstreams = strings.Split(e.public, ";")
		}
		return out, nil
	}
	via, err := e.store.RCP(ctx, r.Via)
	if err != nil {
		return out, err
	}
	switch {
	case r.Address == "":
		out.Upstreams = append(out.Upstreams, via.Public...)
	case via.PartyID != "":
		out.Upstreams = append(out.Upstreams, string(via.PartyID))
		fallthrough
	default:
		out.Downstreams = append(out.Downstreams, r.Address)
	}
	return out, nil
}

// addRCP makes the record of an RCP and its join code.
func (e *enrolment) addRCP(ctx context.Context, in api.AddRCP) (api.RCPJoin, error) {
	if !wire.ValidPartyName(in.Name) {
		return api.RCPJoin{}, api.NewProblem(api.CodeInvalid, fmt.Sprintf("rcp name %q: %s", wire.Quotable(in.Name), nameRule))
	}
	r := &store.RCP{Name: in.Name, Address: in.Address, Public: in.Public, Via: in.Via, Source: store.RCPAdded, State: api.RCPPending, StateReason: "waiting for it to enrol"}
	if len(r.Public) == 0 && r.Address != "" {
		r.Public = []string{r.Address}
	}
	j := &store.Join{Role: wire.RoleRCP, Name: in.Name, MaxUses: 1}
	created, err := e.addJoin(ctx, j, time.Duration(in.TTL), func(ctx context.Context, tx *store.Tx) error {
		if r.Via != "" {
			if _, err := tx.RCP(ctx, r.Via); errors.Is(err, store.ErrNotFound) {
				return api.NewProblem(api.CodeNotFound, fmt.Sprintf("no rcp %q to go by", wire.Quotable(r.Via)))
			} else if err != nil {
				return err
			}
		}
		tx.Audit(ctx, "rcp.add", r.Name, r.Address)
		err := tx.AddRCP(ctx, r)
		if errors.Is(err, store.ErrExists) {
			return api.NewProblem(api.CodeExists, fmt.Sprintf("rcp %q exists already: sallyport rcp join makes a new code for it", r.Name))
		}
		return err
	})
	if err != nil {
		return api.RCPJoin{}, err
	}
	return e.rcpJoin(ctx, r, created)
}

// joinRCP makes a new code for an RCP that has a record.
func (e *enrolment) joinRCP(ctx context.Context, r *store.RCP, in api.JoinRCP) (api.RCPJoin, error) {
	j := &store.Join{Role: wire.RoleRCP, Name: r.Name, MaxUses: 1, Replaces: in.Replace}
	created, err := e.addJoin(ctx, j, time.Duration(in.TTL), func(_ context.Context, tx *store.Tx) error {
		tx.Wake(bus.RCPs) // it is dialled another way while the code is open
		return nil
	})
	if err != nil {
		return api.RCPJoin{}, err
	}
	return e.rcpJoin(ctx, r, created)
}

// joiningRCPs names the RCPs that have an open join code.
func (e *enrolment) joiningRCPs(ctx context.Context) (map[string]bool, error) {
	list, err := e.store.Joins(ctx)
	if err != nil {
		return nil, err
	}
	out := map[string]bool{}
	generation := e.store.Installation().Generation
	for _, j := range list {
		if j.Role == wire.RoleRCP && joinView(j, generation).State == "open" {
			out[j.Name] = true
		}
	}
	return out, nil
}

// rcpRecordView is what the record of an RCP says; presence is known elsewhere.
func rcpRecordView(r *store.RCP) api.RCP {
	v := api.RCP{Name: r.Name, ID: r.PartyID, State: r.State, StateReason: r.StateReason, StateSince: r.StateSince.UTC(), Address: r.Address, Public: r.Public,
		Via: r.Via, Version: r.Program, Fingerprint: r.KeyHash.Fingerprint(), Source: r.Source}
	if v.Public == nil {
		v.Public = []string{}
	}
	if r.KeyHash == "" {
		v.Fingerprint = ""
	}
	return v
}

// joinView is a join code as operators see it.
func joinView(j *store.Join, generation int64) api.Join {
	v := api.Join{ID: j.ID, Role: j.Role, Name: j.Name, State: "open", Tags: j.Tags, AllowTags: j.AllowTags, Uses: j.MaxUses, Used: j.Used, RCPs: j.RCPs,
		Manual: j.Manual, Replace: j.Replaces, Created: j.CreatedAt.UTC(), Expires: j.ExpiresAt.UTC(), CreatedBy: j.CreatedBy}
	switch {
	case !j.RevokedAt.IsZero(), j.Generation != generation:
		v.State = "revoked"
	case !j.Manual && j.Used >= j.MaxUses:
		v.State = "used"
	case time.Now().After(j.ExpiresAt):
		v.State = "expired"
	}
	if j.Manual {
		v.Uses = 0 // an operator decides each time
	}
	if v.Tags == nil {
		v.Tags = map[string]string{}
	}
	if v.AllowTags == nil {
		v.AllowTags = []string{}
	}
	if v.RCPs == nil {
		v.RCPs = []string{}
	}
	return v
}
