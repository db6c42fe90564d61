package gateway

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"sallyport/gateway/api"
	"sallyport/gateway/bus"
	"sallyport/gateway/store"
	"sallyport/internal/selector"
	"sallyport/internal/wire"
)

func (r *rest) nodeRoutes() {
	op := func(id, method, path, summary string) huma.Operation {
		return huma.Operation{OperationID: id, Method: method, Path: path, Summary: summary}
	}
	handle(r, op("node.list", http.MethodGet, "/nodes", "List nodes by name"), mayRead, r.listNodes)
	stream[NodeFilter, api.Node](r, op("node.watch", "", "/nodes/watch", "Follow nodes: all of them first, then each that changes"), mayRead, r.watchNodes)
	handle(r, op("node.show", http.MethodGet, "/nodes/{ref}", "Show a node, by name, unique beginning or UUID"), mayRead, r.showNode)
	handle(r, op("node.trace", http.MethodGet, "/nodes/{ref}/trace", "Show the way to a node, hop by hop"), mayRead, r.traceNode)
	handle(r, op("node.tag", http.MethodPost, "/nodes/{ref}/tags", "Set and remove tags"), mayOperate, r.tagNode)
	handle(r, op("node.drain", http.MethodPost, "/nodes/{ref}/drain", "Let a node finish what runs and take no more"), mayOperate, r.drainNode)
	handle(r, op("node.resume", http.MethodPost, "/nodes/{ref}/resume", "End a drain, or a quarantine"), mayOperate, r.resumeNode)
	handle(r, op("node.unlock", http.MethodPost, "/nodes/{ref}/unlock", "Make a locked node obey this installation"), mayAdmin, r.unlockNode)
	handle(r, op("node.renew", http.MethodPost, "/nodes/{ref}/renew", "Renew a node's certificate now"), mayCertify, r.renewNode)
	handle(r, op("node.reidentify", http.MethodPost, "/nodes/{ref}/reidentify", "Make a connected node enrol with another UUID and key"), mayCertify, r.reidentifyNode)
	handle(r, op("node.revoke", http.MethodPost, "/nodes/{ref}/revoke", "Revoke a node's key"), mayCertify, r.revokeNode)
	handle(r, op("node.remove", http.MethodDelete, "/nodes/{ref}", "Revoke a node's key and take the node off the list"), mayCertify, r.removeNode)
}

// ByRef names an object by name or ID.
type ByRef struct {
	Ref string `path:"ref" maxLength:"256"`
}

// NodeFilter selects nodes.
type NodeFilter struct {
	Selector string `query:"selector" doc:"Kubernetes label selector over tags."`
	State    string `query:"state" enum:"pending,running,failing,down,unreachable,readonly,locked,draining,quarantined,revoked,upgrade-required"`
}

// parse returns the filter's test.
func (f NodeFilter) parse() (func(api.Node) bool, error) {
	sel := selector.Everything
	if f.Selector != "" {
		var err error
		if sel, err = selector.Parse(f.Selector); err != nil {
			return nil, api.NewProblem(api.CodeInvalid, err.Error())
		}
	}
	return func(n api.Node) bool { return (f.State == "" || string(n.State) == f.State) && sel.Matches(n.Tags) }, nil
}

// nodeViews lists every node, with those that the database does not know.
func (r *rest) nodeViews(ctx context.Context) ([]api.Node, error) {
	nodes, err := r.s.store.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	tags, err := r.s.store.AllTags(ctx)
	if err != nil {
		return nil, err
	}
	revisions, err := r.s.store.DesiredRevisions(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]api.Node, 0, len(nodes))
	for _, n := range nodes {
		out = append(out, nodeView(n, tags[n.ID], revisions[n.ID], r.s.fleet.Presence(n.ID)))
	}
	for _, p := range r.s.fleet.strangers() {
		out = append(out, strangerView(p))
	}
	slices.SortFunc(out, byName)
	return out, nil
}

func byName(a, b api.Node) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) }

