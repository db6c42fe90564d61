package rcp

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"time"

	"golang.org/x/time/rate"

	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

const (
	// laneWithin is how long all legs of a lane may take.
	laneWithin = 3 * time.Second
	// laneRate and laneBurst bound how often one upstream channel may ask for
	// a lane, per second: a lane serves many streams.
	laneRate  = 50
	laneBurst = 200
)

var (
	errLaneTotal  = fmt.Errorf("%d lanes are open, the limit", maxLanes)
	errLaneSealed = fmt.Errorf("%d sealed lanes are open, the limit", maxSealed)
	errLanePerOne = fmt.Errorf("%d lanes to this node are open, the limit", maxLanesPerNode)
)

// takeLane answers POST /v1/lanes of an upstream peer: it fetches the leg
// below, then offers or dials the one above, and joins the two. 200 means that
// the leg below is there and the ticket for the one above is good.
func (r *Relay) takeLane(w http.ResponseWriter, req *http.Request, up *channel.Conn, pace *rate.Limiter) {
	ctx, cancel := context.WithTimeout(req.Context(), laneWithin)
	defer cancel()
	ask, err := r.beginLane(ctx, req, up, pace)
	if no, ok := errors.AsType[*refused](err); ok {
		r.metrics.lanesRefused.WithLabelValues(no.label()).Inc()
		r.log.Info("lane refused", "node", wire.Quotable(string(ask.Node)), "upstream", up.Peer().String(), "sealed", ask.Sealed, "status", no.status, "reason", no.reason)
		channel.Refuse(w, no.status, printable("rcp "+r.id.ID().Short()+": "+no.reason, 500))
		return
	}
	channel.GrantLane(w, ask)
}

// beginLane returns a *refused, or nil when the lane is on its way.
func (r *Relay) beginLane(ctx context.Context, req *http.Request, up *channel.Conn, pace *rate.Limiter) (ask wire.LaneRequest, err error) {
	err = wire.DecodeJSON(req.Body, wire.MaxLaneBody, &ask)
	if err == nil {
		err = ask.Validate()
	}
	if err != nil {
		return wire.LaneRequest{}, refusef(http.StatusBadRequest, "lane: %v", err)
	}
	if r.cfg.Lanes.Off() && !ask.Sealed {
		return ask, refusef(http.StatusForbidden, "bare lanes are off here (SALLYPORT_RCP_LANES)")
	}
	j, no := r.laneJourney(ask)
	if no != nil {
		return ask, no
	}
	if !pace.Allow() {
		return ask, refusef(http.StatusTooManyRequests, "more than %d lanes a second are asked for", laneRate)
	}
	leave, err := r.lanes.enter(ask.Node, ask.Sealed)
	if err != nil {
		return ask, refusef(http.StatusTooManyRequests, "%v", err)
	}
	down, a, no := r.legBelow(ctx, j, ask.Sealed)
	if no != nil {
		leave()
		return ask, no
	}
	leg, err := up.TakeLane(ctx, ask)
	if err != nil {
		_ = down.Close()
		leave()
		return ask, noLeg(err)
	}
	l := &lane{r: r, node: ask.Node, sealed: ask.Sealed, up: end{conn: up, peer: up.Peer()}, down: end{conn: a.conn, peer: a.peer}, cutting: make(chan error, 1), orphan: laneOrphan, linger: laneLinger}
	r.tasks.Go(func() {
		defer leave()
		l.run(r.errands, leg, down)
	})
	return ask, nil
}

// laneJourney checks a request as parseJourney checks a CONNECT.
func (r *Relay) laneJourney(ask wire.LaneRequest) (journey, *refused) {
	j := journey{to: target{id: ask.Node}, hops: ask.Hops, via: ask.Via}
	if j.hops == 0 {
		j.hops = wire.MaxHops
	}
	switch {
	case ask.Node == "" || ask.Node == r.id.ID():
		return j, refusef(http.StatusBadRequest, "a lane leads to a node")
	case slices.Contains(j.via, r.id.ID()):
		return j, refusef(http.StatusLoopDetected, "loop: this request for a lane was here before")
	case len(j.via) >= wire.MaxHops:
		return j, refusef(http.StatusLoopDetected, "the request for a lane passed %d RCPs already, the limit", wire.MaxHops)
	case r.draining.Load() != nil:
		return j, refusef(http.StatusServiceUnavailable, "the RCP is draining")
	}
	return j, nil
}

