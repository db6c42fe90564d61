package pki_test

import (
	"context"
	"crypto/x509"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ocsp"

	"sallyport/internal/doors"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
	"sallyport/pki"
)

// doorLeaf is a certificate for a host, as its server shows it.
func doorLeaf(t *testing.T, d *pki.Doors) []*x509.Certificate {
	t.Helper()
	chain, err := d.Issue(t.Context(), doors.Request{CSR: doorCSR(t, identitytest.NewKey(t)), Names: []string{"www.plant.example"}})
	if err != nil {
		t.Fatal(err)
	}
	return chain
}

// knows verifies what a server shows by the one root that a client trusts.
func knows(root *x509.Certificate, shown []*x509.Certificate) error {
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), DNSName: "www.plant.example"}
	opts.Roots.AddCert(root)
	for _, c := range shown[1:] {
		opts.Intermediates.AddCert(c)
	}
	_, err := shown[0].Verify(opts)
	return err
}

// follows tells whether OpenSSL gets from what a server shows to the one root
// that a client trusts: of several issuers by one name it tries the first only.
func follows(root *x509.Certificate, shown []*x509.Certificate) error {
	return shown[1].CheckSignatureFrom(root)
}

func exists(t *testing.T, dir, name string) bool {
	t.Helper()
	_, err := os.Stat(filepath.Join(dir, name))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return err == nil
}

// good tells whether OCSP and CRL of a leaf are signed.
func good(t *testing.T, d *pki.Doors, issuer *x509.Certificate, serial *big.Int) error {
	t.Helper()
	now := time.Now()
	der, err := d.SignOCSP(t.Context(), wire.KeyOf(issuer), doors.Status{Serial: serial, Hash: 5, This: now, Next: now.Add(time.Hour)})
	if err != nil {
		return err
	}
	if _, err := ocsp.ParseResponse(der, issuer); err != nil {
		return err
	}
	_, err = d.SignCRL(t.Context(), wire.KeyOf(issuer), doors.CRL{Number: big.NewInt(1), This: now, Next: now.Add(time.Hour)})
	return err
}

// A new root takes the doors with it: clients that know either root take what
// is issued while both are trusted, and what was replaced goes with finish.
func TestDoorsFollowTheRoot(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	defer func() { closeIt(t, a) }()
	d := openDoors(t, a, "")
	oldRoot, oldInter, before := a.Root(), d.Chain()[0], doorLeaf(t, d)

	rotate(t, a, wire.RolloverIntermediate)
	if _, err := a.Finish(t.Context(), false, 0); err != nil {
		t.Fatal(err)
	}
	if !d.Chain()[0].Equal(oldInter) || len(d.Doors()) != 1 || len(d.Issuers()) != 2 {
		t.Errorf("the doors moved with the SPIFFE intermediate: %d doors, %d issuers", len(d.Doors()), len(d.Issuers()))
	}

	rotate(t, a, wire.RolloverRoot)
	for _, restarted := range []bool{false, true} {
		if restarted {
			a = reopen(t, a, dir)
			d = openDoors(t, a, "")
		}
		inters, roots := d.Trust()
		if len(d.Doors()) != 2 || !d.Doors()[1].Equal(oldInter) || len(inters) != 3 || len(roots) != 2 || !roots[0].Equal(a.Root()) || !roots[1].Equal(oldRoot) || len(d.Issuers()) != 4 {
			t.Fatalf("under way: %d doors, %d inters, %d roots, %d issuers", len(d.Doors()), len(inters), len(roots), len(d.Issuers()))
		}
		shown := doorLeaf(t, d)
		if err := shown[0].CheckSignatureFrom(d.Chain()[0]); err != nil || d.Chain()[0].Equal(oldInter) {
			t.Errorf("the old one issues: %v", err)
		}
		for what, root := range map[string]*x509.Certificate{"old": oldRoot, "new": a.Root()} {
			if err := knows(root, shown); err != nil {
				t.Errorf("a client that knows the %s root: %v", what, err)
			}
		}
		if err := follows(oldRoot, shown); err != nil {
			t.Errorf("OpenSSL with the old root alone: %v", err)
		}
		for _, leaf := range []*x509.Certificate{before[0], shown[0]} {
			issuer := oldInter
			if leaf == shown[0] {
				issuer = d.Chain()[0]
			}
			if err := good(t, d, issuer, leaf.SerialNumber); err != nil {
				t.Error(err)
			}
		}
	}

	if _, err := a.Finish(t.Context(), false, 0); err != nil {
		t.Fatal(err)
	}
	for _, restarted := range []bool{false, true} {
		if restarted {
			a = reopen(t, a, dir)
			d = openDoors(t, a, "")
		}
		if _, roots := d.Trust(); len(d.Doors()) != 1 || len(roots) != 1 || !roots[0].Equal(a.Root()) || exists(t, dir, "doors.key") || !exists(t, dir, "doors-2.key") {
			t.Errorf("finished: %d doors, %d roots", len(d.Doors()), len(roots))
		}
		if err := good(t, d, oldInter, before[0].SerialNumber); err == nil {
			t.Error("it still signs for what was given up")
		}
		if err := knows(oldRoot, doorLeaf(t, d)); err != nil {
			t.Errorf("a client that missed the rollover: %v", err)
		}
	}
}

