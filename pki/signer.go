package pki

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"sallyport/internal/wire"
)

// A signer is a process that keeps private keys and signs with them: ours
// (`run signer`), or anything else that speaks the same three requests on a
// unix socket, in front of an HSM.
//
//	POST /v1/keys              {"name": N}         makes a P-256 key; answers {"public": SPKI}
//	GET  /v1/keys/N                                answers {"public": SPKI}
//	POST /v1/keys/N/sign       {"digest": D, "hash": "SHA-256"|"SHA-384"|"SHA-512"}  answers {"signature": S}
//
// N is made of a-z, 0-9 and '-'; SPKI is DER and S is an ASN.1 ECDSA signature
// (RFC 3279, 2.2.3), both base64. A refusal has another status than 200 and
// {"message": TEXT}.
const (
	pathKeys   = "/v1/keys"
	signTime   = 30 * time.Second // a new key is encrypted with much work, on a host that may be busy
	maxSigning = 16 << 10
	maxRefusal = 512 // of a signer's message: what is wrong stands at its end

	// pemSignerKey is a key file that says which key of a signer it is: the
	// header Key is its name, the content its public half.
	pemSignerKey = "SALLYPORT SIGNER KEY"
)

// ErrSigner says that the signer did not sign.
var ErrSigner = errors.New("signer")

type (
	makeKeyRequest struct {
		Name string `json:"name"`
	}
	publicAnswer struct {
		Public []byte `json:"public"`
	}
	signRequest struct {
		Digest []byte `json:"digest"`
		Hash   string `json:"hash"`
	}
	signAnswer struct {
		Signature []byte `json:"signature"`
	}
)

// digests are the hashes that a signer is asked for.
var digests = map[string]crypto.Hash{"SHA-256": crypto.SHA256, "SHA-384": crypto.SHA384, "SHA-512": crypto.SHA512}

// signerClient asks the signer behind a socket.
type signerClient struct {
	socket  string
	http    *http.Client
	trouble trouble
}

// WithSigner has keys that are made from now on made and kept by the signer
// behind a unix socket. Keys that lie in files go on to be used until a
// rollover replaces them.
func WithSigner(socket string) Option {
	return func(a *Authority) { a.keys.signer = newSignerClient(socket) }
}

func newSignerClient(socket string) *signerClient {
	return &signerClient{socket: socket, http: &http.Client{
		Timeout: signTime,
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "unix", socket)
			},
			MaxConnsPerHost: 8, MaxIdleConnsPerHost: 8, IdleConnTimeout: time.Minute, MaxResponseHeaderBytes: wire.MaxHeader,
		},
	}}
}

func (c *signerClient) close() {
	if c != nil {
		c.http.CloseIdleConnections()
	}
}

func (c *signerClient) ask(ctx context.Context, method, path string, in, out any) (err error) {
	way := " (does it run there, and may this user ask it: SALLYPORT_SIGNER_USERS?)"
	defer func() {
		if err != nil {
			// The cause is text only: "no such file" of the socket must not
			// be taken for that of a key, which would be made anew.
			err = fmt.Errorf("%w at %s: %v%s", ErrSigner, c.socket, err, way) //nolint:errorlint // see above
		}
	}()
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://signer"+path, body)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if ue := (*url.Error)(nil); errors.As(err, &ue) { // the URL is made up, and long: what is wrong would be cut off behind it
			err = ue.Err
		}
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	way = "" // it is there, and answers
	if resp.StatusCode != http.StatusOK {
		var p problem
		if wire.DecodeJSON(resp.Body, maxSigning, &p) != nil || p.Message == "" {
			return errors.New(resp.Status)
		}
		return errors.New(strings.ToValidUTF8(p.Message[:min(len(p.Message), maxRefusal)], ""))
	}
	return wire.DecodeJSON(resp.Body, maxSigning, out)
}

