package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"os"
	"strings"
	"sync"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"
	"go.step.sm/crypto/tpm/tss2"
	"golang.org/x/sys/unix"
)

// pemTPMKey is a key that only the TPM which made it can open: the TPM 2.0 Key
// File of draft-bottomley-tpm2-keys, as other programs for TPMs have it.
const pemTPMKey = "TSS2 PRIVATE KEY"

// storageRoot is where the TCG has the storage root key kept (TPM v2.0
// Provisioning Guidance, 7.5.1); systemd puts it there at boot.
const storageRoot tpm2.TPMHandle = 0x81000001

// ErrTPM says that the TPM did not do what it was asked for.
var ErrTPM = errors.New("TPM")

// tpm makes keys in a TPM 2.0 and signs with them there. It does one thing
// after the other, as the device does.
type tpm struct {
	path string // /dev/tpmrm0, or the unix socket of a software TPM

	mu      sync.Mutex
	dev     transport.TPMCloser // nil until it is needed
	primary *parentKey          // made when dev was opened, if it was needed
}

// parentKey is what keys are wrapped with.
type parentKey struct {
	handle tpm2.TPMHandle
	name   tpm2.TPM2BName
	public tpm2.TPMTPublic
}

func (p *parentKey) auth() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: p.handle, Name: p.name, Auth: tpm2.PasswordAuth(nil)}
}

// private is a session in which nobody between us and the TPM learns, or can
// guess at, the secret of a key.
func (p *parentKey) private(auth []byte) tpm2.Session {
	return tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.Auth(auth), tpm2.Salted(p.handle, p.public), tpm2.AESEncryption(128, tpm2.EncryptIn))
}

// do runs f on the open TPM. What was opened before may have been started again
// since: then f runs once more, on one that is opened anew.
func (t *tpm) do(f func(transport.TPM) error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	fresh := t.dev == nil
	err := t.try(f)
	if err != nil && !fresh && !errors.Is(err, ErrPassphrase) {
		err = t.try(f)
	}
	return err
}

func (t *tpm) try(f func(transport.TPM) error) error {
	if t.dev == nil {
		dev, err := openTPM(t.path)
		if err != nil {
			return fmt.Errorf("%w %s: %w%s", ErrTPM, t.path, err, remedy(err))
		}
		t.dev = dev
	}
	err := f(t.dev)
	if err != nil {
		t.shut()
		if !errors.Is(err, ErrPassphrase) {
			err = fmt.Errorf("%w %s: %w%s", ErrTPM, t.path, err, remedy(err))
		}
	}
	return err
}

func openTPM(path string) (transport.TPMCloser, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.Mode()&fs.ModeSocket != 0 {
		return linuxudstpm.Open(path)
	}
	return linuxtpm.Open(path)
}

// shut leaves nothing of ours in a TPM that has no resource manager.
func (t *tpm) shut() {
	if t.dev == nil {
		return
	}
	if t.primary != nil {
		flush(t.dev, t.primary.handle)
	}
	_ = t.dev.Close()
	t.dev, t.primary = nil, nil
}

func (t *tpm) close() {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.shut()
}

func flush(dev transport.TPM, handle tpm2.TPMHandle) {
	_, _ = tpm2.FlushContext{FlushHandle: handle}.Execute(dev) // what is left there ends with the resource manager's session
}

// remedy says what to do about answers that are not told by their name.
func remedy(err error) string {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return " (put the signer's user into the group of the device, which is tss as a rule)"
	case errors.Is(err, unix.EBUSY):
		return " (another program has it: use its resource manager, /dev/tpmrm0)"
	case errors.Is(err, tpm2.TPMRCIntegrity), errors.Is(err, tpm2.TPMRCHandle): // of the key, of its storage root key
		return " (the key was made by another TPM, or this one was cleared since)"
	case errors.Is(err, tpm2.TPMRCObjectMemory), errors.Is(err, tpm2.TPMRCSessionMemory):
		return " (it is full of what others left there: use its resource manager, /dev/tpmrm0)"
	case errors.Is(err, tpm2.TPMRCLockout):
		return " (it is locked after too many wrong passphrases: it says with tpm2_getcap properties-variable for how long)"
	}
	return ""
}

// maker asks the TPM who made it, in four letters: whether it answers at all is
// known then.
func (t *tpm) maker() (name string, err error) {
	err = t.do(func(dev transport.TPM) error {
		rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(tpm2.TPMPTManufacturer), PropertyCount: 1}.Execute(dev)
		if err != nil {
			return err
		}
		p, err := rsp.CapabilityData.Data.TPMProperties()
		if err != nil {
			return err
		}
		if len(p.TPMProperty) == 1 {
			name = strings.TrimRight(string(binary.BigEndian.AppendUint32(nil, p.TPMProperty[0].Value)), "\x00 ")
		}
		return nil
	})
	return name, err
}

