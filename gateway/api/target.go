package api

import (
	"time"

	"sallyport/internal/wire"
)

// Target is one line of `target list`: a service that nodes can reach.
type Target struct {
	Name      string        `json:"name"`
	Kind      string        `json:"kind"`    // tcp, http, https or h2c; builtin: answered inside every node
	Address   string        `json:"address"` // host:port or URL, as the nodes see it
	Timeout   wire.Duration `json:"timeout"` // to the response headers; 0 for TCP
	State     string        `json:"state"`
	Reason    string        `json:"reason"`
	Nodes     int           `json:"nodes"`     // that should offer it
	Offered   int           `json:"offered"`   // that said they do
	Connected int           `json:"connected"` // of these, connected now
	Streams   int           `json:"streams"`   // connections and requests that run through this gateway
}

// States of a target.
const (
	TargetReady       = "ready"       // a connected node offers it
	TargetUnavailable = "unavailable" // no node that is connected offers it
	TargetUnused      = "unused"      // no deployment brings it to a node
)

// TargetDetail is what `target show` prints.
type TargetDetail struct {
	Target
	On       []TargetNode `json:"on"`
	Forwards []Forward    `json:"forwards"`
}

// TargetNode is one node that offers a target, or should.
type TargetNode struct {
	Node      string     `json:"node"`
	ID        wire.ID    `json:"id"`
	State     string     `json:"state"` // applied, pending, failed
	Error     string     `json:"error"`
	Address   string     `json:"address"` // of the version that the node has
	Connected bool       `json:"connected"`
	Streams   int        `json:"streams"` // of all targets, by way of this node
	Avoided   *time.Time `json:"avoided"` // it failed a moment ago: others are preferred until then
}

// Forward is a TCP listener of the gateway that leads to a target.
type Forward struct {
	Listen      string    `json:"listen"` // ip:port
	Target      string    `json:"target"`
	Node        string    `json:"node"` // empty: any node that offers the target
	NodeID      wire.ID   `json:"node_id"`
	State       string    `json:"state"`
	Error       string    `json:"error"`
	Connections int       `json:"connections"` // now
	Total       int64     `json:"total"`       // since the gateway started, as the following
	Refused     int64     `json:"refused"`     // that did not come to the target
	BytesTo     int64     `json:"bytes_to"`    // of connections that ended
	BytesFrom   int64     `json:"bytes_from"`
	Created     time.Time `json:"created"`
	CreatedBy   string    `json:"created_by"`
}

// States of a forward.
const (
	ForwardListening = "listening"
	ForwardFailed    = "failed" // it cannot listen; it is tried again
)

// AddForward makes a forward.
type AddForward struct {
	Target string `json:"target"`
	Node   string `json:"node,omitempty"` // name or UUID; empty: any node that offers the target
	Listen string `json:"listen"`         // PORT, :PORT (both loopback) or ADDRESS:PORT; port 0 takes a free one
}
