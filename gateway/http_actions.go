package gateway

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

func (r *rest) actionRoutes() {
	op := func(id, method, path, summary string) huma.Operation {
		return huma.Operation{OperationID: id, Method: method, Path: path, Summary: summary}
	}
	handle(r, op("action.list", http.MethodGet, "/actions", "List actions, newest first"), mayRead, r.listActions)
	handle(r, op("action.run", http.MethodPost, "/actions", "Run a program once on each of some nodes"), mayOperate, r.runAction)
	stream[batchOutputInput, api.Output](r, op("action.output.batch", "", "/actions/output", "Follow the output of all actions of a batch"), mayRead, r.batchOutput)
	handle(r, op("action.show", http.MethodGet, "/actions/{id}", "Show an action"), mayRead, r.showAction)
	stream[outputInput, api.Output](r, op("action.output", "", "/actions/{id}/output", "The output of an action, and with follow what comes"), mayRead, r.actionOutput)
	handle(r, op("action.cancel", http.MethodPost, "/actions/{id}/cancel", "Cancel a queued or running action"), mayOperate, r.cancelAction)
}

type listActionsInput struct {
	Page
	Node  string `query:"node" maxLength:"256"`
	State string `query:"state" enum:"queued,sent,running,succeeded,failed,timed-out,cancelled,expired,refused,lost"`
	Batch string `query:"batch" maxLength:"64"`
}

func (r *rest) listActions(ctx context.Context, in *listActionsInput) (*body[api.List[api.Action]], error) {
	before, err := in.before()
	if err != nil {
		return nil, err
	}
	f := store.ActionFilter{State: in.State, Batch: in.Batch, Before: before, Limit: in.Limit + 1}
	if in.Node != "" {
		n, err := r.node(ctx, in.Node, false)
		if err != nil {
			return nil, err
		}
		f.NodeID = n.ID
	}
	rows, err := r.s.store.Actions(ctx, f)
	if err != nil {
		return nil, err
	}
	return answer(positions(rows, in.Limit, actionView, func(a *store.Action) int64 { return a.Seq })), nil
}

// Bounds of an action.
const (
	maxActionNodes = 10_000
	maxActionTTL   = 31 * 24 * time.Hour
)

func checkAction(b api.RunAction) error {
	size := 0
	for _, a := range b.Command {
		size += len(a) + 1
	}
	var problem string
	switch {
	case (b.Node == "") == (b.Selector == ""):
		problem = "name a node or give a selector, one of the two"
	case len(b.Command) == 0 || b.Command[0] == "":
		problem = "the command is empty"
	case strings.ContainsRune(strings.Join(b.Command, ""), 0):
		problem = "the command contains a NUL byte"
	case size > wire.MaxActionBody/4: // as base64 within base64 it must fit the node's limit
		problem = fmt.Sprintf("the command has %d bytes, the limit is %d", size, wire.MaxActionBody/4)
	case b.TTL.Std() > maxActionTTL:
		problem = fmt.Sprintf("ttl %s is above the limit of %s", b.TTL, wire.Duration(maxActionTTL))
	case len(b.Key) > 128:
		problem = "the key is longer than 128 characters"
	default:
		return nil
	}
	return api.NewProblem(api.CodeInvalid, problem)
}

func (r *rest) runAction(ctx context.Context, in *body[api.RunAction]) (*body[api.StartedActions], error) {
	if err := checkAction(in.Body); err != nil {
		return nil, err
	}
	nodes, err := r.actionNodes(ctx, in.Body)
	if err != nil {
		return nil, err
	}
	actions, fresh, err := r.addActions(ctx, in.Body, nodes)
	if err != nil {
		return nil, err
	}
	if fresh {
		if err := r.s.runAction(ctx, actions); err != nil {
			return nil, err
		}
	}
	out := api.StartedActions{Batch: actions[0].Batch, Actions: make([]api.Action, len(actions))}
	for i, a := range actions {
		out.Actions[i] = actionView(a)
	}
	return answer(out), nil
}

