package pki

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smallstep/certificates/authority"
	"github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/authority/provisioner"
	_ "github.com/smallstep/certificates/cas/softcas" // signs with the intermediate's key
	"github.com/smallstep/certificates/db"
	_ "go.step.sm/crypto/kms/softkms" // keys in files

	"sallyport/internal/identity"
	"sallyport/internal/lockdir"
	"sallyport/internal/wire"
)

// Lives of leaves, counted from the moment of issue.
const (
	LeafLife    = 30 * 24 * time.Hour
	GatewayLife = 14 * 24 * time.Hour
)

// ErrRefused says that a request asks for what is never issued.
var ErrRefused = errors.New("certificate is refused")

// Authority issues leaves and signs revocation sets for one trust domain. It
// is safe for concurrent use.
type Authority struct {
	dir  string
	keys keyring
	ra   *registrar // nil: the keys are ours
	lock *lockdir.Lock
	log  *slog.Logger

	turning sync.Mutex // one change of issuers at a time; taken before mu
	signer  atomic.Pointer[signer]
	doors   atomic.Pointer[doorKeys] // once they are wanted

	mu      sync.Mutex
	former  []*authority.Authority // of issuers before; closed with us
	trust   *wire.Envelope
	trustNo int64
	highest int64
	env     *wire.Envelope
	revoked map[wire.KeyHash]struct{}
}

// signer is what issues at a time: the material, and smallstep's authority of
// the intermediate that issues.
type signer struct {
	*material
	ca *authority.Authority
}

// An Option changes what Open makes.
type Option func(*Authority)

// Open locks dir, and loads the authority in it or makes one in an empty
// directory. A second process gets lockdir.ErrLocked.
func Open(ctx context.Context, dir string, log *slog.Logger, opts ...Option) (*Authority, error) {
	if err := lockdir.Make(dir, 0o700); err != nil {
		return nil, fmt.Errorf("pki: %w (make it writable, or set SALLYPORT_DATA to a directory that is)", err)
	}
	lock, err := lockdir.Acquire(dir)
	if err != nil {
		return nil, fmt.Errorf("pki: %w", err)
	}
	a := &Authority{dir: dir, keys: keyring{dir: dir}, lock: lock, log: log}
	for _, o := range opts {
		o(a)
	}
	if err := a.open(ctx); err != nil {
		if errors.Is(err, ErrPassphrase) && a.keys.opensSome() {
			err = fmt.Errorf("%w, and it opens another key: a change of the passphrase was cut off, so run `sallyport ca passphrase NEW-FILE` again, with the former one in %s", err, varPassphrase)
		}
		a.keys.signer.close()
		a.ra.close()
		_ = lock.Release()
		return nil, fmt.Errorf("pki in %s: %w", dir, err)
	}
	return a, nil
}

func (a *Authority) open(ctx context.Context) error {
	m, made, err := a.material(ctx)
	if err != nil {
		return err
	}
	identity.WarnExposed(a.log, filepath.Join(a.dir, "*.key"))
	switch sealed, err := a.keys.seal(); {
	case err != nil:
		return err
	case len(sealed) > 0:
		a.log.InfoContext(ctx, "keys of the certificate authority are encrypted now; copies in older backups are not", "files", sealed)
	}
	if err := a.use(m); err != nil {
		return err
	}
	if err := a.loadRevocations(); err != nil {
		return err
	}
	if err := a.loadTrust(); err != nil {
		return err
	}
	if err := a.signTrust(); err != nil { // a crash came between a change and its document
		return err
	}
	a.deleteKeys(ctx)
	if made {
		did := "made a new certificate authority"
		if a.ra != nil {
			did = "registered with the external certificate authority"
		}
		a.log.InfoContext(ctx, did, "trust_domain", m.trustDomain, "root", wire.KeyOf(m.root).Fingerprint(), "dir", a.dir)
	}
	if err := a.over(); err != nil { // a way out begins here: the next one is imported into what is open
		a.log.ErrorContext(ctx, "the certificate authority certifies nothing", "error", err)
	} else if left := time.Until(m.inter.NotAfter); left < 365*24*time.Hour {
		a.log.WarnContext(ctx, "the SPIFFE intermediate ends soon", "not_after", m.inter.NotAfter)
	}
	return nil
}

