package gateway

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/danielgtaylor/huma/v2"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
)

func (r *rest) deployRoutes() {
	op := func(id, method, path, summary string) huma.Operation {
		return huma.Operation{OperationID: id, Method: method, Path: path, Summary: summary}
	}
	apply := op("apply", http.MethodPost, "/apply", "Create and change policies and deployments, all or none")
	apply.MaxBodyBytes, apply.BodyReadTimeout = maxApply, apiReadTime
	handle(r, apply, mayOperate, r.apply)
	handle(r, op("policy.list", http.MethodGet, "/policies", "List policies by name"), mayRead, r.listPolicies)
	handle(r, op("policy.show", http.MethodGet, "/policies/{ref}", "Show a policy with all its versions"), mayRead, r.showPolicy)
	handle(r, op("policy.rollback", http.MethodPost, "/policies/{ref}/rollback", "Make an older version the current one"), mayOperate, r.rollbackPolicy)
	handle(r, op("policy.delete", http.MethodDelete, "/policies/{ref}", "Delete a policy that no deployment names"), mayOperate, r.deletePolicy)
	handle(r, op("deployment.list", http.MethodGet, "/deployments", "List deployments by name"), mayRead, r.listDeployments)
	handle(r, op("deployment.status", http.MethodGet, "/deployments/{ref}", "Show a deployment with each node's state"), mayRead, r.showDeployment)
	handle(r, op("deployment.delete", http.MethodDelete, "/deployments/{ref}", "Take a deployment's policies off the nodes"), mayOperate, r.deleteDeployment)
}

func (r *rest) apply(ctx context.Context, in *body[api.Apply]) (*body[api.Applied], error) {
	out, err := r.s.apply(ctx, in.Body)
	if err != nil {
		return nil, err
	}
	return answer(out), nil
}

// deploymentsOf tells which live deployments name each policy.
func deploymentsOf(ds []*store.Deployment) map[string][]string {
	out := map[string][]string{}
	for _, d := range ds {
		if d.DeletedAt.IsZero() {
			for _, p := range d.Policies {
				out[p] = append(out[p], d.Name)
			}
		}
	}
	return out
}

func policyView(p *store.Policy, deployments []string) api.Policy {
	return api.Policy{
		Name: p.Name, Type: p.Type, Version: p.Version, Digest: p.Digest, Created: utc(p.CreatedAt), CreatedBy: p.CreatedBy, Deployments: list(deployments), ETag: etag(p.Version),
	}
}

func (r *rest) listPolicies(ctx context.Context, in *Page) (*body[api.List[api.Policy]], error) {
	rows, err := r.s.store.PolicyHeads(ctx, store.DefaultTenant)
	if err != nil {
		return nil, err
	}
	ds, err := r.s.store.Deployments(ctx, store.DefaultTenant)
	if err != nil {
		return nil, err
	}
	named := deploymentsOf(ds)
	out := make([]api.Policy, len(rows))
	for i, p := range rows {
		out[i] = policyView(p, named[p.Name])
	}
	l, err := slicePage(out, *in, func(p api.Policy) string { return p.Name })
	return answer(l), err
}

// policy finds the policy that a reference means.
func (r *rest) policy(ctx context.Context, ref string, changing bool) (*store.Policy, error) {
	all, err := r.s.store.Policies(ctx, store.DefaultTenant)
	if err != nil {
		return nil, err
	}
	return pick("policy", ref, changing, all, func(p *store.Policy) (string, string) { return "", p.Name })
}

func (r *rest) showPolicy(ctx context.Context, in *ByRef) (*tagged[api.PolicyDetail], error) {
	p, err := r.policy(ctx, in.Ref, false)
	if err != nil {
		return nil, err
	}
	versions, err := r.s.store.PolicyVersions(ctx, p.Tenant, p.Name)
	if err != nil {
		return nil, err
	}
	ds, err := r.s.store.Deployments(ctx, store.DefaultTenant)
	if err != nil {
		return nil, err
	}
	d := api.PolicyDetail{Policy: policyView(p, deploymentsOf(ds)[p.Name])}
	d.Spec = []byte(p.Spec)
	for _, v := range versions {
		d.Versions = append(d.Versions, api.PolicyVersion{Version: v.Version, Type: v.Type, Digest: v.Digest, Created: utc(v.CreatedAt), CreatedBy: v.CreatedBy, Spec: []byte(v.Spec)})
	}
	return &tagged[api.PolicyDetail]{ETag: d.ETag, Body: d}, nil
}

