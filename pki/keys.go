package pki

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"go.step.sm/crypto/pemutil"

	"sallyport/internal/lockdir"
)

// Types of the PEM blocks in key files.
const (
	pemKey       = "PRIVATE KEY"
	pemSealedKey = "ENCRYPTED PRIVATE KEY" // PKCS #8, PBES2: PBKDF2 with 600,000 rounds of HMAC-SHA-256, AES-256-CBC
)

// ErrPassphrase says that a key file is encrypted, and that the passphrase is
// missing or does not open it.
var ErrPassphrase = errors.New("the key is encrypted")

const (
	varPassphrase       = "SALLYPORT_PKI_PASSPHRASE_FILE"
	varSignerPassphrase = "SALLYPORT_SIGNER_PASSPHRASE_FILE"
)

// keyring makes and opens the private keys of an authority: files in its
// directory, encrypted when there is a passphrase.
type keyring struct {
	dir        string
	passphrase []byte        // nil: keys lie open in their files
	variable   string        // that names its file, where it is not varPassphrase
	signer     *signerClient // nil: keys are made here
	tpm        *tpm          // nil: keys are made in memory
}

// WithPassphrase encrypts the keys in their files. Those that lie open there
// already are encrypted by Open.
func WithPassphrase(passphrase []byte) Option {
	return func(a *Authority) { a.keys.passphrase = passphrase }
}

// encrypt seals a key under a passphrase. Tests count fewer rounds: the file says
// how many there are, so what opens it is the same.
var encrypt = func(pkcs8, passphrase []byte) (*pem.Block, error) {
	return pemutil.EncryptPKCS8PrivateKey(rand.Reader, pkcs8, passphrase, x509.PEMCipherAES256)
}

// make makes a key and has it on disk before anybody can see its public half.
func (k keyring) make(name string) (crypto.Signer, error) {
	if err := k.likeOthers(name); err != nil {
		return nil, err
	}
	if k.signer != nil {
		if err := k.room(); err != nil {
			return nil, err
		}
		key, err := k.signer.make(name)
		if err != nil {
			return nil, err
		}
		return key, key.write(k.dir, name)
	}
	if k.tpm != nil {
		key, err := k.tpm.make(tpmAuth(k.passphrase))
		if err != nil {
			return nil, err
		}
		return key, key.write(k.dir, name)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, k.write(name, der)
}

// spareRoom is more than a key, its certificate, and what is signed anew with them
// take on disk, in bytes.
const spareRoom = 64 << 10

// room makes sure that there is room for what follows a new key: a signer keeps each
// that it made, and nobody can ask it to forget one.
func (k keyring) room() error {
	probe := make([]byte, spareRoom)
	if _, err := rand.Read(probe); err != nil { // some file systems give zeros no room
		return err
	}
	if err := writeFile(k.dir, fileRoom, probe, 0o600); err != nil {
		return err
	}
	return os.Remove(filepath.Join(k.dir, fileRoom))
}

// likeOthers refuses to leave a key open in its file where the others are in a
// signer, or have a passphrase: nobody wants that, and a command that is run
// without a variable of the service would do it.
func (k keyring) likeOthers(name string) error {
	names, err := k.names()
	if err != nil {
		return err
	}
	for _, other := range names {
		block, err := k.block(other)
		switch {
		case err != nil: // whoever opens it says so
		case block.Type == pemSignerKey && k.signer == nil:
			return fmt.Errorf("make %s: a %w keeps the other keys: set SALLYPORT_PKI_SIGNER to its socket", name, ErrSigner)
		case block.Type == pemSealedKey && k.passphrase == nil && k.signer == nil && k.tpm == nil:
			return k.missing("make " + name)
		}
	}
	return nil
}

// write replaces a key file.
func (k keyring) write(name string, pkcs8 []byte) error {
	block := &pem.Block{Type: pemKey, Bytes: pkcs8}
	if k.passphrase != nil {
		var err error
		if block, err = encrypt(pkcs8, k.passphrase); err != nil {
			return fmt.Errorf("encrypt %s: %w", name, err)
		}
	}
	return writeFile(k.dir, name, pem.EncodeToMemory(block), 0o600)
}

// load opens a key file.
func (k keyring) load(name string) (crypto.Signer, error) {
	block, err := k.block(name)
	if err != nil {
		return nil, err
	}
	switch block.Type {
	case pemSignerKey:
		return k.open(name, block)
	case pemTPMKey:
		return k.openTPMKey(name, block)
	}
	pkcs8, _, err := k.unseal(name, block)
	if err != nil {
		return nil, err
	}
	key, err := x509.ParsePKCS8PrivateKey(pkcs8)
	if err != nil {
		return nil, k.damaged(name, "holds no key: "+err.Error())
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, k.damaged(name, fmt.Sprintf("holds a %T, want an ECDSA key", key))
	}
	return ec, nil
}

// block reads the one PEM block of a key file.
func (k keyring) block(name string) (*pem.Block, error) {
	b, err := os.ReadFile(filepath.Join(k.dir, name))
	if err != nil {
		return nil, err
	}
	block, rest := pem.Decode(b)
	if block == nil || len(bytes.TrimSpace(rest)) > 0 {
		return nil, k.damaged(name, "is not a PEM file with one key")
	}
	return block, nil
}

// unseal returns the key in a block, and whether it was encrypted.
func (k keyring) unseal(name string, block *pem.Block) (pkcs8 []byte, sealed bool, err error) {
	switch block.Type {
	case pemKey:
		return block.Bytes, false, nil
	case pemSealedKey:
		if k.passphrase == nil {
			return nil, true, k.missing(name)
		}
		pkcs8, err := pemutil.DecryptPKCS8PrivateKey(block.Bytes, k.passphrase)
		if err == nil {
			_, err = x509.ParsePKCS8PrivateKey(pkcs8) // CBC has no integrity: what it yields must be a key
		}
		if err != nil {
			return nil, true, k.unfit(name)
		}
		return pkcs8, true, nil
	}
	return nil, false, k.damaged(name, fmt.Sprintf("holds a PEM block %q, want a private key", block.Type))
}

// damaged says what to do about a key file: of a signer, none of the gateway's or the
// authority's backups has a copy.
func (k keyring) damaged(name, cause string) error {
	if k.variable != varSignerPassphrase {
		return damaged(name, cause)
	}
	return fmt.Errorf("%w: %s %s; put it back from your copy of the signer's directory, or move it away if no key file of the certificate authority names it", ErrDamaged, filepath.Join(k.dir, name), cause)
}

func (k keyring) missing(name string) error {
	return fmt.Errorf("%s: %w: set %s to the file with its passphrase", name, ErrPassphrase, cmp.Or(k.variable, varPassphrase))
}

func (k keyring) unfit(name string) error {
	return fmt.Errorf("%s: %w and the passphrase in %s does not open it", name, ErrPassphrase, cmp.Or(k.variable, varPassphrase))
}

// names are the key files that are there.
func (k keyring) names() ([]string, error) {
	paths, err := filepath.Glob(filepath.Join(k.dir, "*.key"))
	if err != nil {
		return nil, err
	}
	for i, p := range paths {
		paths[i] = filepath.Base(p)
	}
	return paths, nil
}

// seal encrypts the key files that lie open, and makes sure that the
// passphrase opens the others: one that fits some keys only would be noticed
// when the root is needed, years later. It names those that it encrypted.
func (k keyring) seal() (done []string, err error) {
	if k.passphrase == nil {
		return nil, nil
	}
	names, err := k.names()
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		block, err := k.block(name)
		if err != nil {
			return done, err
		}
		sealed, err := k.sealFile(name, block)
		if err != nil {
			return done, err
		}
		if sealed {
			done = append(done, name)
		}
	}
	return done, nil
}

