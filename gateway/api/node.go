package api

import (
	"time"

	"sallyport/internal/wire"
)

// Node is one line of `node list`.
type Node struct {
	ID              wire.ID           `json:"id"`
	Name            string            `json:"name"`
	Tenant          string            `json:"tenant"`
	State           wire.NodeState    `json:"state"`
	StateReason     string            `json:"state_reason"`
	StateSince      time.Time         `json:"state_since"`
	Tags            map[string]string `json:"tags"`
	RCPs            []string          `json:"rcps"`    // names of the RCPs through which it is connected now
	Carrier         string            `json:"carrier"` // "h2", "h3", or empty
	Version         string            `json:"version"`
	DesiredRevision wire.Revision     `json:"desired_revision"`
	AppliedRevision wire.Revision     `json:"applied_revision"`
	LastSeen        *time.Time        `json:"last_seen"`
	Fingerprint     string            `json:"fingerprint"`
}

// NodeDetail is what `node show` prints.
type NodeDetail struct {
	Node
	Created      time.Time         `json:"created"`
	Mode         string            `json:"mode"`
	OS           string            `json:"os"`
	Arch         string            `json:"arch"`
	AsRoot       bool              `json:"as_root"`
	Installation string            `json:"installation"` // that it obeys
	Boots        []NodeBoot        `json:"boots"`        // that answered in the last hour, the latest first; two that live are two machines
	Certificate  CertificateStatus `json:"certificate"`
	TagSources   []TagSource       `json:"tag_sources"`
	Policies     []NodePolicy      `json:"policies"`
	Deployments  []string          `json:"deployments"`
	Paths        []NodePath        `json:"paths"`
	Outbox       wire.OutboxState  `json:"outbox"`
	SkewSeconds  float64           `json:"skew_seconds"` // of its clock against the gateway's
	Versions     wire.VersionRange `json:"versions"`
	ETag         string            `json:"etag"`
}

// NodeBoot is one process that answered as a node, in a session that only the
// node's key can hold. Each start has a boot ID of its own, and each copy of a
// running process is given one.
type NodeBoot struct {
	ID     string    `json:"id"`
	First  time.Time `json:"first"`
	Last   time.Time `json:"last"`
	Copied bool      `json:"copied,omitempty"` // several answered under it, before they got others; or it was turned back in time
}

// CertificateStatus is the leaf that a party last showed.
type CertificateStatus struct {
	NotAfter   *time.Time `json:"not_after"`
	RenewAfter *time.Time `json:"renew_after"`
}

// TagSource is one tag that somebody set. Effective is false where a stronger
// source, or a removal by `node tag NAME k-`, hides it.
type TagSource struct {
	Key       string `json:"key"`
	Value     string `json:"value"`
	Source    string `json:"source"` // gateway, join or node, the strongest first
	Effective bool   `json:"effective"`
	Reason    string `json:"reason,omitempty"` // why it is not
}

// NodePolicy is one policy on one node.
type NodePolicy struct {
	Policy     string    `json:"policy"`
	Type       string    `json:"type"`
	Deployment string    `json:"deployment"`
	State      string    `json:"state"` // applied, pending, failed, offline
	Error      string    `json:"error"`
	Since      time.Time `json:"since"`
}

// NodePath is one way in which a node is connected, as its RCP reports it.
type NodePath struct {
	RCP     string    `json:"rcp"`
	Via     []string  `json:"via"` // further RCPs, nearest to the gateway first
	Carrier string    `json:"carrier"`
	Source  string    `json:"source"` // address as reported by the RCP
	Boot    string    `json:"boot"`   // likewise
	Since   time.Time `json:"since"`
	RTT     float64   `json:"rtt_seconds"`
}

// NodeQuery filters a list of nodes. The zero value is all of them.
type NodeQuery struct {
	Selector string // Kubernetes label selector
	State    string
	Page
}

// TagChange sets and removes tags of one node.
type TagChange struct {
	Set    map[string]string `json:"set,omitempty"`
	Remove []string          `json:"remove,omitempty"`
}

// DrainNode lets a node finish what runs and take no more.
type DrainNode struct {
	For    wire.Duration `json:"for,omitempty"` // 0: until it is resumed
	Reason string        `json:"reason,omitempty" maxLength:"200"`
}

// Reidentify gives the machine that answers as a node another identity. Name
// is what it becomes, beside the old node; empty: the old identity ends, and
// name, tags and history go on. Boot, if not empty, is the boot ID of the one
// machine that is meant, where two have one identity.
type Reidentify struct {
	Name string `json:"name,omitempty"`
	Boot string `json:"boot,omitempty"`
}

// Trace is the way to a node, hop by hop, with one verdict in plain words.
type Trace struct {
	Node    string     `json:"node"`
	ID      wire.ID    `json:"id"`
	Hops    []TraceHop `json:"hops"`
	OK      bool       `json:"ok"`
	Verdict string     `json:"verdict"`
}

// TraceHop is one channel, or the session at the end.
type TraceHop struct {
	From    string     `json:"from"`
	To      string     `json:"to"`
	Kind    string     `json:"kind"` // channel, session
	Address string     `json:"address"`
	Dialler string     `json:"dialler"` // which of the two dialled
	Carrier string     `json:"carrier"`
	Peer    string     `json:"peer"` // what its certificate proves, or what was reported
	State   string     `json:"state"`
	Since   *time.Time `json:"since"`
	RTT     float64    `json:"rtt_seconds"`
	Error   string     `json:"last_error"`
	Source  string     `json:"source"` // who says so: "verified", or "reported by RCP x"
}

// Removal answers revoke and remove.
type Removal struct {
	ID          wire.ID `json:"id"`
	Name        string  `json:"name"`
	Revocations int64   `json:"revocations"` // number of the set that names it
}
