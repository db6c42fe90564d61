package wire_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"math"
	"net/url"
	"strings"
	"testing"
	"time"

	"sallyport/internal/wire"
)

// One key has one fingerprint: they are compared as text too.
func TestFingerprintHasOneForm(t *testing.T) {
	k := wire.HashSPKI([]byte("x"))
	text := k.Fingerprint()
	if got, err := wire.ParseFingerprint(text); err != nil || got != k {
		t.Fatalf("ParseFingerprint(%q) = %q, %v", text, got, err)
	}
	const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
	last := len(text) - len("=") - 1
	other := text[:last] + letters[strings.IndexByte(letters, text[last])+1:][:1] + "=" // the same 256 bits
	for _, s := range []string{other, text + "\n", text[:20] + "\r\n" + text[20:], strings.TrimSuffix(text, "="), strings.TrimPrefix(text, "SHA256:"), ""} {
		if got, err := wire.ParseFingerprint(s); err == nil {
			t.Errorf("ParseFingerprint(%q) = %q", s, got)
		}
	}
}

func TestPartyURIRoundTrip(t *testing.T) {
	p := wire.Party{Role: wire.RoleNode, ID: wire.NewID(), TrustDomain: "0011223344556677.sallyport"}
	got, err := wire.ParsePartyURI(p.URI())
	if err != nil || got != p {
		t.Fatalf("ParsePartyURI(%v) = %v, %v", p.URI(), got, err)
	}
	if want := string(p.ID) + ".node.0011223344556677.sallyport"; p.ServerName() != want {
		t.Errorf("ServerName() = %q, want %q", p.ServerName(), want)
	}
}

// A SPIFFE ID has one spelling: whatever else leads to the same party could
// get round a comparison of names.
func TestParsePartyURIRefusesOtherSpellings(t *testing.T) {
	const id = "0f0e0d0c-0b0a-4908-8706-050403020100"
	for _, s := range []string{
		"https://td/node/" + id,
		"spiffe://td:443/node/" + id + "/",
		"spiffe://td/node/" + id + "/",
		"spiffe://td/node/" + id + "/x",
		"spiffe://td//node/" + id,
		"spiffe://user@td/node/" + id,
		"spiffe://td/node/" + id + "?q=1",
		"spiffe://td/node/" + id + "#f",
		"spiffe://td/NODE/" + id,
		"spiffe://td/root/" + id,
		"spiffe://td/node/" + strings.ToUpper(id),
		"spiffe:///node/" + id,
		"spiffe://td/node/not-a-uuid",
	} {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		if p, err := wire.ParsePartyURI(u); err == nil {
			t.Errorf("ParsePartyURI(%q) = %v, want an error", s, p)
		}
	}
}

func TestRevisionsOrderByGenerationFirst(t *testing.T) {
	rising := []wire.Revision{{}, {Generation: 1, N: 1}, {Generation: 1, N: 10}, {Generation: 2, N: 1}}
	for i := range rising[:len(rising)-1] {
		if rising[i].Compare(rising[i+1]) >= 0 || rising[i+1].Compare(rising[i]) <= 0 {
			t.Errorf("%v is not below %v", rising[i], rising[i+1])
		}
	}
}

func TestVersionRangeCommon(t *testing.T) {
	own := wire.VersionRange{Min: 2, Max: 4}
	for _, c := range []struct {
		other wire.VersionRange
		want  int
		ok    bool
	}{
		{wire.VersionRange{Min: 1, Max: 3}, 3, true},
		{wire.VersionRange{Min: 4, Max: 9}, 4, true},
		{wire.VersionRange{Min: 5, Max: 9}, 4, false},
		{wire.VersionRange{Min: 1, Max: 1}, 1, false},
		{wire.VersionRange{}, 0, false},
	} {
		if got, ok := own.Common(c.other); ok != c.ok || ok && got != c.want {
			t.Errorf("%v.Common(%v) = %d, %v, want %d, %v", own, c.other, got, ok, c.want, c.ok)
		}
	}
}

// The digest tells the gateway that something changed, and must not change for
// what changes all the time.
func TestHelloDigestIgnoresWhatAlwaysMoves(t *testing.T) {
	h := wire.Hello{Boot: "b", Salt: "s", State: wire.StateRunning, Outbox: wire.OutboxState{Spool: "x"}}
	moved := h
	moved.Time = time.Now()
	moved.Outbox.Next = 7
	moved.Outbox.Depth = 3
	moved.Upstreams = []wire.UpstreamStatus{{Address: "a", RTT: 0.1}}
	moved.Previous = wire.NewNonce()
	if h.Digest() != moved.Digest() {
		t.Error("digest changed with the clock, the depth of the outbox or a round trip")
	}
	for name, change := range map[string]func(*wire.Hello){
		"salt":    func(h *wire.Hello) { h.Salt = "t" },
		"applied": func(h *wire.Hello) { h.Applied.N++ },
		"state":   func(h *wire.Hello) { h.State = wire.StateLocked },
		"dropped": func(h *wire.Hello) { h.Outbox.Dropped++ },
	} {
		c := h
		change(&c)
		if c.Digest() == h.Digest() {
			t.Errorf("digest did not change with %s", name)
		}
	}
}

func TestDecodeJSONKeepsItsLimit(t *testing.T) {
	var v []int
	if err := wire.DecodeJSON(strings.NewReader("[1,2,3]"), 7, &v); err != nil || len(v) != 3 {
		t.Errorf("at the limit: %v, %v", v, err)
	}
	if err := wire.DecodeJSON(strings.NewReader("[1,2,34]"), 7, &v); !errors.Is(err, wire.ErrTooLarge) {
		t.Errorf("above the limit: %v, want ErrTooLarge", err)
	}
	if err := wire.DecodeJSON(strings.NewReader("[1] [2]"), 99, &v); err == nil {
		t.Error("trailing data was accepted")
	}
}

