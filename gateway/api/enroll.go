package api

import (
	"time"

	"sallyport/internal/wire"
)

// JoinEST is the role of a code for the EST door.
const JoinEST = wire.Role("est")

// CreateJoin asks for a join code for nodes, or for the EST door.
type CreateJoin struct {
	Role      wire.Role         `json:"role,omitempty"` // node, which is the default, or est
	Name      string            `json:"name,omitempty"`
	Tags      map[string]string `json:"tags,omitempty"`
	AllowTags []string          `json:"allow_tags,omitempty"` // globs over key=value that the node may set; none: all
	Uses      int               `json:"uses,omitempty"`       // default 1
	TTL       wire.Duration     `json:"ttl,omitempty"`        // default 24h
	RCPs      []string          `json:"rcps,omitempty"`       // names of RCPs whose addresses the code carries; none: all
	Manual    bool              `json:"manual,omitempty"`     // no token: an operator grants
	Replace   bool              `json:"replace,omitempty"`    // revoke a live node of that name
}

// Join is one line of `join list`.
type Join struct {
	ID        string            `json:"id"`
	Role      wire.Role         `json:"role"`
	Name      string            `json:"name"`
	State     string            `json:"state"` // open, used, expired, revoked
	Tags      map[string]string `json:"tags"`
	AllowTags []string          `json:"allow_tags"`
	Uses      int               `json:"uses"` // 0: any number, an operator grants each
	Used      int               `json:"used"`
	RCPs      []string          `json:"rcps"`
	Manual    bool              `json:"manual"`
	Replace   bool              `json:"replace"`
	Created   time.Time         `json:"created"`
	Expires   time.Time         `json:"expires"`
	CreatedBy string            `json:"created_by"`
}

// CreatedJoin carries the code itself. Code is a secret.
type CreatedJoin struct {
	Join
	Code      string   `json:"code"`
	Addresses []string `json:"addresses"` // of the upstreams that stand in the code
}

// Request is one line of `request list`.
type Request struct {
	ID          string            `json:"id"`
	Role        wire.Role         `json:"role"`
	PartyID     wire.ID           `json:"party_id"`
	Name        string            `json:"name"`
	Fingerprint string            `json:"fingerprint"`
	Source      string            `json:"source"` // address as reported by the RCP
	RCP         string            `json:"rcp"`
	Tags        map[string]string `json:"tags"`
	State       string            `json:"state"`
	Reason      string            `json:"reason"`
	Requested   time.Time         `json:"requested,omitzero"`
	Decided     *time.Time        `json:"decided"`
	DecidedBy   string            `json:"decided_by"`
	Rule        string            `json:"rule"` // that granted it; empty: an operator, or its token
	Version     string            `json:"version"`
	Device      *RequestDevice    `json:"device,omitempty"` // that vouches for the party
}

// RequestDevice is the certificate of a device that vouches for a party. The
// device holds its key; only rules check who issued it.
type RequestDevice struct {
	Subject     string    `json:"subject"`
	Issuer      string    `json:"issuer"`
	Serial      string    `json:"serial"` // hex
	Fingerprint string    `json:"fingerprint"`
	NotAfter    time.Time `json:"not_after"`
}

// States of a certificate request (PK-03).
const (
	RequestPending   = "pending"
	RequestGranted   = "granted"
	RequestDelivered = "delivered"
	RequestDenied    = "denied"
	RequestDiscarded = "discarded"
	RequestFailed    = "failed"
	RequestExpired   = "expired"
)

// Grant decides on a request. Fingerprint, if not empty, must be the one of
// the request.
type Grant struct {
	Fingerprint string            `json:"fingerprint,omitempty"`
	Replace     bool              `json:"replace,omitempty"`
	Tags        map[string]string `json:"tags,omitempty"` // of the node, as `node tag` sets them
}

// Deny decides on a request the other way.
type Deny struct {
	Reason string `json:"reason,omitempty"`
}

// DecideRequests decides on many requests with one call. Each of Refs is the
// ID of a request, or the name in exactly one.
type DecideRequests struct {
	Refs        []string          `json:"refs"`
	Fingerprint string            `json:"fingerprint,omitempty"` // of a grant of one request: must be that of its key
	Replace     bool              `json:"replace,omitempty"`     // of a grant: revoke live nodes of the same names
	Tags        map[string]string `json:"tags,omitempty"`        // of a grant: of every node, as `node tag` sets them
	Reason      string            `json:"reason,omitempty"`      // of a denial: what the parties are told
	DryRun      bool              `json:"dry_run,omitempty"`
}

// DecidedRequests has one result for each of the requests, in their order.
type DecidedRequests struct {
	Verb    string          `json:"verb"` // grant, deny, discard
	DryRun  bool            `json:"dry_run"`
	Decided int             `json:"decided"`
	Failed  int             `json:"failed"`
	Results []RequestResult `json:"results"`
}

// RequestResult is what became of one request: it was decided, or there is an
// error. A request that is there is shown either way, as it is now.
type RequestResult struct {
	Ref     string   `json:"ref"`
	Request *Request `json:"request,omitempty"`
	Error   string   `json:"error,omitempty"`
	Code    Code     `json:"code,omitempty"`
}

// RequestQuery filters requests.
type RequestQuery struct {
	State    string
	Selector string // Kubernetes label selector over the tags
	Page
}
