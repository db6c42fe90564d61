package config

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
)

// PKI is the configuration of the CA, read by the process that holds it: the
// gateway, or `run pki`.
type PKI struct {
	Common
	Listen         string `env:"SALLYPORT_PKI_LISTEN" doc:"where a CA in a process of its own (run pki) listens for gateways; they prove their key" form:"host:port, or the absolute path of a unix socket" why:"$SALLYPORT_DATA/pki/pki.sock: the same user on the same host; opening it to others is a decision"`
	PassphraseFile string `env:"SALLYPORT_PKI_PASSPHRASE_FILE" doc:"file with the passphrase of the CA's keys: they are encrypted in their files, also those that lie open there already" form:"a path" why:"none: a passphrase beside the keys protects backups and copies, not the host itself"`
	Signer         string `env:"SALLYPORT_PKI_SIGNER" doc:"unix socket of the signer (run signer, or one in front of an HSM) that makes and keeps the CA's keys from now on" form:"an absolute path" why:"none: the keys are in files of the CA"`
	CA             string `env:"SALLYPORT_PKI_CA" doc:"external step-ca that issues the certificates: root and intermediate are there, and the CA here is its registration authority" form:"https://host:port" why:"none: certificates are issued here"`
	CARootFile     string `env:"SALLYPORT_PKI_CA_ROOT_FILE" doc:"PEM file with the root of the external CA, which join codes then pin" form:"a path" why:"none; with SALLYPORT_PKI_CA this or SALLYPORT_PKI_CA_FINGERPRINT is needed"`
	CAFingerprint  string `env:"SALLYPORT_PKI_CA_FINGERPRINT" doc:"SHA-256 of that root's certificate, as step certificate fingerprint prints it: the root is fetched from the external CA and compared with it" form:"64 hex digits" why:"none: the root comes from its file"`
	CAProvisioner  string `env:"SALLYPORT_PKI_CA_PROVISIONER" doc:"name of the external CA's provisioner (type JWK) for this installation" form:"a name" why:"none; needed with SALLYPORT_PKI_CA"`
	CAKeyFile      string `env:"SALLYPORT_PKI_CA_KEY_FILE" doc:"file with that provisioner's private key" form:"a path: JWK, encrypted JWK or PEM" why:"none; needed with SALLYPORT_PKI_CA"`
	CAPasswordFile string `env:"SALLYPORT_PKI_CA_PASSWORD_FILE" doc:"file with the password of that key" form:"a path" why:"none: the key is not encrypted"`
	AdminListen    Listen `env:"SALLYPORT_PKI_ADMIN_LISTEN" envDefault:"127.0.0.1:9193" doc:"address of /metrics, /livez and /readyz of a CA in a process of its own; inside a gateway it has none" form:"host:port or off" why:"loopback: metrics name nodes"`
}

// LoadPKI reads environ, as os.Environ returns it.
func LoadPKI(environ []string) (PKI, error) {
	var c PKI
	err := load(&c, environ)
	return c, err
}

func (c *PKI) common() *Common { return &c.Common }

func (c *PKI) validate() error {
	if c.Listen == "" {
		c.Listen = filepath.Join(c.Dir("pki"), "pki.sock")
	}
	if err := c.checkCA(); err != nil {
		return err
	}
	if c.Signer != "" {
		if err := checkSocket("SALLYPORT_PKI_SIGNER", c.Signer); err != nil {
			return err
		}
	}
	return checkDoor("SALLYPORT_PKI_LISTEN", c.Listen, true)
}