func TestLineReader(t *testing.T) {
	long := strings.Repeat("x", 6<<10) // above the 4 KiB that an idle stream buffers
	in := `"a"` + "\n" + `"` + long + `"` + "\n" + `"b"` + "\n"
	r := wire.NewLineReader(strings.NewReader(in), 8<<10)
	for _, want := range []string{"a", long, "b"} {
		var got string
		if err := r.Next(&got); err != nil || got != want {
			t.Fatalf("Next = %.10q (%d bytes), %v", got, len(got), err)
		}
	}
	var s string
	if err := r.Next(&s); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v, want io.EOF", err)
	}
	if err := wire.NewLineReader(strings.NewReader(`"cut`), 99).Next(&s); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("cut line: %v, want io.ErrUnexpectedEOF", err)
	}
	endless := io.MultiReader(strings.NewReader(`"`), endlessReader{})
	if err := wire.NewLineReader(endless, 8<<10).Next(&s); !errors.Is(err, wire.ErrTooLarge) {
		t.Errorf("endless line: %v, want ErrTooLarge", err)
	}
}

type endlessReader struct{}

func (endlessReader) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'x'
	}
	return len(p), nil
}

func TestJoinCodeErrorsNeverShowTheSecret(t *testing.T) {
	code, err := wire.JoinCode{TrustDomain: "td", Root: wire.HashSPKI(nil), Role: wire.RoleNode, TokenID: "id", Token: "hunter2"}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{code[:len(code)-3], code + "!", "sp2." + code[4:], code[:8], "hunter2"} {
		_, err := wire.ParseJoinCode(bad)
		if !errors.Is(err, wire.ErrJoinCode) {
			t.Errorf("ParseJoinCode(altered) = %v, want ErrJoinCode", err)
			continue
		}
		if strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), bad[4:]) {
			t.Errorf("the error repeats the code: %v", err)
		}
	}
}

func FuzzJoinCode(f *testing.F) {
	code, err := wire.JoinCode{TrustDomain: "td", Root: wire.HashSPKI(nil), Role: wire.RoleRCP, Addresses: []string{"h:1"}}.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(code)
	f.Add("sp1.e30")
	f.Fuzz(func(t *testing.T, s string) {
		c, err := wire.ParseJoinCode(s)
		if err != nil {
			return
		}
		again, err := c.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if d, err := wire.ParseJoinCode(again); err != nil || d.Root != c.Root || d.Token != c.Token {
			t.Fatalf("round trip: %+v, %v", d, err)
		}
	})
}

func FuzzAuthority(f *testing.F) {
	f.Add(wire.ConnectAuthority("0f0e0d0c-0b0a-4908-8706-050403020100"))
	f.Add(wire.PendingAuthority(wire.HashSPKI(nil)))
	f.Fuzz(func(t *testing.T, s string) {
		id, key, err := wire.ParseAuthority(s)
		switch {
		case err != nil:
		case id != "" && key == "" && wire.ConnectAuthority(id) == s:
		case key != "" && id == "" && wire.PendingAuthority(key) == s:
		default:
			t.Fatalf("ParseAuthority(%q) = %q, %q", s, id, key)
		}
	})
}

func FuzzRevision(f *testing.F) {
	f.Add("1.7")
	f.Fuzz(func(t *testing.T, s string) {
		if r, err := wire.ParseRevision(s); err == nil && r.String() != s {
			t.Fatalf("ParseRevision(%q) prints as %q", s, r)
		}
	})
}

// Whatever bytes arrive, a reader of lines ends, and never holds more than its
// limit.
func FuzzLineReader(f *testing.F) {
	f.Add([]byte("{}\n{\"pos\":1}\n"))
	f.Fuzz(func(_ *testing.T, b []byte) {
		r := wire.NewLineReader(strings.NewReader(string(b)), wire.MaxPeersLine)
		for range len(b) + 1 {
			var l wire.PeersLine
			var syntax *json.SyntaxError
			var typ *json.UnmarshalTypeError
			if err := r.Next(&l); err != nil && !errors.As(err, &syntax) && !errors.As(err, &typ) {
				return
			}
		}
	})
}

// TestWorstEvent: whatever a local user may put into an event, its line is one
// that a gateway reads. A line above the limit would come again and again, and
// hold up every event behind it.
func TestWorstEvent(t *testing.T) {
	for _, char := range []string{"\x01", "<", "\u2028", "\xff"} {
		field := func(n int) string { return strings.Repeat(char, n/len(char)) }
		e := wire.Event{
			ID: wire.NewEventID(), Seq: math.MaxInt64, Time: time.Now(), Severity: wire.SeverityCritical, Text: field(wire.MaxEventText),
			Application: field(wire.MaxEventField), Object: field(wire.MaxEventField), Key: field(wire.MaxEventField), Instance: field(wire.MaxEventField),
		}
		if err := e.Validate(); err != nil {
			t.Fatal(err)
		}
		line, err := wire.AppendLine(nil, wire.OutboxUp{Event: &e})
		if err != nil {
			t.Fatal(err)
		}
		var up wire.OutboxUp
		if err := wire.NewLineReader(bytes.NewReader(line), wire.MaxFrameLine).Next(&up); err != nil {
			t.Errorf("event full of %q: line of %d bytes: %v", char, len(line), err)
		}
	}
}
