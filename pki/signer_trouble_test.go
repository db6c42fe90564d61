package pki_test

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/internal/wire"
	"sallyport/pki"
)

// What a signer may do instead of what it is asked for.
const (
	signsWell int64 = iota
	refusesToSign
	signsWrongly
	hasAnotherKey
	hangs
)

// moodySigner is a signer whose mood can be set.
func moodySigner(t *testing.T) (socket string, mood *atomic.Int64) {
	t.Helper()
	real, _ := signer(t, shortDir(t))
	mood = new(atomic.Int64)
	pass := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", "signer" },
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", real)
		}},
	}
	gone := make(chan struct{})
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		sign := strings.HasSuffix(r.URL.Path, "/sign")
		switch now := mood.Load(); {
		case now == refusesToSign && sign:
			w.WriteHeader(http.StatusForbidden)
			_ = json.NewEncoder(w).Encode(map[string]string{"message": strings.Repeat("a long way to say ", 10) + "not now"})
		case now == signsWrongly && sign:
			_ = json.NewEncoder(w).Encode(map[string][]byte{"signature": []byte("wrong")})
		case now == hasAnotherKey && r.Method == http.MethodGet:
			_ = json.NewEncoder(w).Encode(map[string][]byte{"public": []byte("another")})
		case now == hangs:
			select {
			case <-gone:
			case <-r.Context().Done():
			}
		default:
			pass.ServeHTTP(w, r)
		}
	}))
	socket = filepath.Join(shortDir(t), "moody.sock")
	_ = srv.Listener.Close()
	var err error
	if srv.Listener, err = net.Listen("unix", socket); err != nil {
		t.Fatal(err)
	}
	srv.Start()
	t.Cleanup(func() { close(gone); srv.Close() })
	return socket, mood
}

// TestRolloverThatIsNotSigned: a step is not taken when the signer has its key, and
// does not sign the list of roots that belongs to it.
func TestRolloverThatIsNotSigned(t *testing.T) {
	socket, mood := moodySigner(t)
	dir := t.TempDir()
	a := open(t, dir, pki.WithSigner(socket))
	was := rotate(t, a, wire.RolloverRoot)
	mood.Store(refusesToSign)
	if _, err := a.Abort(t.Context(), 0); !errors.Is(err, pki.ErrSigner) {
		t.Errorf("%v", err)
	}
	mood.Store(signsWell)
	for _, what := range []string{"running on", "started again"} {
		if now := a.State(); now.Rollover == nil || now.Rollover.Aborted || now.Issuing() != was.Issuing() || now.Number != was.Number {
			t.Errorf("%s, the step that was refused is taken: %+v", what, now)
		}
		closeIt(t, a)
		a = open(t, dir, pki.WithSigner(socket))
	}
	if now, err := a.Abort(t.Context(), 0); err != nil || !now.Rollover.Aborted {
		t.Errorf("%+v, %v", now, err)
	}
	closeIt(t, a)
}

// TestSignerThatSignsNothing: whatever a signer does instead of signing is noticed,
// and so is that it signs again.
func TestSignerThatSignsNothing(t *testing.T) {
	socket, mood := moodySigner(t)
	a := open(t, t.TempDir(), pki.WithSigner(socket))
	defer closeIt(t, a)
	issue := func() error {
		_, err := a.Issue(t.Context(), request(t, a, fresh(t, a, wire.RoleNode), "web-1"))
		return err
	}
	for says, now := range map[string]int64{"not now": refusesToSign, "the signature is wrong": signsWrongly, "holds another key": hasAnotherKey} {
		mood.Store(now)
		if err := issue(); (err != nil) != (now != hasAnotherKey) {
			t.Errorf("%s: issued: %v", says, err)
		}
		err := a.Reach(t.Context())
		if s := a.State(); err == nil || !strings.Contains(s.Problem, says) || strings.Contains(s.Problem, "does it run there") {
			t.Errorf("%s: %v, %q", says, err, s.Problem)
		}
		mood.Store(signsWell)
		if err, s := a.Reach(t.Context()), a.State(); err != nil || s.Problem != "" {
			t.Errorf("after %s: %v, %q", says, err, s.Problem)
		}
	}
}

// TestSignerThatWasNotAsked: a signer may have its key and sign nothing, as a TPM does
// that is locked. It is noticed before the next certificate, with no signature more
// than that takes.
func TestSignerThatWasNotAsked(t *testing.T) {
	socket, mood := moodySigner(t)
	dir := t.TempDir()
	closeIt(t, open(t, dir, pki.WithSigner(socket)))
	a := open(t, dir, pki.WithSigner(socket))
	defer closeIt(t, a)
	mood.Store(refusesToSign)
	if err, s := a.Reach(t.Context()), a.State(); err == nil || !strings.Contains(s.Problem, "not now") {
		t.Errorf("%v, %q", err, s.Problem)
	}
	mood.Store(signsWell)
	if err, s := a.Reach(t.Context()), a.State(); err != nil || s.Problem != "" {
		t.Errorf("%v, %q", err, s.Problem)
	}
	mood.Store(refusesToSign)
	if err := a.Reach(t.Context()); err != nil {
		t.Errorf("it was asked for a signature a moment after one: %v", err)
	}
}

// TestSignerThatHangs: whoever asks how it is waits no longer than he wants to, and
// that he did not wait is no trouble of the signer.
func TestSignerThatHangs(t *testing.T) {
	socket, mood := moodySigner(t)
	a := open(t, t.TempDir(), pki.WithSigner(socket))
	defer closeIt(t, a)
	mood.Store(hangs)
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	began := time.Now()
	if err := a.Reach(ctx); err == nil || time.Since(began) > 15*time.Second {
		t.Errorf("after %s: %v", time.Since(began), err)
	}
	if s := a.State(); s.Problem != "" {
		t.Errorf("problem %q", s.Problem)
	}
}

// TestNoKeyWithoutRoom: a step that a full disk of the authority forbids leaves no key
// at the signer, which keeps them for ever and takes a bounded number.
func TestNoKeyWithoutRoom(t *testing.T) {
	keys, dir := shortDir(t), t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skip(err) // only root has small disks
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, 0) })
	socket, _ := signer(t, keys)
	a := open(t, dir, pki.WithSigner(socket))
	defer func() { closeIt(t, a) }()
	before := names(t, dir)
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 2<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	for _, kind := range []string{wire.RolloverIntermediate, wire.RolloverRoot, wire.RolloverRoot} {
		if _, err := a.Rotate(t.Context(), kind, 0); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("%s on a full disk: %v", kind, err)
		}
	}
	if got := privateKeys(t, keys); len(got) != 2 {
		t.Errorf("the signer has %v", got)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if after := names(t, dir); after != before {
		t.Errorf("beside the authority there was %s, and is %s", before, after)
	}
	if _, err := a.Rotate(t.Context(), wire.RolloverRoot, 0); err != nil {
		t.Errorf("with room again: %v", err)
	}
}
