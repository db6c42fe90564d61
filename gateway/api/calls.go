package api

import (
	"context"
	"net/http"
	"strconv"
)

// About says which gateway answers, and who it thinks is asking.
func (c *Client) About(ctx context.Context) (About, error) {
	return get[About](ctx, c, "/about", nil)
}

// Nodes lists nodes by name. An empty selector is all of them.
func (c *Client) Nodes(ctx context.Context, q NodeQuery) ([]Node, error) {
	return list[Node](ctx, c, "/nodes", values("selector", q.Selector, "state", q.State), q.Page)
}

// Node takes a name, a unique prefix or a UUID.
func (c *Client) Node(ctx context.Context, ref string) (NodeDetail, error) {
	return get[NodeDetail](ctx, c, at("/nodes", ref), nil)
}

// TagNode sets and removes tags.
func (c *Client) TagNode(ctx context.Context, ref string, change TagChange) (NodeDetail, error) {
	return post[NodeDetail](ctx, c, at("/nodes", ref, "tags"), change)
}

// TraceNode asks for the way to a node; it opens a session if one is to be had.
func (c *Client) TraceNode(ctx context.Context, ref string) (Trace, error) {
	return get[Trace](ctx, c, at("/nodes", ref, "trace"), nil)
}

// DrainNode lets a node finish what runs and take no more.
func (c *Client) DrainNode(ctx context.Context, ref string, in DrainNode) (NodeDetail, error) {
	return post[NodeDetail](ctx, c, at("/nodes", ref, "drain"), in)
}

// ResumeNode ends a drain.
func (c *Client) ResumeNode(ctx context.Context, ref string) (NodeDetail, error) {
	return post[NodeDetail](ctx, c, at("/nodes", ref, "resume"), nil)
}

// UnlockNode makes a locked node obey this installation.
func (c *Client) UnlockNode(ctx context.Context, ref string) (NodeDetail, error) {
	return post[NodeDetail](ctx, c, at("/nodes", ref, "unlock"), nil)
}

// RenewNode renews a node's certificate now; rekey makes it use a new key, and
// revokes the old one.
func (c *Client) RenewNode(ctx context.Context, ref string, rekey bool) (out NodeDetail, err error) {
	q := values()
	if rekey {
		q = values("rekey", "true")
	}
	err = c.call(ctx, http.MethodPost, at("/nodes", ref, "renew"), q, nil, &out)
	return out, err
}

// ReidentifyNode makes a connected node enrol with another UUID and key. It
// returns the node that it became.
func (c *Client) ReidentifyNode(ctx context.Context, ref string, in Reidentify) (NodeDetail, error) {
	return post[NodeDetail](ctx, c, at("/nodes", ref, "reidentify"), in)
}

// RevokeNode revokes a node's key; the node stays listed as revoked.
func (c *Client) RevokeNode(ctx context.Context, ref string) (Removal, error) {
	return post[Removal](ctx, c, at("/nodes", ref, "revoke"), nil)
}

// RemoveNode revokes a node's key and takes it off the list.
func (c *Client) RemoveNode(ctx context.Context, ref string) (out Removal, err error) {
	err = c.call(ctx, http.MethodDelete, at("/nodes", ref), nil, nil, &out)
	return out, err
}

// RCPs lists RCPs by name.
func (c *Client) RCPs(ctx context.Context) ([]RCP, error) {
	return list[RCP](ctx, c, "/rcps", values(), Page{})
}

// RCP takes a name, a unique prefix or a UUID.
func (c *Client) RCP(ctx context.Context, ref string) (RCP, error) {
	return get[RCP](ctx, c, at("/rcps", ref), nil)
}

// AddRCP makes a record and its join code.
func (c *Client) AddRCP(ctx context.Context, in AddRCP) (RCPJoin, error) {
	return post[RCPJoin](ctx, c, "/rcps", in)
}

// SetRCP changes a record.
func (c *Client) SetRCP(ctx context.Context, ref string, in SetRCP) (out RCP, err error) {
	err = c.call(ctx, http.MethodPatch, at("/rcps", ref), nil, in, &out)
	return out, err
}

// JoinRCP makes a new join code for an RCP.
func (c *Client) JoinRCP(ctx context.Context, ref string, in JoinRCP) (RCPJoin, error) {
	return post[RCPJoin](ctx, c, at("/rcps", ref, "join"), in)
}

// DrainRCP asks an RCP to take no more.
func (c *Client) DrainRCP(ctx context.Context, ref string) (RCP, error) {
	return post[RCP](ctx, c, at("/rcps", ref, "drain"), nil)
}

// ResumeRCP ends a drain.
func (c *Client) ResumeRCP(ctx context.Context, ref string) (RCP, error) {
	return post[RCP](ctx, c, at("/rcps", ref, "resume"), nil)
}

// RetryRCP dials a failed RCP at once.
func (c *Client) RetryRCP(ctx context.Context, ref string) (RCP, error) {
	return post[RCP](ctx, c, at("/rcps", ref, "retry"), nil)
}

