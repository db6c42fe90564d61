package gateway

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"

	"github.com/danielgtaylor/huma/v2"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

func (r *rest) targetRoutes() {
	op := func(id, method, path, summary string) huma.Operation {
		return huma.Operation{OperationID: id, Method: method, Path: path, Summary: summary}
	}
	handle(r, op("target.list", http.MethodGet, "/targets", "List targets by name"), mayRead, r.listTargets)
	handle(r, op("target.show", http.MethodGet, "/targets/{ref}", "Show a target with the nodes that offer it"), mayRead, r.showTarget)
	handle(r, op("forward.list", http.MethodGet, "/forwards", "List TCP forwards by address"), mayRead, r.listForwards)
	handle(r, op("target.forward", http.MethodPost, "/forwards", "Listen on a TCP port that leads to a target; anything but loopback from port 1024 on needs the permission to administer"), mayOperate, r.addForward)
	handle(r, op("target.unforward", http.MethodDelete, "/forwards/{ref}", "Remove a TCP forward and cut its connections"), mayOperate, r.removeForward)
}

// kindBuiltin is the kind of a target that is answered inside the node.
const kindBuiltin = "builtin"

func (r *rest) listTargets(ctx context.Context, in *Page) (*body[api.List[api.Target]], error) {
	out := []api.Target{r.builtinTarget(wire.TargetEcho), r.builtinTarget(wire.TargetPing)}
	rows, err := r.s.store.Policies(ctx, store.DefaultTenant)
	if err != nil {
		return nil, err
	}
	for _, p := range rows {
		if p.Type != wire.PolicyTarget || wire.IsBuiltinTarget(p.Name) {
			continue
		}
		t, err := r.targetView(p)
		if err != nil {
			return nil, err
		}
		out = append(out, t)
	}
	slices.SortFunc(out, func(a, b api.Target) int { return cmp.Compare(a.Name, b.Name) })
	l, err := slicePage(out, *in, func(t api.Target) string { return t.Name })
	return answer(l), err
}

func (r *rest) builtinTarget(name string) api.Target {
	known, connected := r.s.fleet.allReachable()
	t := api.Target{Name: name, Kind: kindBuiltin, State: api.TargetReady, Nodes: known, Offered: known, Connected: connected,
		Streams: r.s.targets.usage(name).running}
	if connected == 0 {
		t.State, t.Reason = api.TargetUnavailable, "no node is connected"
	}
	return t
}

func (r *rest) targetView(p *store.Policy) (api.Target, error) {
	var spec wire.TargetSpec
	if err := json.Unmarshal([]byte(p.Spec), &spec); err != nil {
		return api.Target{}, fmt.Errorf("policy %s: %w", p.Name, err)
	}
	u := r.s.targets.usage(p.Name)
	t := api.Target{Name: p.Name, Kind: spec.Scheme(), Address: addressOf(&spec), State: api.TargetReady,
		Nodes: len(u.wanted), Offered: len(u.offered), Connected: r.s.fleet.reachable(u.offered), Streams: u.running}
	if spec.HTTP() {
		t.Timeout = timeoutOf(&spec)
	}
	switch {
	case t.Nodes == 0:
		t.State, t.Reason = api.TargetUnused, "no deployment brings it to a node"
	case t.Offered == 0:
		t.State, t.Reason = api.TargetUnavailable, fmt.Sprintf("none of %s has applied it: `sallyport target show %s` says why", plural(t.Nodes, "node"), p.Name)
	case t.Connected == 0:
		t.State, t.Reason = api.TargetUnavailable, fmt.Sprintf("of %s that offer it none is connected", plural(t.Offered, "node"))
	}
	return t, nil
}

func addressOf(s *wire.TargetSpec) string { return cmp.Or(s.URL, s.Address) }

func timeoutOf(s *wire.TargetSpec) wire.Duration { return cmp.Or(s.Timeout, wire.DefaultTargetTimeout) }

// target finds the policy of a target; it is nil for a built-in one.
func (r *rest) target(ctx context.Context, ref string, changing bool) (name string, p *store.Policy, err error) {
	if wire.IsBuiltinTarget(ref) {
		return ref, nil, nil
	}
	rows, err := r.s.store.Policies(ctx, store.DefaultTenant)
	if err != nil {
		return "", nil, err
	}
	rows = slices.DeleteFunc(rows, func(p *store.Policy) bool { return p.Type != wire.PolicyTarget })
	p, err = pick("target", ref, changing, rows, func(p *store.Policy) (string, string) { return "", p.Name })
	if err != nil {
		return "", nil, err
	}
	return p.Name, p, nil
}

