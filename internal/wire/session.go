package wire

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"time"
	"unicode/utf8"
)

// URLs of the session API, which nodes and RCPs serve inside an end-to-end
// session. The gateway is always the client.
const (
	PathHello       = "/v1/hello"       // GET Hello
	PathDesired     = "/v1/desired"     // PUT Envelope of Desired → DesiredResult
	PathOutbox      = "/v1/outbox"      // POST, full duplex NDJSON: OutboxUp in the response, OutboxDown in the request
	PathActions     = "/v1/actions"     // POST Envelope of Action → NDJSON of ActionFrame
	PathActionID    = "/v1/actions/"    // DELETE + id: cancel
	PathCSR         = "/v1/csr"         // POST CSRRequest → CSR
	PathCertificate = "/v1/certificate" // PUT Certificate
	PathRevocations = "/v1/revocations" // PUT Envelope of Revocations
	PathTrust       = "/v1/trust"       // PUT Envelope of Trust
	PathUnlock      = "/v1/unlock"      // POST Envelope of Unlock
	PathReidentify  = "/v1/reidentify"  // POST Envelope of Reidentify
	PathEcho        = "/v1/echo"        // POST, answers the body (at most 64 KiB)
	PathEnroll      = "/v1/enroll"      // GET EnrollRequest, PUT EnrollVerdict: enrolment sessions only
)

// NodeState is one word for how a node fares; State and Reason go together.
type NodeState string

// The states of a node. Unreachable is one that only a gateway can see.
const (
	StatePending     NodeState = "pending"
	StateRunning     NodeState = "running"
	StateFailing     NodeState = "failing"
	StateDown        NodeState = "down"
	StateUnreachable NodeState = "unreachable"
	StateReadonly    NodeState = "readonly"
	StateLocked      NodeState = "locked"
	StateDraining    NodeState = "draining"
	StateQuarantined NodeState = "quarantined"
	StateRevoked     NodeState = "revoked"
	StateUpgrade     NodeState = "upgrade-required"
)

// Hello is what a party says of itself inside a verified session.
type Hello struct {
	Party        Party             `json:"party"`
	Boot         string            `json:"boot"`
	Program      string            `json:"program"` // version of the program
	Versions     VersionRange      `json:"versions"`
	Name         string            `json:"name,omitempty"` // the node's wish; the right to it comes from the token
	Tags         map[string]string `json:"tags,omitempty"` // SALLYPORT_NODE_TAGS
	Mode         string            `json:"mode,omitempty"` // "managed" or "readonly"
	State        NodeState         `json:"state"`
	Reason       string            `json:"reason,omitempty"`
	Installation string            `json:"installation,omitempty"` // UID of the gateway installation that it obeys
	Applied      Revision          `json:"applied"`
	Policies     []PolicyStatus    `json:"policies,omitempty"`
	Outbox       OutboxState       `json:"outbox"`
	Revocations  int64             `json:"revocations"`      // number of the set that it holds
	Trust        int64             `json:"trust,omitempty"`  // number of the trust document that it holds
	Reigns       []ReignMark       `json:"reigns,omitempty"` // that an RCP holds, one of each installation
	NotAfter     time.Time         `json:"not_after"`        // of its leaf
	RenewAfter   time.Time         `json:"renew_after"`      // two thirds of its life
	Upstreams    []UpstreamStatus  `json:"upstreams,omitempty"`
	OS           string            `json:"os,omitempty"`
	Arch         string            `json:"arch,omitempty"`
	AsRoot       bool              `json:"as_root,omitempty"`
	Time         time.Time         `json:"time"` // the party's clock, for measuring skew; not part of the digest
	Salt         string            `json:"salt"` // makes Digest meaningless to the RCP
	// Previous is what the process held before the nonce of this request
	// ([HeaderNonce]): what the last request brought, or random from its start.
	// Zero: there was no nonce in the request, or the program is too old to
	// know them. Not part of the digest.
	Previous Nonce `json:"previous,omitzero"`
}

// Digest is what a signal carries: it changes when the hello does, and tells
// an RCP nothing about its content. Time, Previous, Upstreams (round trips) and
// the moving parts of Outbox do not count.
func (h Hello) Digest() string {
	h.Time, h.Previous = time.Time{}, Nonce{}
	h.Upstreams = nil
	h.Outbox = OutboxState{Spool: h.Outbox.Spool, Dropped: h.Outbox.Dropped}
	b, err := json.Marshal(h)
	if err != nil {
		return "" // only for values that JSON cannot hold: there are none in Hello
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:12])
}