// RemoveRCP revokes an RCP's key and takes it off the list.
func (c *Client) RemoveRCP(ctx context.Context, ref string) (out Removal, err error) {
	err = c.call(ctx, http.MethodDelete, at("/rcps", ref), nil, nil, &out)
	return out, err
}

// CreateJoin makes a join code for nodes.
func (c *Client) CreateJoin(ctx context.Context, in CreateJoin) (CreatedJoin, error) {
	return post[CreatedJoin](ctx, c, "/joins", in)
}

// Joins lists join codes, newest first, without their secrets.
func (c *Client) Joins(ctx context.Context) ([]Join, error) {
	return list[Join](ctx, c, "/joins", values(), Page{})
}

// RevokeJoin makes a join code useless.
func (c *Client) RevokeJoin(ctx context.Context, id string) (Join, error) {
	return post[Join](ctx, c, at("/joins", id, "revoke"), nil)
}

// Requests lists certificate requests, newest first.
func (c *Client) Requests(ctx context.Context, q RequestQuery) ([]Request, error) {
	return list[Request](ctx, c, "/requests", values("state", q.State, "selector", q.Selector), q.Page)
}

// GrantRequest takes the ID of a request, or the name in exactly one.
func (c *Client) GrantRequest(ctx context.Context, ref string, in Grant) (Request, error) {
	return post[Request](ctx, c, at("/requests", ref, "grant"), in)
}

// DenyRequest refuses a request, and tells the party so.
func (c *Client) DenyRequest(ctx context.Context, ref string, in Deny) (Request, error) {
	return post[Request](ctx, c, at("/requests", ref, "deny"), in)
}

// DiscardRequest forgets a request without telling the party.
func (c *Client) DiscardRequest(ctx context.Context, ref string) (Request, error) {
	return post[Request](ctx, c, at("/requests", ref, "discard"), nil)
}

// DecideRequests decides on many requests; verb is grant, deny or discard.
func (c *Client) DecideRequests(ctx context.Context, verb string, in DecideRequests) (DecidedRequests, error) {
	return post[DecidedRequests](ctx, c, at("/requests", verb), in)
}

// ApplyRules creates and changes rules by which requests are granted.
func (c *Client) ApplyRules(ctx context.Context, in ApplyRules) (AppliedRules, error) {
	return post[AppliedRules](ctx, c, "/rules", in)
}

// Rules lists them by name.
func (c *Client) Rules(ctx context.Context) ([]Rule, error) {
	return list[Rule](ctx, c, "/rules", values(), Page{})
}

// DeleteRule deletes a rule; what it granted stays.
func (c *Client) DeleteRule(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, at("/rules", name), nil, nil, nil)
}

// Apply creates and changes policies and deployments.
func (c *Client) Apply(ctx context.Context, in Apply) (Applied, error) {
	return post[Applied](ctx, c, "/apply", in)
}

// Policies lists the current versions of policies by name, without their specs.
func (c *Client) Policies(ctx context.Context) ([]Policy, error) {
	return list[Policy](ctx, c, "/policies", values(), Page{})
}

// Policy shows a policy with all its versions.
func (c *Client) Policy(ctx context.Context, name string) (PolicyDetail, error) {
	return get[PolicyDetail](ctx, c, at("/policies", name), nil)
}

// RollbackPolicy makes an older version the current one.
func (c *Client) RollbackPolicy(ctx context.Context, name string, in Rollback) (Applied, error) {
	return post[Applied](ctx, c, at("/policies", name, "rollback"), in)
}

// DeletePolicy deletes a policy that no deployment names.
func (c *Client) DeletePolicy(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, at("/policies", name), nil, nil, nil)
}

// Deployments lists deployments by name.
func (c *Client) Deployments(ctx context.Context) ([]Deployment, error) {
	return list[Deployment](ctx, c, "/deployments", values(), Page{})
}

// DeploymentStatus shows a deployment with each node's state.
func (c *Client) DeploymentStatus(ctx context.Context, name string) (DeploymentStatus, error) {
	return get[DeploymentStatus](ctx, c, at("/deployments", name), nil)
}

// DeleteDeployment takes its policies off the nodes.
func (c *Client) DeleteDeployment(ctx context.Context, name string) (out Applied, err error) {
	err = c.call(ctx, http.MethodDelete, at("/deployments", name), nil, nil, &out)
	return out, err
}

// Actions lists actions, newest first.
func (c *Client) Actions(ctx context.Context, q ActionQuery) ([]Action, error) {
	return list[Action](ctx, c, "/actions", values("node", q.Node, "state", q.State, "batch", q.Batch), q.Page)
}

// Action takes an ID or a unique prefix of one.
func (c *Client) Action(ctx context.Context, id string) (Action, error) {
	return get[Action](ctx, c, at("/actions", id), nil)
}

// StartAction starts actions and returns at once; see [Client.FollowActions].
func (c *Client) StartAction(ctx context.Context, in RunAction) (StartedActions, error) {
	return post[StartedActions](ctx, c, "/actions", in)
}

