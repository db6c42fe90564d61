package api

import (
	"context"
	"time"
)

// Certificate is one line of `certificate list`: a leaf that another program
// has.
type Certificate struct {
	Serial  string     `json:"serial"` // lower-case hex
	Door    string     `json:"door"`   // acme, est, or self: of the doors themselves
	Names   []string   `json:"names"`
	State   string     `json:"state"` // valid, expired, revoked
	Via     string     `json:"via"`   // name of the node or RCP at whose proxy its client was
	Key     string     `json:"fingerprint"`
	Issued  time.Time  `json:"issued"`
	Expires time.Time  `json:"expires"`
	Revoked *time.Time `json:"revoked"`
	Reason  string     `json:"reason"` // of the revocation
}

// RevokeCertificate asks for a revocation.
type RevokeCertificate struct {
	Reason string `json:"reason,omitempty"` // see [RevocationReasons]; default unspecified
}

// RevocationReasons are the reasons that CRLs know (RFC 5280, 5.3.1), by their
// numbers.
var RevocationReasons = map[string]int{"unspecified": 0, "key-compromise": 1, "affiliation-changed": 3, "superseded": 4, "cessation-of-operation": 5, "privilege-withdrawn": 9}

// Certificates lists what other programs have, newest first.
func (c *Client) Certificates(ctx context.Context) ([]Certificate, error) {
	return list[Certificate](ctx, c, "/certificates", values(), Page{})
}

// RevokeCertificate ends the trust in one leaf.
func (c *Client) RevokeCertificate(ctx context.Context, serial string, in RevokeCertificate) (Certificate, error) {
	return post[Certificate](ctx, c, at("/certificates", serial, "revoke"), in)
}
