package main

import "slices"

// figure is one number that the benchmark measures. Must and stretch are what
// it is held against; zero values of both mean that it is only told.
type figure struct {
	id            string
	group         string // the name for --rows
	row           string // what stands in the first column
	name          string // what exactly is measured
	unit          string
	must, stretch float64
	higher        bool // more is better
	exact         bool // must be no worse than must, which may be 0
}

// judged says whether the figure has a limit.
func (f figure) judged() bool { return f.must != 0 || f.exact }

// verdicts of a figure.
const (
	verdictStretch = "stretch met"
	verdictMet     = "met"
	verdictMissed  = "missed"
	verdictNone    = ""
)

// verdict of a measured value.
func (f figure) verdict(v float64) string {
	reaches := func(limit float64) bool {
		if f.higher {
			return v >= limit
		}
		return v <= limit
	}
	switch {
	case !f.judged():
		return verdictNone
	case !reaches(f.must):
		return verdictMissed
	case f.stretch != 0 && reaches(f.stretch):
		return verdictStretch
	}
	return verdictMet
}

// achieved is how many times as good as must a value is.
func (f figure) achieved(v float64) float64 {
	if f.higher {
		return v / f.must
	}
	if v <= 0 {
		return 0
	}
	return f.must / v
}

// The groups, in the order in which they are measured.
const (
	groupBulk      = "bulk"
	groupStream    = "stream"
	groupHTTP      = "http"
	groupOne       = "one"
	groupConn      = "conn"
	groupMemory    = "memory"
	groupHandshake = "handshake"
	groupStepCA    = "stepca"
	groupCrowd     = "nodes" // enrol, idle, warm, desired state, reconnect
	groupEvents    = "events"
	groupScale     = "scale"
)

const (
	rowLane    = "Bulk over a lane"
	rowStream  = "Bulk over the stream path"
	rowHTTP    = "Small HTTP requests, 64 connections"
	rowOne     = "One connection"
	rowConn    = "New connections"
	rowMemory  = "Memory without load"
	rowShake   = "mTLS 1.3 handshakes"
	rowIdle    = "Idle nodes, signals stream open"
	rowWarm    = "Warm end-to-end sessions"
	rowAgain   = "Nodes reconnect after an RCP restart"
	rowDesired = "Desired state to every node, applied and acknowledged"
	rowEvents  = "Durable events of 250 bytes"
	rowEnrol   = "Enrolments through the RCP"
)

const (
	unitCPUGiB = "CPU-s/GiB"
	unitShare  = "of haproxy"
	unitMs     = "ms"
	unitMicro  = "µs"
	unitMiBs   = "MiB/s"
	unitKiB    = "KiB"
	unitMiB    = "MiB"
	unitSecond = "s"
	unitRate   = "/s"
	unitCount  = ""
)

