package identity

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"time"

	"sallyport/internal/wire"
)

// maxChain bounds the certificates that a peer or an envelope may bring.
const maxChain = 8

// CSR makes a PKCS #10 request with the key in use, or, with rekey, with a new
// key that takes over when its certificate is installed. Only the public key
// counts; the name is for people who look at the request.
func (i *Identity) CSR(rekey bool) ([]byte, error) {
	i.write.Lock()
	defer i.write.Unlock()
	return i.request(rekey)
}

// RenewalCSR is CSR in a session with a certified party. One that has become another
// meanwhile, and no certificate yet, asks for none there: its new key would be known
// as that of the party that it was, and never be certified for the one that it is.
func (i *Identity) RenewalCSR(rekey bool) ([]byte, error) {
	i.write.Lock()
	defer i.write.Unlock()
	i.mu.RLock()
	certified := i.chain != nil
	i.mu.RUnlock()
	if !certified {
		return nil, ErrNoCertificate
	}
	return i.request(rekey)
}

// request is CSR; write is held.
func (i *Identity) request(rekey bool) ([]byte, error) {
	i.mu.RLock()
	key, id := i.key, i.id
	i.mu.RUnlock()
	if rekey {
		next, err := i.makeKey(fileKeyNext)
		if err != nil {
			return nil, fmt.Errorf("new key: %w", err)
		}
		i.mu.Lock()
		i.next = next
		i.mu.Unlock()
		key = next
	}
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: string(id)},
	}, key)
}

// ParseCSR returns the public key of a request whose signature proves that the
// sender holds it. Everything else in the request is ignored.
func ParseCSR(der []byte) (*ecdsa.PublicKey, wire.KeyHash, error) {
	csr, key, hash, err := ReadCSR(der)
	if err != nil {
		return nil, "", err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, "", fmt.Errorf("certificate request: %w: %w", ErrSignature, err)
	}
	return key, hash, nil
}

// ReadCSR is [ParseCSR] for a caller that checks the signature itself.
func ReadCSR(der []byte) (*x509.CertificateRequest, *ecdsa.PublicKey, wire.KeyHash, error) {
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, nil, "", fmt.Errorf("certificate request: %w", err)
	}
	key, err := checkKey(csr.PublicKey)
	if err != nil {
		return nil, nil, "", fmt.Errorf("certificate request: %w", err)
	}
	return csr, key, wire.HashSPKI(csr.RawSubjectPublicKeyInfo), nil
}

// checkKey accepts the curves that this program ever makes or will make.
func checkKey(pub any) (*ecdsa.PublicKey, error) {
	key, ok := pub.(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("public key is a %T, want ECDSA", pub)
	}
	if bits := key.Curve.Params().BitSize; bits != 256 && bits != 384 {
		return nil, fmt.Errorf("ECDSA key of %d bits, want P-256 or P-384", bits)
	}
	return key, nil
}