// parent finds, or makes, the key that others are wrapped with.
func (t *tpm) parent(dev transport.TPM, handle tpm2.TPMHandle) (*parentKey, error) {
	if handle != tpm2.TPMRHOwner {
		return persistent(dev, handle)
	}
	if t.primary != nil {
		return t.primary, nil
	}
	rsp, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(dev)
	if errors.Is(err, tpm2.TPMRCBadAuth) || errors.Is(err, tpm2.TPMRCAuthFail) {
		return nil, fmt.Errorf("storage root key: the owner hierarchy has a password: have the key made and kept at 0x%x (tpm2_createprimary -C o -G ecc -c srk.ctx && tpm2_evictcontrol -C o -c srk.ctx 0x%[1]x): %w", uint32(storageRoot), err)
	}
	if err != nil {
		return nil, fmt.Errorf("storage root key: %w", err)
	}
	public, err := rsp.OutPublic.Contents()
	if err != nil {
		return nil, err
	}
	t.primary = &parentKey{rsp.ObjectHandle, rsp.Name, *public}
	return t.primary, nil
}

// persistent reads a key that the TPM keeps.
func persistent(dev transport.TPM, handle tpm2.TPMHandle) (*parentKey, error) {
	rsp, err := tpm2.ReadPublic{ObjectHandle: handle}.Execute(dev)
	if err != nil {
		return nil, fmt.Errorf("storage root key 0x%x: %w", uint32(handle), err)
	}
	public, err := rsp.OutPublic.Contents()
	if err != nil {
		return nil, err
	}
	if a := public.ObjectAttributes; !a.Restricted || !a.Decrypt {
		return nil, fmt.Errorf("0x%x holds no storage key", uint32(handle))
	}
	return &parentKey{handle, rsp.Name, *public}, nil
}

// make has the TPM make a P-256 key that never leaves it in the clear.
func (t *tpm) make(auth []byte) (*tpmKey, error) {
	k := &tpmKey{tpm: t, auth: auth, parent: storageRoot}
	err := t.do(func(dev transport.TPM) error {
		p, err := persistent(dev, storageRoot)
		if err != nil {
			k.parent = tpm2.TPMRHOwner
			if p, err = t.parent(dev, k.parent); err != nil {
				return err
			}
		}
		create := tpm2.Create{
			ParentHandle: tpm2.AuthHandle{Handle: p.handle, Name: p.name, Auth: p.private(nil)},
			InSensitive:  tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{UserAuth: tpm2.TPM2BAuth{Buffer: auth}, Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{})}},
			InPublic: tpm2.New2B(tpm2.TPMTPublic{
				Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
				// A wrong passphrase is no attack on the TPM: it must not lock what others keep there.
				ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, SignEncrypt: true},
				Parameters:       tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: tpm2.TPMECCNistP256}),
			}),
		}
		rsp, err := create.Execute(dev)
		if err != nil {
			return fmt.Errorf("make key: %w", err)
		}
		k.wrapped, k.blob = rsp.OutPrivate, rsp.OutPublic
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := k.setPublic(); err != nil {
		return nil, fmt.Errorf("%w %s: %w", ErrTPM, t.path, err)
	}
	return k, nil
}

// tpmKey is one key of a TPM. It is loaded for each signature: a TPM has room
// for three.
type tpmKey struct {
	tpm     *tpm
	parent  tpm2.TPMHandle
	blob    tpm2.TPM2BPublic
	wrapped tpm2.TPM2BPrivate
	auth    []byte // nil: whoever can open the TPM and has the file may use it
	public  *ecdsa.PublicKey
}

// tpmAuth is the secret of the keys that are made under a passphrase, which may
// be longer than a TPM takes.
func tpmAuth(passphrase []byte) []byte {
	if passphrase == nil {
		return nil
	}
	sum := sha256.Sum256(passphrase)
	return sum[:]
}

func (k *tpmKey) setPublic() error {
	contents, err := k.blob.Contents()
	if err != nil {
		return err
	}
	pub, err := tpm2.Pub(*contents)
	if err != nil {
		return err
	}
	ec, ok := pub.(*ecdsa.PublicKey)
	if !ok || ec.Curve != elliptic.P256() {
		return fmt.Errorf("it is a %T, want a P-256 key", pub)
	}
	k.public = ec
	return nil
}

// Public is the public half.
func (k *tpmKey) Public() crypto.PublicKey { return k.public }

// loaded runs f on the key in the TPM.
func (k *tpmKey) loaded(f func(dev transport.TPM, p *parentKey, key tpm2.AuthHandle) error) error {
	return k.tpm.do(func(dev transport.TPM) error {
		p, err := k.tpm.parent(dev, k.parent)
		if err != nil {
			return err
		}
		rsp, err := tpm2.Load{ParentHandle: p.auth(), InPrivate: k.wrapped, InPublic: k.blob}.Execute(dev)
		if err != nil {
			return fmt.Errorf("load key: %w", err)
		}
		defer flush(dev, rsp.ObjectHandle)
		key := tpm2.AuthHandle{Handle: rsp.ObjectHandle, Name: rsp.Name, Auth: tpm2.PasswordAuth(nil)}
		if k.auth != nil {
			key.Auth = p.private(k.auth)
		}
		err = f(dev, p, key)
		if errors.Is(err, tpm2.TPMRCBadAuth) || errors.Is(err, tpm2.TPMRCAuthFail) {
			return ErrPassphrase
		}
		return err
	})
}

