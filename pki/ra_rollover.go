package pki

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// An external CA brings its new root itself. Nothing of it counts because that
// CA says so: an operator names the root by its fingerprint, the list of roots
// that has it is sealed below the old one, and its intermediate issues for us
// when the old root vouches for it too, so that parties that know only that one
// follow, or when every party has the list.

// raTrust is what is believed of an external CA.
type raTrust struct {
	roots []rootCA
	http  *http.Client // takes a server below a trusted root only
}

// believe makes roots those that the external CA is verified by.
func (r *registrar) believe(roots []rootCA) {
	pool := x509.NewCertPool()
	for _, c := range roots {
		if c.Retired.IsZero() {
			pool.AddCert(c.cert)
		}
	}
	old := r.trust.Swap(&raTrust{roots, &http.Client{
		Timeout:       raTime,
		Transport:     &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: pool}, MaxIdleConnsPerHost: 8, MaxConnsPerHost: 16, IdleConnTimeout: time.Minute, Proxy: http.ProxyFromEnvironment},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}})
	if old != nil {
		old.http.CloseIdleConnections()
	}
}

// above is the trusted root that signed an intermediate; nil if none did.
func (t *raTrust) above(inter *x509.Certificate) *rootCA {
	for i, r := range t.roots {
		if r.Retired.IsZero() && inter.CheckSignatureFrom(r.cert) == nil {
			return &t.roots[i]
		}
	}
	return nil
}

// do sends a request, and says what it means that no trusted root vouches for the
// server: the CA was given another root than the one that parties know.
func (r *registrar) do(req *http.Request) (*http.Response, error) {
	t := r.trust.Load()
	resp, err := t.http.Do(req)
	var shown *tls.CertificateVerificationError
	if !errors.As(err, &shown) || !errors.As(err, new(x509.UnknownAuthorityError)) {
		return resp, err
	}
	for _, root := range t.roots {
		if !root.Retired.IsZero() && slices.ContainsFunc(shown.UnverifiedCertificates, func(c *x509.Certificate) bool { return c.CheckSignatureFrom(root.cert) == nil }) {
			return resp, fmt.Errorf("%w (it is below root %d, which was given up at %s: have it issue below the one in use)", err, root.N, root.Retired.Format(time.RFC3339))
		}
	}
	return resp, fmt.Errorf("%w (is it the CA? its new root is named with `sallyport ca rotate root --fingerprint`, while it is still below the old one)", err)
}

// isSPIFFEInter tells whether the one name of a certificate is that of a trust
// domain.
func isSPIFFEInter(c *x509.Certificate) bool {
	return c.IsCA && len(c.URIs) == 1 && c.URIs[0].Scheme == "spiffe" && c.URIs[0].Path == ""
}

// bridges returns the intermediate that issues, the first, and what roots that
// still vouch have signed for its key. Others beside it are of no use to us.
func (r *registrar) bridges(inters []*x509.Certificate) ([]*x509.Certificate, error) {
	out := inters[:1:1]
	for _, c := range inters[1:] {
		if !bytes.Equal(c.RawSubjectPublicKeyInfo, inters[0].RawSubjectPublicKeyInfo) {
			return nil, errors.New("there is more than one intermediate in its chain; want one that the root signed itself, and behind it at most what other roots signed for the same key")
		}
		if !isSPIFFEInter(c) || c.URIs[0].Host != inters[0].URIs[0].Host {
			continue
		}
		for _, root := range r.trust.Load().roots {
			if root.vouches() && c.CheckSignatureFrom(root.cert) == nil && !slices.ContainsFunc(out, c.Equal) {
				out = append(out, c)
			}
		}
	}
	return out, nil
}

