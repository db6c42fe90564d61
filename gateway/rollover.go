package gateway

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// rollable is a certificate authority whose issuers can be changed from here.
type rollable interface {
	State() wire.CAState
	Trust() (wire.Envelope, bool)
	Rotate(ctx context.Context, kind string, atLeast int64) (wire.CAState, error)
	Follow(ctx context.Context, root []byte, alone bool, atLeast int64) (wire.CAState, error)
	Abort(ctx context.Context, atLeast int64) (wire.CAState, error)
	Finish(ctx context.Context, forget bool, atLeast int64) (wire.CAState, error)
}

// rolePKI stands for an intermediate in a revocation set.
const rolePKI wire.Role = "pki"

// issuers returns the authority if its issuers can be changed from here.
func (e *enrolment) issuers() (rollable, bool) {
	ca, ok := e.ca.(rollable)
	return ca, ok
}

// rolled returns it if that has ever been done: until then nobody is behind.
func (e *enrolment) rolled() (rollable, wire.CAState, bool) {
	ca, ok := e.issuers()
	if !ok {
		return nil, wire.CAState{}, false
	}
	s := ca.State()
	return ca, s, len(s.Intermediates) > 1
}

// trustOf is the trust document for a grant; nil if there is none.
func (e *enrolment) trustOf() *wire.Envelope {
	if ca, ok := e.issuers(); ok {
		if env, ok := ca.Trust(); ok {
			return &env
		}
	}
	return nil
}

// of tells whether a leaf of that intermediate is of the issuing one. What was
// issued before leaves were noted is of the first.
func onIssuing(s wire.CAState, issuer wire.KeyHash) bool {
	now := s.Issuing()
	return issuer == now.Key || issuer == "" && now.N == 1
}

// behind tells whether a party's leaf is of an intermediate that is given up.
func (e *enrolment) behind(ctx context.Context, id wire.ID) (bool, error) {
	_, s, ok := e.rolled()
	if !ok {
		return false, nil
	}
	t, err := e.store.PartyTrust(ctx, id)
	return err == nil && !onIssuing(s, t.Issuer), err
}

// deliverTrust brings the newest list of roots to a party, after a verified
// hello, and notes who has it.
func (e *enrolment) deliverTrust(ctx context.Context, _ wire.ID, hello *wire.Hello) error {
	ca, ok := e.issuers()
	if !ok {
		return nil
	}
	env, ok := ca.Trust()
	if !ok {
		return nil
	}
	number := numberOf(env)
	switch {
	case hello.Trust < number:
		err := e.talk(ctx, hello.Party, func(ctx context.Context, call caller) error {
			return call(ctx, http.MethodPut, wire.PathTrust, env, nil, 0)
		})
		if err != nil {
			return fmt.Errorf("bring %s the new list of roots: %w", hello.Party, err)
		}
	case hello.Trust > number:
		e.log.Warn("a party holds a newer list of roots than this gateway: was the pki directory restored from an older backup? restore the newest one", "party", hello.Party.String(), "held", hello.Trust, "ours", number)
		return nil
	}
	switch t, err := e.store.PartyTrust(ctx, hello.Party.ID); {
	case err != nil:
		return err
	case t.Trust == number:
		return nil
	}
	return e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error { return tx.SetTrust(ctx, hello.Party, number) })
}

// retiredKeys are the intermediates that were given up: they stand in every
// revocation set, for parties that missed it.
func (e *enrolment) retiredKeys() (out []*store.Key) {
	_, s, ok := e.rolled()
	if !ok {
		return nil
	}
	for _, i := range s.Intermediates {
		if i.State == wire.IssuerRetired {
			out = append(out, &store.Key{KeyHash: i.Key, Role: rolePKI, NotAfter: i.NotAfter, RevokedAt: i.Retired, Reason: "the intermediate was replaced"})
		}
	}
	return out
}

