package pki

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smallstep/certificates/cas/apiv1"
	"go.step.sm/crypto/jose"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

const (
	raTime  = 20 * time.Second // one request to the external CA
	otpLife = 5 * time.Minute  // of the token that goes with it
	maxSign = 256 << 10        // its answer
)

// ErrExternal says that the external CA did not issue what was asked for.
var ErrExternal = errors.New("external CA")

// External is a step-ca for which the authority is a registration authority:
// the keys of root and intermediate are there.
type External struct {
	URL         string            // https://host:port
	Root        *x509.Certificate // nil: it is fetched by its fingerprint
	Fingerprint []byte            // SHA-256 of the root's certificate; nil: not given
	Provisioner string            // of type JWK
	KeyFile     string            // the provisioner's private key: JWK, encrypted JWK or PEM
	Password    []byte            // of the key file; nil: none
}

// WithExternal has leaves issued by an external step-ca.
func WithExternal(e External) Option { return func(a *Authority) { a.ra = &registrar{External: e} } }

// registrar asks the external CA. It is smallstep's seam for one.
type registrar struct {
	External

	signer jose.Signer
	trust  atomic.Pointer[raTrust]
	m      atomic.Pointer[material] // what issues, once it is known
	moved  atomic.Bool              // it issues from another intermediate now
	waits  atomic.Pointer[string]   // why that was not taken over
	named  *x509.Certificate        // the last that it said to issue from, and did not; used by Keep only, as is tried
	tried  time.Time                // when it was last asked for a leaf because of named

	trouble trouble

	telling sync.Mutex // held while it is told what is revoked
	lists   map[wire.KeyHash]*crlTold
}

// start reads the provisioner's key. It asks nobody. roots are those that were
// named until now.
func (r *registrar) start(roots []rootCA) error {
	if !r.Root.IsCA || r.Root.CheckSignatureFrom(r.Root) != nil {
		return fmt.Errorf("%w: the certificate of the root did not sign itself as a CA", ErrExternal)
	}
	r.believe(roots)
	var opts []jose.Option
	if r.Password != nil {
		opts = append(opts, jose.WithPassword(r.Password))
	} else { // it would ask on a terminal
		opts = append(opts, jose.WithPassword([]byte{0}))
	}
	text, err := os.ReadFile(r.KeyFile)
	if err != nil {
		return fmt.Errorf("%w: key of the provisioner: read SALLYPORT_PKI_CA_KEY_FILE: %w", ErrExternal, err)
	}
	jwk, err := jose.ParseKey(text, append(opts, jose.WithFilename(r.KeyFile))...)
	if err != nil {
		return fmt.Errorf("%w: key of the provisioner: %w (is SALLYPORT_PKI_CA_PASSWORD_FILE the right one?)", ErrExternal, err)
	}
	if jwk.KeyID == "" {
		if jwk.KeyID, err = jose.Thumbprint(jwk); err != nil {
			return fmt.Errorf("%w: key of the provisioner: %w", ErrExternal, err)
		}
	}
	alg := jose.SignatureAlgorithm(jwk.Algorithm)
	if alg == "" {
		alg = jose.ES256
	}
	so := new(jose.SignerOptions).WithType("JWT").WithHeader("kid", jwk.KeyID)
	if r.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jwk.Key}, so); err != nil {
		return fmt.Errorf("%w: key of the provisioner: %w", ErrExternal, err)
	}
	return nil
}

func (r *registrar) close() {
	if r == nil {
		return
	}
	if t := r.trust.Load(); t != nil {
		t.http.CloseIdleConnections()
	}
}

// signRequest and signAnswer of step-ca's /1.0/sign.
type (
	stepRequest struct {
		CSR       string    `json:"csr"`
		OTT       string    `json:"ott"`
		NotBefore time.Time `json:"notBefore"`
		NotAfter  time.Time `json:"notAfter"`
	}
	stepAnswer struct {
		Chain   []string `json:"certChain"`
		Message string   `json:"message"` // of a refusal
	}
)

