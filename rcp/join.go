package rcp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

const (
	// maxLanes and maxLanesPerNode bound the lanes of this RCP. A lane takes
	// up to six file descriptors: its sockets, and two pipes for splice(2).
	maxLanes        = 512
	maxLanesPerNode = 8
	// maxSealed of them may have sealed legs: such a lane holds up to 600 KiB
	// for a direction whose receiver is slow.
	maxSealed = 128
	// laneOrphan is how long a lane outlives the last channel of one of its
	// parties: as long as it takes to come back.
	laneOrphan = 30 * time.Second
	// laneLinger is how often a lane that has ended in one direction must move
	// laneChunk in the other, after the first time: an end that has closed for
	// good looks no different, and must not hold a place for ever.
	laneLinger = 15 * time.Second
	// laneChunk is how many bytes pass before they are counted.
	laneChunk = 4 << 20
)

var (
	errLaneOrphan = errors.New("the party has no channel any more")
	errLaneHalf   = errors.New("one direction has ended, and nothing moves in the other")
)

// lanes are the lanes that are open, or being opened.
type lanes struct {
	mu      sync.Mutex
	n       int
	sealed  int // of n
	perNode map[wire.ID]int
	open    map[*lane]struct{}
	idle    chan struct{} // closed when n falls to 0; made on demand
}

func newLanes() *lanes {
	return &lanes{perNode: map[wire.ID]int{}, open: map[*lane]struct{}{}}
}

// enter takes a place for a lane to a node.
func (l *lanes) enter(node wire.ID, sealed bool) (leave func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.n >= maxLanes:
		return nil, errLaneTotal
	case sealed && l.sealed >= maxSealed:
		return nil, errLaneSealed
	case l.perNode[node] >= maxLanesPerNode:
		return nil, errLanePerOne
	}
	l.n++
	if sealed {
		l.sealed++
	}
	l.perNode[node]++
	return sync.OnceFunc(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.n--
		if sealed {
			l.sealed--
		}
		if l.perNode[node]--; l.perNode[node] == 0 {
			delete(l.perNode, node)
		}
		if l.n == 0 && l.idle != nil {
			close(l.idle)
			l.idle = nil
		}
	}), nil
}

func (l *lanes) add(x *lane) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open[x] = struct{}{}
}

func (l *lanes) remove(x *lane) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.open, x)
}

// count is the number of lanes that are open.
func (l *lanes) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.open)
}

// cut ends every lane with a party for which gone is true.
func (l *lanes) cut(gone func(identity.Peer) bool, cause error) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for x := range l.open {
		if gone(x.up.peer) || gone(x.down.peer) {
			x.cut(cause)
			n++
		}
	}
	return n
}

// wait returns when no lane is left, or ctx ends.
func (l *lanes) wait(ctx context.Context) {
	l.mu.Lock()
	if l.n == 0 {
		l.mu.Unlock()
		return
	}
	if l.idle == nil {
		l.idle = make(chan struct{})
	}
	idle := l.idle
	l.mu.Unlock()
	select {
	case <-idle:
	case <-ctx.Done():
	}
}

// lane is two connections that are joined: what one side sends goes to the
// other. It holds TLS between gateway and node. Bare TCP connections the kernel
// joins, and this program sees no byte; sealed legs end their own TLS here.
type lane struct {
	r        *Relay
	node     wire.ID
	sealed   bool
	up, down end
	cutting  chan error    // holds why
	orphan   time.Duration // laneOrphan
	linger   time.Duration // laneLinger
}

func (l *lane) cut(cause error) {
	select {
	case l.cutting <- cause:
	default: // it is being cut
	}
}

