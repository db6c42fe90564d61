package wire

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"time"
)

// Signed documents of enrolment by files, for a party that no gateway reaches.
const (
	TypeOfflineRequest = "sallyport/offline-request/1" // sealed by the key that it asks a certificate for
	TypeOfflineAnswer  = "sallyport/offline-answer/1"  // sealed by a gateway
)

// The PEM types of the files: an [Envelope] each, in JSON.
const (
	PEMOfflineRequest = "SALLYPORT CERTIFICATE REQUEST"
	PEMOfflineAnswer  = "SALLYPORT CERTIFICATE ANSWER"
)

// Limits on the files, in bytes. An answer carries the revocation set.
const (
	MaxOfflineRequest = 2 * MaxEnrollBody
	MaxOfflineAnswer  = 4 << 20
)

// OfflineRequest is what a party would say in an enrolment session, and for
// whom it is. It never holds a token: whoever carries the file could use it.
type OfflineRequest struct {
	TrustDomain string        `json:"trust_domain"`
	Root        KeyHash       `json:"root"` // that the party has pinned
	Request     EnrollRequest `json:"request"`
}

// OfflineAnswer is the grant of one.
type OfflineAnswer struct {
	Key     KeyHash       `json:"key"` // of the party that it is for
	Issued  time.Time     `json:"issued"`
	Verdict EnrollVerdict `json:"verdict"`
}

// OfflineBundle is a whole identity, for a host that cannot make a key. It only
// ever travels encrypted.
type OfflineBundle struct {
	Type        string   `json:"type"` // TypeOfflineBundle
	Role        Role     `json:"role"`
	ID          ID       `json:"id"`
	Root        KeyHash  `json:"root"`
	TrustDomain string   `json:"trust_domain"`
	Key         []byte   `json:"key"` // PKCS #8, DER
	Answer      Envelope `json:"answer"`
}

// TypeOfflineBundle tells a bundle from whatever else is encrypted.
const TypeOfflineBundle = "sallyport/offline-bundle/1"

// ErrOfflineFile says that a file is not what it should be.
var ErrOfflineFile = errors.New("not such a file")

// AppendOffline appends a document as a file of that PEM type.
func AppendOffline(b []byte, pemType string, env Envelope) ([]byte, error) {
	text, err := json.Marshal(env)
	if err != nil {
		return nil, err
	}
	return append(b, pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: text})...), nil
}

// ParseOffline reads what AppendOffline wrote, of at most limit bytes. Text
// around the block is ignored, a second block is not. Whether the document is
// true remains to be verified.
func ParseOffline(b []byte, pemType string, limit int) (Envelope, error) {
	var env Envelope
	if len(b) > limit {
		return env, fmt.Errorf("%w: %w (%d bytes)", ErrOfflineFile, ErrTooLarge, limit)
	}
	block, rest := pem.Decode(b)
	switch {
	case block == nil:
		return env, fmt.Errorf("%w: it holds no PEM block of type %s", ErrOfflineFile, pemType)
	case block.Type != pemType:
		return env, fmt.Errorf("%w: it is a %s, want a %s", ErrOfflineFile, Quotable(block.Type), pemType)
	case bytes.Contains(rest, []byte("-----BEGIN ")):
		return env, fmt.Errorf("%w: it holds more than one PEM block", ErrOfflineFile)
	}
	if err := json.Unmarshal(block.Bytes, &env); err != nil {
		return Envelope{}, fmt.Errorf("%w: cut off or altered in copying", ErrOfflineFile)
	}
	return env, nil
}