// UpstreamStatus is one upstream as the party itself sees it.
type UpstreamStatus struct {
	Address string    `json:"address"`
	ID      ID        `json:"id,omitempty"`
	Role    Role      `json:"role,omitempty"`
	Carrier string    `json:"carrier,omitempty"`
	Dialler string    `json:"dialler"` // "us" or "them"
	State   string    `json:"state"`   // connected, connecting, enrolling, failed
	Since   time.Time `json:"since"`
	RTT     float64   `json:"rtt_seconds,omitempty"`
	Error   string    `json:"error,omitempty"` // the last one
}

// PolicyStatus is what became of one policy on one node.
type PolicyStatus struct {
	Name   string    `json:"name"`
	Type   string    `json:"type"`
	Digest string    `json:"digest"`
	State  string    `json:"state"` // applied, pending, failed
	Error  string    `json:"error,omitempty"`
	Since  time.Time `json:"since"`
}

// maxStatuses bounds the policy statuses of one message, in bytes of JSON, and
// leaves room for the rest of a hello of [MaxHello].
const maxStatuses = MaxHello - 512<<10

// minStatusError is what is left of an error at least, in bytes of JSON.
const minStatusError = 64

// FitStatuses clips the errors of statuses so that a hello with all of them
// fits: each failing policy gets the same share.
func FitStatuses(list []PolicyStatus) {
	free, failing := maxStatuses, 0
	for _, s := range list {
		if s.Error != "" {
			failing++
		}
		s.Error = ""
		free -= jsonSize(s) + 1
	}
	if failing == 0 {
		return
	}
	share := max(free/failing-len(`"error":"",`), minStatusError)
	for i := range list {
		list[i].Error = clipJSON(list[i].Error, share)
	}
}

// jsonSize is the number of bytes of v as JSON.
func jsonSize(v any) int {
	b, err := json.Marshal(v)
	if err != nil {
		return 0 // a time of no year: its message cannot be sent at all
	}
	return len(b)
}

// clipJSON cuts s so that it takes at most limit bytes of JSON within quotes.
func clipJSON(s string, limit int) string {
	const more = "…"
	size, end := 0, 0 // end: where there is still room for more
	for i, r := range s {
		if size+len(more) <= limit {
			end = i
		}
		if size += jsonCost(r); size > limit {
			return s[:end] + more
		}
	}
	return s
}

// jsonCost is the most bytes that encoding/json writes for r (RFC 8259,
// section 7, and what HTML would take for markup).
func jsonCost(r rune) int {
	switch {
	case r < ' ', r == '<', r == '>', r == '&', r == '\u2028', r == '\u2029', r == utf8.RuneError:
		return 6
	case r == '"', r == '\\':
		return 2
	}
	return utf8.RuneLen(r)
}

// Policy states.
const (
	PolicyApplied = "applied"
	PolicyPending = "pending"
	PolicyFailed  = "failed"
)

// Types of signed payloads. A signature is over the type too, so that one
// kind of document never passes for another.
const (
	TypeDesired     = "sallyport/desired/1"
	TypeAction      = "sallyport/action/1"
	TypeUnlock      = "sallyport/unlock/1"
	TypeReidentify  = "sallyport/reidentify/1"
	TypeRevocations = "sallyport/revocations/1"
	TypeTrust       = "sallyport/trust/1"
)

// Envelope carries a signed document. The signature is ECDSA (ASN.1) with
// SHA-256 over PAE(Type, Payload); see identity.Seal and Identity.VerifyEnvelope.
type Envelope struct {
	Type      string   `json:"type"`
	Payload   []byte   `json:"payload"`
	Chain     [][]byte `json:"chain"` // signer's leaf first, DER, without the root
	Signature []byte   `json:"signature"`
}

// Desired is the whole desired state of one node.
type Desired struct {
	Node         ID                         `json:"node"`
	Installation string                     `json:"installation"`
	Revision     Revision                   `json:"revision"`
	Issued       time.Time                  `json:"issued"`
	Name         string                     `json:"name"` // as the gateway knows the node
	Tags         map[string]string          `json:"tags,omitempty"`
	Policies     []Policy                   `json:"policies"`
	Specs        map[string]json.RawMessage `json:"specs"` // by digest
	RCPs         []RCPAddresses             `json:"rcps,omitempty"`
}

