package gateway

import (
	"cmp"
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/selector"
	"sallyport/internal/wire"
)

func (r *rest) enrollRoutes() {
	r.ruleRoutes()
	r.offlineRoutes()
	op := func(id, method, path, summary string) huma.Operation {
		return huma.Operation{OperationID: id, Method: method, Path: path, Summary: summary}
	}
	handle(r, op("join.list", http.MethodGet, "/joins", "List join codes, newest first, without their secrets"), mayRead, r.listJoins)
	handle(r, op("join.create", http.MethodPost, "/joins", "Make a join code for nodes"), mayCertify, r.createJoin)
	handle(r, op("join.revoke", http.MethodPost, "/joins/{id}/revoke", "Make a join code useless"), mayCertify, r.revokeJoin)
	handle(r, op("request.list", http.MethodGet, "/requests", "List certificate requests, newest first"), mayRead, r.listRequests)
	for _, verb := range []string{verbGrant, verbDeny, verbDiscard} {
		o := op("request."+verb+"-many", http.MethodPost, "/requests/"+verb, "Decide on many requests: "+verb)
		o.MaxBodyBytes = maxBulkBody
		handle(r, o, mayCertify, func(ctx context.Context, in *body[api.DecideRequests]) (*body[api.DecidedRequests], error) {
			out, err := r.s.enrolment.decideMany(ctx, verb, in.Body)
			return answer(out), err
		})
	}
	handle(r, op("request.grant", http.MethodPost, "/requests/{ref}/grant", "Grant a request, by ID, or by a name that only it has"), mayCertify, r.grantRequest)
	handle(r, op("request.deny", http.MethodPost, "/requests/{ref}/deny", "Refuse a request, and tell the party so"), mayCertify, r.denyRequest)
	handle(r, op("request.discard", http.MethodPost, "/requests/{ref}/discard", "Forget a request silently"), mayCertify, r.discardRequest)
}

type ruleName struct {
	Name string `path:"name" maxLength:"256"`
}

func (r *rest) ruleRoutes() {
	op := func(id, method, path, summary string) huma.Operation {
		return huma.Operation{OperationID: id, Method: method, Path: path, Summary: summary}
	}
	apply := op("rule.apply", http.MethodPost, "/rules", "Create and change rules by which requests are granted")
	apply.MaxBodyBytes, apply.BodyReadTimeout = maxApply, apiReadTime
	handle(r, apply, mayCertify, func(ctx context.Context, in *body[api.ApplyRules]) (*body[api.AppliedRules], error) {
		out, err := r.s.enrolment.applyRules(ctx, in.Body)
		return answer(out), err
	})
	handle(r, op("rule.list", http.MethodGet, "/rules", "List rules by name"), mayRead, func(ctx context.Context, in *Page) (*body[api.List[api.Rule]], error) {
		rows, err := r.s.store.Rules(ctx, store.DefaultTenant)
		if err != nil {
			return nil, err
		}
		out := make([]api.Rule, len(rows))
		for i, row := range rows {
			out[i] = ruleView(row)
		}
		l, err := slicePage(out, *in, func(v api.Rule) string { return v.Name })
		return answer(l), err
	})
	handle(r, op("rule.delete", http.MethodDelete, "/rules/{name}", "Delete a rule; what it granted stays, and join codes that no other rule names grant by their token alone"), mayCertify, func(ctx context.Context, in *ruleName) (*struct{}, error) {
		return nil, r.s.enrolment.deleteRule(ctx, in.Name)
	})
}

// maxBulkBody is room for maxBulk names of the longest kind.
const maxBulkBody = maxBulk * (wire.MaxName + 8)

// list is never null in JSON.
func list(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}

func (r *rest) listJoins(ctx context.Context, in *Page) (*body[api.List[api.Join]], error) {
	rows, err := r.s.store.Joins(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]api.Join, len(rows))
	for i, j := range rows {
		out[i] = joinView(j, r.s.store.Installation().Generation)
	}
	l, err := slicePage(out, *in, func(j api.Join) string { return j.ID })
	return answer(l), err
}

