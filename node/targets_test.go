package node

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"syscall"
	"testing"
	"time"

	"sallyport/internal/session"
	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

// tunnel opens a gateway's tunnel to the node.
func (ag *agent) tunnel() *session.Tunnel {
	t := ag.p.t
	t.Helper()
	party, ok := ag.in().id.Party()
	if !ok {
		t.Fatal("the node is not certified")
	}
	stream, err := ag.c.Connect(t.Context(), wire.ConnectAuthority(party.ID), nil)
	if err != nil {
		t.Fatal(err)
	}
	tun, err := session.DialTunnel(t.Context(), stream, ag.p.gateway, party, tunnel.Config{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = tun.Run(ctx)
	}()
	t.Cleanup(func() { cancel(); <-done })
	return tun
}

// open opens a stream to a target.
func open(t *testing.T, tun *session.Tunnel, target string) *tunnel.Stream {
	t.Helper()
	s, err := tun.Open(target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	if err := s.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	return s
}

// offer makes the node apply targets: name → address or URL.
func (ag *agent) offer(specs map[string]string) map[string]wire.PolicyStatus {
	t := ag.p.t
	t.Helper()
	var policies []wire.Policy
	raws := map[string]json.RawMessage{}
	for name, where := range specs {
		spec := wire.TargetSpec{Address: where}
		if strings.Contains(where, "//") {
			spec = wire.TargetSpec{URL: where}
		}
		raw, err := json.Marshal(spec)
		if err != nil {
			t.Fatal(err)
		}
		digest := wire.SpecDigest(raw)
		raws[digest] = raw
		policies = append(policies, wire.Policy{Name: name, Type: wire.PolicyTarget, Digest: digest})
	}
	out := map[string]wire.PolicyStatus{}
	for _, st := range ag.in().engine.Apply(t.Context(), policies, raws) {
		out[st.Name] = st
	}
	return out
}

// service listens on loopback and serves each connection with f.
func service(t *testing.T, f func(*net.TCPConn)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			f(c.(*net.TCPConn))
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { _ = ln.Close(); <-done })
	return ln.Addr().String()
}

// refusedWith reads how a stream was refused.
func refusedWith(t *testing.T, s *tunnel.Stream) *tunnel.RefusedError {
	t.Helper()
	_, err := io.Copy(io.Discard, s)
	var no *tunnel.RefusedError
	if !errors.As(err, &no) {
		t.Fatalf("not refused: %v", err)
	}
	return no
}

func TestTargetBothWays(t *testing.T) {
	const size = 100 << 20
	result := make(chan string, 1)
	addr := service(t, func(c *net.TCPConn) { // reads all, then answers as much
		h := sha256.New()
		n, err := io.Copy(h, c)
		if err != nil || n != size {
			result <- fmt.Sprintf("%d bytes, %v", n, err)
			return
		}
		result <- string(h.Sum(nil))
		_, _ = io.Copy(c, io.LimitReader(noise(2), size))
	})
	ag := newPlant(t).node("SALLYPORT_NODE_ALLOW_TARGETS=127.0.0.1:*")
	if st := ag.offer(map[string]string{"bulk": addr})["bulk"]; st.State != wire.PolicyApplied {
		t.Fatalf("%+v", st)
	}
	s := open(t, ag.tunnel(), "bulk")
	sum := func(seed uint64) hash.Hash {
		h := sha256.New()
		_, _ = io.Copy(h, io.LimitReader(noise(seed), size))
		return h
	}
	if _, err := io.Copy(s, io.LimitReader(noise(1), size)); err != nil {
		t.Fatal(err)
	}
	if err := s.CloseWrite(); err != nil { // half-close: the answer comes after it
		t.Fatal(err)
	}
	if got := <-result; got != string(sum(1).Sum(nil)) {
		t.Fatal("the target got something else: ", len(got))
	}
	h := sha256.New()
	if n, err := io.Copy(h, s); err != nil || n != size || !bytes.Equal(h.Sum(nil), sum(2).Sum(nil)) {
		t.Fatalf("%d bytes came back, %v", n, err)
	}
	eventually(t, "the connection is counted", func() bool {
		tg := ag.in().targets
		return tg.open.Load() == 0 && tg.sent.Load() == size && tg.received.Load() == size && tg.accepted.Load() == 1
	})
}

func noise(seed uint64) io.Reader {
	var key [32]byte
	key[0] = byte(seed)
	return rand.NewChaCha8(key)
}

// TestTargetHalfClose: the target ends its direction first, and reads on.
func TestTargetHalfClose(t *testing.T) {
	got := make(chan string, 1)
	addr := service(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "hello")
		_ = c.CloseWrite()
		b, _ := io.ReadAll(c)
		got <- string(b)
	})
	ag := newPlant(t).node("SALLYPORT_NODE_ALLOW_TARGETS=*")
	ag.offer(map[string]string{"t": addr})
	s := open(t, ag.tunnel(), "t")
	if b, err := io.ReadAll(s); err != nil || string(b) != "hello" {
		t.Fatalf("%q, %v", b, err)
	}
	if _, err := io.WriteString(s, "still there"); err != nil {
		t.Fatal(err)
	}
	if err := s.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b := <-got; b != "still there" {
		t.Errorf("the target got %q", b)
	}
}

