package pki_test

import (
	"crypto"
	"crypto/x509"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"sallyport/internal/doors"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

// The doors of an authority in another process: their key is there, and what
// it refuses here it refuses there.
func TestRemoteDoors(t *testing.T) {
	dir := t.TempDir()
	r := serve(t, dir, "127.0.0.1:0")
	code, _ := r.code(time.Hour)
	g := newGateway(t, r.addr)
	c := g.enrolled(t, code)
	d, err := c.Doors(t.Context(), "http://pki.example")
	if err != nil {
		t.Fatal(err)
	}
	if found := privateKeys(t, g.dir); len(found) > 1 { // its own
		t.Errorf("keys at the gateway: %v", found)
	}
	shown := doorLeaf(t, d)
	if err := knows(r.Root(), shown); err != nil {
		t.Error(err)
	}
	if len(shown[0].OCSPServer) != 1 || shown[0].OCSPServer[0] != "http://pki.example/ocsp" {
		t.Errorf("OCSP at %v", shown[0].OCSPServer)
	}
	for what, req := range map[string]doors.Request{
		"a party":    {CSR: doorCSR(t, identitytest.NewKey(t)), Names: []string{"x.node." + c.TrustDomain()}},
		"a wildcard": {CSR: doorCSR(t, identitytest.NewKey(t)), Names: []string{"*.example.org"}},
		"no name":    {CSR: doorCSR(t, identitytest.NewKey(t))},
		"garbage":    {CSR: []byte("garbage"), Names: []string{"a.example"}},
	} {
		if _, err := d.Issue(t.Context(), req); !errors.Is(err, doors.ErrRefused) {
			t.Errorf("%s: %v, want it refused", what, err)
		}
	}

	// Status of the doors' leaves and of parties'.
	now := time.Now().UTC().Truncate(time.Second)
	if len(d.Issuers()) != 2 {
		t.Fatalf("%d issuers", len(d.Issuers()))
	}
	for _, issuer := range d.Issuers() {
		key := wire.KeyOf(issuer)
		gone := doors.Revoked{Serial: big.NewInt(77), At: now.Add(-time.Hour), Reason: ocsp.KeyCompromise}
		der, err := d.SignCRL(t.Context(), key, doors.CRL{Number: big.NewInt(5), This: now, Next: now.Add(time.Hour), Revoked: []doors.Revoked{gone}})
		if err != nil {
			t.Fatal(err)
		}
		crl, err := x509.ParseRevocationList(der)
		if err != nil || crl.CheckSignatureFrom(issuer) != nil || len(crl.RevokedCertificateEntries) != 1 || crl.RevokedCertificateEntries[0].SerialNumber.Int64() != 77 {
			t.Errorf("CRL: %+v, %v", crl, err)
		}
		if der, err = d.SignOCSP(t.Context(), key, doors.Status{Serial: gone.Serial, Hash: crypto.SHA256, This: now, Next: now.Add(time.Hour), Revoked: &gone}); err != nil {
			t.Fatal(err)
		}
		if res, err := ocsp.ParseResponse(der, issuer); err != nil || res.Status != ocsp.Revoked || res.RevocationReason != ocsp.KeyCompromise {
			t.Errorf("OCSP: %+v, %v", res, err)
		}
		// A gateway that was taken over makes none that outlives it.
		if _, err := d.SignOCSP(t.Context(), key, doors.Status{Serial: gone.Serial, Hash: crypto.SHA1, This: now, Next: now.AddDate(1, 0, 0)}); err == nil {
			t.Error("an OCSP response for a year is signed")
		}
		if _, err := d.SignCRL(t.Context(), key, doors.CRL{Number: big.NewInt(6), This: now, Next: now.AddDate(1, 0, 0)}); err == nil {
			t.Error("a CRL for a year is signed")
		}
	}
	if err := good(t, d, r.Root(), big.NewInt(1)); err == nil {
		t.Error("signed as the root")
	}

	// A rollover of the root, begun here, takes them along.
	old := d.Chain()[0]
	if _, err := c.Rotate(t.Context(), wire.RolloverRoot, 0); err != nil {
		t.Fatal(err)
	}
	if d.Chain()[0].Equal(old) || len(d.Doors()) != 2 {
		t.Error("the doors did not follow the root")
	}
	g.renew(t, c)
	if err := knows(r.Root(), doorLeaf(t, d)); err != nil {
		t.Error(err)
	}
}

// While the authority is away the doors of a gateway that knows it open, and
// issue nothing.
func TestRemoteDoorsAway(t *testing.T) {
	dir := t.TempDir()
	r := serve(t, dir, "127.0.0.1:0")
	code, _ := r.code(time.Hour)
	g := newGateway(t, r.addr)
	c := g.enrolled(t, code)
	d, err := c.Doors(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	g.addr = "127.0.0.1:1" // where nobody listens
	c, err = g.connect(t, "")
	if err != nil {
		t.Fatal(err)
	}
	away, err := c.Doors(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if !away.Chain()[0].Equal(d.Chain()[0]) {
		t.Error("another intermediate")
	}
	if _, err := away.Issue(t.Context(), doors.Request{CSR: doorCSR(t, identitytest.NewKey(t)), Names: []string{"a.example"}}); err == nil {
		t.Error("issued by nobody")
	}
}

// TestRemoteDoorsLost: an authority that answers, and cannot say what the doors
// issue from, or refuses this gateway, keeps no gateway from starting that knows
// it. That it is away would be wrong too: parties get their certificates.
func TestRemoteDoorsLost(t *testing.T) {
	dir := t.TempDir()
	g := newGateway(t, "")
	t.Run("as it was", func(t *testing.T) {
		r := serve(t, dir, "127.0.0.1:0")
		code, _ := r.code(time.Hour)
		g.addr = r.addr
		c := g.enrolled(t, code)
		if _, err := c.Doors(t.Context(), ""); err != nil {
			t.Fatal(err)
		}
	})
	chain, registered := filepath.Join(dir, "doors.pem"), filepath.Join(dir, "gateways")
	for _, c := range []struct {
		what string
		harm func() error
	}{
		{"damaged", func() error { return os.WriteFile(chain, []byte("garbage"), 0o600) }},
		{"unregistered", func() error { return os.RemoveAll(registered) }},
	} {
		t.Run(c.what, func(t *testing.T) {
			if err := c.harm(); err != nil {
				t.Fatal(err)
			}
			g.addr = serve(t, dir, "127.0.0.1:0").addr
			c, err := g.connect(t, "")
			if err != nil {
				t.Fatal(err)
			}
			d, err := c.Doors(t.Context(), "")
			if err != nil {
				t.Fatal(err)
			}
			if len(d.Chain()) == 0 {
				t.Error("nothing is known of the doors")
			}
			if _, err := d.Issue(t.Context(), doors.Request{CSR: doorCSR(t, identitytest.NewKey(t)), Names: []string{"a.example"}}); err == nil {
				t.Error("issued by nobody")
			}
		})
	}
}
