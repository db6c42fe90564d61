package channel

import (
	"errors"
	"net"

	"github.com/quic-go/quic-go"
)

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
