package gateway

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/http"
	"slices"

	"github.com/danielgtaylor/huma/v2"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

func (r *rest) rcpRoutes() {
	op := func(id, method, path, summary string) huma.Operation {
		return huma.Operation{OperationID: id, Method: method, Path: path, Summary: summary}
	}
	handle(r, op("rcp.list", http.MethodGet, "/rcps", "List RCPs by name"), mayRead, r.listRCPs)
	handle(r, op("rcp.show", http.MethodGet, "/rcps/{ref}", "Show an RCP"), mayRead, r.showRCP)
	handle(r, op("rcp.add", http.MethodPost, "/rcps", "Make the record and the join code of an RCP"), mayAdmin, r.addRCP)
	handle(r, op("rcp.set", http.MethodPatch, "/rcps/{ref}", "Change the record of an RCP"), mayAdmin, r.setRCP)
	handle(r, op("rcp.join", http.MethodPost, "/rcps/{ref}/join", "Make a new join code for an RCP"), mayCertify, r.joinRCP)
	handle(r, op("rcp.drain", http.MethodPost, "/rcps/{ref}/drain", "Let an RCP take no more"), mayOperate, r.drainRCP)
	handle(r, op("rcp.resume", http.MethodPost, "/rcps/{ref}/resume", "End a drain"), mayOperate, r.resumeRCP)
	handle(r, op("rcp.retry", http.MethodPost, "/rcps/{ref}/retry", "Dial an RCP now"), mayOperate, r.retryRCP)
	handle(r, op("rcp.remove", http.MethodDelete, "/rcps/{ref}", "Revoke an RCP's key and take it off the list"), mayAdmin, r.removeRCP)
}

// rcpView joins the record of an RCP with what is known of its channel.
func (r *rest) rcpView(p *store.RCP, waiting []*store.Request) api.RCP {
	v := r.rcpSeen(p)
	switch v.State {
	case api.RCPConnected, api.RCPDraining, api.RCPRevoked: // whoever waits is somebody else, or has to say so with a code
		return v
	}
	q, known := requestOf(p, waiting)
	if q == nil {
		return v
	}
	v.Request = q.ID
	grant := fmt.Sprintf("`sallyport request grant --fingerprint %s %s`, if its key is the one that `local status` shows there", q.KeyHash.Fingerprint(), q.ID)
	if known {
		v.State, v.StateSince = api.RCPPending, utc(q.RequestedAt)
		v.StateReason = fmt.Sprintf("it waits for an operator (%s): %s", q.Reason, grant)
		return v
	}
	reason := fmt.Sprintf("a party without a join code that says it is this RCP waits for an operator (%s): %s", q.Reason, grant)
	if before := cmp.Or(v.LastError, v.StateReason); before != "" {
		reason = before + "; " + reason
	}
	v.StateReason = reason
	return v
}

// requestOf finds the request of an RCP that waits. known: it came with a join code,
// or by the RCP's own key; that a name or a UUID is his, anybody may say.
func requestOf(p *store.RCP, waiting []*store.Request) (found *store.Request, known bool) {
	for _, q := range waiting {
		if q.Name != p.Name && (p.PartyID == "" || q.PartyID != p.PartyID) {
			continue
		}
		if q.JoinID != "" || q.KeyHash == p.KeyHash {
			return q, true
		}
		if found == nil {
			found = q
		}
	}
	return found, false
}

