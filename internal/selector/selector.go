// Package selector parses and matches Kubernetes label selectors over tags:
//
//	role=web,env!=dev,tier in (a,b),zone notin (x),monitored,!legacy
//
// Requirements are joined by "and". As in Kubernetes, != and notin also hold
// where the key is absent. An empty selector is an error, because it is more
// often a mistake than a wish; "*" alone is everything.
package selector

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"sallyport/internal/wire"
)

// Limits of a selector.
const (
	maxLength       = 4096
	maxRequirements = 64
)

// ErrEmpty says that a selector is empty.
var ErrEmpty = errors.New("empty selector: name at least one tag, or write '*' for everything")

// operator of a requirement.
type operator int

const (
	in operator = iota // also = and ==
	notIn
	exists
	absent
)

type requirement struct {
	key    string
	op     operator
	values []string // sorted, each once
}

// Selector is a parsed selector. The zero value matches nothing.
type Selector struct {
	all  bool
	reqs []requirement
}

// Everything matches every set of tags.
var Everything = Selector{all: true}

// Matches reports whether tags fulfil every requirement.
func (s Selector) Matches(tags map[string]string) bool {
	if s.all {
		return true
	}
	for _, r := range s.reqs {
		value, ok := tags[r.key]
		switch r.op {
		case in:
			ok = ok && slices.Contains(r.values, value)
		case notIn:
			ok = !ok || !slices.Contains(r.values, value)
		case absent:
			ok = !ok
		}
		if !ok {
			return false
		}
	}
	return len(s.reqs) > 0
}

// String returns a form that Parse reads back as the same selector.
func (s Selector) String() string {
	if s.all {
		return "*"
	}
	parts := make([]string, len(s.reqs))
	for i, r := range s.reqs {
		switch {
		case r.op == exists:
			parts[i] = r.key
		case r.op == absent:
			parts[i] = "!" + r.key
		case r.op == in && len(r.values) == 1:
			parts[i] = r.key + "=" + r.values[0]
		case r.op == notIn && len(r.values) == 1:
			parts[i] = r.key + "!=" + r.values[0]
		case r.op == in:
			parts[i] = r.key + " in (" + strings.Join(r.values, ",") + ")"
		default:
			parts[i] = r.key + " notin (" + strings.Join(r.values, ",") + ")"
		}
	}
	return strings.Join(parts, ",")
}

// Parse reads a selector.
func Parse(text string) (Selector, error) {
	if len(text) > maxLength {
		return Selector{}, fmt.Errorf("selector is longer than %d characters", maxLength)
	}
	switch strings.TrimSpace(text) {
	case "":
		return Selector{}, ErrEmpty
	case "*":
		return Everything, nil
	}
	p := parser{rest: text}
	var s Selector
	for {
		r, err := p.requirement()
		if err != nil {
			return Selector{}, fmt.Errorf("selector %q: %w", wire.Quotable(text), err)
		}
		if s.reqs = append(s.reqs, r); len(s.reqs) > maxRequirements {
			return Selector{}, fmt.Errorf("selector has more than %d requirements", maxRequirements)
		}
		if p.done() {
			return s, nil
		}
		if !p.take(",") {
			return Selector{}, fmt.Errorf("selector %q: unexpected %q, want a comma", wire.Quotable(text), wire.Quotable(p.rest))
		}
	}
}

type parser struct{ rest string }

func (p *parser) space()     { p.rest = strings.TrimLeft(p.rest, " \t\r\n") }
func (p *parser) done() bool { p.space(); return p.rest == "" }

func (p *parser) take(token string) (ok bool) {
	p.space()
	p.rest, ok = strings.CutPrefix(p.rest, token)
	return ok
}

// word takes the characters that keys and values consist of; it may be empty.
func (p *parser) word() string {
	p.space()
	end := strings.IndexFunc(p.rest, func(r rune) bool { return !wordRune(r) })
	if end < 0 {
		end = len(p.rest)
	}
	w := p.rest[:end]
	p.rest = p.rest[end:]
	return w
}

func wordRune(r rune) bool {
	return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '.' || r == '_' || r == '-' || r == '/'
}

func (p *parser) key() (string, error) {
	k := p.word()
	if k == "" {
		return "", p.unexpected("a tag's key")
	}
	return k, nil
}

func (p *parser) unexpected(want string) error {
	if p.done() {
		return fmt.Errorf("it ends where %s is expected", want)
	}
	return fmt.Errorf("unexpected %q, want %s", wire.Quotable(p.rest), want)
}

func (p *parser) requirement() (r requirement, err error) {
	if p.take("!") {
		r.op = absent
		r.key, err = p.key()
		return r, err
	}
	if r.key, err = p.key(); err != nil {
		return r, err
	}
	switch {
	case p.take("!="):
		r.op, r.values = notIn, []string{p.word()}
	case p.take("=="), p.take("="):
		r.op, r.values = in, []string{p.word()}
	case p.done() || strings.HasPrefix(p.rest, ","):
		r.op = exists
	default:
		switch word := p.word(); word {
		case "in":
			r.op = in
		case "notin":
			r.op = notIn
		default:
			p.rest = word + p.rest
			return r, p.unexpected("=, !=, in, notin or a comma")
		}
		r.values, err = p.set()
	}
	return r, err
}

func (p *parser) set() (values []string, err error) {
	if !p.take("(") {
		return nil, p.unexpected("(")
	}
	for {
		v := p.word()
		if v == "" {
			return nil, p.unexpected("a value")
		}
		values = append(values, v)
		if p.take(")") {
			slices.Sort(values)
			return slices.Compact(values), nil
		}
		if !p.take(",") {
			return nil, p.unexpected("a comma or )")
		}
	}
}
