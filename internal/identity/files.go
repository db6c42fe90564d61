package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"sallyport/internal/atomicfile"
)

const (
	fileID          = "id"
	fileIDNext      = "id-next" // of a change of identity that is under way
	fileKey         = "key.pem"
	fileKeyNext     = "key-next.pem"
	fileChain       = "chain.pem"
	fileRoots       = "root.pem" // every root that was ever trusted; fileTrust says which still are
	fileTrust       = "trust.json"
	filePin         = "pin.json"
	fileRevocations = "revocations.json"

	pemKey  = "PRIVATE KEY"
	pemCert = "CERTIFICATE"
)

// Store keeps the files of one identity. What Write, Remove and Rename did is
// on disk when they return. A directory is one ([Open]); a program that is many
// parties at once has another ([OpenStore]).
type Store interface {
	Read(name string) ([]byte, error) // nil without an error for a file that is not there
	Write(name string, data []byte, mode fs.FileMode) error
	Remove(name string) error
	Rename(from, to string) error
}

// dirStore is a directory.
type dirStore string

func (d dirStore) Read(name string) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(string(d), name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return b, err
}

func (d dirStore) Write(name string, data []byte, mode fs.FileMode) error {
	return writeFile(string(d), name, data, mode)
}

func (d dirStore) Remove(name string) error {
	return atomicfile.Remove(filepath.Join(string(d), name))
}

func (d dirStore) Rename(from, to string) error {
	if err := os.Rename(filepath.Join(string(d), from), filepath.Join(string(d), to)); err != nil {
		return err
	}
	return atomicfile.SyncDir(string(d))
}

// writeFile replaces dir/name: after it returned, a crash shows the new bytes,
// before that the old ones.
func writeFile(dir, name string, data []byte, mode fs.FileMode) error {
	if err := atomicfile.WriteExactly(filepath.Join(dir, name), data, mode); err != nil {
		return fmt.Errorf("write %s: %w", filepath.Join(dir, name), err)
	}
	return nil
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: der}), nil
}

func decodeKey(b []byte) (*ecdsa.PrivateKey, error) {
	block, rest := pem.Decode(b)
	if block == nil || block.Type != pemKey || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("not one PEM block of type " + pemKey)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("holds a %T, want an ECDSA key", k)
	}
	return key, nil
}

func encodeCerts(certs []*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range certs {
		_ = pem.Encode(&b, &pem.Block{Type: pemCert, Bytes: c.Raw}) // a bytes.Buffer takes all
	}
	return b.Bytes()
}

func decodeCerts(b []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		block, b = pem.Decode(b)
		if block == nil {
			break
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, c)
	}
	if len(bytes.TrimSpace(b)) > 0 || len(certs) == 0 {
		return nil, errors.New("not a list of PEM certificates")
	}
	return certs, nil
}
