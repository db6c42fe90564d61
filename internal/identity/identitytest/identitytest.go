// Package identitytest is a small certificate authority in memory, for tests
// that need verified parties and not the real one.
package identitytest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// CA is a root and its SPIFFE intermediate.
type CA struct {
	TrustDomain string
	Root        *x509.Certificate
	Inter       *x509.Certificate

	rootKey, interKey *ecdsa.PrivateKey
}

// NewCA makes a CA with a trust domain of its own. Its certificates are valid
// from 96 h ago, by the clock of the caller (a synctest bubble has its own).
func NewCA(t testing.TB) *CA {
	t.Helper()
	c := &CA{rootKey: NewKey(t), interKey: NewKey(t)}
	tmpl := &x509.Certificate{
		SerialNumber:          serial(t),
		Subject:               pkix.Name{CommonName: "identitytest root"},
		NotBefore:             time.Now().Add(-96 * time.Hour),
		NotAfter:              time.Now().Add(10 * 365 * 24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	c.Root = Sign(t, tmpl, tmpl, &c.rootKey.PublicKey, c.rootKey)
	c.TrustDomain = wire.DefaultTrustDomain(c.Root)
	c.Inter = c.intermediate(t, &c.interKey.PublicKey, &url.URL{Scheme: "spiffe", Host: c.TrustDomain})
	return c
}

// Beside makes a CA below the same root, with a trust domain of its own.
func (c *CA) Beside(t testing.TB) *CA {
	t.Helper()
	o := &CA{TrustDomain: "beside." + c.TrustDomain, Root: c.Root, rootKey: c.rootKey, interKey: NewKey(t)}
	o.Inter = o.intermediate(t, &o.interKey.PublicKey, &url.URL{Scheme: "spiffe", Host: o.TrustDomain})
	return o
}

func (c *CA) intermediate(t testing.TB, pub *ecdsa.PublicKey, uris ...*url.URL) *x509.Certificate {
	t.Helper()
	return Sign(t, &x509.Certificate{
		SerialNumber:          serial(t),
		Subject:               pkix.Name{CommonName: "identitytest intermediate"},
		NotBefore:             time.Now().Add(-96 * time.Hour),
		NotAfter:              time.Now().Add(5 * 365 * 24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		URIs:                  uris,
	}, c.Root, pub, c.rootKey)
}

type options struct {
	id                  wire.ID
	name, tenant        string
	notBefore, notAfter time.Time
	other               bool
	role                wire.Role
	trustDomain         string
}

// Option changes a certificate that Issue makes.
type Option func(*options)

// NotAfter ends the leaf's life, perhaps in the past.
func NotAfter(t time.Time) Option { return func(o *options) { o.notAfter = t } }

// NotBefore begins it.
func NotBefore(t time.Time) Option { return func(o *options) { o.notBefore = t } }

// Name puts a node's name in the leaf.
func Name(name, tenant string) Option { return func(o *options) { o.name, o.tenant = name, tenant } }

// OtherIntermediate issues from an intermediate of the same root that is not
// the SPIFFE one.
func OtherIntermediate() Option { return func(o *options) { o.other = true } }

// As forges another role than that of the identity.
func As(role wire.Role) Option { return func(o *options) { o.role = role } }

// WithID forges another UUID than that of the identity.
func WithID(id wire.ID) Option { return func(o *options) { o.id = id } }

// InTrustDomain forges the trust domain of the leaf.
func InTrustDomain(td string) Option { return func(o *options) { o.trustDomain = td } }

// Party makes a certified identity in a directory of its own.
func (c *CA) Party(t testing.TB, role wire.Role, opts ...Option) *identity.Identity {
	t.Helper()
	id := c.Pending(t, role)
	c.Certify(t, id, opts...)
	return id
}

// Pending makes an identity that has this CA pinned and no certificate yet.
func (c *CA) Pending(t testing.TB, role wire.Role) *identity.Identity {
	t.Helper()
	id, err := identity.Open(t.TempDir(), role)
	if err != nil {
		t.Fatal(err)
	}
	if err := id.Pin(wire.KeyOf(c.Root), c.TrustDomain); err != nil {
		t.Fatal(err)
	}
	return id
}

// Expired makes an identity whose leaf ended an hour ago.
func (c *CA) Expired(t testing.TB, role wire.Role, opts ...Option) *identity.Identity {
	t.Helper()
	return c.Worn(t, c.Party(t, role, opts...), append(opts, NotAfter(time.Now().Add(-time.Hour)))...)
}

// Early makes an identity whose leaf begins in ten days, as one that was made
// while the clocks were ahead.
func (c *CA) Early(t testing.TB, role wire.Role, opts ...Option) *identity.Identity {
	t.Helper()
	return c.Worn(t, c.Party(t, role, opts...), append(opts, NotBefore(time.Now().Add(10*24*time.Hour)), NotAfter(time.Now().Add(43*24*time.Hour)))...)
}

// Worn is an identity with a leaf in its directory that no one installs now.
func (c *CA) Worn(t testing.TB, id *identity.Identity, opts ...Option) *identity.Identity {
	t.Helper()
	role := id.Role()
	var b bytes.Buffer
	for _, der := range c.Issue(t, id, opts...) {
		if err := pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
			t.Fatal(err)
		}
	}
	// Install would refuse it, as it should.
	if err := os.WriteFile(filepath.Join(id.Dir(), "chain.pem"), b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	id, err := identity.Open(id.Dir(), role)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// Certify installs a new leaf for the identity's key: the first one, or a
// renewal.
func (c *CA) Certify(t testing.TB, id *identity.Identity, opts ...Option) {
	t.Helper()
	if err := id.Install(c.Issue(t, id, opts...)); err != nil {
		t.Fatal(err)
	}
}

// Issue returns a chain (leaf, intermediate, root) for the identity's key.
func (c *CA) Issue(t testing.TB, id *identity.Identity, opts ...Option) [][]byte {
	t.Helper()
	der, err := id.CSR(false)
	if err != nil {
		t.Fatal(err)
	}
	pub, _, err := identity.ParseCSR(der)
	if err != nil {
		t.Fatal(err)
	}
	return c.IssueKey(t, wire.Party{Role: id.Role(), ID: id.ID(), TrustDomain: c.TrustDomain}, pub, opts...)
}

// IssueKey returns a chain for any party and key.
func (c *CA) IssueKey(t testing.TB, party wire.Party, pub *ecdsa.PublicKey, opts ...Option) [][]byte {
	t.Helper()
	now := time.Now()
	o := options{id: party.ID, role: party.Role, trustDomain: party.TrustDomain, notBefore: now.Add(-identity.Backdate), notAfter: now.Add(30 * 24 * time.Hour)}
	for _, f := range opts {
		f(&o)
	}
	party = wire.Party{Role: o.role, ID: o.id, TrustDomain: o.trustDomain}
	names := party.DNSNames()
	if o.name != "" {
		names = append(names, identity.NodeName(o.name, o.tenant, party.TrustDomain))
	}
	inter, key := c.Inter, c.interKey
	if o.other {
		key = NewKey(t)
		inter = c.intermediate(t, &key.PublicKey)
	}
	leaf := Sign(t, &x509.Certificate{
		SerialNumber: serial(t),
		Subject:      pkix.Name{CommonName: string(party.ID)},
		NotBefore:    o.notBefore,
		NotAfter:     o.notAfter,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs:         []*url.URL{party.URI()},
		DNSNames:     names,
	}, inter, pub, key)
	return [][]byte{leaf.Raw, inter.Raw, c.Root.Raw}
}

// Revoke returns a signed revocation set of the given number and keys.
func (c *CA) Revoke(t testing.TB, number int64, keys ...wire.KeyHash) wire.Envelope {
	t.Helper()
	set := wire.Revocations{TrustDomain: c.TrustDomain, Number: number, Issued: time.Now().UTC()}
	for _, k := range keys {
		set.Revoked = append(set.Revoked, wire.Revocation{Key: k, At: set.Issued})
	}
	return c.Seal(t, wire.TypeRevocations, set)
}

// NewKey makes a key as parties have one.
func NewKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func serial(t testing.TB) *big.Int {
	t.Helper()
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Sign makes a certificate of a template; by is the key of the parent.
func Sign(t testing.TB, tmpl, parent *x509.Certificate, pub any, by crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, by)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// Seal signs any document with the SPIFFE intermediate's key.
func (c *CA) Seal(t testing.TB, typ string, payload any) wire.Envelope {
	t.Helper()
	env, err := identity.Seal(c.interKey, [][]byte{c.Inter.Raw}, typ, payload)
	if err != nil {
		t.Fatal(err)
	}
	return env
}