// takeTrust has our own identity trust what the authority says, and tells
// whether our own leaf is of an intermediate that is given up.
func (s *Server) takeTrust() (behind bool, err error) {
	ca, state, ok := s.enrolment.rolled()
	if !ok {
		return false, nil
	}
	if _, err := s.id.Certificate(); err != nil {
		return true, nil // the roots come with the first one
	}
	if env, ok := ca.Trust(); ok {
		if _, err := s.id.ApplyTrust(env); err != nil && !errors.Is(err, identity.ErrOlder) {
			return false, fmt.Errorf("take the list of roots: %w", err)
		}
	}
	chain := s.id.Chain()
	if len(chain) < 2 {
		return true, nil
	}
	issuer, err := x509.ParseCertificate(chain[1])
	return err == nil && wire.KeyOf(issuer) != state.Issuing().Key, err
}

// catchUp brings this gateway's own leaf and roots to what the authority says.
func (s *Server) catchUp(ctx context.Context) error {
	behind, err := s.takeTrust()
	if err != nil || !behind {
		return err
	}
	return s.renewOwn(ctx)
}

// showCA is `ca show`.
func (s *Server) showCA(ctx context.Context) (api.CA, error) {
	ca, err := s.rollable()
	if err != nil {
		return api.CA{}, err
	}
	return s.caView(ctx, ca.State())
}

func (s *Server) rollable() (rollable, error) {
	ca, ok := s.enrolment.issuers()
	if !ok {
		return nil, api.NewProblem(api.CodeUnsupported, "the issuers of this gateway's certificate authority are not kept here: show and change them where it runs")
	}
	return ca, nil
}

func (s *Server) caView(ctx context.Context, state wire.CAState) (api.CA, error) {
	v := api.CA{TrustDomain: state.TrustDomain, Trust: state.Number, External: state.External, Problem: s.enrolment.issuerProblem(), Left: []api.CAParty{}}
	if c := outside(time.Now(), state, 0); v.Problem == "" && c.severity != wire.SeverityNormal {
		v.Problem = c.text + ": " + c.fix
	}
	issuers := func(list []wire.CAIssuer) (out []api.CAIssuer) {
		for _, i := range list {
			out = append(out, api.CAIssuer{N: i.N, Fingerprint: i.Key.Fingerprint(), Root: i.Root, State: i.State, NotBefore: i.NotBefore, NotAfter: i.NotAfter, Retired: when(i.Retired)})
		}
		return out
	}
	v.Roots, v.Intermediates = issuers(state.Roots), issuers(state.Intermediates)
	v.Status = s.external.view(state.Intermediates)
	if r := state.Rollover; r != nil {
		v.Rollover = &api.CARollover{Kind: r.Kind, From: r.From.Fingerprint(), To: r.To.Fingerprint(), Since: r.Since, Aborted: r.Aborted, Named: r.Named, Waits: r.Waits}
	}
	parties, err := s.certified(ctx)
	if err != nil {
		return v, err
	}
	held, err := s.store.PartyTrusts(ctx)
	if err != nil {
		return v, err
	}
	v.Parties = len(parties)
	forgotten := state.Forgotten(false)
	for _, p := range parties {
		t := held[p.ID]
		p.Lost = p.Role != wire.RoleGateway && !p.Connected && forgotten[rootOfLeaf(state, t.Issuer)]
		switch {
		case p.Role == wire.RoleGateway && p.Reason == "", p.Role != wire.RoleGateway && onIssuing(state, t.Issuer) && t.Trust >= state.Number:
			continue
		case p.Role == wire.RoleGateway:
		case onIssuing(state, t.Issuer):
			p.Reason = "it has its new leaf, and not the new list of roots"
		case p.Lost:
			p.Reason = "it knows no root that still vouches for what issues: it needs a new join code"
		default:
			p.Reason = "its leaf is of the intermediate before"
		}
		v.Left = append(v.Left, p)
	}
	v.Moved = v.Parties - len(v.Left)
	v.Joins, err = s.foreignJoins(ctx, state.RootOf(state.Issuing().Key), state, false)
	return v, err
}

// rootOfLeaf is the root below which a leaf of that intermediate is. What was
// issued before leaves were noted is of the first.
func rootOfLeaf(s wire.CAState, issuer wire.KeyHash) wire.KeyHash {
	if issuer == "" && len(s.Roots) > 0 {
		return s.Roots[0].Key
	}
	return s.RootOf(issuer).Key
}