// addActions stores one action per node. A call that repeats the key of an
// earlier one of the same caller gets that one's actions.
func (r *rest) addActions(ctx context.Context, b api.RunAction, nodes []*store.Node) (actions []*store.Action, fresh bool, err error) {
	key := ""
	if b.Key != "" {
		key = store.ActorFrom(ctx).Who + "\n" + b.Key
	}
	err = r.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		if key != "" {
			var err error
			if actions, err = tx.Actions(ctx, store.ActionFilter{BatchKey: key}); err != nil || len(actions) > 0 {
				slices.Reverse(actions)
				return err
			}
		}
		fresh, actions = true, nil
		batch := string(wire.NewID())
		for _, n := range nodes {
			a := &store.Action{
				ID: wire.NewID(), Batch: batch, BatchKey: key, Tenant: n.Tenant, NodeID: n.ID, NodeName: n.Name,
				Command: b.Command, TTL: b.TTL.Std(), Timeout: b.Timeout.Std(),
			}
			actions = append(actions, a)
			tx.Audit(ctx, "action.run", "node "+n.Name, fmt.Sprintf("action %s: %s", a.ID, wire.Quotable(strings.Join(a.Command, " "))))
		}
		return tx.AddActions(ctx, actions)
	})
	return actions, fresh, err
}

func (r *rest) actionNodes(ctx context.Context, b api.RunAction) ([]*store.Node, error) {
	if b.Node != "" {
		n, err := r.node(ctx, b.Node, true)
		if err != nil {
			return nil, err
		}
		return []*store.Node{n}, nil
	}
	fits, err := NodeFilter{Selector: b.Selector}.parse()
	if err != nil {
		return nil, err
	}
	tags, err := r.s.store.AllTags(ctx)
	if err != nil {
		return nil, err
	}
	all, err := r.s.store.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	nodes := slices.DeleteFunc(all, func(n *store.Node) bool { return !managed(n) || !fits(api.Node{Tags: tags[n.ID]}) })
	if len(nodes) > maxActionNodes {
		return nil, api.NewProblem(api.CodeInvalid, fmt.Sprintf("the selector fits %d nodes, the limit is %d", len(nodes), maxActionNodes))
	}
	if len(nodes) == 0 {
		return nil, api.NewProblem(api.CodeNotFound, fmt.Sprintf("no node fits the selector %q", wire.Quotable(b.Selector)))
	}
	return nodes, nil
}

// action finds the action that a reference means: its ID or a beginning of it.
func (r *rest) action(ctx context.Context, ref string, changing bool) (*store.Action, error) {
	found, err := r.s.store.FindActions(ctx, ref, 10)
	if err != nil {
		return nil, err
	}
	return pick("action", ref, changing, found, func(a *store.Action) (string, string) { return string(a.ID), "" })
}

func (r *rest) showAction(ctx context.Context, in *ByID) (*body[api.Action], error) {
	a, err := r.action(ctx, in.ID, false)
	if err != nil {
		return nil, err
	}
	return answer(actionView(a)), nil
}

func (r *rest) cancelAction(ctx context.Context, in *ByID) (*body[api.Action], error) {
	a, err := r.action(ctx, in.ID, true)
	if err != nil {
		return nil, err
	}
	if !a.Open() {
		return nil, api.NewProblem(api.CodeConflict, fmt.Sprintf("action %s has ended already: %s", a.ID.Short(), a.State))
	}
	err = r.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) (err error) {
		if a, err = tx.Action(ctx, a.ID); err != nil || !a.Open() {
			return err
		}
		tx.Audit(ctx, "action.cancel", "action "+string(a.ID), "on node "+a.NodeName)
		return tx.CancelAction(ctx, a, api.ActionCodeCancelled)
	})
	if err != nil {
		return nil, err
	}
	if err := r.s.cancelAction(ctx, a); err != nil {
		return nil, err
	}
	return answer(actionView(a)), nil
}

type batchOutputInput struct {
	Batch  string `query:"batch" required:"true" maxLength:"64"`
	Follow bool   `query:"follow"`
}

func (r *rest) batchOutput(ctx context.Context, in *batchOutputInput) (func(context.Context, sendFunc) error, error) {
	rows, err := r.s.store.Actions(ctx, store.ActionFilter{Batch: in.Batch})
	if err != nil {
		return nil, err
	}
	if in.Batch == "" || len(rows) == 0 {
		return nil, notFound("batch", in.Batch, false)
	}
	slices.Reverse(rows)
	ids := make([]wire.ID, len(rows))
	for i, a := range rows {
		ids[i] = a.ID
	}
	return r.follow(ids, in.Follow), nil
}

type outputInput struct {
	ByID
	Follow bool `query:"follow"`
}

func (r *rest) actionOutput(ctx context.Context, in *outputInput) (func(context.Context, sendFunc) error, error) {
	a, err := r.action(ctx, in.ID, false)
	if err != nil {
		return nil, err
	}
	return r.follow([]wire.ID{a.ID}, in.Follow), nil
}

func (r *rest) follow(ids []wire.ID, follow bool) func(context.Context, sendFunc) error {
	return func(ctx context.Context, send sendFunc) error {
		return r.s.followActions(ctx, ids, follow, func(o api.Output) error { return send(o) })
	}
}
