package gateway

import (
	"github.com/prometheus/client_golang/prometheus"

	"sallyport/internal/wire"
)

// metrics are what a gateway counts itself. What the fleet knows is collected
// when it is asked for.
type metrics struct {
	opened  *prometheus.CounterVec // sessions, by result
	opening prometheus.Histogram
	warm    prometheus.Gauge
	events  *prometheus.CounterVec // by what became of them
	batches prometheus.Histogram
	actions *prometheus.CounterVec // by final state
	visits  *prometheus.CounterVec // by chore
	lines   *prometheus.CounterVec // of peers streams, by verdict
	// forgotten are rows that were kept long enough, by kind.
	forgotten *prometheus.CounterVec
	refused   *prometheus.CounterVec // calls of the API without a good token, by reason
	fleet     *fleet
}

func newMetrics(reg prometheus.Registerer, f *fleet) (*metrics, error) {
	m := &metrics{
		opened:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sallyport_gateway_sessions_opened_total", Help: "End-to-end sessions, by result of opening them."}, []string{"result"}),
		opening:   prometheus.NewHistogram(prometheus.HistogramOpts{Name: "sallyport_gateway_session_open_seconds", Help: "Time to open an end-to-end session.", Buckets: prometheus.ExponentialBuckets(0.002, 2, 14)}),
		warm:      prometheus.NewGauge(prometheus.GaugeOpts{Name: "sallyport_gateway_sessions_warm", Help: "End-to-end sessions that are open."}),
		events:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sallyport_gateway_events_total", Help: "Events of nodes, by what became of them."}, []string{"result"}),
		batches:   prometheus.NewHistogram(prometheus.HistogramOpts{Name: "sallyport_gateway_event_commit_seconds", Help: "Time to commit one batch of events.", Buckets: prometheus.ExponentialBuckets(0.001, 2, 14)}),
		actions:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sallyport_gateway_actions_total", Help: "Actions, by final state."}, []string{"state"}),
		visits:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sallyport_gateway_visits_total", Help: "Sessions' worth of work with parties, by kind and result."}, []string{"kind", "result"}),
		lines:     prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sallyport_gateway_peers_lines_total", Help: "Lines of peers streams, by whether they were taken."}, []string{"result"}),
		forgotten: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sallyport_gateway_forgotten_total", Help: "Rows that were dropped because they had been kept long enough, by kind."}, []string{"what"}),
		refused:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sallyport_gateway_api_refused_total", Help: "Requests at the API's address that had no good token, by what was wrong with it."}, []string{"reason"}),
		fleet:     f,
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.opened, m.opening, m.warm, m.events, m.batches, m.actions, m.visits, m.lines, m.forgotten, m.refused, m} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

var (
	descNodes   = prometheus.NewDesc("sallyport_gateway_nodes", "Nodes, by state.", []string{"state"}, nil)
	descRCPs    = prometheus.NewDesc("sallyport_gateway_rcps", "First hops that should be connected, by whether they are.", []string{"connected"}, nil)
	descPending = prometheus.NewDesc("sallyport_gateway_pending_parties", "Parties that wait for a certificate, as RCPs report them.", nil, nil)
)

// Describe implements [prometheus.Collector].
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	ch <- descNodes
	ch <- descRCPs
	ch <- descPending
}

// Collect implements [prometheus.Collector].
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	states, rcps, linksUp, pending := m.fleet.totals()
	for _, s := range []wire.NodeState{wire.StatePending, wire.StateRunning, wire.StateFailing, wire.StateDown, wire.StateUnreachable,
		wire.StateReadonly, wire.StateLocked, wire.StateDraining, wire.StateQuarantined, wire.StateRevoked, wire.StateUpgrade} {
		ch <- prometheus.MustNewConstMetric(descNodes, prometheus.GaugeValue, float64(states[s]), string(s))
	}
	ch <- prometheus.MustNewConstMetric(descRCPs, prometheus.GaugeValue, float64(linksUp), "true")
	ch <- prometheus.MustNewConstMetric(descRCPs, prometheus.GaugeValue, float64(rcps-linksUp), "false")
	ch <- prometheus.MustNewConstMetric(descPending, prometheus.GaugeValue, float64(pending))
}