func (c *PKI) checkCA() error {
	for _, v := range []struct{ name, value string }{
		{"SALLYPORT_PKI_CA_ROOT_FILE", c.CARootFile}, {"SALLYPORT_PKI_CA_FINGERPRINT", c.CAFingerprint}, {"SALLYPORT_PKI_CA_PROVISIONER", c.CAProvisioner},
		{"SALLYPORT_PKI_CA_KEY_FILE", c.CAKeyFile}, {"SALLYPORT_PKI_CA_PASSWORD_FILE", c.CAPasswordFile},
	} {
		switch {
		case c.CA == "" && v.value != "":
			return wrong(v.name, "is set, but SALLYPORT_PKI_CA is not")
		case c.CA != "" && v.value == "" && (v.name == "SALLYPORT_PKI_CA_PROVISIONER" || v.name == "SALLYPORT_PKI_CA_KEY_FILE" || v.name == "SALLYPORT_PKI_CA_ROOT_FILE" && c.CAFingerprint == ""):
			return wrong(v.name, "not set, and SALLYPORT_PKI_CA needs it")
		}
	}
	if c.CA == "" {
		return nil
	}
	if _, err := c.CAFingerprintSum(); err != nil {
		return err
	}
	u, err := url.Parse(c.CA)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
		return wrong("SALLYPORT_PKI_CA", "%s is not accepted; want https://host:port", quote(c.CA))
	}
	c.CA = "https://" + u.Host
	return nil
}

// CAFingerprintSum is the SHA-256 of the external CA's root; nil if it is not
// given.
func (c PKI) CAFingerprintSum() ([]byte, error) {
	if c.CAFingerprint == "" {
		return nil, nil
	}
	sum, err := hex.DecodeString(strings.NewReplacer(":", "", "-", "").Replace(c.CAFingerprint))
	if err != nil || len(sum) != sha256.Size {
		return nil, wrong("SALLYPORT_PKI_CA_FINGERPRINT", "%s is not accepted; want %d hex digits, the SHA-256 of the root's certificate", quote(c.CAFingerprint), 2*sha256.Size)
	}
	return sum, nil
}

// CAPassword reads the password of the provisioner's key. It is empty without
// a file.
func (c PKI) CAPassword() (Secret, error) {
	if c.CAPasswordFile == "" {
		return "", nil
	}
	return readSecret("SALLYPORT_PKI_CA_PASSWORD_FILE", c.CAPasswordFile, 1)
}

// checkDoor accepts an address, or the path of a unix socket.
func checkDoor(variable, s string, listen bool) error {
	if strings.HasPrefix(s, "/") {
		return checkSocketPath(variable, s)
	}
	if err := checkAddr(s, listen); err != nil {
		return wrong(variable, "%v; or the absolute path of a unix socket", err)
	}
	return nil
}

func (c *PKI) surface() []Surface {
	what := "tcp " + c.Listen
	if strings.HasPrefix(c.Listen, "/") {
		what = "unix " + c.Listen
	}
	var out []Surface
	if c.CA != "" {
		out = append(out, Surface{kindDial, "tcp " + strings.TrimPrefix(c.CA, "https://"), "the external CA, as its registration authority", "SALLYPORT_PKI_CA"})
	}
	out = append(out, Surface{kindListen, what, "gateways whose key was registered with ca gateway add, if the CA is a process of its own", "SALLYPORT_PKI_LISTEN"})
	return append(out, listens(c.AdminListen, "tcp", adminWho, "SALLYPORT_PKI_ADMIN_LISTEN")...)
}

// Passphrase reads the passphrase of the CA's keys. It is empty without a file.
func (c PKI) Passphrase() (Secret, error) {
	if c.PassphraseFile == "" {
		return "", nil
	}
	return ReadPassphrase("SALLYPORT_PKI_PASSPHRASE_FILE", c.PassphraseFile)
}

// Bounds of a passphrase, in bytes.
const (
	minPassphrase = 12
	maxPassphrase = 1 << 10
)

// ReadPassphrase reads a file that holds one passphrase on one line. name is
// the variable or argument that named the file.
func ReadPassphrase(name, file string) (Secret, error) { return readSecret(name, file, minPassphrase) }

func readSecret(name, file string, least int) (Secret, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", name, err)
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxPassphrase+3))
	if err != nil {
		return "", fmt.Errorf("read %s: %w", name, err)
	}
	s := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
	switch {
	case strings.ContainsAny(s, "\r\n\x00"):
		return "", wrong(name, "%s holds more than one line; want the passphrase alone", quote(file))
	case len(s) < least:
		return "", wrong(name, "%s holds a passphrase of %d bytes; want at least %d: whoever has a copy of the keys may guess for years", quote(file), len(s), least)
	case len(s) > maxPassphrase:
		return "", wrong(name, "%s holds a passphrase longer than %d bytes", quote(file), maxPassphrase)
	}
	return Secret(s), nil
}
