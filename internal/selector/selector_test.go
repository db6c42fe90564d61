package selector

import (
	"errors"
	"strings"
	"testing"
)

func TestMatches(t *testing.T) {
	web := map[string]string{"role": "web", "env": "prod", "tier": "a", "in": "x", "empty": ""}
	for text, want := range map[string]bool{
		"*":                 true,
		" * ":               true,
		"role":              true,
		"!role":             false,
		"!legacy":           true,
		"! legacy":          true,
		"legacy":            false,
		"role=web":          true,
		"role==web":         true,
		" role = web ":      true,
		"role=db":           false,
		"role!=db":          true,
		"role!=web":         false,
		"zone!=x":           true,
		"zone=":             false,
		"empty=":            true,
		"empty":             true,
		"tier in (a,b)":     true,
		"tier in ( b , c )": false,
		"tier in(a)":        true,
		"tier notin (b,c)":  true,
		"tier notin (a)":    false,
		"zone notin (a)":    true,
		"in in (x)":         true,
		"in":                true,
		"role=web,env!=dev,tier in (a,b),!legacy": true,
		"role=web,env=dev":                        false,
	} {
		s, err := Parse(text)
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if got := s.Matches(web); got != want {
			t.Errorf("%q: %v; want %v", text, got, want)
		}
	}
	if (Selector{}).Matches(web) {
		t.Error("the zero selector matches")
	}
}

func TestParseRefuses(t *testing.T) {
	for text, want := range map[string]string{
		",": "want a tag's key", "role=web,": "ends where a tag's key", "=web": "want a tag's key", "role web": "want =, !=, in, notin",
		"role in": "ends where (", "role in ()": "want a value", "role in (a": "a comma or )", "role in (a,)": "want a value", "role in a": "want (",
		"!": "ends where", "role=web env=x": "want a comma", "role=a b": "want a comma", "!a=b": "want a comma", "rôle=a": "unexpected", "*,a": "unexpected",
		"a=*": "want a comma", strings.Repeat("a,", 3000): "longer", strings.Repeat("a,", 100) + "a": "more than 64",
	} {
		if _, err := Parse(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: %v; want %q", text, err, want)
		}
	}
	for _, text := range []string{"", "  ", "\n"} {
		if _, err := Parse(text); !errors.Is(err, ErrEmpty) {
			t.Errorf("%q: %v; want ErrEmpty", text, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"*", "role=web,env!=dev,tier in (a,b),!legacy", "a notin (b,b,c)", "a=", "in in (in)", "a , b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := Parse(text)
		if err != nil {
			return
		}
		again, err := Parse(s.String())
		if err != nil || again.String() != s.String() {
			t.Fatalf("%q → %q → %q, %v", text, s, again, err)
		}
		for _, tags := range []map[string]string{nil, {"a": "b"}, {"role": "web"}} {
			if s.Matches(tags) != again.Matches(tags) {
				t.Fatalf("%q and %q differ on %v", text, again, tags)
			}
		}
	})
}

func BenchmarkMatches(b *testing.B) {
	s, err := Parse("role=web,env!=dev,tier in (a,b),!legacy")
	if err != nil {
		b.Fatal(err)
	}
	tags := map[string]string{"role": "web", "env": "prod", "tier": "a"}
	for b.Loop() {
		if !s.Matches(tags) {
			b.Fatal("no match")
		}
	}
}