// nodeView joins the row of a node with its presence, which is fresher.
func nodeView(n *store.Node, tags map[string]string, desired wire.Revision, p presence) api.Node {
	v := api.Node{
		ID: n.ID, Name: n.Name, Tenant: n.Tenant, State: n.State, StateReason: n.StateReason, StateSince: utc(n.StateSince), Tags: tags, RCPs: []string{},
		Version: n.Program, DesiredRevision: desired, AppliedRevision: n.Applied(), LastSeen: when(n.LastSeen), Fingerprint: n.KeyHash.Fingerprint(),
	}
	if v.Tags == nil {
		v.Tags = map[string]string{}
	}
	if p.State != "" && n.State != wire.StateRevoked {
		v.State, v.StateReason, v.StateSince = p.State, p.Reason, utc(p.Since)
	}
	if p.RCPs != nil {
		v.RCPs = p.RCPs
	}
	v.Carrier = p.Carrier
	if p.LastSeen.After(n.LastSeen) {
		v.LastSeen = when(p.LastSeen)
	}
	return v
}

// strangerView shows a node that has a certificate of ours and no row: it is
// never adopted silently.
func strangerView(p presence) api.Node {
	v := nodeView(&store.Node{ID: p.ID, Name: p.Name, State: p.State, StateReason: p.Reason, StateSince: p.Since}, nil, wire.Revision{}, p)
	if h := p.Hello; h != nil {
		v.Tags, v.Version, v.AppliedRevision = boundTags(h.Tags), clip(h.Program), h.Applied
		v.Name = cmp.Or(v.Name, clip(h.Name))
	}
	if v.Tags == nil {
		v.Tags = map[string]string{}
	}
	v.Name = cmp.Or(v.Name, string(p.ID))
	v.Fingerprint = "" // its key is known while a session with it is open
	return v
}

// nodePages keeps the nodes of the last first page for the pages that follow it:
// to put the list together takes a second for tens of thousands of nodes, which
// have dozens of pages.
type nodePages struct {
	mu   sync.Mutex
	all  []api.Node // not to be changed; nil when it is too old
	last *time.Timer
}

// pagesLife is how old a page may be when it is handed out.
const pagesLife = 10 * time.Second

func (p *nodePages) nodes(page Page, fresh func() ([]api.Node, error)) ([]api.Node, error) {
	if page.Cursor != "" {
		p.mu.Lock()
		all := p.all
		p.mu.Unlock()
		if all != nil {
			return all, nil
		}
	}
	all, err := fresh()
	if err != nil || len(all) <= page.Limit {
		return all, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.last != nil {
		p.last.Stop()
	}
	var own *time.Timer
	own = time.AfterFunc(pagesLife, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.last == own {
			p.all, p.last = nil, nil
		}
	})
	p.all, p.last = all, own
	return all, nil
}

type listNodesInput struct {
	Page
	NodeFilter
}

func (r *rest) listNodes(ctx context.Context, in *listNodesInput) (*body[api.List[api.Node]], error) {
	fits, err := in.parse()
	if err != nil {
		return nil, err
	}
	all, err := r.pages.nodes(in.Page, func() ([]api.Node, error) { return r.nodeViews(ctx) })
	if err != nil {
		return nil, err
	}
	var some []api.Node
	for _, n := range all {
		if fits(n) {
			some = append(some, n)
		}
	}
	list, err := slicePage(some, in.Page, func(n api.Node) string { return n.Name + "\x00" + string(n.ID) })
	return answer(list), err
}

const (
	// watchEvery bounds how late a change of presence is seen that woke nobody.
	watchEvery = 2 * time.Second
	// watchRest is how long a watch rests after a look at all nodes, in times of
	// what that took: with tens of thousands of nodes a look takes a second, and
	// while they enrol or come back something is new all the time.
	watchRest = 9
)

