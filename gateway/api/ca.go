package api

import (
	"time"

	"sallyport/internal/wire"
)

// CA is `ca show`: the issuers, and who is not on the issuing one yet.
type CA struct {
	TrustDomain   string      `json:"trust_domain"`
	External      string      `json:"external,omitempty"` // URL of the CA that issues, where this is only its registration authority
	Problem       string      `json:"problem,omitempty"`  // why nothing is issued, or nobody takes it, and what to do
	Trust         int64       `json:"trust"`              // number of the signed list of roots; 0 before the first change of roots
	Roots         []CAIssuer  `json:"roots"`
	Intermediates []CAIssuer  `json:"intermediates"`
	Rollover      *CARollover `json:"rollover,omitempty"`
	Parties       int         `json:"parties"`          // that have a certificate: gateways, RCPs, nodes
	Moved         int         `json:"moved"`            // of them, those with a leaf of the issuing intermediate, and the newest list of roots
	Status        []CAStatus  `json:"status,omitempty"` // of an external CA: where the revocation of parties' certificates is said
	Left          []CAParty   `json:"left"`             // the others
	Joins         []CAJoin    `json:"joins"`            // open join codes that pin another root than the issuing one's
}

// CAIssuer is a root or an intermediate.
type CAIssuer struct {
	N           int        `json:"n"`
	Fingerprint string     `json:"fingerprint"`
	Root        int        `json:"root,omitempty"` // of an intermediate: the n of its root
	State       string     `json:"state"`          // issuing, trusted, retired
	NotBefore   time.Time  `json:"not_before"`
	NotAfter    time.Time  `json:"not_after"`
	Retired     *time.Time `json:"retired,omitempty"`
}

// CAStatus is where clients learn which leaves of an external CA's intermediate
// are revoked.
type CAStatus struct {
	Intermediate int        `json:"intermediate"` // its n
	CRL          string     `json:"crl"`          // where it is, or none
	Next         *time.Time `json:"next_update,omitempty"`
	Missing      int        `json:"missing"` // revoked leaves that are not in it yet
	OCSP         string     `json:"ocsp"`
	Problem      string     `json:"problem,omitempty"`
}

// CARollover is a change of issuers that is under way.
type CARollover struct {
	Kind    string    `json:"kind"` // intermediate, root
	From    string    `json:"from"` // fingerprint of the intermediate that is given up
	To      string    `json:"to"`   // of the one that issues
	Since   time.Time `json:"since"`
	Aborted bool      `json:"aborted,omitempty"` // it goes back to where it came from
	Named   bool      `json:"named,omitempty"`   // the new root of an external CA is trusted, and that CA still issues below the old one
	Waits   string    `json:"waits,omitempty"`   // why the intermediate from which an external CA issues is not taken over
}

// CAParty is a party that a rollover waits for.
type CAParty struct {
	Role      wire.Role  `json:"role"`
	ID        wire.ID    `json:"id"`
	Name      string     `json:"name"`
	Connected bool       `json:"connected"`
	LastSeen  *time.Time `json:"last_seen"`
	NotAfter  time.Time  `json:"not_after"` // of its leaf
	Until     time.Time  `json:"until"`     // if it comes back later than that, it needs a new join code
	Lost      bool       `json:"lost"`      // it needs one in any case: no root that it knows vouches for what issues
	Reason    string     `json:"reason"`
}

// CAJoin is an open join code.
type CAJoin struct {
	ID      string    `json:"id"`
	Role    wire.Role `json:"role"`
	Name    string    `json:"name"`
	Root    string    `json:"root"` // fingerprint of the root that it pins
	Expires time.Time `json:"expires"`
	Lost    bool      `json:"lost"` // it is of no use: that root vouches for nothing any more
}

// RotateCA begins a rollover.
type RotateCA struct {
	What         string `json:"what"`                    // intermediate, root
	Fingerprint  string `json:"fingerprint,omitempty"`   // of the new root of an external CA: SHA-256 of its certificate, hex
	WithoutCross bool   `json:"without_cross,omitempty"` // with the fingerprint, again: the old root does not vouch for what is below the new one
	DryRun       bool   `json:"dry_run,omitempty"`
}

// FinishCA ends one.
type FinishCA struct {
	Force  bool `json:"force,omitempty"`  // although parties are left
	Forget bool `json:"forget,omitempty"` // the old root vouches for nothing any more
	DryRun bool `json:"dry_run,omitempty"`
}

// CAChange is what a change of issuers did, or would do.
type CAChange struct {
	DryRun  bool      `json:"dry_run,omitempty"`
	Offline []CAParty `json:"offline"` // they change when they come back
	Joins   []CAJoin  `json:"joins"`   // open join codes that pin the root which is given up
	// Certificates of other programs, from the doors, that hang on the root which
	// is given up, and whose names have no other that stays.
	Certificates []Certificate `json:"certificates"`
	Notes        []string      `json:"notes"` // what to know, and what would break
	CA           CA            `json:"ca"`    // afterwards; of a dry run: now
}
