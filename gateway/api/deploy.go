package api

import (
	"encoding/json"
	"time"

	"sallyport/internal/wire"
)

// Manifest is the text of one file of YAML documents; File is its name, for
// messages.
type Manifest struct {
	File string `json:"file"`
	Text string `json:"text"`
}

// Apply creates and changes policies and deployments together, all or none.
type Apply struct {
	Manifests []Manifest `json:"manifests"`
	Kind      string     `json:"kind,omitempty"` // take only the documents of this kind; empty: all
	DryRun    bool       `json:"dry_run,omitempty"`
}

// Applied is what an apply did, or would do.
type Applied struct {
	DryRun    bool            `json:"dry_run"`
	Objects   []AppliedObject `json:"objects"`
	Skipped   int             `json:"skipped"` // documents of another kind
	Nodes     []PlannedNode   `json:"nodes"`   // whose desired state changes
	Offline   int             `json:"offline"` // of them, not connected now
	Files     int             `json:"files_restored"`
	Conflicts []string        `json:"conflicts"` // paths that two policies claim, on which nodes
	Warnings  []string        `json:"warnings"`  // what the gateway accepted and does not do
	Summary   string          `json:"summary"`   // one line for people
}

// AppliedObject is one document.
type AppliedObject struct {
	Kind    string `json:"kind"`
	Name    string `json:"name"`
	Change  string `json:"change"` // created, changed, unchanged
	Version int64  `json:"version"`
}

// PlannedNode is one node whose desired state changes.
type PlannedNode struct {
	ID       wire.ID       `json:"id"`
	Node     string        `json:"node"`
	Online   bool          `json:"online"`
	Revision wire.Revision `json:"revision"` // the new one; zero in a dry run
	Add      []string      `json:"add"`
	Change   []string      `json:"change"`
	Remove   []string      `json:"remove"`
}

// Policy is one policy in its current, or an older, version.
type Policy struct {
	Name        string          `json:"name"`
	Type        string          `json:"type"`
	Version     int64           `json:"version"`
	Digest      string          `json:"digest"`
	Created     time.Time       `json:"created"`
	CreatedBy   string          `json:"created_by"`
	Deployments []string        `json:"deployments"` // that name it
	Spec        json.RawMessage `json:"spec,omitempty"`
	ETag        string          `json:"etag"`
}

// PolicyDetail is what `policy show` prints: every version, newest first.
type PolicyDetail struct {
	Policy
	Versions []PolicyVersion `json:"versions"`
}

// PolicyVersion is one immutable version of a policy.
type PolicyVersion struct {
	Version   int64           `json:"version"`
	Type      string          `json:"type"`
	Digest    string          `json:"digest"`
	Created   time.Time       `json:"created"`
	CreatedBy string          `json:"created_by"`
	Spec      json.RawMessage `json:"spec"`
}

// Rollback makes an older version of a policy the current one again, as a new
// version. To 0 is the version before the current one.
type Rollback struct {
	To int64 `json:"to,omitempty"`
}

// States of a deployment (PD-03).
const (
	DeploymentActive    = "active"    // every selected node has applied all of it
	DeploymentInactive  = "inactive"  // it selects no node, and needs none
	DeploymentDegraded  = "degraded"  // some nodes failed or are offline, or fewer than min are selected
	DeploymentError     = "error"     // no selected node has applied it, and at least one failed
	DeploymentOrphan    = "orphan"    // deleted, while nodes that cannot be reached still carry its policies
	DeploymentDeploying = "deploying" // connected nodes have yet to answer
)

// Deployment is one line of `deployment list`.
type Deployment struct {
	Name     string           `json:"name"`
	State    string           `json:"state"`
	Reason   string           `json:"reason"`
	Revision int64            `json:"revision"` // rises with each change of the deployment or of its policies
	Selector string           `json:"selector"`
	Policies []string         `json:"policies"`
	Min      int              `json:"min"`
	Max      int              `json:"max"` // 0: no limit; else that many of the selected nodes get it, by name, those that have it first
	Counts   DeploymentCounts `json:"counts"`
	Created  time.Time        `json:"created"`
	Updated  time.Time        `json:"updated"`
	ETag     string           `json:"etag"`
}

// DeploymentCounts counts nodes: each one once, under the worst state of its
// policies.
type DeploymentCounts struct {
	Applied int `json:"applied"`
	Pending int `json:"pending"`
	Failed  int `json:"failed"`
	Offline int `json:"offline"`
}

// DeploymentStatus is what `deployment status` prints.
type DeploymentStatus struct {
	Deployment
	Nodes []DeploymentNode `json:"nodes"`
}

// DeploymentNode is one policy of the deployment on one node.
type DeploymentNode struct {
	Node     string        `json:"node"`
	ID       wire.ID       `json:"id"`
	State    string        `json:"state"` // applied, pending, failed, offline
	Policy   string        `json:"policy"`
	Error    string        `json:"error"`
	Revision wire.Revision `json:"revision"` // that the node has applied
	Since    time.Time     `json:"since"`
}
