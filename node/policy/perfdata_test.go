package policy

import (
	"math"
	"testing"
)

func TestParsePerfdata(t *testing.T) {
	values, bad := ParsePerfdata(`/=2643MB;5948;5958;0;5968 'it''s a'=U time=0.5s;;;0 load1=-1.5e3;10:20;~:5 broken c=12c x=;1`)
	if bad != 2 && len(values) != 5 {
		t.Fatalf("%d bad, %+v", bad, values)
	}
	if v := values[0]; v != (Perf{Label: "/", Value: 2643, Unit: "MB", Warn: "5948", Crit: "5958", Min: "0", Max: "5968"}) {
		t.Errorf("%+v", v)
	}
	if v := values[1]; v.Label != "it's a" || !math.IsNaN(v.Value) {
		t.Errorf("%+v", v)
	}
	if v := values[3]; v.Value != -1500 || v.Warn != "10:20" || v.Crit != "~:5" {
		t.Errorf("%+v", v)
	}
	for _, s := range []string{"", "   "} {
		if v, bad := ParsePerfdata(s); len(v) != 0 || bad != 0 {
			t.Errorf("%q: %v, %d", s, v, bad)
		}
	}
}

func FuzzParsePerfdata(f *testing.F) {
	f.Add(`/=2643MB;5948;5958;0;5968 'a b'=U`)
	f.Add(`'it''s'=1e5%;@1:2;;;`)
	f.Add(`=1 a= '=`)
	f.Fuzz(func(t *testing.T, s string) {
		values, _ := ParsePerfdata(s)
		if len(values) > maxPerf {
			t.Fatalf("%d values", len(values))
		}
		for _, v := range values {
			again, bad := ParsePerfdata(v.String())
			if bad != 0 || len(again) != 1 {
				t.Fatalf("%q became %q: %d bad, %+v", s, v.String(), bad, again)
			}
			a := again[0]
			if math.IsNaN(v.Value) && math.IsNaN(a.Value) {
				a.Value, v.Value = 0, 0
			}
			if a != v {
				t.Errorf("%+v became %+v", v, a)
			}
		}
	})
}
