package gateway

import (
	"context"
	"fmt"
	"slices"
	"strconv"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

// offline is the state of a policy on a node that cannot be told of it now.
const offline = "offline"

// deployView is what deployments and nodes look like at one moment.
type deployView struct {
	nodes    []*store.Node
	desired  map[wire.ID]*store.Desired
	statuses map[wire.ID]map[string]store.PolicyStatus
	online   func(wire.ID) bool
}

func (s *Server) deployView(ctx context.Context, q store.Queries) (v deployView, err error) {
	v.online = func(id wire.ID) bool { return s.fleet.Presence(id).Connected }
	if v.nodes, err = q.Nodes(ctx); err != nil {
		return v, fmt.Errorf("read nodes: %w", err)
	}
	if v.desired, err = q.AllDesired(ctx); err != nil {
		return v, fmt.Errorf("read desired states: %w", err)
	}
	if v.statuses, err = q.AllPolicyStatus(ctx); err != nil {
		return v, fmt.Errorf("read policy states: %w", err)
	}
	return v, nil
}

// policyState says how one policy fares on one node.
func (v deployView) policyState(n *store.Node, d *store.Desired, p store.DesiredPolicy) api.DeploymentNode {
	out := api.DeploymentNode{Node: n.Name, ID: n.ID, Policy: p.Name, Revision: n.Applied(), State: wire.PolicyPending, Since: utc(d.ChangedAt)}
	said, ok := v.statuses[n.ID][p.Name]
	switch {
	case ok && said.Digest == p.Digest && (said.State == wire.PolicyApplied || said.State == wire.PolicyFailed):
		out.State, out.Error, out.Since = said.State, said.Error, utc(said.Since)
	case d.Refused != "" && d.Refused != "draining":
		out.State, out.Error = wire.PolicyFailed, "refused ("+d.Refused+"): "+d.Reason
	case !v.online(n.ID):
		out.State, out.Error = offline, "the node is not connected; it gets the policy when it comes"
	case ok && said.Digest == p.Digest:
		out.Error, out.Since = said.Error, utc(said.Since)
	}
	return out
}

// carriers are the nodes that still have a policy of a deleted deployment and
// should not.
func (v deployView) carriers(d *store.Deployment) (out []api.DeploymentNode) {
	for _, n := range v.nodes {
		for _, name := range d.Policies {
			said, has := v.statuses[n.ID][name]
			want := v.desired[n.ID]
			if !has || !managed(n) || want != nil && slices.ContainsFunc(want.Content.Policies, func(p store.DesiredPolicy) bool { return p.Name == name }) {
				continue
			}
			row := api.DeploymentNode{Node: n.Name, ID: n.ID, Policy: name, Revision: n.Applied(), State: wire.PolicyPending, Error: "it is being taken back", Since: utc(said.Since)}
			if !v.online(n.ID) {
				row.State, row.Error = offline, "the node is not connected; it still carries the policy"
			}
			out = append(out, row)
		}
	}
	return out
}

// worst orders the states of policies: a node counts under the highest.
var worst = map[string]int{wire.PolicyApplied: 0, offline: 1, wire.PolicyPending: 2, wire.PolicyFailed: 3}

// status says how a deployment fares.
func (v deployView) status(d *store.Deployment) api.DeploymentStatus {
	out := api.DeploymentStatus{Deployment: api.Deployment{
		Name: d.Name, Revision: d.Revision, Selector: d.Selector, Policies: d.Policies, Min: d.MinNodes, Max: d.MaxNodes,
		Created: utc(d.CreatedAt), Updated: utc(d.UpdatedAt), ETag: etag(d.Revision),
	}, Nodes: []api.DeploymentNode{}}
	if !d.DeletedAt.IsZero() {
		out.Nodes = v.carriers(d)
	} else {
		for _, n := range v.nodes {
			want := v.desired[n.ID]
			if want == nil || !managed(n) {
				continue
			}
			for _, p := range want.Content.Policies {
				if slices.Contains(p.Deployments, d.Name) {
					out.Nodes = append(out.Nodes, v.policyState(n, want, p))
				}
			}
		}
	}
	var total int
	out.Counts, total = countNodes(out.Nodes)
	out.State, out.Reason = deploymentState(d, out.Counts, total)
	return out
}

// countNodes counts each node once, under the worst state of its policies.
func countNodes(rows []api.DeploymentNode) (c api.DeploymentCounts, total int) {
	state := map[wire.ID]string{}
	for _, r := range rows {
		if old, ok := state[r.ID]; !ok || worst[r.State] > worst[old] {
			state[r.ID] = r.State
		}
	}
	for _, s := range state {
		switch s {
		case wire.PolicyApplied:
			c.Applied++
		case wire.PolicyPending:
			c.Pending++
		case wire.PolicyFailed:
			c.Failed++
		default:
			c.Offline++
		}
	}
	return c, len(state)
}

func deploymentState(d *store.Deployment, c api.DeploymentCounts, nodes int) (state, reason string) {
	few := ""
	if nodes < d.MinNodes {
		few = fmt.Sprintf("%s selected, at least %d wanted", plural(nodes, "node"), d.MinNodes)
	}
	switch {
	case !d.DeletedAt.IsZero():
		return api.DeploymentOrphan, fmt.Sprintf("deleted; %s still to be freed of it", plural(nodes, "node"))
	case nodes == 0 && few == "":
		return api.DeploymentInactive, "the selector fits no node"
	case c.Pending > 0:
		return api.DeploymentDeploying, fmt.Sprintf("%s yet to answer", plural(c.Pending, "node"))
	case c.Failed > 0 && c.Applied == 0:
		return api.DeploymentError, fmt.Sprintf("it failed on %s and holds on none", plural(c.Failed, "node"))
	case c.Failed > 0:
		return api.DeploymentDegraded, fmt.Sprintf("it failed on %s", plural(c.Failed, "node"))
	case few != "":
		return api.DeploymentDegraded, few
	case c.Offline > 0:
		return api.DeploymentDegraded, fmt.Sprintf("%s offline", plural(c.Offline, "node"))
	}
	return api.DeploymentActive, ""
}

// etag makes an ETag of a version number.
func etag(version int64) string { return `"` + strconv.FormatInt(version, 10) + `"` }
