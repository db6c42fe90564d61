package pki

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"time"

	"sallyport/internal/wire"
)

// rootTime bounds the request for a root, maxRoot its answer.
const (
	rootTime = 20 * time.Second
	maxRoot  = 64 << 10
)

// pin finds the root of the external CA where only its fingerprint is known:
// among those that are held, or at the first start from the CA itself. An
// installation keeps the root that it began with, and those that were named
// since: the setting may name any of them.
func (r *registrar) pin(ctx context.Context, held []rootCA) error {
	if r.Root != nil {
		if sum := sha256.Sum256(r.Root.Raw); r.Fingerprint != nil && !bytes.Equal(sum[:], r.Fingerprint) {
			return fmt.Errorf("%w: the root in SALLYPORT_PKI_CA_ROOT_FILE has the fingerprint %x, SALLYPORT_PKI_CA_FINGERPRINT is another", ErrExternal, sum)
		}
	}
	for _, h := range held {
		if sum := sha256.Sum256(h.cert.Raw); r.Root != nil && r.Root.Equal(h.cert) || bytes.Equal(sum[:], r.Fingerprint) {
			r.Root = h.cert
			return nil
		}
	}
	switch {
	case len(held) > 0:
		return fmt.Errorf("%w: SALLYPORT_PKI_CA_ROOT_FILE or SALLYPORT_PKI_CA_FINGERPRINT names none of the roots of this installation; a new root is named with `sallyport ca rotate root --fingerprint`, while everything runs", ErrExternal)
	case r.Root != nil:
		return nil
	}
	root, err := r.fetchRoot(ctx)
	if err != nil {
		return fmt.Errorf("%w at %s: its root: %w", ErrExternal, r.URL, err)
	}
	r.Root = root
	return nil
}

// fetchRoot asks for the root of the setting before any is known.
func (r *registrar) fetchRoot(ctx context.Context) (*x509.Certificate, error) {
	client := &http.Client{
		Timeout: rootTime,
		Transport: &http.Transport{
			// No root is known yet that could verify the server. What it says
			// is compared with the fingerprint, and nothing is told to it.
			TLSClientConfig:   &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: true}, //nolint:gosec // see above
			Proxy:             http.ProxyFromEnvironment,
			DisableKeepAlives: true, MaxResponseHeaderBytes: wire.MaxHeader,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return r.askRoot(ctx, client.Do, r.Fingerprint)
}

// errNoSuchRoot says that an external CA has no root with a fingerprint.
var errNoSuchRoot = errors.New("it knows none")

// askRoot asks for the certificate with a fingerprint, as `step ca root` does.
// Whoever answers cannot choose it: it is the SHA-256 of the answer.
func (r *registrar) askRoot(ctx context.Context, do func(*http.Request) (*http.Response, error), want []byte) (*x509.Certificate, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.URL+"/root/"+hex.EncodeToString(want), http.NoBody)
	if err != nil {
		return nil, err
	}
	resp, err := do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode == http.StatusNotFound {
		return nil, fmt.Errorf("%w with the fingerprint %x", errNoSuchRoot, want)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("asked for the one with the fingerprint %x it answers %s", want, resp.Status)
	}
	var answer struct {
		CA string `json:"ca"`
	}
	if err := wire.DecodeJSON(resp.Body, maxRoot, &answer); err != nil {
		return nil, err
	}
	block, _ := pem.Decode([]byte(answer.CA))
	if block == nil {
		return nil, fmt.Errorf("%w: it answers without a certificate", wire.ErrMalformed)
	}
	if sum := sha256.Sum256(block.Bytes); !bytes.Equal(sum[:], want) {
		return nil, fmt.Errorf("it answers with another one, %x: is this the CA, or somebody between?", sum)
	}
	return x509.ParseCertificate(block.Bytes)
}
