package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"sallyport/internal/wire"
)

// Backdate is how far a leaf's NotBefore lies before the moment of issue, so
// that clocks two days off work. A leaf's life is counted without it.
const Backdate = 72 * time.Hour

// Identity is one party in one trust domain. It is safe for concurrent use.
type Identity struct {
	dir   string // empty when something else keeps the files
	store Store
	role  wire.Role
	id    wire.ID

	write sync.Mutex // held while files change; taken before mu

	mu         sync.RWMutex
	key        *ecdsa.PrivateKey
	keyHash    wire.KeyHash
	next       *ecdsa.PrivateKey   // of a CSR that asked for a new key
	chain      []*x509.Certificate // leaf, its intermediate (for each root), roots; empty without a certificate
	party      wire.Party          // of the leaf
	cert       *tls.Certificate
	brief      *tls.Certificate // cert without roots, and without what only retired roots vouch for
	selfSigned *tls.Certificate
	roots      []*x509.Certificate
	pool       *x509.CertPool
	// everTrusted are roots and those before them: what came while they were
	// trusted and lies on our disk stays good.
	everTrusted []*x509.Certificate
	trustNumber int64
	trustEnv    *wire.Envelope
	pin         pin
	verified    verified
	revoked     map[wire.KeyHash]struct{}
	revNumber   int64 // of revEnv, which is on disk
	revInForce  int64 // of revoked: above revNumber where that set could not be written
	revEnv      *wire.Envelope
	changed     chan struct{}
}

type pin struct {
	Root        wire.KeyHash `json:"root"`
	TrustDomain string       `json:"trust_domain"`
}

// Open loads the identity in dir, and makes the directory, the UUID and the
// key on first use. Damage is an error that wraps ErrDamaged and names the
// repair; nothing is ever replaced silently.
func Open(dir string, role wire.Role) (*Identity, error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("identity directory: %w", unreadable(err))
	}
	i, err := open(dirStore(dir), role)
	if err != nil {
		return nil, fmt.Errorf("identity in %s: %w", dir, unreadable(err))
	}
	i.dir = dir
	return i, nil
}

// OpenStore is [Open] for an identity whose files something else keeps.
func OpenStore(store Store, role wire.Role) (*Identity, error) {
	i, err := open(store, role)
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	return i, nil
}

func open(store Store, role wire.Role) (*Identity, error) {
	if _, err := wire.ParseRole(string(role)); err != nil {
		return nil, err
	}
	i := &Identity{store: store, role: role, changed: make(chan struct{})}
	if err := i.load(); err != nil {
		return nil, err
	}
	return i, nil
}

// unreadable adds what to do to a refused file access.
func unreadable(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w (run as the user that owns SALLYPORT_DATA, or give it to this one: uid %d)", err, os.Geteuid())
	}
	return err
}

func damaged(file string, cause error, repair string) error {
	return fmt.Errorf("%w: %s: %w; %s", ErrDamaged, file, cause, repair)
}

// repair is what to do about files that cannot be made again from others.
func (i *Identity) repair() string {
	const aside = "restore the directory from a backup, or set it aside (`sallyport local rejoin`) and enrol again with a new join code "
	switch i.role {
	case wire.RoleGateway:
		return "restore it from a backup (`sallyport restore FILE`), or move the directory away: the certificate authority makes the gateway a new identity when it starts"
	case wire.RoleRCP:
		return aside + "(`sallyport rcp join NAME --replace`)"
	}
	return aside + "(`sallyport join create --name NAME --replace`)"
}

func (i *Identity) load() error {
	files := map[string][]byte{}
	for _, name := range []string{fileID, fileIDNext, fileKey, fileKeyNext, fileChain, fileRoots, fileTrust, filePin, fileRevocations} {
		b, err := i.store.Read(name)
		if err != nil {
			return err
		}
		files[name] = b
	}
	if err := i.finishReidentify(files); err != nil {
		return err
	}
	if b := files[filePin]; b != nil {
		if err := json.Unmarshal(b, &i.pin); err != nil {
			return damaged(filePin, err, "delete it and start with a join code")
		}
	}
	if b := files[fileRoots]; b != nil {
		roots, err := decodeCerts(b)
		if err != nil {
			return damaged(fileRoots, err, i.repair())
		}
		i.setRoots(roots)
	}
	if err := i.loadChain(files[fileChain]); err != nil {
		return err
	}
	if b := files[fileTrust]; b != nil {
		if err := i.loadTrust(b); err != nil {
			return damaged(fileTrust, err, i.repair())
		}
	}
	if err := i.loadID(files[fileID]); err != nil {
		return err
	}
	if err := i.loadKeys(files[fileKey], files[fileKeyNext]); err != nil {
		return err
	}
	if b := files[fileRevocations]; b != nil {
		if err := i.loadRevocations(b); err != nil {
			return damaged(fileRevocations, err, "delete it; the next upstream sends the current set")
		}
	}
	return nil
}