// certified lists the parties that have a certificate which may still be good:
// this gateway, RCPs, nodes. The Reason of the gateway is set if it is behind.
func (s *Server) certified(ctx context.Context) ([]api.CAParty, error) {
	behind, err := s.takeTrust()
	if err != nil {
		return nil, err
	}
	own := api.CAParty{Role: wire.RoleGateway, ID: s.id.ID(), Name: "this gateway", Connected: true, NotAfter: s.id.NotAfter().UTC()}
	if behind {
		own.Reason = "its leaf is of the intermediate before; it is renewed within a minute"
	}
	out := []api.CAParty{own}
	rcps, err := s.store.RCPs(ctx)
	if err != nil {
		return nil, err
	}
	for _, r := range rcps {
		if r.PartyID != "" && r.KeyHash != "" && r.State != api.RCPRevoked {
			out = append(out, s.caParty(wire.RoleRCP, r.PartyID, r.Name, r.NotAfter, r.LastSeen))
		}
	}
	nodes, err := s.store.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	for _, n := range nodes {
		if n.KeyHash != "" && n.State != wire.StateRevoked {
			out = append(out, s.caParty(wire.RoleNode, n.ID, n.Name, n.NotAfter, n.LastSeen))
		}
	}
	return out, nil
}

func (s *Server) caParty(role wire.Role, id wire.ID, name string, notAfter, lastSeen time.Time) api.CAParty {
	p := api.CAParty{Role: role, ID: id, Name: name, NotAfter: notAfter.UTC(), LastSeen: when(lastSeen), Until: notAfter.Add(s.enrolment.grace).UTC()}
	seen := s.fleet.Presence(id)
	hop, ok := s.fleet.hop(id)
	p.Connected = seen.Connected || ok && hop.Up
	if !seen.LastSeen.IsZero() {
		p.LastSeen = when(seen.LastSeen)
	}
	return p
}

// foreignJoins lists the open join codes that pin another root; next is that of
// [wire.CAState.Forgotten].
func (s *Server) foreignJoins(ctx context.Context, root wire.CAIssuer, state wire.CAState, next bool) ([]api.CAJoin, error) {
	all, err := s.store.Joins(ctx)
	if err != nil {
		return nil, err
	}
	out, forgotten := []api.CAJoin{}, state.Forgotten(next)
	for _, j := range all {
		pinned := j.Root
		if pinned == "" && len(state.Roots) > 0 {
			pinned = state.Roots[0].Key
		}
		if j.Role != api.JoinEST && pinned != root.Key && joinView(j, s.store.Installation().Generation).State == "open" {
			out = append(out, api.CAJoin{ID: j.ID, Role: j.Role, Name: j.Name, Root: pinned.Fingerprint(), Expires: j.ExpiresAt.UTC(), Lost: forgotten[pinned]})
		}
	}
	return out, nil
}

// rotateCA begins a rollover; every connected party is visited and renewed.
func (s *Server) rotateCA(ctx context.Context, in api.RotateCA) (api.CAChange, error) {
	if in.What != wire.RolloverIntermediate && in.What != wire.RolloverRoot {
		return api.CAChange{}, api.NewProblem(api.CodeInvalid, fmt.Sprintf("%q cannot be rotated: want %s or %s", wire.Quotable(in.What), wire.RolloverIntermediate, wire.RolloverRoot))
	}
	ca, err := s.rollable()
	if err != nil {
		return api.CAChange{}, err
	}
	if in.Fingerprint != "" || in.WithoutCross {
		return s.followCA(ctx, ca, in)
	}
	change, err := s.rehearse(ctx, ca.State(), in.What)
	if err != nil || in.DryRun {
		change.DryRun = true
		return change, err
	}
	if r := change.CA.Rollover; r != nil {
		return change, api.NewProblem(api.CodeConflict, fmt.Sprintf("a rollover of the %s is under way since %s: `sallyport ca finish` or `sallyport ca abort` first", r.Kind, r.Since.Format(time.RFC3339)))
	}
	return s.turnCA(ctx, change, "ca.rotate", in.What, func(ctx context.Context, atLeast int64) (wire.CAState, error) {
		return ca.Rotate(ctx, in.What, atLeast)
	})
}