func (r *rest) watchNodes(_ context.Context, in *NodeFilter) (func(context.Context, sendFunc) error, error) {
	fits, err := in.parse()
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, send sendFunc) error {
		wakes, cancel := r.s.bus.Subscribe(bus.Nodes)
		defer cancel()
		look := time.NewTicker(watchEvery)
		defer look.Stop()
		shown := map[wire.ID]api.Node{}
		for {
			began := time.Now()
			all, err := r.nodeViews(ctx)
			if err != nil {
				return err
			}
			rest := time.After(watchRest * time.Since(began))
			for _, n := range all {
				old, had := shown[n.ID]
				if !fits(n) && !had || had && sameNode(old, n) {
					continue
				}
				shown[n.ID] = n
				if err := send(n); err != nil {
					return err
				}
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-rest:
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-wakes:
			case <-look.C:
			}
		}
	}, nil
}

// sameNode ignores what moves all the time.
func sameNode(a, b api.Node) bool {
	return a.Name == b.Name && a.State == b.State && a.StateReason == b.StateReason && maps.Equal(a.Tags, b.Tags) && slices.Equal(a.RCPs, b.RCPs) &&
		a.Carrier == b.Carrier && a.Version == b.Version && a.DesiredRevision == b.DesiredRevision && a.AppliedRevision == b.AppliedRevision
}

func (r *rest) showNode(ctx context.Context, in *ByRef) (*tagged[api.NodeDetail], error) {
	n, err := r.node(ctx, in.Ref, false)
	if err != nil {
		for _, p := range r.s.fleet.strangers() {
			if v := strangerView(p); api.Is(err, api.CodeNotFound) && (v.Name == in.Ref || strings.HasPrefix(string(v.ID), in.Ref)) {
				d := api.NodeDetail{Node: v, Boots: r.s.clones.boots(v.ID), TagSources: []api.TagSource{}, Policies: []api.NodePolicy{}, Deployments: []string{}, Paths: p.Paths}
				return &tagged[api.NodeDetail]{Body: d}, nil
			}
		}
		return nil, err
	}
	return r.nodeDetail(ctx, n.ID)
}

func (r *rest) nodeDetail(ctx context.Context, id wire.ID) (*tagged[api.NodeDetail], error) {
	n, err := r.s.store.Node(ctx, id)
	if err != nil {
		return nil, err
	}
	rows, err := r.s.store.NodeTags(ctx, id)
	if err != nil {
		return nil, err
	}
	statuses, err := r.s.store.PolicyStatus(ctx, id)
	if err != nil {
		return nil, err
	}
	p := r.s.fleet.Presence(id)
	d := api.NodeDetail{
		Created: utc(n.CreatedAt), Mode: n.Mode, OS: n.OS, Arch: n.Arch, AsRoot: n.AsRoot, Installation: n.Installation, Boots: r.s.clones.boots(id),
		Certificate: api.CertificateStatus{NotAfter: when(n.NotAfter), RenewAfter: when(n.RenewAfter)}, TagSources: tagSources(rows),
		Policies: []api.NodePolicy{}, Deployments: []string{}, Paths: p.Paths, Outbox: n.Outbox, SkewSeconds: n.SkewSeconds,
		Versions: wire.VersionRange{Min: n.VersionMin, Max: n.VersionMax}, ETag: etag(n.Version),
	}
	if d.Paths == nil {
		d.Paths = []api.NodePath{}
	}
	var revision wire.Revision
	if want, err := r.s.store.Desired(ctx, id); err == nil {
		revision = want.Revision()
		v := deployView{statuses: map[wire.ID]map[string]store.PolicyStatus{id: {}}, online: func(wire.ID) bool { return p.Connected }}
		for _, st := range statuses {
			v.statuses[id][st.Policy] = st
		}
		for _, pol := range want.Content.Policies {
			st := v.policyState(n, want, pol)
			d.Policies = append(d.Policies, api.NodePolicy{Policy: pol.Name, Type: pol.Type, Deployment: strings.Join(pol.Deployments, ","), State: st.State, Error: st.Error, Since: st.Since})
			d.Deployments = append(d.Deployments, pol.Deployments...)
		}
		slices.Sort(d.Deployments)
		d.Deployments = slices.Compact(d.Deployments)
	}
	d.Node = nodeView(n, store.Effective(rows), revision, p)
	return &tagged[api.NodeDetail]{ETag: d.ETag, Body: d}, nil
}