// run waits for the leg above, and joins the two until both directions have
// ended or the lane is cut.
func (l *lane) run(ctx context.Context, above *channel.Leg, down channel.LaneConn) {
	r, m := l.r, l.metrics()
	log := r.log.With("node", l.node, "sealed", l.sealed, "upstream", l.up.peer.String(), "downstream", l.down.peer.String())
	defer above.Close()
	defer func() { _ = down.Close() }()
	r.lanes.add(l) // cut from here on
	defer r.lanes.remove(l)
	if r.id.Revoked(l.up.peer.Key) || r.id.Revoked(l.down.peer.Key) {
		l.cut(identity.ErrRevoked)
	}
	within, cancel := context.WithTimeout(ctx, laneWithin)
	up, err := above.Accept(within)
	cancel()
	if err != nil {
		r.metrics.lanesRefused.WithLabelValues("no-show").Inc()
		log.Info("lane given up", "error", err)
		return
	}
	defer func() { _ = up.Close() }()
	m.open.Inc()
	defer m.open.Dec()
	m.opened.Inc()
	log.Info("lane open", "above", up.RemoteAddr().String(), "below", down.RemoteAddr().String())
	began := time.Now()
	bytesDown, bytesUp, err := l.join(ctx, up, down)
	log.Info("lane ended", "took", time.Since(began), "bytes_down", bytesDown, "bytes_up", bytesUp, "reason", err)
}

// join copies both ways. An end of one direction is handed on; the other goes
// on until it ends too.
func (l *lane) join(ctx context.Context, up, down channel.LaneConn) (bytesDown, bytesUp int64, err error) {
	var sent, received atomic.Int64
	m := l.metrics()
	ended := make(chan error, 2)
	go func() { ended <- move(down, up, &sent, m.down) }()
	go func() { ended <- move(up, down, &received, m.up) }()
	stop := func() { _, _ = up.Close(), down.Close() }
	upDone, downDone := l.up.conn.Done(), l.down.conn.Done()
	orphan := time.NewTimer(l.orphan)
	orphan.Stop()
	defer orphan.Stop()
	half := time.NewTimer(l.linger)
	half.Stop()
	defer half.Stop()
	moved := int64(-1) // when half fired last
	for left := 2; left > 0; {
		select {
		case e := <-ended:
			if left--; e != nil {
				err = first(err, e)
				stop()
			}
			half.Reset(l.linger)
		case <-half.C:
			now := sent.Load() + received.Load()
			if now == moved {
				err = first(err, errLaneHalf)
				stop()
			}
			moved = now
			half.Reset(l.linger)
		case cause := <-l.cutting:
			err = first(err, cause)
			stop()
		case <-ctx.Done():
			err = first(err, context.Cause(ctx))
			stop()
			ctx = context.Background() // told once
		case <-upDone:
			upDone = nil
			orphan.Reset(l.orphan)
		case <-downDone:
			downDone = nil
			orphan.Reset(l.orphan)
		case <-orphan.C:
			for _, x := range []struct {
				end  end
				done *<-chan struct{}
			}{{l.up, &upDone}, {l.down, &downDone}} {
				if *x.done != nil {
					continue
				}
				c := l.r.channelOf(x.end)
				if c == nil {
					err = first(err, fmt.Errorf("%s: %w", x.end.peer, errLaneOrphan))
					stop()
					continue
				}
				*x.done = c.Done()
			}
		}
	}
	return sent.Load(), received.Load(), err
}

func first(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// move copies one direction to its end and passes that on.
func move(to, from channel.LaneConn, n *atomic.Int64, total prometheus.Counter) error {
	for {
		moved, err := pass(to, from)
		n.Add(moved)
		total.Add(float64(moved))
		switch {
		case errors.Is(err, io.EOF):
			return to.CloseWrite()
		case err != nil:
			return err
		}
	}
}

// pass moves a piece. Between two bare TCP connections io.Copy is splice(2): the
// bytes stay in the kernel. Nothing may wrap them.
func pass(to, from channel.LaneConn) (int64, error) {
	if leg, ok := from.(*channel.SealedLeg); ok {
		if to, ok := to.(*channel.SealedLeg); ok {
			return leg.Pass(to)
		}
	}
	return io.CopyN(to, from, laneChunk)
}