func (i *Identity) loadChain(b []byte) error {
	if b == nil {
		return nil
	}
	chain, err := decodeCerts(b)
	if err != nil {
		return damaged(fileChain, err, i.repair())
	}
	party, err := partyOf(chain[0])
	if err != nil {
		return damaged(fileChain, err, i.repair())
	}
	if party.Role != i.role {
		return damaged(fileChain, fmt.Errorf("%w: it is for a %s, this is a %s", ErrWrongRole, party.Role, i.role), "give each role its own SALLYPORT_DATA sub-directory")
	}
	if len(i.roots) == 0 {
		return damaged(fileRoots, errors.New("missing while "+fileChain+" is there"), i.repair())
	}
	i.chain, i.party = chain, party
	return nil
}

func (i *Identity) loadID(b []byte) error {
	if b == nil {
		i.id = i.party.ID // a lost file can be made again from the certificate
		if i.id == "" {
			i.id = wire.NewID()
		}
		return i.store.Write(fileID, []byte(i.id+"\n"), 0o644)
	}
	id, err := wire.ParseID(strings.TrimSpace(string(b)))
	if err != nil {
		return damaged(fileID, err, "delete it if "+fileChain+" is there, or restore it from a backup")
	}
	if i.chain != nil && i.party.ID != id {
		return damaged(fileID, fmt.Errorf("it says %s, the certificate says %s", id, i.party.ID), i.repair())
	}
	i.id = id
	return nil
}

// loadKeys also finishes a change of key that a crash interrupted: the chain
// decides which of the two keys is in use.
func (i *Identity) loadKeys(b, nextB []byte) error {
	var key, next *ecdsa.PrivateKey
	var err error
	if nextB != nil {
		if next, err = decodeKey(nextB); err != nil {
			return damaged(fileKeyNext, err, "delete it; the next renewal makes a new one")
		}
	}
	if b != nil {
		if key, err = decodeKey(b); err != nil {
			return damaged(fileKey, err, i.repair())
		}
	}
	if i.chain != nil && next != nil && next.PublicKey.Equal(i.chain[0].PublicKey) {
		if err := i.promoteNext(); err != nil {
			return err
		}
		key, next = next, nil
	}
	if i.chain != nil {
		switch {
		case key == nil:
			return damaged(fileKey, errors.New("missing while "+fileChain+" is there"), i.repair())
		case !key.PublicKey.Equal(i.chain[0].PublicKey):
			return damaged(fileKey, errors.New("does not belong to the certificate in "+fileChain), i.repair())
		}
	}
	if key == nil {
		if key, err = i.makeKey(fileKey); err != nil {
			return err
		}
	}
	i.next = next
	if err := i.setKey(key); err != nil {
		return err
	}
	i.setCertificate()
	return nil
}

// makeKey makes a key and has it on disk before anybody can see its public half.
func (i *Identity) makeKey(file string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	b, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	return key, i.store.Write(file, b, 0o600)
}

func (i *Identity) promoteNext() error {
	return i.store.Rename(fileKeyNext, fileKey)
}

// setKey, setCertificate and setRoots change memory only; mu is held or the
// identity is not shared yet.
func (i *Identity) setKey(key *ecdsa.PrivateKey) error {
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return err
	}
	self, err := selfSign(key)
	if err != nil {
		return err
	}
	i.key, i.keyHash, i.selfSigned = key, wire.HashSPKI(spki), self
	return nil
}

func (i *Identity) setCertificate() {
	if i.chain == nil {
		i.cert, i.brief = nil, nil
		return
	}
	c := &tls.Certificate{PrivateKey: i.key, Leaf: i.chain[0]}
	b := *c
	for n, x := range i.chain {
		c.Certificate = append(c.Certificate, x.Raw)
		if n == 0 || !selfSigned(x) && slices.ContainsFunc(i.roots, func(r *x509.Certificate) bool { return mayHaveIssued(r, x) }) {
			b.Certificate = append(b.Certificate, x.Raw)
		}
	}
	// The same certificate stays the same pointer: whoever watches it must not
	// connect anew because other roots are trusted.
	if i.cert == nil || !sameCertificate(i.cert, c) {
		i.cert = c
	}
	if i.brief == nil || !sameCertificate(i.brief, &b) {
		i.brief = &b
	}
}

