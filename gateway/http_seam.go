package gateway

import (
	"context"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

// What the handlers of the REST interface need of the rest of the gateway.
// Every changing call writes its audit row in the transaction of its change,
// with the actor that ctx carries (see [store.WithActor]). Errors that a
// caller can do something about are *api.Problem, or one of the sentinels that
// problemOf knows.

// enrolling is enroll.go: join codes, RCP records and certificate requests.
type enrolling interface {
	createJoin(ctx context.Context, in api.CreateJoin) (api.CreatedJoin, error)
	addRCP(ctx context.Context, in api.AddRCP) (api.RCPJoin, error)
	joinRCP(ctx context.Context, r *store.RCP, in api.JoinRCP) (api.RCPJoin, error)
	// grant, deny and discard take the ID of a request, or the name in exactly one.
	grant(ctx context.Context, ref string, in api.Grant) (*store.Request, error)
	deny(ctx context.Context, ref string, in api.Deny) (*store.Request, error)
	discard(ctx context.Context, ref string) (*store.Request, error)
	// decideMany does the same with several; verb is grant, deny or discard.
	applyRules(ctx context.Context, in api.ApplyRules) (api.AppliedRules, error)
	deleteRule(ctx context.Context, name string) error
	// pin, importRequest and exportRequest are enrolment by files: offline.go.
	pin() api.Pin
	importRequest(ctx context.Context, in api.ImportRequest) (*store.Request, error)
	exportRequest(ctx context.Context, ref string) (api.ExportedRequest, error)
	decideMany(ctx context.Context, verb string, in api.DecideRequests) (api.DecidedRequests, error)
}

// revoking is revoke.go and renew.go. The number is that of the set of
// revocations that names the key.
type revoking interface {
	revokeNode(ctx context.Context, n *store.Node, remove bool) (number int64, err error)
	removeRCP(ctx context.Context, r *store.RCP) (number int64, err error)
	// renewNow renews a node's leaf, with a new key if rekey; the old key is revoked then.
	renewNow(ctx context.Context, id wire.ID, rekey bool) error
	// endQuarantine lets a quarantined node have what others have again.
	endQuarantine(ctx context.Context, n *store.Node) error
	// reidentify makes a connected node enrol with another UUID, and returns what it became.
	reidentify(ctx context.Context, n *store.Node, in api.Reidentify) (*store.Node, error)
}

// reaching is fleet.go, trace.go and action.go.
type reaching interface {
	// runAction decides on queued actions that were stored a moment ago: it
	// sends them, leaves them to wait, or ends those that are not connected.
	runAction(ctx context.Context, actions []*store.Action) error
	// cancelAction tells the node of an action that was marked as cancelling.
	cancelAction(ctx context.Context, a *store.Action) error
	followActions(ctx context.Context, ids []wire.ID, follow bool, f func(api.Output) error) error
	trace(ctx context.Context, n *store.Node) (api.Trace, error)
	// drainNode tells a node to take no more, or, without a drain, to take it again.
	drainNode(ctx context.Context, n *store.Node, d *wire.Drain) error
	drainRCP(ctx context.Context, r *store.RCP, on bool) error
	// seenDraining waits for a moment until what was told is seen.
	seenDraining(ctx context.Context, id wire.ID, on bool)
	retryRCP(r *store.RCP)
}