// figures in the order of the table.
var figures = []figure{
	{id: "lane.rcp.1", group: groupBulk, row: rowLane, name: "RCP CPU, 1 stream", unit: unitCPUGiB, must: 0.37, stretch: 0.30},
	{id: "lane.rcp.8", group: groupBulk, row: rowLane, name: "RCP CPU, 8 streams", unit: unitCPUGiB, must: 0.30, stretch: 0.25},
	{id: "lane.share.1", group: groupBulk, row: rowLane, name: "throughput, 1 stream", unit: unitShare, must: 0.33, stretch: 0.48, higher: true},
	{id: "lane.share.8", group: groupBulk, row: rowLane, name: "throughput, 8 streams", unit: unitShare, must: 0.30, stretch: 0.42, higher: true},
	{id: "lane.floor.1", group: groupBulk, row: rowLane, name: "splicing alone (io.Copy between two sockets), CPU, 1 stream", unit: unitCPUGiB},
	{id: "lane.floor.8", group: groupBulk, row: rowLane, name: "splicing alone, CPU, 8 streams", unit: unitCPUGiB},
	{id: "lane.rate.1", group: groupBulk, row: rowLane, name: "throughput, 1 stream", unit: unitMiBs, higher: true},
	{id: "lane.rate.8", group: groupBulk, row: rowLane, name: "throughput, 8 streams", unit: unitMiBs, higher: true},
	{id: "lane.up.8", group: groupBulk, row: rowLane, name: "throughput towards the gateway, 8 streams", unit: unitMiBs, higher: true},
	{id: "lane.up.share.8", group: groupBulk, row: rowLane, name: "throughput towards the gateway, 8 streams", unit: unitShare, higher: true},
	{id: "lane.gateway.8", group: groupBulk, row: rowLane, name: "gateway CPU, 8 streams", unit: unitCPUGiB},
	{id: "lane.node.8", group: groupBulk, row: rowLane, name: "node CPU, 8 streams", unit: unitCPUGiB},
	{id: "lane.haproxy.1", group: groupBulk, row: rowLane, name: "haproxy, 1 stream", unit: unitMiBs, higher: true},
	{id: "lane.haproxy.8", group: groupBulk, row: rowLane, name: "haproxy, 8 streams", unit: unitMiBs, higher: true},
	{id: "lane.haproxy.cpu.8", group: groupBulk, row: rowLane, name: "haproxy CPU, 8 streams", unit: unitCPUGiB},
	{id: "lane.beside", group: groupBulk, row: rowLane, name: "bytes that did not go over lanes", unit: "share"},

	{id: "stream.rcp.1", group: groupStream, row: rowStream, name: "RCP CPU, 1 stream", unit: unitCPUGiB, must: 1.5, stretch: 1.2},
	{id: "stream.rcp.8", group: groupStream, row: rowStream, name: "RCP CPU, 8 streams", unit: unitCPUGiB, must: 1.5, stretch: 1.2},
	{id: "stream.rate.1", group: groupStream, row: rowStream, name: "throughput, 1 stream", unit: unitMiBs, higher: true},
	{id: "stream.rate.8", group: groupStream, row: rowStream, name: "throughput, 8 streams", unit: unitMiBs, higher: true},

	{id: "http.share", group: groupHTTP, row: rowHTTP, name: "requests per second", unit: unitShare, must: 0.55, stretch: 0.67, higher: true},
	{id: "http.p99", group: groupHTTP, row: rowHTTP, name: "p99", unit: unitMs, must: 8, stretch: 6},
	{id: "http.rcp", group: groupHTTP, row: rowHTTP, name: "RCP CPU per request", unit: unitMicro, must: 16, stretch: 12},
	{id: "http.rate", group: groupHTTP, row: rowHTTP, name: "requests", unit: unitRate, higher: true},
	{id: "http.haproxy", group: groupHTTP, row: rowHTTP, name: "haproxy, requests", unit: unitRate, higher: true},
	{id: "http.haproxy.p99", group: groupHTTP, row: rowHTTP, name: "haproxy, p99", unit: unitMs},
	{id: "http.gateway", group: groupHTTP, row: rowHTTP, name: "gateway CPU per request", unit: unitMicro},
	{id: "http.node", group: groupHTTP, row: rowHTTP, name: "node CPU per request", unit: unitMicro},

	{id: "one.p50", group: groupOne, row: rowOne, name: "p50", unit: unitMs, must: 0.26, stretch: 0.17},
	{id: "one.p99", group: groupOne, row: rowOne, name: "p99", unit: unitMs},
	{id: "one.haproxy", group: groupOne, row: rowOne, name: "haproxy, p50", unit: unitMs},

	{id: "conn.share", group: groupConn, row: rowConn, name: "connections per second", unit: unitShare, must: 0.45, stretch: 0.50, higher: true},
	{id: "conn.rcp", group: groupConn, row: rowConn, name: "RCP CPU each", unit: unitMicro, must: 120, stretch: 80},
	{id: "conn.rate", group: groupConn, row: rowConn, name: "connections", unit: unitRate, higher: true},
	{id: "conn.haproxy", group: groupConn, row: rowConn, name: "haproxy, connections", unit: unitRate, higher: true},
	{id: "conn.gateway", group: groupConn, row: rowConn, name: "gateway CPU each", unit: unitMicro},
	{id: "conn.node", group: groupConn, row: rowConn, name: "node CPU each", unit: unitMicro},

	{id: "idle.rss", group: groupCrowd, row: rowIdle, name: "RSS at the RCP per node", unit: unitKiB, must: 44, stretch: 24},
	{id: "idle.anonymous", group: groupCrowd, row: rowIdle, name: "anonymous memory at the RCP per node", unit: unitKiB},
	{id: "idle.enrolled", group: groupCrowd, row: rowIdle, name: "RSS at the RCP per node, in the process that enrolled them all at once", unit: unitKiB},
	{id: "idle.sockets", group: groupCrowd, row: rowIdle, name: "sockets at the RCP per node", unit: unitCount, must: 1},
	{id: "idle.gateway", group: groupCrowd, row: rowIdle, name: "anonymous memory at the gateway per node", unit: unitKiB},

	{id: "warm.rcp", group: groupCrowd, row: rowWarm, name: "RSS at the RCP per session", unit: unitKiB, must: 16, stretch: 8},
	{id: "warm.gateway", group: groupCrowd, row: rowWarm, name: "RSS at the gateway per session", unit: unitKiB, must: 80, stretch: 48},
	{id: "warm.sessions", group: groupCrowd, row: rowWarm, name: "sessions that the gateway kept", unit: unitCount},

	{id: "reconnect.seconds", group: groupCrowd, row: rowAgain, name: "until all are connected", unit: unitSecond, must: 12, stretch: 5},
	{id: "reconnect.failures", group: groupCrowd, row: rowAgain, name: "nodes that did not come back", unit: unitCount, exact: true},
	{id: "reconnect.api", group: groupCrowd, row: rowAgain, name: "slowest answer of the gateway's API meanwhile", unit: unitMs},

	{id: "desired.warm", group: groupCrowd, row: rowDesired, name: "warm sessions", unit: unitSecond, must: 2, stretch: 0.6},
	{id: "desired.cold", group: groupCrowd, row: rowDesired, name: "cold", unit: unitSecond, must: 12, stretch: 6},

	{id: "events.rate", group: groupEvents, row: rowEvents, name: "acknowledged and on disk", unit: unitRate, must: 40000, stretch: 60000, higher: true},
	{id: "events.lost", group: groupEvents, row: rowEvents, name: "lost or doubled, also under kill -9", unit: unitCount, exact: true},
	{id: "events.kills", group: groupEvents, row: rowEvents, name: "times that gateway or RCP were killed meanwhile", unit: unitCount},

	{id: "enrol.rate", group: groupCrowd, row: rowEnrol, name: "granted and on disk, with the nodes on the same two cores", unit: unitRate, must: 200, stretch: 400, higher: true},
	{id: "enrol.served", group: groupCrowd, row: rowEnrol, name: "two cores for gateway and RCP, by the CPU time that they took", unit: unitRate, must: 200, stretch: 400, higher: true},
	{id: "enrol.rcp", group: groupCrowd, row: rowEnrol, name: "RCP CPU each", unit: unitMs},
	{id: "enrol.gateway", group: groupCrowd, row: rowEnrol, name: "gateway CPU each", unit: unitMs},

	{id: "enrol.stepca", group: groupStepCA, row: rowEnrol, name: "step-ca: one hop and one handshake each, nothing kept", unit: unitRate, higher: true},

	{id: "memory.node.rss", group: groupMemory, row: rowMemory, name: "idle node agent, RSS", unit: unitMiB, must: 20, stretch: 12},
	{id: "memory.node.anonymous", group: groupMemory, row: rowMemory, name: "idle node agent, anonymous", unit: unitMiB, must: 8, stretch: 4},
	{id: "memory.rcp.rss", group: groupMemory, row: rowMemory, name: "RCP without nodes, RSS", unit: unitMiB, must: 20, stretch: 12},
	{id: "memory.rcp.anonymous", group: groupMemory, row: rowMemory, name: "RCP without nodes, anonymous", unit: unitMiB, must: 8, stretch: 4},
	{id: "memory.gateway.anonymous", group: groupMemory, row: rowMemory, name: "gateway with one node, anonymous", unit: unitMiB},

	{id: "handshake.hybrid", group: groupHandshake, row: rowShake, name: "full, with X25519MLKEM768 (the default)", unit: unitRate, higher: true},
	{id: "handshake.classic", group: groupHandshake, row: rowShake, name: "full, without (X25519)", unit: unitRate, higher: true},
	{id: "handshake.hybrid.cpu", group: groupHandshake, row: rowShake, name: "CPU of both sides, with", unit: unitMicro},
	{id: "handshake.classic.cpu", group: groupHandshake, row: rowShake, name: "CPU of both sides, without", unit: unitMicro},
	{id: "handshake.hybrid.bytes", group: groupHandshake, row: rowShake, name: "bytes on the wire, with", unit: "bytes"},
	{id: "handshake.classic.bytes", group: groupHandshake, row: rowShake, name: "bytes on the wire, without", unit: "bytes"},
	{id: "handshake.resumed.cpu", group: groupHandshake, row: rowShake, name: "CPU of both sides, resumed, with", unit: unitMicro},
}

// groups in the order of measuring.
var groups = []string{groupMemory, groupBulk, groupStream, groupHTTP, groupOne, groupConn, groupHandshake, groupStepCA,
	groupEvents, groupCrowd, groupScale}

func isFigure(id string) bool {
	return slices.ContainsFunc(figures, func(f figure) bool { return f.id == id })
}