// abortCA turns a rollover round: everybody goes back.
func (s *Server) abortCA(ctx context.Context) (api.CAChange, error) {
	ca, err := s.rollable()
	if err != nil {
		return api.CAChange{}, err
	}
	r := ca.State().Rollover
	if r == nil {
		return api.CAChange{}, errNoRollover
	}
	change := api.CAChange{Notes: []string{"the rollover goes back: `sallyport ca finish` ends it when every party is back"}}
	if r.Aborted {
		change.Notes = []string{"the rollover had been aborted, and goes on now: `sallyport ca finish` ends it when every party has moved, `sallyport ca abort` goes back again"}
	}
	return s.turnCA(ctx, change, "ca.abort", r.Kind, ca.Abort)
}

var errNoRollover = api.NewProblem(api.CodeConflict, "no rollover is under way: `sallyport ca rotate` begins one")

// finishCA ends a rollover: what was given up is trusted no longer.
func (s *Server) finishCA(ctx context.Context, in api.FinishCA) (api.CAChange, error) {
	ca, err := s.rollable()
	if err != nil {
		return api.CAChange{}, err
	}
	if err := s.catchUp(ctx); err != nil {
		return api.CAChange{}, err
	}
	state := ca.State()
	switch {
	case state.Rollover == nil:
		return api.CAChange{}, errNoRollover
	case state.Rollover.Named:
		return api.CAChange{}, api.NewProblem(api.CodeConflict, fmt.Sprintf("the external CA at %s still issues below the old root: have it issue below the new one first (`sallyport ca show` says when that is taken over), or `sallyport ca abort`", state.External))
	}
	view, err := s.caView(ctx, state)
	if err != nil {
		return api.CAChange{}, err
	}
	change := api.CAChange{CA: view, Offline: view.Left, Joins: view.Joins, Notes: finishNotes(view, in.Forget)}
	if r := state.Rollover; r.Kind == wire.RolloverRoot {
		if err := s.tellDoors(ctx, &change, state.RootOf(r.From).Key, true); err != nil {
			return change, err
		}
	}
	if in.DryRun {
		change.DryRun = true
		return change, nil
	}
	if n := len(change.Certificates); n > 0 && !in.Force {
		return change, api.NewProblem(api.CodeConflict, fmt.Sprintf("%d certificates that left by the doors hang on the root that would be given up: %s; let their programs renew them (`sallyport ca finish --dry-run` lists them), revoke those that are gone for good, or add --force", n, someCertificates(change.Certificates)))
	}
	if len(view.Left) > 0 && !in.Force {
		return change, api.NewProblem(api.CodeConflict, fmt.Sprintf("%d of %d parties are left: %s; wait for them (`sallyport ca show`), remove those that are gone for good, or add --force: those that come back later are renewed then", len(view.Left), view.Parties, someOf(view.Left)))
	}
	return s.turnCA(ctx, change, "ca.finish", fmt.Sprintf("%s, %d parties and %d certificates of doors left, forget %t", state.Rollover.Kind, len(view.Left), len(change.Certificates), in.Forget), func(ctx context.Context, atLeast int64) (wire.CAState, error) {
		return ca.Finish(ctx, in.Forget, atLeast)
	})
}

// trustsOfAGeneration is how far apart the numbers of lists of roots are before
// and after a restoration: parties may hold lists that the backup does not know,
// and would take a list of the same number for the one that they have.
const trustsOfAGeneration = 1000

