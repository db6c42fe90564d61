package tunnel

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"
)

func FuzzFrame(f *testing.F) {
	f.Add(appendHeader(nil, header{kindOpen, 1, 4}))
	f.Add(append(appendHeader(nil, header{kindReset, 7, 3}), 1, 'n', 'o'))
	f.Add(appendHeader(nil, header{kindPing, 0, 8}))
	f.Add([]byte{2, 0, 0, 0, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseHeader(b)
		if err != nil {
			return
		}
		if again := appendHeader(nil, h); !bytes.Equal(again, b[:headerLen]) {
			t.Errorf("%x was read as %+v, which is %x", b[:headerLen], h, again)
		}
		var put [headerLen]byte
		putHeader(put[:], h)
		if !bytes.Equal(put[:], b[:headerLen]) {
			t.Errorf("put as %x, not %x", put, b[:headerLen])
		}
		if h.n > MaxPayload {
			t.Errorf("a frame of %d bytes is taken", h.n)
		}
		payload := b[headerLen:]
		if h.kind != kindReset || len(payload) < h.n {
			return
		}
		e, err := parseReset(payload[:h.n])
		if err != nil {
			return
		}
		if again := appendReset(nil, e); !bytes.Equal(again, payload[:h.n]) {
			t.Errorf("reset %x was read as %v, which is %x", payload[:h.n], e, again)
		}
	})
}

func TestResetKeepsItsLimits(t *testing.T) {
	for name, reason := range map[string]string{
		"long": strings.Repeat("x", 1000), "long with wide runes": strings.Repeat("ä", 1000), "control": "a\nb", "not UTF-8": "\xff", "short": "no",
	} {
		b := appendReset(nil, &RefusedError{Code: Forbidden, Reason: reason})
		if len(b) > 1+maxReason {
			t.Errorf("%s: %d bytes", name, len(b))
		}
		e, err := parseReset(b)
		if err != nil || e.Code != Forbidden || !strings.HasPrefix(reason, e.Reason) {
			t.Errorf("%s: %v, %v", name, e, err)
		}
	}
}

func TestCheckTarget(t *testing.T) {
	for name, ok := range map[string]bool{"db": true, "a/b c": true, "": false, strings.Repeat("x", 255): true, strings.Repeat("x", 256): false, "a\x00": false, "\xff": false} {
		if err := checkTarget(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// appendHeader spells a header out, byte by byte.
func appendHeader(b []byte, h header) []byte {
	return binary.BigEndian.AppendUint32(append(b, byte(h.kind), byte(h.n>>16), byte(h.n>>8), byte(h.n)), h.id)
}
