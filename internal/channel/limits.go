package channel

import (
	"time"

	"sallyport/internal/wire"
)

// Limits bounds what a peer can make us spend. The zero value of each field
// means its default.
type Limits struct {
	// Handshakes in flight, from the accepted connection to the verified
	// peer, in total and per source (one IPv4 address, one IPv6 /64), for each of TCP
	// and QUIC. On TCP who keeps us waiting gives way when all places are taken; else
	// newcomers wait to be accepted, or are closed unanswered where their source has its
	// share. On QUIC what is above either is refused: diallers then take TCP.
	Handshakes, HandshakesPerSource int
	// HandshakeTimeout is for all of a handshake, the first byte included.
	HandshakeTimeout time.Duration
	// PrefaceTimeout is for the 40 bytes with which a lane's leg begins.
	PrefaceTimeout time.Duration

	// Streams of one connection of the classes admin and session.
	Streams int
	// StreamWindow is what one unread stream may hold of our memory, in
	// bytes. The connection's window is Streams times as large, so that
	// stalled streams never delay the others.
	StreamWindow int

	// MaxHeader bounds request and response headers, in bytes.
	MaxHeader int
	// MaxBody bounds request bodies other than those of CONNECT, in bytes. On
	// the enrolment protocols wire.MaxEnrollBody is the limit, both ways.
	MaxBody int64
	// HeaderTimeout is how long a peer may take to send response headers.
	HeaderTimeout time.Duration

	// KeepAlive is the silence after which a PING is sent: by HTTP/2's client, and
	// by its server after half as long again. A peer that stays silent for twice
	// KeepAlive is dead: noticed within 30 s. Negative: no PINGs.
	KeepAlive time.Duration

	// Pending connections (enrolment protocols) in total and per source. A
	// thousand honest nodes may share one address.
	Pending, PendingPerSource int
}

// Class bulk: few streams with large windows.
const (
	bulkStreams      = 8
	bulkStreamWindow = 8 << 20
)

func (l Limits) withDefaults() Limits {
	set(&l.Handshakes, 1024)
	set(&l.HandshakesPerSource, 256)
	set(&l.HandshakeTimeout, 15*time.Second)
	set(&l.PrefaceTimeout, 5*time.Second)
	set(&l.Streams, 1024)
	set(&l.StreamWindow, 64<<10)
	set(&l.MaxHeader, wire.MaxHeader)
	set(&l.MaxBody, wire.MaxRevocations)
	set(&l.HeaderTimeout, 30*time.Second)
	set(&l.KeepAlive, 14500*time.Millisecond)
	set(&l.Pending, 8192)
	set(&l.PendingPerSource, 2048)
	return l
}

// forClass returns the limits with the windows of a class.
func (l Limits) forClass(class string) Limits {
	if class == ClassBulk {
		l.Streams, l.StreamWindow = bulkStreams, bulkStreamWindow
	}
	return l
}

// connWindow is the flow-control window of a whole connection, in bytes.
func (l Limits) connWindow() int { return (l.Streams + 16) * l.StreamWindow }

func set[T int | int64 | time.Duration](v *T, def T) {
	if *v == 0 {
		*v = def
	}
}
