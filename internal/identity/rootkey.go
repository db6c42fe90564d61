package identity

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"fmt"
)

// CheckRootKey accepts what a root may have that is kept elsewhere. Ours are
// ECDSA; companies have old ones.
func CheckRootKey(pub any) error {
	switch key := pub.(type) {
	case *ecdsa.PublicKey:
		if bits := key.Curve.Params().BitSize; bits < 256 {
			return fmt.Errorf("ECDSA key of %d bits, want at least 256", bits)
		}
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < 2048 {
			return fmt.Errorf("RSA key of %d bits, want at least 2048", bits)
		}
	case ed25519.PublicKey:
	default:
		return fmt.Errorf("public key is a %T, want ECDSA, RSA or Ed25519", pub)
	}
	return nil
}
