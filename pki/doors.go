package pki

import (
	"context"
	"crypto/x509"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/smallstep/certificates/authority"
	"github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/smallstep/certificates/cas/apiv1"
	"github.com/smallstep/certificates/db"

	"sallyport/internal/doors"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// doorTime bounds one signature.
const doorTime = 20 * time.Second

// Doors issues certificates for other programs, from an intermediate that the
// channels do not trust. The keys are in this process ([Authority.Doors]) or in
// that of the authority ([Client.Doors]). It is safe for concurrent use.
type Doors struct {
	signer  doorSigner
	ca      *authority.Authority // smallstep's, which asks signer
	revoked *revocations
	urls    string
}

// doorSigner holds the keys of the doors' issuers.
type doorSigner interface {
	trustDomain() string
	issuers() *doorIssuers
	// certify decides on all that stands in a leaf but its key and its names,
	// and returns it with what is sent beside it.
	certify(ctx context.Context, r doorRequest) ([]*x509.Certificate, error)
	SignCRL(ctx context.Context, issuer wire.KeyHash, crl doors.CRL) ([]byte, error)
	SignOCSP(ctx context.Context, issuer wire.KeyHash, s doors.Status) ([]byte, error)
}

// doorRequest asks for one leaf.
type doorRequest struct {
	CSR       []byte       `json:"csr"`
	Names     []string     `json:"names,omitempty"`
	Addresses []netip.Addr `json:"addresses,omitempty"`
	NotAfter  time.Time    `json:"not_after,omitzero"`   // sooner than [doors.Life]
	StatusURL string       `json:"status_url,omitempty"` // where its CRL and OCSP responder are
}

// doorIssuers is what clients of the doors see of the authority.
type doorIssuers struct {
	doors  []*x509.Certificate // the intermediates in use; the one that issues first
	chain  []*x509.Certificate // of the one that issues, with its root
	inters []*x509.Certificate // to verify any of them by, also from other roots
	roots  []*x509.Certificate // to trust; that of the one that issues first
	status []*x509.Certificate // all whose leaves' status is signed
}

func openDoors(signer doorSigner, baseURL string) (*Doors, error) {
	d := &Doors{signer: signer, urls: strings.TrimSuffix(baseURL, "/")}
	noDB, err := db.New(nil) // what was issued stands in the gateway's database
	if err != nil {
		return nil, err
	}
	d.revoked = &revocations{AuthDB: noDB}
	d.ca, err = authority.NewEmbedded(
		authority.WithConfig(&config.Config{
			SkipValidation: true,
			CommonName:     "Sallyport doors",
			AuthorityConfig: &config.AuthConfig{
				DisableIssuedAtCheck: true,
				Backdate:             &provisioner.Duration{Duration: identity.Backdate},
			},
		}),
		authority.WithDatabase(d.revoked),
		authority.WithQuietInit(),
		authority.WithX509RootCerts(signer.issuers().roots[0]),
		authority.WithX509CAService(doorService{signer}),
		authority.WithX509Enforcers(provisioner.CertificateEnforcerFunc(d.enforce)),
	)
	return d, err
}

// Chain is the intermediate that issues, what is above it, and the root.
func (d *Doors) Chain() []*x509.Certificate { return d.signer.issuers().chain }

// Trust is what clients need to verify any leaf of the doors: while a rollover
// lasts, old and new.
func (d *Doors) Trust() (inters, roots []*x509.Certificate) {
	i := d.signer.issuers()
	return i.inters, i.roots
}

// Doors are the intermediates of the doors whose leaves are good; the one that
// issues comes first.
func (d *Doors) Doors() []*x509.Certificate { return d.signer.issuers().doors }

// Issuers are the intermediates whose leaves' status is signed here: the SPIFFE
// ones too, if their keys are.
func (d *Doors) Issuers() []*x509.Certificate { return d.signer.issuers().status }

// SignCRL signs a list of revoked leaves of one issuer.
func (d *Doors) SignCRL(ctx context.Context, issuer wire.KeyHash, crl doors.CRL) ([]byte, error) {
	return d.signer.SignCRL(ctx, issuer, crl)
}

// SignOCSP signs what is known of one leaf, as its issuer.
func (d *Doors) SignOCSP(ctx context.Context, issuer wire.KeyHash, s doors.Status) ([]byte, error) {
	return d.signer.SignOCSP(ctx, issuer, s)
}

// Issue makes a leaf with exactly the names of the request, and returns it
// with the chain up to, and without, the root.
func (d *Doors) Issue(ctx context.Context, r doors.Request) ([]*x509.Certificate, error) {
	chain, err := d.signer.certify(ctx, doorRequest{CSR: r.CSR, Names: r.Names, Addresses: r.Addresses, StatusURL: d.urls})
	if err != nil {
		return nil, fmt.Errorf("certify %v: %w", r.Names, err)
	}
	return chain, nil
}

// enforce replaces the template of a leaf whole, whichever door it leaves by,
// and keeps of it the key, the names, and an end that comes sooner. Whoever
// holds the keys decides the same again.
func (d *Doors) enforce(cert *x509.Certificate) error {
	leaf, err := doorLeaf(d.signer.trustDomain(), d.signer.issuers().doors[0], cert.PublicKey, requestOf(cert, d.urls))
	if err != nil {
		return err
	}
	if len(cert.URIs)+len(cert.EmailAddresses) > 0 {
		return fmt.Errorf("%w: it must have host names or addresses, and no others", doors.ErrRefused)
	}
	*cert = *leaf
	return nil
}

func requestOf(cert *x509.Certificate, statusURL string) doorRequest {
	r := doorRequest{Names: cert.DNSNames, NotAfter: cert.NotAfter, StatusURL: statusURL}
	for _, ip := range cert.IPAddresses {
		if a, ok := netip.AddrFromSlice(ip); ok {
			r.Addresses = append(r.Addresses, a.Unmap())
		}
	}
	return r
}

// doorService is where smallstep's authority has leaves signed.
type doorService struct{ signer doorSigner }

// CreateCertificate signs what enforce has left of a request.
func (s doorService) CreateCertificate(req *apiv1.CreateCertificateRequest) (*apiv1.CreateCertificateResponse, error) {
	ctx, cancel := context.WithTimeout(context.Background(), doorTime)
	defer cancel()
	r := requestOf(req.Template, statusURLOf(req.Template))
	r.CSR = req.CSR.Raw
	chain, err := s.signer.certify(ctx, r)
	if err != nil {
		return nil, err
	}
	return &apiv1.CreateCertificateResponse{Certificate: chain[0], CertificateChain: chain[1:]}, nil
}

// RenewCertificate is not used: renewals are new leaves.
func (doorService) RenewCertificate(*apiv1.RenewCertificateRequest) (*apiv1.RenewCertificateResponse, error) {
	return nil, fmt.Errorf("%w: renewal is a new leaf here", doors.ErrRefused)
}

// RevokeCertificate has nothing to do: the gateway's database says what is
// revoked.
func (doorService) RevokeCertificate(req *apiv1.RevokeCertificateRequest) (*apiv1.RevokeCertificateResponse, error) {
	return &apiv1.RevokeCertificateResponse{Certificate: req.Certificate}, nil
}

var _ doors.Authority = (*Doors)(nil)