type rollbackInput struct {
	ByRef
	Match
	Body api.Rollback
}

func (r *rest) rollbackPolicy(ctx context.Context, in *rollbackInput) (*body[api.Applied], error) {
	p, err := r.policy(ctx, in.Ref, true)
	if err != nil {
		return nil, err
	}
	out, err := r.s.rollback(ctx, p.Name, in.Body.To, in.check)
	if err != nil {
		return nil, err
	}
	return answer(out), nil
}

type deleteInput struct {
	ByRef
	Match
}

func (r *rest) deletePolicy(ctx context.Context, in *deleteInput) (*struct{}, error) {
	p, err := r.policy(ctx, in.Ref, true)
	if err != nil {
		return nil, err
	}
	return nil, r.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		now, err := tx.Policy(ctx, p.Tenant, p.Name)
		if err != nil {
			return err
		}
		if err := in.check(now.Version); err != nil {
			return err
		}
		ds, err := tx.Deployments(ctx, p.Tenant)
		if err != nil {
			return err
		}
		if named := deploymentsOf(ds)[p.Name]; len(named) > 0 {
			return api.NewProblem(api.CodeConflict, fmt.Sprintf("policy %s is named by the deployments %s: take it out of them first", p.Name, strings.Join(named, ", ")))
		}
		tx.Audit(ctx, "policy.delete", "policy "+p.Name, fmt.Sprintf("version %d", now.Version))
		return tx.DeletePolicy(ctx, p.Tenant, p.Name)
	})
}

func (r *rest) listDeployments(ctx context.Context, in *Page) (*body[api.List[api.Deployment]], error) {
	rows, err := r.s.store.Deployments(ctx, store.DefaultTenant)
	if err != nil {
		return nil, err
	}
	v, err := r.s.deployView(ctx, r.s.store.Queries)
	if err != nil {
		return nil, err
	}
	out := make([]api.Deployment, len(rows))
	for i, d := range rows {
		out[i] = v.status(d).Deployment
	}
	l, err := slicePage(out, *in, func(d api.Deployment) string { return d.Name })
	return answer(l), err
}

// deployment finds the deployment that a reference means.
func (r *rest) deployment(ctx context.Context, ref string, changing bool) (*store.Deployment, error) {
	all, err := r.s.store.Deployments(ctx, store.DefaultTenant)
	if err != nil {
		return nil, err
	}
	return pick("deployment", ref, changing, all, func(d *store.Deployment) (string, string) { return "", d.Name })
}

func (r *rest) showDeployment(ctx context.Context, in *ByRef) (*tagged[api.DeploymentStatus], error) {
	d, err := r.deployment(ctx, in.Ref, false)
	if err != nil {
		return nil, err
	}
	v, err := r.s.deployView(ctx, r.s.store.Queries)
	if err != nil {
		return nil, err
	}
	st := v.status(d)
	slices.SortStableFunc(st.Nodes, func(a, b api.DeploymentNode) int { return strings.Compare(a.Node, b.Node) })
	return &tagged[api.DeploymentStatus]{ETag: st.ETag, Body: st}, nil
}

func (r *rest) deleteDeployment(ctx context.Context, in *deleteInput) (*body[api.Applied], error) {
	d, err := r.deployment(ctx, in.Ref, true)
	if err != nil {
		return nil, err
	}
	out, err := r.s.change(ctx, false, func(ctx context.Context, tx *store.Tx, out *api.Applied) error {
		now, err := tx.Deployment(ctx, d.Tenant, d.Name)
		if err != nil {
			return err
		}
		if !now.DeletedAt.IsZero() {
			return api.NewProblem(api.CodeConflict, fmt.Sprintf("deployment %s is deleted already; it goes when the last node is free of it", d.Name))
		}
		if err := in.check(now.Revision); err != nil {
			return err
		}
		tx.Audit(ctx, "deployment.delete", "deployment "+d.Name, "")
		out.Objects = append(out.Objects, api.AppliedObject{Kind: "deployment", Name: d.Name, Change: "deleted", Version: now.Revision + 1})
		return tx.DeleteDeployment(ctx, d.Tenant, d.Name)
	})
	if err != nil {
		return nil, err
	}
	return answer(out), nil
}