func TestTargetResets(t *testing.T) {
	ended := make(chan error, 1)
	addr := service(t, func(c *net.TCPConn) {
		b := make([]byte, 1)
		if _, err := io.ReadFull(c, b); err != nil || b[0] == 'r' {
			_ = c.SetLinger(0) // Close sends RST
			return
		}
		_, err := io.Copy(io.Discard, c)
		ended <- err
	})
	ag := newPlant(t).node("SALLYPORT_NODE_ALLOW_TARGETS=*")
	ag.offer(map[string]string{"t": addr})
	tun := ag.tunnel()
	s := open(t, tun, "t")
	if _, err := io.WriteString(s, "r"); err != nil {
		t.Fatal(err)
	}
	if no := refusedWith(t, s); no.Code != tunnel.Reset {
		t.Errorf("the target's RST came as %v", no)
	}
	// And the other way round.
	s = open(t, tun, "t")
	if _, err := io.WriteString(s, "x"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "connected", func() bool { return ag.in().targets.accepted.Load() == 2 })
	s.Refuse(tunnel.Reset, "")
	if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a reset stream came to the target as %v", err)
	}
	// A gateway that dies is no end that looks complete.
	s = open(t, tun, "t")
	if _, err := io.WriteString(s, "x"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "connected", func() bool { return ag.in().targets.accepted.Load() == 3 })
	_ = tun.Close()
	if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a dead gateway came to the target as %v", err)
	}
	eventually(t, "no connection is left", func() bool { return ag.in().targets.open.Load() == 0 })
}

func TestTargetRefusals(t *testing.T) {
	dead := service(t, func(*net.TCPConn) {})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := ln.Addr().String()
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	ag := newPlant(t).node("SALLYPORT_NODE_ALLOW_TARGETS=127.0.0.1:*")
	st := ag.offer(map[string]string{"ok": dead, "closed": closed, "meta": "169.254.169.254:80", "else": "10.0.0.1:80"})
	if st["meta"].State != wire.PolicyFailed || !strings.Contains(st["meta"].Error, "literally") || st["else"].State != wire.PolicyFailed || st["ok"].State != wire.PolicyApplied {
		t.Errorf("%+v", st)
	}
	tun := ag.tunnel()
	expect := func(target string, code tunnel.Code, reason string) {
		t.Helper()
		if no := refusedWith(t, open(t, tun, target)); no.Code != code || !strings.Contains(no.Reason, reason) {
			t.Errorf("%s: %v; want %v", target, no, code)
		}
	}
	expect("nobody", tunnel.NotFound, "no target")
	expect("meta", tunnel.NotFound, "no target") // it was never applied
	expect("closed", tunnel.Unreachable, "connection refused")
	in := ag.in()
	if err := in.lock.drain("maintenance", time.Time{}); err != nil {
		t.Fatal(err)
	}
	expect("ok", tunnel.Draining, "maintenance")
	expect(wire.TargetPing, tunnel.Draining, "maintenance")
	if err := in.lock.resume(); err != nil {
		t.Fatal(err)
	}
	if err := in.lock.obey(installation); err != nil {
		t.Fatal(err)
	}
	if err := in.lock.obey(string(wire.NewID())); err == nil {
		t.Fatal("not locked")
	}
	expect("ok", tunnel.Locked, "this node belongs to")
	if err := in.lock.unlock(""); err != nil {
		t.Fatal(err)
	}
	in.targets.open.Add(maxTargetConns)
	expect("ok", tunnel.Overloaded, "are open")
	in.targets.open.Add(-maxTargetConns)
	if b, err := io.ReadAll(open(t, tun, "ok")); err != nil || len(b) != 0 {
		t.Errorf("%q, %v", b, err)
	}
	if n := in.targets.refusalsByCode()[tunnel.Draining]; n != 2 {
		t.Errorf("%d refusals counted", n)
	}
	// What was applied does not outlive a narrower list.
	ag = ag.restart("SALLYPORT_NODE_ALLOW_TARGETS=127.0.0.1:1")
	tun = ag.tunnel()
	expect("ok", tunnel.Forbidden, "SALLYPORT_NODE_ALLOW_TARGETS")
}

// TestTargetGoes: with its policy, and with what it leads to.
func TestTargetGoes(t *testing.T) {
	ended := make(chan error, 1)
	addr := service(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "x")
		_, err := io.Copy(io.Discard, c)
		ended <- err
	})
	ag := newPlant(t).node("SALLYPORT_NODE_ALLOW_TARGETS=*", "SALLYPORT_NODE_MODE=readonly")
	ag.offer(map[string]string{"t": addr})
	tun := ag.tunnel()
	s := open(t, tun, "t")
	if _, err := io.ReadFull(s, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	ag.offer(nil)
	if no := refusedWith(t, s); no.Code != tunnel.Reset {
		t.Error(no)
	}
	if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
		t.Error(err)
	}
	if no := refusedWith(t, open(t, tun, "t")); no.Code != tunnel.NotFound {
		t.Error(no)
	}
}

