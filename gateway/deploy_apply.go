package gateway

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"sallyport/gateway/api"
	"sallyport/gateway/bus"
	"sallyport/gateway/manifest"
	"sallyport/gateway/store"
)

// change runs f in a transaction, computes the desired states that follow from
// it and pushes them. A dry run does exactly the same, and takes it back.
func (s *Server) change(ctx context.Context, dryRun bool, f func(ctx context.Context, tx *store.Tx, out *api.Applied) error) (api.Applied, error) {
	out := api.Applied{DryRun: dryRun, Objects: []api.AppliedObject{}, Nodes: []api.PlannedNode{}, Conflicts: []string{}, Warnings: []string{}}
	var plans []nodePlan
	run := s.store.Update
	if dryRun {
		run = s.store.Try
	}
	err := run(ctx, func(ctx context.Context, tx *store.Tx) error {
		if err := f(ctx, tx, &out); err != nil {
			return err
		}
		var err error
		if plans, err = s.replan(ctx, tx); err != nil {
			return err
		}
		restored, conflicts, err := fileEffects(ctx, tx, plans)
		out.Files, out.Conflicts = restored, append(out.Conflicts, conflicts...)
		if err != nil {
			return err
		}
		return s.settleIn(ctx, tx)
	})
	if err != nil {
		return api.Applied{}, err
	}
	for _, p := range plans {
		n := api.PlannedNode{ID: p.node.ID, Node: p.node.Name, Online: s.fleet.Presence(p.node.ID).Connected, Add: list(p.add), Change: list(p.change), Remove: list(p.remove)}
		if !dryRun {
			n.Revision = p.desired.Revision()
		}
		if !n.Online {
			out.Offline++
		}
		out.Nodes = append(out.Nodes, n)
	}
	out.Summary = summary(out)
	if !dryRun {
		s.pushPlans(plans)
	}
	return out, nil
}

// summary says in one line what happens.
func summary(a api.Applied) string {
	verb := "changes"
	if len(a.Nodes) != 1 {
		verb = "change"
	}
	return fmt.Sprintf("%s %s, %s restored, %d offline", plural(len(a.Nodes), "node"), verb, plural(a.Files, "file"), a.Offline)
}

// apply creates and changes what stands in manifests, all or none.
func (s *Server) apply(ctx context.Context, in api.Apply) (api.Applied, error) {
	switch in.Kind {
	case "", manifest.KindPolicy, manifest.KindDeployment:
	default:
		return api.Applied{}, api.NewProblem(api.CodeInvalid, fmt.Sprintf("unknown kind %q (want policy or deployment)", in.Kind))
	}
	set, err := parseManifests(in.Manifests)
	if err != nil {
		return api.Applied{}, err
	}
	skipped := len(set.Rules) // rule apply is for certificate officers
	if in.Kind == manifest.KindPolicy {
		skipped, set.Deployments = skipped+len(set.Deployments), nil
	}
	if in.Kind == manifest.KindDeployment {
		skipped, set.Policies = skipped+len(set.Policies), nil
	}
	if len(set.Policies)+len(set.Deployments) == 0 {
		return api.Applied{}, api.NewProblem(api.CodeInvalid, fmt.Sprintf("there is no document to apply (%d of another kind)", skipped))
	}
	return s.change(ctx, in.DryRun, func(ctx context.Context, tx *store.Tx, out *api.Applied) error {
		out.Skipped = skipped
		return s.applySet(ctx, tx, set, out)
	})
}

// parseManifests reads files of documents, and finds the faults of all of them.
func parseManifests(files []api.Manifest) (set manifest.Set, err error) {
	var faults manifest.Errors
	for _, m := range files {
		name := m.File
		if name == "" {
			name = "-"
		}
		if err := set.Parse(name, []byte(m.Text)); err != nil {
			// Parse has no other errors.
			if e, ok := err.(manifest.Errors); ok { //nolint:errorlint // see above
				faults = append(faults, e...)
			}
		}
	}
	if len(faults) > 0 {
		return set, faults
	}
	return set, nil
}

