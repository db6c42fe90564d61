// Package manifest reads the YAML documents in which operators write policies,
// deployments and rules, several to a file. It is strict: a key that it does not
// know, a key that stands twice and a value of the wrong kind are refused,
// every one with file and line, because a misspelt key that is ignored is a
// setting that silently does not hold.
package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"

	"gopkg.in/yaml.v3"

	"sallyport/internal/selector"
	"sallyport/internal/wire"
)

// Kinds of documents.
const (
	KindPolicy     = "policy"
	KindDeployment = "deployment"
)

// Limits of one file.
const (
	maxText      = 8 << 20
	maxDocuments = 10_000
	maxErrors    = 50
)

// Policy is one document of kind policy. Spec is JSON in one fixed form, so
// that the same policy has the same digest however it was written.
type Policy struct {
	Name string
	Type string
	Spec json.RawMessage
	Pos  Pos
}

// Deployment is one document of kind deployment.
type Deployment struct {
	Name     string
	Selector string // in the form of selector.Selector.String
	Policies []string
	Min, Max int // nodes; Max 0: no limit
	Rollout  *Rollout
	Pos      Pos
}

// Rollout says how a change spreads over the nodes of a deployment.
type Rollout struct {
	MaxParallel string `json:"max_parallel,omitempty"` // a number of nodes, or a percentage
	MaxFailures int    `json:"max_failures"`
}

// Set is what stands in one or several files, in that order.
type Set struct {
	Policies    []Policy
	Deployments []Deployment
	Rules       []Rule
}

// Pos is a place in a file.
type Pos struct {
	File string
	Line int
}

func (p Pos) String() string { return p.File + ":" + strconv.Itoa(p.Line) }

// Error is one fault.
type Error struct {
	Pos     Pos
	Message string
}

func (e *Error) Error() string { return e.Pos.String() + ": " + e.Message }

// Errors are all faults of a file, in the order of its lines.
type Errors []*Error

func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, f := range e {
		lines[i] = f.Error()
	}
	return strings.Join(lines, "\n")
}

// Parse adds the documents of one file to the set. Its error, if any, is of
// type [Errors], and then nothing was added.
func (s *Set) Parse(file string, text []byte) error {
	p := &parser{file: file, seen: map[string]Pos{}}
	for _, d := range s.Policies {
		p.seen[KindPolicy+" "+d.Name] = d.Pos
	}
	for _, d := range s.Deployments {
		p.seen[KindDeployment+" "+d.Name] = d.Pos
	}
	for _, d := range s.Rules {
		p.seen[KindRule+" "+d.Name] = d.Pos
	}
	p.parse(text)
	if len(p.errs) > 0 {
		return p.errs
	}
	s.Policies = append(s.Policies, p.set.Policies...)
	s.Deployments = append(s.Deployments, p.set.Deployments...)
	s.Rules = append(s.Rules, p.set.Rules...)
	return nil
}

type parser struct {
	file string
	set  Set
	errs Errors
	seen map[string]Pos
}

func (p *parser) failf(line int, format string, args ...any) {
	if len(p.errs) < maxErrors {
		p.errs = append(p.errs, &Error{Pos: Pos{File: p.file, Line: max(line, 1)}, Message: fmt.Sprintf(format, args...)})
	}
}

