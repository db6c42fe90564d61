package pki

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// fileTrust is the newest signed trust document; there is none before the
// first change of roots.
const fileTrust = "trust.json"

// ErrRollover says that a change of issuers does not fit what is under way.
var ErrRollover = wire.ErrRollover

// State says which issuers there are, and what is under way.
func (a *Authority) State() wire.CAState {
	m := a.mat()
	a.mu.Lock()
	defer a.mu.Unlock()
	s := m.state(a.trustNo)
	if key, ok := a.signerOf(); ok {
		s.Signer = key.client.socket
		s.Problem, s.Since = key.client.trouble.problem()
	}
	if a.ra != nil {
		s.External = a.ra.URL
		s.Problem, s.Since = a.ra.trouble.problem()
		if why := a.ra.waits.Load(); why != nil && s.Rollover != nil {
			s.Rollover.Waits = *why
		}
	}
	return s
}

// Trust is the newest trust document; false before the first change of roots.
func (a *Authority) Trust() (wire.Envelope, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.trust == nil {
		return wire.Envelope{}, false
	}
	return *a.trust, true
}

// Rotate makes a new intermediate, for [wire.RolloverRoot] below a new root,
// that issues from now on. Each trusted root vouches for each intermediate that
// is in use, so that no party needs anything new to go on. What is replaced
// stays trusted until Finish. The number of a trust document that follows is
// above atLeast, the highest that was seen elsewhere.
func (a *Authority) Rotate(ctx context.Context, kind string, atLeast int64) (wire.CAState, error) {
	if a.ra != nil {
		return wire.CAState{}, fmt.Errorf("%w: its issuers are those of the external CA at %s: change them there (a new intermediate is taken over by itself; a new root is named with `sallyport ca rotate root --fingerprint`)", ErrRollover, a.ra.URL)
	}
	return a.turn(func(m *material) (*ledger, error) {
		l := m.ledger.clone()
		if l.Rollover != nil {
			return nil, fmt.Errorf("%w: a rollover of the %s is under way since %s: finish or abort it first", ErrRollover, l.Rollover.Kind, l.Rollover.Since.Format(time.RFC3339))
		}
		now := time.Now()
		n := 1
		for _, r := range l.Intermediates {
			n = max(n, r.N+1)
		}
		old := m.issuing()
		l.Rollover = &rollover{Kind: kind, From: old.N, To: n, Since: now.UTC()}
		root := old.Root
		var err error
		switch kind {
		case wire.RolloverRoot:
			root, err = a.addRoot(m, l, now)
		case wire.RolloverIntermediate:
		default:
			err = fmt.Errorf("%w: %q cannot be rotated: want %s or %s", ErrRollover, kind, wire.RolloverIntermediate, wire.RolloverRoot)
		}
		if err != nil {
			return nil, err
		}
		if err := a.addIntermediate(l, n, root, now, m.trustDomain); err != nil {
			return nil, err
		}
		l.Intermediates = append(l.Intermediates, interRecord{N: n, Root: root})
		l.Issuing = n
		return l, nil
	}, atLeast, func(s wire.CAState) {
		a.log.InfoContext(ctx, "certificate authority: a new intermediate issues", "rollover", kind, "intermediate", s.Issuing().Key.Fingerprint(), "root", wire.KeyOf(a.Root()).Fingerprint())
	})
}

// addRoot makes the next root, and has it vouch for the intermediate that
// issued until now.
func (a *Authority) addRoot(m *material, l *ledger, now time.Time) (n int, err error) {
	n = 1
	for _, r := range l.Roots {
		n = max(n, r.N+1)
	}
	l.forgetOne()
	old := m.issuing()
	if _, err := a.keys.keyOf(fileRootKey, old.Root); err != nil { // it is to vouch for the new intermediate
		return 0, fmt.Errorf("rotate the root: %w", err)
	}
	key, err := a.keys.make(numbered(fileRootKey, n))
	if err != nil {
		return 0, err
	}
	root, err := signRoot(now, n, key)
	if err != nil {
		return 0, err
	}
	if err := writePEM(a.dir, numbered(fileRoot, n), root); err != nil {
		return 0, err
	}
	tmpl := spiffeIntermediate(now, m.trustDomain)
	tmpl.NotAfter = old.certs[0].NotAfter
	cross, err := sign(tmpl, root, old.certs[0].PublicKey, key)
	if err != nil {
		return 0, err
	}
	l.Roots = append(l.Roots, rootRecord{N: n})
	return n, writeCerts(a.dir, numbered(fileInter, old.N), append(m.vouched(old.certs), cross))
}