func sameCertificate(a, b *tls.Certificate) bool {
	return a.PrivateKey == b.PrivateKey && slices.EqualFunc(a.Certificate, b.Certificate, bytes.Equal)
}

// selfSigned and mayHaveIssued go by names and key identifiers: they choose
// what is sent, and the receiver verifies.
func selfSigned(c *x509.Certificate) bool {
	return bytes.Equal(c.RawIssuer, c.RawSubject) && (len(c.AuthorityKeyId) == 0 || bytes.Equal(c.AuthorityKeyId, c.SubjectKeyId))
}

func mayHaveIssued(root, c *x509.Certificate) bool {
	return bytes.Equal(c.RawIssuer, root.RawSubject) &&
		(len(c.AuthorityKeyId) == 0 || len(root.SubjectKeyId) == 0 || bytes.Equal(c.AuthorityKeyId, root.SubjectKeyId))
}

// setRoots takes roots of which all are trusted; setTrust narrows that.
func (i *Identity) setRoots(roots []*x509.Certificate) {
	i.everTrusted = roots
	i.setTrusted(roots)
}

func (i *Identity) setTrusted(roots []*x509.Certificate) {
	i.roots, i.pool = roots, x509.NewCertPool()
	for _, r := range roots {
		i.pool.AddCert(r)
	}
}

// notify wakes everybody who waits on Changed; mu is held.
func (i *Identity) notify() {
	close(i.changed)
	i.changed = make(chan struct{})
}

// selfSign makes the certificate of the enrolment ALPN. It proves possession
// of the key and nothing else, so its times are wide enough for any clock.
func selfSign(key *ecdsa.PrivateKey) (*tls.Certificate, error) {
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "sallyport pending"},
		NotBefore:    time.Unix(0, 0),
		NotAfter:     time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, nil
}

// ID is the UUID, there from the first Open on. Only [Identity.Reidentify]
// changes it.
func (i *Identity) ID() wire.ID {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.id
}

// Role is the role that Open was told.
func (i *Identity) Role() wire.Role { return i.role }

// Dir is the directory of the identity; empty after [OpenStore].
func (i *Identity) Dir() string { return i.dir }

// KeyHash names the key in use.
func (i *Identity) KeyHash() wire.KeyHash {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.keyHash
}

// Fingerprint is the key in use as people compare it.
func (i *Identity) Fingerprint() string { return i.KeyHash().Fingerprint() }

// Party is what the certificate proves; false while there is none.
func (i *Identity) Party() (wire.Party, bool) {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.party, i.chain != nil
}

// TrustDomain is that of the certificate, else the pinned one, else empty.
func (i *Identity) TrustDomain() string {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.trustDomain()
}

func (i *Identity) trustDomain() string {
	if i.chain != nil {
		return i.party.TrustDomain
	}
	return i.pin.TrustDomain
}

// Certificate is the chain in use (leaf, intermediate, roots) with its key. It
// may have expired: see [Identity.NotAfter].
func (i *Identity) Certificate() (*tls.Certificate, error) {
	i.mu.RLock()
	defer i.mu.RUnlock()
	if i.cert == nil {
		return nil, ErrNoCertificate
	}
	return i.cert, nil
}

// BriefCertificate is Certificate without the roots: for peers that have them
// already, which is every certified one. It spares them to parse and to keep
// them for each connection.
func (i *Identity) BriefCertificate() (*tls.Certificate, error) {
	i.mu.RLock()
	defer i.mu.RUnlock()
	if i.brief == nil {
		return nil, ErrNoCertificate
	}
	return i.brief, nil
}

// Chain is the DER of leaf, intermediate and roots; nil without a certificate.
func (i *Identity) Chain() [][]byte {
	i.mu.RLock()
	defer i.mu.RUnlock()
	if i.cert == nil {
		return nil
	}
	return i.cert.Certificate
}

// SelfSigned is a certificate of the same key for the enrolment ALPNs.
func (i *Identity) SelfSigned() (*tls.Certificate, error) {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.selfSigned, nil
}

// Roots is the pool of trusted roots; empty before the first certificate. It
// must not be changed.
func (i *Identity) Roots() *x509.CertPool {
	i.mu.RLock()
	defer i.mu.RUnlock()
	if i.pool == nil {
		return x509.NewCertPool()
	}
	return i.pool
}

