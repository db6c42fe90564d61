package api

import (
	"encoding/json"
	"time"
)

// Rule is one rule by which certificate requests are granted. Spec is as in
// the document.
type Rule struct {
	Name      string          `json:"name"`
	Spec      json.RawMessage `json:"spec"`
	Granted   int64           `json:"granted"` // requests that it let in
	GrantedAt *time.Time      `json:"granted_at"`
	Created   time.Time       `json:"created"`
	CreatedBy string          `json:"created_by"`
	Updated   time.Time       `json:"updated"`
	UpdatedBy string          `json:"updated_by"`
}

// ApplyRules creates and changes rules, all or none.
type ApplyRules struct {
	Manifests []Manifest `json:"manifests"`
	DryRun    bool       `json:"dry_run,omitempty"`
}

// AppliedRules is what that did, or would do. Grants are the waiting requests
// that the rules, with those that are there besides, let in; each gets its
// certificate when its party is seen next, which is at once if it is there.
type AppliedRules struct {
	DryRun  bool            `json:"dry_run"`
	Objects []AppliedObject `json:"objects"`
	Skipped int             `json:"skipped"` // documents of another kind
	Grants  []RuleGrant     `json:"grants"`
}

// RuleGrant is one waiting request, and the rule that fits it. Why says what
// keeps it waiting although, or without a rule, why none fits.
type RuleGrant struct {
	Request Request `json:"request"`
	Rule    string  `json:"rule"`
	Proof   string  `json:"proof,omitempty"` // what the party has proven, of what the rule asks for
	Why     string  `json:"why,omitempty"`
}
