package pki

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/internal/httpserve"
	"sallyport/internal/identity"
	"sallyport/internal/lockdir"
	"sallyport/internal/wire"
)

// SignerConfig of a [Signer].
type SignerConfig struct {
	Dir        string   // of the keys
	Socket     string   // where it listens
	Passphrase []byte   // nil: the keys lie open in their files
	Users      []uint32 // who may ask, beside root and the signer's own user
	TPM        string   // that makes and keeps the keys from now on; empty: none
	Log        *slog.Logger
}

// Signer keeps private keys in a process, and by a user, of its own. Who asks
// is told by the kernel. It signs what it is given: it protects the keys, and
// leaves a line in its log for each signature.
type Signer struct {
	cfg  SignerConfig
	keys keyring
	lock *lockdir.Lock
	ln   net.Listener

	mu   sync.Mutex
	open map[string]crypto.Signer
}

// OpenSigner locks the directory, opens every key in it, and listens.
func OpenSigner(cfg SignerConfig) (*Signer, error) {
	lock, err := lockdir.Acquire(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("signer: %w", err)
	}
	s := &Signer{cfg: cfg, keys: keyring{dir: cfg.Dir, passphrase: cfg.Passphrase, variable: varSignerPassphrase}, lock: lock, open: map[string]crypto.Signer{}}
	if cfg.TPM != "" {
		s.keys.tpm = &tpm{path: cfg.TPM}
	}
	if err := s.start(); err != nil {
		s.keys.tpm.close()
		return nil, fmt.Errorf("signer: %w", errors.Join(err, lock.Release()))
	}
	return s, nil
}

func (s *Signer) start() error {
	if s.keys.tpm != nil {
		maker, err := s.keys.tpm.maker()
		if err != nil {
			return err
		}
		s.cfg.Log.Info("keys are made in the TPM", "device", s.cfg.TPM, "manufacturer", maker)
	}
	identity.WarnExposed(s.cfg.Log, filepath.Join(s.cfg.Dir, "*.key"))
	sealed, err := s.keys.seal()
	if err != nil {
		return err
	}
	if len(sealed) > 0 {
		s.cfg.Log.Info("keys are encrypted now; copies in older backups are not", "files", sealed)
	}
	names, err := s.keys.names()
	if err != nil {
		return err
	}
	for _, file := range names {
		key, err := s.keys.load(file)
		if err != nil {
			return err
		}
		s.open[file[:len(file)-len(".key")]] = key
		if _, inside := key.(*tpmKey); !inside && s.keys.tpm != nil {
			s.cfg.Log.Warn("a key is in its file, and not in the TPM, until a rollover replaces it", "file", file)
		}
	}
	ln, err := listen(s.cfg.Socket)
	if err != nil {
		return fmt.Errorf("%w (choose another SALLYPORT_SIGNER_LISTEN)", err)
	}
	s.ln = ln
	return nil
}

// Run signs until ctx ends.
func (s *Signer) Run(ctx context.Context) (err error) {
	defer func() { err = errors.Join(err, s.lock.Release()) }()
	defer s.keys.tpm.close()
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+pathKeys, signing(s, func(r makeKeyRequest, _ *http.Request) (publicAnswer, error) { return s.makeKey(r.Name) }))
	mux.HandleFunc("GET "+pathKeys+"/{name}", signing(s, func(_ struct{}, r *http.Request) (publicAnswer, error) {
		key, err := s.key(r.PathValue("name"))
		if err != nil {
			return publicAnswer{}, err
		}
		return public(key)
	}))
	mux.HandleFunc("POST "+pathKeys+"/{name}/sign", signing(s, func(in signRequest, r *http.Request) (signAnswer, error) { return s.sign(r, in) }))
	srv := &http.Server{
		Handler:     mux,
		ReadTimeout: 10 * time.Second, WriteTimeout: signTime, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: wire.MaxHeader,
		ErrorLog: slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug),
	}
	if err := httpserve.Until(ctx, srv, &credited{s.ln, s, make(chan struct{}, maxConns)}, 0); err != nil { // who asks asks again
		return fmt.Errorf("signer: %w", err)
	}
	return nil
}

// credited lets only users in who may ask, and at most maxConns at a time:
// nobody else holds a place.
type credited struct {
	net.Listener
	s     *Signer
	slots chan struct{}
}

type creditedConn struct {
	net.Conn
	leave func()
}

func (c *creditedConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}

