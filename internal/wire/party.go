package wire

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/google/uuid"
)

// Role says what a party is. It stands in the party's certificate.
type Role string

// The roles. PKI is only ever a local process; it holds no channel identity.
const (
	RoleGateway Role = "gateway"
	RoleRCP     Role = "rcp"
	RoleNode    Role = "node"
)

// ParseRole accepts exactly the three roles that a certificate can name.
func ParseRole(s string) (Role, error) {
	switch r := Role(s); r {
	case RoleGateway, RoleRCP, RoleNode:
		return r, nil
	}
	return "", fmt.Errorf("unknown role %q", s)
}

// ID is a party's UUID in its canonical lower-case form: made once by the
// party, kept across renames.
type ID string

// NewID makes a random (version 4) ID.
func NewID() ID { return ID(uuid.NewString()) }

// NewEventID makes an ID that begins with the time (version 7): the gateway
// keeps events by their ID too, and IDs that lie close together keep its index
// small in memory and cheap on disk.
func NewEventID() ID {
	if u, err := uuid.NewV7(); err == nil {
		return ID(u.String())
	}
	return NewID()
}

// ParseID accepts only the canonical 36 character form, so that one party has
// one spelling.
func ParseID(s string) (ID, error) {
	if len(s) != 36 {
		return "", fmt.Errorf("%q is not a UUID", Quotable(s))
	}
	u, err := uuid.Parse(s)
	if err != nil || u.String() != s {
		return "", fmt.Errorf("%q is not a UUID in canonical lower case", Quotable(s))
	}
	return ID(s), nil
}

// Short returns the first 8 hex digits, as tables and logs show them.
func (id ID) Short() string {
	if len(id) < 8 {
		return string(id)
	}
	return string(id[:8])
}

// Party names one party of one trust domain: what its certificate proves.
type Party struct {
	Role        Role   `json:"role"`
	ID          ID     `json:"id"`
	TrustDomain string `json:"trust_domain"`
}

// URI returns the SPIFFE ID, spiffe://<trust-domain>/<role>/<uuid>
// (SPIFFE-ID, section 2).
func (p Party) URI() *url.URL {
	return &url.URL{Scheme: "spiffe", Host: p.TrustDomain, Path: "/" + string(p.Role) + "/" + string(p.ID)}
}

// ServerName returns <uuid>.<role>.<trust-domain>, the DNS SAN that the
// standard library verifies and by which it keys session tickets.
func (p Party) ServerName() string {
	return string(p.ID) + "." + string(p.Role) + "." + p.TrustDomain
}

// DNSNames are the DNS SANs of every party's leaf: its own name, and the trust
// domain, the ServerName of a dialler that does not know yet who will answer.
// (The standard library insists on a name; which party it is, and that its role
// fits, is checked after that.)
func (p Party) DNSNames() []string { return []string{p.ServerName(), p.TrustDomain} }

func (p Party) String() string { return string(p.Role) + " " + string(p.ID) }

// ParsePartyURI is the inverse of [Party.URI]. It refuses everything that URI
// would not have written: ports, user info, queries, further path elements.
func ParsePartyURI(u *url.URL) (Party, error) {
	if u == nil {
		return Party{}, errors.New("no SPIFFE ID")
	}
	parts := strings.Split(u.Path, "/")
	if len(parts) != 3 || parts[0] != "" {
		return Party{}, fmt.Errorf("SPIFFE ID %q: want spiffe://<trust-domain>/<role>/<uuid>", Quotable(u.String()))
	}
	role, err := ParseRole(parts[1])
	if err != nil {
		return Party{}, fmt.Errorf("SPIFFE ID: %w", err)
	}
	id, err := ParseID(parts[2])
	if err != nil {
		return Party{}, fmt.Errorf("SPIFFE ID: %w", err)
	}
	p := Party{Role: role, ID: id, TrustDomain: u.Host}
	if u.Host == "" || p.URI().String() != u.String() {
		return Party{}, fmt.Errorf("SPIFFE ID %q is not canonical", Quotable(u.String()))
	}
	return p, nil
}

// TrustDomainSuffix ends every trust domain that was derived from a root key.
const TrustDomainSuffix = ".sallyport"

