package enroll_test

import (
	"crypto/x509"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/enroll"
	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

// answered makes the answer of a gateway to a party, whose leaf and whose
// gateway's leaf are made as the options say.
func answered(t *testing.T, ca *identitytest.CA, id, gateway *identity.Identity, change func(*wire.OfflineAnswer), opts ...identitytest.Option) wire.Envelope {
	t.Helper()
	a := wire.OfflineAnswer{Key: id.KeyHash(), Issued: time.Now().UTC(), Verdict: wire.EnrollVerdict{
		State: wire.EnrollGranted, Party: wire.Party{Role: id.Role(), ID: id.ID(), TrustDomain: ca.TrustDomain}, Name: "vault-1", Chain: ca.Issue(t, id, opts...)}}
	if change != nil {
		change(&a)
	}
	env, err := gateway.Sign(wire.TypeOfflineAnswer, a)
	if err != nil {
		t.Fatal(err)
	}
	return env
}

// TestImport: time, revocation, and roles.
func TestImport(t *testing.T) {
	ca := identitytest.NewCA(t)
	now := time.Now()
	gateway := ca.Party(t, wire.RoleGateway)
	for _, c := range []struct {
		name    string
		role    wire.Role
		gateway *identity.Identity
		change  func(*wire.OfflineAnswer)
		leaf    []identitytest.Option
		want    error
		fails   bool // with whatever error
	}{
		{name: "a node", role: wire.RoleNode, gateway: gateway},
		{name: "an rcp", role: wire.RoleRCP, gateway: gateway},
		{name: "an expired leaf", role: wire.RoleNode, gateway: gateway, want: identity.ErrExpired,
			leaf: []identitytest.Option{identitytest.NotBefore(now.Add(-200 * time.Hour)), identitytest.NotAfter(now.Add(-time.Minute))}},
		{name: "a gateway that has renewed meanwhile", role: wire.RoleNode, leaf: []identitytest.Option{identitytest.NotBefore(now.Add(-90*time.Hour - identity.Backdate))},
			gateway: ca.Expired(t, wire.RoleGateway, identitytest.NotBefore(now.Add(-200*time.Hour)))},
		{name: "a gateway that had expired then", role: wire.RoleNode, want: identity.ErrExpired,
			gateway: ca.Expired(t, wire.RoleGateway, identitytest.NotBefore(now.Add(-200*time.Hour)))},
		{name: "a leaf for another role", role: wire.RoleNode, gateway: gateway, leaf: []identitytest.Option{identitytest.As(wire.RoleRCP)}, want: identity.ErrWrongRole},
		{name: "about another key", role: wire.RoleNode, gateway: gateway, change: func(a *wire.OfflineAnswer) { a.Key = gateway.KeyHash() }, want: identity.ErrWrongParty},
		{name: "no leaf", role: wire.RoleNode, gateway: gateway, change: func(a *wire.OfflineAnswer) { a.Verdict.Chain = nil }, fails: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			id := ca.Pending(t, c.role)
			_, err := enroll.Import(id, answered(t, ca, id, c.gateway, c.change, c.leaf...))
			_, installed := id.Party()
			if (err != nil) != (c.want != nil || c.fails) || c.want != nil && !errors.Is(err, c.want) || installed != (err == nil) {
				t.Errorf("%v, installed %v; want %v", err, installed, c.want)
			}
		})
	}
	// An answer that was brought to the wrong host says for which key it is.
	other, here := ca.Pending(t, wire.RoleNode), ca.Pending(t, wire.RoleNode)
	_, err := enroll.Import(here, answered(t, ca, other, gateway, nil))
	if want := "for the key " + other.Fingerprint() + ", this node has " + here.Fingerprint(); !errors.Is(err, identity.ErrWrongParty) || !strings.Contains(err.Error(), want) {
		t.Errorf("brought to the wrong host: %v, want %q", err, want)
	}
	// The set that comes with the answer names the key: it is of no use.
	id := ca.Pending(t, wire.RoleNode)
	env := answered(t, ca, id, gateway, func(a *wire.OfflineAnswer) {
		set := ca.Revoke(t, 1, id.KeyHash())
		a.Verdict.Revocations = &set
	})
	if _, err := enroll.Import(id, env); !errors.Is(err, identity.ErrRevoked) {
		t.Errorf("revoked: %v, want ErrRevoked", err)
	}
}

// TestAdopt: a whole identity goes where no other is, and nowhere else.
func TestAdopt(t *testing.T) {
	ca := identitytest.NewCA(t)
	maker := ca.Pending(t, wire.RoleNode)
	cert, err := maker.SelfSigned()
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	b := wire.OfflineBundle{Type: wire.TypeOfflineBundle, Role: wire.RoleNode, ID: maker.ID(), Root: wire.KeyOf(ca.Root), TrustDomain: ca.TrustDomain, Key: key}
	dir := t.TempDir()
	for range 2 { // the same again is no error
		id, err := identity.Adopt(dir, wire.RoleNode, b)
		if err != nil {
			t.Fatal(err)
		}
		if id.ID() != maker.ID() || id.KeyHash() != maker.KeyHash() || !id.Trusts(wire.KeyOf(ca.Root)) {
			t.Errorf("adopted %s %s", id.ID(), id.Fingerprint())
		}
	}
	other := ca.Pending(t, wire.RoleNode)
	if _, err := identity.Adopt(other.Dir(), wire.RoleNode, b); !errors.Is(err, identity.ErrOtherIdentity) {
		t.Errorf("over another: %v, want ErrOtherIdentity", err)
	}
	if again, err := identity.Open(other.Dir(), wire.RoleNode); err != nil || again.KeyHash() != other.KeyHash() || again.ID() != other.ID() {
		t.Errorf("the other identity is changed: %v", err)
	}
	if _, err := identity.Adopt(t.TempDir(), wire.RoleRCP, b); !errors.Is(err, identity.ErrWrongRole) {
		t.Errorf("another role: %v, want ErrWrongRole", err)
	}
	b.Key = b.Key[:10]
	if _, err := identity.Adopt(t.TempDir(), wire.RoleNode, b); err == nil {
		t.Error("half a key was adopted")
	}
}

// A party that came by a file has used the join code that it was asked with: one
// alert of an upstream, which anybody on the way can send, makes no other
// identity of it.
func TestImportedPartyKeepsItsIdentity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := identitytest.NewCA(t)
		file := filepath.Join(t.TempDir(), "join")
		put(t, file, code(t, ca, "t1"))
		id := fresh(t)
		if err := id.Pin(wire.KeyOf(ca.Root), ca.TrustDomain); err != nil {
			t.Fatal(err)
		}
		if _, err := enroll.Import(id, answered(t, ca, id, ca.Party(t, wire.RoleGateway), nil)); err != nil {
			t.Fatal(err)
		}
		key := id.KeyHash()
		join, err := identity.OpenJoin(file, nil)
		if err != nil {
			t.Fatal(err)
		}
		role := enroll.New(enroll.Config{Identity: id, Join: join, Program: "test", Log: slog.New(slog.DiscardHandler)})
		if err := role.TakeImported(); err != nil {
			t.Fatal(err)
		}
		p := start(t, id, file)
		p.Refused(errors.New("remote error: tls: bad certificate"))
		if p.id.KeyHash() != key {
			t.Errorf("it gave its identity up without a new code: %+v", p.Status())
		}
		put(t, file, code(t, ca, "t2"))
		time.Sleep(time.Minute)
		if p.id.KeyHash() == key {
			t.Error("with a new code it keeps a key that is refused")
		}
		if err := p.stop(); err != nil {
			t.Error(err)
		}
	})
}
