package config

import (
	"fmt"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
)

// Signer is the configuration of `run signer`, the process that keeps the CA's
// keys.
type Signer struct {
	Common
	Listen         string `env:"SALLYPORT_SIGNER_LISTEN" doc:"unix socket where a signer (run signer) takes what the CA wants signed" form:"an absolute path" why:"$SALLYPORT_DATA/signer/signer.sock"`
	Users          Users  `env:"SALLYPORT_SIGNER_USERS" doc:"users who may have it sign, beside root and its own user" form:"names or numbers, separated by ;" why:"none: name the user of the CA's process"`
	PassphraseFile string `env:"SALLYPORT_SIGNER_PASSPHRASE_FILE" doc:"file with the passphrase of the signer's keys" form:"a path" why:"none: the keys are readable by the signer's user only"`
	TPM            string `env:"SALLYPORT_SIGNER_TPM" doc:"TPM 2.0 that makes and keeps the signer's keys from now on: its device, or the unix socket of a software TPM" form:"an absolute path, as /dev/tpmrm0" why:"none: the keys are in files of the signer"`
}

// LoadSigner reads environ, as os.Environ returns it.
func LoadSigner(environ []string) (Signer, error) {
	var c Signer
	err := load(&c, environ)
	return c, err
}

func (c *Signer) common() *Common { return &c.Common }

func (c *Signer) validate() error {
	if c.Listen == "" {
		c.Listen = filepath.Join(c.Dir("signer"), "signer.sock")
	}
	if c.TPM != "" && !filepath.IsAbs(c.TPM) {
		return wrong("SALLYPORT_SIGNER_TPM", "%s is not accepted; want the absolute path of a TPM's device, as /dev/tpmrm0", quote(c.TPM))
	}
	return checkSocket("SALLYPORT_SIGNER_LISTEN", c.Listen)
}

func checkSocket(variable, s string) error {
	if !strings.HasPrefix(s, "/") {
		return wrong(variable, "%s is not accepted; want the absolute path of a unix socket", quote(s))
	}
	return checkSocketPath(variable, s)
}

func (c *Signer) surface() []Surface {
	who := "root, the signer's own user"
	for _, u := range c.Users {
		who += ", uid " + strconv.FormatUint(uint64(u), 10)
	}
	return []Surface{{kindListen, "unix " + c.Listen, who + ": have anything signed with the CA's keys", "SALLYPORT_SIGNER_USERS"}}
}

// Passphrase reads the passphrase of the signer's keys. It is empty without a file.
func (c Signer) Passphrase() (Secret, error) {
	if c.PassphraseFile == "" {
		return "", nil
	}
	return ReadPassphrase("SALLYPORT_SIGNER_PASSPHRASE_FILE", c.PassphraseFile)
}

// Users is a list of users of this host, by their numbers.
type Users []uint32

// UnmarshalText reads names and numbers, separated by ";".
func (u *Users) UnmarshalText(b []byte) error {
	*u = nil
	for _, p := range split(string(b)) {
		number := p
		if known, err := user.Lookup(p); err == nil {
			number = known.Uid
		}
		n, err := strconv.ParseUint(number, 10, 32)
		if err != nil {
			return fmt.Errorf("%s is no user of this host; want names or numbers, separated by ;", quote(p))
		}
		*u = append(*u, uint32(n))
	}
	return nil
}

// MarshalText writes the form that UnmarshalText reads.
func (u Users) MarshalText() ([]byte, error) {
	return join(u, "", func(n uint32) string { return strconv.FormatUint(uint64(n), 10) })
}
