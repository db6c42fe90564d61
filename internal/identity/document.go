package identity

import (
	"crypto/x509"
	"fmt"
	"net/url"
)

// A registration authority does not have the SPIFFE intermediate's key, and
// still has to seal documents (revocation sets): it does so with a leaf of that
// intermediate that can be had for nothing else. Its names are those of no
// party.

// DocumentURI is the one URI name of the leaf that seals documents.
func DocumentURI(trustDomain string) *url.URL {
	return &url.URL{Scheme: "spiffe", Host: trustDomain, Path: "/pki/documents"}
}

// DocumentName is its one DNS name.
func DocumentName(trustDomain string) string { return "documents.pki." + trustDomain }

// checkDocumentLeaf checks that certs, leaf first, is the chain of such a leaf:
// issued by a SPIFFE intermediate that one of roots vouches for.
func checkDocumentLeaf(certs []*x509.Certificate, trustDomain string, opts x509.VerifyOptions) error {
	leaf := certs[0]
	if len(leaf.DNSNames) != 1 || leaf.DNSNames[0] != DocumentName(trustDomain) || leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return fmt.Errorf("%w: not a leaf that may seal documents", ErrUntrusted)
	}
	opts.Intermediates = x509.NewCertPool()
	for _, c := range certs[1:] {
		opts.Intermediates.AddCert(c)
	}
	chains, err := leaf.Verify(opts)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUntrusted, err)
	}
	for _, chain := range chains {
		if len(chain) == 3 && isSPIFFECA(chain[1], trustDomain) {
			return nil
		}
	}
	return fmt.Errorf("%w: not issued by a SPIFFE intermediate of %s", ErrUntrusted, trustDomain)
}

// isDocumentLeaf tells whether a certificate claims to be one.
func isDocumentLeaf(c *x509.Certificate, trustDomain string) bool {
	return !c.IsCA && len(c.URIs) == 1 && c.URIs[0].String() == DocumentURI(trustDomain).String()
}
