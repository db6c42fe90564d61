package doctor

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/local"
)

// Authority examines the certificate authority beside a gateway whose identity
// is in dir: whether its certificates can be read and are good, and whether it
// is the one that issued the gateway's own. A directory that does not exist
// says nothing: the authority may be elsewhere.
func Authority(pki, dir string, now time.Time) []local.Check {
	const fix = "restore it from a backup (`sallyport restore FILE`): without it every party has to enrol again"
	if _, err := os.ReadDir(pki); errors.Is(err, fs.ErrPermission) { // of a pattern nothing is said then
		return []local.Check{{Check: "authority", Detail: err.Error(), Fix: "run as the user that owns " + pki + ", or as root"}}
	}
	names, err := filepath.Glob(filepath.Join(pki, "*.pem"))
	if err != nil {
		return nil
	}
	if len(names) == 0 {
		if _, err := os.Stat(filepath.Join(pki, "trust-domain")); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return []local.Check{{Check: "authority", Detail: "the certificates of the CA are missing in " + pki, Fix: fix}}
	}
	var issuers []*x509.Certificate
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			return []local.Check{{Check: "authority", Detail: err.Error(), Fix: "run as the user that owns " + pki + ", or as root"}}
		}
		certs, err := parseCerts(b)
		if err != nil {
			return []local.Check{{Check: "authority", Detail: filepath.Base(name) + " is corrupt: " + err.Error(), Fix: fix}}
		}
		issuers = append(issuers, certs...)
	}
	for _, c := range issuers {
		if now.Before(c.NotBefore) || now.After(c.NotAfter) {
			return []local.Check{{Check: "authority", Detail: fmt.Sprintf("%q is good from %s to %s, and it is %s", c.Subject.CommonName, c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339)),
				Fix: "if the clock is right, rotate it (`sallyport ca rotate`); if not: " + fixClock}}
		}
	}
	besides := keys(pki, issuers)
	b, err := os.ReadFile(filepath.Join(dir, "chain.pem"))
	if err != nil && besides != nil {
		return besides
	}
	if err != nil {
		return []local.Check{{Check: "authority", OK: true, Detail: fmt.Sprintf("%d certificates in %s", len(issuers), pki)}}
	}
	chain, err := parseCerts(b)
	if err != nil {
		return nil // a finding about the identity
	}
	for _, c := range issuers {
		if bytes.Equal(c.RawSubject, chain[0].RawIssuer) && chain[0].CheckSignatureFrom(c) == nil {
			if besides != nil {
				return besides
			}
			return []local.Check{{Check: "authority", OK: true, Detail: "it has issued the gateway's certificate: " + c.Subject.CommonName}}
		}
	}
	return []local.Check{{Check: "authority", Detail: "the CA in " + pki + " is another one than that which issued the gateway's certificate: the directories are of two installations",
		Fix: "put back the pki directory that belongs to it, or restore both from one backup (`sallyport restore FILE`)"}}
}

// keys examines what stands beside the certificates of an authority. A key that
// is not there may be with a signer.
func keys(pki string, issuers []*x509.Certificate) []local.Check {
	bad := func(name, detail, fix string) []local.Check {
		return []local.Check{{Check: "authority", Detail: filepath.Join(pki, name) + " " + detail, Fix: fix}}
	}
	names, err := filepath.Glob(filepath.Join(pki, "*.key"))
	if err != nil {
		return nil
	}
	for _, name := range names {
		if b, err := os.ReadFile(name); err == nil {
			if block, _ := pem.Decode(b); block == nil {
				return bad(filepath.Base(name), "is corrupt: it is not a PEM file", "restore it from a backup (`sallyport restore FILE`)")
			}
		}
		if mode, exposed := identity.Exposed(name); exposed {
			return bad(filepath.Base(name), fmt.Sprintf("can be read by others (mode %04o)", mode), "`chmod 600 "+name+"`; if somebody may have read it, replace it (`sallyport ca rotate`): who has it can make parties of this installation")
		}
	}
	if b, err := os.ReadFile(filepath.Join(pki, "revocations.json")); err == nil && !json.Valid(b) {
		return bad("revocations.json", "is corrupt", "stop the gateway and delete it: it is signed again, from what the database says")
	}
	b, err := os.ReadFile(filepath.Join(pki, "trust-domain"))
	named := func(c *x509.Certificate) bool {
		return len(c.URIs) == 1 && c.URIs[0].Host == strings.TrimSpace(string(b))
	}
	if err == nil && !slices.ContainsFunc(issuers, named) {
		return bad("trust-domain", "names another trust domain than the certificates", "stop the gateway and delete it: it is made again from intermediate.pem")
	}
	return nil
}

// Restoration tells of a restoration that was cut off.
func Restoration(gateway string) []local.Check {
	if _, err := os.Stat(filepath.Join(gateway, "restoring")); err != nil {
		return nil
	}
	return []local.Check{{Check: "restoration", Detail: "a restoration was cut off: the gateway does not start", Fix: "run `sallyport restore FILE` again, to its end"}}
}

// Readable tells whether we may look at an identity at all.
func Readable(dir string) bool {
	f, err := os.Open(filepath.Join(dir, "key.pem"))
	if err == nil {
		_ = f.Close()
	}
	return !errors.Is(err, fs.ErrPermission)
}

// Label puts a word before the names of checks, where several are shown.
func Label(word string, checks []local.Check) []local.Check {
	for i := range checks {
		checks[i].Check = strings.TrimPrefix(word+": "+checks[i].Check, ": ")
	}
	return checks
}