func TestDoorsTurnRound(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	defer func() { closeIt(t, a) }()
	d := openDoors(t, a, "")
	oldRoot, oldInter := a.Root(), d.Chain()[0]
	rotate(t, a, wire.RolloverRoot)
	newRoot, shown := a.Root(), doorLeaf(t, d)
	if newRoot.Equal(oldRoot) {
		t.Fatal("the root is the old one")
	}
	if _, err := a.Abort(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if !d.Chain()[0].Equal(oldInter) || len(d.Doors()) != 2 {
		t.Fatalf("the old one does not issue after abort")
	}
	back := doorLeaf(t, d)
	for _, root := range []*x509.Certificate{a.Root(), newRoot} {
		if err := errors.Join(knows(root, back), knows(root, shown)); err != nil {
			t.Error(err)
		}
	}
	if err := follows(a.Root(), back); err != nil {
		t.Errorf("OpenSSL with the old root alone, which most clients know: %v", err)
	}
	if _, err := a.Abort(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if on := doorLeaf(t, d); !a.Root().Equal(newRoot) || follows(oldRoot, on) != nil {
		t.Error("OpenSSL with the old root alone, after a second abort")
	}
	if _, err := a.Abort(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Finish(t.Context(), true, 0); err != nil {
		t.Fatal(err)
	}
	if len(d.Doors()) != 1 || exists(t, dir, "doors-2.key") {
		t.Errorf("%d doors after the end", len(d.Doors()))
	}
	if err := knows(newRoot, doorLeaf(t, d)); err == nil {
		t.Error("the root that was given up and forgotten still vouches")
	}
}

// A crash after the rollover, and before the doors followed, is made good.
func TestDoorsFollowLater(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	defer func() { closeIt(t, a) }()
	openDoors(t, a, "")
	a = reopen(t, a, dir)
	rotate(t, a, wire.RolloverRoot) // with the doors shut
	a = reopen(t, a, dir)
	if d := openDoors(t, a, ""); len(d.Doors()) != 2 || !d.Chain()[1].Equal(a.Root()) {
		t.Error("the doors did not follow")
	}
}

// TestDoorsAreReplacedInTime: also by an authority that is never started again.
func TestDoorsAreReplacedInTime(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		a := open(t, dir)
		defer closeIt(t, a)
		d, err := a.Doors(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		first := d.Doors()[0]
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- a.Keep(ctx) }()
		time.Sleep(time.Until(first.NotAfter.AddDate(0, 0, -92)))
		if now := d.Doors(); len(now) != 1 || !now[0].Equal(first) {
			t.Errorf("before its time: %d intermediates, %v", len(now), now[0].NotAfter)
		}
		time.Sleep(4 * 24 * time.Hour)
		if now := d.Doors(); len(now) != 2 || now[0].Equal(first) || !now[1].Equal(first) || now[0].NotAfter.Before(first.NotAfter.AddDate(5, 0, 0)) {
			t.Errorf("88 days before its end: %d intermediates, the first until %v", len(now), now[0].NotAfter)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// An intermediate that was signed elsewhere is the doors' own, whatever the
// authority's roots do.
func TestImportDoors(t *testing.T) {
	dir, corp := t.TempDir(), newOutside(t)
	if _, _, err := pki.RequestDoors(dir); err == nil || !strings.Contains(err.Error(), "start it once") {
		t.Errorf("without an authority: %v", err)
	}
	a := open(t, dir)
	td := a.TrustDomain()
	closeIt(t, a)
	if err := pki.ImportDoors(t.Context(), dir, []*x509.Certificate{corp.root, corp.root}, quiet); !errors.Is(err, pki.ErrImport) {
		t.Errorf("nothing was asked for: %v", err)
	}
	csr, for_, err := pki.RequestDoors(dir)
	if err != nil || for_ != td {
		t.Fatalf("%s, %v", for_, err)
	}
	again, _, err := pki.RequestDoors(dir)
	if err != nil || publicOf(t, again) == nil || !publicOf(t, again).Equal(publicOf(t, csr)) {
		t.Errorf("another key the second time: %v", err)
	}
	stranger, _, err := pki.RequestDoors(func() string {
		dir := t.TempDir()
		closeIt(t, open(t, dir))
		return dir
	}())
	if err != nil {
		t.Fatal(err)
	}
	inter := corp.sign(csr, nil)
	for what, chain := range map[string][]*x509.Certificate{
		"no root":          {inter},
		"another key":      {corp.sign(stranger, func(c *x509.Certificate) { c.ExtraExtensions = corp.sign(csr, nil).Extensions }), corp.root},
		"plain":            {corp.sign(csr, func(c *x509.Certificate) { c.ExtraExtensions = nil }), corp.root},
		"the wrong domain": {corp.sign(stranger, nil), corp.root},
		"ends soon":        {corp.sign(csr, func(c *x509.Certificate) { c.NotAfter = time.Now().AddDate(0, 0, 30) }), corp.root},
		"another root":     {inter, newOutside(t).root},
	} {
		if err := pki.ImportDoors(t.Context(), dir, chain, quiet); !errors.Is(err, pki.ErrImport) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := pki.ImportDoors(t.Context(), dir, []*x509.Certificate{inter, corp.root}, quiet); err != nil {
		t.Fatal(err)
	}
	a = open(t, dir)
	defer func() { closeIt(t, a) }()
	d := openDoors(t, a, "")
	if err := knows(corp.root, doorLeaf(t, d)); err != nil {
		t.Error(err)
	}
	rotate(t, a, wire.RolloverRoot)
	if !d.Chain()[0].Equal(inter) {
		t.Error("a rollover took the imported one away")
	}
	first := doorLeaf(t, d)

	// The next one: what the first signed stays good.
	closeIt(t, a)
	if csr, _, err = pki.RequestDoors(dir); err != nil {
		t.Fatal(err)
	}
	next := corp.sign(csr, nil)
	if err := pki.ImportDoors(t.Context(), dir, []*x509.Certificate{next, corp.root}, quiet); err != nil {
		t.Fatal(err)
	}
	a = open(t, dir)
	d = openDoors(t, a, "")
	if !d.Chain()[0].Equal(next) || len(d.Doors()) != 2 {
		t.Fatalf("%d doors after the second import", len(d.Doors()))
	}
	if err := good(t, d, inter, first[0].SerialNumber); err != nil {
		t.Error(err)
	}
}

// TestImportedDoorsEnd: nobody replaces an imported intermediate but who imported
// it. When it has ended nothing is certified, least of all leaves that have ended
// with it; the doors still open, because the gateway starts with them.
func TestImportedDoorsEnd(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		corp, key := newOutside(t), identitytest.NewKey(t)
		bring := func(life time.Duration) *x509.Certificate {
			csr, _, err := pki.RequestDoors(dir)
			if err != nil {
				t.Fatal(err)
			}
			inter := corp.sign(csr, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(life) })
			if err := pki.ImportDoors(t.Context(), dir, []*x509.Certificate{inter, corp.root}, quiet); err != nil {
				t.Fatal(err)
			}
			return inter
		}
		closeIt(t, open(t, dir))
		inter := bring(100 * 24 * time.Hour)
		a := open(t, dir)
		d, err := a.Doors(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		issue := func() ([]*x509.Certificate, error) {
			return d.Issue(t.Context(), doors.Request{CSR: doorCSR(t, key), Names: []string{"a.example"}})
		}
		if _, err := issue(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Until(inter.NotAfter) + time.Hour)
		for _, what := range []string{"running on", "started again"} {
			leaf, err := issue()
			switch {
			case err == nil:
				t.Errorf("%s, it issues a leaf that ended at %s", what, leaf[0].NotAfter)
			case errors.Is(err, doors.ErrRefused) || !strings.Contains(err.Error(), "expired on") || !strings.Contains(err.Error(), "csr --doors"):
				t.Errorf("%s: %v", what, err)
			}
			closeIt(t, a)
			a = open(t, dir)
			if d, err = a.Doors(t.Context(), ""); err != nil {
				t.Fatalf("the doors do not open: %v", err)
			}
		}
		closeIt(t, a)
		next := bring(200 * 24 * time.Hour)
		a = open(t, dir)
		defer func() { closeIt(t, a) }()
		if d, err = a.Doors(t.Context(), ""); err != nil {
			t.Fatal(err)
		}
		if chain, err := issue(); err != nil || !d.Chain()[0].Equal(next) || !chain[0].NotAfter.After(time.Now()) || len(d.Doors()) != 1 {
			t.Errorf("with the next one: %v, %d intermediates", err, len(d.Doors()))
		}
	})
}

// The keys of the doors may be in a signer, as all others.
func TestDoorsWithSigner(t *testing.T) {
	socket, _ := signer(t, shortDir(t))
	dir := t.TempDir()
	a := open(t, dir, pki.WithSigner(socket))
	defer func() { closeIt(t, a) }()
	d := openDoors(t, a, "")
	if err := knows(a.Root(), doorLeaf(t, d)); err != nil {
		t.Error(err)
	}
	rotate(t, a, wire.RolloverRoot)
	shown := doorLeaf(t, d)
	if err := knows(a.Root(), shown); err != nil {
		t.Error(err)
	}
	if err := good(t, d, d.Chain()[0], shown[0].SerialNumber); err != nil {
		t.Error(err)
	}
	if found := privateKeys(t, dir); len(found) > 0 {
		t.Errorf("private keys beside the signer: %v", found)
	}
}

// A registration authority has no root here: its doors are imported, and the
// status of parties' certificates is their CA's affair.
func TestDoorsOfARegistrationAuthority(t *testing.T) {
	dir, s, corp := t.TempDir(), newStranger(t), newOutside(t)
	a := open(t, dir, s.option())
	if _, err := a.Doors(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "ca csr --doors") {
		t.Errorf("without an import: %v", err)
	}
	closeIt(t, a)
	csr, _, err := pki.RequestDoors(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := pki.ImportDoors(t.Context(), dir, []*x509.Certificate{corp.sign(csr, nil), corp.root}, quiet, s.option()); err != nil {
		t.Fatal(err)
	}
	a = open(t, dir, s.option())
	defer closeIt(t, a)
	d := openDoors(t, a, "")
	if err := knows(corp.root, doorLeaf(t, d)); err != nil {
		t.Error(err)
	}
	if len(d.Issuers()) != 1 || len(d.Doors()) != 1 {
		t.Errorf("%d issuers", len(d.Issuers()))
	}
}
