package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"sallyport/internal/wire"
)

// fileIssuers says which roots and intermediates there are beside the first
// ones, and what they are for. It is written last by every change: until then
// the change has not happened. Without it there are only the first ones.
const fileIssuers = "issuers.json"

// forgetAfter is how long a retired root's key vouches for the intermediate
// that issues, towards parties that were away while it was replaced.
const forgetAfter = 365 * 24 * time.Hour

// ledger is the content of fileIssuers.
type ledger struct {
	Roots         []rootRecord  `json:"roots"`
	Intermediates []interRecord `json:"intermediates"`
	Issuing       int           `json:"issuing"` // N of an intermediate
	Rollover      *rollover     `json:"rollover,omitempty"`

	// TrustAbove is the highest number of a trust document that was seen
	// elsewhere: the one that this ledger calls for is above it, also if it is
	// signed after a crash only.
	TrustAbove int64 `json:"trust_above,omitempty"`
}

type rootRecord struct {
	N         int       `json:"n"`
	Retired   time.Time `json:"retired,omitzero"`
	Forgotten bool      `json:"forgotten,omitempty"` // it vouches for nothing any more; its key is deleted
}

// vouches tells whether the root stands in new chains: while it is trusted,
// and for forgetAfter from then on.
func (r rootRecord) vouches() bool {
	return !r.Forgotten && (r.Retired.IsZero() || time.Since(r.Retired) < forgetAfter)
}

type interRecord struct {
	N       int       `json:"n"`
	Root    int       `json:"root"`
	Retired time.Time `json:"retired,omitzero"`
}

// rollover is a change of issuers that is under way; From and To are the N of
// intermediates.
type rollover struct {
	Kind    string    `json:"kind"`
	From    int       `json:"from"`
	To      int       `json:"to"`
	Since   time.Time `json:"since"`
	Aborted bool      `json:"aborted,omitempty"`

	// Of an external CA, which decides when it issues from the new root: until
	// then To is From.
	Root  int  `json:"root,omitempty"`  // N of the new root
	Alone bool `json:"alone,omitempty"` // the old root need not vouch for its intermediate
}

// clone is a copy to change.
func (l *ledger) clone() *ledger {
	c := &ledger{Roots: slices.Clone(l.Roots), Intermediates: slices.Clone(l.Intermediates), Issuing: l.Issuing, TrustAbove: l.TrustAbove}
	if l.Rollover != nil {
		r := *l.Rollover
		c.Rollover = &r
	}
	return c
}

// forgetOne keeps chains small when another root is to vouch: of the retired ones
// that still do, the first stops. One that is in use is not retired, also where
// an abort left it older than those.
func (l *ledger) forgetOne() {
	vouching, oldest := 0, -1
	for i, r := range l.Roots {
		if !r.vouches() {
			continue
		}
		vouching++
		if oldest < 0 && !r.Retired.IsZero() {
			oldest = i
		}
	}
	if vouching >= wire.MaxRoots && oldest >= 0 {
		l.Roots[oldest].Forgotten = true
	}
}

func (l *ledger) root(n int) *rootRecord {
	for i := range l.Roots {
		if l.Roots[i].N == n {
			return &l.Roots[i]
		}
	}
	return nil
}

func (l *ledger) inter(n int) *interRecord {
	for i := range l.Intermediates {
		if l.Intermediates[i].N == n {
			return &l.Intermediates[i]
		}
	}
	return nil
}

// firstLedger is that of an authority that never rolled over.
func firstLedger() *ledger {
	return &ledger{Roots: []rootRecord{{N: 1}}, Intermediates: []interRecord{{N: 1, Root: 1}}, Issuing: 1}
}

// numbered is the name of the n-th file of a kind: root.pem, root-2.pem.
func numbered(name string, n int) string {
	if n == 1 {
		return name
	}
	ext := filepath.Ext(name)
	return strings.TrimSuffix(name, ext) + "-" + strconv.Itoa(n) + ext
}

// rootCA is a root that is trusted, or that still vouches.
type rootCA struct {
	rootRecord
	cert *x509.Certificate
}

// spiffeCA is a SPIFFE intermediate. Its first certificate is its own root's;
// the others, of the same key, are those of other roots, so that parties that
// know only one of them can verify it.
type spiffeCA struct {
	interRecord
	certs []*x509.Certificate
}

