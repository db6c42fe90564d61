package gateway

import (
	"cmp"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/manifest"
	"sallyport/gateway/store"
	"sallyport/internal/attest"
	"sallyport/internal/wire"
)

// attested is what a device has proven for a party: that it holds the key of
// its certificate, in this session. Who issued that, each rule checks.
type attested struct {
	chain []*x509.Certificate // leaf first; nil: nothing was shown
	err   error               // why what was shown proves nothing
}

func newChallenge() ([]byte, error) {
	b := make([]byte, wire.ChallengeSize)
	_, err := rand.Read(b)
	return b, err
}

// attestation judges what came with a request, as the answer to a challenge.
func (e *enrolment) attestation(req *wire.EnrollRequest, key wire.KeyHash, challenge []byte) attested {
	if req.Attestation == nil {
		return attested{}
	}
	chain, err := attest.Open(*req.Attestation, wire.AttestationStatement{Challenge: challenge, Key: key, Role: req.Role, ID: req.ID, TrustDomain: e.id.TrustDomain()})
	if err != nil {
		return attested{err: err}
	}
	return attested{chain: chain}
}

// key is the fingerprint of the device's key; empty without one.
func (a attested) key() wire.KeyHash {
	if len(a.chain) == 0 {
		return ""
	}
	return wire.KeyOf(a.chain[0])
}

// stored is how a request keeps it, for those who look at it and for rules to
// come. It is not a proof any more: what a new rule lets in is asked again.
func (a attested) stored() []byte {
	if len(a.chain) == 0 {
		return nil
	}
	list := make([][]byte, len(a.chain))
	for i, c := range a.chain {
		list[i] = c.Raw
	}
	b, err := json.Marshal(list)
	if err != nil {
		return nil // a list of bytes
	}
	return b
}

func attestedBefore(r *store.Request) attested {
	if len(r.DeviceChain) == 0 {
		return attested{}
	}
	var list [][]byte
	if err := json.Unmarshal(r.DeviceChain, &list); err != nil {
		return attested{err: err}
	}
	chain, err := attest.ParseChain(list)
	return attested{chain: chain, err: err}
}

// deviceView is a request's device for people.
func deviceView(r *store.Request) *api.RequestDevice {
	a := attestedBefore(r)
	if len(a.chain) == 0 || a.err != nil {
		return nil
	}
	c := a.chain[0]
	return &api.RequestDevice{Subject: wire.Quotable(c.Subject.String()), Issuer: wire.Quotable(c.Issuer.String()), Serial: c.SerialNumber.Text(16),
		Fingerprint: wire.KeyOf(c).Fingerprint(), NotAfter: c.NotAfter.UTC()}
}

// vouching is the attestation part of a rule, ready to be asked.
type vouching struct {
	manifest.AttestationSpec
	anchors *attest.Anchors
}

func newVouching(spec *manifest.AttestationSpec) (*vouching, error) {
	if spec == nil {
		return nil, nil
	}
	if spec.Type != manifest.AttestationX509 {
		return nil, fmt.Errorf("attestation of type %q", wire.Quotable(spec.Type))
	}
	anchors, err := attest.ParseAnchors([]byte(spec.CA), []byte(spec.CRL), spec.Revoked)
	return &vouching{*spec, anchors}, err
}

