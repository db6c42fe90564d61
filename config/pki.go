package config

import (
	"fmt"
	"io"
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
	Signer         string `env:"SALLYPORT_PKI_SIGNER" doc:"unix socket of the signer (run signer, or one in front of a TPM or an HSM) that makes and keeps the CA's keys from now on" form:"an absolute path" why:"none: the keys are in files of the CA"`
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
	if c.Signer != "" {
		if err := checkSocket("SALLYPORT_PKI_SIGNER", c.Signer); err != nil {
			return err
		}
	}
	return checkDoor("SALLYPORT_PKI_LISTEN", c.Listen, true)
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
	return append([]Surface{{kindListen, what, "gateways whose key was registered with ca gateway add, if the CA is a process of its own", "SALLYPORT_PKI_LISTEN"}},
		listens(c.AdminListen, "tcp", adminWho, "SALLYPORT_PKI_ADMIN_LISTEN")...)
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
func ReadPassphrase(name, file string) (Secret, error) {
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
	case len(s) < minPassphrase:
		return "", wrong(name, "%s holds a passphrase of %d bytes; want at least %d: whoever has a copy of the keys may guess for years", quote(file), len(s), minPassphrase)
	case len(s) > maxPassphrase:
		return "", wrong(name, "%s holds a passphrase longer than %d bytes", quote(file), maxPassphrase)
	}
	return Secret(s), nil
}
