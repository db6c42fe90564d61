// Package attest lets a device vouch for a party that asks for a certificate:
// with a key that it had before, and a certificate of another CA for it, such as
// an IEEE 802.1AR device identity or a machine certificate.
//
// The device signs a statement about the key, the UUID and the trust domain of
// the party, and a challenge that the gateway made for this session. So neither
// who carries the session nor who has recorded another one can use it, and no
// other gateway to which the device speaks. [Open] checks that; [Anchors.Check]
// checks who issued the device's certificate, and is the gateway's alone.
package attest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

const (
	// maxChain bounds the certificates of a device, leaf included, and
	// maxChainSize what they take together, in bytes: anybody can make a
	// request, and requests are kept.
	maxChain     = 6
	maxChainSize = 16 << 10
	// minRSA is the least size of an RSA device key, in bits; maxRSA bounds
	// the work of a verification.
	minRSA, maxRSA = 2048, 8192
	// maxFile is more than a chain or a key takes, in bytes.
	maxFile = 64 << 10
)

// ErrStatement says that a statement does not prove what it should.
var ErrStatement = errors.New("the device's statement proves nothing")

// Device signs statements.
type Device struct {
	key   crypto.Signer
	chain [][]byte // leaf first, DER
}

// Load reads a device's certificate with its intermediates, leaf first, and
// its key, both PEM and unencrypted.
func Load(certFile, keyFile string) (*Device, error) {
	text, err := readFile(certFile)
	if err != nil {
		return nil, fmt.Errorf("device certificate: %w", err)
	}
	certs, err := ParseCertificates(text)
	if err != nil {
		return nil, fmt.Errorf("device certificate: %s: %w", certFile, err)
	}
	if len(certs) > maxChain {
		return nil, fmt.Errorf("device certificate: %s holds %d certificates, want at most %d", certFile, len(certs), maxChain)
	}
	if text, err = readFile(keyFile); err != nil {
		return nil, fmt.Errorf("device key: %w", err)
	}
	key, err := parseKey(text)
	if err != nil {
		return nil, fmt.Errorf("device key: %s: %w", keyFile, err)
	}
	if pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(certs[0].PublicKey) {
		return nil, fmt.Errorf("device key: %s is not the key of the first certificate in %s", keyFile, certFile)
	}
	if err := checkKey(key.Public()); err != nil {
		return nil, fmt.Errorf("device key: %s: %w", keyFile, err)
	}
	d := &Device{key: key}
	for _, c := range certs {
		d.chain = append(d.chain, c.Raw)
	}
	return d, nil
}

func readFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("%s: %w (%d bytes)", name, wire.ErrTooLarge, maxFile)
	}
	return b, err
}

// ParseCertificates reads a list of certificates in PEM, at least one.
func ParseCertificates(text []byte) (certs []*x509.Certificate, err error) {
	for {
		var block *pem.Block
		block, text = pem.Decode(text)
		switch {
		case block == nil && len(bytes.TrimSpace(text)) > 0:
			return nil, errors.New("it holds something else than certificates in PEM form")
		case block == nil && len(certs) == 0:
			return nil, errors.New("it holds no certificate in PEM form")
		case block == nil:
			return certs, nil
		case block.Type != "CERTIFICATE":
			return nil, fmt.Errorf("it holds a PEM block of type %s, want certificates only", wire.Quotable(block.Type))
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, c)
	}
}

// parseKey reads the first key of a PEM text; OpenSSL writes EC PARAMETERS
// before some.
func parseKey(text []byte) (crypto.Signer, error) {
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			return nil, errors.New("it holds no private key in PEM form without encryption")
		}
		var key any
		var err error
		switch block.Type {
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		default:
			continue
		}
		if err != nil {
			return nil, err
		}
		signer, ok := key.(crypto.Signer)
		if !ok {
			return nil, fmt.Errorf("it holds a %T, want a key that signs", key)
		}
		return signer, nil
	}
}

