package gateway

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

const (
	// sourceFile stands where the address of a party stands.
	sourceFile = "file"
	// maxFileSkew is how far ahead of the gateway's clock the one of a party
	// may be that made a request; one behind only makes it look older.
	maxFileSkew = 72 * time.Hour
	// maxRevocationsInFile leaves room for the rest of an answer; a larger set
	// follows in the first session.
	maxRevocationsInFile = wire.MaxOfflineAnswer / 4
)

// importRequest puts the request in a file beside those of parties that wait.
// The file proves that its maker holds the key, and nothing else: it is judged
// like any other.
func (e *enrolment) importRequest(ctx context.Context, in api.ImportRequest) (*store.Request, error) {
	env, err := wire.ParseOffline([]byte(in.File), wire.PEMOfflineRequest, wire.MaxOfflineRequest)
	if err != nil {
		return nil, api.NewProblem(api.CodeInvalid, "request: "+err.Error())
	}
	r, key, err := identity.OpenRequest(env)
	if err != nil {
		return nil, api.NewProblem(api.CodeInvalid, "request: "+err.Error())
	}
	if p := e.strange(r); p != nil {
		return nil, p
	}
	r.Request.Token, r.Request.Expired = "", nil // a token is shown in a session with a gateway only
	from := origin{spot: spot{address: sourceFile}}
	var d *decision
	var q *store.Request
	err = e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) (err error) {
		if d, err = e.decide(ctx, tx.Queries, key, &r.Request, from); err != nil {
			return err
		}
		if err := e.write(ctx, tx, d, key, &r.Request, from); err != nil {
			return err
		}
		q, err = tx.LastRequest(ctx, key)
		if errors.Is(err, store.ErrNotFound) {
			q, err = nil, nil
		}
		if err == nil && queued(d, q) {
			tx.Audit(ctx, "request.import", q.Name, fmt.Sprintf("%s %s, %s", q.Role, q.PartyID, key.Fingerprint()))
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("import request of %s %s: %w", r.Request.Role, wire.Quotable(string(r.Request.ID)), err)
	}
	e.registered(ctx, d, key, &r.Request, from)
	switch {
	case queued(d, q):
		return q, nil
	case d.known && q != nil:
		return nil, api.NewProblem(api.CodeConflict, fmt.Sprintf("request %s of this key is %s already: `sallyport request export %s FILE` writes its certificate", q.ID, q.State, q.ID))
	case d.known:
		return nil, api.NewProblem(api.CodeConflict, fmt.Sprintf("the key %s has its certificate already, as %s", key.Fingerprint(), d.name))
	case d.state == "": // an operator discarded it
		return nil, api.NewProblem(api.CodeConflict, fmt.Sprintf("request %s of this key was discarded: let the party make a new key (move its identity directory away)", q.ID))
	case d.state == wire.EnrollDenied:
		return nil, api.NewProblem(api.CodeConflict, fmt.Sprintf("refused (%s): %s", d.code, d.reason))
	}
	return nil, api.NewProblem(api.CodeConflict, d.reason) // too many wait
}

// queued tells whether a decision made a request that goes on, which is q.
func queued(d *decision, q *store.Request) bool {
	return q != nil && !d.known && (d.state == wire.EnrollPending && q.State == api.RequestPending || d.state == wire.EnrollGranted && q.State == api.RequestGranted)
}

// strange refuses a file that is for somebody else, or out of date: the one who
// carries it is told while the party is still at hand.
func (e *enrolment) strange(r wire.OfflineRequest) *api.Problem {
	age := time.Since(r.Request.Time)
	switch {
	case r.TrustDomain != e.id.TrustDomain():
		return api.NewProblem(api.CodeConflict, fmt.Sprintf("the request is for the trust domain %q, this is %s: make it with --ca-pin and --trust-domain as `sallyport ca pin` says",
			wire.Quotable(r.TrustDomain), e.id.TrustDomain()))
	case !e.id.Trusts(r.Root):
		return api.NewProblem(api.CodeConflict, fmt.Sprintf("the party has pinned the root %s, which is not ours: make the request with --ca-pin %s", r.Root.Fingerprint(), wire.KeyOf(e.ca.Root()).Fingerprint()))
	case age > requestLife:
		return api.NewProblem(api.CodeConflict, fmt.Sprintf("the request was made on %s, more than %d days ago: make a new one (`sallyport local csr`)", r.Request.Time.UTC().Format(time.RFC3339), int(requestLife.Hours()/24)))
	case age < -maxFileSkew:
		return api.NewProblem(api.CodeConflict, fmt.Sprintf("the request was made on %s, by the party's clock: set that clock, and make a new one", r.Request.Time.UTC().Format(time.RFC3339)))
	}
	return nil
}