// sign has one leaf issued, and returns it with the intermediate above it, and
// what other roots have signed for the key of that. What comes back must be what
// was asked for.
func (r *registrar) sign(ctx context.Context, tmpl *x509.Certificate, csr *x509.CertificateRequest) (leaf *x509.Certificate, inters []*x509.Certificate, err error) {
	ott, err := r.token(tmpl)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: token: %w", ErrExternal, err)
	}
	body, err := json.Marshal(stepRequest{
		CSR: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr.Raw})), OTT: ott,
		NotBefore: tmpl.NotBefore.UTC().Truncate(time.Second), NotAfter: tmpl.NotAfter.UTC().Truncate(time.Second),
	})
	if err != nil {
		return nil, nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.URL+"/1.0/sign", bytes.NewReader(body))
	if err != nil {
		return nil, nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	refused := false
	defer func() { r.met(ctx, err, refused) }()
	a, status, err := r.answer(req)
	if err != nil {
		refused = status >= http.StatusBadRequest && status < http.StatusInternalServerError && status != http.StatusUnauthorized
		return nil, nil, err
	}
	chain, err := ParseChain([]byte(strings.Join(a.Chain, "\n")))
	if err != nil || len(chain) < 2 || len(chain) > 1+wire.MaxRoots {
		return nil, nil, fmt.Errorf("%w at %s: its chain has %d certificates, want a leaf and the intermediate that its root signed: %v", ErrExternal, r.URL, len(chain), err) //nolint:errorlint // may be nil
	}
	if err := r.check(chain[0], chain[1], tmpl, csr); err != nil {
		return nil, nil, fmt.Errorf("%w at %s: %w", ErrExternal, r.URL, err)
	}
	if inters, err = r.bridges(chain[1:]); err != nil {
		return nil, nil, fmt.Errorf("%w at %s: %w", ErrExternal, r.URL, err)
	}
	return chain[0], inters, nil
}

