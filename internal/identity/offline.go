package identity

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"sallyport/internal/wire"
)

// SealRequest signs a request for a certificate with the very key that it is
// for, so that nobody who carries it can change name or tags unseen.
func (i *Identity) SealRequest(r wire.OfflineRequest) (wire.Envelope, error) {
	i.mu.RLock()
	key, self := i.key, i.selfSigned
	i.mu.RUnlock()
	return Seal(key, self.Certificate, wire.TypeOfflineRequest, r)
}

// OpenRequest is the gateway's side of SealRequest: it returns the request and
// the key that signed it, for which the CSR in it is.
func OpenRequest(env wire.Envelope) (r wire.OfflineRequest, key wire.KeyHash, err error) {
	if len(env.Payload) > wire.MaxEnrollBody {
		return r, "", fmt.Errorf("%s: %w", wire.TypeOfflineRequest, wire.ErrTooLarge)
	}
	certs, err := openEnvelope(env, wire.TypeOfflineRequest)
	if err != nil {
		return r, "", err
	}
	if err := json.Unmarshal(env.Payload, &r); err != nil {
		return r, "", fmt.Errorf("%s: payload: %w", wire.TypeOfflineRequest, err)
	}
	_, csrKey, err := ParseCSR(r.Request.CSR)
	if err != nil {
		return r, "", err
	}
	if key = wire.KeyOf(certs[0]); csrKey != key {
		return r, "", fmt.Errorf("%s: %w: it asks for a certificate of %s, and %s signed it", wire.TypeOfflineRequest, ErrSignature, csrKey.Fingerprint(), key.Fingerprint())
	}
	return r, key, nil
}

// OpenAnswer checks the answer to a request of this party before anything of
// it is used: its leaf is for our key, role and UUID, below the root that is
// pinned, and a gateway sealed it that was valid when the leaf was made. (The
// leaf lives twice as long as a gateway's, and files travel slowly; the moment
// is the one that the CA signed.)
func (i *Identity) OpenAnswer(env wire.Envelope) (wire.OfflineAnswer, error) {
	var a wire.OfflineAnswer
	signer, err := openEnvelope(env, wire.TypeOfflineAnswer)
	if err != nil {
		return a, err
	}
	if err := json.Unmarshal(env.Payload, &a); err != nil {
		return a, fmt.Errorf("answer: payload: %w", err)
	}
	certs, err := parseChain(a.Verdict.Chain)
	if err != nil {
		return a, fmt.Errorf("answer: %w", err)
	}
	i.mu.RLock()
	defer i.mu.RUnlock()
	if _, bad := i.revoked[i.keyHash]; bad {
		return a, fmt.Errorf("answer: %w: a new join code makes this %s use a new key", ErrRevoked, i.role)
	}
	if wire.KeyOf(certs[0]) != i.keyHash || a.Key != i.keyHash {
		return a, fmt.Errorf("answer: %w: it is for the key %s, this %s has %s", ErrWrongParty, wire.KeyOf(certs[0]).Fingerprint(), i.role, i.keyHash.Fingerprint())
	}
	if _, _, err := i.verifyOwn(certs); err != nil {
		return a, fmt.Errorf("answer: %w", err)
	}
	roots, err := i.pinnedRoots(certs)
	if err != nil {
		return a, fmt.Errorf("answer: %w", err)
	}
	peer, err := i.verifyChain(signer, roots, certs[0].NotBefore.Add(Backdate))
	if err == nil {
		err = checkRole(peer, wire.RoleGateway)
	}
	if err != nil {
		return a, fmt.Errorf("answer: signer: %w", err)
	}
	if i.chain != nil && !certs[0].NotAfter.After(i.chain[0].NotAfter) {
		return a, fmt.Errorf("answer: %w: this %s has a certificate until %s, the one in the file ends on %s", ErrInstalled, i.role,
			i.chain[0].NotAfter.UTC().Format(time.RFC3339), certs[0].NotAfter.UTC().Format(time.RFC3339))
	}
	return a, nil
}

// ErrInstalled says that a certificate is no better than the one in use.
var ErrInstalled = errors.New("installed already")

// Trusts tells whether a root with that key is pinned or trusted.
func (i *Identity) Trusts(root wire.KeyHash) bool {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.trusts(root)
}

// Adopt puts an identity that was made elsewhere into dir, where no other may
// be, and pins its root. The same again is no error: it may have been cut off.
func Adopt(dir string, role wire.Role, b wire.OfflineBundle) (*Identity, error) {
	if b.Role != role {
		return nil, fmt.Errorf("adopt identity: %w: it is for a %s, this is a %s", ErrWrongRole, b.Role, role)
	}
	if _, err := wire.ParseID(string(b.ID)); err != nil {
		return nil, fmt.Errorf("adopt identity: %w", err)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(b.Key)
	if err != nil {
		return nil, fmt.Errorf("adopt identity: key: %w", err)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("adopt identity: key: a %T, want ECDSA", parsed)
	}
	if _, err := checkKey(&key.PublicKey); err != nil {
		return nil, fmt.Errorf("adopt identity: %w", err)
	}
	text, err := encodeKey(key)
	if err != nil {
		return nil, fmt.Errorf("adopt identity: %w", err)
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("adopt identity: %w", unreadable(err))
	}
	files := dirStore(dir)
	for name, want := range map[string]string{fileID: string(b.ID), fileKey: strings.TrimSpace(string(text))} {
		have, err := files.Read(name)
		if err != nil {
			return nil, fmt.Errorf("adopt identity: %w", unreadable(err))
		}
		if have != nil && strings.TrimSpace(string(have)) != want {
			return nil, fmt.Errorf("adopt identity: %w: %s holds another (let it make its own request: `local csr`; or move that directory away)",
				ErrOtherIdentity, filepath.Join(dir, name))
		}
	}
	if err := files.Write(fileID, []byte(b.ID+"\n"), 0o644); err != nil {
		return nil, fmt.Errorf("adopt identity: %w", err)
	}
	if err := files.Write(fileKey, text, 0o600); err != nil {
		return nil, fmt.Errorf("adopt identity: %w", err)
	}
	i, err := Open(dir, role)
	if err != nil {
		return nil, err
	}
	return i, i.Pin(b.Root, b.TrustDomain)
}

// ErrOtherIdentity says that a host has an identity of its own.
var ErrOtherIdentity = errors.New("this host has an identity already")