// make has a key made for a file. The name in the signer is a new one each
// time: what an interrupted start left there is never taken for ours.
func (c *signerClient) make(file string) (*signerKey, error) {
	var random [4]byte
	if _, err := rand.Read(random[:]); err != nil {
		return nil, err
	}
	k := &signerKey{client: c, name: strings.TrimSuffix(file, ".key") + "-" + hex.EncodeToString(random[:])}
	var a publicAnswer
	if err := c.ask(context.Background(), http.MethodPost, pathKeys, makeKeyRequest{k.name}, &a); err != nil {
		return nil, fmt.Errorf("make key %s: %w", k.name, err)
	}
	return k, k.setPublic(a.Public)
}

// signerKey is one key of a signer.
type signerKey struct {
	client *signerClient
	name   string
	spki   []byte
	public *ecdsa.PublicKey
}

func (k *signerKey) setPublic(spki []byte) error {
	pub, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return fmt.Errorf("key %s: %w: %w", k.name, ErrSigner, err)
	}
	ec, ok := pub.(*ecdsa.PublicKey)
	if !ok {
		return fmt.Errorf("key %s: %w: it is a %T, want ECDSA", k.name, ErrSigner, pub)
	}
	k.spki, k.public = spki, ec
	return nil
}

// Public is the public half.
func (k *signerKey) Public() crypto.PublicKey { return k.public }

// Sign has a digest signed. [crypto.Signer] has no context; the client's timeout
// bounds it.
func (k *signerKey) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.sign(context.Background(), digest, opts.HashFunc())
}

// sign verifies what comes back: a signer that went mad would otherwise be noticed
// by the parties.
func (k *signerKey) sign(ctx context.Context, digest []byte, hash crypto.Hash) (signature []byte, err error) {
	defer func() { k.client.trouble.asked(ctx, err) }()
	var a signAnswer
	if err := k.client.ask(ctx, http.MethodPost, pathKeys+"/"+k.name+"/sign", signRequest{Digest: digest, Hash: hash.String()}, &a); err != nil {
		return nil, fmt.Errorf("sign with key %s: %w", k.name, err)
	}
	if !ecdsa.VerifyASN1(k.public, digest, a.Signature) {
		return nil, fmt.Errorf("sign with key %s: %w at %s: the signature is wrong", k.name, ErrSigner, k.client.socket)
	}
	return a.Signature, nil
}

// write leaves the reference to a key of a signer in the place of a key.
func (k *signerKey) write(dir, file string) error {
	return writeFile(dir, file, pem.EncodeToMemory(&pem.Block{Type: pemSignerKey, Headers: map[string]string{"Key": k.name}, Bytes: k.spki}), 0o600)
}

// open finds the key that a file refers to, and makes sure that the signer has
// that very key.
func (k keyring) open(file string, block *pem.Block) (crypto.Signer, error) {
	if k.signer == nil {
		return nil, fmt.Errorf("%s: %w keeps the key: set SALLYPORT_PKI_SIGNER to its socket", file, ErrSigner)
	}
	s := &signerKey{client: k.signer, name: block.Headers["Key"]}
	if !validKeyName(s.name) {
		return nil, damaged(file, "names no key of a signer")
	}
	s.spki = block.Bytes
	if err := s.there(context.Background()); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(k.dir, file), err)
	}
	return s, s.setPublic(s.spki)
}

// there asks whether the signer has the key.
func (k *signerKey) there(ctx context.Context) error {
	var a publicAnswer
	if err := k.client.ask(ctx, http.MethodGet, pathKeys+"/"+k.name, nil, &a); err != nil {
		return err
	}
	if !bytes.Equal(a.Public, k.spki) {
		return fmt.Errorf("%w at %s holds another key by the name %s: is it the right signer?", ErrSigner, k.client.socket, k.name)
	}
	return nil
}

// prove has a signature made of nothing.
func (k *signerKey) prove(ctx context.Context) error {
	digest := sha256.Sum256([]byte("sallyport: does the signer sign?"))
	_, err := k.sign(ctx, digest[:], crypto.SHA256)
	return err
}

// signerOf is the signer's key that issues; false where it is in a file.
func (a *Authority) signerOf() (*signerKey, bool) {
	if a.ra != nil {
		return nil, false
	}
	key, ok := a.mat().interKey.(*signerKey)
	return key, ok
}

func validKeyName(s string) bool {
	return s != "" && len(s) <= 64 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == "" && s[0] != '-'
}