func (r *rest) createJoin(ctx context.Context, in *body[api.CreateJoin]) (*body[api.CreatedJoin], error) {
	for k, v := range in.Body.Tags {
		if err := store.ValidTag(k, v); err != nil {
			return nil, api.NewProblem(api.CodeInvalid, err.Error())
		}
	}
	out, err := r.s.createJoin(ctx, in.Body)
	return answer(out), err
}

func (r *rest) revokeJoin(ctx context.Context, in *ByID) (*body[api.Join], error) {
	all, err := r.s.store.Joins(ctx)
	if err != nil {
		return nil, err
	}
	j, err := pick("join code", in.ID, true, all, func(j *store.Join) (string, string) { return j.ID, "" })
	if err != nil {
		return nil, err
	}
	err = r.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		tx.Audit(ctx, "join.revoke", "join "+j.ID, "")
		if err := tx.RevokeJoin(ctx, j.ID); err != nil {
			return err
		}
		j, err = tx.Join(ctx, j.ID)
		return err
	})
	if err != nil {
		return nil, err
	}
	return answer(joinView(j, r.s.store.Installation().Generation)), nil
}

func requestView(q *store.Request) api.Request {
	v := api.Request{
		ID: q.ID, Role: q.Role, PartyID: q.PartyID, Name: q.Name, Fingerprint: q.KeyHash.Fingerprint(), Source: q.Source, RCP: q.RCP, Tags: q.Tags,
		State: q.State, Reason: cmp.Or(q.Reason, q.Code), Requested: utc(q.RequestedAt), Decided: when(q.DecidedAt), DecidedBy: q.DecidedBy, Rule: q.Rule, Version: q.Program,
	}
	v.Device = deviceView(q)
	if q.Code != "" && q.State == api.RequestPending {
		v.Reason = q.Code // what waits says why in one word, such as name-in-use
	}
	if v.Tags == nil {
		v.Tags = map[string]string{}
	}
	return v
}

type listRequestsInput struct {
	Page
	State    string `query:"state" enum:"pending,granted,delivered,denied,discarded,failed,expired"`
	Selector string `query:"selector" doc:"Kubernetes label selector over tags."`
}

func (r *rest) listRequests(ctx context.Context, in *listRequestsInput) (*body[api.List[api.Request]], error) {
	sel := selector.Everything
	if in.Selector != "" {
		var err error
		if sel, err = selector.Parse(in.Selector); err != nil {
			return nil, api.NewProblem(api.CodeInvalid, err.Error())
		}
	}
	rows, err := r.s.store.Requests(ctx, in.State)
	if err != nil {
		return nil, err
	}
	out := make([]api.Request, 0, len(rows))
	for _, q := range rows {
		if sel.Matches(q.Tags) {
			out = append(out, requestView(q))
		}
	}
	l, err := slicePage(out, in.Page, func(q api.Request) string { return q.ID })
	return answer(l), err
}

type grantInput struct {
	ByRef
	Body api.Grant
}

func (r *rest) grantRequest(ctx context.Context, in *grantInput) (*body[api.Request], error) {
	return decided(r.s.enrolment.grant(ctx, in.Ref, in.Body))
}

type denyInput struct {
	ByRef
	Body api.Deny
}

func (r *rest) denyRequest(ctx context.Context, in *denyInput) (*body[api.Request], error) {
	return decided(r.s.enrolment.deny(ctx, in.Ref, in.Body))
}

func (r *rest) discardRequest(ctx context.Context, in *ByRef) (*body[api.Request], error) {
	return decided(r.s.enrolment.discard(ctx, in.Ref))
}

func decided(q *store.Request, err error) (*body[api.Request], error) {
	if err != nil {
		return nil, err
	}
	return answer(requestView(q)), nil
}