// exportRequest issues the certificate of a granted request, for a file. The
// request is delivered with that: whether the file arrives nobody here can
// know before the party connects, and it can be written again, for the same
// key, as long as that is in force.
func (e *enrolment) exportRequest(ctx context.Context, ref string) (out api.ExportedRequest, err error) {
	q, err := e.granted(ctx, e.store.Queries, ref)
	if err != nil {
		return out, err
	}
	d := &decision{party: wire.Party{Role: q.Role, ID: q.PartyID, TrustDomain: e.id.TrustDomain()}, name: q.Name, tenant: q.Tenant}
	if e.id.Revoked(q.KeyHash) {
		return out, api.NewProblem(api.CodeConflict, "the key of this request is revoked: the party makes a new one when it is given a new join code")
	}
	if _, err := e.knownKey(ctx, e.store.Queries, d, q.KeyHash); err != nil {
		return out, err
	}
	switch {
	case d.state == wire.EnrollDenied:
		return out, api.NewProblem(api.CodeConflict, d.reason)
	case !d.known:
		return out, api.NewProblem(api.CodeConflict, fmt.Sprintf("the key of request %s is not in force any more: another took its place, its %s was removed, or its certificate ended too long ago", q.ID, q.Role))
	}
	rcps, err := e.store.RCPs(ctx)
	if err != nil {
		return out, err
	}
	a := wire.OfflineAnswer{Key: q.KeyHash, Issued: time.Now().UTC(), Verdict: wire.EnrollVerdict{
		State: wire.EnrollGranted, Party: d.party, Name: d.name, Installation: e.store.Installation().UID,
		Trust: e.trustOf(), RCPs: waysIn(rcps, usableRCP, e.id.ID(), e.public),
	}}
	if env, ok := e.ca.Revocations(); ok && len(env.Payload) < maxRevocationsInFile {
		a.Verdict.Revocations = &env
	}
	c, err := e.issue(ctx, wire.IssueRequest{Party: d.party, Name: d.name, Tenant: d.tenant, CSR: q.CSR})
	if err != nil {
		return out, err
	}
	a.Verdict.Chain = c.chain
	env, err := e.id.Sign(wire.TypeOfflineAnswer, a)
	if err != nil {
		return out, err
	}
	file, err := wire.AppendOffline(nil, wire.PEMOfflineAnswer, env)
	if err != nil {
		return out, err
	}
	if len(file) > wire.MaxOfflineAnswer {
		return out, fmt.Errorf("answer to request %s: %w", q.ID, wire.ErrTooLarge)
	}
	if err := e.exported(ctx, q, d, c); err != nil {
		return out, err
	}
	return api.ExportedRequest{Request: requestView(q), Ways: a.Verdict.RCPs, File: string(file)}, nil
}

// exported writes down that the certificate of q went into a file.
func (e *enrolment) exported(ctx context.Context, q *store.Request, d *decision, c *issued) error {
	return e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		if err := c.record(ctx, tx, d.party, d.name, d.tenant); err != nil {
			return err
		}
		if d.party.Role == wire.RoleRCP {
			r, err := tx.RCP(ctx, d.name)
			if err != nil {
				return err
			}
			if r.State == api.RCPPending {
				if err := tx.SetRCPState(ctx, d.name, api.RCPConnecting, "its certificate was exported to a file; it was not connected yet"); err != nil {
					return err
				}
			}
		}
		tx.Audit(ctx, "request.export", d.name, fmt.Sprintf("request %s, %s", q.ID, q.KeyHash.Fingerprint()))
		tx.Audit(ctx, "certificate.issue", d.name, fmt.Sprintf("%s, %s", d.party, q.KeyHash.Fingerprint()))
		q.State, q.Reason, q.SeenAt = api.RequestDelivered, "exported to a file on "+tx.Now().UTC().Format(time.RFC3339), tx.Now()
		return tx.SaveRequest(ctx, q)
	})
}

// granted resolves what an operator calls a request that has its grant. One
// whose party gave way to another of its name is not meant while that is there.
func (e *enrolment) granted(ctx context.Context, q store.Queries, ref string) (*store.Request, error) {
	found, err := q.FindGranted(ctx, ref)
	if err != nil {
		return nil, err
	}
	if len(found) > 1 {
		var live []*store.Request
		for _, r := range found {
			k, err := q.Key(ctx, r.KeyHash)
			if err != nil && !errors.Is(err, store.ErrNotFound) {
				return nil, err
			}
			if err == nil && k.RevokedAt.IsZero() {
				live = append(live, r)
			}
		}
		if len(live) > 0 {
			found = live
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		waiting, err := q.FindRequests(ctx, ref)
		if err == nil && len(waiting) > 0 {
			return nil, api.NewProblem(api.CodeConflict, fmt.Sprintf("request %s still waits: grant it first (`sallyport request grant %s`)", waiting[0].ID, waiting[0].ID))
		}
		return nil, api.NewProblem(api.CodeNotFound, fmt.Sprintf("no granted request %q", wire.Quotable(ref)))
	}
	return nil, api.NewProblem(api.CodeAmbiguous, fmt.Sprintf("%d granted requests fit %q: name one by its ID", len(found), wire.Quotable(ref)))
}