// Policy is one policy of a desired state; its spec stands under Digest.
type Policy struct {
	Name   string `json:"name"`
	Type   string `json:"type"`
	Digest string `json:"digest"` // SpecDigest of the spec
}

// SpecDigest is the sha-256 of a spec's bytes as they stand in Specs, in hex.
func SpecDigest(spec json.RawMessage) string {
	sum := sha256.Sum256(spec)
	return hex.EncodeToString(sum[:])
}

// RCPAddresses says how nodes reach one RCP (or a gateway that listens).
type RCPAddresses struct {
	ID        ID       `json:"id,omitempty"`
	Name      string   `json:"name"`
	Addresses []string `json:"addresses"` // host:port
}

// RefusedFull says that the node has no room for its desired state now.
const RefusedFull = "full"

// DesiredResult answers PUT /v1/desired.
type DesiredResult struct {
	Applied  Revision       `json:"applied"`
	State    NodeState      `json:"state"`
	Refused  string         `json:"refused,omitempty"` // locked, readonly, older, wrong-node, bad-signature, draining, RefusedFull
	Reason   string         `json:"reason,omitempty"`  // for people
	Policies []PolicyStatus `json:"policies,omitempty"`
}

// Action is a signed request to run one program once. ID is the idempotency
// key: a node that has it on disk attaches to the run, or reports it lost.
type Action struct {
	ID           ID            `json:"id"`
	Node         ID            `json:"node"`
	Installation string        `json:"installation"`
	Command      []string      `json:"command"` // program and arguments; no shell
	Issued       time.Time     `json:"issued"`
	TTL          time.Duration `json:"ttl_ns"`     // how long it may wait to start, counted from its arrival; 0: start at once
	Timeout      time.Duration `json:"timeout_ns"` // how long it may run; 0: no limit
}

// Action states (AC-03).
const (
	ActionQueued    = "queued"
	ActionSent      = "sent"
	ActionRunning   = "running"
	ActionSucceeded = "succeeded"
	ActionFailed    = "failed"
	ActionTimedOut  = "timed-out"
	ActionCancelled = "cancelled"
	ActionExpired   = "expired"
	ActionRefused   = "refused"
	ActionLost      = "lost"
)

// QueryAttach, set to "1" on POST /v1/actions, asks a node to join a run that
// it has begun (or to report one that ended) and to begin none: the time in
// which it might have started is over. A node that knows no such run answers
// 404.
const QueryAttach = "attach"

// ActionFrame is one line of the answer to POST /v1/actions: a state, or
// output. N counts the frames of a run from 1; a retry with ?after=N leaves
// out those that arrived before. A frame with N 0 says only that the run goes
// on: there is one after each ActionAlive without another.
type ActionFrame struct {
	N      int64         `json:"n"`
	Stream string        `json:"stream,omitempty"` // stdout, stderr
	Data   []byte        `json:"data,omitempty"`   // at most 32 KiB
	Result *ActionResult `json:"result,omitempty"` // the last frame
}

// ActionAlive is the longest silence of a run's frames on a path that works.
const ActionAlive = 10 * time.Second

// ActionResult is how a run ended.
type ActionResult struct {
	State     string    `json:"state"`
	ExitCode  int       `json:"exit_code"`        // of the program; 128+n after signal n
	Signal    int       `json:"signal,omitempty"` // n
	Reason    string    `json:"reason,omitempty"`
	Started   time.Time `json:"started,omitzero"`
	Ended     time.Time `json:"ended,omitzero"`
	Truncated bool      `json:"truncated,omitempty"` // output above the node's limit was dropped
}

// Unlock makes a locked node obey another installation.
type Unlock struct {
	Node         ID        `json:"node"`
	Installation string    `json:"installation"`
	Issued       time.Time `json:"issued"`
}

// Reidentify makes a node forget UUID, key and certificate, and enrol as
// another party with the join code. Boot, if not empty, is the boot ID of the
// one process that is meant, where two have one identity.
type Reidentify struct {
	Node         ID        `json:"node"`
	Installation string    `json:"installation"`
	Boot         string    `json:"boot,omitempty"`
	Join         string    `json:"join"` // a secret: the code holds a token
	Issued       time.Time `json:"issued"`
}

// Revocations is the CA-signed set of keys that are no longer trusted. A lower
// Number than the one held is refused.
type Revocations struct {
	TrustDomain string       `json:"trust_domain"`
	Number      int64        `json:"number"`
	Issued      time.Time    `json:"issued"`
	Revoked     []Revocation `json:"revoked"`
}

