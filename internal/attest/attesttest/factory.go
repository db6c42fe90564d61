// Package attesttest makes factories and their devices for tests.
package attesttest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"sallyport/internal/identity/identitytest"
)

// Factory is a CA for devices, with an intermediate.
type Factory struct {
	CA, Line       *x509.Certificate
	caKey, lineKey *ecdsa.PrivateKey
	serial         int64
}

// NewFactory makes a factory of that name.
func NewFactory(t testing.TB, name string) *Factory {
	t.Helper()
	f := &Factory{serial: 100, caKey: identitytest.NewKey(t), lineKey: identitytest.NewKey(t)}
	ca := func(cn string, serial int64) *x509.Certificate {
		return &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: cn, Organization: []string{name}},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign}
	}
	root := ca(name+" root", 1)
	f.CA = identitytest.Sign(t, root, root, &f.caKey.PublicKey, f.caKey)
	f.Line = identitytest.Sign(t, ca(name+" line 1", 2), f.CA, &f.lineKey.PublicKey, f.caKey)
	return f
}

// Device makes a device with a P-256 key, as change wants its certificate, and
// writes both into files.
func (f *Factory) Device(t testing.TB, cn string, change func(*x509.Certificate)) (certFile, keyFile string, leaf *x509.Certificate) {
	t.Helper()
	return f.DeviceOf(t, identitytest.NewKey(t), cn, change)
}

// DeviceOf is Device for a key of any kind.
func (f *Factory) DeviceOf(t testing.TB, key crypto.Signer, cn string, change func(*x509.Certificate)) (certFile, keyFile string, leaf *x509.Certificate) {
	t.Helper()
	f.serial++
	c := &x509.Certificate{SerialNumber: big.NewInt(f.serial), Subject: pkix.Name{CommonName: cn, Organization: []string{"Device makers"}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature}
	if change != nil {
		change(c)
	}
	leaf = identitytest.Sign(t, c, f.Line, key.Public(), f.lineKey)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "device.pem"), filepath.Join(dir, "device.key")
	for name, text := range map[string][]byte{
		certFile: append(PEM(leaf), PEM(f.Line)...),
		keyFile:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
	} {
		if err := os.WriteFile(name, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile, leaf
}

// PEM encodes a certificate.
func PEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// CRLs are those of root and intermediate, good until then; the intermediate's
// has these certificates.
func (f *Factory) CRLs(t testing.TB, until time.Time, revoked ...*x509.Certificate) []byte {
	t.Helper()
	var entries []x509.RevocationListEntry
	for _, c := range revoked {
		entries = append(entries, x509.RevocationListEntry{SerialNumber: c.SerialNumber, RevocationTime: time.Now().Add(-time.Minute)})
	}
	var out []byte
	for _, l := range []struct {
		by      *x509.Certificate
		key     *ecdsa.PrivateKey
		entries []x509.RevocationListEntry
	}{{f.CA, f.caKey, nil}, {f.Line, f.lineKey, entries}} {
		der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: until, RevokedCertificateEntries: l.entries}, l.by, l.key)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})...)
	}
	return out
}