func (r *rest) showTarget(ctx context.Context, in *ByRef) (*body[api.TargetDetail], error) {
	name, p, err := r.target(ctx, in.Ref, false)
	if err != nil {
		return nil, err
	}
	out := api.TargetDetail{On: []api.TargetNode{}, Forwards: []api.Forward{}}
	if p == nil {
		out.Target = r.builtinTarget(name)
	} else {
		if out.Target, err = r.targetView(p); err != nil {
			return nil, err
		}
		if out.On, err = r.targetNodes(ctx, name); err != nil {
			return nil, err
		}
	}
	rows, err := r.s.store.Forwards(ctx)
	if err != nil {
		return nil, err
	}
	for _, f := range rows {
		if f.Target == name {
			out.Forwards = append(out.Forwards, r.s.forwards.look(f))
		}
	}
	return answer(out), nil
}

// targetNodes lists the nodes that should offer a target, by name.
func (r *rest) targetNodes(ctx context.Context, name string) ([]api.TargetNode, error) {
	said, err := r.s.store.TargetStatus(ctx, name)
	if err != nil {
		return nil, err
	}
	u := r.s.targets.usage(name)
	out := make([]api.TargetNode, 0, len(u.wanted))
	for _, id := range u.wanted {
		p := r.s.fleet.Presence(id)
		if !p.Known { // removed
			continue
		}
		n := api.TargetNode{Node: p.Name, ID: id, State: wire.PolicyPending, Connected: r.s.fleet.reachable([]wire.ID{id}) > 0,
			Streams: r.s.targets.streamsBy(id), Avoided: when(r.s.targets.avoided(id, name))}
		if s, ok := said[id]; ok {
			n.State, n.Error = s.State, s.Error
		}
		if spec := u.specs[id]; spec != nil {
			n.Address = addressOf(spec)
		}
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b api.TargetNode) int { return cmp.Compare(a.Node, b.Node) })
	return out, nil
}

func (r *rest) listForwards(ctx context.Context, in *Page) (*body[api.List[api.Forward]], error) {
	rows, err := r.s.store.Forwards(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]api.Forward, len(rows))
	for i, f := range rows {
		out[i] = r.s.forwards.look(f)
	}
	l, err := slicePage(out, *in, func(f api.Forward) string { return f.Listen })
	return answer(l), err
}

func (r *rest) addForward(ctx context.Context, in *body[api.AddForward]) (*body[api.Forward], error) {
	listen, err := parseListen(in.Body.Listen)
	if err != nil {
		return nil, api.NewProblem(api.CodeInvalid, err.Error())
	}
	if err := mayListen(ctx, listen); err != nil {
		return nil, err
	}
	name, _, err := r.target(ctx, in.Body.Target, true)
	if err != nil {
		return nil, err
	}
	row := &store.Forward{Listen: listen.String(), Tenant: store.DefaultTenant, Target: name}
	if t := askerFrom(ctx).token; t != nil {
		row.TokenID = t.ID
	}
	detail := "by any node"
	if in.Body.Node != "" {
		n, err := r.node(ctx, in.Body.Node, true)
		if err != nil {
			return nil, err
		}
		row.NodeID, detail = n.ID, "by node "+n.Name
	}
	if err := r.s.forwards.add(ctx, row, detail); err != nil {
		return nil, err
	}
	return answer(r.s.forwards.look(row)), nil
}

// mayListen keeps operators to loopback: whoever can connect to a forward
// reaches the target, without a token and without being known.
func mayListen(ctx context.Context, listen netip.AddrPort) error {
	const firstFree = 1024 // below, ports belong to the system
	inside := listen.Addr().IsLoopback() && (listen.Port() == 0 || listen.Port() >= firstFree)
	if c := askerFrom(ctx); !inside && !permissions[c.role][mayAdmin] {
		return api.NewProblem(api.CodeForbidden, fmt.Sprintf("%s has the role %s, which allows forwards on loopback from port %d on; %s needs the role admin",
			c.actor.Who, c.role, firstFree, listen))
	}
	return nil
}

func (r *rest) removeForward(ctx context.Context, in *ByRef) (*body[api.Forward], error) {
	listen, err := parseListen(in.Ref)
	if err != nil {
		return nil, api.NewProblem(api.CodeInvalid, err.Error())
	}
	rows, err := r.s.store.Forwards(ctx)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(rows, func(f *store.Forward) bool { return f.Listen == listen.String() })
	if i < 0 {
		return nil, api.NewProblem(api.CodeNotFound, fmt.Sprintf("no forward listens on %s: `sallyport target forward` lists them", listen))
	}
	if err := mayListen(ctx, listen); err != nil {
		return nil, err
	}
	was := r.s.forwards.look(rows[i])
	if err := r.s.forwards.remove(ctx, rows[i]); err != nil && !errors.Is(err, store.ErrNotFound) {
		return nil, err
	}
	return answer(was), nil
}
