package identity

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"math/big"
	"testing"
)

func TestRootKeys(t *testing.T) {
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	large, small := &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 2047), E: 65537}, &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 1023), E: 65537}
	for _, good := range []any{&p521.PublicKey, ed, large} {
		if err := CheckRootKey(good); err != nil {
			t.Errorf("%T: %v", good, err)
		}
	}
	for _, bad := range []any{small, nil, "key"} {
		if err := CheckRootKey(bad); err == nil {
			t.Errorf("%T is taken", bad)
		}
	}
}
