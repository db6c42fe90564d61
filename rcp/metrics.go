package rcp

import (
	"errors"
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// metrics of one relay. Parties are counted when they are read, from the
// rosters themselves.
type metrics struct {
	connects           *prometheus.CounterVec // by status
	streams            prometheus.Gauge
	bytesDown, bytesUp prometheus.Counter
	signals            prometheus.Counter
	refused            *prometheus.CounterVec // by reason
	bare, sealed       *laneMetrics
	lanesRefused       *prometheus.CounterVec // by reason
}

// laneMetrics are those of one kind of lane.
type laneMetrics struct {
	open     prometheus.Gauge
	opened   prometheus.Counter
	down, up prometheus.Counter // bytes
	all      []prometheus.Collector
}

func newLaneMetrics(prefix, what, how string) *laneMetrics {
	bytes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sallyport_rcp_" + prefix + "_bytes_total", Help: "Bytes " + how + ", by direction: down is away from the gateway.",
	}, []string{"direction"})
	m := &laneMetrics{
		open:   prometheus.NewGauge(prometheus.GaugeOpts{Name: "sallyport_rcp_" + prefix + "s", Help: what + " that are open."}),
		opened: prometheus.NewCounter(prometheus.CounterOpts{Name: "sallyport_rcp_" + prefix + "s_opened_total", Help: what + " whose two legs met."}),
		down:   bytes.WithLabelValues("down"), up: bytes.WithLabelValues("up"),
	}
	m.all = []prometheus.Collector{bytes, m.open, m.opened}
	return m
}

func (l *lane) metrics() *laneMetrics {
	if l.sealed {
		return l.r.metrics.sealed
	}
	return l.r.metrics.bare
}

func newMetrics(reg prometheus.Registerer, r *Relay) (*metrics, error) {
	bytes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sallyport_rcp_bytes_total", Help: "Bytes copied between streams, by direction: down is away from the gateway.",
	}, []string{"direction"})
	m := &metrics{
		connects: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sallyport_rcp_connects_total", Help: "CONNECT requests that ended, by the HTTP status that they got.",
		}, []string{"status"}),
		streams: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "sallyport_rcp_streams", Help: "CONNECT streams that are open.",
		}),
		bytesDown: bytes.WithLabelValues("down"),
		bytesUp:   bytes.WithLabelValues("up"),
		signals: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "sallyport_rcp_signals_total", Help: "Signal lines that were taken from nodes.",
		}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sallyport_rcp_refused_total", Help: "Channels that were refused or cut, by reason.",
		}, []string{"reason"}),
		bare:   newLaneMetrics("lane", "Lanes of bare legs", "that the kernel moved between the bare legs of lanes, counted every 4 MiB"),
		sealed: newLaneMetrics("sealed_lane", "Lanes of sealed legs", "moved between the sealed legs of lanes"),
		lanesRefused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sallyport_rcp_lanes_refused_total", Help: "Lanes that were refused or given up, by reason: after a bare one a sealed one is tried, and then the stream path is used.",
		}, []string{"reason"}),
	}
	m.connects.WithLabelValues("200") // so that a rate has a beginning
	for _, c := range slices.Concat([]prometheus.Collector{m.connects, m.streams, bytes, m.signals, m.refused, m.lanesRefused, counts{r}}, m.bare.all, m.sealed.all) {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// refuse counts a channel that was not taken, or was cut.
func (m *metrics) refuse(err error) { m.refused.WithLabelValues(refusal(err)).Inc() }

func refusal(err error) string {
	switch {
	case errors.Is(err, errPendingTotal), errors.Is(err, errPendingFrom):
		return "pending-limit"
	case errors.Is(err, errTableFull):
		return "peer-limit"
	case errors.Is(err, errForged):
		return "forged"
	case errors.Is(err, identity.ErrRevoked):
		return "revoked"
	case errors.Is(err, errNotAdmitted):
		return "not-admitted"
	}
	return "other"
}

// counts reads the gauges when somebody asks.
type counts struct{ r *Relay }

var (
	descPeers = prometheus.NewDesc("sallyport_rcp_peers",
		"Parties that are connected directly, by role; those without a certificate as pending.", []string{"role"}, nil)
	descBehind = prometheus.NewDesc("sallyport_rcp_peers_known",
		"Parties that the peers stream shows, those behind other RCPs included.", nil, nil)
	descParked = prometheus.NewDesc("sallyport_rcp_proxy_connections",
		"Connections of local clients, by whether they wait for a gateway or are joined.", []string{"state"}, nil)
	descParkedN = prometheus.NewDesc("sallyport_rcp_proxy_connections_total",
		"Connections of local clients by what became of them.", []string{"result"}, nil)
	descExpiry   = prometheus.NewDesc("sallyport_rcp_certificate_not_after_seconds", "End of the certificate, in Unix time.", nil, nil)
	descDraining = prometheus.NewDesc("sallyport_rcp_draining", "1 while the RCP takes no new streams.", nil, nil)
)

func (counts) Describe(ch chan<- *prometheus.Desc) {
	ch <- descPeers
	ch <- descBehind
	ch <- descParked
	ch <- descParkedN
	ch <- descExpiry
	ch <- descDraining
}

func (c counts) Collect(ch chan<- prometheus.Metric) {
	for role, n := range c.r.peerCounts() {
		ch <- prometheus.MustNewConstMetric(descPeers, prometheus.GaugeValue, float64(n), role)
	}
	ch <- prometheus.MustNewConstMetric(descBehind, prometheus.GaugeValue, float64(c.r.table.size()))
	if c.r.lot != nil {
		waiting, joined, accepted, refused := c.r.lot.Figures()
		ch <- prometheus.MustNewConstMetric(descParked, prometheus.GaugeValue, float64(waiting), "waiting")
		ch <- prometheus.MustNewConstMetric(descParked, prometheus.GaugeValue, float64(joined), "joined")
		ch <- prometheus.MustNewConstMetric(descParkedN, prometheus.CounterValue, float64(accepted), "accepted")
		ch <- prometheus.MustNewConstMetric(descParkedN, prometheus.CounterValue, float64(refused), "refused")
	}
	if end := c.r.id.NotAfter(); !end.IsZero() {
		ch <- prometheus.MustNewConstMetric(descExpiry, prometheus.GaugeValue, float64(end.Unix()))
	}
	draining := 0.0
	if c.r.draining.Load() != nil {
		draining = 1
	}
	ch <- prometheus.MustNewConstMetric(descDraining, prometheus.GaugeValue, draining)
}

// peerCounts counts who is connected: every role is there, with 0 too.
func (r *Relay) peerCounts() map[string]int {
	byRole, pending := r.roster.count()
	out := map[string]int{"pending": pending, string(wire.RoleGateway): 0, string(wire.RoleNode): byRole[wire.RoleNode]}
	rcps := byRole[wire.RoleRCP]
	for _, role := range r.upstreams.roles() {
		switch role {
		case wire.RoleGateway:
			out[string(wire.RoleGateway)]++
		case wire.RoleRCP:
			rcps++
		}
	}
	out[string(wire.RoleRCP)] = rcps
	return out
}