func (s *Server) applySet(ctx context.Context, tx *store.Tx, set manifest.Set, out *api.Applied) error {
	note := func(kind, name, change string, version int64) {
		out.Objects = append(out.Objects, api.AppliedObject{Kind: kind, Name: name, Change: change, Version: version})
		if change != store.Unchanged {
			tx.Audit(ctx, kind+".apply", kind+" "+name, fmt.Sprintf("%s, version %d", change, version))
		}
	}
	touched := map[string]bool{} // policies with a new version
	for _, d := range set.Policies {
		p := &store.Policy{Tenant: store.DefaultTenant, Name: d.Name, Type: d.Type, Spec: string(d.Spec)}
		change, err := tx.PutPolicy(ctx, p)
		if err != nil {
			return fmt.Errorf("policy %s: %w", d.Name, err)
		}
		touched[d.Name] = change != store.Unchanged
		note(manifest.KindPolicy, d.Name, change, p.Version)
	}
	var faults manifest.Errors
	for _, d := range set.Deployments {
		for _, name := range d.Policies {
			if _, err := tx.Policy(ctx, store.DefaultTenant, name); err != nil {
				faults = append(faults, &manifest.Error{Pos: d.Pos, Message: fmt.Sprintf("deployment %s names the policy %q, which does not exist", d.Name, name)})
			}
		}
	}
	if len(faults) > 0 {
		return faults
	}
	for _, d := range set.Deployments {
		row := &store.Deployment{Tenant: store.DefaultTenant, Name: d.Name, Selector: d.Selector, Policies: d.Policies, MinNodes: d.Min, MaxNodes: d.Max}
		if d.Rollout != nil {
			row.Rollout = &store.Rollout{MaxParallel: d.Rollout.MaxParallel, MaxFailures: d.Rollout.MaxFailures}
			out.Warnings = append(out.Warnings, fmt.Sprintf("%s: deployment %s: its rollout is kept, but this version changes all nodes at once", d.Pos, d.Name))
		}
		change, err := tx.PutDeployment(ctx, row, slices.ContainsFunc(d.Policies, func(p string) bool { return touched[p] }))
		if err != nil {
			return fmt.Errorf("deployment %s: %w", d.Name, err)
		}
		note(manifest.KindDeployment, d.Name, change, row.Revision)
	}
	return s.touchDeployments(ctx, tx, touched, set.Deployments)
}

// touchDeployments raises the revision of the deployments, other than those
// that were just applied, of which a policy has changed.
func (s *Server) touchDeployments(ctx context.Context, tx *store.Tx, touched map[string]bool, applied []manifest.Deployment) error {
	all, err := tx.Deployments(ctx, store.DefaultTenant)
	if err != nil {
		return err
	}
	for _, d := range all {
		done := slices.ContainsFunc(applied, func(a manifest.Deployment) bool { return a.Name == d.Name })
		if done || !d.DeletedAt.IsZero() || !slices.ContainsFunc(d.Policies, func(p string) bool { return touched[p] }) {
			continue
		}
		if _, err := tx.PutDeployment(ctx, d, true); err != nil {
			return fmt.Errorf("deployment %s: %w", d.Name, err)
		}
	}
	return nil
}

// rollback makes an older version of a policy the current one, as a new
// version; to 0 is the version before the current one. check sees the current
// version before anything changes.
func (s *Server) rollback(ctx context.Context, name string, to int64, check func(version int64) error) (api.Applied, error) {
	return s.change(ctx, false, func(ctx context.Context, tx *store.Tx, out *api.Applied) error {
		versions, err := tx.PolicyVersions(ctx, store.DefaultTenant, name)
		if err != nil {
			return err
		}
		if len(versions) == 0 {
			return store.ErrNotFound
		}
		if err := check(versions[0].Version); err != nil {
			return err
		}
		if to == 0 && len(versions) > 1 {
			to = versions[1].Version
		}
		i := slices.IndexFunc(versions, func(p *store.Policy) bool { return p.Version == to })
		if i < 0 {
			return api.NewProblem(api.CodeNotFound, fmt.Sprintf("policy %s has no version %d to go back to", name, to))
		}
		p := &store.Policy{Tenant: store.DefaultTenant, Name: name, Type: versions[i].Type, Spec: versions[i].Spec}
		change, err := tx.PutPolicy(ctx, p)
		if err != nil {
			return err
		}
		tx.Audit(ctx, "policy.rollback", "policy "+name, fmt.Sprintf("to version %d, as version %d", to, p.Version))
		out.Objects = append(out.Objects, api.AppliedObject{Kind: manifest.KindPolicy, Name: name, Change: change, Version: p.Version})
		return s.touchDeployments(ctx, tx, map[string]bool{name: change != store.Unchanged}, nil)
	})
}

// runDeploy computes the desired states at the start, and again whenever the
// addresses change at which nodes reach us.
func (s *Server) runDeploy(ctx context.Context) error {
	wakes, cancel := s.bus.Subscribe(bus.RCPs)
	defer cancel()
	last := "" // differs from any answer: the first look always computes
	for {
		now, err := s.addressBook(ctx)
		if err == nil && now != last {
			if err = s.changed(ctx); err == nil {
				last = now
			}
		}
		if err != nil && ctx.Err() == nil {
			s.log.Error("desired states not computed; it is tried again with the next change of an rcp", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-wakes:
		}
	}
}

// addressBook is the list of addresses that desired states carry, as text.
func (s *Server) addressBook(ctx context.Context) (string, error) {
	rcps, err := s.store.RCPs(ctx)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	b.WriteString("addresses")
	for _, a := range s.addresses(rcps) {
		fmt.Fprintf(&b, "\n%s %s %q", a.ID, a.Name, a.Addresses)
	}
	return b.String(), nil
}