// Sign has the TPM sign a digest.
func (k *tpmKey) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	hash, ok := map[crypto.Hash]tpm2.TPMIAlgHash{crypto.SHA256: tpm2.TPMAlgSHA256, crypto.SHA384: tpm2.TPMAlgSHA384, crypto.SHA512: tpm2.TPMAlgSHA512}[opts.HashFunc()]
	if !ok {
		return nil, fmt.Errorf("%w: it signs no %s", ErrTPM, opts.HashFunc())
	}
	var sig []byte
	err := k.loaded(func(dev transport.TPM, _ *parentKey, key tpm2.AuthHandle) error {
		rsp, err := tpm2.Sign{
			KeyHandle: key, Digest: tpm2.TPM2BDigest{Buffer: digest},
			InScheme:   tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSchemeHash{HashAlg: hash})},
			Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck},
		}.Execute(dev)
		if err != nil {
			return fmt.Errorf("sign: %w", err)
		}
		rs, err := rsp.Signature.Signature.ECDSA()
		if err != nil {
			return err
		}
		if sig, err = asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(rs.SignatureR.Buffer), new(big.Int).SetBytes(rs.SignatureS.Buffer)}); err != nil {
			return err
		}
		if !ecdsa.VerifyASN1(k.public, digest, sig) {
			return errors.New("its signature is wrong")
		}
		return nil
	})
	return sig, err
}

// write puts the wrapped key into its file.
func (k *tpmKey) write(dir, file string) error {
	key := tss2.New(k.blob.Bytes(), k.wrapped.Buffer)
	key.Parent, key.EmptyAuth = int(k.parent), k.auth == nil
	b, err := key.EncodeToMemory()
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return writeFile(dir, file, b, 0o600)
}

// openTPMKey finds the TPM's key that a file holds, and makes sure that this TPM
// and the passphrase open it.
func (k keyring) openTPMKey(file string, block *pem.Block) (*tpmKey, error) {
	if k.tpm == nil {
		return nil, fmt.Errorf("%s: a %w keeps the key: set SALLYPORT_SIGNER_TPM to its device", file, ErrTPM)
	}
	f, err := tss2.ParsePrivateKey(block.Bytes)
	if err != nil {
		return nil, k.damaged(file, err.Error())
	}
	if len(f.Policy) > 0 || len(f.AuthPolicy) > 0 || len(f.Secret) > 0 || len(f.PublicKey) < 2 || len(f.PrivateKey) < 2 {
		return nil, k.damaged(file, "holds a key that was not made here")
	}
	key := &tpmKey{tpm: k.tpm, parent: tpm2.TPMHandle(f.Parent), blob: tpm2.BytesAs2B[tpm2.TPMTPublic](f.PublicKey[2:]), wrapped: tpm2.TPM2BPrivate{Buffer: f.PrivateKey[2:]}}
	if err := key.setPublic(); err != nil {
		return nil, k.damaged(file, err.Error())
	}
	if !f.EmptyAuth {
		if k.passphrase == nil {
			return nil, k.missing(file)
		}
		key.auth = tpmAuth(k.passphrase)
	}
	var digest [sha256.Size]byte
	if _, err := rand.Read(digest[:]); err != nil {
		return nil, err
	}
	_, err = key.Sign(nil, digest[:], crypto.SHA256)
	if errors.Is(err, ErrPassphrase) {
		return nil, k.unfit(file)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return key, nil
}

// sealTPMKey puts a key that had no passphrase under ours.
func (k keyring) sealTPMKey(file string, block *pem.Block) (done bool, err error) {
	key, err := k.openTPMKey(file, block)
	if err != nil || key.auth != nil {
		return false, err
	}
	next := tpmAuth(k.passphrase)
	err = key.loaded(func(dev transport.TPM, p *parentKey, handle tpm2.AuthHandle) error {
		handle.Auth = p.private(nil)
		rsp, err := tpm2.ObjectChangeAuth{ObjectHandle: handle, ParentHandle: tpm2.NamedHandle{Handle: p.handle, Name: p.name}, NewAuth: tpm2.TPM2BAuth{Buffer: next}}.Execute(dev)
		if err != nil {
			return fmt.Errorf("change passphrase: %w", err)
		}
		key.wrapped = rsp.OutPrivate
		return nil
	})
	if err != nil {
		return false, fmt.Errorf("%s: %w", file, err)
	}
	key.auth = next
	return true, key.write(k.dir, file)
}
