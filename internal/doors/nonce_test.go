package doors

import (
	"bytes"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"slices"
	"testing"
)

// ocspRequest is an OCSP request with these extensions; what it asks about does
// not matter here.
func ocspRequest(t testing.TB, extensions ...pkix.Extension) []byte {
	t.Helper()
	type tbs struct {
		Version    int              `asn1:"explicit,tag:0,default:0,optional"`
		List       []asn1.RawValue  `asn1:"sequence"`
		Extensions []pkix.Extension `asn1:"explicit,tag:2,optional,omitempty"`
	}
	der, err := asn1.Marshal(struct{ TBS tbs }{tbs{List: []asn1.RawValue{}, Extensions: extensions}})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func nonceOf(t testing.TB, nonce []byte) pkix.Extension {
	t.Helper()
	ext, err := NonceExtension(nonce)
	if err != nil {
		t.Fatal(err)
	}
	return ext
}

func TestNonce(t *testing.T) {
	other := pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}
	for _, want := range [][]byte{{1}, bytes.Repeat([]byte{2}, 16), bytes.Repeat([]byte{3}, MaxNonce)} {
		got, err := NonceOf(ocspRequest(t, other, nonceOf(t, want)))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%x: %x, %v", want, got, err)
		}
	}
	for what, der := range map[string][]byte{"no extensions": ocspRequest(t), "another extension": ocspRequest(t, other)} {
		if got, err := NonceOf(der); err != nil || got != nil {
			t.Errorf("%s: %x, %v", what, got, err)
		}
	}
	whole := ocspRequest(t, nonceOf(t, []byte{1, 2, 3}))
	for what, der := range map[string][]byte{
		"nothing": nil, "garbage": []byte("garbage"), "cut off": whole[:len(whole)-1],
		"empty": ocspRequest(t, nonceOf(t, []byte{})), "too long": ocspRequest(t, nonceOf(t, make([]byte, MaxNonce+1))),
		"no octet string": ocspRequest(t, pkix.Extension{Id: oidNonce, Value: []byte{5, 0}}),
	} {
		if got, err := NonceOf(der); !errors.Is(err, ErrNonce) {
			t.Errorf("%s: %x, %v", what, got, err)
		}
	}
}

// Whatever a stranger sends, a nonce is within its bounds and in what he sent.
func FuzzNonce(f *testing.F) {
	f.Add(ocspRequest(f, nonceOf(f, []byte("0123456789abcdef"))))
	f.Add(ocspRequest(f))
	f.Add([]byte{0x30, 0x84, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, der []byte) {
		nonce, err := NonceOf(slices.Clone(der))
		if err != nil || nonce == nil {
			return
		}
		if len(nonce) < minNonce || len(nonce) > MaxNonce || !bytes.Contains(der, nonce) {
			t.Errorf("%x in %x", nonce, der)
		}
		if again, err := NonceOf(ocspRequest(t, nonceOf(t, nonce))); err != nil || !bytes.Equal(again, nonce) {
			t.Errorf("%x: %x, %v", nonce, again, err)
		}
	})
}
