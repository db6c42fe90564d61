package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"sallyport/internal/wire"
)

// AppendPAE appends the pre-authentication encoding of DSSE version 1: the
// type is signed with the payload, and their lengths keep them apart.
func AppendPAE(b []byte, typ string, payload []byte) []byte {
	b = append(b, "DSSEv1 "...)
	b = strconv.AppendInt(b, int64(len(typ)), 10)
	b = append(append(append(b, ' '), typ...), ' ')
	b = strconv.AppendInt(b, int64(len(payload)), 10)
	return append(append(b, ' '), payload...)
}

// Seal signs a document with any ECDSA signer. chain is the signer's, leaf
// first, DER, without the root.
func Seal(signer crypto.Signer, chain [][]byte, typ string, payload any) (wire.Envelope, error) {
	b, err := json.Marshal(payload)
	if err != nil {
		return wire.Envelope{}, fmt.Errorf("seal %s: %w", typ, err)
	}
	sum := sha256.Sum256(AppendPAE(nil, typ, b))
	sig, err := signer.Sign(rand.Reader, sum[:], crypto.SHA256)
	if err != nil {
		return wire.Envelope{}, fmt.Errorf("seal %s: %w", typ, err)
	}
	return wire.Envelope{Type: typ, Payload: b, Chain: chain, Signature: sig}, nil
}

// Sign signs a document as this party.
func (i *Identity) Sign(typ string, payload any) (wire.Envelope, error) {
	i.mu.RLock()
	key, cert := i.key, i.cert
	i.mu.RUnlock()
	if cert == nil {
		return wire.Envelope{}, fmt.Errorf("seal %s: %w", typ, ErrNoCertificate)
	}
	return Seal(key, cert.Certificate[:len(cert.Certificate)-1], typ, payload)
}

// VerifyEnvelope checks type, signature and signer of a document, and decodes
// its payload into out. The signer must be of the given role in our trust
// domain, valid now and not revoked.
func (i *Identity) VerifyEnvelope(env wire.Envelope, typ string, role wire.Role, out any) (Peer, error) {
	certs, err := openEnvelope(env, typ)
	if err != nil {
		return Peer{}, err
	}
	i.mu.RLock()
	defer i.mu.RUnlock()
	if len(i.roots) == 0 {
		return Peer{}, fmt.Errorf("%s: %w", typ, ErrNotPinned)
	}
	peer, err := i.verifyChain(certs, i.roots, time.Now())
	if err != nil {
		return Peer{}, fmt.Errorf("%s: signer: %w", typ, err)
	}
	if err := checkRole(peer, role); err != nil {
		return Peer{}, fmt.Errorf("%s: signer: %w", typ, err)
	}
	if err := json.Unmarshal(env.Payload, out); err != nil {
		return Peer{}, fmt.Errorf("%s: payload: %w", typ, err)
	}
	return peer, nil
}

// openEnvelope checks that the first certificate of the chain signed it. Who
// that is remains to be verified.
func openEnvelope(env wire.Envelope, typ string) ([]*x509.Certificate, error) {
	if env.Type != typ {
		return nil, fmt.Errorf("signed document: %w: it is a %q, want a %q", ErrSignature, wire.Quotable(env.Type), typ)
	}
	certs, err := parseChain(env.Chain)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", typ, err)
	}
	key, err := checkKey(certs[0].PublicKey)
	if err != nil {
		return nil, fmt.Errorf("%s: signer: %w", typ, err)
	}
	sum := sha256.Sum256(AppendPAE(nil, env.Type, env.Payload))
	if !ecdsa.VerifyASN1(key, sum[:], env.Signature) {
		return nil, fmt.Errorf("%s: %w", typ, ErrSignature)
	}
	return certs, nil
}
