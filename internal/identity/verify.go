package identity

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"sallyport/internal/wire"
)

// Peer is what a verified connection or document says of its other side.
type Peer struct {
	Party   wire.Party
	Name    string // of a node, from its certificate; empty for other roles
	Tenant  string // likewise
	Key     wire.KeyHash
	Issuer  wire.KeyHash // the intermediate that vouches for Key; empty while Pending
	Leaf    *x509.Certificate
	Pending bool // no certificate of ours: only Key is known
}

func (p Peer) String() string {
	if p.Pending {
		return "pending " + p.Key.Fingerprint()
	}
	if p.Name != "" {
		return p.Name + " (" + p.Party.String() + ")"
	}
	return p.Party.String()
}

// Verify is the check of every channel and session, for use in VerifyConnection
// on both ends: it also runs when a session is resumed, where the chains are
// those of the first handshake. crypto/tls must have verified the chain
// against [Identity.Roots]; Verify adds what it does not know: the chain goes
// through the SPIFFE intermediate of our trust domain, the leaf names one
// party, nothing in it is revoked, and all of it is still valid.
func (i *Identity) Verify(cs tls.ConnectionState) (Peer, error) {
	if len(cs.PeerCertificates) == 0 {
		return Peer{}, fmt.Errorf("%w: the peer sent no certificate", ErrUntrusted)
	}
	if len(cs.VerifiedChains) == 0 {
		return Peer{}, fmt.Errorf("%w: the peer's chain was not verified", ErrUntrusted)
	}
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.checkChains(cs.VerifiedChains, time.Now())
}

// WaitsItself is what is wrong with a peer that should vouch for us and that
// nobody vouches for: an RCP that was not granted yet, or whose leaf has ended.
const WaitsItself = "has no valid certificate itself: it shows one of its own making"

// VerifyPinned is the check while enrolling, when no root certificate is held
// yet: the peer's own certificates must lead to the pinned root, whose
// certificate is among them, and its role must be one of roles. The TLS
// configuration needs InsecureSkipVerify for this and for nothing else.
func (i *Identity) VerifyPinned(cs tls.ConnectionState, roles ...wire.Role) (Peer, error) {
	if len(cs.PeerCertificates) == 0 || len(cs.PeerCertificates) > maxChain {
		return Peer{}, fmt.Errorf("%w: the peer sent %d certificates", ErrUntrusted, len(cs.PeerCertificates))
	}
	if leaf := cs.PeerCertificates[0]; len(cs.PeerCertificates) == 1 && !leaf.IsCA && selfSigned(leaf) {
		return Peer{}, fmt.Errorf("%w: the peer %s", ErrUntrusted, WaitsItself)
	}
	i.mu.RLock()
	defer i.mu.RUnlock()
	roots, err := i.pinnedRoots(cs.PeerCertificates)
	if err != nil {
		return Peer{}, err
	}
	peer, err := i.verifyChain(cs.PeerCertificates, roots, time.Now())
	if err != nil {
		return peer, err
	}
	return peer, checkRole(peer, roles...)
}

// pinnedRoots returns the trusted roots and, from certs, the pinned one.
func (i *Identity) pinnedRoots(certs []*x509.Certificate) ([]*x509.Certificate, error) {
	if i.pin.Root == "" && len(i.roots) == 0 {
		return nil, ErrNotPinned
	}
	roots := slices.Clone(i.roots)
	for _, c := range certs {
		if wire.KeyOf(c) == i.pin.Root && !slices.ContainsFunc(roots, c.Equal) && i.verified.root(c) {
			roots = append(roots, c)
		}
	}
	if len(roots) == 0 {
		return nil, fmt.Errorf("%w: the peer's chain does not hold the root %s that the join code pins (is this the right gateway or RCP?)", ErrUntrusted, i.pin.Root.Fingerprint())
	}
	return roots, nil
}

// VerifyPending is the listener's check on the enrolment ALPNs. The peer shows
// one self-signed certificate, or an expired chain; either proves its key and
// nothing else. A revoked key is refused: its owner must make a new one.
func (i *Identity) VerifyPending(cs tls.ConnectionState) (Peer, error) {
	if len(cs.PeerCertificates) == 0 {
		return Peer{}, fmt.Errorf("%w: the peer sent no certificate", ErrUntrusted)
	}
	leaf := cs.PeerCertificates[0]
	if _, err := checkKey(leaf.PublicKey); err != nil {
		return Peer{}, fmt.Errorf("%w: %w", ErrUntrusted, err)
	}
	key := wire.KeyOf(leaf)
	if i.Revoked(key) {
		return Peer{}, fmt.Errorf("pending %s: %w", key.Fingerprint(), ErrRevoked)
	}
	return Peer{Key: key, Leaf: leaf, Pending: true}, nil
}

// verifyChain verifies certs (leaf first, any order behind it) up to one of
// roots at a time, and then everything that [Identity.Verify] asks for. mu is
// held.
func (i *Identity) verifyChain(certs, roots []*x509.Certificate, at time.Time) (Peer, error) {
	certs = below(certs, roots) // a root among them would be verified as both
	if known := i.verified.chains(certs, roots); known != nil {
		if peer, err := i.checkChains(known, at); err == nil {
			return peer, nil
		}
	}
	chains, err := buildChains(certs, roots, at)
	if err != nil {
		return Peer{}, err
	}
	i.verified.add(certs, roots, chains)
	return i.checkChains(chains, at)
}

