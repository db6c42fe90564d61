// Package policy applies what a gateway's policies say about one host, within
// the bounds that the host's own configuration sets, and reports what became
// of each (PD-01, PD-11, PD-16).
//
// One file per policy type. An [Engine] holds the policies of one instance; it
// remembers on disk what it applied and what that replaced, so that a policy
// that goes leaves the host as it was found.
package policy