// use makes a material the one that issues. What is being signed is finished
// by the one before.
func (a *Authority) use(m *material) error {
	noDB, err := db.New(nil) // what was issued stands in the gateway's database
	if err != nil {
		return err
	}
	signing := authority.WithX509Signer(m.inter, m.interKey)
	if a.ra != nil {
		a.ra.m.Store(m)
		a.ra.believe(m.roots)
		signing = authority.WithX509CAService(a.ra)
	}
	ca, err := authority.NewEmbedded(
		authority.WithConfig(&config.Config{
			SkipValidation: true, // it has no listener, and would ask for an address
			CommonName:     "Sallyport",
			AuthorityConfig: &config.AuthConfig{
				DisableIssuedAtCheck: true,
				Backdate:             &provisioner.Duration{Duration: identity.Backdate},
			},
		}),
		authority.WithDatabase(noDB),
		authority.WithQuietInit(),
		authority.WithX509RootCerts(m.root),
		signing,
	)
	if err != nil {
		return err
	}
	if old := a.signer.Swap(&signer{m, ca}); old != nil {
		a.mu.Lock()
		a.former = append(a.former, old.ca)
		a.mu.Unlock()
	}
	return nil
}

// mat is what the directory holds now. It changes with a rollover, never in
// place.
func (a *Authority) mat() *material { return a.signer.Load().material }

// Close gives the directory up.
func (a *Authority) Close() error {
	defer a.keys.signer.close()
	defer a.ra.close()
	errs := []error{a.signer.Load().ca.Shutdown()}
	for _, ca := range a.former {
		errs = append(errs, ca.Shutdown())
	}
	return errors.Join(append(errs, a.lock.Release())...)
}

// TrustDomain is the name that every identity of this authority carries.
func (a *Authority) TrustDomain() string { return a.mat().trustDomain }

// Root is the certificate whose key new join codes pin.
func (a *Authority) Root() *x509.Certificate { return a.mat().root }

// Issue makes the chain of a node or an RCP: the leaf, its intermediate as each
// root vouches for it, and the roots. It never makes a gateway, whoever asks.
func (a *Authority) Issue(ctx context.Context, r wire.IssueRequest) ([][]byte, error) {
	switch r.Party.Role {
	case wire.RoleNode:
		if r.Tenant == "" {
			r.Tenant = wire.DefaultTenant
		}
		if !wire.ValidName(r.Name) || !wire.ValidName(r.Tenant) {
			return nil, fmt.Errorf("%w: node name %q (tenant %q): want letters, digits, '.', '-' and '_', at most %d", ErrRefused, wire.Quotable(r.Name), wire.Quotable(r.Tenant), wire.MaxName)
		}
	case wire.RoleRCP:
	default:
		return nil, fmt.Errorf("%w: role %q is not issued on request", ErrRefused, wire.Quotable(string(r.Party.Role)))
	}
	return a.issue(ctx, r, LeafLife)
}

// IssueGateway makes the chain of a gateway. It is for the local operator of
// the authority and must not be put behind a listener.
func (a *Authority) IssueGateway(ctx context.Context, id wire.ID, csr []byte) ([][]byte, error) {
	return a.issue(ctx, wire.IssueRequest{
		Party: wire.Party{Role: wire.RoleGateway, ID: id, TrustDomain: a.mat().trustDomain},
		CSR:   csr,
	}, GatewayLife)
}

func (a *Authority) issue(ctx context.Context, r wire.IssueRequest, life time.Duration) ([][]byte, error) {
	if _, err := wire.ParsePartyURI(r.Party.URI()); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	sg := a.signer.Load()
	if r.Party.TrustDomain != sg.trustDomain {
		return nil, fmt.Errorf("%w: %s belongs to %q, this authority to %s", ErrRefused, r.Party, wire.Quotable(r.Party.TrustDomain), sg.trustDomain)
	}
	if err := a.over(); err != nil {
		return nil, err
	}
	csr, pub, key, err := identity.ReadCSR(r.CSR)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	if a.isRevoked(key) {
		return nil, fmt.Errorf("%w: %s: %w", ErrRefused, key.Fingerprint(), identity.ErrRevoked)
	}
	// The template is replaced whole, so that no name, extension or time
	// of the request can reach the certificate.
	leaf := sg.leaf(r, life)
	leaf.PublicKey, leaf.PublicKeyAlgorithm = pub, x509.ECDSA
	replace := provisioner.CertificateEnforcerFunc(func(cert *x509.Certificate) error {
		*cert = *leaf
		return nil
	})
	chain, err := sg.ca.SignWithContext(ctx, csr, provisioner.SignOptions{}, replace)
	if bad := (interface{ StatusCode() int })(nil); errors.As(err, &bad) && bad.StatusCode() == http.StatusBadRequest { // the signature of the request, above all
		err = fmt.Errorf("%w: %w", ErrRefused, err)
	}
	if err != nil {
		return nil, fmt.Errorf("sign certificate of %s: %w", r.Party, err)
	}
	return sg.chain(chain[0]), nil
}