// NotBefore is the beginning of the leaf; zero without one.
func (i *Identity) NotBefore() time.Time {
	i.mu.RLock()
	defer i.mu.RUnlock()
	if i.chain == nil {
		return time.Time{}
	}
	return i.chain[0].NotBefore
}

// NotAfter is the end of the leaf; zero without one.
func (i *Identity) NotAfter() time.Time {
	i.mu.RLock()
	defer i.mu.RUnlock()
	if i.chain == nil {
		return time.Time{}
	}
	return i.chain[0].NotAfter
}

// RenewAfter is two thirds into the leaf's life; zero without one.
func (i *Identity) RenewAfter() time.Time {
	i.mu.RLock()
	defer i.mu.RUnlock()
	if i.chain == nil {
		return time.Time{}
	}
	return RenewAfter(i.chain[0])
}

// RenewAfter is the moment two thirds into a leaf's life. The backdating does
// not count as life.
func RenewAfter(leaf *x509.Certificate) time.Time {
	start := leaf.NotBefore.Add(Backdate)
	if !start.Before(leaf.NotAfter) {
		start = leaf.NotBefore
	}
	return start.Add(leaf.NotAfter.Sub(start) * 2 / 3)
}

// RenewalDue tells whether the leaf is to be renewed: two thirds of its life are
// over, or it has not begun, because it was made while the clock was ahead.
// Without a leaf it is due.
func (i *Identity) RenewalDue() bool {
	i.mu.RLock()
	defer i.mu.RUnlock()
	if i.chain == nil {
		return true
	}
	now := time.Now()
	return now.Before(i.chain[0].NotBefore) || !now.Before(RenewAfter(i.chain[0]))
}

// OutOfTime tells whether there is a leaf that is not good now, by our clock:
// its time is over, or has not begun.
func (i *Identity) OutOfTime() bool {
	i.mu.RLock()
	defer i.mu.RUnlock()
	if i.chain == nil {
		return false
	}
	now := time.Now()
	return now.Before(i.chain[0].NotBefore) || now.After(i.chain[0].NotAfter)
}

// Changed is closed at the next change of key, leaf, pin, roots or revocations.
func (i *Identity) Changed() <-chan struct{} {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.changed
}

// Pinned is the pinned root and trust domain; empty before the first Pin.
func (i *Identity) Pinned() (root wire.KeyHash, trustDomain string) {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.pin.Root, i.pin.TrustDomain
}

// Pin records the root that a join code names. A party that is enrolled keeps
// what it has: another trust domain or another root is refused.
func (i *Identity) Pin(root wire.KeyHash, trustDomain string) error {
	if _, err := wire.ParseKeyHash(string(root)); err != nil {
		return fmt.Errorf("pin: %w", err)
	}
	i.write.Lock()
	defer i.write.Unlock()
	i.mu.RLock()
	chain, old, known := i.chain, i.pin, i.trusts(root)
	td := i.trustDomain()
	i.mu.RUnlock()
	if chain != nil {
		switch {
		case td != trustDomain:
			return fmt.Errorf("join code: %w: it is for %s, this %s is enrolled in %s (a fresh SALLYPORT_DATA, or `sallyport local rejoin`, which sets %s aside, lets it enrol elsewhere)",
				ErrWrongTrustDomain, trustDomain, i.role, td, i.dir)
		case !known:
			return fmt.Errorf("join code: %w: it pins another root than those of %s that are trusted here (if this %s has missed the replacement of the root and is not renewed: stop it, set %s aside by `sallyport local rejoin`, and start it with a code made with --replace)",
				ErrWrongTrustDomain, td, i.role, i.dir)
		}
		return nil
	}
	p := pin{Root: root, TrustDomain: trustDomain}
	if p == old {
		return nil
	}
	if err := i.writePin(p); err != nil {
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.pin = p
	i.notify()
	return nil
}

func (i *Identity) writePin(p pin) error {
	b, err := json.Marshal(p)
	if err != nil {
		return err
	}
	return i.store.Write(filePin, b, 0o644)
}

// trusts tells whether a root with that key is pinned or trusted; mu is held.
func (i *Identity) trusts(root wire.KeyHash) bool {
	if i.pin.Root == root {
		return true
	}
	for _, r := range i.roots {
		if wire.KeyOf(r) == root {
			return true
		}
	}
	return false
}
