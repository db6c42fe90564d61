package gateway

import (
	"crypto/x509"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func x509Pool(t *testing.T, file string) *x509.CertPool {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		t.Fatalf("%s holds no certificate", file)
	}
	return pool
}

func TestAPICertificate(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "api-tls")
	c, err := loadAPICertificate(dir, "gw.example:8443", testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	first, err := c.get(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"gw.example", "localhost", "127.0.0.1"} {
		if _, err := first.Leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: x509Pool(t, c.certFile())}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if st, err := os.Stat(filepath.Join(dir, apiKeyFile)); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("key: %v, %v", st.Mode(), err)
	}
	// The next start keeps it: callers have pinned it.
	again, err := loadAPICertificate(dir, "other.example:8443", testLog(t))
	if err != nil || !again.cert.Leaf.Equal(first.Leaf) {
		t.Fatalf("another certificate, or %v", err)
	}
	// An operator's own is taken up while the gateway runs; a broken one is not.
	if err := makeAPICertificate(dir, "new.example:1"); err != nil {
		t.Fatal(err)
	}
	later := time.Now().Add(time.Minute)
	if err := os.Chtimes(c.certFile(), later, later); err != nil {
		t.Fatal(err)
	}
	second, err := c.get(nil)
	if err != nil || second.Leaf.Equal(first.Leaf) {
		t.Errorf("the replaced file is not used: %v", err)
	}
	if err := os.WriteFile(c.certFile(), []byte("broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	if third, err := c.get(nil); err != nil || !third.Leaf.Equal(second.Leaf) {
		t.Errorf("a broken file took the API down: %v", err)
	}
}

// Callers read the certificate as their SALLYPORT_CA_FILE, also that of a service
// with the umask 077; nobody reads its key.
func TestAPICertificateIsForCallers(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "api-tls")
	defer unix.Umask(unix.Umask(0o077))
	if _, err := loadAPICertificate(dir, "127.0.0.1:8443", testLog(t)); err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]os.FileMode{dir: 0o711, filepath.Join(dir, apiCertFile): 0o644, filepath.Join(dir, apiKeyFile): 0o600} {
		if st, err := os.Stat(name); err != nil || st.Mode().Perm() != mode {
			t.Errorf("%s: %v, want %v", name, st.Mode(), mode)
		}
	}
}