// over says so when the intermediate that issues has ended: its leaves would have
// ended with it. An external CA decides that itself.
func (a *Authority) over() error {
	end := a.mat().inter.NotAfter
	if a.ra != nil || time.Now().Before(end) {
		return nil
	}
	return fmt.Errorf("the SPIFFE intermediate expired on %s, and certifies nothing any more (is the clock of this host right? `sallyport ca rotate intermediate` makes a new one; where the root's key is kept elsewhere, `sallyport ca csr` begins one)",
		end.UTC().Format(time.RFC3339))
}

func (m *material) leaf(r wire.IssueRequest, life time.Duration) *x509.Certificate {
	now := time.Now()
	leaf := &x509.Certificate{
		NotBefore:             now.Add(-identity.Backdate),
		NotAfter:              now.Add(life),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	if leaf.NotAfter.After(m.inter.NotAfter) {
		leaf.NotAfter = m.inter.NotAfter
	}
	leaf.Subject.CommonName = string(r.Party.ID)
	leaf.URIs = append(leaf.URIs, r.Party.URI())
	leaf.DNSNames = r.Party.DNSNames()
	if r.Party.Role == wire.RoleNode {
		leaf.DNSNames = append(leaf.DNSNames, identity.NodeName(r.Name, r.Tenant, m.trustDomain))
	}
	return leaf
}

func (a *Authority) isRevoked(key wire.KeyHash) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	_, bad := a.revoked[key]
	return bad
}

// hold takes a set that is on disk; mu is held or the authority is not shared yet.
func (a *Authority) hold(set wire.Revocations, env wire.Envelope) {
	a.highest, a.env = set.Number, &env
	a.revoked = make(map[wire.KeyHash]struct{}, len(set.Revoked))
	for _, r := range set.Revoked {
		a.revoked[r.Key] = struct{}{}
	}
}

// SignRevocations signs a set whose number is above every one signed before,
// and keeps it on disk. Trust domain and time are filled in. after is the number
// of the last set that was signed, as far as the caller knows, whose keys are in
// this one too: one that another signed since would be lost, and is ErrOlder.
func (a *Authority) SignRevocations(_ context.Context, set wire.Revocations, after int64) (wire.Envelope, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if after < a.highest {
		return wire.Envelope{}, fmt.Errorf("sign revocations: %w: another had number %d signed meanwhile, this set follows number %d", identity.ErrOlder, a.highest, after)
	}
	if set.Number <= a.highest {
		return wire.Envelope{}, fmt.Errorf("sign revocations: %w: number %d was signed already, want more than %d", identity.ErrOlder, set.Number, a.highest)
	}
	m := a.mat()
	set.TrustDomain, set.Issued = m.trustDomain, time.Now().UTC()
	env, err := identity.Seal(m.interKey, m.documentChain(), wire.TypeRevocations, set)
	if err != nil {
		return wire.Envelope{}, err
	}
	b, err := json.Marshal(env)
	if err != nil {
		return wire.Envelope{}, err
	}
	if len(b) > wire.MaxRevocations {
		return wire.Envelope{}, fmt.Errorf("sign revocations: %w: %d keys", wire.ErrTooLarge, len(set.Revoked))
	}
	if err := writeFile(a.dir, fileRevocations, b, 0o600); err != nil {
		return wire.Envelope{}, fmt.Errorf("sign revocations: %w", err)
	}
	a.hold(set, env)
	return env, nil
}

// Revocations is the highest set that was signed; false before the first.
func (a *Authority) Revocations() (wire.Envelope, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.env == nil {
		return wire.Envelope{}, false
	}
	return *a.env, true
}

func (a *Authority) loadRevocations() error {
	env, issued, err := readDocument(a.dir, fileRevocations)
	if err != nil || env == nil {
		return err
	}
	// It was signed here; its intermediate may have ended since.
	set, err := identity.VerifyRevocations(*env, a.mat().everyRoot(), a.mat().trustDomain, issued)
	if err != nil {
		return damaged(fileRevocations, err.Error())
	}
	a.hold(set, *env)
	return nil
}
