package manifest

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"gopkg.in/yaml.v3"

	"sallyport/internal/wire"
)

// lines remembers where the keys of a spec stand, by the names that
// wire.SpecError uses.
type lines map[string]int

// spec validates and encodes a spec; check is its own validation.
func (p *parser) spec(n *yaml.Node, where lines, spec any, check func() error) json.RawMessage {
	if len(p.errs) > 0 {
		return nil
	}
	if err := check(); err != nil {
		line := n.Line
		if se, ok := errors.AsType[*wire.SpecError](err); ok {
			for field := se.Field; field != ""; field = field[:max(strings.LastIndexAny(field, ".["), 0)] {
				if l, ok := where[field]; ok {
					line = l
					break
				}
			}
		}
		p.failf(line, "spec.%v", err)
		return nil
	}
	b, err := json.Marshal(spec)
	if err != nil {
		p.failf(n.Line, "spec: %v", err)
	}
	return b
}

func (p *parser) check(n *yaml.Node) json.RawMessage {
	if n == nil {
		return nil
	}
	var s wire.CheckSpec
	where := lines{}
	p.mapping(n, "check spec", map[string]func(*yaml.Node){
		"command":  func(v *yaml.Node) { s.Command, where["command"] = p.texts(v, "command"), v.Line },
		"interval": func(v *yaml.Node) { s.Interval, where["interval"] = p.duration(v, "interval"), v.Line },
		"timeout":  func(v *yaml.Node) { s.Timeout, where["timeout"] = p.duration(v, "timeout"), v.Line },
	}, "command")
	return p.spec(n, where, s, s.Validate)
}

func (p *parser) files(n *yaml.Node) json.RawMessage {
	if n == nil {
		return nil
	}
	var s wire.FilesSpec
	where := lines{}
	p.mapping(n, "files spec", map[string]func(*yaml.Node){
		"files": func(v *yaml.Node) {
			where["files"] = v.Line
			for i, e := range p.list(v, "files") {
				s.Files = append(s.Files, p.file1(e, fmt.Sprintf("files[%d]", i), where))
			}
		},
		"validate": func(v *yaml.Node) { s.Validate, where["validate"] = p.texts(v, "validate"), v.Line },
		"reload":   func(v *yaml.Node) { s.Reload, where["reload"] = p.texts(v, "reload"), v.Line },
	}, "files")
	return p.spec(n, where, s, s.Check)
}

func (p *parser) file1(n *yaml.Node, field string, where lines) (f wire.FileSpec) {
	where[field] = n.Line
	p.mapping(n, "file", map[string]func(*yaml.Node){
		"path":    func(v *yaml.Node) { f.Path, where[field+".path"] = p.text(v), v.Line },
		"content": func(v *yaml.Node) { f.Content = p.text(v) },
		"mode":    func(v *yaml.Node) { f.Mode, where[field+".mode"] = p.text(v), v.Line },
	}, "path", "content")
	if perm, err := f.Perm(); err == nil {
		f.Mode = fmt.Sprintf("%04o", perm) // 644, 0644 and 0o644 are one mode
	}
	return f
}

func (p *parser) target(n *yaml.Node) json.RawMessage {
	if n == nil {
		return nil
	}
	var s wire.TargetSpec
	where := lines{"address": n.Line}
	p.mapping(n, "target spec", map[string]func(*yaml.Node){
		"address": func(v *yaml.Node) { s.Address, where["address"] = p.text(v), v.Line },
		"url":     func(v *yaml.Node) { s.URL, where["url"] = p.text(v), v.Line },
		"timeout": func(v *yaml.Node) { s.Timeout, where["timeout"] = p.duration(v, "timeout"), v.Line },
	})
	return p.spec(n, where, s, s.Validate)
}

// mapping hands each value to the function of its key.
func (p *parser) mapping(n *yaml.Node, what string, keys map[string]func(*yaml.Node), required ...string) {
	if n = resolve(n); n.Kind != yaml.MappingNode {
		p.failf(n.Line, "%s: want a mapping, not %s", what, kindName(n))
		return
	}
	had := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		f, ok := keys[key.Value]
		switch {
		case key.Kind != yaml.ScalarNode || !ok:
			p.failf(key.Line, "unknown key %q in %s", wire.Quotable(key.Value), what)
		case had[key.Value]:
			p.failf(key.Line, "key %q stands twice in %s", key.Value, what)
		default:
			had[key.Value] = true
			f(resolve(value))
		}
	}
	for _, key := range required {
		if !had[key] {
			p.failf(n.Line, "%s has no %s", what, key)
		}
	}
}

// resolve follows an alias to its anchor. Nothing here nests deeply enough for
// aliases to multiply.
func resolve(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode && n.Alias != nil {
		return n.Alias
	}
	return n
}

func (p *parser) list(n *yaml.Node, what string) []*yaml.Node {
	if n.Kind != yaml.SequenceNode {
		p.failf(n.Line, "%s: want a list, not %s", what, kindName(n))
		return nil
	}
	out := make([]*yaml.Node, len(n.Content))
	for i, e := range n.Content {
		out[i] = resolve(e)
	}
	return out
}

// text takes numbers and truth values as they are written: nobody quotes the
// 10 of a command line, and 0644 is a mode.
func (p *parser) text(n *yaml.Node) string {
	if n.Kind != yaml.ScalarNode || n.Tag == "!!null" || n.Tag == "!!binary" {
		p.failf(n.Line, "want text, not %s", kindName(n))
		return ""
	}
	return n.Value
}

func (p *parser) texts(n *yaml.Node, what string) []string {
	nodes := p.list(n, what)
	out := make([]string, len(nodes))
	for i, e := range nodes {
		out[i] = p.text(e)
	}
	return out
}

// nameText keeps names usable in URLs, files and on command lines.
var nameText = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

func (p *parser) name(n *yaml.Node) string {
	s := p.text(n)
	if s != "" && !nameText.MatchString(s) {
		p.failf(n.Line, "name %q: want letters, digits and . _ -, beginning with a letter or digit, at most 128", wire.Quotable(s))
	} else if s == "" {
		p.failf(n.Line, "name is empty")
	}
	return s
}

func (p *parser) count(n *yaml.Node) int {
	v, err := strconv.ParseInt(p.text(n), 10, 32)
	if err != nil || v < 0 {
		p.failf(n.Line, "%q is not a whole number from 0 on", wire.Quotable(n.Value))
	}
	return int(v)
}

func (p *parser) duration(n *yaml.Node, what string) wire.Duration {
	d, err := wire.ParseDuration(p.text(n))
	if err != nil {
		p.failf(n.Line, "%s: %v", what, err)
	}
	return d
}

func kindName(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.MappingNode:
		return "a mapping"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case isNull(n):
		return "nothing"
	case n.Kind == yaml.AliasNode:
		return "an alias"
	}
	return "a single value"
}
