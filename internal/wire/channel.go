package wire

import "time"

// Protocol versions that this program speaks. A gateway speaks to parties of
// its own and the two previous minor versions.
const (
	ProtocolMin = 1
	ProtocolMax = 1
)

// VersionRange is what a hello offers; the highest common version is used.
type VersionRange struct {
	Min int `json:"min"`
	Max int `json:"max"`
}

// OwnVersions is the range of this program.
var OwnVersions = VersionRange{Min: ProtocolMin, Max: ProtocolMax}

// Common returns the highest version that both ranges hold.
func (v VersionRange) Common(o VersionRange) (int, bool) {
	hi := min(v.Max, o.Max)
	return hi, hi >= max(v.Min, o.Min) && hi > 0
}

// URLs on a channel. The first group is everything that an RCP may send to a
// node, besides CONNECT to its session listener; the second is what an RCP
// answers to its upstreams, besides CONNECT.
const (
	PathSignals   = "/v1/signals"    // GET: NDJSON of Signal, downstream to upstream
	PathLanes     = "/v1/lanes"      // POST LaneRequest
	PathArtifacts = "/v1/artifacts/" // PUT, followed by the digest
	PathDrain     = "/v1/drain"      // POST Drain

	PathPeers    = "/v1/peers"    // GET: NDJSON of PeersLine
	PathChannels = "/v1/channels" // POST MoreChannels: dial another connection (we cannot dial you)
)

// Headers of a CONNECT request.
const (
	HeaderHops = "Sallyport-Hops" // hops that remain, at most MaxHops
	HeaderVia  = "Sallyport-Via"  // IDs of the RCPs passed, comma separated
	// HeaderRequested, with any value, says of a CONNECT to a pending party that an
	// operator is shown its request: it keeps its place where parties wait.
	HeaderRequested = "Sallyport-Requested"

	HeaderClass = "Sallyport-Class" // class of the connection, on its first request
	HeaderTime  = "Sallyport-Time"  // the gateway's clock, RFC 3339, in its requests inside a session
	HeaderError = "Sallyport-Error" // which hop failed and why, on a refused CONNECT
	HeaderLane  = "Sallyport-Lane"  // LaneSealed, on an answer to a request for a sealed lane
)

// LaneSealed says that the legs of a lane are inside TLS.
const LaneSealed = "sealed"

// MaxHops is the number of RCPs that a CONNECT may pass.
const MaxHops = 4

// Hint bits of a signal: reasons to open a session, never facts.
const (
	HintOutbox = "outbox" // events wait
	HintAction = "action" // an action ended whose result was not collected
)

// Signal is one line of GET /v1/signals. All of it is a hint: the RCP may have
// made it up. Generation rises with each channel that the party opens in one
// boot; the RCP keeps the newest.
type Signal struct {
	ID         ID       `json:"id"`
	Boot       string   `json:"boot"`
	Generation int64    `json:"generation"`
	Digest     string   `json:"digest,omitempty"` // salted digest of the hello, see Hello.Digest
	Hints      []string `json:"hints,omitempty"`
	Draining   bool     `json:"draining,omitempty"`
}

// Drain asks the other side to finish what runs, take no more and be replaced
// before the deadline.
type Drain struct {
	Deadline time.Duration `json:"deadline_ns"` // on the receiver's monotonic clock
	Reason   string        `json:"reason,omitempty"`
}

// MoreChannels asks a downstream that dials us for another connection.
type MoreChannels struct {
	Class string `json:"class"`
}

// PeersHello opens a peers stream.
type PeersHello struct {
	ID         ID           `json:"id"`
	Epoch      string       `json:"epoch"` // new at each start of the RCP: positions of another epoch mean nothing
	Program    string       `json:"program"`
	Versions   VersionRange `json:"versions"`
	Boot       string       `json:"boot"`
	Generation int64        `json:"generation"`
	Snapshot   bool         `json:"snapshot"` // a full snapshot follows: forget what you knew, your position too
}

// PeersLine is one line of GET /v1/peers?epoch=E&pos=N: exactly one member is
// set, besides Pos. A line with Pos alone is a keep-alive.
type PeersLine struct {
	Hello    *PeersHello `json:"hello,omitempty"`
	Peer     *Peer       `json:"peer,omitempty"`     // now there, or changed
	Gone     *Gone       `json:"gone,omitempty"`     // no longer there
	Synced   bool        `json:"synced,omitempty"`   // the snapshot is complete
	Draining *Drain      `json:"draining,omitempty"` // repeated after each hello while it lasts; taken back by ending the stream
	Reign    bool        `json:"reign,omitempty"`    // a gateway began a new Reign: read it in a session
	Pos      int64       `json:"pos,omitempty"`      // resume after this line with it
}

// Peer is what an RCP says of a party that hangs on it. Everything here is
// "reported by RCP x".
type Peer struct {
	Role       Role      `json:"role,omitempty"` // of the certificate; empty while pending
	ID         ID        `json:"id,omitempty"`
	Pending    KeyHash   `json:"pending,omitempty"` // instead of Role and ID
	Path       []ID      `json:"path,omitempty"`    // RCPs between the sender and this peer, nearest first
	Boot       string    `json:"boot,omitempty"`
	Generation int64     `json:"generation,omitempty"`
	Digest     string    `json:"digest,omitempty"`
	Hints      []string  `json:"hints,omitempty"`
	Carrier    string    `json:"carrier,omitempty"` // "h2" or "h3"
	Source     string    `json:"source,omitempty"`  // remote address as the RCP sees it
	Dialled    bool      `json:"dialled,omitempty"` // the RCP dialled it
	Since      time.Time `json:"since"`
	RTT        float64   `json:"rtt_seconds,omitempty"`
	Draining   bool      `json:"draining,omitempty"`
}

// Gone names a peer that left. Reason is for people.
type Gone struct {
	ID      ID      `json:"id,omitempty"`
	Pending KeyHash `json:"pending,omitempty"`
	Path    []ID    `json:"path,omitempty"`
	Reason  string  `json:"reason,omitempty"`
}