func (r *rest) rcpSeen(p *store.RCP) api.RCP {
	v := api.RCP{
		Name: p.Name, ID: p.PartyID, State: p.State, StateReason: p.StateReason, StateSince: utc(p.StateSince), Address: p.Address, Public: list(p.Public),
		Via: p.Via, Version: p.Program, LastSeen: when(p.LastSeen), SkewSeconds: p.SkewSeconds, Source: p.Source, ETag: etag(p.Version),
	}
	if p.KeyHash != "" {
		v.Fingerprint = p.KeyHash.Fingerprint()
	}
	if p.PartyID == "" {
		v.LastError = r.s.links.lastError(p)
		return v
	}
	seen := r.s.fleet.Presence(p.PartyID)
	if seen.State != "" && seen.State != wire.StatePending && p.State != api.RCPRevoked { // who was never there is what the record says
		v.State, v.StateReason, v.StateSince, v.Carrier = rcpState(seen.State), seen.Reason, utc(seen.Since), seen.Carrier
	}
	if v.State == api.RCPConnected && !seen.Connected { // it gets a moment before it counts as failed
		v.State, v.StateReason = api.RCPConnecting, "its channel has ended; it is dialled, or expected, again"
	}
	if p.Draining && v.State == api.RCPConnected {
		v.State = api.RCPDraining
	}
	if seen.LastSeen.After(p.LastSeen) {
		v.LastSeen = when(seen.LastSeen)
	}
	if hop, ok := r.s.fleet.hop(p.PartyID); ok {
		v.Carrier, v.RTT, v.LastError = cmp.Or(v.Carrier, hop.Carrier), hop.RTT.Seconds(), hop.LastErr
	}
	n := r.s.fleet.behind(p.PartyID)
	v.Online, v.Pending = n.Online, n.Pending
	return v
}

func (r *rest) listRCPs(ctx context.Context, in *Page) (*body[api.List[api.RCP]], error) {
	rows, err := r.s.store.RCPs(ctx)
	if err != nil {
		return nil, err
	}
	waiting, err := r.s.store.WaitingRCPs(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]api.RCP, len(rows))
	for i, p := range rows {
		out[i] = r.rcpView(p, waiting)
	}
	l, err := slicePage(out, *in, func(p api.RCP) string { return p.Name })
	return answer(l), err
}

func (r *rest) showRCP(ctx context.Context, in *ByRef) (*tagged[api.RCP], error) {
	return r.changeRCP(ctx, in.Ref, false, func(*store.RCP) error { return nil })
}

// changeRCP finds an RCP, does something to it and shows it as it is then.
func (r *rest) changeRCP(ctx context.Context, ref string, changing bool, f func(*store.RCP) error) (*tagged[api.RCP], error) {
	p, err := r.rcp(ctx, ref, changing)
	if err != nil {
		return nil, err
	}
	if err := f(p); err != nil {
		return nil, err
	}
	if p, err = r.s.store.RCP(ctx, p.Name); err != nil {
		return nil, err
	}
	waiting, err := r.s.store.WaitingRCPs(ctx)
	if err != nil {
		return nil, err
	}
	return &tagged[api.RCP]{ETag: etag(p.Version), Body: r.rcpView(p, waiting)}, nil
}

func (r *rest) addRCP(ctx context.Context, in *body[api.AddRCP]) (*body[api.RCPJoin], error) {
	if err := checkAddresses("address", in.Body.Address); err != nil {
		return nil, err
	}
	if err := checkAddresses("public", in.Body.Public...); err != nil {
		return nil, err
	}
	out, err := r.s.enrolment.addRCP(ctx, in.Body)
	return answer(out), err
}

// checkAddresses refuses what could not be dialled. Empty is allowed.
func checkAddresses(field string, addrs ...string) error {
	for _, a := range addrs {
		host, port, err := net.SplitHostPort(a)
		if a != "" && (err != nil || host == "" || port == "") {
			return api.NewProblem(api.CodeInvalid, fmt.Sprintf("%s: %q is not host:port", field, wire.Quotable(a)))
		}
	}
	return nil
}

type setRCPInput struct {
	ByRef
	Match
	Body api.SetRCP
}

