package node

import (
	"math"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"sallyport/internal/wire"
)

// collector shows the node's state at the moment of the scrape.
type collector struct{ a *Agent }

var (
	descDepth     = prometheus.NewDesc("sallyport_node_spool_events", "Events that the gateway does not have yet.", []string{"instance"}, nil)
	descBytes     = prometheus.NewDesc("sallyport_node_spool_bytes", "Size of the spool on disk.", []string{"instance"}, nil)
	descDropped   = prometheus.NewDesc("sallyport_node_spool_dropped_total", "Events dropped by quota.", []string{"instance"}, nil)
	descUp        = prometheus.NewDesc("sallyport_node_upstreams", "Channels to RCPs and gateways.", []string{"instance"}, nil)
	descLanes     = prometheus.NewDesc("sallyport_node_lanes", "Lanes that are open.", []string{"instance"}, nil)
	descPolicies  = prometheus.NewDesc("sallyport_node_policies", "Policies by state.", []string{"instance", "state"}, nil)
	descLocked    = prometheus.NewDesc("sallyport_node_locked", "1 while the node obeys no gateway.", []string{"instance"}, nil)
	descExpiry    = prometheus.NewDesc("sallyport_node_certificate_not_after_seconds", "End of the certificate, in Unix time.", []string{"instance"}, nil)
	descCheck     = prometheus.NewDesc("sallyport_node_check_state", "Last outcome: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.", []string{"instance", "policy"}, nil)
	descCheckDur  = prometheus.NewDesc("sallyport_node_check_duration_seconds", "How long the check ran last.", []string{"instance", "policy"}, nil)
	descTargets   = prometheus.NewDesc("sallyport_node_target_connections", "Open connections to targets.", []string{"instance"}, nil)
	descTargetsN  = prometheus.NewDesc("sallyport_node_target_connections_total", "Connections to targets that came about.", []string{"instance"}, nil)
	descTargetsNo = prometheus.NewDesc("sallyport_node_target_refused_total", "Connections to targets that did not, by reason.", []string{"instance", "reason"}, nil)
	descTargetsB  = prometheus.NewDesc("sallyport_node_target_bytes_total", "Bytes to and from targets, counted when a connection ends.", []string{"instance", "direction"}, nil)
	descParked    = prometheus.NewDesc("sallyport_node_proxy_connections", "Connections of local clients, by whether they wait for a gateway or are joined.", []string{"state"}, nil)
	descParkedN   = prometheus.NewDesc("sallyport_node_proxy_connections_total", "Connections of local clients by what became of them.", []string{"result"}, nil)
	descPerf      = prometheus.NewDesc("sallyport_node_check_perfdata", "Performance data of the last run, in the plugin's own unit.", []string{"instance", "policy", "label", "unit"}, nil)
)

// Describe names what Collect brings.
func (collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descDepth, descBytes, descDropped, descUp, descLanes, descPolicies, descLocked, descExpiry, descCheck, descCheckDur, descPerf, descTargets, descTargetsN, descTargetsNo, descTargetsB, descParked, descParkedN} {
		ch <- d
	}
}

// Collect reads every instance.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	if c.a.lot != nil {
		waiting, joined, accepted, refused := c.a.lot.Figures()
		ch <- prometheus.MustNewConstMetric(descParked, prometheus.GaugeValue, float64(waiting), "waiting")
		ch <- prometheus.MustNewConstMetric(descParked, prometheus.GaugeValue, float64(joined), "joined")
		ch <- prometheus.MustNewConstMetric(descParkedN, prometheus.CounterValue, float64(accepted), "accepted")
		ch <- prometheus.MustNewConstMetric(descParkedN, prometheus.CounterValue, float64(refused), "refused")
	}
	for _, in := range c.a.all() {
		gauge := func(d *prometheus.Desc, v float64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, append([]string{in.td}, labels...)...)
		}
		if st, err := in.spool.State(); err == nil {
			gauge(descDepth, float64(st.Depth))
			ch <- prometheus.MustNewConstMetric(descDropped, prometheus.CounterValue, float64(st.Dropped), in.td)
		}
		gauge(descBytes, float64(in.spool.Size()))
		gauge(descUp, float64(in.upstreams.up()))
		gauge(descLanes, float64(in.lanes.count()))
		locked := 0.0
		if in.lock.locked() != "" {
			locked = 1
		}
		gauge(descLocked, locked)
		if end := in.id.NotAfter(); !end.IsZero() {
			gauge(descExpiry, float64(end.Unix()))
		}
		count := func(d *prometheus.Desc, n int64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), append([]string{in.td}, labels...)...)
		}
		gauge(descTargets, float64(in.targets.open.Load()))
		count(descTargetsN, in.targets.accepted.Load())
		count(descTargetsB, in.targets.sent.Load(), "from")
		count(descTargetsB, in.targets.received.Load(), "to")
		for code, n := range in.targets.refusalsByCode() {
			count(descTargetsNo, n, code.String())
		}
		states := map[string]int{wire.PolicyApplied: 0, wire.PolicyFailed: 0}
		for _, p := range in.engine.Statuses() {
			states[p.State]++
		}
		for state, n := range states {
			gauge(descPolicies, float64(n), state)
		}
		for _, r := range in.engine.Checks() {
			gauge(descCheck, float64(r.State), r.Policy)
			gauge(descCheckDur, r.Duration.Seconds(), r.Policy)
			seen := map[string]bool{}
			for _, p := range r.Perf {
				key := p.Label + "\x00" + p.Unit
				if seen[key] || math.IsNaN(p.Value) {
					continue
				}
				seen[key] = true
				gauge(descPerf, p.Value, r.Policy, strings.ToValidUTF8(p.Label, "?"), strings.ToValidUTF8(p.Unit, "?"))
			}
		}
	}
}
