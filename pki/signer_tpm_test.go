package pki_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"sallyport/internal/wire"
	"sallyport/pki"
)

// softTPM is a software TPM: a program of its own, with a socket instead of a
// device. Tests with one do not run in parallel: for a moment the new process has
// all that is open here, locks of directories too.
type softTPM struct {
	t      *testing.T
	state  string
	socket string
	cmd    *exec.Cmd
}

func newTPM(t *testing.T) *softTPM {
	t.Helper()
	if _, err := exec.LookPath("swtpm"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("swtpm is not installed: tests/run setup does it")
		}
		t.Skip("swtpm is not installed")
	}
	dir := shortDir(t)
	p := &softTPM{t: t, state: dir, socket: filepath.Join(dir, "s")}
	p.start()
	t.Cleanup(p.kill)
	return p
}

func (p *softTPM) start() {
	p.t.Helper()
	p.cmd = exec.CommandContext(context.WithoutCancel(p.t.Context()), "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+p.state, "--server", "type=unixio,path="+p.socket, "--flags", "startup-clear")
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	limit := time.After(10 * time.Second)
	for {
		c, err := net.Dial("unix", p.socket)
		if err == nil {
			_ = c.Close()
			return
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-limit:
			p.t.Fatalf("swtpm does not answer: %v", err)
		}
	}
}

func (p *softTPM) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
	_ = os.Remove(p.socket)
}

// provision keeps the storage root key in the TPM, as systemd does at boot.
func (p *softTPM) provision() {
	p.t.Helper()
	dev, err := linuxudstpm.Open(p.socket)
	if err != nil {
		p.t.Fatal(err)
	}
	defer func() { _ = dev.Close() }()
	srk, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(dev)
	if err != nil {
		p.t.Fatal(err)
	}
	evict := tpm2.EvictControl{Auth: tpm2.TPMRHOwner, ObjectHandle: &tpm2.NamedHandle{Handle: srk.ObjectHandle, Name: srk.Name}, PersistentHandle: 0x81000001}
	if _, err := evict.Execute(dev); err != nil {
		p.t.Fatal(err)
	}
	if _, err := (tpm2.FlushContext{FlushHandle: srk.ObjectHandle}).Execute(dev); err != nil {
		p.t.Fatal(err)
	}
	// The owner has a password, as on hosts that somebody administers.
	change := tpm2.HierarchyChangeAuth{AuthHandle: tpm2.TPMRHOwner, NewAuth: tpm2.TPM2BAuth{Buffer: []byte("owner")}}
	if _, err := change.Execute(dev); err != nil {
		p.t.Fatal(err)
	}
}