// place says where in the ledger an intermediate belongs: in the place of the
// one of its root, or beside it while the root is replaced.
func (a *Authority) place(l *ledger, inters []*x509.Certificate) (*ledger, error) {
	root := a.ra.trust.Load().above(inters[0])
	if root == nil {
		return nil, fmt.Errorf("%w at %s: the root of its intermediate is not trusted here", ErrExternal, a.ra.URL)
	}
	next := l.clone()
	at, last := 0, 0
	for _, r := range next.Intermediates {
		last = max(last, r.N)
		if r.Retired.IsZero() {
			if r.Root == root.N {
				at = r.N
			}
			continue
		}
		old, err := readCerts(a.dir, numbered(fileInter, r.N))
		if err != nil {
			return nil, err
		}
		if wire.KeyOf(old[0]) == wire.KeyOf(inters[0]) {
			return nil, fmt.Errorf("%w at %s issues from an intermediate that was given up at %s: no party takes its leaves; have it issue from another", ErrExternal, a.ra.URL, r.Retired.Format(time.RFC3339))
		}
	}
	if err := a.bridged(next, root.N, inters); err != nil {
		return nil, err
	}
	if at == 0 {
		at = last + 1
		next.Intermediates = append(next.Intermediates, interRecord{N: at, Root: root.N})
	}
	next.Issuing = at
	if next.Rollover != nil {
		next.Rollover.To = at
	}
	return next, nil
}

// bridged makes sure that an intermediate below a root that is new leaves
// nobody behind.
func (a *Authority) bridged(l *ledger, root int, inters []*x509.Certificate) error {
	r := l.Rollover
	if r == nil || r.Root == 0 || root != r.Root || r.Alone {
		return nil
	}
	for _, old := range a.ra.trust.Load().roots {
		if old.N == root || !old.Retired.IsZero() || slices.ContainsFunc(inters, func(c *x509.Certificate) bool { return c.CheckSignatureFrom(old.cert) == nil }) {
			continue
		}
		return fmt.Errorf("%w at %s issues below the new root, and the old one does not vouch for its intermediate (%s): parties that know the old root only would be lost. Have the old root sign a certificate for that intermediate's key too, and put it behind the intermediate in the file `crt` of step-ca; or, when `sallyport ca show` names nobody who is left, repeat `sallyport ca rotate root --fingerprint` with --without-cross", ErrExternal, a.ra.URL, wire.KeyOf(inters[0]).Fingerprint())
	}
	return nil
}

// wait keeps why an intermediate is not taken over, for those who ask.
func (r *registrar) wait(err error) {
	why := err.Error()
	r.waits.Store(&why)
}

func (r *registrar) why() string {
	if why := r.waits.Load(); why != nil {
		return *why
	}
	return "it is taken over within a minute"
}

// nameTick is how often it is tried whether an external CA that says that it
// issues from another intermediate, and did not, does so now.
const nameTick = time.Hour

// look asks whether the external CA issues from another intermediate now: the CRL
// that it makes is that one's, and whoever asks for the next leaf would be refused.
func (a *Authority) look(ctx context.Context) {
	m := a.mat()
	turning := m.ledger.Rollover != nil
	chain, err := a.ra.intermediates(ctx)
	switch {
	case err != nil && turning:
		a.log.WarnContext(ctx, "the external CA, whose root is being replaced, does not say from which intermediate it issues", "error", err)
	case err != nil: // it is noticed with the next leaf
	case turning:
		if !chain[0].Equal(m.inter) {
			a.ra.moved.Store(true)
		}
	case slices.ContainsFunc(chain, m.inter.Equal):
		a.ra.named = nil
	case isSPIFFEInter(chain[0]) && (!chain[0].Equal(a.ra.named) || time.Since(a.ra.tried) > nameTick):
		a.ra.named, a.ra.tried = chain[0], time.Now()
		a.ra.moved.Store(true)
	}
}

