package config

import (
	"fmt"
	"path"
	"strings"
)

// ChallengeRule lets a node look at the ACME challenges of hosts.
type ChallengeRule struct {
	Glob string // over host names in lower case, and addresses
	Addr string // where they are answered; empty: at the host itself
}

// ChallengeRules is a list of "glob[=host:port]", separated by ";".
type ChallengeRules []ChallengeRule

// UnmarshalText reads the list.
func (l *ChallengeRules) UnmarshalText(b []byte) error {
	*l = nil
	for _, p := range split(string(b)) {
		if p == none {
			continue
		}
		glob, addr, fixed := strings.Cut(p, "=")
		glob, addr = strings.ToLower(strings.TrimSpace(glob)), strings.TrimSpace(addr)
		if _, err := path.Match(glob, "a"); err != nil || glob == "" || strings.ContainsAny(glob, "/ @,") {
			return fmt.Errorf("%s is not accepted; want host names with *, ? and [a-z], each with =host:port behind it if its challenges are answered elsewhere, separated by ;, or none", quote(p))
		}
		if fixed {
			if err := checkAddr(addr, false); err != nil {
				return fmt.Errorf("challenges of %s: %w", glob, err)
			}
		}
		*l = append(*l, ChallengeRule{glob, addr})
	}
	return nil
}

// MarshalText writes the form that UnmarshalText reads.
func (l ChallengeRules) MarshalText() ([]byte, error) {
	return join(l, none, func(r ChallengeRule) string { return with(r.Glob, "=", r.Addr) })
}

// Find returns the first rule for a host in lower case.
func (l ChallengeRules) Find(host string) (ChallengeRule, bool) {
	for _, r := range l {
		if ok, err := path.Match(r.Glob, host); err == nil && ok {
			return r, true
		}
	}
	return ChallengeRule{}, false
}