// signerOn runs a signer until stop.
func signerOn(t *testing.T, cfg pki.SignerConfig) (stop func()) {
	t.Helper()
	s, err := pki.OpenSigner(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	return func() {
		t.Helper()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// The keys of a CA are made in a TPM and never leave it, with a passphrase and
// without, whether its storage root key is kept or made anew.
func TestSignerTPM(t *testing.T) {
	for name, c := range map[string]struct {
		passphrase []byte
		provision  bool
	}{"bare": {}, "passphrase": {passphrase: []byte("correct horse battery")}, "storage root key": {provision: true}, "both": {[]byte("a passphrase of more than 32 bytes, as a TPM takes"), true}} {
		t.Run(name, func(t *testing.T) {
			chip := newTPM(t)
			if c.provision {
				chip.provision()
			}
			keys, dir := shortDir(t), t.TempDir()
			cfg := pki.SignerConfig{Dir: keys, Socket: filepath.Join(keys, "s.sock"), Passphrase: c.passphrase, TPM: chip.socket, Log: quiet}
			issue := func(a *pki.Authority) error {
				id := fresh(t, a, wire.RoleNode)
				chain, err := a.Issue(t.Context(), request(t, a, id, "web-1"))
				if err != nil {
					return err
				}
				return id.Install(chain)
			}
			stop := signerOn(t, cfg)
			a := open(t, dir, pki.WithSigner(cfg.Socket))
			if err := issue(a); err != nil {
				t.Fatal(err)
			}
			if _, err := a.Rotate(t.Context(), wire.RolloverRoot, 0); err != nil {
				t.Fatal(err)
			}
			if err := issue(a); err != nil {
				t.Error(err)
			}
			files := privateKeys(t, keys)
			if len(files) != 4 {
				t.Errorf("key files: %v", files)
			}
			for _, f := range files {
				if s := keyFile(t, keys, f); !strings.HasPrefix(s, "-----BEGIN TSS2 PRIVATE KEY-----\n") {
					t.Errorf("%s begins with %.40q", f, s)
				}
			}

			chip.kill()
			if err := issue(a); err == nil {
				t.Error("issued without the TPM")
			}
			chip.start()
			if err := issue(a); err != nil {
				t.Errorf("after the TPM was started again: %v", err)
			}
			closeIt(t, a)
			stop()
			// It leaves nothing behind in a TPM that has room for three, and no
			// resource manager.
			for range 5 {
				stop = signerOn(t, cfg)
				a = open(t, dir, pki.WithSigner(cfg.Socket))
				if err := issue(a); err != nil {
					t.Error(err)
				}
				closeIt(t, a)
				stop()
			}
		})
	}
}

// A key file is of no use without its TPM and its passphrase.
func TestSignerTPMRefuses(t *testing.T) {
	for name, provision := range map[string]bool{"storage root key made anew": false, "storage root key kept": true} {
		t.Run(name, func(t *testing.T) { refuses(t, provision) })
	}
}

func refuses(t *testing.T, provision bool) {
	chip, other := newTPM(t), newTPM(t)
	if provision {
		chip.provision()
	}
	keys := shortDir(t)
	bare := pki.SignerConfig{Dir: keys, Socket: filepath.Join(keys, "s.sock"), TPM: chip.socket, Log: quiet}
	stop := signerOn(t, bare)
	closeIt(t, open(t, t.TempDir(), pki.WithSigner(bare.Socket)))
	stop()

	sealed := bare
	sealed.Passphrase = []byte("correct horse battery") // keys that had none get it
	signerOn(t, sealed)()
	signerOn(t, sealed)()

	with := func(f func(*pki.SignerConfig)) pki.SignerConfig {
		c := sealed
		f(&c)
		return c
	}
	for name, c := range map[string]struct {
		cfg  pki.SignerConfig
		want error
		text string
	}{
		"no passphrase":    {bare, pki.ErrPassphrase, "SALLYPORT_SIGNER_PASSPHRASE_FILE"},
		"wrong passphrase": {with(func(c *pki.SignerConfig) { c.Passphrase = []byte("a wrong battery staple") }), pki.ErrPassphrase, "SALLYPORT_SIGNER_PASSPHRASE_FILE"},
		"no TPM":           {with(func(c *pki.SignerConfig) { c.TPM = "" }), pki.ErrTPM, "SALLYPORT_SIGNER_TPM"},
		"another TPM":      {with(func(c *pki.SignerConfig) { c.TPM = other.socket }), pki.ErrTPM, "another TPM"},
		"nothing there":    {with(func(c *pki.SignerConfig) { c.TPM = other.socket + "x" }), pki.ErrTPM, "no such file"},
		"no device":        {with(func(c *pki.SignerConfig) { c.TPM = filepath.Join(keys, "lock") }), pki.ErrTPM, "not a device"},
	} {
		if _, err := pki.OpenSigner(c.cfg); !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for range 40 { // and wrong passphrases lock nobody out
		if _, err := pki.OpenSigner(with(func(c *pki.SignerConfig) { c.Passphrase = []byte("a wrong battery staple") })); !errors.Is(err, pki.ErrPassphrase) {
			t.Fatal(err)
		}
	}
	signerOn(t, sealed)()

	name := privateKeys(t, keys)[0]
	whole := keyFile(t, keys, name)
	for what, text := range map[string]string{"cut": whole[:len(whole)/2], "empty": "-----BEGIN TSS2 PRIVATE KEY-----\n-----END TSS2 PRIVATE KEY-----\n"} {
		if err := os.WriteFile(filepath.Join(keys, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := pki.OpenSigner(sealed); !errors.Is(err, pki.ErrDamaged) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// A signer that has its keys in files gets a TPM: new keys are made there, and
// it says which are not.
func TestSignerTPMLater(t *testing.T) {
	keys, dir := shortDir(t), t.TempDir()
	cfg := pki.SignerConfig{Dir: keys, Socket: filepath.Join(keys, "s.sock"), Log: quiet}
	stop := signerOn(t, cfg)
	closeIt(t, open(t, dir, pki.WithSigner(cfg.Socket)))
	stop()
	var log strings.Builder
	cfg.TPM, cfg.Log = newTPM(t).socket, slog.New(slog.NewTextHandler(&log, nil))
	stop = signerOn(t, cfg)
	a := open(t, dir, pki.WithSigner(cfg.Socket))
	if _, err := a.Rotate(t.Context(), wire.RolloverRoot, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Issue(t.Context(), request(t, a, fresh(t, a, wire.RoleNode), "web-1")); err != nil {
		t.Error(err)
	}
	closeIt(t, a)
	stop()
	inside := 0
	for _, f := range privateKeys(t, keys) {
		if strings.Contains(keyFile(t, keys, f), "BEGIN TSS2") {
			inside++
		} else if !strings.Contains(log.String(), "file="+f) {
			t.Errorf("nobody is told that %s is not in the TPM:\n%s", f, log.String())
		}
	}
	if inside != 2 {
		t.Errorf("%d keys in the TPM", inside)
	}
}