// addIntermediate makes the n-th intermediate below a root, and has the other
// roots that parties may know vouch for it.
func (a *Authority) addIntermediate(l *ledger, n, root int, now time.Time, trustDomain string) error {
	key, err := a.keys.make(numbered(fileInterKey, n))
	if err != nil {
		return err
	}
	var certs []*x509.Certificate
	for _, r := range l.Roots {
		if !r.vouches() {
			continue
		}
		rootKey, err := a.keys.keyOf(fileRootKey, r.N)
		if err != nil {
			if !r.Retired.IsZero() {
				continue
			}
			return fmt.Errorf("sign a new intermediate: %w", err)
		}
		cert, err := readCert(a.dir, numbered(fileRoot, r.N))
		if err != nil {
			return err
		}
		tmpl := spiffeIntermediate(now, trustDomain)
		if tmpl.NotAfter.After(cert.NotAfter) {
			tmpl.NotAfter = cert.NotAfter
		}
		c, err := sign(tmpl, cert, key.Public(), rootKey)
		if err != nil {
			return err
		}
		if r.N == root {
			certs = append([]*x509.Certificate{c}, certs...)
		} else {
			certs = append(certs, c)
		}
	}
	return writeCerts(a.dir, numbered(fileInter, n), certs)
}

// Abort turns a rollover round: the intermediate that was to be replaced
// issues again, and what replaced it is given up by Finish.
func (a *Authority) Abort(ctx context.Context, atLeast int64) (wire.CAState, error) {
	if a.ra != nil {
		return a.unfollow(ctx, atLeast)
	}
	return a.turn(func(m *material) (*ledger, error) {
		l := m.ledger.clone()
		r := l.Rollover
		if r == nil {
			return nil, errNone
		}
		r.From, r.To, r.Aborted, r.Since = r.To, r.From, !r.Aborted, time.Now().UTC()
		l.Issuing = r.To
		return l, nil
	}, atLeast, func(s wire.CAState) {
		a.log.WarnContext(ctx, "certificate authority: rollover turned round", "rollover", s.Rollover.Kind, "issues", s.Rollover.To.Fingerprint())
	})
}

var errNone = fmt.Errorf("%w: no rollover is under way", ErrRollover)

// Finish ends a rollover: what was replaced is trusted no longer, and the
// intermediate's key is deleted. A root that was replaced still vouches, for a
// year, for the one that issues, so that parties that were away can be given a
// new leaf; with forget it does not.
func (a *Authority) Finish(ctx context.Context, forget bool, atLeast int64) (wire.CAState, error) {
	s, err := a.turn(func(m *material) (*ledger, error) {
		l := m.ledger.clone()
		r := l.Rollover
		if r == nil {
			return nil, errNone
		}
		if r.Root != 0 && l.inter(l.Issuing).Root != r.Root {
			return nil, fmt.Errorf("%w: the external CA at %s still issues below the old root: have it issue below the new one first, or `sallyport ca abort`", ErrRollover, a.ra.URL)
		}
		now := time.Now().UTC()
		from, to := l.inter(r.From), l.inter(r.To)
		from.Retired, l.Rollover = now, nil
		if from.Root != to.Root {
			root := l.root(from.Root)
			root.Retired, root.Forgotten = now, forget
		}
		return l, nil
	}, atLeast, func(s wire.CAState) {
		a.log.InfoContext(ctx, "certificate authority: rollover finished", "intermediate", s.Issuing().Key.Fingerprint(), "forget", forget)
	})
	if err != nil {
		return s, err
	}
	a.deleteKeys(ctx)
	return s, nil
}

