package pki_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
	"sallyport/pki"
)

var quiet = slog.New(slog.DiscardHandler)

func TestMain(m *testing.M) {
	// smallstep links a logger that starts this one before main.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/golang/glog.(*fileSink).flushDaemon"))
}

// remote is an authority behind its listener.
type remote struct {
	*pki.Authority

	t    *testing.T
	dir  string
	addr string
}

func serve(t *testing.T, dir, addr string) *remote {
	t.Helper()
	r := &remote{t: t, dir: dir, Authority: open(t, dir)}
	s, err := pki.Listen(r.Authority, addr, quiet, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Ready(); err != nil {
		t.Error(err)
	}
	r.addr = s.Addr().String()
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		closeIt(t, r.Authority)
	})
	return r
}

// code makes a gateway code and writes it into a file.
func (r *remote) code(ttl time.Duration) (string, pki.GatewayCode) {
	r.t.Helper()
	c, _, err := pki.OpenGateways(r.dir).Add(ttl)
	if err != nil {
		r.t.Fatal(err)
	}
	text, err := c.Encode()
	if err != nil {
		r.t.Fatal(err)
	}
	file := filepath.Join(r.t.TempDir(), "code")
	if err := os.WriteFile(file, []byte(text+"\n"), 0o600); err != nil {
		r.t.Fatal(err)
	}
	return file, c
}

// gateway is the state of one gateway's host.
type gateway struct {
	id   *identity.Identity
	dir  string
	addr string
}

func newGateway(t *testing.T, addr string) *gateway {
	t.Helper()
	dir := t.TempDir()
	id, err := identity.Open(filepath.Join(dir, "identity"), wire.RoleGateway)
	if err != nil {
		t.Fatal(err)
	}
	return &gateway{id, dir, addr}
}

func (g *gateway) connect(t *testing.T, codeFile string) (*pki.Client, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	c, err := pki.Connect(ctx, pki.ClientConfig{Addr: g.addr, CodeFile: codeFile, Dir: g.dir, Identity: g.id, Log: quiet})
	if err == nil {
		t.Cleanup(c.Close)
	}
	return c, err
}

