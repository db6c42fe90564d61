package gateway

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"sallyport/gateway/store"
	"sallyport/internal/selector"
	"sallyport/internal/wire"
)

// nodePlan is one node whose desired state changes.
type nodePlan struct {
	node                *store.Node
	old                 *store.Desired // nil: the first
	desired             *store.Desired
	add, change, remove []string // names of policies
}

// planner computes desired states from one view of the database. The dry run
// of a change is this very computation in a transaction that is taken back.
type planner struct {
	tx          *store.Tx
	rcps        []wire.RCPAddresses
	generation  int64
	nodes       []*store.Node // by name
	tags        map[wire.ID]map[string]string
	old         map[wire.ID]*store.Desired
	deployments []plannedDeployment
	policies    map[string]*store.Policy
}

type plannedDeployment struct {
	*store.Deployment
	selector selector.Selector
	selected map[wire.ID]bool
}

// newPlanner reads what the plan depends on. rcps is how nodes reach us. With
// ids it plans for those nodes only, and reads little else: a thousand nodes
// that join must not cost a thousand looks at all of them.
func newPlanner(ctx context.Context, tx *store.Tx, generation int64, rcps []wire.RCPAddresses, ids ...wire.ID) (*planner, error) {
	p := &planner{tx: tx, rcps: rcps, generation: generation, policies: map[string]*store.Policy{}}
	policies, err := tx.PolicyHeads(ctx, store.DefaultTenant)
	if err != nil {
		return nil, fmt.Errorf("read policies: %w", err)
	}
	for _, pol := range policies {
		p.policies[pol.Name] = pol
	}
	deployments, err := tx.Deployments(ctx, store.DefaultTenant)
	if err != nil {
		return nil, fmt.Errorf("read deployments: %w", err)
	}
	limited := false
	for _, d := range deployments {
		if !d.DeletedAt.IsZero() {
			continue
		}
		sel, err := selector.Parse(d.Selector)
		if err != nil {
			return nil, fmt.Errorf("deployment %s: %w", d.Name, err)
		}
		limited = limited || d.MaxNodes > 0
		p.deployments = append(p.deployments, plannedDeployment{Deployment: d, selector: sel})
	}
	if len(ids) > 0 && !limited { // one that is limited may move to other nodes
		err = p.readSome(ctx, ids)
	} else {
		err = p.readAll(ctx)
	}
	if err != nil {
		return nil, err
	}
	for i := range p.deployments {
		p.selectNodes(&p.deployments[i])
	}
	return p, nil
}

func (p *planner) readAll(ctx context.Context) (err error) {
	if p.nodes, err = p.tx.Nodes(ctx); err != nil {
		return fmt.Errorf("read nodes: %w", err)
	}
	if p.tags, err = p.tx.AllTags(ctx); err != nil {
		return fmt.Errorf("read tags: %w", err)
	}
	if p.old, err = p.tx.AllDesired(ctx); err != nil {
		return fmt.Errorf("read desired states: %w", err)
	}
	return nil
}

func (p *planner) readSome(ctx context.Context, ids []wire.ID) error {
	p.tags, p.old = map[wire.ID]map[string]string{}, map[wire.ID]*store.Desired{}
	for _, id := range ids {
		n, err := p.tx.Node(ctx, id)
		if errors.Is(err, store.ErrNotFound) {
			continue // removed meanwhile
		}
		if err != nil {
			return fmt.Errorf("read node: %w", err)
		}
		rows, err := p.tx.NodeTags(ctx, id)
		if err != nil {
			return fmt.Errorf("read tags: %w", err)
		}
		old, err := p.tx.Desired(ctx, id)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return fmt.Errorf("read desired state: %w", err)
		}
		p.nodes, p.tags[id] = append(p.nodes, n), store.Effective(rows)
		if err == nil {
			p.old[id] = old
		}
	}
	return nil
}

// managed reports whether a node gets desired states at all.
func managed(n *store.Node) bool { return n.State != wire.StateRevoked }

// selectNodes finds the nodes of a deployment: those that its selector fits;
// with a maximum, those that have it already come first, then by name.
func (p *planner) selectNodes(d *plannedDeployment) {
	d.selected = map[wire.ID]bool{}
	var fit []*store.Node
	for _, n := range p.nodes {
		if managed(n) && d.selector.Matches(p.tags[n.ID]) {
			fit = append(fit, n)
		}
	}
	if d.MaxNodes > 0 && len(fit) > d.MaxNodes {
		has := func(n *store.Node) int {
			if old := p.old[n.ID]; old != nil && brings(old.Content, d.Name) {
				return 0
			}
			return 1
		}
		slices.SortStableFunc(fit, func(a, b *store.Node) int { return cmp.Compare(has(a), has(b)) })
		fit = fit[:d.MaxNodes]
	}
	for _, n := range fit {
		d.selected[n.ID] = true
	}
}

