package pki

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.step.sm/crypto/x509util"
	"golang.org/x/crypto/ocsp"

	"sallyport/internal/doors"
	"sallyport/internal/wire"
)

// Files of the doors. The second intermediate is in doors-2.pem, doors-2.key
// and doors-cross-2.pem, and so on.
const (
	fileDoors      = "doors.pem" // the intermediate, what is above it, and its root
	fileDoorsKey   = "doors.key"
	fileDoorsCross = "doors-cross.pem" // certificates of the same key from other roots
	// fileDoorsLedger says which intermediates there are. Like fileIssuers it is
	// written last by every change. Without it there is only the first one.
	fileDoorsLedger = "doors.json"
)

const (
	// doorsRenew is how long before its end an intermediate is replaced.
	doorsRenew = 90 * 24 * time.Hour
	// doorsAfter is how long one that was replaced below the same root goes on
	// to be good: as long as the last leaf that it signed.
	doorsAfter = doors.Life + 4*24*time.Hour
)

// doorLedger is the content of fileDoorsLedger.
type doorLedger struct {
	Issuers []doorRecord `json:"issuers"`
	Issuing int          `json:"issuing"` // N of one of them
}

type doorRecord struct {
	N       int       `json:"n"`
	Root    int       `json:"root,omitempty"`   // N of the authority's root that signed it; 0: it was imported
	Until   time.Time `json:"until,omitzero"`   // it was replaced, and is retired then
	Retired time.Time `json:"retired,omitzero"` // nothing that it signed is good any more, and its key is deleted
}

func (l *doorLedger) record(n int) *doorRecord {
	for i := range l.Issuers {
		if l.Issuers[i].N == n {
			return &l.Issuers[i]
		}
	}
	return nil
}

func (l *doorLedger) next() (n int) {
	for _, r := range l.Issuers {
		n = max(n, r.N)
	}
	return n + 1
}

// doorCA is an intermediate of the doors that is in use.
type doorCA struct {
	doorRecord
	chain []*x509.Certificate // the intermediate first, the root last
	// shown goes with a leaf: the intermediate, what is above it without the
	// root, and its certificates from other roots. OpenSSL follows the first of
	// one name, so that while a rollover lasts that of the older root comes
	// first, whichever of them issues: clients that know the newer one know the
	// older one too, which is handed out with it.
	shown []*x509.Certificate
	key   crypto.Signer
}

// doorKeys holds the doors' issuers of an authority of this process. What is in
// force is replaced whole, never changed in place.
type doorKeys struct {
	a *Authority

	mu  sync.Mutex // one change at a time
	set atomic.Pointer[doorSet]
}

type doorSet struct {
	all     []doorCA // the one that issues first
	issuers *doorIssuers
}

// Doors opens the intermediate for other programs, or makes it when it is
// wanted for the first time. baseURL, if it is not empty, is where leaves say
// that their CRL and OCSP responder are.
func (a *Authority) Doors(ctx context.Context, baseURL string) (*Doors, error) {
	keys, err := a.openDoorKeys(ctx)
	if err != nil {
		return nil, err
	}
	d, err := openDoors(keys, baseURL)
	if err != nil {
		return nil, fmt.Errorf("doors in %s: %w", a.dir, err)
	}
	return d, nil
}

func (a *Authority) openDoorKeys(ctx context.Context) (*doorKeys, error) {
	a.turning.Lock() // no rollover meanwhile
	defer a.turning.Unlock()
	if k := a.doors.Load(); k != nil {
		return k, nil
	}
	k := &doorKeys{a: a}
	if err := k.follow(ctx); err != nil {
		return nil, fmt.Errorf("doors in %s: %w", a.dir, err)
	}
	inter := k.set.Load().all[0].chain[0]
	if err := doorsOver(inter); err != nil {
		a.log.ErrorContext(ctx, "the doors are open, and issue nothing", "error", err)
	} else if time.Until(inter.NotAfter) < 365*24*time.Hour {
		a.log.WarnContext(ctx, "the intermediate for other programs ends soon", "not_after", inter.NotAfter)
	}
	a.doors.Store(k)
	return k, nil
}

// keepDoors replaces the intermediate for other programs in time.
func (a *Authority) keepDoors(ctx context.Context) {
	a.turning.Lock()
	defer a.turning.Unlock()
	if k := a.doors.Load(); k != nil {
		if err := k.follow(ctx); err != nil {
			a.log.ErrorContext(ctx, "the intermediate for other programs is not looked after; it is tried again tomorrow", "error", err)
		}
	}
}

