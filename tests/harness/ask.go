package harness

import (
	"encoding/json"
	"fmt"

	"sallyport/gateway/api"
	"sallyport/internal/wire"
)

// list runs a list verb with -o json and reads its objects.
func list[T any](g *Gateway, args ...string) ([]T, error) {
	g.site.t.Helper()
	r := g.Run(append(args, "-o", "json")...)
	if err := r.Err(); err != nil {
		return nil, err
	}
	var items []T
	if err := json.Unmarshal([]byte(r.Stdout), &items); err != nil {
		return nil, fmt.Errorf("%w: %v", err, r)
	}
	return items, nil
}

// Nodes returns `node list`.
func (g *Gateway) Nodes() ([]api.Node, error) { return list[api.Node](g, "node", "list") }

// RCPs returns `rcp list`.
func (g *Gateway) RCPs() ([]api.RCP, error) { return list[api.RCP](g, "rcp", "list") }

// Requests returns `request list`.
func (g *Gateway) Requests() ([]api.Request, error) { return list[api.Request](g, "request", "list") }

// Events returns `event list` with more flags.
func (g *Gateway) Events(flags ...string) ([]api.Event, error) {
	return list[api.Event](g, append([]string{"event", "list"}, flags...)...)
}

// Node returns one line of `node list`.
func (g *Gateway) Node(name string) (api.Node, error) {
	nodes, err := g.Nodes()
	if err != nil {
		return api.Node{}, err
	}
	for _, n := range nodes {
		if n.Name == name {
			return n, nil
		}
	}
	return api.Node{}, fmt.Errorf("no node %s in %d", name, len(nodes))
}

func (g *Gateway) nodeIs(name, state string) error {
	n, err := g.Node(name)
	if err != nil {
		return err
	}
	if n.State != wire.NodeState(state) {
		return fmt.Errorf("%s is %s (%s)", name, n.State, n.StateReason)
	}
	return nil
}

func (g *Gateway) rcpIs(name, state string) error {
	rcps, err := g.RCPs()
	if err != nil {
		return err
	}
	for _, r := range rcps {
		if r.Name != name {
			continue
		}
		if r.State != state {
			return fmt.Errorf("%s is %s (%s %s)", name, r.State, r.StateReason, r.LastError)
		}
		return nil
	}
	return fmt.Errorf("no RCP %s in %d", name, len(rcps))
}

// Applied is an error until the node has applied what the gateway desires.
func (n *Node) Applied() error {
	got, err := n.gateway.Node(n.Name)
	if err != nil {
		return err
	}
	if got.DesiredRevision.IsZero() || got.AppliedRevision != got.DesiredRevision {
		return fmt.Errorf("%s applied %v of %v", n.Name, got.AppliedRevision, got.DesiredRevision)
	}
	return nil
}

// HasEvent is an error until `event list` holds an event with the text, and
// when it holds several.
func (g *Gateway) HasEvent(text string) error {
	events, err := g.Events()
	if err != nil {
		return err
	}
	n := 0
	for _, e := range events {
		if e.Text == text {
			n++
		}
	}
	if n != 1 {
		return fmt.Errorf("%d of %d events have the text %q", n, len(events), text)
	}
	return nil
}