// answer sends one request to sign; status is 0 without an answer.
func (r *registrar) answer(req *http.Request) (a stepAnswer, status int, err error) {
	resp, err := r.do(req)
	if err != nil {
		return a, 0, fmt.Errorf("%w: %w", ErrExternal, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if err := wire.DecodeJSON(resp.Body, maxSign, &a); err != nil {
		return a, resp.StatusCode, fmt.Errorf("%w at %s answers %s: %w", ErrExternal, r.URL, resp.Status, err)
	}
	if resp.StatusCode != http.StatusCreated && resp.StatusCode != http.StatusOK {
		return a, resp.StatusCode, fmt.Errorf("%w at %s refuses: %s (%s); its log says why", ErrExternal, r.URL, wire.Quotable(a.Message), resp.Status)
	}
	return a, resp.StatusCode, nil
}

// token proves to the external CA that we may ask for these names.
func (r *registrar) token(tmpl *x509.Certificate) (string, error) {
	names := slices.Clone(tmpl.DNSNames)
	for _, u := range tmpl.URIs {
		names = append(names, u.String())
	}
	subject := tmpl.Subject.CommonName
	if subject == "" {
		subject = names[0]
	}
	return r.claim(subject, "/1.0/sign", map[string]any{"sans": names})
}

// tokenID is that of a token: each is good once.
func tokenID() (string, error) {
	var id [32]byte
	_, err := rand.Read(id[:])
	return hex.EncodeToString(id[:]), err
}

// check compares a leaf with what was asked for: a template or a policy of the
// external CA may have changed it.
func (r *registrar) check(leaf, inter, tmpl *x509.Certificate, csr *x509.CertificateRequest) error {
	uris := func(c *x509.Certificate) (out []string) {
		for _, u := range c.URIs {
			out = append(out, u.String())
		}
		return out
	}
	same := func(a, b []string) bool {
		a, b = slices.Clone(a), slices.Clone(b)
		slices.Sort(a)
		slices.Sort(b)
		return slices.Equal(a, b)
	}
	pub, ok := csr.PublicKey.(*ecdsa.PublicKey)
	switch {
	case !ok || !pub.Equal(leaf.PublicKey):
		return errors.New("the leaf is for another key")
	case leaf.IsCA:
		return errors.New("the leaf is a CA")
	case !same(uris(leaf), uris(tmpl)) || !same(leaf.DNSNames, tmpl.DNSNames) || len(leaf.IPAddresses)+len(leaf.EmailAddresses) > 0:
		return fmt.Errorf("the leaf has the names %v %v, asked for were %v %v: look at the provisioner's template", leaf.DNSNames, uris(leaf), tmpl.DNSNames, uris(tmpl))
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return errors.New("the leaf may not sign: look at the provisioner's template")
	case leaf.NotAfter.After(tmpl.NotAfter.Add(time.Minute)) || leaf.NotAfter.Before(time.Now()):
		return fmt.Errorf("the leaf is good until %s, asked for was %s", leaf.NotAfter, tmpl.NotAfter)
	case leaf.CheckSignatureFrom(inter) != nil || r.trust.Load().above(inter) == nil:
		return errors.New("the chain does not lead to a root that is trusted here (has the CA a new one? name it: `sallyport ca rotate root --fingerprint`)")
	case !isSPIFFEInter(inter):
		return errors.New("its intermediate is no SPIFFE intermediate: want exactly one URI name, spiffe:// and the trust domain (`sallyport ca csr` prints a request that asks for it)")
	}
	for _, u := range tmpl.ExtKeyUsage {
		if !slices.Contains(leaf.ExtKeyUsage, u) {
			return errors.New("an extended key usage is missing in the leaf: look at the provisioner's template")
		}
	}
	return nil
}

// CreateCertificate is called by smallstep's authority to sign.
func (r *registrar) CreateCertificate(req *apiv1.CreateCertificateRequest) (*apiv1.CreateCertificateResponse, error) {
	ctx, cancel := context.WithTimeout(context.Background(), raTime)
	defer cancel()
	leaf, inters, err := r.sign(ctx, req.Template, req.CSR)
	if err != nil {
		return nil, err
	}
	m := r.m.Load()
	if !inters[0].Equal(m.inter) {
		r.moved.Store(true)
		return nil, fmt.Errorf("%w at %s issues from another intermediate now (%s): %s", ErrExternal, r.URL, wire.KeyOf(inters[0]).Fingerprint(), r.why())
	}
	if !slices.EqualFunc(m.vouched(inters), m.certs, (*x509.Certificate).Equal) { // other roots vouch for it now
		r.moved.Store(true)
	}
	return &apiv1.CreateCertificateResponse{Certificate: leaf, CertificateChain: inters[:1]}, nil
}

// RenewCertificate is not used: renewals are new leaves.
func (r *registrar) RenewCertificate(*apiv1.RenewCertificateRequest) (*apiv1.RenewCertificateResponse, error) {
	return nil, fmt.Errorf("%w: renewal is a new leaf here", ErrRefused)
}

// RevokeCertificate is not used: revocations are a document of the trust
// domain.
func (r *registrar) RevokeCertificate(*apiv1.RevokeCertificateRequest) (*apiv1.RevokeCertificateResponse, error) {
	return nil, fmt.Errorf("%w: revocations are a signed document here", ErrRefused)
}

// documentLeaf is the template of the leaf that seals documents: the
// intermediate's key is not ours.
func documentLeaf(td string) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		NotBefore: now.Add(-identity.Backdate), NotAfter: now.Add(LeafLife),
		KeyUsage: x509.KeyUsageDigitalSignature,
		DNSNames: []string{identity.DocumentName(td)}, URIs: []*url.URL{identity.DocumentURI(td)},
	}
}

// request asks for the leaf of a key that seals documents.
func (r *registrar) request(ctx context.Context, td string, key crypto.Signer) (leaf *x509.Certificate, inters []*x509.Certificate, err error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, nil, err
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, nil, err
	}
	return r.sign(ctx, documentLeaf(td), csr)
}