func (l *credited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		uid, ok := peerOf(c)
		if !ok || !l.s.allowed(uid) {
			l.s.cfg.Log.Warn("a user may not ask this signer: name it in SALLYPORT_SIGNER_USERS if it should", "uid", uid)
			_ = c.Close()
			continue
		}
		select {
		case l.slots <- struct{}{}:
			return &creditedConn{c, sync.OnceFunc(func() { <-l.slots })}, nil
		default:
			l.s.cfg.Log.Warn("too many connections", "limit", maxConns)
			_ = c.Close()
		}
	}
}

// peerOf asks the kernel for the user at the other end of a unix socket.
func peerOf(c net.Conn) (uid uint32, ok bool) {
	sc, is := c.(*net.UnixConn)
	if !is {
		return 0, false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return 0, false
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil || credErr != nil {
		return 0, false
	}
	return cred.Uid, true
}

func (s *Signer) allowed(uid uint32) bool {
	return uid == 0 || uid == uint32(os.Geteuid()) || slices.Contains(s.cfg.Users, uid)
}

// errNoKey and errKeyExists are conditions of a signer.
var (
	errNoKey     = errors.New("there is no such key: is it the right signer?")
	errKeyExists = errors.New("there is a key by that name")
)

func (s *Signer) key(name string) (crypto.Signer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if key, ok := s.open[name]; ok {
		return key, nil
	}
	return nil, errNoKey
}

// makeKey never replaces a key.
func (s *Signer) makeKey(name string) (publicAnswer, error) {
	if !validKeyName(name) {
		return publicAnswer{}, fmt.Errorf("%w: the name of a key is made of a-z, 0-9 and -, at most 64", wire.ErrMalformed)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	file := name + ".key"
	if _, err := os.Lstat(filepath.Join(s.cfg.Dir, file)); !errors.Is(err, fs.ErrNotExist) {
		return publicAnswer{}, errKeyExists
	}
	if len(s.open) >= maxKeys {
		return publicAnswer{}, fmt.Errorf("%w: there are %d keys already; delete files of those that are not used any more, and start again", wire.ErrTooLarge, maxKeys)
	}
	key, err := s.keys.make(file)
	if err != nil {
		return publicAnswer{}, err
	}
	s.open[name] = key
	s.cfg.Log.Info("key made", "key", name)
	return public(key)
}

// maxKeys bounds what a CA that runs wild can fill the disk with.
const maxKeys = 256

func public(key crypto.Signer) (publicAnswer, error) {
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	return publicAnswer{spki}, err
}

func (s *Signer) sign(r *http.Request, in signRequest) (signAnswer, error) {
	name := r.PathValue("name")
	key, err := s.key(name)
	if err != nil {
		return signAnswer{}, err
	}
	hash, ok := digests[in.Hash]
	if !ok || len(in.Digest) != hash.Size() {
		return signAnswer{}, fmt.Errorf("%w: want a digest by SHA-256, SHA-384 or SHA-512", wire.ErrMalformed)
	}
	sig, err := key.Sign(rand.Reader, in.Digest, hash)
	if err == nil {
		s.cfg.Log.Info("signed", "key", name, "digest", fmt.Sprintf("%x", in.Digest))
	}
	return signAnswer{sig}, err
}

// signing is one request.
func signing[In, Out any](s *Signer, f func(In, *http.Request) (Out, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var in In
		var out Out
		var err error
		if r.Method == http.MethodPost {
			if err = wire.DecodeJSON(r.Body, maxSigning, &in); err != nil {
				err = fmt.Errorf("%w: %w", wire.ErrMalformed, err)
			}
		}
		if err == nil {
			out, err = f(in, r)
		}
		w.Header().Set("Content-Type", "application/json")
		if err != nil {
			s.cfg.Log.Warn("request refused", "path", wire.Quotable(r.URL.Path), "error", err)
			w.WriteHeader(signingStatus(err))
			_ = json.NewEncoder(w).Encode(problem{Message: err.Error()})
			return
		}
		_ = json.NewEncoder(w).Encode(out) // the peer is gone: it asks again
	}
}

func signingStatus(err error) int {
	switch {
	case errors.Is(err, errNoKey):
		return http.StatusNotFound
	case errors.Is(err, errKeyExists):
		return http.StatusConflict
	case errors.Is(err, wire.ErrMalformed), errors.Is(err, wire.ErrTooLarge):
		return http.StatusBadRequest
	}
	return http.StatusInternalServerError
}