// yamlLine finds the line in the text of a syntax error, which has no type.
var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)$`)

func (p *parser) parse(text []byte) {
	if len(text) > maxText {
		p.failf(1, "file of %d bytes is above the limit of %d", len(text), maxText)
		return
	}
	dec := yaml.NewDecoder(bytes.NewReader(text))
	for n := 0; ; n++ {
		var doc yaml.Node
		err := dec.Decode(&doc)
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			line, message := 1, err.Error()
			if m := yamlLine.FindStringSubmatch(message); m != nil {
				line, _ = strconv.Atoi(m[1]) // empty where YAML names no line: failf makes it 1
				message = m[2]
			}
			p.failf(line, "not YAML: %s", message)
			return
		}
		if n == maxDocuments {
			p.failf(doc.Line, "more than %d documents", maxDocuments)
			return
		}
		if len(doc.Content) == 1 && !isNull(doc.Content[0]) { // an empty document is fine: a file may begin with ---
			p.document(doc.Content[0])
		}
	}
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!null" }

func (p *parser) document(n *yaml.Node) {
	if n.Kind != yaml.MappingNode {
		p.failf(n.Line, "a document is a mapping with kind, name and so on, not %s", kindName(n))
		return
	}
	kind, line := "", n.Line
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == "kind" {
			kind, line = n.Content[i+1].Value, n.Content[i+1].Line
		}
	}
	switch kind {
	case KindPolicy:
		p.policy(n)
	case KindDeployment:
		p.deployment(n)
	case KindRule:
		p.rule(n)
	case "":
		p.failf(line, "document has no kind (want policy, deployment or rule)")
	default:
		p.failf(line, "unknown kind %q (want policy, deployment or rule)", wire.Quotable(kind))
	}
}

// claim notes a document's name, and refuses the second of one name.
func (p *parser) claim(kind, name string, line int) {
	pos := Pos{File: p.file, Line: line}
	if old, ok := p.seen[kind+" "+name]; ok && name != "" {
		p.failf(line, "%s %q stands at %s already", kind, name, old)
		return
	}
	p.seen[kind+" "+name] = pos
}

func (p *parser) policy(n *yaml.Node) {
	d := Policy{Pos: Pos{File: p.file, Line: n.Line}}
	var typ, spec *yaml.Node
	p.mapping(n, "policy", map[string]func(*yaml.Node){
		"kind": func(*yaml.Node) {},
		"name": func(v *yaml.Node) { d.Name = p.name(v) },
		"type": func(v *yaml.Node) { d.Type, typ = p.text(v), v },
		"spec": func(v *yaml.Node) { spec = v },
	}, "name", "type", "spec")
	p.claim(KindPolicy, d.Name, n.Line)
	if typ == nil {
		return
	}
	switch d.Type {
	case wire.PolicyCheck:
		d.Spec = p.check(spec)
	case wire.PolicyFiles:
		d.Spec = p.files(spec)
	case wire.PolicyTarget:
		d.Spec = p.target(spec)
		if wire.IsBuiltinTarget(d.Name) {
			p.failf(n.Line, "every node has a target %q of its own; choose another name", d.Name)
		}
	case "logfile", "metric", "schedule", "action", "discovery":
		p.failf(typ.Line, "policy type %q is not supported yet (supported are check, files and target)", d.Type)
	default:
		p.failf(typ.Line, "unknown policy type %q", wire.Quotable(d.Type))
	}
	p.set.Policies = append(p.set.Policies, d)
}

func (p *parser) deployment(n *yaml.Node) {
	d := Deployment{Pos: Pos{File: p.file, Line: n.Line}}
	maxLine := n.Line
	p.mapping(n, "deployment", map[string]func(*yaml.Node){
		"kind": func(*yaml.Node) {},
		"name": func(v *yaml.Node) { d.Name = p.name(v) },
		"selector": func(v *yaml.Node) {
			if sel, err := selector.Parse(p.text(v)); err != nil {
				p.failf(v.Line, "%v", err)
			} else {
				d.Selector = sel.String()
			}
		},
		"policies": func(v *yaml.Node) {
			for _, e := range p.list(v, "policies") {
				name := p.name(e)
				for _, other := range d.Policies {
					if other == name {
						p.failf(e.Line, "policy %q stands there twice", name)
					}
				}
				d.Policies = append(d.Policies, name)
			}
		},
		"min":     func(v *yaml.Node) { d.Min = p.count(v) },
		"max":     func(v *yaml.Node) { d.Max, maxLine = p.count(v), v.Line },
		"rollout": func(v *yaml.Node) { d.Rollout = p.rollout(v) },
	}, "name", "selector", "policies")
	if d.Max > 0 && d.Max < d.Min {
		p.failf(maxLine, "max %d is below min %d", d.Max, d.Min)
	}
	p.claim(KindDeployment, d.Name, n.Line)
	p.set.Deployments = append(p.set.Deployments, d)
}

var share = regexp.MustCompile(`^([1-9][0-9]{0,6}|([1-9][0-9]?|100)%)$`)

func (p *parser) rollout(n *yaml.Node) *Rollout {
	r := new(Rollout)
	p.mapping(n, "rollout", map[string]func(*yaml.Node){
		"max_parallel": func(v *yaml.Node) {
			if r.MaxParallel = p.text(v); !share.MatchString(r.MaxParallel) {
				p.failf(v.Line, "max_parallel: %q is neither a number of nodes nor a percentage", wire.Quotable(r.MaxParallel))
			}
		},
		"max_failures": func(v *yaml.Node) { r.MaxFailures = p.count(v) },
	})
	return r
}