// tagSources explains every tag that somebody set.
func tagSources(rows []store.NodeTag) []api.TagSource {
	out := []api.TagSource{}
	hidden := map[string]bool{}
	best := map[string]string{}
	for _, t := range rows {
		hidden[t.Key] = hidden[t.Key] || t.Hidden
	}
	for _, source := range []string{store.TagGateway, store.TagJoin, store.TagNode} {
		for _, t := range rows {
			if t.Source != source || t.Hidden {
				continue
			}
			v := api.TagSource{Key: t.Key, Value: t.Value, Source: t.Source, Effective: !hidden[t.Key] && best[t.Key] == ""}
			switch {
			case hidden[t.Key]:
				v.Reason = "removed by an operator"
			case best[t.Key] != "":
				v.Reason = "set by the " + best[t.Key]
			default:
				best[t.Key] = t.Source
			}
			out = append(out, v)
		}
	}
	slices.SortStableFunc(out, func(a, b api.TagSource) int { return cmp.Compare(a.Key, b.Key) })
	return out
}

type tagInput struct {
	ByRef
	Match
	Body api.TagChange
}

// maxTagsPerNode bounds what a selector has to look at.
const maxTagsPerNode = 256

func (r *rest) tagNode(ctx context.Context, in *tagInput) (*tagged[api.NodeDetail], error) {
	want, err := in.want()
	if err != nil {
		return nil, err
	}
	changes := []string{}
	for _, k := range slices.Sorted(maps.Keys(in.Body.Set)) {
		if err := store.ValidTag(k, in.Body.Set[k]); err != nil {
			return nil, api.NewProblem(api.CodeInvalid, err.Error())
		}
		if slices.Contains(in.Body.Remove, k) {
			return nil, api.NewProblem(api.CodeInvalid, fmt.Sprintf("tag %s is both set and removed", k))
		}
		changes = append(changes, k+"="+in.Body.Set[k])
	}
	for _, k := range in.Body.Remove {
		if err := store.ValidTag(k, ""); err != nil {
			return nil, api.NewProblem(api.CodeInvalid, err.Error())
		}
		changes = append(changes, k+"-")
	}
	if len(changes) == 0 {
		return nil, api.NewProblem(api.CodeInvalid, "no tag is set or removed")
	}
	n, err := r.node(ctx, in.Ref, true)
	if err != nil {
		return nil, err
	}
	var plans []nodePlan
	err = r.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		if err := tx.TouchNode(ctx, n.ID, want); err != nil {
			return err
		}
		if err := tx.TagNode(ctx, n.ID, in.Body.Set, in.Body.Remove); err != nil {
			return err
		}
		rows, err := tx.NodeTags(ctx, n.ID)
		if err != nil {
			return err
		}
		if len(rows) > maxTagsPerNode {
			return api.NewProblem(api.CodeInvalid, fmt.Sprintf("a node has at most %d tags", maxTagsPerNode))
		}
		tx.Audit(ctx, "node.tag", "node "+n.Name, strings.Join(changes, " "))
		plans, err = r.s.replan(ctx, tx, n.ID)
		return err
	})
	if err != nil {
		return nil, err
	}
	r.s.pushPlans(plans)
	return r.nodeDetail(ctx, n.ID)
}

func (r *rest) traceNode(ctx context.Context, in *ByRef) (*body[api.Trace], error) {
	n, err := r.node(ctx, in.Ref, false)
	if api.Is(err, api.CodeNotFound) { // it may be in the list all the same, and where it hangs helps to find it
		if unknown := r.strangers(in.Ref); len(unknown) == 1 {
			n, err = &store.Node{ID: unknown[0].ID, Name: unknown[0].Name}, nil
		}
	}
	if err != nil {
		return nil, err
	}
	t, err := r.s.trace(ctx, n)
	return answer(t), err
}

type drainNodeInput struct {
	ByRef
	Body api.DrainNode
}