// DefaultTrustDomain derives the trust domain from a root certificate: the
// first 16 hex digits of its SPKI's SHA-256, and ".sallyport".
func DefaultTrustDomain(root *x509.Certificate) string {
	return KeyOf(root).TrustDomain()
}

// TrustDomain is the default trust domain of a root with this key.
func (k KeyHash) TrustDomain() string { return string(k[:16]) + TrustDomainSuffix }

// ValidTrustDomain tells whether a name may be that of a trust domain, and of
// a directory: it comes from join codes and files.
func ValidTrustDomain(td string) bool {
	return td != "" && len(td) <= 253 && !strings.HasPrefix(td, ".") && strings.Trim(td, "abcdefghijklmnopqrstuvwxyz0123456789.-") == ""
}

// KeyHash is the SHA-256 of a public key's DER SPKI in lower-case hex (64
// digits). It is the name of a party that has no certificate yet.
type KeyHash string

// KeyOf returns the hash of a certificate's public key.
func KeyOf(cert *x509.Certificate) KeyHash { return HashSPKI(cert.RawSubjectPublicKeyInfo) }

// HashSPKI returns the hash of a DER SubjectPublicKeyInfo.
func HashSPKI(spki []byte) KeyHash {
	sum := sha256.Sum256(spki)
	return KeyHash(hex.EncodeToString(sum[:]))
}

// ParseKeyHash accepts 64 lower-case hex digits.
func ParseKeyHash(s string) (KeyHash, error) {
	if b, err := hex.DecodeString(s); err != nil || len(b) != sha256.Size || s != strings.ToLower(s) {
		return "", fmt.Errorf("%q is not a key hash (64 lower-case hex digits)", Quotable(s))
	}
	return KeyHash(s), nil
}

// Fingerprint returns the form that people compare: "SHA256:" and the base64
// (with padding) of the same hash.
func (k KeyHash) Fingerprint() string {
	b, err := hex.DecodeString(string(k))
	if err != nil {
		return ""
	}
	return "SHA256:" + base64.StdEncoding.EncodeToString(b)
}

// ParseFingerprint reads what [KeyHash.Fingerprint] writes, and nothing else:
// fingerprints are compared as text too, and base64 has other texts for the
// same bytes, with line breaks or with other bits behind the last.
func ParseFingerprint(s string) (KeyHash, error) {
	text, ok := strings.CutPrefix(s, "SHA256:")
	b, err := base64.StdEncoding.DecodeString(text)
	k := KeyHash(hex.EncodeToString(b))
	if !ok || err != nil || len(b) != sha256.Size || k.Fingerprint() != s {
		return "", fmt.Errorf("%q is not a fingerprint (SHA256: and 44 characters)", Quotable(s))
	}
	return k, nil
}

// The authorities of the CONNECT requests that an RCP understands. They always
// carry port 443, which means nothing and which RFC 9110 section 9.3.6 demands.
const (
	connectPort   = ":443"
	pendingSuffix = ".pending"
)

// ConnectAuthority is the CONNECT target of a certified party.
func ConnectAuthority(id ID) string { return string(id) + connectPort }

// PendingAuthority is the CONNECT target of a party that waits for a certificate.
func PendingAuthority(k KeyHash) string { return string(k) + pendingSuffix + connectPort }

// ParseAuthority is the inverse of both: exactly one of id and key is set.
func ParseAuthority(authority string) (id ID, key KeyHash, err error) {
	name, ok := strings.CutSuffix(authority, connectPort)
	if !ok {
		return "", "", fmt.Errorf("CONNECT %q: want <uuid>:443 or <sha256-spki>.pending:443", Quotable(authority))
	}
	if k, ok := strings.CutSuffix(name, pendingSuffix); ok {
		key, err = ParseKeyHash(k)
		return "", key, err
	}
	id, err = ParseID(name)
	return id, "", err
}

// Quotable shortens text that came from a peer or a user before it goes into
// an error message or a log line.
func Quotable(s string) string {
	const limit = 80
	if len(s) > limit {
		return s[:limit] + "…"
	}
	return s
}