// follow makes the doors' issuers those that the authority's roots ask for: one
// below the root that issues, with the word of each other root that clients may
// know; what hangs on a root that was given up is given up too. It can be
// repeated. Without anything to issue from it fails; else what fails leaves what
// was.
func (k *doorKeys) follow(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	l, err := k.load()
	if err != nil {
		return err
	}
	m := k.a.mat()
	var gone []string
	changed := false
	if at, err := k.issueFrom(l, m); err != nil {
		if l.Issuing == 0 {
			return err
		}
		k.a.log.WarnContext(ctx, "the intermediate for other programs stays as it is", "error", err)
	} else if at != l.Issuing {
		k.replace(l, at)
		changed = true
	}
	for i := range l.Issuers {
		r := &l.Issuers[i]
		root := m.ledger.root(r.Root)
		if over := k.ended(*r) || r.Root != 0 && root != nil && !root.Retired.IsZero(); over && r.N != l.Issuing && r.Retired.IsZero() {
			r.Retired, changed = time.Now().UTC(), true
		}
		if !r.Retired.IsZero() { // also one whose key an interrupted follow left
			gone = append(gone, numbered(fileDoorsKey, r.N))
		}
	}
	if err := k.cross(l, m); err != nil {
		k.a.log.WarnContext(ctx, "clients that know another root only do not trust new certificates of the doors", "error", err)
	}
	if changed {
		b, err := json.MarshalIndent(l, "", "  ")
		if err != nil {
			return err
		}
		if err := writeFile(k.a.dir, fileDoorsLedger, append(b, '\n'), 0o600); err != nil {
			return err
		}
	}
	set, err := k.open(l, m)
	if err != nil {
		return err
	}
	k.set.Store(set)
	if changed {
		inter := set.all[0].chain[0]
		k.a.log.InfoContext(ctx, "intermediates for other programs", "issues", wire.KeyOf(inter).Fingerprint(), "root", wire.KeyOf(set.issuers.roots[0]).Fingerprint(), "in_use", len(set.all))
	}
	for _, name := range gone {
		if err := os.Remove(filepath.Join(k.a.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			k.a.log.WarnContext(ctx, "a key that is not needed any more was not deleted: delete it", "file", filepath.Join(k.a.dir, name), "error", err)
		}
	}
	return nil
}

// ended tells whether an intermediate that was replaced is of no use any more.
func (k *doorKeys) ended(r doorRecord) bool {
	if !r.Until.IsZero() && time.Now().After(r.Until) {
		return true
	}
	chain, err := k.readChain(r.N)
	return err == nil && time.Now().After(chain[0].NotAfter)
}

// load reads the ledger; Issuing is 0 where there is no intermediate yet.
func (k *doorKeys) load() (*doorLedger, error) {
	b, err := os.ReadFile(filepath.Join(k.a.dir, fileDoorsLedger))
	if err == nil {
		l := new(doorLedger)
		if err := json.Unmarshal(b, l); err != nil {
			return nil, damaged(fileDoorsLedger, err.Error())
		}
		if r := l.record(l.Issuing); r == nil || !r.Retired.IsZero() {
			return nil, damaged(fileDoorsLedger, "names no intermediate that issues")
		}
		return l, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	chain, err := k.readChain(1)
	if errors.Is(err, fs.ErrNotExist) {
		return &doorLedger{}, nil
	}
	if err != nil {
		return nil, err
	}
	first := doorRecord{N: 1}
	for _, r := range k.a.mat().roots {
		if r.cert.Equal(chain[len(chain)-1]) {
			first.Root = r.N
		}
	}
	return &doorLedger{Issuers: []doorRecord{first}, Issuing: 1}, nil
}

// issueFrom says which intermediate is to issue, and makes it if need be. One
// that was imported stays until another is.
func (k *doorKeys) issueFrom(l *doorLedger, m *material) (int, error) {
	root := m.issuing().Root
	if l.Issuing != 0 {
		chain, err := k.readChain(l.Issuing)
		if err != nil {
			return l.Issuing, nil //nolint:nilerr // open says it
		}
		now := l.record(l.Issuing)
		soon := time.Until(chain[0].NotAfter) < doorsRenew
		if now.Root == 0 || now.Root == root && !soon {
			return l.Issuing, nil
		}
		for _, r := range l.Issuers {
			if r.Root == root && r.Retired.IsZero() && !soon { // the rollover was turned round
				return r.N, nil
			}
		}
	}
	rootKey, err := k.a.keys.load(numbered(fileRootKey, root))
	if errors.Is(err, fs.ErrNotExist) || k.a.ra != nil {
		return 0, fmt.Errorf("the root's key, which signs the intermediate for other programs, is not here: run `sallyport ca csr --doors` on this host, have the request signed, and `sallyport ca import --doors`")
	}
	if err != nil {
		return 0, err
	}
	// A directory may hold the key of an attempt that came no further.
	n := l.next()
	key, err := k.a.keys.load(numbered(fileDoorsKey, n))
	if errors.Is(err, fs.ErrNotExist) {
		key, err = k.a.keys.make(numbered(fileDoorsKey, n))
	}
	if err != nil {
		return 0, err
	}
	rootCert := m.rootCA(root).cert
	inter, err := sign(doorsIntermediate(time.Now(), m.trustDomain, rootCert), rootCert, key.Public(), rootKey)
	if err != nil {
		return 0, err
	}
	if err := writeCerts(k.a.dir, numbered(fileDoors, n), []*x509.Certificate{inter, rootCert}); err != nil {
		return 0, err
	}
	l.Issuers = append(l.Issuers, doorRecord{N: n, Root: root})
	return n, nil
}

// replace makes another one issue. What it replaces goes on as long as its root
// does, and below the same root as long as its leaves.
func (k *doorKeys) replace(l *doorLedger, n int) {
	if old := l.record(l.Issuing); old != nil && old.Root == l.record(n).Root {
		old.Until = time.Now().Add(doorsAfter).UTC()
	}
	l.record(n).Until = time.Time{}
	l.Issuing = n
}

// cross has the roots that clients may know vouch for the intermediate that
// issues, as far as their keys are here.
func (k *doorKeys) cross(l *doorLedger, m *material) error {
	now := l.record(l.Issuing)
	if now.Root == 0 {
		return nil
	}
	chain, err := k.readChain(now.N)
	if err != nil {
		return err
	}
	name := numbered(fileDoorsCross, now.N)
	certs, err := k.readCross(now.N)
	if err != nil {
		return err
	}
	have := len(certs)
	for _, r := range m.roots {
		if r.N == now.Root || !r.vouches() || slices.ContainsFunc(certs, func(c *x509.Certificate) bool { return c.CheckSignatureFrom(r.cert) == nil }) {
			continue
		}
		rootKey, err := k.a.keys.keyOf(fileRootKey, r.N)
		if err != nil {
			if !r.Retired.IsZero() {
				continue
			}
			return err
		}
		c, err := sign(doorsIntermediate(time.Now(), m.trustDomain, r.cert), r.cert, chain[0].PublicKey, rootKey)
		if err != nil {
			return err
		}
		certs = append(certs, c)
	}
	if len(certs) == have {
		return nil
	}
	return writeCerts(k.a.dir, name, certs)
}

func (k *doorKeys) readCross(n int) ([]*x509.Certificate, error) {
	name := numbered(fileDoorsCross, n)
	if _, err := os.Stat(filepath.Join(k.a.dir, name)); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return readCerts(k.a.dir, name)
}

// doorsIntermediate is the template of the intermediate for other programs. It
// is no SPIFFE authority: it has no URI, and the constraints forbid whatever it
// signs a name inside the trust domain (RFC 5280, 4.2.1.10). Its leaves are
// for TLS only.
func doorsIntermediate(now time.Time, trustDomain string, root *x509.Certificate) *x509.Certificate {
	tmpl := issuer(now, interLife)
	if root != nil && tmpl.NotAfter.After(root.NotAfter) {
		tmpl.NotAfter = root.NotAfter
	}
	tmpl.Subject = pkix.Name{CommonName: "Sallyport doors intermediate", Organization: []string{trustDomain}}
	tmpl.MaxPathLenZero = true
	tmpl.KeyUsage |= x509.KeyUsageDigitalSignature // it signs OCSP responses itself
	tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	tmpl.PermittedDNSDomainsCritical = true
	tmpl.ExcludedDNSDomains = []string{trustDomain}
	tmpl.ExcludedURIDomains = []string{trustDomain, "." + trustDomain}
	return tmpl
}

// readChain reads the n-th intermediate with what is above it.
func (k *doorKeys) readChain(n int) ([]*x509.Certificate, error) {
	name := numbered(fileDoors, n)
	b, err := os.ReadFile(filepath.Join(k.a.dir, name))
	if err != nil {
		return nil, err
	}
	chain, err := ParseChain(b)
	if err != nil {
		return nil, damaged(name, err.Error())
	}
	if last := chain[len(chain)-1]; last.CheckSignatureFrom(last) != nil {
		chain = append(chain, k.a.mat().root)
	}
	return chain, nil
}

// open reads the intermediates that are in use.
func (k *doorKeys) open(l *doorLedger, m *material) (*doorSet, error) {
	set := &doorSet{}
	for _, r := range l.Issuers {
		if !r.Retired.IsZero() {
			continue
		}
		ca, err := k.openOne(r, m)
		if err != nil {
			return nil, err
		}
		if r.N == l.Issuing {
			set.all = slices.Insert(set.all, 0, ca)
		} else {
			set.all = append(set.all, ca)
		}
	}
	set.issuers = set.describe(m)
	if k.a.ra == nil { // else the SPIFFE intermediate's key is elsewhere, and so is its CRL
		for _, i := range m.inters {
			if i.Retired.IsZero() {
				set.issuers.status = append(set.issuers.status, i.certs[0])
			}
		}
	}
	set.issuers.status = append(set.issuers.status, set.issuers.doors...)
	return set, nil
}

func (k *doorKeys) openOne(r doorRecord, m *material) (ca doorCA, err error) {
	name, keyName := numbered(fileDoors, r.N), numbered(fileDoorsKey, r.N)
	ca.doorRecord = r
	if ca.chain, err = k.readChain(r.N); err != nil {
		return ca, err
	}
	if err := checkDoors(ca.chain, m.trustDomain); err != nil {
		return ca, fmt.Errorf("%s: %w", name, err)
	}
	if ca.key, err = k.a.keys.load(keyName); err != nil {
		return ca, err
	}
	if pub, ok := ca.chain[0].PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(ca.key.Public()) {
		return ca, damaged(keyName, "does not belong to "+name)
	}
	cross, err := k.readCross(r.N)
	if err != nil {
		return ca, err
	}
	var late []*x509.Certificate // from roots that are retired, or newer than its own
	for _, c := range cross {
		for _, root := range m.roots {
			switch {
			case !root.vouches() || c.CheckSignatureFrom(root.cert) != nil:
			case root.Retired.IsZero() && root.N < r.Root:
				ca.shown = append(ca.shown, c)
			default:
				late = append(late, c)
			}
		}
	}
	ca.shown = append(append(ca.shown, ca.chain[:len(ca.chain)-1]...), late...)
	return ca, nil
}

// checkDoors says what is wrong with an intermediate for other programs. The
// constraint that keeps names of parties out is insisted on, also where it was
// signed elsewhere.
func checkDoors(chain []*x509.Certificate, trustDomain string) error {
	if len(chain) < 2 {
		return errors.New("it is no chain of the intermediate, what is above it, and the root")
	}
	for i, c := range chain[:len(chain)-1] {
		if err := c.CheckSignatureFrom(chain[i+1]); err != nil {
			return fmt.Errorf("it is no chain: %q was not issued by %q", c.Subject.CommonName, chain[i+1].Subject.CommonName)
		}
	}
	inter := chain[0]
	excluded := slices.ContainsFunc(inter.ExcludedDNSDomains, func(name string) bool { return strings.TrimPrefix(name, ".") == trustDomain })
	switch {
	case len(inter.URIs) > 0:
		return errors.New("it is a SPIFFE intermediate, which must not certify other programs")
	case !inter.IsCA || !excluded:
		return fmt.Errorf("the intermediate must be a CA whose name constraints exclude the DNS names of %s", trustDomain)
	}
	return nil
}

// doorsOver says so when an intermediate for other programs has ended. The doors
// open all the same: they hand out what clients have to trust and who is revoked,
// and nobody else has to do without the gateway.
func doorsOver(inter *x509.Certificate) error {
	if time.Now().Before(inter.NotAfter) {
		return nil
	}
	return fmt.Errorf("the intermediate for other programs expired on %s, and certifies nothing any more (is the clock of this host right? `sallyport ca csr --doors` begins a new one)", inter.NotAfter.UTC().Format(time.RFC3339))
}

// describe says what clients have to know of a set.
func (s *doorSet) describe(m *material) *doorIssuers {
	i := &doorIssuers{chain: s.all[0].chain}
	addRoot := func(c *x509.Certificate) {
		if !slices.ContainsFunc(i.roots, c.Equal) {
			i.roots = append(i.roots, c)
		}
	}
	for _, ca := range s.all {
		i.doors = append(i.doors, ca.chain[0])
		i.inters = append(i.inters, ca.shown...)
		addRoot(ca.chain[len(ca.chain)-1])
	}
	for _, r := range m.roots { // of a rollover that is under way
		if r.Retired.IsZero() && s.all[0].Root != 0 {
			addRoot(r.cert)
		}
	}
	return i
}

func (k *doorKeys) trustDomain() string   { return k.a.mat().trustDomain }
func (k *doorKeys) issuers() *doorIssuers { return k.set.Load().issuers }

// certify signs a leaf, and returns it with the intermediates above it: also
// those of other roots, so that clients that know only one of them verify it.
func (k *doorKeys) certify(_ context.Context, r doorRequest) ([]*x509.Certificate, error) {
	if len(r.CSR) > doors.MaxCSR {
		return nil, fmt.Errorf("%w: the request is too large", doors.ErrRefused)
	}
	csr, err := x509.ParseCertificateRequest(r.CSR)
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", doors.ErrRefused, err)
	}
	ca := k.set.Load().all[0]
	tmpl, err := doorLeaf(k.trustDomain(), ca.chain[0], csr.PublicKey, r)
	if err != nil {
		return nil, err
	}
	leaf, err := x509util.CreateCertificate(tmpl, ca.chain[0], csr.PublicKey, ca.key)
	if err != nil {
		return nil, err
	}
	return append([]*x509.Certificate{leaf}, ca.shown...), nil
}

// signer finds the key of an issuer whose leaves' status is signed.
func (k *doorKeys) signer(issuer wire.KeyHash) (*x509.Certificate, crypto.Signer, error) {
	for _, ca := range k.set.Load().all {
		if issuer == wire.KeyOf(ca.chain[0]) {
			return ca.chain[0], ca.key, nil
		}
	}
	m := k.a.mat()
	for _, i := range m.inters {
		switch {
		case wire.KeyOf(i.certs[0]) != issuer || !i.Retired.IsZero() || k.a.ra != nil:
		case i.N == m.ledger.Issuing:
			return m.inter, m.interKey, nil
		default:
			key, err := k.a.keys.keyOf(fileInterKey, i.N)
			return i.certs[0], key, err
		}
	}
	return nil, nil, fmt.Errorf("no issuer with the key %s is here", issuer.Fingerprint())
}

// SignCRL signs a list of revoked leaves of one issuer.
func (k *doorKeys) SignCRL(_ context.Context, issuer wire.KeyHash, crl doors.CRL) ([]byte, error) {
	cert, key, err := k.signer(issuer)
	if err != nil {
		return nil, fmt.Errorf("sign CRL: %w", err)
	}
	tmpl := &x509.RevocationList{Number: crl.Number, ThisUpdate: crl.This, NextUpdate: crl.Next}
	for _, r := range crl.Revoked {
		tmpl.RevokedCertificateEntries = append(tmpl.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: r.Serial, RevocationTime: r.At, ReasonCode: r.Reason})
	}
	der, err := x509.CreateRevocationList(rand.Reader, tmpl, cert, key)
	if err != nil {
		return nil, fmt.Errorf("sign CRL of %s: %w", cert.Subject.CommonName, err)
	}
	return der, nil
}

// SignOCSP signs what is known of one leaf, as its issuer.
func (k *doorKeys) SignOCSP(_ context.Context, issuer wire.KeyHash, s doors.Status) ([]byte, error) {
	cert, key, err := k.signer(issuer)
	if err != nil {
		return nil, fmt.Errorf("sign OCSP response: %w", err)
	}
	tmpl := ocsp.Response{Status: ocsp.Good, SerialNumber: s.Serial, ThisUpdate: s.This, NextUpdate: s.Next, IssuerHash: s.Hash}
	if s.Revoked != nil {
		tmpl.Status, tmpl.RevokedAt, tmpl.RevocationReason = ocsp.Revoked, s.Revoked.At, s.Revoked.Reason
	}
	der, err := ocsp.CreateResponse(cert, cert, tmpl, key)
	if err == nil && s.Nonce != nil {
		der, err = withNonce(der, s.Nonce, key)
	}
	if err != nil {
		return nil, fmt.Errorf("sign OCSP response of %s: %w", cert.Subject.CommonName, err)
	}
	return der, nil
}