// turnCA changes the issuers, and lets everybody know.
func (s *Server) turnCA(ctx context.Context, change api.CAChange, what, detail string, turn func(context.Context, int64) (wire.CAState, error)) (api.CAChange, error) {
	atLeast, _ := s.id.Trust()
	atLeast = max(atLeast, (s.store.Installation().Generation-1)*trustsOfAGeneration)
	audit := func(ctx context.Context, td, detail string) error {
		return s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
			tx.Audit(ctx, what, td, detail)
			return nil
		})
	}
	// The change is in the authority's files, perhaps on another host: no transaction
	// is held open for it. None is made without a trace of who asked for it.
	if err := audit(ctx, s.id.TrustDomain(), detail+"; begun"); err != nil {
		return change, err
	}
	state, err := turn(ctx, atLeast)
	if unanswered(err) {
		s.log.WarnContext(ctx, "the certificate authority gave no answer: it may have changed its issuers", "what", what, "detail", detail, "error", err)
		return change, api.NewProblem(api.CodeUnavailable, fmt.Sprintf("the certificate authority gave no answer, and may have changed its issuers nevertheless: look at `sallyport ca show` in a minute, before you repeat it: %v", err))
	}
	if err != nil { // the authority says what is in the way
		s.log.WarnContext(ctx, "the certificate authority did not change its issuers", "what", what, "detail", detail, "error", err)
		if away(err) {
			return change, api.NewProblem(api.CodeUnavailable, fmt.Sprintf("%v, and changed nothing: %v", errAway, err))
		}
		if !errors.Is(err, wire.ErrRollover) { // it would do it, and cannot
			return change, api.NewProblem(api.CodeUnavailable, fmt.Sprintf("the certificate authority could not do it; look at `sallyport ca show` before you repeat it: %v", err))
		}
		return change, api.NewProblem(api.CodeConflict, err.Error())
	}
	ctx = context.WithoutCancel(ctx) // whoever asked may go away: what was changed is spread
	if err := audit(ctx, state.TrustDomain, fmt.Sprintf("%s; %s issues", detail, state.Issuing().Key.Fingerprint())); err != nil {
		s.log.Error("of a change of the certificate authority's issuers only the beginning is in the audit log", "what", what, "detail", detail, "error", err)
	}
	if err := s.catchUp(ctx); err != nil { // whoever asked must know that the step is taken: an abort that is repeated turns it round
		s.log.Error("renewal failed; it is tried again in a minute", "error", err)
		return change, api.NewProblem(api.CodeUnavailable, fmt.Sprintf("the issuers are changed; this gateway's own certificate is tried again within a minute: %v", err))
	}
	if err := s.enrolment.publish(ctx, nil); err != nil && !errors.Is(err, identity.ErrUnwritten) { // which is spread, and tried again
		s.log.Error("the revocation set that names the old issuer is not signed; it is tried again in a minute", "error", err)
		return change, api.NewProblem(api.CodeUnavailable, fmt.Sprintf("the issuers are changed; the revocation set that names the old one is tried again within a minute: %v", err))
	}
	s.fleet.askAll(wantPush, wire.RoleRCP, wire.RoleNode)
	change.CA, err = s.caView(ctx, state)
	return change, err
}

// unanswered tells whether a request to an authority in another process may
// have been served, and its answer lost. One that could not be dialled was asked
// nothing.
func unanswered(err error) bool {
	var op *net.OpError
	return away(err) && !(errors.As(err, &op) && op.Op == "dial")
}

// errAway says that an authority in another process is not there, or not now.
var errAway = errors.New("the certificate authority does not answer")

func away(err error) bool {
	var req *url.Error
	return errors.As(err, &req)
}