// opensSome tells whether the passphrase opens at least one of the keys that have
// one.
func (k keyring) opensSome() bool {
	names, err := k.names()
	if err != nil || k.passphrase == nil {
		return false
	}
	return slices.ContainsFunc(names, func(name string) bool {
		block, err := k.block(name)
		if err != nil || block.Type != pemSealedKey {
			return false
		}
		_, _, err = k.unseal(name, block)
		return err == nil
	})
}

// sealFile tells whether the key lay open.
func (k keyring) sealFile(name string, block *pem.Block) (bool, error) {
	switch block.Type {
	case pemSignerKey:
		return false, nil
	case pemTPMKey:
		return k.sealTPMKey(name, block)
	}
	pkcs8, sealed, err := k.unseal(name, block)
	if err != nil || sealed {
		return false, err
	}
	return true, k.write(name, pkcs8)
}

// Reseal encrypts the keys in dir under another passphrase, or under none if
// next is nil; old is the one in force. Nobody may have the directory open. It
// can be repeated after a failure: keys that next opens already are left.
func Reseal(dir string, old, next []byte) (err error) {
	if _, err := os.Stat(filepath.Join(dir, fileTrustDomain)); err != nil {
		return fmt.Errorf("pki: there is no certificate authority in %s: %w", dir, err)
	}
	lock, err := lockdir.Acquire(dir)
	if err != nil {
		return fmt.Errorf("pki: %w", err)
	}
	defer func() { err = errors.Join(err, lock.Release()) }()
	from, to := keyring{dir: dir, passphrase: old}, keyring{dir: dir, passphrase: next}
	names, err := from.names()
	if err != nil {
		return fmt.Errorf("pki: %w", err)
	}
	for _, name := range names {
		block, err := from.block(name)
		if err != nil {
			return fmt.Errorf("pki in %s: %w", dir, err)
		}
		if block.Type == pemSignerKey {
			continue
		}
		if _, sealed, err := to.unseal(name, block); err == nil && sealed == (next != nil) {
			continue
		}
		pkcs8, _, err := from.unseal(name, block)
		if err != nil {
			return fmt.Errorf("pki in %s: %w", dir, err)
		}
		if err := to.write(name, pkcs8); err != nil {
			return fmt.Errorf("pki in %s: %w", dir, err)
		}
	}
	return nil
}