// loadLedger reads fileIssuers.
func loadLedger(dir string) (*ledger, error) {
	b, err := os.ReadFile(filepath.Join(dir, fileIssuers))
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(filepath.Join(dir, numbered(fileInter, 2))); err == nil && !abandoned(dir) {
			return nil, damaged(fileIssuers, "is missing while "+numbered(fileInter, 2)+" is there")
		}
		return firstLedger(), nil
	}
	if err != nil {
		return nil, err
	}
	return parseLedger(b)
}

func parseLedger(b []byte) (*ledger, error) {
	l := new(ledger)
	if err := json.Unmarshal(b, l); err != nil {
		return nil, damaged(fileIssuers, err.Error())
	}
	issuing := l.inter(l.Issuing)
	if issuing == nil || !issuing.Retired.IsZero() || l.root(issuing.Root) == nil {
		return nil, damaged(fileIssuers, "names no intermediate that issues")
	}
	if r := l.Rollover; r != nil && (l.inter(r.From) == nil || r.To != l.Issuing) {
		return nil, damaged(fileIssuers, "holds half a rollover")
	}
	return l, nil
}

// abandoned tells whether a second intermediate is what a crash left of a
// rollover that had not happened: the first one still has its key.
func abandoned(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, fileInterKey))
	return err == nil
}

func (l *ledger) encode() ([]byte, error) {
	b, err := json.MarshalIndent(l, "", "  ")
	return append(b, '\n'), err
}

// saveLedger makes a change happen.
func saveLedger(dir string, l *ledger) error {
	b, err := l.encode()
	if err != nil {
		return err
	}
	return writeFile(dir, fileIssuers, b, 0o600)
}

// loadCertificates reads the certificates that the ledger names.
func (m *material) loadCertificates(dir string) error {
	for _, r := range m.ledger.Roots {
		c, err := readCert(dir, numbered(fileRoot, r.N))
		if err != nil {
			return err
		}
		m.roots = append(m.roots, rootCA{r, c})
	}
	for _, r := range m.ledger.Intermediates {
		name := numbered(fileInter, r.N)
		certs, err := readCerts(dir, name)
		if err != nil {
			return err
		}
		m.inters = append(m.inters, spiffeCA{r, certs})
		if root := m.rootCA(r.Root); root == nil || certs[0].CheckSignatureFrom(root.cert) != nil {
			return damaged(name, "was not issued by "+numbered(fileRoot, r.Root))
		}
	}
	issuing := m.issuing()
	m.root, m.inter = m.rootCA(issuing.Root).cert, issuing.certs[0]
	m.certs = m.vouched(issuing.certs)
	return nil
}

// loadIssuers reads them, and the key of the intermediate that issues.
func (m *material) loadIssuers(dir string, keys keyring) error {
	if err := m.loadCertificates(dir); err != nil {
		return err
	}
	issuing := m.issuing()
	keyName := numbered(fileInterKey, issuing.N)
	var err error
	if m.interKey, err = keys.load(keyName); errors.Is(err, fs.ErrNotExist) {
		return damaged(keyName, "is missing")
	} else if err != nil {
		return err
	}
	if pub, ok := m.inter.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(m.interKey.Public()) {
		return damaged(keyName, "does not belong to "+numbered(fileInter, issuing.N))
	}
	return nil
}

func (m *material) rootCA(n int) *rootCA {
	for i := range m.roots {
		if m.roots[i].N == n {
			return &m.roots[i]
		}
	}
	return nil
}

func (m *material) spiffeCA(n int) *spiffeCA {
	for i := range m.inters {
		if m.inters[i].N == n {
			return &m.inters[i]
		}
	}
	return nil
}

// issuing is the intermediate that signs; the ledger was checked to name it.
func (m *material) issuing() *spiffeCA { return m.spiffeCA(m.ledger.Issuing) }

// vouching are the roots that stand in the chains of new leaves: the trusted
// ones, and the retired ones that are not forgotten. The issuing intermediate's
// own comes last.
func (m *material) vouching() (roots []*x509.Certificate) {
	for _, r := range m.roots {
		if r.vouches() && !r.cert.Equal(m.root) {
			roots = append(roots, r.cert)
		}
	}
	return append(roots, m.root)
}

