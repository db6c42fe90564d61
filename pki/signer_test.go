package pki_test

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sallyport/internal/lockdir"
	"sallyport/internal/wire"
	"sallyport/pki"
)

// shortDir is a directory whose name leaves room for a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// signer runs a signer on a directory until the test, or stop, ends it.
func signer(t *testing.T, dir string) (socket string, stop func()) {
	t.Helper()
	cfg := pki.SignerConfig{Dir: dir, Socket: filepath.Join(dir, "s.sock"), Passphrase: []byte("correct horse battery"), Log: quiet}
	s, err := pki.OpenSigner(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pki.OpenSigner(cfg); !errors.Is(err, lockdir.ErrLocked) {
		t.Errorf("two signers on one directory: %v", err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	ended := false
	stop = func() {
		if ended {
			return
		}
		ended = true
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return cfg.Socket, stop
}

// privateKeys are the files below a directory that hold a key, sealed or not.
func privateKeys(t *testing.T, dir string) (found []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if bytes.Contains(b, []byte("PRIVATE KEY")) {
			found = append(found, filepath.Base(path))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestSigner(t *testing.T) {
	keys, dir := shortDir(t), t.TempDir()
	socket, stop := signer(t, keys)
	a := open(t, dir, pki.WithSigner(socket))
	if got := privateKeys(t, dir); len(got) > 0 {
		t.Errorf("the authority has keys: %v", got)
	}
	if got := privateKeys(t, keys); len(got) != 2 {
		t.Errorf("the signer has %v", got)
	}
	check := func(a *pki.Authority) {
		t.Helper()
		id := fresh(t, a, wire.RoleNode)
		chain, err := a.Issue(t.Context(), request(t, a, id, "web-1"))
		if err != nil {
			t.Fatal(err)
		}
		if err := id.Install(chain); err != nil {
			t.Error(err)
		}
		var set wire.Revocations
		set.Number = 1
		if env, ok := a.Revocations(); ok {
			set.Number = number(t, env) + 1
		}
		env, err := a.SignRevocations(t.Context(), set, set.Number-1)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := id.ApplyRevocations(env); err != nil {
			t.Error(err)
		}
	}
	check(a)
	if _, err := a.Rotate(t.Context(), wire.RolloverRoot, 0); err != nil {
		t.Fatal(err)
	}
	check(a)
	if got := privateKeys(t, dir); len(got) > 0 {
		t.Errorf("after a rollover the authority has keys: %v", got)
	}
	closeIt(t, a)

	a = open(t, dir, pki.WithSigner(socket))
	check(a)
	// The signer goes: nothing is issued, and nothing is made anew.
	stop()
	id := fresh(t, a, wire.RoleNode)
	if _, err := a.Issue(t.Context(), request(t, a, id, "web-2")); err == nil {
		t.Error("a certificate was issued without a signer")
	}
	closeIt(t, a)
	before := names(t, dir)
	for name, opts := range map[string][]pki.Option{"away": {pki.WithSigner(socket)}, "not named": nil} {
		_, err := pki.Open(t.Context(), dir, quiet, opts...)
		if !errors.Is(err, pki.ErrSigner) || errors.Is(err, pki.ErrDamaged) || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("signer %s: %v", name, err)
		}
	}
	if after := names(t, dir); after != before {
		t.Errorf("files were %s, are %s", before, after)
	}
	// Another signer has no such key, whatever its name.
	other, _ := signer(t, shortDir(t))
	if _, err := pki.Open(t.Context(), dir, quiet, pki.WithSigner(other)); !errors.Is(err, pki.ErrSigner) {
		t.Errorf("another signer: %v", err)
	}
	// Its keys under another passphrase: the error names the signer's variable.
	wrong := pki.SignerConfig{Dir: keys, Socket: filepath.Join(keys, "s.sock"), Passphrase: []byte("a wrong battery staple"), Log: quiet}
	if _, err := pki.OpenSigner(wrong); !errors.Is(err, pki.ErrPassphrase) || !strings.Contains(err.Error(), "SALLYPORT_SIGNER_PASSPHRASE_FILE") {
		t.Errorf("with a wrong passphrase: %v", err)
	}
	// The same signer again, its keys opened with its passphrase.
	socket, _ = signer(t, keys)
	a = open(t, dir, pki.WithSigner(socket))
	check(a)
	closeIt(t, a)
}

func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return strings.Join(all, " ")
}

// An authority with keys in files gets a signer: a rollover moves them.
func TestSignerLater(t *testing.T) {
	dir := t.TempDir()
	closeIt(t, open(t, dir))
	socket, _ := signer(t, shortDir(t))
	a := open(t, dir, pki.WithSigner(socket), pki.WithPassphrase([]byte("correct horse battery")))
	defer closeIt(t, a)
	if _, err := a.Rotate(t.Context(), wire.RolloverRoot, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Finish(t.Context(), true, 0); err != nil {
		t.Fatal(err)
	}
	if got := privateKeys(t, dir); len(got) > 0 {
		t.Errorf("keys in files: %v", got)
	}
	if _, err := a.Issue(t.Context(), request(t, a, fresh(t, a, wire.RoleNode), "web-1")); err != nil {
		t.Error(err)
	}
}

// A command that is run without the variables of the service leaves no key open
// in a file: it asks for them.
func TestKeysAreMadeWhereTheOthersAre(t *testing.T) {
	socket, _ := signer(t, shortDir(t))
	for name, c := range map[string]struct {
		opt  pki.Option
		want error
		text string
	}{
		"signer":     {pki.WithSigner(socket), pki.ErrSigner, "SALLYPORT_PKI_SIGNER"},
		"passphrase": {pki.WithPassphrase([]byte("correct horse battery")), pki.ErrPassphrase, "SALLYPORT_PKI_PASSPHRASE_FILE"},
	} {
		dir := t.TempDir()
		a := open(t, dir, c.opt)
		root := a.Root()
		closeIt(t, a)
		before := names(t, dir)
		if _, _, err := pki.RequestIntermediate(dir, root, ""); !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
		if after := names(t, dir); after != before {
			t.Errorf("%s: files were %s, are %s", name, before, after)
		}
		if _, _, err := pki.RequestIntermediate(dir, root, "", c.opt); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRolloverWithoutSigner: a step that is refused because the signer is away is
// not found taken at the next start, and an abort that is repeated is one abort.
func TestRolloverWithoutSigner(t *testing.T) {
	keys, dir := shortDir(t), t.TempDir()
	socket, stop := signer(t, keys)
	a := open(t, dir, pki.WithSigner(socket))
	was := rotate(t, a, wire.RolloverIntermediate)
	stop()
	for what, step := range map[string]func() (wire.CAState, error){
		"abort":  func() (wire.CAState, error) { return a.Abort(t.Context(), 0) },
		"finish": func() (wire.CAState, error) { return a.Finish(t.Context(), false, 0) },
	} {
		if _, err := step(); !errors.Is(err, pki.ErrSigner) {
			t.Errorf("%s: %v", what, err)
		}
		closeIt(t, a)
		socket, stop = signer(t, keys)
		a = open(t, dir, pki.WithSigner(socket))
		if now := a.State(); now.Rollover == nil || now.Rollover.Aborted || now.Issuing() != was.Issuing() {
			t.Errorf("%s was refused, and is found taken: %+v", what, now)
		}
		stop()
	}
	closeIt(t, a)
}

// TestSignerAway: an authority says that its signer is away before a certificate
// cannot be had, and that it is back.
func TestSignerAway(t *testing.T) {
	keys, dir := shortDir(t), t.TempDir()
	socket, stop := signer(t, keys)
	a := open(t, dir, pki.WithSigner(socket))
	defer func() { closeIt(t, a) }()
	look := func(when string, well bool) {
		t.Helper()
		err := a.Reach(t.Context())
		if s := a.State(); (err == nil) != well || s.Signer != socket || (s.Problem == "") != well || s.Since.IsZero() != well || s.External != "" || strings.Contains(s.Problem, "http://") {
			t.Errorf("%s: %v, %+v", when, err, s)
		}
	}
	look("it is there", true)
	stop()
	look("it is away", false)
	if _, err := a.Issue(t.Context(), request(t, a, fresh(t, a, wire.RoleNode), "web-1")); err == nil {
		t.Error("a certificate was issued without a signer")
	}
	look("it did not sign", false)
	_, stop = signer(t, keys)
	look("it is back", true)
	stop()
}

// A reference to a key that the signer holds under that name, but another one.
func TestSignerSwapped(t *testing.T) {
	keys, dir := shortDir(t), t.TempDir()
	socket, _ := signer(t, keys)
	closeIt(t, open(t, dir, pki.WithSigner(socket)))
	file := filepath.Join(dir, "intermediate.key")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	root, err := os.ReadFile(filepath.Join(dir, "root.key"))
	if err != nil {
		t.Fatal(err)
	}
	rootBlock, _ := pem.Decode(root)
	block.Headers["Key"] = rootBlock.Headers["Key"]
	if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.Open(t.Context(), dir, quiet, pki.WithSigner(socket)); !errors.Is(err, pki.ErrSigner) || !strings.Contains(err.Error(), "another key") {
		t.Errorf("%v", err)
	}
}

// What one asks a signer that is not a key's business.
func TestSignerRefuses(t *testing.T) {
	keys := shortDir(t)
	socket, _ := signer(t, keys)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	ask := func(method, path, body string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, "http://signer"+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}
	if code, body := ask("POST", "/v1/keys", `{"name":"one"}`); code != 200 {
		t.Fatalf("%d %s", code, body)
	}
	const digest = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
	for _, c := range []struct {
		method, path, body string
		want               int
	}{
		{"POST", "/v1/keys", `{"name":"one"}`, 409},
		{"POST", "/v1/keys", `{"name":"../one"}`, 400},
		{"POST", "/v1/keys", `{"name":"-one"}`, 400},
		{"POST", "/v1/keys", `{"name":""}`, 400},
		{"POST", "/v1/keys", `{"name":"` + strings.Repeat("x", 65) + `"}`, 400},
		{"POST", "/v1/keys", strings.Repeat("x", 32<<10), 400},
		{"GET", "/v1/keys/one", "", 200},
		{"GET", "/v1/keys/two", "", 404},
		{"GET", "/v1/keys/..%2fone", "", 404},
		{"POST", "/v1/keys/one/sign", `{"digest":"` + digest + `","hash":"SHA-256"}`, 200},
		{"POST", "/v1/keys/two/sign", `{"digest":"` + digest + `","hash":"SHA-256"}`, 404},
		{"POST", "/v1/keys/one/sign", `{"digest":"` + digest + `","hash":"SHA-384"}`, 400},
		{"POST", "/v1/keys/one/sign", `{"digest":"` + digest + `","hash":"MD5"}`, 400},
		{"POST", "/v1/keys/one/sign", `{"digest":"AAAA","hash":"SHA-256"}`, 400},
		{"DELETE", "/v1/keys/one", "", 405},
	} {
		if code, body := ask(c.method, c.path, c.body); code != c.want {
			t.Errorf("%s %s %.60s: %d, want %d: %s", c.method, c.path, c.body, code, c.want, body)
		}
	}
	if got := privateKeys(t, keys); len(got) != 1 {
		t.Errorf("keys: %v", got)
	}
	if got := privateKeys(t, filepath.Dir(socket)); len(got) != 1 || !strings.HasPrefix(keyFile(t, keys, "one.key"), "-----BEGIN ENCRYPTED") {
		t.Errorf("the key lies open: %v", got)
	}
}

func number(t *testing.T, env wire.Envelope) int64 {
	t.Helper()
	var set wire.Revocations
	if err := json.Unmarshal(env.Payload, &set); err != nil {
		t.Fatal(err)
	}
	return set.Number
}

// TestSignerOfAnother: a signer that has other keys is no signer that is away, and a
// key file of a signer that is damaged is in no backup of the authority.
func TestSignerOfAnother(t *testing.T) {
	dir, keys := t.TempDir(), shortDir(t)
	socket, stop := signer(t, keys)
	closeIt(t, open(t, dir, pki.WithSigner(socket)))
	stop()
	other, _ := signer(t, shortDir(t))
	if _, err := pki.Open(t.Context(), dir, quiet, pki.WithSigner(other)); err == nil || !strings.Contains(err.Error(), "is it the right signer?") || strings.Contains(err.Error(), "does it run there") {
		t.Errorf("at another signer: %v", err)
	}
	bad := filepath.Join(keys, "strange.key")
	if err := os.WriteFile(bad, []byte("cut off"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := pki.OpenSigner(pki.SignerConfig{Dir: keys, Socket: socket, Passphrase: []byte("correct horse battery"), Log: quiet})
	if !errors.Is(err, pki.ErrDamaged) || !strings.Contains(err.Error(), bad) || !strings.Contains(err.Error(), "move it away") || strings.Contains(err.Error(), "enrol again") {
		t.Errorf("with a damaged key: %v", err)
	}
}
