package gateway

import (
	"cmp"
	"context"
	"errors"
	"net"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

const (
	// dialTime bounds opening one stream to a target: when there is no tunnel
	// to the node yet, one is made.
	dialTime = 15 * time.Second
	// dialTimeShort is the bound where another node can take over: a lane that
	// cannot be had and the stream after it fit in.
	dialTimeShort = 5 * time.Second
	// defaultTargetLimit is that of the configuration.
	defaultTargetLimit = 1000
	// maxNodeTries is how many nodes one connection or request is tried at.
	maxNodeTries = 4
)

// targetStream is a stream to a target: *tunnel.Stream.
type targetStream interface {
	net.Conn
	CloseWrite() error
}

// targets is what TCP forwards and the HTTP relay share: the catalog, and a
// way to the nodes in it.
type targets struct {
	*catalog

	dial    func(ctx context.Context, node wire.ID, target string) (targetStream, error)
	limit   int // connections and requests at once through one target
	metrics *targetMetrics
}

func newTargets(s *Server, reg prometheus.Registerer) (*targets, error) {
	m, err := newTargetMetrics(reg)
	if err != nil {
		return nil, err
	}
	return &targets{catalog: newCatalog(s.fleet, s.store, s.log), dial: s.dialTargetStream, limit: cmp.Or(s.cfg.TargetLimit, defaultTargetLimit), metrics: m}, nil
}

// open opens a stream to a target at a node. That it opens says only that there
// is a tunnel: whether the node reached the target shows at the first read.
func (t *targets) open(ctx context.Context, node wire.ID, target string, alone bool) (targetStream, error) {
	within := dialTime
	if !alone {
		within = dialTimeShort
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	return t.dial(ctx, node, target)
}

// dialTargetStream is dialTarget for targets.dial: there, a nil *tunnel.Stream
// would be a stream.
func (s *Server) dialTargetStream(ctx context.Context, node wire.ID, target string) (targetStream, error) {
	stream, err := s.dialTarget(ctx, node, target)
	if err != nil {
		return nil, err
	}
	return stream, nil
}

// failure takes down what failed at a node, so that others are preferred.
func (t *targets) failure(node wire.ID, target string, err error) {
	var refused *tunnel.RefusedError
	if !errors.As(err, &refused) {
		t.failed(node, "") // there is no tunnel, or no longer
		return
	}
	switch refused.Code {
	case tunnel.Locked, tunnel.Draining, tunnel.Overloaded:
		t.failed(node, "")
	case tunnel.NotFound, tunnel.Forbidden, tunnel.Unreachable, tunnel.Timeout, tunnel.Failed:
		t.failed(node, target)
	case tunnel.Reset: // that is between the target and this one connection
	}
}

// unreached says of a stream's error that nothing of what was sent came to the
// target: the same may be sent to another node.
func unreached(err error) bool {
	var refused *tunnel.RefusedError
	if !errors.As(err, &refused) {
		return false
	}
	switch refused.Code {
	case tunnel.NotFound, tunnel.Forbidden, tunnel.Unreachable, tunnel.Timeout, tunnel.Locked, tunnel.Draining, tunnel.Overloaded:
		return true
	case tunnel.Reset, tunnel.Failed:
	}
	return false
}

// targetMetrics are what forwards and relay count.
type targetMetrics struct {
	connections *prometheus.CounterVec // of forwards, by result
	open        prometheus.Gauge
	requests    *prometheus.CounterVec // of the relay, by status class and failed hop
	running     prometheus.Gauge
	bytes       *prometheus.CounterVec // by way and direction
	retries     prometheus.Counter
}

func newTargetMetrics(reg prometheus.Registerer) (*targetMetrics, error) {
	m := &targetMetrics{
		connections: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sallyport_gateway_forward_connections_total", Help: "Connections of TCP forwards that ended, by result."}, []string{"result"}),
		open:        prometheus.NewGauge(prometheus.GaugeOpts{Name: "sallyport_gateway_forward_connections", Help: "Connections of TCP forwards that are open."}),
		requests:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sallyport_gateway_relay_requests_total", Help: "Relayed HTTP requests, by status and by the kind of hop that failed."}, []string{"code", "failed_hop"}),
		running:     prometheus.NewGauge(prometheus.GaugeOpts{Name: "sallyport_gateway_relay_requests", Help: "Relayed HTTP requests that are running."}),
		bytes:       prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sallyport_gateway_target_bytes_total", Help: "Bytes that forwards and the relay carried, by direction: to the target, or from it."}, []string{"way", "direction"}),
		retries:     prometheus.NewCounter(prometheus.CounterOpts{Name: "sallyport_gateway_target_retries_total", Help: "Connections and requests that another node took over from one that failed."}),
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.connections, m.open, m.requests, m.running, m.bytes, m.retries} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}
