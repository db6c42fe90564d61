package identity

import (
	"crypto/x509"
	"slices"
	"sync"
)

// maxVerified is how many chains are remembered: a node hears from one gateway
// by way of a few RCPs.
const maxVerified = 4

// verified remembers signatures that were good, which no time changes: a
// handshake asks twice who it was, and the same few sign every document. What
// does change (times, revocations, trust) is looked at each time, by checkChain.
// The zero value is ready.
type verified struct {
	mu   sync.Mutex
	self *x509.Certificate // the root whose own signature was verified last
	last []verifiedChains  // the newest first
}

// verifiedChains are the ways from certs[0] to roots.
type verifiedChains struct {
	certs, roots []*x509.Certificate // what they were built of
	chains       [][]*x509.Certificate
}

// root tells whether c is signed with its own key. A hash pins that key; the
// signature keeps the rest of the certificate (constraints, times) as the
// key's owner made it.
func (v *verified) root(c *x509.Certificate) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.self != nil && v.self.Equal(c) {
		return true
	}
	if c.CheckSignatureFrom(c) != nil {
		return false
	}
	v.self = c
	return true
}

// chains returns those that were built of the same certificates before; nil if
// none were.
func (v *verified) chains(certs, roots []*x509.Certificate) [][]*x509.Certificate {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, known := range v.last {
		if slices.EqualFunc(known.certs, certs, (*x509.Certificate).Equal) && slices.EqualFunc(known.roots, roots, (*x509.Certificate).Equal) {
			return known.chains
		}
	}
	return nil
}

// add remembers chains, in the place of the oldest.
func (v *verified) add(certs, roots []*x509.Certificate, chains [][]*x509.Certificate) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.last = slices.Insert(v.last, 0, verifiedChains{certs: certs, roots: slices.Clone(roots), chains: chains})
	v.last = slices.Delete(v.last, min(len(v.last), maxVerified), len(v.last))
}

// below leaves the roots out, which some peers show and some do not. The leaf
// stays first.
func below(certs, roots []*x509.Certificate) []*x509.Certificate {
	out := make([]*x509.Certificate, 0, len(certs))
	for n, c := range certs {
		if n == 0 || !slices.ContainsFunc(roots, c.Equal) {
			out = append(out, c)
		}
	}
	return out
}
