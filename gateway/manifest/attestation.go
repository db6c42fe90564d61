package manifest

import (
	"maps"
	"path"
	"slices"
	"strings"

	"gopkg.in/yaml.v3"

	"sallyport/internal/attest"
	"sallyport/internal/wire"
)

// NameSources are what `name` of an attestation may say.
var NameSources = []string{"CN", "SERIALNUMBER", "dns"}

// sanKinds begin the names that `sans` are compared with.
var sanKinds = []string{"dns:", "uri:", "ip:", "email:"}

// attestation reads which devices vouch for a party.
func (p *parser) attestation(n *yaml.Node) *AttestationSpec {
	a := new(AttestationSpec)
	glob := func(line int, what, text string) {
		if _, err := path.Match(text, ""); err != nil || text == "" {
			p.failf(line, "%s: %q is no glob", what, wire.Quotable(text))
		}
	}
	p.mapping(n, "attestation", map[string]func(*yaml.Node){
		"type": func(v *yaml.Node) {
			if a.Type = p.text(v); a.Type != AttestationX509 {
				p.failf(v.Line, "attestation: type %q: want %s", wire.Quotable(a.Type), AttestationX509)
			}
		},
		"ca":      func(v *yaml.Node) { a.CA = p.text(v) },
		"crl":     func(v *yaml.Node) { a.CRL = p.text(v) },
		"revoked": func(v *yaml.Node) { a.Revoked = p.texts(v, "revoked") },
		"subject": func(v *yaml.Node) { a.Subject = p.subject(v, glob) },
		"sans": func(v *yaml.Node) {
			for _, e := range p.list(v, "sans") {
				text := p.text(e)
				if glob(e.Line, "sans", text); !slices.ContainsFunc(sanKinds, func(kind string) bool { return strings.HasPrefix(text, kind) }) {
					p.failf(e.Line, "sans: %q: say which kind of name: %s", wire.Quotable(text), strings.Join(sanKinds, ", "))
				}
				a.SANs = append(a.SANs, text)
			}
		},
		"name": func(v *yaml.Node) {
			if a.Name = p.text(v); !slices.Contains(NameSources, a.Name) {
				p.failf(v.Line, "attestation: name %q: want one of %s", wire.Quotable(a.Name), strings.Join(NameSources, ", "))
			}
		},
	}, "type", "ca")
	if _, err := attest.ParseAnchors([]byte(a.CA), []byte(a.CRL), a.Revoked); err != nil && a.CA != "" {
		p.failf(n.Line, "attestation: %v", err)
	}
	return a
}

func (p *parser) subject(n *yaml.Node, glob func(line int, what, text string)) map[string]string {
	if n.Kind != yaml.MappingNode || len(n.Content) == 0 {
		p.failf(n.Line, "attestation: subject is a mapping of attributes to globs")
		return nil
	}
	out := map[string]string{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, text := p.text(n.Content[i]), p.text(n.Content[i+1])
		if SubjectAttributes[key] == "" {
			p.failf(n.Content[i].Line, "attestation: subject: %q: want one of %s", wire.Quotable(key), strings.Join(slices.Sorted(maps.Keys(SubjectAttributes)), ", "))
		}
		if _, twice := out[key]; twice {
			p.failf(n.Content[i].Line, "attestation: subject: %s stands there twice", key)
		}
		glob(n.Content[i+1].Line, "subject", text)
		out[key] = text
	}
	return out
}
