package api

import (
	"time"

	"sallyport/internal/wire"
)

// RCP is one line of `rcp list`.
type RCP struct {
	Name        string     `json:"name"`
	ID          wire.ID    `json:"id"` // empty until it enrolled
	State       string     `json:"state"`
	StateReason string     `json:"state_reason"`
	StateSince  time.Time  `json:"state_since"`
	Request     string     `json:"request"` // ID of its certificate request that waits for an operator
	Address     string     `json:"address"` // that the gateway dials; empty: it dials us
	Public      []string   `json:"public"`  // how nodes reach it
	Via         string     `json:"via"`     // name of the RCP before it
	Carrier     string     `json:"carrier"`
	Version     string     `json:"version"`
	RTT         float64    `json:"rtt_seconds"`
	Online      int        `json:"nodes_online"`
	Pending     int        `json:"parties_pending"`
	LastError   string     `json:"last_error"`
	LastSeen    *time.Time `json:"last_seen"`
	SkewSeconds float64    `json:"skew_seconds"` // of its clock against the gateway's, when it last said so
	Fingerprint string     `json:"fingerprint"`
	Source      string     `json:"source"` // "added", or "configured" by SALLYPORT_GATEWAY_RCPS
	ETag        string     `json:"etag"`
}

// States of an RCP.
const (
	RCPPending    = "pending"    // not enrolled yet, or its request waits for an operator
	RCPConnecting = "connecting" // enrolled; not connected since the gateway started, or cut off a moment ago
	RCPConnected  = "connected"
	RCPFailed     = "failed" // was connected, or should be
	RCPDraining   = "draining"
	RCPRevoked    = "revoked"
)

// AddRCP makes the record and the join code of a new RCP.
type AddRCP struct {
	Name    string        `json:"name"`
	Address string        `json:"address,omitempty"` // host:port to dial; empty: it dials us
	Public  []string      `json:"public,omitempty"`  // default: Address
	Via     string        `json:"via,omitempty"`
	TTL     wire.Duration `json:"ttl,omitempty"` // of the join code
}

// SetRCP changes a record; nil leaves a field as it is.
type SetRCP struct {
	Address *string   `json:"address,omitempty"`
	Public  *[]string `json:"public,omitempty"`
	Via     *string   `json:"via,omitempty"`
}

// JoinRCP asks for a new join code of an RCP.
type JoinRCP struct {
	TTL     wire.Duration `json:"ttl,omitempty"`
	Replace bool          `json:"replace,omitempty"` // revoke the identity that it has
}

// RCPJoin is a record with its join code, which is shown this once.
type RCPJoin struct {
	RCP  RCP         `json:"rcp"`
	Join CreatedJoin `json:"join"`

	// Upstreams is what SALLYPORT_RCP_UPSTREAMS must be on the RCP's host: whom
	// it dials, or the UUID that may dial it. Empty: the gateway dials it. The
	// join code never says so, because it must not make a dialler of an RCP.
	Upstreams []string `json:"upstreams"`
	// Downstreams is what SALLYPORT_RCP_DOWNSTREAMS of the RCP named by Via must
	// hold besides what it has; empty: nothing.
	Downstreams []string `json:"downstreams"`
}