// legBelow fetches the leg toward the node by the best way that works.
func (r *Relay) legBelow(ctx context.Context, j journey, sealed bool) (channel.LaneConn, *attached, *refused) {
	ways, gone := r.table.route(j.to)
	if len(ways) == 0 {
		return nil, nil, unreachable(j, gone)
	}
	var last *refused
	tries := 0
	for _, way := range ways {
		if way.Role != wire.RoleNode {
			last = worse(last, refusef(http.StatusBadRequest, "a lane leads to a node, not to a %s", way.Role))
			continue
		}
		ask := wire.LaneRequest{Sealed: sealed} // a party is told nothing else but its ticket
		if len(way.Path) > 0 {
			if _, no := r.headerFor(j, way); no != nil {
				last = worse(last, no)
				continue
			}
			ask.Node, ask.Hops, ask.Via = j.to.id, j.hops-1, append(slices.Clone(j.via), r.id.ID())
		}
		for _, a := range r.nextHops(j, way) {
			if tries++; tries > maxTries || ctx.Err() != nil {
				break
			}
			leg, err := a.openLane(ctx, ask)
			if err == nil {
				return leg, a, nil
			}
			last = worse(last, explainLane(a, err))
		}
	}
	if last == nil {
		last = refusef(http.StatusServiceUnavailable, "%s has just gone", j.name())
	}
	return nil, nil, last
}

// openLane asks this party for its leg.
func (a *attached) openLane(ctx context.Context, ask wire.LaneRequest) (channel.LaneConn, error) {
	if !mayAsk(a.peer, http.MethodPost, wire.PathLanes) {
		return nil, fmt.Errorf("%w: POST %s to %s", errNotAllowed, wire.PathLanes, a.peer)
	}
	return a.conn.OpenLane(ctx, ask)
}

// explainLane turns the failure of the leg below into a status: 409 says that
// no lane can be had this way, whatever is tried.
func explainLane(a *attached, err error) *refused {
	var no *channel.RefusedError
	switch {
	case errors.As(err, &no) && no.Status == http.StatusNotFound && (no.Reason == "" || a.peer.Party.Role == wire.RoleNode):
		return refusef(http.StatusConflict, "%s knows no lanes yet", a.peer)
	case errors.As(err, &no) && (no.Status == http.StatusForbidden || no.Status == http.StatusConflict || no.Status == http.StatusTooManyRequests):
		return refusef(no.Status, "%s", no.Reason)
	case errors.As(err, &no):
		return explain(a, err)
	case a.conn.Err() != nil:
		return explain(a, err)
	}
	return noLeg(err)
}

// noLeg is why a leg of ours did not come about.
func noLeg(err error) *refused {
	switch {
	case errors.Is(err, channel.ErrNoLane):
		return refusef(http.StatusConflict, "%v", err)
	case errors.Is(err, context.DeadlineExceeded):
		return refusef(http.StatusGatewayTimeout, "%v", err)
	case errors.Is(err, channel.ErrDraining):
		return refusef(http.StatusServiceUnavailable, "%v", err)
	}
	return refusef(http.StatusBadGateway, "%v", err)
}

// label is the reason of a refused lane in the metrics.
func (e *refused) label() string {
	switch e.status {
	case http.StatusBadRequest:
		return "malformed"
	case http.StatusForbidden:
		return "off"
	case http.StatusNotFound, http.StatusServiceUnavailable:
		return "not-connected"
	case http.StatusConflict:
		return "impossible"
	case http.StatusTooManyRequests:
		return "limit"
	case http.StatusLoopDetected:
		return "loop"
	case http.StatusGatewayTimeout:
		return "timeout"
	case http.StatusBadGateway:
		return "failed"
	}
	return strconv.Itoa(e.status)
}

// laneChannel is what a lane needs of a channel beside which it runs.
type laneChannel interface {
	Done() <-chan struct{}
}

// end is one end of a lane.
type end struct {
	conn laneChannel
	peer identity.Peer
}

// channelOf finds a live channel of the party at an end; nil if it has none.
func (r *Relay) channelOf(e end) laneChannel {
	for _, a := range r.roster.channels(target{id: e.peer.Party.ID}) {
		if a.conn.Err() == nil {
			return a.conn
		}
	}
	for _, c := range r.upstreams.all() {
		if c.Peer().Party == e.peer.Party && c.Err() == nil {
			return c
		}
	}
	return nil
}
