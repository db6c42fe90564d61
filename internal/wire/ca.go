package wire

import (
	"errors"
	"time"
)

// ErrRollover says that a change of issuers does not fit what is under way.
var ErrRollover = errors.New("certificate authority")

// Trust is the CA-signed list of the roots of a trust domain. It is signed by
// the SPIFFE intermediate that issues, whose certificates in the envelope lead
// to every root that parties may know: so a root that is new is vouched for by
// one that is trusted already. A lower Number than the one held is refused.
type Trust struct {
	TrustDomain string    `json:"trust_domain"`
	Number      int64     `json:"number"`
	Issued      time.Time `json:"issued"`
	Roots       [][]byte  `json:"roots"` // DER; all others are trusted no longer
}

// MaxRoots bounds the roots of one trust domain, so that a chain with all of
// them stays small.
const MaxRoots = 3

// States of an issuer.
const (
	IssuerIssuing = "issuing" // signs new certificates
	IssuerTrusted = "trusted" // the other one, while a rollover lasts
	IssuerRetired = "retired" // trusted no more; of a root: still vouched for, towards parties that were away
)

// Kinds of a rollover.
const (
	RolloverIntermediate = "intermediate"
	RolloverRoot         = "root"
)

// CAIssuer is a root or a SPIFFE intermediate.
type CAIssuer struct {
	N         int       `json:"n"` // 1 is the first, whose file name has no number
	Key       KeyHash   `json:"key"`
	Root      int       `json:"root,omitempty"` // of an intermediate: the N of its root
	State     string    `json:"state"`
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
	Retired   time.Time `json:"retired,omitzero"`
	Forgotten bool      `json:"forgotten,omitempty"` // a root that vouches for nothing any more
}

// CARollover is a change of issuers that is under way. An abort turns it round.
type CARollover struct {
	Kind    string    `json:"kind"` // RolloverIntermediate, RolloverRoot
	From    KeyHash   `json:"from"` // the intermediate that is given up
	To      KeyHash   `json:"to"`   // the one that issues
	Since   time.Time `json:"since"`
	Aborted bool      `json:"aborted,omitempty"`
	Named   bool      `json:"named,omitempty"` // the new root of an external CA is trusted, and the old one issues
	Waits   string    `json:"waits,omitempty"` // why an external CA's new intermediate is not taken over
}

// CAState is what a certificate authority says of itself.
type CAState struct {
	TrustDomain   string      `json:"trust_domain"`
	Number        int64       `json:"number"`             // of the trust document; 0 before the first rollover
	External      string      `json:"external,omitempty"` // URL of the CA that issues, of a registration authority
	Signer        string      `json:"signer,omitempty"`   // socket of the signer that has the issuing key
	Problem       string      `json:"problem,omitempty"`  // why that CA, or that signer, signs nothing
	Since         time.Time   `json:"since,omitzero"`     // of Problem
	Roots         []CAIssuer  `json:"roots"`
	Intermediates []CAIssuer  `json:"intermediates"`
	Rollover      *CARollover `json:"rollover,omitempty"`
}

// CAStatus is what an external CA says of the revocation of an intermediate's
// leaves.
type CAStatus struct {
	CRL     []byte    `json:"crl,omitempty"`     // its CRL, DER, verified; none: Problem says why
	Next    time.Time `json:"next,omitzero"`     // when there is another at the latest
	Missing int       `json:"missing,omitempty"` // revoked leaves that are not in it
	Problem string    `json:"problem,omitempty"`
}

// Issuing returns the intermediate that signs new certificates.
func (s CAState) Issuing() CAIssuer {
	for _, i := range s.Intermediates {
		if i.State == IssuerIssuing {
			return i
		}
	}
	return CAIssuer{}
}

// Forgotten are the roots that vouch for nothing any more: who knows only one of
// them can be given no new leaf. With next also the one that stops when another
// root is made, because MaxRoots vouch at most.
func (s CAState) Forgotten(next bool) map[KeyHash]bool {
	out := map[KeyHash]bool{}
	var vouching, retired []KeyHash
	for _, r := range s.Roots {
		switch {
		case r.Forgotten:
			out[r.Key] = true
			continue
		case r.State == IssuerRetired:
			retired = append(retired, r.Key)
		}
		vouching = append(vouching, r.Key)
	}
	if next && len(vouching) >= MaxRoots && len(retired) > 0 {
		out[retired[0]] = true
	}
	return out
}

// RootOf returns the root of an intermediate.
func (s CAState) RootOf(inter KeyHash) CAIssuer {
	for _, i := range s.Intermediates {
		for _, r := range s.Roots {
			if i.Key == inter && r.N == i.Root {
				return r
			}
		}
	}
	return CAIssuer{}
}
