package pki

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// Files of a registration authority, beside root.pem, intermediate.pem and
// trust-domain: the leaf that seals documents, and its key.
const (
	fileDocument        = "documents.pem"
	fileDocumentKey     = "documents.key"
	fileDocumentKeyNext = "documents-next.key"
)

// material is what issues: the files of an authority of our own, or what the
// external CA says.
func (a *Authority) material(ctx context.Context) (m *material, made bool, err error) {
	_, err = os.Stat(filepath.Join(a.dir, fileDocument))
	registered := err == nil
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, false, err
	case a.ra == nil && registered:
		return nil, false, fmt.Errorf("%w: its certificates are issued elsewhere: set SALLYPORT_PKI_CA as it was", ErrExternal)
	case a.ra == nil:
		return loadOrMake(a.dir, a.keys)
	}
	if _, err := os.Stat(filepath.Join(a.dir, fileInterKey)); err == nil {
		return nil, false, fmt.Errorf("%w: the directory holds a CA of its own, and SALLYPORT_PKI_CA names another: an installation keeps its CA (a fresh SALLYPORT_DATA starts with the other)", ErrExternal)
	}
	held := &material{ledger: firstLedger()}
	if registered {
		if held.ledger, err = loadLedger(a.dir); err != nil {
			return nil, false, err
		}
		if err := held.loadCertificates(a.dir); err != nil {
			return nil, false, err
		}
	}
	if err := a.ra.pin(ctx, held.roots); err != nil {
		return nil, false, err
	}
	if !registered {
		held.roots = []rootCA{{held.ledger.Roots[0], a.ra.Root}}
	}
	if err := a.ra.start(held.roots); err != nil {
		return nil, false, err
	}
	if registered {
		m, err := a.loadRegistered()
		if errors.Is(err, errPair) {
			m, err = a.register(ctx, m.trustDomain, m.ledger)
		}
		if err != nil || time.Now().Before(identity.RenewAfter(m.document)) {
			return m, false, err
		}
		next, err := a.register(ctx, m.trustDomain, m.ledger)
		if err != nil && time.Now().Before(m.document.NotAfter) {
			a.log.WarnContext(ctx, "the external CA did not renew the certificate for documents; it is tried again", "error", err, "not_after", m.document.NotAfter)
			return m, false, nil
		}
		return next, false, err
	}
	td, err := a.ra.trustDomain(ctx)
	if err != nil {
		return nil, false, err
	}
	if err := writePEM(a.dir, fileRoot, a.ra.Root); err != nil {
		return nil, false, err
	}
	m, err = a.register(ctx, td, held.ledger)
	return m, err == nil, err
}

// intermediates asks the external CA for its intermediate, and what is beside
// it. Nothing of it is verified.
func (r *registrar) intermediates(ctx context.Context) ([]*x509.Certificate, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.URL+"/intermediates.pem", http.NoBody)
	if err != nil {
		return nil, err
	}
	resp, err := r.do(req)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrExternal, err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxSign))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrExternal, err)
	}
	chain, err := ParseChain(b)
	if err != nil || resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%w at %s does not say what its intermediate is (%s)", ErrExternal, r.URL, resp.Status)
	}
	return chain, nil
}

// trustDomain asks the external CA for its intermediate, which names it.
func (r *registrar) trustDomain(ctx context.Context) (string, error) {
	chain, err := r.intermediates(ctx)
	if err != nil {
		return "", err
	}
	for _, c := range chain {
		if isSPIFFEInter(c) && c.CheckSignatureFrom(r.Root) == nil {
			return c.URIs[0].Host, nil
		}
	}
	return "", fmt.Errorf("%w at %s: its intermediate is no SPIFFE intermediate below the root that is pinned (SALLYPORT_PKI_CA_ROOT_FILE, SALLYPORT_PKI_CA_FINGERPRINT): want exactly one URI name, spiffe:// and the trust domain (`sallyport ca csr` prints a request that asks for it)", ErrExternal, r.URL)
}