// deleteKeys deletes the keys of issuers that are given up. Each start does it
// again: a crash or a full disk may have come between Finish and this.
func (a *Authority) deleteKeys(ctx context.Context) {
	var gone []string
	l := a.mat().ledger
	for _, i := range l.Intermediates {
		if !i.Retired.IsZero() {
			gone = append(gone, numbered(fileInterKey, i.N))
		}
	}
	for _, r := range l.Roots {
		if r.Forgotten && !r.Retired.IsZero() {
			gone = append(gone, numbered(fileRootKey, r.N))
		}
	}
	for _, name := range gone {
		if err := os.Remove(filepath.Join(a.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			a.log.WarnContext(ctx, "a key that is not needed any more was not deleted: delete it", "file", filepath.Join(a.dir, name), "error", err)
		}
	}
}

// turn changes the ledger: everything that the change needs is on disk before
// it, and what was, issues until it is done. What cannot be used, above all because
// the signer that has its key is away, changes nothing: a step that was refused
// must not be found taken at the next start.
func (a *Authority) turn(change func(*material) (*ledger, error), atLeast int64, done func(wire.CAState)) (wire.CAState, error) {
	a.turning.Lock()
	defer a.turning.Unlock()
	l, err := change(a.mat())
	if err != nil {
		return wire.CAState{}, err
	}
	l.TrustAbove = max(l.TrustAbove, atLeast)
	b, err := l.encode()
	if err != nil {
		return wire.CAState{}, err
	}
	if l, err = parseLedger(b); err != nil { // as the next start reads it
		return wire.CAState{}, err
	}
	m, err := a.loadAs(l)
	if err != nil {
		return wire.CAState{}, err
	}
	roots, err := a.sealTrust(m)
	if err != nil {
		return wire.CAState{}, err
	}
	if err := writeFile(a.dir, fileIssuers, b, 0o600); err != nil {
		return wire.CAState{}, err
	}
	if err := a.use(m); err != nil {
		return wire.CAState{}, err
	}
	if err := a.holdTrust(roots); err != nil { // the step is taken all the same
		a.log.Error("the list of roots is in force, and not on disk; it is signed again at the next start", "error", err)
	}
	if doors := a.doors.Load(); doors != nil {
		if err := doors.follow(context.Background()); err != nil {
			a.log.Error("the intermediate for other programs did not follow; it does at the next start", "error", err)
		}
	}
	s := a.State()
	done(s)
	return s, nil
}

func (a *Authority) loadAs(l *ledger) (*material, error) {
	if a.ra != nil {
		return a.loadRegisteredAs(l)
	}
	return loadAs(a.dir, l, a.keys)
}

// trustList is a trust document that was signed.
type trustList struct {
	number int64
	env    wire.Envelope
}

// signTrust signs a trust document for what is in use, and writes it.
func (a *Authority) signTrust() error {
	t, err := a.sealTrust(a.mat())
	if err != nil {
		return err
	}
	return a.holdTrust(t)
}

// sealTrust signs a trust document if the one held says another thing, or if
// its signer is given up; nil: there is no need.
func (a *Authority) sealTrust(m *material) (*trustList, error) {
	a.mu.Lock()
	held, number := a.trust, a.trustNo
	a.mu.Unlock()
	if held == nil && len(m.roots) == 1 {
		return nil, nil
	}
	doc := wire.Trust{TrustDomain: m.trustDomain, Number: max(number, m.ledger.TrustAbove) + 1, Issued: time.Now().UTC(), Roots: m.trusted()}
	if held != nil {
		var said wire.Trust
		if err := json.Unmarshal(held.Payload, &said); err != nil {
			return nil, damaged(fileTrust, err.Error())
		}
		if slices.EqualFunc(said.Roots, doc.Roots, slices.Equal) && slices.Equal(held.Chain[0], m.documentChain()[0]) {
			return nil, nil
		}
	}
	env, err := identity.Seal(m.interKey, m.documentChain(), wire.TypeTrust, doc)
	if err != nil {
		return nil, err
	}
	return &trustList{doc.Number, env}, nil
}

// holdTrust takes a trust document over and writes it; nil leaves the last one.
func (a *Authority) holdTrust(t *trustList) error {
	if t == nil {
		return nil
	}
	b, err := json.Marshal(t.env)
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.trust, a.trustNo = &t.env, t.number
	a.mu.Unlock()
	if err := writeFile(a.dir, fileTrust, b, 0o600); err != nil {
		return fmt.Errorf("sign the trust document: %w", err)
	}
	return nil
}

func (a *Authority) loadTrust() error {
	env, issued, err := readDocument(a.dir, fileTrust)
	if err != nil || env == nil {
		return err
	}
	doc, _, err := identity.VerifyTrust(*env, a.mat().everyRoot(), a.mat().trustDomain, issued)
	if err != nil {
		return damaged(fileTrust, err.Error())
	}
	a.trust, a.trustNo = env, doc.Number
	return nil
}
