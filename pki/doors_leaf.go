package pki

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"net"
	"net/url"
	"strings"
	"time"

	"sallyport/internal/doors"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

const (
	maxCommonName = 64 // ub-common-name, RFC 5280, appendix A
	maxStatusURL  = 512
	pathDoorOCSP  = "/ocsp"
)

// doorLeaf is the last word on every leaf of the doors: it has the names of the
// request, and nothing else that anybody asked for but an end that comes sooner.
func doorLeaf(trustDomain string, inter *x509.Certificate, pub any, r doorRequest) (*x509.Certificate, error) {
	if err := checkDoorKey(pub); err != nil {
		return nil, fmt.Errorf("%w: %w", doors.ErrRefused, err)
	}
	if n := len(r.Names) + len(r.Addresses); n == 0 || n > doors.MaxNames {
		return nil, fmt.Errorf("%w: it must have 1 to %d host names or addresses", doors.ErrRefused, doors.MaxNames)
	}
	for _, name := range r.Names {
		if !doors.ValidHost(name) {
			return nil, fmt.Errorf("%w: %q is not a host name", doors.ErrRefused, wire.Quotable(name))
		}
		if name == trustDomain || strings.HasSuffix(name, "."+trustDomain) {
			return nil, fmt.Errorf("%w: %q is a name of the trust domain", doors.ErrRefused, name)
		}
	}
	if err := doorsOver(inter); err != nil { // its leaves would have ended with it
		return nil, err
	}
	now := time.Now()
	end := now.Add(doors.Life)
	if !r.NotAfter.IsZero() && r.NotAfter.After(now) && r.NotAfter.Before(end) {
		end = r.NotAfter
	}
	if end.After(inter.NotAfter) {
		end = inter.NotAfter
	}
	leaf := &x509.Certificate{
		PublicKey: pub, DNSNames: r.Names, NotBefore: now.Add(-identity.Backdate), NotAfter: end,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	for _, a := range r.Addresses {
		if !a.IsValid() || a.Zone() != "" {
			return nil, fmt.Errorf("%w: a broken IP address", doors.ErrRefused)
		}
		leaf.IPAddresses = append(leaf.IPAddresses, net.IP(a.Unmap().AsSlice()))
	}
	if _, ok := pub.(*rsa.PublicKey); ok {
		leaf.KeyUsage |= x509.KeyUsageKeyEncipherment
	}
	if len(leaf.DNSNames) > 0 && len(leaf.DNSNames[0]) <= maxCommonName {
		leaf.Subject.CommonName = leaf.DNSNames[0]
	} else if len(leaf.DNSNames) == 0 {
		leaf.Subject.CommonName = leaf.IPAddresses[0].String()
	}
	if r.StatusURL == "" {
		return leaf, nil
	}
	if u, err := url.Parse(r.StatusURL); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || len(r.StatusURL) > maxStatusURL {
		return nil, fmt.Errorf("%w: %q is not where a CRL can be", doors.ErrRefused, wire.Quotable(r.StatusURL))
	}
	leaf.CRLDistributionPoints = []string{r.StatusURL + "/crl/" + doors.IssuerName(inter) + ".crl"}
	leaf.OCSPServer = []string{r.StatusURL + pathDoorOCSP}
	return leaf, nil
}

// statusURLOf is what doorLeaf made the status addresses of.
func statusURLOf(leaf *x509.Certificate) string {
	if len(leaf.OCSPServer) == 0 {
		return ""
	}
	return strings.TrimSuffix(leaf.OCSPServer[0], pathDoorOCSP)
}

// checkDoorKey takes the keys that other programs have.
func checkDoorKey(pub any) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if bits := k.Params().BitSize; bits < 256 {
			return fmt.Errorf("an ECDSA key of %d bits; want P-256, P-384 or P-521", bits)
		}
	case ed25519.PublicKey:
	case *rsa.PublicKey:
		if bits := k.N.BitLen(); bits < 2048 || bits > 4096 {
			return fmt.Errorf("an RSA key of %d bits; want 2048 to 4096", bits)
		}
	default:
		return fmt.Errorf("a key of type %T; want ECDSA, Ed25519 or RSA", pub)
	}
	return nil
}
