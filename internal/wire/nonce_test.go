package wire_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"sallyport/internal/wire"
)

func TestNonceHasOneSpelling(t *testing.T) {
	n := wire.NewNonce()
	if got, err := wire.ParseNonce(n.String()); err != nil || got != n || n.IsZero() || n == wire.NewNonce() {
		t.Fatalf("%v, %v", got, err)
	}
	for _, s := range []string{
		"", "AAAAAAAAAAAAAAAAAAAAAA", strings.Repeat("A", 21), strings.Repeat("A", 23) + "B", strings.Repeat("A", 1<<20),
		n.String()[:21] + "=", n.String()[:21] + "\n", n.String()[:20] + "+/", strings.Repeat("A", 21) + "B", // trailing bits
	} {
		if got, err := wire.ParseNonce(s); !errors.Is(err, wire.ErrNonce) {
			t.Errorf("ParseNonce(%.30q) = %v, %v", s, got, err)
		}
	}
}

func TestPreviousIsLeftOutWhereThereIsNone(t *testing.T) {
	b, err := json.Marshal(wire.Hello{Boot: "b"})
	if err != nil || strings.Contains(string(b), "previous") {
		t.Errorf("%s, %v", b, err)
	}
	h := wire.Hello{Boot: "b", Previous: wire.NewNonce()}
	if b, err = json.Marshal(h); err != nil {
		t.Fatal(err)
	}
	var back wire.Hello
	if err := json.Unmarshal(b, &back); err != nil || back.Previous != h.Previous {
		t.Errorf("%s becomes %v, %v", b, back.Previous, err)
	}
	if err := json.Unmarshal([]byte(`{"previous":"`+strings.Repeat("x", 1000)+`"}`), &back); !errors.Is(err, wire.ErrNonce) {
		t.Errorf("a previous nonce of 1000 characters: %v", err)
	}
}

func TestMarkedBoots(t *testing.T) {
	boot, a, b := string(wire.NewID()), wire.NewNonce(), wire.NewNonce()
	one, two := wire.MarkBoot(boot, a), wire.MarkBoot(boot, b)
	if one == two || one == boot || wire.MarkBoot(one, b) != two || wire.UnmarkBoot(one) != boot || wire.UnmarkBoot(boot) != boot || len(one) > 64 {
		t.Errorf("%s, %s, %s", boot, one, two)
	}
}

func FuzzParseNonce(f *testing.F) {
	f.Add(wire.NewNonce().String())
	f.Add("AAAAAAAAAAAAAAAAAAAAAA")
	f.Add("AAAAAAAAAAAAAAAAAAAA\n\n")
	f.Fuzz(func(t *testing.T, s string) {
		n, err := wire.ParseNonce(s)
		if err == nil && (n.String() != s || n.IsZero()) {
			t.Errorf("ParseNonce(%q) = %v", s, n)
		}
	})
}