func (r *rest) drainNode(ctx context.Context, in *drainNodeInput) (*tagged[api.NodeDetail], error) {
	if in.Body.For < 0 {
		return nil, api.NewProblem(api.CodeInvalid, fmt.Sprintf("a drain for %s would be over already", in.Body.For))
	}
	reason := wire.Quotable(in.Body.Reason)
	detail := reason
	if in.Body.For > 0 {
		detail = strings.TrimSpace("for " + in.Body.For.String() + " " + reason)
	}
	return r.setNodeDraining(ctx, in.Ref, "node.drain", detail, &wire.Drain{Deadline: time.Duration(in.Body.For), Reason: reason})
}

func (r *rest) resumeNode(ctx context.Context, in *ByRef) (*tagged[api.NodeDetail], error) {
	n, err := r.node(ctx, in.Ref, true)
	if err != nil {
		return nil, err
	}
	if n.Quarantine == "" {
		return r.setNodeDraining(ctx, in.Ref, "node.resume", "", nil)
	}
	if err := r.s.clones.resume(ctx, n); err != nil {
		return nil, err
	}
	return r.nodeDetail(ctx, n.ID)
}

// setNodeDraining tells the node, whose own disk keeps the drain, and writes it
// down once the node has it.
func (r *rest) setNodeDraining(ctx context.Context, ref, what, detail string, d *wire.Drain) (*tagged[api.NodeDetail], error) {
	n, err := r.node(ctx, ref, true)
	if err != nil {
		return nil, err
	}
	if err := r.s.drainNode(ctx, n, d); err != nil {
		return nil, err
	}
	err = r.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		tx.Audit(ctx, what, "node "+n.Name, detail)
		return nil
	})
	if err != nil {
		return nil, err
	}
	r.s.seenDraining(ctx, n.ID, d != nil)
	return r.nodeDetail(ctx, n.ID)
}

func (r *rest) unlockNode(ctx context.Context, in *ByRef) (*tagged[api.NodeDetail], error) {
	n, err := r.node(ctx, in.Ref, true)
	if err != nil {
		return nil, err
	}
	return nil, api.NewProblem(api.CodeUnsupported, fmt.Sprintf("unlocking from here is not supported yet: run `sallyport local unlock` on %s", n.Name))
}

type renewInput struct {
	ByRef
	Rekey bool `query:"rekey" doc:"With a new key; the old one is revoked."`
}

func (r *rest) renewNode(ctx context.Context, in *renewInput) (*tagged[api.NodeDetail], error) {
	n, err := r.node(ctx, in.Ref, true)
	if err != nil {
		return nil, err
	}
	if err := r.s.enrolment.renewNow(ctx, n.ID, in.Rekey); err != nil {
		return nil, err
	}
	return r.nodeDetail(ctx, n.ID)
}

type reidentifyInput struct {
	ByRef
	Body api.Reidentify
}

func (r *rest) reidentifyNode(ctx context.Context, in *reidentifyInput) (*tagged[api.NodeDetail], error) {
	n, err := r.node(ctx, in.Ref, true)
	if err != nil {
		return nil, err
	}
	if n, err = r.s.enrolment.reidentify(ctx, n, in.Body); err != nil {
		return nil, err
	}
	return r.nodeDetail(ctx, n.ID)
}

func (r *rest) revokeNode(ctx context.Context, in *ByRef) (*body[api.Removal], error) {
	return r.endNode(ctx, in, false)
}

func (r *rest) removeNode(ctx context.Context, in *ByRef) (*body[api.Removal], error) {
	return r.endNode(ctx, in, true)
}

func (r *rest) endNode(ctx context.Context, in *ByRef, remove bool) (*body[api.Removal], error) {
	n, err := r.node(ctx, in.Ref, true)
	if unknown := r.strangers(in.Ref); api.Is(err, api.CodeNotFound) && len(unknown) == 1 {
		v := unknown[0]
		number, err := r.s.revokeStranger(ctx, v.ID, v.Name)
		return answer(api.Removal{ID: v.ID, Name: v.Name, Revocations: number}), err
	}
	if err != nil {
		return nil, err
	}
	number, err := r.s.enrolment.revokeNode(ctx, n, remove)
	return answer(api.Removal{ID: n.ID, Name: n.Name, Revocations: number}), err
}