// CancelAction cancels a queued or running action.
func (c *Client) CancelAction(ctx context.Context, id string) (Action, error) {
	return post[Action](ctx, c, at("/actions", id, "cancel"), nil)
}

// Events lists events, newest first.
func (c *Client) Events(ctx context.Context, q EventQuery) ([]Event, error) {
	v := values("node", q.Node, "severity", q.Severity, "state", q.State, "key", q.Key, "since", stamp(q.Since))
	if q.Merged {
		v.Set("merged", strconv.FormatBool(true))
	}
	return list[Event](ctx, c, "/events", v, q.Page)
}

// EachEvent calls f for each event that the query finds, newest first, without
// holding them all; the query's page is not used.
func (c *Client) EachEvent(ctx context.Context, q EventQuery, f func(Event) error) error {
	v := values("node", q.Node, "severity", q.Severity, "state", q.State, "key", q.Key, "since", stamp(q.Since), "limit", strconv.Itoa(MaxPage))
	if q.Merged {
		v.Set("merged", strconv.FormatBool(true))
	}
	for {
		part, err := get[List[Event]](ctx, c, "/events", v)
		if err != nil {
			return err
		}
		for _, e := range part.Items {
			if err := f(e); err != nil {
				return err
			}
		}
		if part.Next == "" {
			return nil
		}
		v.Set("cursor", part.Next)
	}
}

// Event takes an ID or a unique prefix of one.
func (c *Client) Event(ctx context.Context, id string) (EventDetail, error) {
	return get[EventDetail](ctx, c, at("/events", id), nil)
}

// AckEvent marks an event as acknowledged.
func (c *Client) AckEvent(ctx context.Context, id string) (EventDetail, error) {
	return post[EventDetail](ctx, c, at("/events", id, "ack"), nil)
}

// CloseEvent closes an event.
func (c *Client) CloseEvent(ctx context.Context, id string) (EventDetail, error) {
	return post[EventDetail](ctx, c, at("/events", id, "close"), nil)
}

// AnnotateEvent adds a remark to an event.
func (c *Client) AnnotateEvent(ctx context.Context, id string, in Annotate) (EventDetail, error) {
	return post[EventDetail](ctx, c, at("/events", id, "annotations"), in)
}

// CreateToken makes an API token.
func (c *Client) CreateToken(ctx context.Context, in CreateToken) (CreatedToken, error) {
	return post[CreatedToken](ctx, c, "/tokens", in)
}

// Tokens lists API tokens, newest first, without their secrets.
func (c *Client) Tokens(ctx context.Context) ([]Token, error) {
	return list[Token](ctx, c, "/tokens", values(), Page{})
}

// RevokeToken makes an API token useless.
func (c *Client) RevokeToken(ctx context.Context, id string) (Token, error) {
	return post[Token](ctx, c, at("/tokens", id, "revoke"), nil)
}

// Audit lists the audit log, newest first.
func (c *Client) Audit(ctx context.Context, q AuditQuery) ([]AuditEntry, error) {
	return list[AuditEntry](ctx, c, "/audit", values("who", q.Who, "what", q.What, "since", stamp(q.Since)), q.Page)
}

// Targets lists targets by name.
func (c *Client) Targets(ctx context.Context) ([]Target, error) {
	return list[Target](ctx, c, "/targets", values(), Page{})
}

// Target takes a name or a unique prefix.
func (c *Client) Target(ctx context.Context, ref string) (TargetDetail, error) {
	return get[TargetDetail](ctx, c, at("/targets", ref), nil)
}

// Forwards lists TCP forwards by address.
func (c *Client) Forwards(ctx context.Context) ([]Forward, error) {
	return list[Forward](ctx, c, "/forwards", values(), Page{})
}

// AddForward makes the gateway listen on a TCP port that leads to a target.
func (c *Client) AddForward(ctx context.Context, in AddForward) (Forward, error) {
	return post[Forward](ctx, c, "/forwards", in)
}

// RemoveForward takes the address that the forward listens on.
func (c *Client) RemoveForward(ctx context.Context, listen string) (out Forward, err error) {
	err = c.call(ctx, http.MethodDelete, at("/forwards", listen), nil, nil, &out)
	return out, err
}

// CA says which issuers there are, and who is not on the issuing one.
func (c *Client) CA(ctx context.Context) (CA, error) { return get[CA](ctx, c, "/ca", nil) }

// RotateCA begins a rollover, or rehearses it.
func (c *Client) RotateCA(ctx context.Context, in RotateCA) (CAChange, error) {
	return post[CAChange](ctx, c, "/ca/rotate", in)
}

// FinishCA ends a rollover, or rehearses that.
func (c *Client) FinishCA(ctx context.Context, in FinishCA) (CAChange, error) {
	return post[CAChange](ctx, c, "/ca/finish", in)
}

// AbortCA turns a rollover round.
func (c *Client) AbortCA(ctx context.Context) (CAChange, error) {
	return post[CAChange](ctx, c, "/ca/abort", nil)
}
