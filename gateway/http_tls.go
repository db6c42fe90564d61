package gateway

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"sallyport/internal/atomicfile"
	"sallyport/internal/lockdir"
)

// The API's https certificate stands in two files. Without them the gateway
// makes a self-signed one, whose file is then the SALLYPORT_CA_FILE of callers.
// An operator may put others in their place; they are read again when they
// change. It has nothing to do with the identities of the channels: that CA
// certifies parties, never host names.
const (
	apiCertFile   = "cert.pem"
	apiKeyFile    = "key.pem"
	apiCommonName = "Sallyport API (self-signed)"
	// apiLifetime is long because callers pin the file: nothing but the
	// operator's own replacement should break them.
	apiLifetime = 10 * 365 * 24 * time.Hour
	apiBackdate = 72 * time.Hour // for clocks that are off
)

func (s *Server) apiTLSDir() string { return filepath.Join(s.cfg.Dir("gateway"), "api-tls") }

// apiCertificate is the certificate in a directory.
type apiCertificate struct {
	dir string
	log *slog.Logger

	mu       sync.Mutex
	cert     *tls.Certificate
	modified time.Time
}

func loadAPICertificate(dir, addr string, log *slog.Logger) (*apiCertificate, error) {
	if err := lockdir.Make(dir, 0o711); err != nil { // callers read the certificate
		return nil, err
	}
	c := &apiCertificate{dir: dir, log: log}
	if _, err := os.Stat(c.certFile()); errors.Is(err, fs.ErrNotExist) {
		if err := makeAPICertificate(dir, addr); err != nil {
			return nil, err
		}
	}
	return c, c.load()
}

func (c *apiCertificate) certFile() string { return filepath.Join(c.dir, apiCertFile) }

func (c *apiCertificate) load() error {
	st, err := os.Stat(c.certFile())
	if err != nil {
		return err
	}
	cert, err := tls.LoadX509KeyPair(c.certFile(), filepath.Join(c.dir, apiKeyFile))
	if err != nil {
		return fmt.Errorf("%s: %w", c.dir, err)
	}
	c.cert, c.modified = &cert, st.ModTime()
	return nil
}

// get returns the certificate, read again if its file is another one.
func (c *apiCertificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if st, err := os.Stat(c.certFile()); err == nil && !st.ModTime().Equal(c.modified) {
		if err := c.load(); err != nil {
			c.log.Error("api certificate not read; the old one stays in use", "error", err)
			c.modified = st.ModTime() // say it once
		}
	}
	return c.cert, nil
}

func makeAPICertificate(dir, addr string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return err
	}
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: apiCommonName}, NotBefore: now.Add(-apiBackdate), NotAfter: now.Add(apiLifetime),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true,
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	names := []string{}
	if host, _, err := net.SplitHostPort(addr); err == nil {
		names = append(names, host)
	}
	if host, err := os.Hostname(); err == nil {
		names = append(names, host)
	}
	for _, name := range names {
		ip := net.ParseIP(name)
		switch {
		case name == "" || name == "localhost" || ip != nil && (ip.IsUnspecified() || ip.IsLoopback()):
		case ip != nil:
			tmpl.IPAddresses = append(tmpl.IPAddresses, ip)
		default:
			tmpl.DNSNames = append(tmpl.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	// The key first: a certificate without its key would not be made again.
	if err := atomicfile.Write(filepath.Join(dir, apiKeyFile), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), 0o600); err != nil {
		return err
	}
	return atomicfile.WriteExactly(filepath.Join(dir, apiCertFile), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
}