// register has a new leaf for documents issued, and writes down from which
// intermediate the external CA issues. The leaf is written after that, and the
// ledger, if it is another one, last.
func (a *Authority) register(ctx context.Context, td string, l *ledger) (*material, error) {
	key, err := a.keys.make(fileDocumentKeyNext)
	if err != nil {
		return nil, err
	}
	leaf, inters, err := a.ra.request(ctx, td, key)
	if err != nil {
		return nil, err
	}
	if of := inters[0].URIs[0].Host; of != td {
		return nil, fmt.Errorf("%w at %s: its intermediate is that of %s, this installation is %s", ErrExternal, a.ra.URL, of, td)
	}
	next, err := a.place(l, inters)
	if err != nil {
		return nil, err
	}
	if err := writeCerts(a.dir, numbered(fileInter, next.Issuing), inters); err != nil {
		return nil, err
	}
	if err := writeFile(a.dir, fileTrustDomain, []byte(td+"\n"), 0o600); err != nil {
		return nil, err
	}
	if err := os.Rename(filepath.Join(a.dir, fileDocumentKeyNext), filepath.Join(a.dir, fileDocumentKey)); err != nil {
		return nil, err
	}
	if err := writePEM(a.dir, fileDocument, leaf); err != nil {
		return nil, err
	}
	if next.Issuing != l.Issuing {
		if err := saveLedger(a.dir, next); err != nil {
			return nil, err
		}
	}
	return a.loadRegistered()
}

// errPair is what a crash between the files of a renewal leaves.
var errPair = errors.New("do not belong together")

// loadRegistered reads the files of a registration authority.
func (a *Authority) loadRegistered() (*material, error) {
	l, err := loadLedger(a.dir)
	if err != nil {
		return nil, err
	}
	return a.loadRegisteredAs(l)
}

func (a *Authority) loadRegisteredAs(l *ledger) (*material, error) {
	m := &material{ledger: l}
	err := m.loadCertificates(a.dir)
	if err != nil {
		return nil, err
	}
	if m.document, err = readCert(a.dir, fileDocument); err != nil {
		return nil, err
	}
	if m.interKey, err = a.keys.load(fileDocumentKey); err != nil {
		return nil, err
	}
	td, err := os.ReadFile(filepath.Join(a.dir, fileTrustDomain))
	if err != nil {
		return nil, err
	}
	m.trustDomain = strings.TrimSpace(string(td))
	if pub, ok := m.document.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(m.interKey.Public()) {
		return m, fmt.Errorf("%w: %s and %s %w", ErrExternal, fileDocument, fileDocumentKey, errPair)
	}
	if m.document.CheckSignatureFrom(m.inter) != nil {
		return m, fmt.Errorf("%w: %s and %s %w", ErrExternal, fileDocument, numbered(fileInter, m.ledger.Issuing), errPair)
	}
	return m, nil
}

// documentChain is the chain of what seals documents, without the root.
func (m *material) documentChain() [][]byte {
	if m.document == nil {
		return m.sealers()
	}
	return append([][]byte{m.document.Raw}, m.sealers()...)
}

func (a *Authority) keepNow(ctx context.Context) error {
	a.turning.Lock()
	defer a.turning.Unlock()
	m := a.mat()
	if a.ra.moved.Load() || !time.Now().Before(identity.RenewAfter(m.document)) {
		next, err := a.register(ctx, m.trustDomain, m.ledger)
		if err != nil {
			a.ra.wait(err)
			return err
		}
		if err := a.use(next); err != nil {
			return err
		}
		a.ra.moved.Store(false)
		a.ra.waits.Store(nil)
		a.log.InfoContext(ctx, "certificate for documents renewed", "not_after", next.document.NotAfter, "intermediate", wire.KeyOf(next.inter).Fingerprint())
	}
	return errors.Join(a.signTrust(), a.sealAgain(ctx))
}

// sealAgain has the revocation set in force sealed by the leaf for documents that is:
// newcomers could not verify it once the old leaf has ended. A crash or a full disk
// may have come between that leaf and this.
func (a *Authority) sealAgain(ctx context.Context) error {
	env, ok := a.Revocations()
	if !ok || slices.Equal(env.Chain[0], a.mat().documentChain()[0]) {
		return nil
	}
	var set wire.Revocations
	if err := json.Unmarshal(env.Payload, &set); err != nil {
		return err
	}
	after := set.Number
	set.Number++
	_, err := a.SignRevocations(ctx, set, after)
	return err
}
