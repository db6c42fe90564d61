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

func TestPartyNamesAreNoUUIDs(t *testing.T) {
	for name, want := range map[string]bool{
		"web-1": true, "3f2a9c1b7d4e": true, "deadbee": true, "DEADBEEF": true, "deadbeeg": true, "deadbeef.example": true, "20261121-web": true,
		"deadbeef": false, "20261121": false, "20261121-a": false, "deadbeef-1": false, "7f0ad3a8-8f5c-4f0e-9a51-0d1f6f3f2b11": false, "": false, "a b": false,
	} {
		if got := ValidPartyName(name); got != want {
			t.Errorf("%q: %v, want %v", name, got, want)
		}
	}
}