// vouched are those of an intermediate's certificates that a root which still
// vouches has signed.
func (m *material) vouched(certs []*x509.Certificate) (out []*x509.Certificate) {
	for _, c := range certs {
		if slices.ContainsFunc(m.vouching(), func(r *x509.Certificate) bool { return c.CheckSignatureFrom(r) == nil }) {
			out = append(out, c)
		}
	}
	return out
}

// trusted are the roots of the trust document, the issuing one's own first.
func (m *material) trusted() [][]byte {
	out := [][]byte{m.root.Raw}
	for _, r := range m.roots {
		if r.Retired.IsZero() && !r.cert.Equal(m.root) {
			out = append(out, r.cert.Raw)
		}
	}
	return out
}

// everyRoot is what anything in the directory may have been verified by.
func (m *material) everyRoot() (out []*x509.Certificate) {
	for _, r := range m.roots {
		out = append(out, r.cert)
	}
	return out
}

// sealers is the chain of the documents that the authority signs.
func (m *material) sealers() (out [][]byte) {
	for _, c := range m.certs {
		out = append(out, c.Raw)
	}
	return out
}

// chain puts a leaf before the certificates that lead to every root.
func (m *material) chain(leaf *x509.Certificate) [][]byte {
	out := append([][]byte{leaf.Raw}, m.sealers()...)
	for _, r := range m.vouching() {
		out = append(out, r.Raw)
	}
	return out
}

// state is what the ledger says, for people.
func (m *material) state(number int64) wire.CAState {
	s := wire.CAState{TrustDomain: m.trustDomain, Number: number}
	for _, r := range m.roots {
		i := wire.CAIssuer{N: r.N, Key: wire.KeyOf(r.cert), State: wire.IssuerTrusted, NotBefore: r.cert.NotBefore.UTC(), NotAfter: r.cert.NotAfter.UTC(), Retired: r.Retired, Forgotten: !r.vouches()}
		switch {
		case !r.Retired.IsZero():
			i.State = wire.IssuerRetired
		case r.N == m.issuing().Root:
			i.State = wire.IssuerIssuing
		}
		s.Roots = append(s.Roots, i)
	}
	for _, c := range m.inters {
		i := wire.CAIssuer{N: c.N, Key: wire.KeyOf(c.certs[0]), Root: c.Root, State: wire.IssuerTrusted, NotBefore: c.certs[0].NotBefore.UTC(), NotAfter: c.certs[0].NotAfter.UTC(), Retired: c.Retired}
		switch {
		case !c.Retired.IsZero():
			i.State = wire.IssuerRetired
		case c.N == m.ledger.Issuing:
			i.State = wire.IssuerIssuing
		}
		s.Intermediates = append(s.Intermediates, i)
	}
	if r := m.ledger.Rollover; r != nil {
		s.Rollover = &wire.CARollover{Kind: r.Kind, Since: r.Since, Aborted: r.Aborted,
			From: wire.KeyOf(m.spiffeCA(r.From).certs[0]), To: wire.KeyOf(m.spiffeCA(r.To).certs[0]), Named: r.Root != 0 && m.issuing().Root != r.Root}
	}
	return s
}

// keyOf opens the key of a root or an intermediate.
func (k keyring) keyOf(name string, n int) (crypto.Signer, error) {
	file := numbered(name, n)
	key, err := k.load(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s is not here: its key is kept elsewhere, and what it signs is made there", ErrRollover, file)
	}
	return key, err
}

// readCerts reads the certificates of one issuer, of one key.
func readCerts(dir, name string) (certs []*x509.Certificate, err error) {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, damaged(name, "is missing")
	}
	if err != nil {
		return nil, err
	}
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, damaged(name, "holds no certificate: "+err.Error())
		}
		if len(certs) > 0 && !bytes.Equal(c.RawSubjectPublicKeyInfo, certs[0].RawSubjectPublicKeyInfo) {
			return nil, damaged(name, "holds certificates of different keys")
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 {
		return nil, damaged(name, "is not a PEM file")
	}
	return certs, nil
}

func writeCerts(dir, name string, certs []*x509.Certificate) error {
	var b bytes.Buffer
	for _, c := range certs {
		if err := pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}); err != nil {
			return err
		}
	}
	return writeFile(dir, name, b.Bytes(), 0o600)
}