// checkKey accepts ECDSA on the NIST curves, RSA and Ed25519.
func checkKey(pub any) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if k.Curve.Params().BitSize < 256 {
			return fmt.Errorf("ECDSA key of %d bits, want 256 or more", k.Curve.Params().BitSize)
		}
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < minRSA || n > maxRSA {
			return fmt.Errorf("RSA key of %d bits, want %d to %d", n, minRSA, maxRSA)
		}
	case ed25519.PublicKey:
	default:
		return fmt.Errorf("key is a %T, want ECDSA, RSA or Ed25519", pub)
	}
	return nil
}

// pss is how RSA keys sign: with a salt as long as the hash.
var pss = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256}

// Sign signs a statement.
func (d *Device) Sign(s wire.AttestationStatement) (*wire.Envelope, error) {
	payload, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	message := identity.AppendPAE(nil, wire.TypeAttestation, payload)
	sum := sha256.Sum256(message)
	var sig []byte
	switch d.key.Public().(type) {
	case ed25519.PublicKey:
		sig, err = d.key.Sign(rand.Reader, message, crypto.Hash(0))
	case *rsa.PublicKey:
		sig, err = d.key.Sign(rand.Reader, sum[:], pss)
	default:
		sig, err = d.key.Sign(rand.Reader, sum[:], crypto.SHA256)
	}
	if err != nil {
		return nil, fmt.Errorf("sign with the device key: %w", err)
	}
	return &wire.Envelope{Type: wire.TypeAttestation, Payload: payload, Chain: d.chain, Signature: sig}, nil
}

// Open checks that env is the statement that want says, signed by the key of
// the chain's first certificate, and returns the chain. Who issued that remains
// to be checked.
func Open(env wire.Envelope, want wire.AttestationStatement) ([]*x509.Certificate, error) {
	if env.Type != wire.TypeAttestation {
		return nil, fmt.Errorf("%w: it is a %q", ErrStatement, wire.Quotable(env.Type))
	}
	chain, err := ParseChain(env.Chain)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrStatement, err)
	}
	message := identity.AppendPAE(nil, env.Type, env.Payload)
	sum := sha256.Sum256(message)
	good := false
	switch k := chain[0].PublicKey.(type) {
	case *ecdsa.PublicKey:
		good = ecdsa.VerifyASN1(k, sum[:], env.Signature)
	case *rsa.PublicKey:
		good = rsa.VerifyPSS(k, crypto.SHA256, sum[:], env.Signature, pss) == nil
	case ed25519.PublicKey:
		good = ed25519.Verify(k, message, env.Signature)
	}
	if !good {
		return nil, fmt.Errorf("%w: its signature is not of the key in the device certificate", ErrStatement)
	}
	var got wire.AttestationStatement
	if err := json.Unmarshal(env.Payload, &got); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrStatement, err)
	}
	switch {
	case len(want.Challenge) != wire.ChallengeSize || !bytes.Equal(got.Challenge, want.Challenge):
		return nil, fmt.Errorf("%w: it answers another challenge: it was made for another session", ErrStatement)
	case got.Key != want.Key:
		return nil, fmt.Errorf("%w: it is about another key (%s)", ErrStatement, got.Key.Fingerprint())
	case got.Role != want.Role || got.ID != want.ID || got.TrustDomain != want.TrustDomain:
		return nil, fmt.Errorf("%w: it is about %s %s of %s", ErrStatement, wire.Quotable(string(got.Role)), wire.Quotable(string(got.ID)), wire.Quotable(got.TrustDomain))
	}
	return chain, nil
}

// ParseChain reads the certificates of a device, leaf first.
func ParseChain(list [][]byte) ([]*x509.Certificate, error) {
	if len(list) == 0 || len(list) > maxChain {
		return nil, fmt.Errorf("it holds %d certificates, want 1 to %d", len(list), maxChain)
	}
	chain := make([]*x509.Certificate, len(list))
	size := 0
	for n, der := range list {
		if size += len(der); size > maxChainSize {
			return nil, fmt.Errorf("its certificates: %w (%d bytes)", wire.ErrTooLarge, maxChainSize)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("certificate %d of the device: %w", n+1, err)
		}
		chain[n] = c
	}
	return chain, checkKey(chain[0].PublicKey)
}
