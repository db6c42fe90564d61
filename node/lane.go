package node

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/session"
	"sallyport/internal/wire"
)

const (
	// maxLanes and maxLanesPerPeer bound the lanes of an instance, in total
	// and by one RCP or gateway.
	maxLanes        = 32
	maxLanesPerPeer = 8
	// laneRate and laneBurst bound how often one channel may ask, per second:
	// each time may cost a connection and a TLS handshake.
	laneRate  = 10
	laneBurst = 16
	// laneWithin is how long a leg may take to be there.
	laneWithin = 5 * time.Second
)

var (
	errLanesStopped = errors.New("the node is stopping")
	errLaneTotal    = fmt.Errorf("%d lanes are open, the limit", maxLanes)
	errLanePerPeer  = fmt.Errorf("%d lanes by this party are open, the limit", maxLanesPerPeer)
)

// lanes are those of one instance. They outlive the request that asked for
// them, and the channel.
type lanes struct {
	mu     sync.Mutex
	ctx    context.Context // of Run; nil while it does not run
	open   map[*lane]struct{}
	byPeer map[wire.ID]int
	wg     sync.WaitGroup
}

type lane struct {
	peer identity.Peer
	cut  context.CancelCauseFunc
}

func newLanes() *lanes { return &lanes{open: map[*lane]struct{}{}, byPeer: map[wire.ID]int{}} }

// Run lets lanes be until ctx ends, and returns when all have ended.
func (l *lanes) Run(ctx context.Context) error {
	l.mu.Lock()
	l.ctx = ctx
	l.mu.Unlock()
	<-ctx.Done()
	l.mu.Lock()
	l.ctx = nil
	l.mu.Unlock()
	l.wg.Wait()
	return nil
}

// enter takes a place for a lane by peer, whose end is leave.
func (l *lanes) enter(peer identity.Peer) (ctx context.Context, leave func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	id := peer.Party.ID
	switch {
	case l.ctx == nil:
		return nil, nil, errLanesStopped
	case len(l.open) >= maxLanes:
		return nil, nil, errLaneTotal
	case l.byPeer[id] >= maxLanesPerPeer:
		return nil, nil, errLanePerPeer
	}
	x := &lane{peer: peer}
	ctx, x.cut = context.WithCancelCause(l.ctx)
	l.open[x] = struct{}{}
	l.byPeer[id]++
	l.wg.Add(1)
	return ctx, func() {
		x.cut(nil)
		l.mu.Lock()
		delete(l.open, x)
		if l.byPeer[id]--; l.byPeer[id] == 0 {
			delete(l.byPeer, id)
		}
		l.mu.Unlock()
		l.wg.Done()
	}, nil
}

// cut ends the lanes by peers for which gone is true.
func (l *lanes) cut(gone func(identity.Peer) bool, cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for x := range l.open {
		if gone(x.peer) {
			x.cut(cause)
		}
	}
}

// count is the number of lanes that are open.
func (l *lanes) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.open)
}

// takeLane answers POST /v1/lanes: it connects to where the channel goes, and
// nowhere else, or expects the ticket on our port. What comes through the lane
// must prove, as in a CONNECT stream, that it is a gateway, and may only reach
// targets.
func (in *instance) takeLane(w http.ResponseWriter, r *http.Request, c *channel.Conn, pace *rate.Limiter) {
	refuse := func(status int, err error) {
		in.log.Info("lane refused", "upstream", c.Peer().String(), "error", err)
		channel.Refuse(w, status, "node: "+err.Error())
	}
	var req wire.LaneRequest
	err := wire.DecodeJSON(r.Body, wire.MaxLaneBody, &req)
	if err == nil {
		err = req.Validate()
	}
	switch {
	case err != nil:
		refuse(http.StatusBadRequest, err)
		return
	case req.Node != "" && req.Node != in.id.ID():
		refuse(http.StatusNotFound, errors.New("this is another node"))
		return
	case !pace.Allow():
		refuse(http.StatusTooManyRequests, fmt.Errorf("more than %d lanes a second are asked for", laneRate))
		return
	}
	ctx, leave, err := in.lanes.enter(c.Peer())
	if errors.Is(err, errLanesStopped) {
		refuse(http.StatusServiceUnavailable, err)
		return
	} else if err != nil {
		refuse(http.StatusTooManyRequests, err)
		return
	}
	leg, err := c.TakeLane(r.Context(), req)
	if err != nil {
		leave()
		if errors.Is(err, channel.ErrNoLane) {
			refuse(http.StatusConflict, err)
		} else {
			refuse(http.StatusBadGateway, err)
		}
		return
	}
	go func() { // lanes.Run waits for it
		defer leave()
		defer leg.Close()
		in.serveLane(ctx, leg, c)
	}()
	channel.GrantLane(w, req)
}

func (in *instance) serveLane(ctx context.Context, leg *channel.Leg, c *channel.Conn) {
	within, cancel := context.WithTimeout(ctx, laneWithin)
	conn, err := leg.Accept(within)
	cancel()
	if err == nil {
		in.log.Debug("lane open", "upstream", c.Peer().String(), "address", conn.RemoteAddr().String())
		err = session.ServeLane(ctx, conn, in.id, in.serveTarget)
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	in.log.Debug("lane ended", "upstream", c.Peer().String(), "reason", err)
}