// Follow trusts a new root of an external CA beside the one in use. sum is the
// SHA-256 of its certificate, as an operator has it from whoever made it; the
// external CA hands the certificate out on a connection that the old root
// vouches for: neither that CA nor whoever asks us can bring in a root alone.
// The same root again changes whether its intermediate may issue alone, without
// the word of the old root.
func (a *Authority) Follow(ctx context.Context, sum []byte, alone bool, atLeast int64) (wire.CAState, error) {
	if a.ra == nil {
		return wire.CAState{}, fmt.Errorf("%w: there is no external CA here: `sallyport ca rotate root` makes a new root", ErrRollover)
	}
	return a.turn(func(m *material) (*ledger, error) {
		l := m.ledger.clone()
		if r := l.Rollover; r != nil {
			if held := sha256.Sum256(m.rootCA(r.Root).cert.Raw); !bytes.Equal(held[:], sum) {
				return nil, fmt.Errorf("%w: a rollover to the root with the fingerprint %x is under way since %s: finish or abort it first", ErrRollover, held, r.Since.Format(time.RFC3339))
			}
			r.Alone = alone
			return l, nil
		}
		if alone {
			return nil, fmt.Errorf("%w: name the root first, and let every party have the new list of roots; --without-cross is for then", ErrRollover)
		}
		root, err := a.ra.askRoot(ctx, a.ra.do, sum)
		if err != nil { // as text: it is not we who gave no answer
			kind := ErrExternal
			if errors.Is(err, errNoSuchRoot) { // to repeat it does not help
				kind = fmt.Errorf("%w: %w", ErrRollover, ErrExternal)
			}
			return nil, fmt.Errorf("%w at %s: its new root: %v (step-ca hands out the roots in `root` and `federatedRoots` of ca.json; it must still be below the old root)", kind, a.ra.URL, err) //nolint:errorlint // see above
		}
		n, err := a.trustNew(l, m, root)
		if err != nil {
			return nil, err
		}
		l.Rollover = &rollover{Kind: wire.RolloverRoot, From: l.Issuing, To: l.Issuing, Root: n, Since: time.Now().UTC()}
		return l, nil
	}, atLeast, func(wire.CAState) {
		a.log.WarnContext(ctx, "certificate authority: a new root of the external CA is trusted beside the old one", "sha256", fmt.Sprintf("%x", sum), "without_cross", alone)
	})
}

// trustNew puts a root into the ledger.
func (a *Authority) trustNew(l *ledger, m *material, root *x509.Certificate) (n int, err error) {
	now := time.Now()
	switch {
	case !root.IsCA || root.CheckSignatureFrom(root) != nil:
		err = errors.New("it did not sign itself as a CA")
	case now.Before(root.NotBefore):
		err = errors.New("it is not valid yet: look at the clocks of both hosts")
	case root.NotAfter.Before(now.Add(leastLife)):
		err = fmt.Errorf("it ends within %d days", int(leastLife.Hours()/24))
	default:
		err = identity.CheckRootKey(root.PublicKey)
	}
	if err != nil {
		return 0, fmt.Errorf("%w: the new root: %w", ErrRollover, err)
	}
	for _, r := range l.Roots {
		if have := m.rootCA(r.N).cert; wire.KeyOf(have) == wire.KeyOf(root) {
			return 0, fmt.Errorf("%w: the root's key is that of root %d of this installation: a new root has a new key", ErrRollover, r.N)
		}
		n = max(n, r.N)
	}
	l.forgetOne()
	n++
	l.Roots = append(l.Roots, rootRecord{N: n})
	return n, writePEM(a.dir, numbered(fileRoot, n), root)
}

// unfollow gives the new root up again. The external CA must issue below the old
// one: we cannot have it do so.
func (a *Authority) unfollow(ctx context.Context, atLeast int64) (wire.CAState, error) {
	return a.turn(func(m *material) (*ledger, error) {
		l := m.ledger.clone()
		r := l.Rollover
		if r == nil {
			return nil, errNone
		}
		if m.issuing().Root == r.Root {
			return nil, fmt.Errorf("%w: the external CA at %s issues below the new root: have it issue from the old intermediate again first; that is taken over within seconds", ErrRollover, a.ra.URL)
		}
		now, used := time.Now().UTC(), false
		for i := range l.Intermediates {
			if inter := &l.Intermediates[i]; inter.Root == r.Root && inter.Retired.IsZero() {
				inter.Retired, used = now, true
			}
		}
		if root := l.root(r.Root); used {
			root.Retired, root.Forgotten = now, true
		} else { // nothing hangs on it: it may be named again
			l.Roots = slices.DeleteFunc(l.Roots, func(c rootRecord) bool { return c.N == root.N })
		}
		l.Rollover = nil
		return l, nil
	}, atLeast, func(wire.CAState) {
		a.ra.waits.Store(nil)
		a.log.WarnContext(ctx, "certificate authority: the new root of the external CA is given up")
	})
}
