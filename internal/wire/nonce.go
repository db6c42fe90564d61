package wire

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

// Headers of GET /v1/hello in a session, by which a gateway finds copies of one
// running process: a virtual machine that was copied with its memory has one
// boot ID twice.
const (
	// HeaderNonce brings a fresh [Nonce]. A node holds the last one that it was
	// brought, whoever the gateway was, and its hello gives the one before, in
	// Previous: one process gives each of them once.
	HeaderNonce = "Sallyport-Nonce"
	// HeaderMark, set to "1" beside a nonce, makes the process take a boot ID
	// of its own ([MarkBoot]) before it answers.
	HeaderMark = "Sallyport-Mark"
	// HeaderQuarantined, set to "1", tells a node that it is quarantined
	// ([StateQuarantined]); without it, it is not.
	HeaderQuarantined = "Sallyport-Quarantined"
)

// NonceSize is in bytes.
const NonceSize = 16

// ErrNonce says that text is no nonce.
var ErrNonce = errors.New("not a nonce")

// Nonce is random; all zeros is none. Its text is base64 (RFC 4648, section 5,
// without padding) of exactly [NonceSize] bytes.
type Nonce [NonceSize]byte

// NewNonce returns one that nobody else has.
func NewNonce() (n Nonce) {
	_, _ = rand.Read(n[:]) // never fails
	return n
}

// ParseNonce reads a nonce; none is an error.
func ParseNonce(s string) (n Nonce, err error) {
	if len(s) != base64.RawURLEncoding.EncodedLen(NonceSize) {
		return n, fmt.Errorf("%w: %d characters", ErrNonce, len(s))
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil || len(b) != NonceSize { // the decoder skips line ends
		return n, fmt.Errorf("%w: %s", ErrNonce, Quotable(s))
	}
	if copy(n[:], b); n.IsZero() {
		return n, fmt.Errorf("%w: all zeros", ErrNonce)
	}
	return n, nil
}

// IsZero tells whether there is none.
func (n Nonce) IsZero() bool { return n == Nonce{} }

func (n Nonce) String() string { return base64.RawURLEncoding.EncodeToString(n[:]) }

// MarshalText is for JSON.
func (n Nonce) MarshalText() ([]byte, error) { return []byte(n.String()), nil }

// UnmarshalText is for JSON.
func (n *Nonce) UnmarshalText(b []byte) (err error) {
	*n, err = ParseNonce(string(b))
	return err
}

// bootMark stands between the boot ID that a process made at its start and
// what tells it from copies of it.
const bootMark = "/"

// MarkBoot is the boot ID of a process that was told with a nonce to have one
// of its own.
func MarkBoot(boot string, n Nonce) string {
	return UnmarkBoot(boot) + bootMark + hex.EncodeToString(n[:4])
}

// UnmarkBoot is what a process made at its start, and shares with its copies.
func UnmarkBoot(boot string) string {
	boot, _, _ = strings.Cut(boot, bootMark)
	return boot
}