// relay is an HTTP client whose connections are streams to a target.
func relay(t *testing.T, tun *session.Tunnel, target string, dialled *int) *http.Client {
	t.Helper()
	tr := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		*dialled++
		return tun.Open(target)
	}}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 2 * time.Minute}
}

func TestBuiltinTargets(t *testing.T) {
	ag := newPlant(t).node()
	tun := ag.tunnel()
	dialled := 0
	c := relay(t, tun, wire.TargetPing, &dialled)
	for range 3 {
		res, err := c.Get("http://t/any/path")
		if err != nil {
			t.Fatal(err)
		}
		var got map[string]string
		if err := errors.Join(json.NewDecoder(res.Body).Decode(&got), res.Body.Close()); err != nil {
			t.Fatal(err)
		}
		if _, err := time.Parse(time.RFC3339Nano, got["time"]); err != nil || got["node"] != "web-1" || got["id"] != string(ag.in().id.ID()) || res.StatusCode != 200 {
			t.Errorf("%d, %v, %v", res.StatusCode, got, err)
		}
	}
	if dialled != 1 {
		t.Errorf("%d connections for 3 requests", dialled)
	}
	// Echo answers while the request is still coming.
	c = relay(t, tun, wire.TargetEcho, &dialled)
	pr, pw := io.Pipe()
	req, err := http.NewRequestWithContext(t.Context(), "POST", "http://t/", pr)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "text/x-echo")
	first := make(chan error, 1)
	go func() { // a client sends its header with the first piece of the body
		_, err := io.WriteString(pw, "zero")
		first <- err
	}()
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(io.LimitReader(res.Body, 4)); err != nil || string(b) != "zero" {
		t.Fatalf("%q, %v", b, err)
	}
	if err := <-first; err != nil {
		t.Fatal(err)
	}
	if res.Header.Get("Content-Type") != "text/x-echo" {
		t.Error(res.Header)
	}
	for _, line := range []string{"one", "two"} {
		if _, err := io.WriteString(pw, line); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, len(line))
		if _, err := io.ReadFull(res.Body, b); err != nil || string(b) != line {
			t.Fatalf("%q, %v", b, err)
		}
	}
	_ = pw.Close()
	if b, err := io.ReadAll(res.Body); err != nil || len(b) != 0 {
		t.Errorf("%q, %v", b, err)
	}
	_ = res.Body.Close()
	const size = 8 << 20
	res, err = c.Post("http://t/", "", io.LimitReader(noise(3), size))
	if err != nil {
		t.Fatal(err)
	}
	want, got := sha256.New(), sha256.New()
	_, _ = io.Copy(want, io.LimitReader(noise(3), size))
	if n, err := io.Copy(got, res.Body); err != nil || n != size || !bytes.Equal(want.Sum(nil), got.Sum(nil)) {
		t.Errorf("%d bytes, %v", n, err)
	}
	_ = res.Body.Close()
}

// TestTargetTLS: the node speaks TLS to https targets and verifies them.
func TestTargetTLS(t *testing.T) {
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.Proto+" "+r.URL.Path)
	}))
	defer srv.Close()
	srv.Config.ErrorLog = nil
	ended := make(chan error, 2)
	raw := service(t, func(c *net.TCPConn) {
		_, err := io.Copy(io.Discard, tls.Server(c, srv.TLS))
		ended <- err
	})
	ag := newPlant(t).node("SALLYPORT_NODE_ALLOW_TARGETS=*")
	ag.offer(map[string]string{"web": srv.URL, "raw": "https://" + raw})
	tun := ag.tunnel()
	if no := refusedWith(t, open(t, tun, "web")); no.Code != tunnel.Unreachable || !strings.Contains(no.Reason, "certificate") {
		t.Errorf("a service that nobody vouches for: %v", no)
	}
	roots := x509.NewCertPool()
	roots.AddCert(srv.Certificate())
	ag.in().targets.tls.RootCAs = roots
	dialled := 0
	res, err := relay(t, tun, "web", &dialled).Get("http://web/x")
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(res.Body)
	if err != nil || string(b) != "HTTP/1.1 /x" {
		t.Errorf("%q, %v", b, err)
	}
	_ = res.Body.Close()
	// An end is an end, a reset is none.
	for n, end := range []func(*tunnel.Stream) error{
		(*tunnel.Stream).CloseWrite,
		func(s *tunnel.Stream) error { s.Refuse(tunnel.Reset, ""); return nil },
	} {
		accepted := ag.in().targets.accepted.Load()
		s := open(t, tun, "raw")
		if _, err := io.WriteString(s, "half of a"); err != nil {
			t.Fatal(err)
		}
		eventually(t, "connected", func() bool { return ag.in().targets.accepted.Load() > accepted })
		if err := end(s); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; (err == nil) != (n == 0) {
			t.Errorf("way %d came to the service as %v", n, err)
		}
	}
}