// Revocation ends the trust in one key.
type Revocation struct {
	Key    KeyHash   `json:"key"`
	Role   Role      `json:"role"`
	ID     ID        `json:"id"`
	At     time.Time `json:"at"`
	Reason string    `json:"reason,omitempty"`
}

// CSRRequest asks for a certificate request; Rekey asks for a new key.
type CSRRequest struct {
	Rekey bool `json:"rekey,omitempty"`
}

// CSR is a PKCS #10 request. Only its public key is used.
type CSR struct {
	DER []byte `json:"der"`
}

// Certificate replaces a party's leaf: Chain is leaf first, DER, and ends with
// the root.
type Certificate struct {
	Chain [][]byte `json:"chain"`
}

// EnrollRequest is what a party without a certificate asks for, inside an
// enrolment session. Only the token, the name wish and the public key count.
type EnrollRequest struct {
	Role     Role              `json:"role"`
	ID       ID                `json:"id"` // the UUID that the party made
	Name     string            `json:"name,omitempty"`
	Tags     map[string]string `json:"tags,omitempty"`
	CSR      []byte            `json:"csr"`
	TokenID  string            `json:"token_id,omitempty"`
	Token    string            `json:"token,omitempty"`   // the secret; sent only after the gateway's role was verified
	Expired  [][]byte          `json:"expired,omitempty"` // chain of a leaf that expired or is not trusted any more, for renewal with the same key
	Program  string            `json:"program"`
	Versions VersionRange      `json:"versions"`
	Time     time.Time         `json:"time"`
	// Attestation is an [AttestationStatement] that a device key of another CA
	// signed; its chain is the device's.
	Attestation *Envelope `json:"attestation,omitempty"`
}

// AttestationStatement is what a device says of the party that asks from it: it
// is good for this key, this UUID and this session only.
type AttestationStatement struct {
	Challenge   []byte  `json:"challenge"` // of the gateway, fresh in this session
	Key         KeyHash `json:"key"`       // for which a certificate is asked, and which holds the session
	Role        Role    `json:"role"`
	ID          ID      `json:"id"`
	TrustDomain string  `json:"trust_domain"`
}

// TypeAttestation is the type of its envelope.
const TypeAttestation = "sallyport/attestation/1"

// HeaderChallenge is the header of GET /v1/enroll in which a gateway gives the
// challenge, base64 (RFC 4648, section 5, without padding) of ChallengeSize
// random bytes.
const (
	HeaderChallenge = "Sallyport-Challenge"
	ChallengeSize   = 32
)

// Verdicts on an enrolment request.
const (
	EnrollGranted = "granted"
	EnrollPending = "pending"
	EnrollDenied  = "denied"
)

// Codes of a verdict: the machine-readable half of its reason.
const (
	EnrollTokenUnknown = "token-unknown" // never made here, or revoked
	EnrollTokenExpired = "token-expired"
	EnrollTokenUsed    = "token-used"    // by other keys
	EnrollTokenForeign = "token-foreign" // for another role
	EnrollManual       = "manual"        // an operator grants it
	EnrollNoRule       = "no-rule"       // likewise: the code is bound to rules, and none of them fits
	EnrollNameInUse    = "name-in-use"   // likewise
	EnrollUUIDInUse    = "uuid-in-use"   // likewise
	EnrollDeviceInUse  = "device-in-use" // likewise: another live node came in with the same device certificate
	EnrollByOperator   = "denied"        // an operator refused it
	EnrollRevoked      = "revoked"       // the key is revoked
	EnrollBadRequest   = "bad-request"   // key, role, name or version cannot be accepted
)

// EnrollVerdict answers it: PUT by the gateway on the waiting party.
type EnrollVerdict struct {
	State        string         `json:"state"` // granted, pending, denied
	Code         string         `json:"code,omitempty"`
	Reason       string         `json:"reason,omitempty"`
	Party        Party          `json:"party,omitzero"`
	Name         string         `json:"name,omitempty"`
	Chain        [][]byte       `json:"chain,omitempty"` // leaf first, ends with the roots
	Installation string         `json:"installation,omitempty"`
	Revocations  *Envelope      `json:"revocations,omitempty"`
	Trust        *Envelope      `json:"trust,omitempty"`
	RCPs         []RCPAddresses `json:"rcps,omitempty"`
}
