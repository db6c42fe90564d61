package pki

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
)

// Rounds is how often PBKDF2 hashes, where tests seal keys.
const Rounds = 1000

// pbes2 is a key under a passphrase (RFC 8018 appendix A, RFC 5958 section 3).
type pbes2 struct {
	Algorithm struct {
		ID     asn1.ObjectIdentifier
		Params struct {
			Derivation struct {
				ID     asn1.ObjectIdentifier
				Params struct {
					Salt   []byte
					Rounds int
					PRF    pkix.AlgorithmIdentifier
				}
			}
			Cipher struct {
				ID asn1.ObjectIdentifier
				IV []byte
			}
		}
	}
	Sealed []byte
}

// SealAsEver makes keys be sealed as the program does, until restore is called.
func SealAsEver() (restore func()) {
	encrypt = asEver
	return func() { encrypt = SealCheaply }
}

var asEver = encrypt

func init() { encrypt = SealCheaply }

// SealCheaply counts Rounds rounds. With 600,000 of them, and the race detector,
// every key that is sealed or opened costs a second.
func SealCheaply(pkcs8, passphrase []byte) (*pem.Block, error) {
	salt, iv := make([]byte, 16), make([]byte, aes.BlockSize)
	_, _ = rand.Read(salt) // never fails
	_, _ = rand.Read(iv)
	key, err := pbkdf2.Key(sha256.New, string(passphrase), salt, Rounds, 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	pad := aes.BlockSize - len(pkcs8)%aes.BlockSize
	sealed := append(bytes.Clone(pkcs8), bytes.Repeat([]byte{byte(pad)}, pad)...)
	cipher.NewCBCEncrypter(block, iv).CryptBlocks(sealed, sealed)
	var p pbes2
	p.Algorithm.ID = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 13}
	d := &p.Algorithm.Params.Derivation
	d.ID = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 12}
	d.Params.Salt, d.Params.Rounds = salt, Rounds
	d.Params.PRF = pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 9}, Parameters: asn1.NullRawValue}
	p.Algorithm.Params.Cipher.ID = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 42}
	p.Algorithm.Params.Cipher.IV = iv
	p.Sealed = sealed
	der, err := asn1.Marshal(p)
	return &pem.Block{Type: pemSealedKey, Bytes: der}, err
}