// buildChains finds the ways from certs[0], by the others, to one of roots.
func buildChains(certs, roots []*x509.Certificate, at time.Time) ([][]*x509.Certificate, error) {
	opts := x509.VerifyOptions{
		Roots:         x509.NewCertPool(),
		Intermediates: x509.NewCertPool(),
		CurrentTime:   at,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	for _, r := range roots {
		opts.Roots.AddCert(r)
	}
	for _, c := range certs[1:] {
		opts.Intermediates.AddCert(c)
	}
	chains, err := certs[0].Verify(opts)
	if err != nil {
		if inv := (x509.CertificateInvalidError{}); errors.As(err, &inv) && inv.Reason == x509.Expired {
			return nil, fmt.Errorf("%w (check the clocks of both sides): %w", ErrExpired, err)
		}
		return nil, fmt.Errorf("%w: %w", ErrUntrusted, err)
	}
	return chains, nil
}

// checkChains returns what the first chain says that checkChain accepts; mu is
// held.
func (i *Identity) checkChains(chains [][]*x509.Certificate, at time.Time) (Peer, error) {
	var errs []error
	for _, chain := range chains {
		peer, err := i.checkChain(chain, at)
		if err == nil {
			return peer, nil
		}
		errs = append(errs, err)
	}
	return Peer{}, errors.Join(errs...)
}

// checkChain checks a chain whose signatures, usages and constraints are
// verified; mu is held.
func (i *Identity) checkChain(chain []*x509.Certificate, at time.Time) (Peer, error) {
	if len(chain) < 3 {
		return Peer{}, fmt.Errorf("%w: the leaf was not issued by the SPIFFE intermediate", ErrUntrusted)
	}
	leaf, inter, root := chain[0], chain[1], chain[len(chain)-1]
	party, err := partyOf(leaf)
	if err != nil {
		return Peer{}, fmt.Errorf("%w: %w", ErrUntrusted, err)
	}
	if td := i.trustDomain(); party.TrustDomain != td {
		return Peer{}, fmt.Errorf("%s: %w: it belongs to %s, we to %s", party, ErrWrongTrustDomain, wire.Quotable(party.TrustDomain), td)
	}
	if !isSPIFFECA(inter, party.TrustDomain) {
		return Peer{}, fmt.Errorf("%s: %w: its issuer %q is not the SPIFFE intermediate", party, ErrUntrusted, wire.Quotable(inter.Subject.CommonName))
	}
	if !i.trusts(wire.KeyOf(root)) {
		return Peer{}, fmt.Errorf("%s: %w: root %s is no longer trusted", party, ErrUntrusted, wire.KeyOf(root).Fingerprint())
	}
	for _, c := range chain {
		if at.Before(c.NotBefore) || at.After(c.NotAfter) {
			return Peer{}, fmt.Errorf("%s: %w: %q is valid from %s to %s", party, ErrExpired,
				wire.Quotable(c.Subject.CommonName), c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339))
		}
		if _, bad := i.revoked[wire.KeyOf(c)]; bad {
			return Peer{}, fmt.Errorf("%s: %w (%s)", party, ErrRevoked, wire.KeyOf(c).Fingerprint())
		}
	}
	peer := Peer{Party: party, Key: wire.KeyOf(leaf), Issuer: wire.KeyOf(inter), Leaf: leaf}
	peer.Name, peer.Tenant = nameOf(leaf, party)
	return peer, nil
}

func checkRole(peer Peer, roles ...wire.Role) error {
	if !slices.Contains(roles, peer.Party.Role) {
		return fmt.Errorf("%s: %w: want %v", peer.Party, ErrWrongRole, roles)
	}
	return nil
}

// partyOf reads the SPIFFE ID, the one URI SAN (X509-SVID, section 2), and
// insists on the DNS SAN that belongs to it.
func partyOf(leaf *x509.Certificate) (wire.Party, error) {
	if leaf.IsCA {
		return wire.Party{}, errors.New("a CA certificate is no party")
	}
	if len(leaf.URIs) != 1 {
		return wire.Party{}, fmt.Errorf("certificate has %d URI names, want one SPIFFE ID", len(leaf.URIs))
	}
	party, err := wire.ParsePartyURI(leaf.URIs[0])
	if err != nil {
		return wire.Party{}, err
	}
	if !slices.Contains(leaf.DNSNames, party.ServerName()) {
		return wire.Party{}, fmt.Errorf("certificate of %s lacks the name %s", party, party.ServerName())
	}
	return party, nil
}

// NodeName is the DNS SAN that carries a node's name.
func NodeName(name, tenant, trustDomain string) string {
	return strings.ToLower(name + "." + tenant + "." + string(wire.RoleNode) + "." + trustDomain)
}

// nameOf finds the name that stands beside the UUID: <name>.<tenant>.node.<td>.
func nameOf(leaf *x509.Certificate, party wire.Party) (name, tenant string) {
	suffix := "." + string(wire.RoleNode) + "." + party.TrustDomain
	for _, dns := range leaf.DNSNames {
		rest, ok := strings.CutSuffix(dns, suffix)
		if !ok || dns == party.ServerName() {
			continue
		}
		if n := strings.LastIndexByte(rest, '.'); n > 0 {
			return rest[:n], rest[n+1:]
		}
	}
	return "", ""
}

// isSPIFFECA tells whether c is the signing certificate of the trust domain:
// its only URI is spiffe://<trust-domain> (X509-SVID, section 3.1).
func isSPIFFECA(c *x509.Certificate, trustDomain string) bool {
	return c.IsCA && len(c.URIs) == 1 && c.URIs[0].String() == "spiffe://"+trustDomain
}