// rehearse says what a rollover would do.
func (s *Server) rehearse(ctx context.Context, state wire.CAState, what string) (api.CAChange, error) {
	c := api.CAChange{Offline: []api.CAParty{}, Joins: []api.CAJoin{}}
	var err error
	if c.CA, err = s.caView(ctx, state); err != nil {
		return c, err
	}
	parties, err := s.certified(ctx)
	if err != nil {
		return c, err
	}
	held, err := s.store.PartyTrusts(ctx)
	if err != nil {
		return c, err
	}
	now, late, lost := time.Now(), 0, 0
	next := what == wire.RolloverRoot && state.Rollover == nil
	before, after := state.Forgotten(false), state.Forgotten(next)
	for _, p := range parties {
		if p.Connected {
			continue
		}
		p.Reason = "it is renewed when it comes back"
		root := rootOfLeaf(state, held[p.ID].Issuer)
		p.Lost = after[root]
		switch {
		case now.After(p.Until):
			late++
			p.Reason = "its leaf ended too long ago: it needs a new join code in any case"
		case before[root]:
			late++
			p.Reason = "it knows no root that still vouches for what issues: it needs a new join code in any case"
		case after[root]:
			lost++
			p.Reason = "it missed earlier changes of the root, and this one ends what still vouches for it: bring it back before, or it needs a new join code"
		}
		c.Offline = append(c.Offline, p)
	}
	c.Notes = append(c.Notes, fmt.Sprintf("%d parties get a new leaf: %d at once, %d when they come back", len(parties)-late-lost, len(parties)-len(c.Offline), len(c.Offline)-late-lost))
	if lost > 0 {
		c.Notes = append(c.Notes, fmt.Sprintf("%d parties are lost by this, for they missed earlier changes of the root and %d roots vouch at most: bring them back before (they are listed as offline), or they need a new join code", lost, wire.MaxRoots))
	}
	if late > 0 {
		c.Notes = append(c.Notes, fmt.Sprintf("%d parties have been away for too long to be renewed, rollover or not", late))
	}
	if state.Rollover != nil {
		c.Notes = append(c.Notes, fmt.Sprintf("a rollover of the %s is under way: this one would be refused until it is finished or aborted", state.Rollover.Kind))
	}
	c.Notes = append(c.Notes, "a backup of the pki directory made before this knows nothing of the new issuer: make one afterwards, and again after `sallyport ca finish`")
	if what == wire.RolloverIntermediate {
		return c, nil
	}
	if c.Joins, err = s.foreignJoins(ctx, wire.CAIssuer{}, state, next); err != nil {
		return c, err
	}
	if err := s.tellDoors(ctx, &c, state.RootOf(state.Issuing().Key).Key, false); err != nil {
		return c, err
	}
	useless := lostJoins(c.Joins)
	if n := len(c.Joins) - useless; n > 0 {
		c.Notes = append(c.Notes, fmt.Sprintf("%d open join codes pin the root that would be given up: they work until `sallyport ca finish`, and for a year after it unless that is told to --forget", n))
	}
	if useless > 0 {
		c.Notes = append(c.Notes, fmt.Sprintf("%d open join codes pin a root that vouches for nothing any more from then on: make new ones in their place", useless))
	}
	c.Notes = append(c.Notes, "programs that trust the root by its certificate and are no parties (SALLYPORT_CA_FILE, clients of the ACME and EST doors, a monitored CRL) are not reached by this: give them the new one, which stands at /doors/ca.pem beside the old one until `sallyport ca finish`, and let servers renew what the old one certified before that")
	return c, nil
}

// finishNotes say what a finish leaves behind.
func finishNotes(v api.CA, forget bool) []string {
	notes := []string{fmt.Sprintf("%d of %d parties have moved", v.Moved, v.Parties)}
	lost := 0
	for _, p := range v.Left {
		if p.Lost {
			lost++
		}
	}
	if lost > 0 {
		notes = append(notes, fmt.Sprintf("%d that missed this and earlier changes of the root need a new join code", lost))
	}
	if n := len(v.Left) - lost; n > 0 {
		after := "they are renewed when they come back"
		if v.Rollover.Kind == wire.RolloverRoot {
			after = "they are renewed when they come back within a year"
			if forget {
				after = "they need a new join code"
			}
		}
		notes = append(notes, fmt.Sprintf("%d are left: %s", n, after))
	}
	useless := lostJoins(v.Joins)
	if useless > 0 {
		notes = append(notes, fmt.Sprintf("%d open join codes pin a root that vouches for nothing any more: they are of no use", useless))
	}
	if n := len(v.Joins) - useless; n > 0 {
		after := "they work for another year"
		if forget {
			after = "they are of no use any more"
		}
		notes = append(notes, fmt.Sprintf("%d open join codes pin the root that is given up: %s", n, after))
	}
	return notes
}

func lostJoins(joins []api.CAJoin) (n int) {
	for _, j := range joins {
		if j.Lost {
			n++
		}
	}
	return n
}

// someOf names the first few.
func someOf(parties []api.CAParty) string {
	slices.SortStableFunc(parties, func(a, b api.CAParty) int { return cmp.Compare(a.Role, b.Role) })
	return fewOf(parties, func(p api.CAParty) string { return fmt.Sprintf("%s %s", p.Role, p.Name) })
}

// fewOf names the first few of a list, and says how many more there are.
func fewOf[T any](list []T, name func(T) string) string {
	const most = 5
	text := ""
	for i, v := range list {
		if i == most {
			return text + fmt.Sprintf(" and %d more", len(list)-most)
		}
		if i > 0 {
			text += ", "
		}
		text += name(v)
	}
	return text
}

// retired tells whether the authority gave up the intermediate with that key.
func (e *enrolment) retired(key wire.KeyHash) bool {
	return slices.ContainsFunc(e.retiredKeys(), func(k *store.Key) bool { return k.KeyHash == key })
}