// against tells why a device does not vouch for a party of that name; nothing:
// it does.
func (v *vouching) against(a attested, name string, now time.Time) string {
	switch {
	case a.err != nil:
		return a.err.Error()
	case len(a.chain) == 0:
		return "no device vouches for it (SALLYPORT_NODE_ATTESTATION_CERT)"
	}
	if err := v.anchors.Check(a.chain, now); err != nil {
		return err.Error()
	}
	leaf := a.chain[0]
	for attribute, glob := range v.Subject {
		if !subjectFits(leaf, attribute, glob) {
			return fmt.Sprintf("the device's subject %q has no %s that fits %q", wire.Quotable(leaf.Subject.String()), attribute, glob)
		}
	}
	names := namesOf(leaf)
	if len(v.SANs) > 0 && !slices.ContainsFunc(v.SANs, func(glob string) bool {
		return slices.ContainsFunc(names, func(n string) bool { ok, err := path.Match(glob, n); return ok && err == nil })
	}) {
		return "none of the device's names fits"
	}
	if v.Name != "" && !deviceCalled(leaf, v.Name, name) {
		return fmt.Sprintf("the name %q is not the one that the device certificate gives by its %s", wire.Quotable(name), v.Name)
	}
	return ""
}

// attributeOf returns the values of one attribute of a device's subject.
func attributeOf(leaf *x509.Certificate, attribute string) (values []string) {
	oid := manifest.SubjectAttributes[attribute]
	for _, n := range leaf.Subject.Names {
		if text, ok := n.Value.(string); ok && n.Type.String() == oid {
			values = append(values, text)
		}
	}
	return values
}

// subjectFits compares one attribute by itself: in a whole subject a comma
// inside a value would look like the next attribute. What names a device must
// be there once.
func subjectFits(leaf *x509.Certificate, attribute, glob string) bool {
	values := attributeOf(leaf, attribute)
	if (attribute == "CN" || attribute == "SERIALNUMBER") && len(values) != 1 {
		return false
	}
	return slices.ContainsFunc(values, func(text string) bool { ok, err := path.Match(glob, text); return ok && err == nil })
}

// namesOf are the subject alternative names that rules know.
func namesOf(leaf *x509.Certificate) (out []string) {
	for _, n := range leaf.DNSNames {
		out = append(out, "dns:"+strings.ToLower(n))
	}
	for _, n := range leaf.URIs {
		out = append(out, "uri:"+n.String())
	}
	for _, n := range leaf.IPAddresses {
		out = append(out, "ip:"+n.String())
	}
	for _, n := range leaf.EmailAddresses {
		out = append(out, "email:"+n)
	}
	return out
}

// deviceCalled tells whether a device certificate gives that name. A DNS name
// gives its first label too.
func deviceCalled(leaf *x509.Certificate, source, name string) bool {
	if source != "dns" {
		values := attributeOf(leaf, source)
		return len(values) == 1 && name != "" && strings.EqualFold(values[0], name)
	}
	return name != "" && slices.ContainsFunc(leaf.DNSNames, func(dns string) bool {
		label, _, _ := strings.Cut(dns, ".")
		return strings.EqualFold(dns, name) || strings.EqualFold(label, name)
	})
}

// proof says what a rule has seen proven, for people.
func (r *rule) proof(c *contender) string {
	var out []string
	if len(r.Joins) > 0 {
		out = append(out, "the token of join code "+c.join)
	}
	if len(r.Keys) > 0 {
		out = append(out, "the registered key "+c.key.Fingerprint())
	}
	if r.vouching != nil && len(c.device.chain) > 0 {
		leaf := c.device.chain[0]
		out = append(out, fmt.Sprintf("the device %q of %q", wire.Quotable(leaf.Subject.String()), wire.Quotable(cmp.Or(leaf.Issuer.CommonName, leaf.Issuer.String()))))
	}
	return strings.Join(out, ", ")
}

// deviceTaken tells which other node came in by the same device: one device is
// one node, or whoever owns one has as many as he likes. A node that gives way to
// this party leaves it its device.
func (d *decision) deviceTaken(n *store.Node, err error) (string, error) {
	if errors.Is(err, store.ErrNotFound) || err == nil && d.succeeds(n) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	what := "live"
	if n.State == wire.StateRevoked {
		what = "revoked"
	}
	return fmt.Sprintf("the device has let in the %s node %s (%s) already: remove that, or grant this request: sallyport request grant", what, n.Name, n.ID), nil
}