// brings reports whether a deployment brings anything to a node.
func brings(c store.DesiredContent, deployment string) bool {
	return slices.ContainsFunc(c.Policies, func(p store.DesiredPolicy) bool { return slices.Contains(p.Deployments, deployment) })
}

// content is what a node should have.
func (p *planner) content(n *store.Node) store.DesiredContent {
	c := store.DesiredContent{Name: n.Name, Tags: p.tags[n.ID], Policies: []store.DesiredPolicy{}, RCPs: p.rcps}
	from := map[string][]string{}
	for _, d := range p.deployments {
		if !d.selected[n.ID] {
			continue
		}
		for _, name := range d.Policies {
			from[name] = append(from[name], d.Name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(from)) {
		if pol := p.policies[name]; pol != nil {
			c.Policies = append(c.Policies, store.DesiredPolicy{
				Policy: wire.Policy{Name: name, Type: pol.Type, Digest: pol.Digest}, Deployments: from[name],
			})
		}
	}
	return c
}

// plan stores the desired states that changed, under new revisions.
func (p *planner) plan(ctx context.Context) ([]nodePlan, error) {
	var out []nodePlan
	for _, n := range p.nodes {
		if !managed(n) {
			continue
		}
		content := p.content(n)
		digest, err := contentDigest(content)
		if err != nil {
			return nil, err
		}
		old := p.old[n.ID]
		if old != nil && old.Digest == digest && old.Generation == p.generation {
			continue
		}
		np := nodePlan{node: n, old: old, desired: &store.Desired{NodeID: n.ID, Digest: digest, Content: content}}
		np.compare()
		if err := p.tx.PutDesired(ctx, np.desired); err != nil {
			return nil, fmt.Errorf("store desired state of node %s: %w", n.Name, err)
		}
		out = append(out, np)
	}
	return out, nil
}

// contentDigest does not depend on anything but the content: JSON sorts maps.
func contentDigest(c store.DesiredContent) (string, error) {
	b, err := json.Marshal(c)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), nil
}

// compare fills in which policies come, change and go.
func (np *nodePlan) compare() {
	before := map[string]string{}
	if np.old != nil {
		for _, p := range np.old.Content.Policies {
			before[p.Name] = p.Digest
		}
	}
	for _, p := range np.desired.Content.Policies {
		switch digest, had := before[p.Name]; {
		case !had:
			np.add = append(np.add, p.Name)
		case digest != p.Digest:
			np.change = append(np.change, p.Name)
		}
		delete(before, p.Name)
	}
	np.remove = slices.Sorted(maps.Keys(before))
}

// fileEffects reads the files policies of a plan: how many files go back to
// what they were, and which paths two policies of one node claim.
func fileEffects(ctx context.Context, tx *store.Tx, plans []nodePlan) (restored int, conflicts []string, err error) {
	digests := map[string]bool{}
	each := func(c store.DesiredContent, f func(p store.DesiredPolicy)) {
		for _, p := range c.Policies {
			if p.Type == wire.PolicyFiles {
				f(p)
			}
		}
	}
	note := func(p store.DesiredPolicy) { digests[p.Digest] = true }
	for _, np := range plans {
		if np.old != nil {
			each(np.old.Content, note)
		}
		each(np.desired.Content, note)
	}
	specs, err := tx.Specs(ctx, slices.Collect(maps.Keys(digests)))
	if err != nil {
		return 0, nil, fmt.Errorf("read specs: %w", err)
	}
	paths := make(map[string][]string, len(specs))
	for digest, raw := range specs {
		var s wire.FilesSpec
		if err := json.Unmarshal(raw, &s); err != nil {
			return 0, nil, fmt.Errorf("spec %s: %w", digest, err)
		}
		for _, f := range s.Files {
			paths[digest] = append(paths[digest], f.Path)
		}
	}
	claims := map[string]int{} // message → nodes
	for _, np := range plans {
		owner := map[string]string{}
		each(np.desired.Content, func(p store.DesiredPolicy) {
			for _, path := range paths[p.Digest] {
				if other, ok := owner[path]; ok {
					claims[fmt.Sprintf("%s is claimed by the policies %s and %s", path, other, p.Name)]++
					continue
				}
				owner[path] = p.Name
			}
		})
		if np.old != nil {
			each(np.old.Content, func(p store.DesiredPolicy) {
				for _, path := range paths[p.Digest] {
					if _, kept := owner[path]; !kept {
						restored++
					}
				}
			})
		}
	}
	for _, message := range slices.Sorted(maps.Keys(claims)) {
		conflicts = append(conflicts, fmt.Sprintf("%s on %s: neither is applied there", message, plural(claims[message], "node")))
	}
	return restored, conflicts, nil
}

func plural(n int, word string) string {
	if n == 1 {
		return "1 " + word
	}
	return fmt.Sprintf("%d %ss", n, word)
}
