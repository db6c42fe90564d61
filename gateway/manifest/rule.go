package manifest

import (
	"net/netip"
	"path"

	"gopkg.in/yaml.v3"

	"sallyport/internal/selector"
	"sallyport/internal/wire"
)

// KindRule is a rule by which certificate requests are granted.
const KindRule = "rule"

// Rule is one document of kind rule. Joins, Keys and Attestation are what a
// party has to prove, and one of them is there; everything else only narrows.
type Rule struct {
	Name string
	Spec RuleSpec
	Pos  Pos
}

// RuleSpec is what a rule says. Every list that is not empty must be met, by
// one of its members.
type RuleSpec struct {
	Joins []string          `json:"joins,omitempty"` // IDs of join codes whose token is shown
	Keys  []string          `json:"keys,omitempty"`  // fingerprints of keys that were registered before
	CIDRs []string          `json:"cidrs,omitempty"` // of the source, as its RCP reports it
	RCPs  []string          `json:"rcps,omitempty"`  // names of the RCPs by way of which it comes
	Names []string          `json:"names,omitempty"` // globs over the name
	IDs   []wire.ID         `json:"ids,omitempty"`   // UUIDs
	Tags  string            `json:"tags,omitempty"`  // selector over the request's tags
	Set   map[string]string `json:"set,omitempty"`   // tags that the node gets, as from a join code
	Allow []string          `json:"allow,omitempty"` // globs over the tags that it may set itself

	Attestation *AttestationSpec `json:"attestation,omitempty"` // what a device has to vouch with
}

// AttestationSpec says which devices vouch for a party.
type AttestationSpec struct {
	Type    string            `json:"type"`              // x509
	CA      string            `json:"ca"`                // PEM: who issues the certificates of the devices
	CRL     string            `json:"crl,omitempty"`     // PEM: if there is one, each issuer needs a current one
	Revoked []string          `json:"revoked,omitempty"` // serial numbers in hex
	Subject map[string]string `json:"subject,omitempty"` // globs by attribute, see SubjectAttributes; all must match
	SANs    []string          `json:"sans,omitempty"`    // globs over dns:, uri:, ip: and email: names; one must match
	Name    string            `json:"name,omitempty"`    // the node's name must be that of the device: CN, SERIALNUMBER or dns
}

// AttestationX509 is the type of attestation that there is.
const AttestationX509 = "x509"

// SubjectAttributes are the parts of a device's subject that a rule can name,
// and their object identifiers (X.520).
var SubjectAttributes = map[string]string{"CN": "2.5.4.3", "SERIALNUMBER": "2.5.4.5", "C": "2.5.4.6", "L": "2.5.4.7", "ST": "2.5.4.8", "O": "2.5.4.10", "OU": "2.5.4.11"}

// maxRuleList bounds each list of a rule.
const maxRuleList = 10_000

func (p *parser) rule(n *yaml.Node) {
	d := Rule{Pos: Pos{File: p.file, Line: n.Line}}
	s := &d.Spec
	each := func(v *yaml.Node, what string, check func(text string, line int)) (out []string) {
		items := p.list(v, what)
		if len(items) == 0 || len(items) > maxRuleList {
			p.failf(v.Line, "%s: want 1 to %d of them, or leave it out", what, maxRuleList)
		}
		for _, e := range items {
			text := p.text(e)
			check(text, e.Line)
			out = append(out, text)
		}
		return out
	}
	glob := func(what string) func(string, int) {
		return func(text string, line int) {
			if _, err := path.Match(text, ""); err != nil || text == "" {
				p.failf(line, "%s: %q is no glob", what, wire.Quotable(text))
			}
		}
	}
	p.mapping(n, "rule", map[string]func(*yaml.Node){
		"kind": func(*yaml.Node) {},
		"name": func(v *yaml.Node) { d.Name = p.name(v) },
		"joins": func(v *yaml.Node) {
			s.Joins = each(v, "joins", func(text string, line int) {
				if _, err := wire.ParseID(text); err != nil {
					p.failf(line, "joins: %q is not the ID of a join code, as `sallyport join list` shows it", wire.Quotable(text))
				}
			})
		},
		"keys": func(v *yaml.Node) {
			s.Keys = each(v, "keys", func(text string, line int) {
				if _, err := wire.ParseFingerprint(text); err != nil {
					p.failf(line, "keys: %q is not a fingerprint, as `sallyport local status` shows it (SHA256:...)", wire.Quotable(text))
				}
			})
		},
		"cidrs": func(v *yaml.Node) {
			s.CIDRs = each(v, "cidrs", func(text string, line int) {
				if _, err := netip.ParsePrefix(text); err != nil {
					p.failf(line, "cidrs: %q is not a network such as 10.1.0.0/16", wire.Quotable(text))
				}
			})
		},
		"rcps":  func(v *yaml.Node) { s.RCPs = each(v, "rcps", func(string, int) {}) },
		"names": func(v *yaml.Node) { s.Names = each(v, "names", glob("names")) },
		"ids": func(v *yaml.Node) {
			for _, text := range each(v, "ids", func(text string, line int) {
				if _, err := wire.ParseID(text); err != nil {
					p.failf(line, "ids: %q is not a UUID", wire.Quotable(text))
				}
			}) {
				s.IDs = append(s.IDs, wire.ID(text))
			}
		},
		"tags": func(v *yaml.Node) {
			sel, err := selector.Parse(p.text(v))
			if err != nil {
				p.failf(v.Line, "tags: %v", err)
				return
			}
			s.Tags = sel.String()
		},
		"set": func(v *yaml.Node) {
			s.Set = map[string]string{}
			if v.Kind != yaml.MappingNode {
				p.failf(v.Line, "set is a mapping of tags, not %s", kindName(v))
				return
			}
			for i := 0; i+1 < len(v.Content); i += 2 {
				key := p.text(v.Content[i])
				if _, had := s.Set[key]; had {
					p.failf(v.Content[i].Line, "tag %q stands twice in set", wire.Quotable(key))
				}
				s.Set[key] = p.text(v.Content[i+1])
			}
		},
		"allow":       func(v *yaml.Node) { s.Allow = each(v, "allow", glob("allow")) },
		"attestation": func(v *yaml.Node) { s.Attestation = p.attestation(v) },
	}, "name")
	if len(s.Joins) == 0 && len(s.Keys) == 0 && s.Attestation == nil {
		p.failf(n.Line, "rule %q proves nothing: name join codes (joins), registered keys (keys), an attestation, or several of them; addresses, names, tags and UUIDs are only what a party or an RCP says", d.Name)
	}
	p.claim(KindRule, d.Name, n.Line)
	p.set.Rules = append(p.set.Rules, d)
}
