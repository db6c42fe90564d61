package wire

import (
	"strings"
	"testing"
)

func TestValidName(t *testing.T) {
	for name, want := range map[string]bool{
		"web": true, "web-1": true, "db_2.example.org": true, "A": true, "7": true,
		strings.Repeat("x", MaxName): true, strings.Repeat("x", MaxName+1): false,
		"": false, "-x": false, "_x": false, ".x": false, "x.": false, "a..b": false, "a b": false, "a/b": false, "a\nb": false, "ä": false, "a*": false, "a:b": false,
	} {
		if got := ValidName(name); got != want {
			t.Errorf("ValidName(%q) = %v, want %v", name, got, want)
		}
	}
}