func (r *rest) setRCP(ctx context.Context, in *setRCPInput) (*tagged[api.RCP], error) {
	b := in.Body
	if b.Address != nil {
		if err := checkAddresses("address", *b.Address); err != nil {
			return nil, err
		}
	}
	if b.Public != nil {
		if err := checkAddresses("public", *b.Public...); err != nil {
			return nil, err
		}
	}
	return r.changeRCP(ctx, in.Ref, true, func(found *store.RCP) error {
		return r.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
			p, err := tx.RCP(ctx, found.Name)
			if err != nil {
				return err
			}
			if err := in.check(p.Version); err != nil {
				return err
			}
			if b.Address != nil {
				p.Address = *b.Address
			}
			if b.Public != nil {
				p.Public = slices.DeleteFunc(*b.Public, func(a string) bool { return a == "" })
			}
			if b.Via != nil {
				if err := checkVia(ctx, tx, p.Name, *b.Via); err != nil {
					return err
				}
				p.Via = *b.Via
			}
			tx.Audit(ctx, "rcp.set", "rcp "+p.Name, fmt.Sprintf("address %q, public %q, via %q", p.Address, p.Public, p.Via))
			return tx.SaveRCP(ctx, p)
		})
	})
}

// checkVia refuses a chain that does not exist, is too long, or ends in itself.
func checkVia(ctx context.Context, tx *store.Tx, name, via string) error {
	for hops := 0; via != ""; hops++ {
		if via == name || hops >= wire.MaxHops {
			return api.NewProblem(api.CodeInvalid, fmt.Sprintf("via %q: the chain of RCPs ends in itself or has more than %d", wire.Quotable(via), wire.MaxHops))
		}
		p, err := tx.RCP(ctx, via)
		if err != nil {
			return api.NewProblem(api.CodeNotFound, fmt.Sprintf("via: no rcp %q", wire.Quotable(via)))
		}
		via = p.Via
	}
	return nil
}

type joinRCPInput struct {
	ByRef
	Body api.JoinRCP
}

func (r *rest) joinRCP(ctx context.Context, in *joinRCPInput) (*body[api.RCPJoin], error) {
	p, err := r.rcp(ctx, in.Ref, true)
	if err != nil {
		return nil, err
	}
	out, err := r.s.enrolment.joinRCP(ctx, p, in.Body)
	return answer(out), err
}

func (r *rest) drainRCP(ctx context.Context, in *ByRef) (*tagged[api.RCP], error) {
	return r.setDraining(ctx, in.Ref, true)
}

func (r *rest) resumeRCP(ctx context.Context, in *ByRef) (*tagged[api.RCP], error) {
	return r.setDraining(ctx, in.Ref, false)
}

func (r *rest) setDraining(ctx context.Context, ref string, on bool) (*tagged[api.RCP], error) {
	what := "rcp.resume"
	if on {
		what = "rcp.drain"
	}
	return r.changeRCP(ctx, ref, true, func(found *store.RCP) error {
		if found.PartyID == "" {
			return api.NewProblem(api.CodeConflict, fmt.Sprintf("rcp %s has not enrolled yet", found.Name))
		}
		if err := r.s.drainRCP(ctx, found, on); err != nil {
			return err
		}
		err := r.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
			p, err := tx.RCP(ctx, found.Name)
			if err != nil {
				return err
			}
			p.Draining = on
			tx.Audit(ctx, what, "rcp "+p.Name, "")
			return tx.SaveRCP(ctx, p)
		})
		if err == nil {
			r.s.seenDraining(ctx, found.PartyID, on)
		}
		return err
	})
}

func (r *rest) retryRCP(ctx context.Context, in *ByRef) (*tagged[api.RCP], error) {
	return r.changeRCP(ctx, in.Ref, true, func(p *store.RCP) error {
		err := r.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
			tx.Audit(ctx, "rcp.retry", "rcp "+p.Name, "")
			return nil
		})
		if err == nil {
			r.s.links.retry(p)
		}
		return err
	})
}

func (r *rest) removeRCP(ctx context.Context, in *ByRef) (*body[api.Removal], error) {
	p, err := r.rcp(ctx, in.Ref, true)
	if err != nil {
		return nil, err
	}
	number, err := r.s.enrolment.removeRCP(ctx, p)
	return answer(api.Removal{ID: p.PartyID, Name: p.Name, Revocations: number}), err
}
