package channel

import (
	"crypto/ecdsa"
	"crypto/hkdf"
	"crypto/sha256"
	"fmt"

	"github.com/quic-go/quic-go"

	"sallyport/internal/identity"
)

// What a listener must remember over a restart is derived from the party's own
// key: who has that can pose as the listener anyway.

// quicKeys let a peer of the time before learn in one round trip that its
// connection is gone (RFC 9000 section 10.3), as soon as it sends more than a
// PING (h3.keepAlive), instead of waiting for silence.
func quicKeys(id *identity.Identity) (*quic.StatelessResetKey, *quic.TokenGeneratorKey, error) {
	var reset quic.StatelessResetKey
	var token quic.TokenGeneratorKey
	if err := derive(id, "sallyport quic reset", reset[:]); err != nil {
		return nil, nil, err
	}
	return &reset, &token, derive(id, "sallyport quic token", token[:])
}

// ticketSecret is what session tickets are sealed with. Thousands of peers that come back to a
// listener that was started again resume what they had, at half the price of a
// handshake. A resumed session has a key exchange of its own (RFC 8446 section
// 2.2) and is verified like the first one.
func ticketSecret(id *identity.Identity) (secret [32]byte, err error) {
	err = derive(id, "sallyport tls tickets", secret[:])
	return secret, err
}

func derive(id *identity.Identity, info string, out []byte) error {
	cert, err := id.SelfSigned()
	if err != nil {
		return err
	}
	key, ok := cert.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return fmt.Errorf("key is a %T", cert.PrivateKey)
	}
	secret, err := key.Bytes()
	if err != nil {
		return err
	}
	b, err := hkdf.Key(sha256.New, secret, nil, info, len(out))
	copy(out, b)
	return err
}
