package gateway

import (
	"context"
	"errors"
	"fmt"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

const (
	// maxBulk bounds the requests of one call: all that can wait.
	maxBulk = maxWaiting
	// bulkAtOnce is how many are decided in one transaction: enrolling nodes
	// and events wait no longer than that takes.
	bulkAtOnce = 100
	// bulkDryRun is the same for a dry run, which sees a clash of two requests
	// only within one transaction.
	bulkDryRun = 1000
)

// ruling is what an operator says of a request.
type ruling struct {
	verb        string // grant, deny, discard
	fingerprint string // of a grant of one request
	replace     bool
	tags        map[string]string // of a grant
	reason      string            // of a denial
}

// decideMany decides on requests one by one, in few transactions. A request
// that cannot be decided so stops none of the others; its result says why. A
// dry run computes the same and changes nothing.
func (e *enrolment) decideMany(ctx context.Context, verb string, in api.DecideRequests) (api.DecidedRequests, error) {
	out := api.DecidedRequests{Verb: verb, DryRun: in.DryRun, Results: []api.RequestResult{}}
	switch {
	case len(in.Refs) == 0:
		return out, api.NewProblem(api.CodeInvalid, "no request is named")
	case len(in.Refs) > maxBulk:
		return out, api.NewProblem(api.CodeInvalid, fmt.Sprintf("%d requests in one call: want at most %d", len(in.Refs), maxBulk))
	case in.Fingerprint != "" && len(in.Refs) > 1:
		return out, api.NewProblem(api.CodeInvalid, "one fingerprint is for one request")
	}
	if p := checkTags(in.Tags); p != nil {
		return out, p
	}
	v := ruling{verb: verb, fingerprint: in.Fingerprint, replace: in.Replace, tags: in.Tags, reason: clip(in.Reason)}
	atOnce := bulkAtOnce
	if in.DryRun {
		atOnce = bulkDryRun
	}
	for refs := in.Refs; len(refs) > 0; {
		some := refs[:min(len(refs), atOnce)]
		refs = refs[len(some):]
		results, err := e.decideSome(ctx, v, some, in.DryRun)
		if err != nil { // what was decided before stays
			return out, fmt.Errorf("%s requests: after %d of %d: %w", verb, len(out.Results), len(in.Refs), err)
		}
		out.Results = append(out.Results, results...)
	}
	for _, r := range out.Results {
		if r.Error == "" {
			out.Decided++
		} else {
			out.Failed++
		}
	}
	return out, nil
}

// decideSome is one transaction of decideMany.
func (e *enrolment) decideSome(ctx context.Context, v ruling, refs []string, dryRun bool) ([]api.RequestResult, error) {
	var results []api.RequestResult
	var done []*store.Request
	var parties []wire.Party
	var victims []victim
	run := e.store.Update
	if dryRun {
		run = e.store.Try
	}
	err := run(ctx, func(ctx context.Context, tx *store.Tx) error {
		results, done, parties, victims = nil, nil, nil, nil
		for _, ref := range refs {
			q, d, err := e.decideOne(ctx, tx, v, ref)
			var p *api.Problem
			switch {
			case errors.As(err, &p):
				r := api.RequestResult{Ref: ref, Error: p.Error(), Code: p.Code}
				if q, err := e.find(ctx, tx.Queries, ref, ""); err == nil { // whose row it is
					r.Request = new(requestView(q))
				}
				results = append(results, r)
				continue
			case err != nil:
				return fmt.Errorf("request %s: %w", wire.Quotable(ref), err)
			}
			view := requestView(q)
			results = append(results, api.RequestResult{Ref: ref, Request: &view})
			done = append(done, q)
			if d != nil {
				parties, victims = append(parties, d.party), append(victims, d.victims...)
			}
		}
		return nil
	})
	if err != nil || dryRun {
		return results, err
	}
	e.settle(ctx, parties, victims)
	for _, q := range done {
		if v.verb != verbDiscard {
			e.again(q.KeyHash)
		}
	}
	return results, nil
}

// The verbs of operators.
const (
	verbGrant   = "grant"
	verbDeny    = "deny"
	verbDiscard = "discard"
)

// decideOne decides on one request. A *api.Problem says that it cannot be
// decided so, and that nothing was written.
func (e *enrolment) decideOne(ctx context.Context, tx *store.Tx, v ruling, ref string) (*store.Request, *decision, error) {
	if v.verb == verbGrant {
		return e.grantOne(ctx, tx, ref, api.Grant{Fingerprint: v.fingerprint, Replace: v.replace, Tags: v.tags})
	}
	q, err := e.refuseOne(ctx, tx, ref, v)
	return q, nil, err
}
