package pki

import (
	"context"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/smallstep/certificates/authority/provisioner"

	"sallyport/internal/identity"
)

// issueServer makes the chain of the authority's own listener. It names no
// party: nobody else takes it for one.
func (a *Authority) issueServer(ctx context.Context, csr []byte) ([][]byte, error) {
	pub, _, err := identity.ParseCSR(csr)
	if err != nil {
		return nil, err
	}
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, err
	}
	sg, now := a.signer.Load(), time.Now()
	replace := provisioner.CertificateEnforcerFunc(func(cert *x509.Certificate) error {
		*cert = x509.Certificate{
			NotBefore:             now.Add(-identity.Backdate),
			NotAfter:              now.Add(identity.Backdate),
			KeyUsage:              x509.KeyUsageDigitalSignature,
			ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
			BasicConstraintsValid: true,
			DNSNames:              []string{serverName(sg.trustDomain)},
			PublicKey:             pub,
			PublicKeyAlgorithm:    x509.ECDSA,
		}
		return nil
	})
	chain, err := sg.ca.SignWithContext(ctx, req, provisioner.SignOptions{}, replace)
	if err != nil {
		return nil, fmt.Errorf("sign the certificate of the listener: %w", err)
	}
	return sg.chain(chain[0]), nil
}
