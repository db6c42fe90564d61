package channel

import (
	"fmt"

	"sallyport/internal/wire"
)

// The application protocols of a port. A dialler offers exactly one: it says
// what the dialler is to the listener. The h3 names are our own too, because a
// reversed HTTP/3 connection is outside RFC 9114.
const (
	ALPNUp       = "sallyport-up/1"        // the dialler is upstream: it is the HTTP client
	ALPNDown     = "sallyport-down/1"      // the dialler is downstream: it is the HTTP server
	ALPNEnroll   = "sallyport-enroll/1"    // one side has no valid certificate yet: that one is downstream
	ALPNUpBulk   = "sallyport-up-bulk/1"   // as ALPNUp, with the windows of class bulk
	ALPNDownBulk = "sallyport-down-bulk/1" // as ALPNDown, likewise

	ALPNUpLane   = "sallyport-up-lane/1"   // a sealed leg of a lane: bytes inside of TLS, no HTTP
	ALPNDownLane = "sallyport-down-lane/1" // likewise, by who is downstream

	ALPNUpH3     = "sallyport-up-h3/1"
	ALPNDownH3   = "sallyport-down-h3/1"
	ALPNEnrollH3 = "sallyport-enroll-h3/1"

	// Inside a CONNECT stream or a lane, never on a port.
	ALPNSession       = "sallyport-session/1"
	ALPNTunnel        = "sallyport-tunnel/1" // internal/tunnel instead of HTTP/2
	ALPNSessionEnroll = "sallyport-session-enroll/1"
)

// Carriers.
const (
	CarrierAuto = "auto" // of a Dialer: race both, stay on the winner, return to QUIC
	CarrierH2   = "h2"
	CarrierH3   = "h3"
)

// Classes of connection. Admin and session share their windows; bulk has
// larger ones and fewer streams, and always runs on HTTP/2.
const (
	ClassAdmin   = "admin"
	ClassSession = "session"
	ClassBulk    = "bulk"
)

// classLane marks what is no channel but a leg of a lane.
const classLane = "lane"

// Direction says where the peer of a connection is.
type Direction int

// The two directions.
const (
	PeerUpstream   Direction = iota + 1 // the peer asks, we serve
	PeerDownstream                      // we ask, the peer serves
)

func (d Direction) String() string {
	switch d {
	case PeerUpstream:
		return "upstream"
	case PeerDownstream:
		return "downstream"
	}
	return fmt.Sprintf("direction %d", int(d))
}

// protocol is one row of the ALPN table.
type protocol struct {
	alpn    string
	carrier string
	class   string
	enroll  bool
	dialler Direction   // what the dialler is to the listener; 0 for enroll
	accepts []wire.Role // roles that the dialler may have
	answers []wire.Role // roles that the listener may have
}

var protocols = []protocol{
	{alpn: ALPNUp, carrier: CarrierH2, class: ClassAdmin, dialler: PeerUpstream, accepts: asUpstream, answers: asDownstream},
	{alpn: ALPNDown, carrier: CarrierH2, class: ClassAdmin, dialler: PeerDownstream, accepts: asDownstream, answers: asUpstream},
	{alpn: ALPNEnroll, carrier: CarrierH2, class: ClassAdmin, enroll: true},
	{alpn: ALPNUpBulk, carrier: CarrierH2, class: ClassBulk, dialler: PeerUpstream, accepts: asUpstream, answers: asDownstream},
	{alpn: ALPNDownBulk, carrier: CarrierH2, class: ClassBulk, dialler: PeerDownstream, accepts: asDownstream, answers: asUpstream},
	{alpn: ALPNUpLane, carrier: CarrierH2, class: classLane, dialler: PeerUpstream, accepts: asUpstream, answers: asDownstream},
	{alpn: ALPNDownLane, carrier: CarrierH2, class: classLane, dialler: PeerDownstream, accepts: asDownstream, answers: asUpstream},
	{alpn: ALPNUpH3, carrier: CarrierH3, class: ClassAdmin, dialler: PeerUpstream, accepts: asUpstream, answers: asDownstream},
	{alpn: ALPNDownH3, carrier: CarrierH3, class: ClassAdmin, dialler: PeerDownstream, accepts: asDownstream, answers: asUpstream},
	{alpn: ALPNEnrollH3, carrier: CarrierH3, class: ClassAdmin, enroll: true},
}

var (
	asUpstream   = []wire.Role{wire.RoleGateway, wire.RoleRCP}
	asDownstream = []wire.Role{wire.RoleNode, wire.RoleRCP}
)

// protocolOf finds the row of an ALPN on a carrier.
func protocolOf(alpn, carrier string) (*protocol, bool) {
	for i := range protocols {
		if p := &protocols[i]; p.alpn == alpn && p.carrier == carrier {
			return p, true
		}
	}
	return nil, false
}

// protocolFor is the row by which a dialler reaches a peer in direction peer.
func protocolFor(peer Direction, carrier, class string, enroll bool) (*protocol, error) {
	if class != ClassBulk {
		class = ClassAdmin
	} else {
		carrier = CarrierH2
	}
	us := PeerUpstream
	if peer == PeerUpstream {
		us = PeerDownstream
	}
	for i := range protocols {
		p := &protocols[i]
		if p.carrier == carrier && p.enroll == enroll && (enroll || p.class == class && p.dialler == us) {
			return p, nil
		}
	}
	return nil, fmt.Errorf("no protocol for carrier %q", carrier)
}

// laneProtocol is the row by which a sealed leg reaches a peer in direction peer.
func laneProtocol(peer Direction) *protocol {
	alpn := ALPNUpLane
	if peer == PeerUpstream {
		alpn = ALPNDownLane
	}
	p, _ := protocolOf(alpn, CarrierH2)
	return p
}

// EnrollALPN tells whether an ALPN is one of the enrolment ones, for
// [ListenConfig].Admit.
func EnrollALPN(alpn string) bool { return alpn == ALPNEnroll || alpn == ALPNEnrollH3 }
