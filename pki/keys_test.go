package pki_test

import (
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"sallyport/internal/wire"
	"sallyport/pki"
)

func keyFile(t *testing.T, dir, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func sealedKey(t *testing.T, dir, name string) {
	t.Helper()
	if s := keyFile(t, dir, name); !strings.HasPrefix(s, "-----BEGIN ENCRYPTED PRIVATE KEY-----\n") {
		t.Errorf("%s begins with %.40q", name, s)
	}
}

// Keys that a new authority makes under a passphrase never lie open, and
// nothing but the passphrase opens them.
func TestPassphrase(t *testing.T) {
	dir := t.TempDir()
	secret := []byte("correct horse battery")
	a := open(t, dir, pki.WithPassphrase(secret))
	closeIt(t, a)
	sealedKey(t, dir, "root.key")
	sealedKey(t, dir, "intermediate.key")

	for name, opts := range map[string][]pki.Option{"none": nil, "wrong": {pki.WithPassphrase([]byte("wrong horse battery"))}} {
		_, err := pki.Open(t.Context(), dir, slog.New(slog.DiscardHandler), opts...)
		if !errors.Is(err, pki.ErrPassphrase) || errors.Is(err, pki.ErrDamaged) || !strings.Contains(err.Error(), "SALLYPORT_PKI_PASSPHRASE_FILE") {
			t.Errorf("passphrase %s: %v", name, err)
		}
	}
	b := open(t, dir, pki.WithPassphrase(secret))
	defer closeIt(t, b)
	id := fresh(t, b, wire.RoleRCP)
	chain, err := b.Issue(t.Context(), request(t, b, id, ""))
	if err != nil {
		t.Fatal(err)
	}
	if err := id.Install(chain); err != nil {
		t.Error(err)
	}
	if !b.Root().Equal(a.Root()) {
		t.Error("the authority is another one now")
	}
}

// A change of the passphrase that was cut off between two keys is named as that,
// with either passphrase, and repeated.
func TestPassphraseCutOff(t *testing.T) {
	dir := t.TempDir()
	old, next := []byte("correct horse battery"), []byte("another horse battery")
	closeIt(t, open(t, dir, pki.WithPassphrase(old)))
	former := keyFile(t, dir, "root.key")
	if err := pki.Reseal(dir, old, next); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "root.key"), []byte(former), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, secret := range [][]byte{old, next} {
		if _, err := pki.Open(t.Context(), dir, slog.New(slog.DiscardHandler), pki.WithPassphrase(secret)); !errors.Is(err, pki.ErrPassphrase) || !strings.Contains(err.Error(), "was cut off") {
			t.Errorf("%s: %v", secret, err)
		}
	}
	if _, err := pki.Open(t.Context(), dir, slog.New(slog.DiscardHandler), pki.WithPassphrase([]byte("nobody's horse"))); !errors.Is(err, pki.ErrPassphrase) || strings.Contains(err.Error(), "was cut off") {
		t.Errorf("a wrong one: %v", err)
	}
	if err := pki.Reseal(dir, old, next); err != nil {
		t.Fatal(err)
	}
	closeIt(t, open(t, dir, pki.WithPassphrase(next)))
}

// What root does to the keys of a service leaves them the service's.
func TestPassphraseLeavesTheOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root gives files away")
	}
	dir := t.TempDir()
	closeIt(t, open(t, dir))
	const user = 65534
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range append(files, dir) {
		if err := os.Chown(name, user, user); err != nil {
			t.Fatal(err)
		}
	}
	if err := pki.Reseal(dir, nil, []byte("correct horse battery")); err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if st, err := os.Stat(name); err != nil || st.Sys().(*syscall.Stat_t).Uid != user {
			t.Errorf("%s: %v is not the user's, %v", name, st, err)
		}
	}
}

// An authority that had none gets its passphrase without any party noticing.
func TestPassphraseLater(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	closeIt(t, a)
	if s := keyFile(t, dir, "root.key"); !strings.HasPrefix(s, "-----BEGIN PRIVATE KEY-----\n") {
		t.Fatalf("root.key begins with %.40q", s)
	}
	secret := []byte("correct horse battery")
	b := open(t, dir, pki.WithPassphrase(secret))
	closeIt(t, b)
	sealedKey(t, dir, "root.key")
	sealedKey(t, dir, "intermediate.key")
	if !b.Root().Equal(a.Root()) || b.TrustDomain() != a.TrustDomain() {
		t.Error("the authority is another one now")
	}
	// Keys under two passphrases are found at the start, not when the root is needed.
	other := t.TempDir()
	closeIt(t, open(t, other, pki.WithPassphrase([]byte("another passphrase"))))
	if err := os.WriteFile(filepath.Join(dir, "root.key"), []byte(keyFile(t, other, "root.key")), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.Open(t.Context(), dir, slog.New(slog.DiscardHandler), pki.WithPassphrase(secret)); !errors.Is(err, pki.ErrPassphrase) || !strings.Contains(err.Error(), "root.key") {
		t.Errorf("a root key under another passphrase: %v", err)
	}
}

// An operator who has lost this program still gets at the keys.
func TestPassphraseIsOrdinaryPKCS8(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	dir := t.TempDir()
	closeIt(t, open(t, dir))
	defer pki.SealAsEver()()
	if err := pki.Reseal(dir, nil, []byte("correct horse battery")); err != nil {
		t.Fatal(err)
	}
	pass := filepath.Join(t.TempDir(), "pass")
	if err := os.WriteFile(pass, []byte("correct horse battery\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), openssl, "pkey", "-in", filepath.Join(dir, "root.key"), "-passin", "file:"+pass, "-noout", "-text").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "prime256v1") {
		t.Errorf("openssl: %v\n%s", err, out)
	}
	out, err = exec.CommandContext(t.Context(), openssl, "asn1parse", "-in", filepath.Join(dir, "root.key")).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "INTEGER           :0927C0") || !strings.Contains(string(out), "hmacWithSHA256") {
		t.Errorf("want 600,000 rounds: %v\n%s", err, out)
	}
}
