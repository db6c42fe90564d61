package channel

import (
	"crypto/x509"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/quic-go/quic-go"

	"sallyport/internal/identity"
)

// offerTime is how long a certified party waits on an enrolment connection for
// a new leaf, before it tries the ordinary way again.
const offerTime = time.Minute

// errNoOffer ends such a connection.
var errNoOffer = errors.New("no gateway has renewed our certificate")

// Fallback is the Enroll of a Dialer whose peer may have missed a change of the
// certificate authority, or we: while one side does not take the certificates
// of the other, every second attempt is by the enrolment protocol, in which a
// gateway can give a party that still has its key a new leaf. An RCP that only
// feigns that gains nothing: what it can do to a pending party is to wait.
type Fallback struct {
	mu         sync.Mutex
	up         bool
	distrusted bool
	tried      bool
}

// Note is told of every state of the Dialer.
func (f *Fallback) Note(s State) {
	f.mu.Lock()
	defer f.mu.Unlock()
	// What ends a connection, such as a revocation, says nothing of the next.
	f.distrusted = s.Conn == nil && !f.up && s.Err != nil && Distrusted(s.Err)
	f.up = s.Conn != nil
}

// Enroll is asked before every attempt.
func (f *Fallback) Enroll() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tried = f.distrusted && !f.tried
	return f.tried
}

// Distrusted tells whether an attempt to dial failed because one side does not
// take the certificates of the other. A party that was away while the
// certificate authority changed its issuers sees nothing else.
func Distrusted(err error) bool {
	var unknown x509.UnknownAuthorityError
	return errors.As(err, &unknown) || errors.Is(err, identity.ErrUntrusted) || errors.Is(err, identity.ErrRevoked) || RefusesUs(err)
}

// RefusesUs tells whether an attempt to dial failed because the other side
// refused the handshake with an alert (RFC 8446, section 6; RFC 9001, section
// 4.8): most often it does not accept our certificate.
func RefusesUs(err error) bool {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "remote error" { // how crypto/tls names an alert
		return true
	}
	var transport *quic.TransportError
	return errors.As(err, &transport) && transport.Remote && transport.ErrorCode.IsCryptoError()
}
