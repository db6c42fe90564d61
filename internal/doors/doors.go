package doors

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"sallyport/internal/wire"
)

// Limits of what clients ask for.
const (
	MaxNames = 100      // of one certificate
	MaxCSR   = 64 << 10 // bytes, DER
)

// Life is how long a leaf of the doors lives, unless its client asks for less.
const Life = 30 * 24 * time.Hour

// ErrRefused says that a request asks for what is never issued.
var ErrRefused = errors.New("certificate is refused")

// Request asks for one leaf. The names are the gateway's word; of the CSR
// (PKCS #10, DER) only the public key counts, and the proof that its owner
// made it.
type Request struct {
	CSR       []byte
	Names     []string     // host names, in lower case
	Addresses []netip.Addr // IP addresses
}

// Revoked is one entry of a CRL.
type Revoked struct {
	Serial *big.Int
	At     time.Time
	Reason int // RFC 5280, 5.3.1
}

// CRL is what stands in a CRL beside its issuer.
type CRL struct {
	Number     *big.Int
	This, Next time.Time
	Revoked    []Revoked
}

// Status is what an OCSP response says of one certificate.
type Status struct {
	Serial     *big.Int
	Hash       crypto.Hash // names the issuer as the request does
	This, Next time.Time
	Revoked    *Revoked // nil: it is good
	Nonce      []byte   // of the request, to be repeated (RFC 9654); nil: it has none
}

// Authority is the certificate authority as the doors see it.
type Authority interface {
	// Chain is the intermediate that issues, what is above it, and the root.
	Chain() []*x509.Certificate
	// Trust is what clients need to verify any leaf of the doors: while a
	// rollover lasts, old and new.
	Trust() (inters, roots []*x509.Certificate)
	// Doors are the intermediates whose leaves are good, that which issues first.
	Doors() []*x509.Certificate
	// Issuers are all whose leaves' status is served: the SPIFFE ones too, if
	// their keys are at hand.
	Issuers() []*x509.Certificate
	// Issue returns the leaf and the chain that is sent with it, without root.
	Issue(ctx context.Context, r Request) ([]*x509.Certificate, error)
	// SignCRL and SignOCSP answer in DER.
	SignCRL(ctx context.Context, issuer wire.KeyHash, crl CRL) ([]byte, error)
	SignOCSP(ctx context.Context, issuer wire.KeyHash, s Status) ([]byte, error)
	// ACME makes the handler of the ACME door, for paths /acme/<side>/....
	ACME(c ACME) (http.Handler, error)
}

// IssuerName is what an issuer is called in URLs and tables.
func IssuerName(issuer *x509.Certificate) string { return KeyName(wire.KeyOf(issuer)) }

// KeyName is IssuerName by the issuer's key.
func KeyName(issuer wire.KeyHash) string { return string(issuer)[:16] }

// Serial is how serial numbers are written: lower-case hex.
func Serial(n *big.Int) string { return n.Text(16) }

// ParseSerial is the inverse of [Serial]. Colons and upper case, as other
// programs print serial numbers, are understood.
func ParseSerial(s string) (*big.Int, bool) {
	s = strings.ReplaceAll(s, ":", "")
	if s == "" || len(s) > 40 || strings.Trim(s, "0123456789abcdefABCDEF") != "" {
		return nil, false
	}
	return new(big.Int).SetString(s, 16)
}

// NamesOf are the names of a CSR: its DNS and IP SANs, and its common name if
// that is a host name or an address. Names of any other kind are refused, so
// that nobody takes a certificate that lacks them for one that has them.
func NamesOf(csr *x509.CertificateRequest) (names []string, addrs []netip.Addr, err error) {
	if len(csr.URIs)+len(csr.EmailAddresses) > 0 {
		return nil, nil, errors.New("URI and e-mail names are not certified here")
	}
	if len(csr.DNSNames)+len(csr.IPAddresses) > MaxNames {
		return nil, nil, errors.New("too many names")
	}
	seen := map[string]bool{}
	add := func(name string) error {
		if addr, err := netip.ParseAddr(name); err == nil {
			addr = addr.Unmap().WithZone("")
			if !seen[addr.String()] {
				seen[addr.String()] = true
				addrs = append(addrs, addr)
			}
			return nil
		}
		name = strings.ToLower(name)
		if !ValidHost(name) {
			return errors.New("\"" + wire.Quotable(name) + "\" is not a host name")
		}
		if !seen[name] {
			seen[name] = true
			names = append(names, name)
		}
		return nil
	}
	for _, n := range csr.DNSNames {
		if err := add(n); err != nil {
			return nil, nil, err
		}
	}
	for _, ip := range csr.IPAddresses {
		addr, ok := netip.AddrFromSlice(ip)
		if !ok {
			return nil, nil, errors.New("a broken IP address")
		}
		if err := add(addr.Unmap().String()); err != nil {
			return nil, nil, err
		}
	}
	if cn := csr.Subject.CommonName; cn != "" {
		if err := add(cn); err != nil {
			return nil, nil, err
		}
	}
	if len(names)+len(addrs) == 0 {
		return nil, nil, errors.New("it names no host")
	}
	return names, addrs, nil
}

// ValidHost tells whether s may stand as a host name in a certificate: letters,
// digits and hyphens in labels of at most 63, 253 in all (RFC 1123, 2.1).
// Wildcards are none: who answers for one host does not answer for all. Nor is
// an address, and nor is a name whose last label is a number.
func ValidHost(s string) bool {
	if s == "" || len(s) > 253 || s != strings.ToLower(s) || net.ParseIP(s) != nil {
		return false
	}
	labels := strings.Split(s, ".")
	for _, l := range labels {
		if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' || strings.Trim(l, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
			return false
		}
	}
	return strings.Trim(labels[len(labels)-1], "0123456789") != ""
}

// Kinds of ACME challenges (RFC 8555, 8.3; RFC 8737).
const (
	ChallengeHTTP = "http-01"
	ChallengeTLS  = "tls-alpn-01"
)

// Side is where the client of the ACME door is, and from where its challenges
// are looked at.
type Side struct {
	ID   string // orders and accounts belong to it, and to no other
	Name string // in the URL
	// Allow refuses a name, or an address, that clients of this side do not get.
	Allow func(ctx context.Context, name string) error
	// Dial connects to where a challenge of the kind is answered for a host.
	Dial func(ctx context.Context, kind, host string) (net.Conn, error)
}

// ErrNoValue says that a value is not there.
var ErrNoValue = errors.New("no such value")

// Values keeps what the ACME door knows of its clients.
type Values interface {
	Value(ctx context.Context, bucket, name string) ([]byte, error) // or ErrNoValue
	Values(ctx context.Context, bucket string) (map[string][]byte, error)
	// Swap writes a value if the one there is old; nil is none, and writing
	// it removes the value. If it is another, that is returned with false.
	Swap(ctx context.Context, bucket, name string, old, value []byte) ([]byte, bool, error)
}

// ACME is what the ACME door asks of the gateway.
type ACME struct {
	Values Values
	Side   func(req *http.Request, name string) (Side, error) // name is that in the URL
	// Record notes a leaf before it is handed out.
	Record func(ctx context.Context, side Side, leaf *x509.Certificate) error
	// Revoked and Revoke are about a leaf of the doors.
	Revoked func(ctx context.Context, serial *big.Int) (bool, error)
	Revoke  func(ctx context.Context, serial *big.Int, reason int) error
	// Failed is told why a client was answered with an error of ours, which the
	// answer does not say.
	Failed func(err error)
}