// enrolled connects and has a certificate.
func (g *gateway) enrolled(t *testing.T, codeFile string) *pki.Client {
	t.Helper()
	c, err := g.connect(t, codeFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.id.Pin(wire.KeyOf(c.Root()), c.TrustDomain()); err != nil {
		t.Fatal(err)
	}
	g.renew(t, c)
	return c
}

func (g *gateway) renew(t *testing.T, c *pki.Client) {
	t.Helper()
	csr, err := g.id.CSR(false)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := c.IssueGateway(t.Context(), g.id.ID(), csr)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.id.Install(chain); err != nil {
		t.Fatal(err)
	}
}

func TestRemote(t *testing.T) {
	for name, addr := range map[string]string{"tcp": "127.0.0.1:0", "unix": ""} {
		t.Run(name, func(t *testing.T) {
			if addr == "" {
				dir, err := os.MkdirTemp("", "sp") // a short path
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = os.RemoveAll(dir) }()
				addr = filepath.Join(dir, "pki.sock")
			}
			ca := serve(t, t.TempDir(), addr)
			gw := newGateway(t, ca.addr)
			file, _ := ca.code(time.Hour)
			c := gw.enrolled(t, file)
			if c.TrustDomain() != ca.TrustDomain() || !c.Root().Equal(ca.Root()) {
				t.Errorf("trust domain %s, want %s", c.TrustDomain(), ca.TrustDomain())
			}

			node := fresh(t, ca.Authority, wire.RoleNode)
			req := request(t, ca.Authority, node, "web-1")
			chain, err := c.Issue(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			if err := node.Install(chain); err != nil {
				t.Error(err)
			}
			if _, ok := c.Revocations(); ok {
				t.Error("there are revocations already")
			}
			set := wire.Revocations{Number: 1, Revoked: []wire.Revocation{{Key: node.KeyHash(), Role: wire.RoleNode, ID: node.ID(), At: time.Now()}}}
			env, err := c.SignRevocations(t.Context(), set, 0)
			if err != nil {
				t.Fatal(err)
			}
			if newer, err := gw.id.ApplyRevocations(env); err != nil || !newer {
				t.Errorf("the set: %v, %v", newer, err)
			}
			// What an error means survives the way.
			if _, err := c.SignRevocations(t.Context(), set, 1); !errors.Is(err, identity.ErrOlder) {
				t.Errorf("the same number again: %v", err)
			}
			if _, err := c.Issue(t.Context(), req); !errors.Is(err, identity.ErrRevoked) {
				t.Errorf("a revoked key: %v", err)
			}
			req.Party.Role = wire.RoleGateway
			if _, err := c.Issue(t.Context(), req); !errors.Is(err, pki.ErrRefused) {
				t.Errorf("a gateway by Issue: %v", err)
			}
			// It comes back without its code, and has the set.
			gw.id, err = identity.Open(filepath.Join(gw.dir, "identity"), wire.RoleGateway)
			if err != nil {
				t.Fatal(err)
			}
			again, err := gw.connect(t, "")
			if err != nil {
				t.Fatal(err)
			}
			if held, ok := again.Revocations(); !ok || string(held.Payload) != string(env.Payload) {
				t.Errorf("it knows %s", held.Payload)
			}
			gw.renew(t, again)
		})
	}
}

// A gateway that knows its authority starts without it, and only then.
func TestRemoteAway(t *testing.T) {
	dir := t.TempDir()
	var addr string
	gw := newGateway(t, "")
	t.Run("there", func(t *testing.T) {
		ca := serve(t, dir, "127.0.0.1:0")
		addr = ca.addr
		gw.addr = addr
		file, _ := ca.code(time.Hour)
		gw.enrolled(t, file)
	})
	c, err := gw.connect(t, "")
	if err != nil {
		t.Fatal(err)
	}
	if c.Root() == nil || c.TrustDomain() != gw.id.TrustDomain() {
		t.Error("it does not know its authority any more")
	}
	if _, err := c.Issue(t.Context(), wire.IssueRequest{}); err == nil {
		t.Error("something was issued by nobody")
	}
	if err := c.Reach(t.Context()); err == nil || !strings.Contains(err.Error(), `authority at "`+addr+`": `) || strings.Contains(err.Error(), "https://") {
		t.Errorf("nobody answers, and it says: %v", err)
	}
	fresh := newGateway(t, addr)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	file := filepath.Join(t.TempDir(), "code")
	text, err := pki.GatewayCode{TrustDomain: c.TrustDomain(), Root: c.Root().Raw, TokenID: "0123456789abcdef", Token: "x"}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.Connect(ctx, pki.ClientConfig{Addr: addr, CodeFile: file, Dir: fresh.dir, Identity: fresh.id, Log: quiet}); err == nil {
		t.Error("a gateway that knows nothing started without its authority")
	}
}

func TestGatewayCodes(t *testing.T) {
	ca := serve(t, t.TempDir(), "127.0.0.1:0")
	first := newGateway(t, ca.addr)
	file, code := ca.code(time.Hour)
	if _, err := first.connect(t, ""); !errors.Is(err, pki.ErrUnregistered) || !strings.Contains(err.Error(), "ca gateway add") {
		t.Errorf("without a code: %v", err)
	}
	first.enrolled(t, file)

	t.Run("replayed by another key", func(t *testing.T) {
		if _, err := newGateway(t, ca.addr).connect(t, file); !errors.Is(err, pki.ErrRefused) {
			t.Errorf("%v", err)
		}
	})
	t.Run("by the same key", func(t *testing.T) { // after an answer that was lost
		if _, err := first.connect(t, file); err != nil {
			t.Error(err)
		}
	})
	t.Run("expired", func(t *testing.T) {
		late, _ := ca.code(-time.Second)
		if _, err := newGateway(t, ca.addr).connect(t, late); !errors.Is(err, pki.ErrRefused) || !strings.Contains(err.Error(), "expired") {
			t.Errorf("%v", err)
		}
	})
	t.Run("another token", func(t *testing.T) {
		_, c := ca.code(time.Hour)
		c.Token = code.Token
		text, err := c.Encode()
		if err != nil {
			t.Fatal(err)
		}
		forged := filepath.Join(t.TempDir(), "code")
		if err := os.WriteFile(forged, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := newGateway(t, ca.addr).connect(t, forged); !errors.Is(err, pki.ErrRefused) {
			t.Errorf("%v", err)
		}
	})
	t.Run("of another authority", func(t *testing.T) {
		other := serve(t, t.TempDir(), "127.0.0.1:0")
		foreign, _ := other.code(time.Hour)
		var unknown x509.UnknownAuthorityError
		var name x509.HostnameError
		if _, err := newGateway(t, ca.addr).connect(t, foreign); !errors.As(err, &unknown) && !errors.As(err, &name) {
			t.Errorf("a gateway told its token to somebody else: %v", err)
		}
		if _, err := first.connect(t, foreign); err == nil || !strings.Contains(err.Error(), "belongs to") {
			t.Errorf("a gateway of another trust domain: %v", err)
		}
	})
	t.Run("with the UUID of another gateway", func(t *testing.T) {
		thief := newGateway(t, ca.addr)
		if err := os.WriteFile(filepath.Join(thief.dir, "identity", "id"), []byte(first.id.ID()), 0o600); err != nil {
			t.Fatal(err)
		}
		var err error
		if thief.id, err = identity.Open(filepath.Join(thief.dir, "identity"), wire.RoleGateway); err != nil {
			t.Fatal(err)
		}
		another, _ := ca.code(time.Hour)
		if _, err := thief.connect(t, another); !errors.Is(err, pki.ErrRefused) || !strings.Contains(err.Error(), "another gateway's UUID") {
			t.Errorf("%v", err)
		}
	})
	t.Run("expired long ago", func(t *testing.T) {
		_, old := ca.code(-48 * time.Hour)
		_, recent := ca.code(-time.Second)
		_, open := ca.code(time.Hour)
		for id, kept := range map[string]bool{old.TokenID: false, recent.TokenID: true, open.TokenID: true} {
			if _, err := os.Stat(filepath.Join(ca.dir, "gateways", "code-"+id+".json")); (err == nil) != kept {
				t.Errorf("code kept: %v, want %v", err, kept)
			}
		}
	})
	for name, text := range map[string]string{"join code": wire.JoinPrefix + "abc", "cut": pki.GatewayPrefix + "abc!", "nothing": "", "no root": pki.GatewayPrefix + "e30"} {
		if _, err := pki.ParseGatewayCode(text); !errors.Is(err, pki.ErrGatewayCode) {
			t.Errorf("%s: %v", name, err)
		}
	}
	all, err := pki.OpenGateways(ca.dir).List()
	if err != nil || len(all) != 1 || all[0].ID != first.id.ID() || all[0].Key != first.id.KeyHash() || !all[0].Until.Equal(first.id.NotAfter()) {
		t.Errorf("gateways: %+v, %v", all, err)
	}
}

// A gateway that has not seen what another one revoked has nothing signed, also
// under a number that is free: its set would lack that.
func TestGatewaysRevokeInTurn(t *testing.T) {
	ca := serve(t, t.TempDir(), "127.0.0.1:0")
	file, _ := ca.code(time.Hour)
	first := newGateway(t, ca.addr).enrolled(t, file)
	file, _ = ca.code(time.Hour)
	second := newGateway(t, ca.addr).enrolled(t, file)
	if _, err := first.SignRevocations(t.Context(), wire.Revocations{Number: 1}, 0); err != nil {
		t.Fatal(err)
	}
	if env, err := second.SignRevocations(t.Context(), wire.Revocations{Number: 7}, 0); !errors.Is(err, identity.ErrOlder) {
		t.Errorf("signed: %s, %v", env.Payload, err)
	}
	if _, ok := second.Revocations(); !ok {
		t.Error("it has not seen the set of the other one")
	}
	if _, err := second.SignRevocations(t.Context(), wire.Revocations{Number: 8}, 1); err != nil {
		t.Error(err)
	}
	// A gateway of an older version says nothing of what it has seen.
	if env, err := pki.SignAsBefore(t.Context(), first, wire.Revocations{Number: 9}); err != nil || !strings.Contains(string(env.Payload), `"number":9`) {
		t.Errorf("a request of an older gateway: %s, %v", env.Payload, err)
	}
}

// Numbers of gateways may be apart, so that both are free: whoever comes second
// is told, and what the first one revoked stays revoked.
func TestGatewaysRevokeAtOnce(t *testing.T) {
	const rounds = 15
	ca := serve(t, t.TempDir(), "127.0.0.1:0")
	var g errgroup.Group
	for i := range 2 {
		file, _ := ca.code(time.Hour)
		c := newGateway(t, ca.addr).enrolled(t, file)
		g.Go(func() error {
			for n := range rounds {
				key := wire.KeyHash(fmt.Sprintf("%064x", i*rounds+n))
				for {
					var set wire.Revocations
					if env, ok := c.Revocations(); ok {
						if err := json.Unmarshal(env.Payload, &set); err != nil {
							return err
						}
					}
					set.Revoked = append(set.Revoked, wire.Revocation{Key: key, Role: wire.RoleNode, ID: wire.NewID(), At: time.Now()})
					after := set.Number
					set.Number += 1 + int64(i)
					if _, err := c.SignRevocations(t.Context(), set, after); err == nil {
						break
					} else if !errors.Is(err, identity.ErrOlder) {
						return err
					}
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	env, _ := ca.Revocations()
	var set wire.Revocations
	if err := json.Unmarshal(env.Payload, &set); err != nil || len(set.Revoked) != 2*rounds {
		t.Errorf("%d keys are revoked, want %d: %v", len(set.Revoked), 2*rounds, err)
	}
}

// A gateway whose disk is full has what its authority says, above all what is
// revoked, and does not take the authority for away.
func TestStateThatCannotBeWrittenHolds(t *testing.T) {
	ca := serve(t, t.TempDir(), "127.0.0.1:0")
	gw := newGateway(t, ca.addr)
	file, _ := ca.code(time.Hour)
	c := gw.enrolled(t, file)
	state := filepath.Join(gw.dir, "pki-state.json")
	if err := errors.Join(os.Remove(state), os.Mkdir(state, 0o700)); err != nil { // no file takes the place of a directory
		t.Fatal(err)
	}
	env, err := c.SignRevocations(t.Context(), wire.Revocations{Number: 1}, 0)
	if held, ok := c.Revocations(); err != nil || !ok || !bytes.Equal(held.Payload, env.Payload) {
		t.Errorf("it holds %s, %v", held.Payload, err)
	}
	if err := c.Reach(t.Context()); err != nil {
		t.Errorf("an authority that answers is away: %v", err)
	}
	if err := errors.Join(os.Remove(state), c.Reach(t.Context())); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(state); err != nil || !bytes.Contains(b, []byte(`"revocations"`)) {
		t.Errorf("after the disk had room: %s, %v", b, err)
	}
}

// A gateway that was away for longer than its key alone brings it back needs a
// new code, and that is all that it needs.
func TestGatewayAwayForLong(t *testing.T) {
	ca := serve(t, t.TempDir(), "127.0.0.1:0")
	gw := newGateway(t, ca.addr)
	file, _ := ca.code(time.Hour)
	gw.enrolled(t, file)
	path := filepath.Join(ca.dir, "gateways", "gateway-"+string(gw.id.KeyHash())+".json")
	away := func(d time.Duration) {
		t.Helper()
		all, err := pki.OpenGateways(ca.dir).List()
		if err != nil || len(all) != 1 {
			t.Fatalf("%+v, %v", all, err)
		}
		all[0].Added, all[0].Until = all[0].Added.Add(-d), all[0].Until.Add(-d)
		b, err := json.Marshal(all[0])
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ask := func(codeFile string) error {
		t.Helper()
		c, err := gw.connect(t, codeFile)
		if err != nil {
			t.Fatal(err)
		}
		csr, err := gw.id.CSR(false)
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.IssueGateway(t.Context(), gw.id.ID(), csr)
		return err
	}
	const day = 24 * time.Hour
	away(100 * day) // its certificate lasted 14
	if err := ask(""); err != nil {
		t.Errorf("86 days after the end of its certificate: %v", err)
	}
	away(110 * day)
	for what, codeFile := range map[string]string{"no code": "", "the code that it used": file} {
		if err := ask(codeFile); !errors.Is(err, pki.ErrUnregistered) {
			t.Errorf("96 days after the end of its certificate, %s: %v", what, err)
		}
	}
	another, _ := ca.code(time.Hour)
	if err := ask(another); err != nil {
		t.Errorf("with a new code: %v", err)
	}
}

// A gateway that was removed is answered no more, also on the connection that
// it has, and its key is revoked in every set from then on.
func TestRemovedGateway(t *testing.T) {
	ca := serve(t, t.TempDir(), "127.0.0.1:0")
	bad, good := newGateway(t, ca.addr), newGateway(t, ca.addr)
	file, _ := ca.code(time.Hour)
	cb := bad.enrolled(t, file)
	file, _ = ca.code(time.Hour)
	cg := good.enrolled(t, file)
	register := pki.OpenGateways(ca.dir)
	if _, err := register.Remove(bad.id.ID()); err != nil {
		t.Fatal(err)
	}
	if _, err := register.Remove(bad.id.ID()); !errors.Is(err, pki.ErrNoGateway) {
		t.Errorf("removed twice: %v", err)
	}
	csr, err := bad.id.CSR(false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cb.IssueGateway(t.Context(), bad.id.ID(), csr); !errors.Is(err, pki.ErrUnregistered) {
		t.Errorf("a removed gateway asks: %v", err)
	}
	again, _ := ca.code(time.Hour)
	if _, err := bad.connect(t, again); !errors.Is(err, pki.ErrUnregistered) && !errors.Is(err, pki.ErrRefused) && err != nil {
		t.Errorf("it comes back with its old key and a new code: %v", err)
	}
	env, err := cg.SignRevocations(t.Context(), wire.Revocations{Number: 1000}, 999)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(env.Payload), string(bad.id.KeyHash())) {
		t.Errorf("the other gateway left it out: %s", env.Payload)
	}
}

// A rollover by way of a gateway: neither side loses the other.
func TestRemoteRollover(t *testing.T) {
	ca := serve(t, t.TempDir(), "127.0.0.1:0")
	gw := newGateway(t, ca.addr)
	file, _ := ca.code(time.Hour)
	c := gw.enrolled(t, file)
	old := c.Root()
	if _, err := c.Finish(t.Context(), false, 0); !errors.Is(err, pki.ErrRollover) {
		t.Errorf("finished before it began: %v", err)
	}
	s, err := c.Rotate(t.Context(), wire.RolloverRoot, 0)
	if err != nil || s.Rollover == nil {
		t.Fatalf("%+v, %v", s, err)
	}
	if c.State().Rollover == nil || c.Root().Equal(old) || !c.Root().Equal(ca.Root()) {
		t.Errorf("the client does not know of it: %+v", c.State())
	}
	doc, ok := c.Trust()
	if !ok {
		t.Fatal("there is no trust document")
	}
	if _, err := gw.id.ApplyTrust(doc); err != nil {
		t.Fatal(err)
	}
	c.Close() // new connections from here on
	gw.renew(t, c)
	if s, err = c.Finish(t.Context(), true, 0); err != nil || s.Rollover != nil {
		t.Fatalf("%+v, %v", s, err)
	}
	if doc, ok = c.Trust(); !ok {
		t.Fatal("there is no trust document")
	}
	if _, err := gw.id.ApplyTrust(doc); err != nil {
		t.Fatal(err)
	}
	c.Close()
	gw.renew(t, c)
	root, err := x509.ParseCertificate(gw.id.Chain()[len(gw.id.Chain())-1])
	if err != nil || root.Equal(old) {
		t.Errorf("the gateway's chain ends with the old root, %v", err)
	}
}

// The authority signs the removal by itself.
func TestRemovalIsSigned(t *testing.T) {
	dir := t.TempDir()
	var key wire.KeyHash
	t.Run("before", func(t *testing.T) {
		ca := serve(t, dir, "127.0.0.1:0")
		gw := newGateway(t, ca.addr)
		file, _ := ca.code(time.Hour)
		gw.enrolled(t, file)
		key = gw.id.KeyHash()
		if _, err := pki.OpenGateways(dir).Remove(gw.id.ID()); err != nil {
			t.Fatal(err)
		}
	})
	ca := serve(t, dir, "127.0.0.1:0") // it looks at once
	deadline := time.Now().Add(10 * time.Second)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for time.Now().Before(deadline) {
		if env, ok := ca.Revocations(); ok && strings.Contains(string(env.Payload), string(key)) {
			return
		}
		<-tick.C
	}
	t.Error("the key of a removed gateway is not revoked")
}

// What a stranger, and one who has a node's certificate, get at.
func TestStrangers(t *testing.T) {
	ca := serve(t, t.TempDir(), "127.0.0.1:0")
	node := fresh(t, ca.Authority, wire.RoleNode)
	chain, err := ca.Issue(t.Context(), request(t, ca.Authority, node, "web-1"))
	if err != nil {
		t.Fatal(err)
	}
	if err := node.Install(chain); err != nil {
		t.Fatal(err)
	}
	cert, err := node.Certificate()
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca.Root())
	cfg := &tls.Config{RootCAs: pool, ServerName: "pki." + ca.TrustDomain(), NextProtos: []string{"sallyport-pki/1"}, Certificates: []tls.Certificate{*cert}}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialTLSContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&tls.Dialer{Config: cfg}).DialContext(ctx, network, ca.addr)
	}}}
	csr, err := node.CSR(false)
	if err != nil {
		t.Fatal(err)
	}
	body, err := json.Marshal(map[string]any{"csr": csr, "number": 7, "id": node.ID(), "token_id": "../../../etc/pwd", "token": "x",
		"party": wire.Party{Role: wire.RoleNode, ID: node.ID(), TrustDomain: ca.TrustDomain()}, "name": "web-1"})
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{"/v1/state": 403, "/v1/gateway": 403, "/v1/issue": 403, "/v1/revocations": 403, "/v1/register": 403, "/debug/pprof/": 404} {
		method, in := http.MethodPost, io.Reader(strings.NewReader(string(body)))
		if path == "/v1/state" || strings.HasPrefix(path, "/debug") {
			method, in = http.MethodGet, nil
		}
		req, err := http.NewRequestWithContext(t.Context(), method, "https://pki"+path, in)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != want {
			t.Errorf("%s: %s, want %d: %s %v", path, resp.Status, want, answer, err)
		}
		_ = resp.Body.Close()
	}
	// A body above the limit of strangers is not read.
	big, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://pki/v1/revocations", strings.NewReader(`{"number":1,"x":"`+strings.Repeat("x", 1<<20)+`"}`))
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := client.Do(big); err == nil {
		if resp.StatusCode != http.StatusRequestEntityTooLarge && resp.StatusCode != http.StatusForbidden {
			t.Errorf("a large body of a stranger: %s", resp.Status)
		}
		_ = resp.Body.Close()
	}
	if _, ok := ca.Revocations(); ok {
		t.Error("a stranger had a set signed")
	}
	// Not without a certificate, not with another protocol.
	for name, change := range map[string]func(*tls.Config){
		"no certificate": func(c *tls.Config) { c.Certificates = nil },
		"no protocol":    func(c *tls.Config) { c.NextProtos = nil },
		"other protocol": func(c *tls.Config) { c.NextProtos = []string{"h2", "http/1.1"} },
		"TLS 1.2":        func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 },
	} {
		bad := cfg.Clone()
		change(bad)
		conn, err := (&tls.Dialer{Config: bad}).DialContext(t.Context(), "tcp", ca.addr)
		if err != nil {
			continue
		}
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := conn.Write([]byte("GET /v1/state HTTP/1.1\r\nHost: pki\r\n\r\n")); err == nil {
			if n, err := conn.Read(make([]byte, 1)); n > 0 {
				t.Errorf("%s: it answers (%v)", name, err)
			}
		}
		_ = conn.Close()
	}
}

// TestOlderAuthority: an authority that was restored from an older copy does not
// know who was removed since. A gateway that does finds out, and the next set that
// it has signed ends that.
func TestOlderAuthority(t *testing.T) {
	dir, copied := t.TempDir(), filepath.Join(t.TempDir(), "pki")
	stays, removed := newGateway(t, ""), newGateway(t, "")
	var set wire.Revocations
	t.Run("before", func(t *testing.T) {
		r := serve(t, dir, "127.0.0.1:0")
		stays.addr, removed.addr = r.addr, r.addr
		code, _ := r.code(time.Hour)
		c := stays.enrolled(t, code)
		code, _ = r.code(time.Hour)
		removed.enrolled(t, code)
		if err := os.CopyFS(copied, os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
		if _, err := pki.OpenGateways(dir).Remove(removed.id.ID()); err != nil {
			t.Fatal(err)
		}
		env, err := c.SignRevocations(t.Context(), wire.Revocations{Number: 1}, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(env.Payload, &set); err != nil || len(set.Revoked) != 1 || c.Behind() {
			t.Fatalf("%+v, %v", set, err)
		}
	})
	r := serve(t, copied, "127.0.0.1:0")
	stays.addr, removed.addr = r.addr, r.addr
	back, err := removed.connect(t, "")
	if err != nil {
		t.Fatal(err)
	}
	if back.Reach(t.Context()) != nil {
		t.Error("the restored authority knows already who was removed") // then there is nothing to see here
	}
	c, err := stays.connect(t, "")
	if err != nil {
		t.Fatal(err)
	}
	if env, ok := c.Revocations(); !ok || number(t, env) != 1 || !c.Behind() {
		t.Fatalf("behind: %t", c.Behind())
	}
	set.Number = 2
	if _, err := c.SignRevocations(t.Context(), set, 1); err != nil || c.Behind() {
		t.Fatalf("behind: %t, %v", c.Behind(), err)
	}
	if err := back.Reach(t.Context()); err == nil {
		t.Error("a gateway that was removed is answered")
	}
}

// TestAnswerFromBeforeASet: what an authority said before it signed a set is no sign
// that it does not know that set.
func TestAnswerFromBeforeASet(t *testing.T) {
	r := serve(t, t.TempDir(), "127.0.0.1:0")
	code, _ := r.code(time.Hour)
	c := newGateway(t, r.addr).enrolled(t, code)
	pki.OnState(c, func() {
		if _, err := c.SignRevocations(t.Context(), wire.Revocations{Number: 1}, 0); err != nil {
			t.Error(err)
		}
	})
	if err := c.Reach(t.Context()); err != nil {
		t.Fatal(err)
	}
	if env, ok := c.Revocations(); !ok || number(t, env) != 1 || c.Behind() {
		t.Errorf("a set: %t, behind: %t", ok, c.Behind())
	}
}

// TestAuthorityCannotWrite: the operator of a gateway hears on whose host it is that
// something could not be written, and what; it is no refusal, and goes on as soon as
// it can.
func TestAuthorityCannotWrite(t *testing.T) {
	dir := t.TempDir()
	r := serve(t, dir, "127.0.0.1:0")
	file, _ := r.code(time.Hour)
	c := newGateway(t, r.addr).enrolled(t, file)
	for name, do := range map[string]func() error{
		"revocations.json": func() error {
			_, err := c.SignRevocations(t.Context(), wire.Revocations{Number: 1}, 0)
			return err
		},
		"issuers.json": func() error {
			_, err := c.Rotate(t.Context(), wire.RolloverIntermediate, 0)
			return err
		},
	} {
		path := filepath.Join(dir, name)
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		err := do()
		if err == nil || !strings.Contains(err.Error(), "write "+path+": ") || strings.Contains(err.Error(), "/."+name) || !strings.Contains(err.Error(), "(at the certificate authority, "+r.addr+")") {
			t.Errorf("%s: %v", name, err)
		}
		if errors.Is(err, pki.ErrRollover) || errors.Is(err, pki.ErrRefused) {
			t.Errorf("%s, refused: %v", name, err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := do(); err != nil {
			t.Errorf("%s, afterwards: %v", name, err)
		}
	}
}