// Install puts a chain (leaf first, then its intermediate for each root, then
// the roots) in the place of the one in use. The chain must lead to the pinned
// or a trusted root that is in it, name this party, and hold the key in use or
// that of the last CSR. Roots of the chain that are neither are not trusted
// for it: only [Identity.ApplyTrust] brings new ones.
func (i *Identity) Install(chain [][]byte) error {
	certs, err := parseChain(chain)
	if err != nil {
		return fmt.Errorf("install certificate: %w", err)
	}
	i.write.Lock()
	defer i.write.Unlock()

	i.mu.RLock()
	peer, own, verr := i.verifyOwn(certs)
	key, next, ever, trusted := i.key, i.next, i.everTrusted, i.roots
	i.mu.RUnlock()
	if verr != nil {
		return fmt.Errorf("install certificate: %w", verr)
	}
	promote := false
	switch leaf := certs[0]; {
	case key.PublicKey.Equal(leaf.PublicKey):
	case next != nil && next.PublicKey.Equal(leaf.PublicKey):
		key, promote = next, true
	default:
		return fmt.Errorf("install certificate: it is for another key (%s)", wire.KeyOf(leaf).Fingerprint())
	}

	if all := union(ever, own); len(all) > len(ever) {
		if err := i.store.Write(fileRoots, encodeCerts(all), 0o644); err != nil {
			return err
		}
		ever = all
	}
	if err := i.store.Write(fileChain, encodeCerts(certs), 0o644); err != nil {
		return err
	}
	if promote { // a crash before this is repaired by Open
		if err := i.promoteNext(); err != nil {
			return err
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.everTrusted = ever
	i.setTrusted(union(trusted, own))
	i.chain, i.party = certs, peer.Party
	if promote {
		i.next = nil
		if err := i.setKey(key); err != nil {
			return err
		}
	}
	i.setCertificate()
	i.notify()
	return nil
}

// verifyOwn checks a chain that is offered as our own, and returns the pinned
// or trusted roots that it holds; mu is held.
func (i *Identity) verifyOwn(certs []*x509.Certificate) (Peer, []*x509.Certificate, error) {
	if i.pin.Root == "" && len(i.roots) == 0 {
		return Peer{}, nil, ErrNotPinned
	}
	var roots []*x509.Certificate
	for _, c := range certs[1:] {
		if i.trusts(wire.KeyOf(c)) && i.verified.root(c) {
			roots = append(roots, c)
		}
	}
	if len(roots) == 0 {
		return Peer{}, nil, fmt.Errorf("%w: its root %s is not the pinned one", ErrUntrusted, wire.KeyOf(certs[len(certs)-1]).Fingerprint())
	}
	peer, err := i.verifyChain(certs, roots, time.Now())
	if err != nil {
		return Peer{}, nil, err
	}
	if peer.Party.Role != i.role {
		return Peer{}, nil, fmt.Errorf("%w: it is for a %s, this is a %s", ErrWrongRole, peer.Party.Role, i.role)
	}
	if peer.Party.ID != i.id {
		return Peer{}, nil, fmt.Errorf("%w: it is for %s, this is %s", ErrWrongParty, peer.Party.ID, i.id)
	}
	return peer, roots, nil
}

// NewKey forgets the certificate and makes a new key; UUID, roots, pin and
// revocations stay. It is for a revoked party that has a new join code.
func (i *Identity) NewKey() error {
	i.write.Lock()
	defer i.write.Unlock()
	if err := i.renew(""); err != nil {
		return fmt.Errorf("new key: %w", err)
	}
	return nil
}

// Reidentify is NewKey with a new UUID besides: the party enrols as another
// one. After a crash it is done wholly or not at all.
func (i *Identity) Reidentify() error {
	i.write.Lock()
	defer i.write.Unlock()
	id := wire.NewID()
	if err := i.store.Write(fileIDNext, []byte(id+"\n"), 0o644); err != nil {
		return fmt.Errorf("new identity: %w", err)
	}
	if err := i.renew(id); err != nil {
		return fmt.Errorf("new identity: %w", err)
	}
	return nil
}

// renew makes a new key, and takes over the UUID of fileIDNext unless it is
// empty; write is held.
func (i *Identity) renew(id wire.ID) error {
	// The chain goes first: a key without its chain is a party that waits,
	// a chain without its key would be damage.
	i.mu.RLock()
	p := pin{Root: i.pin.Root, TrustDomain: i.trustDomain()}
	i.mu.RUnlock()
	if p.TrustDomain == "" {
		return ErrNotPinned
	}
	if err := i.writePin(p); err != nil {
		return err
	}
	for _, name := range []string{fileChain, fileKeyNext} {
		if err := i.store.Remove(name); err != nil {
			return err
		}
	}
	key, err := i.makeKey(fileKey)
	if err != nil {
		return err
	}
	if id != "" {
		if err := i.store.Rename(fileIDNext, fileID); err != nil {
			return err
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.chain, i.next, i.pin = nil, nil, p
	i.party = wire.Party{}
	if id != "" {
		i.id = id
	}
	if err := i.setKey(key); err != nil {
		return err
	}
	i.setCertificate()
	i.notify()
	return nil
}

// finishReidentify completes or takes back what a crash interrupted: while the
// old chain is there nothing has happened yet.
func (i *Identity) finishReidentify(files map[string][]byte) error {
	next := files[fileIDNext]
	if next == nil {
		return nil
	}
	if files[fileChain] != nil {
		return i.store.Remove(fileIDNext)
	}
	// The key may be the old one still, which is known under the old UUID.
	for _, name := range []string{fileKey, fileKeyNext} {
		if err := i.store.Remove(name); err != nil {
			return err
		}
		files[name] = nil
	}
	if err := i.store.Rename(fileIDNext, fileID); err != nil {
		return err
	}
	files[fileID] = next
	return nil
}

func parseChain(chain [][]byte) ([]*x509.Certificate, error) {
	if len(chain) == 0 {
		return nil, errors.New("chain is empty")
	}
	if len(chain) > maxChain {
		return nil, fmt.Errorf("chain of %d certificates is above the limit of %d", len(chain), maxChain)
	}
	certs := make([]*x509.Certificate, len(chain))
	for n, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("certificate %d of the chain: %w", n+1, err)
		}
		certs[n] = c
	}
	return certs, nil
}
