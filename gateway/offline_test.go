package gateway

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/enroll"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// offlineParty is a party that no gateway reaches, with the root pinned.
func (d *desk) offlineParty(role wire.Role) *identity.Identity {
	d.t.Helper()
	id, err := identity.Open(d.t.TempDir(), role)
	if err != nil {
		d.t.Fatal(err)
	}
	if err := id.Pin(wire.KeyOf(d.ca.CA.Root), d.ca.TrustDomain); err != nil {
		d.t.Fatal(err)
	}
	return id
}

func (d *desk) offlineFile(id *identity.Identity, o enroll.Offer) string {
	d.t.Helper()
	env, err := enroll.Offline(id, o)
	if err != nil {
		d.t.Fatal(err)
	}
	return d.file(wire.PEMOfflineRequest, env)
}

func (d *desk) file(pemType string, env wire.Envelope) string {
	d.t.Helper()
	b, err := wire.AppendOffline(nil, pemType, env)
	if err != nil {
		d.t.Fatal(err)
	}
	return string(b)
}

func (d *desk) imports(text string) *store.Request {
	d.t.Helper()
	q, err := d.importRequest(d.t.Context(), api.ImportRequest{File: text})
	if err != nil {
		d.t.Fatal(err)
	}
	return q
}

func (d *desk) exports(ref string) wire.Envelope {
	d.t.Helper()
	out, err := d.exportRequest(d.t.Context(), ref)
	if err != nil {
		d.t.Fatal(err)
	}
	env, err := wire.ParseOffline([]byte(out.File), wire.PEMOfflineAnswer, wire.MaxOfflineAnswer)
	if err != nil {
		d.t.Fatal(err)
	}
	return env
}

// says wants an error for people that holds a text.
func saysProblem(t *testing.T, err error, text string) {
	t.Helper()
	var p *api.Problem
	if !errors.As(err, &p) || !strings.Contains(p.Error(), text) {
		t.Errorf("error %v, want a problem that says %q", err, text)
	}
}

// TestOfflineIssue is the whole way: request, queue, grant, answer, install.
func TestOfflineIssue(t *testing.T) {
	d := newDesk(t)
	if _, err := d.addRCP(t.Context(), api.AddRCP{Name: "dmz-1", Address: "203.0.113.4:9090"}); err != nil {
		t.Fatal(err)
	}
	id := d.offlineParty(wire.RoleNode)
	text := d.offlineFile(id, enroll.Offer{Name: "vault-1", Tags: map[string]string{"role": "vault"}, Program: "test"})
	q := d.imports(text)
	if q.State != api.RequestPending || q.Name != "vault-1" || q.Source != sourceFile || q.RCP != "" || q.KeyHash != id.KeyHash() || q.Tags["role"] != "vault" {
		t.Fatalf("queued %+v", q)
	}
	if again := d.imports(text); again.ID != q.ID || len(d.requests("")) != 1 {
		t.Errorf("the same file made another request: %+v", again)
	}
	_, err := d.exportRequest(t.Context(), q.ID)
	saysProblem(t, err, "still waits")
	if _, err := d.grant(t.Context(), "vault-1", api.Grant{Fingerprint: id.Fingerprint()}); err != nil {
		t.Fatal(err)
	}
	_, err = d.importRequest(t.Context(), api.ImportRequest{File: text})
	saysProblem(t, err, "granted already")

	first := d.exports("vault-1")
	got, err := enroll.Import(id, first)
	if err != nil {
		t.Fatal(err)
	}
	if v := got.Verdict; v.Name != "vault-1" || v.Installation != d.store.Installation().UID || len(v.RCPs) != 1 || v.RCPs[0].Addresses[0] != "203.0.113.4:9090" {
		t.Errorf("answer %+v", v)
	}
	if p, ok := id.Party(); !ok || p.ID != id.ID() {
		t.Errorf("installed %+v, %v", p, ok)
	}
	if _, err := enroll.Import(id, first); !errors.Is(err, identity.ErrInstalled) {
		t.Errorf("the same answer twice: %v, want ErrInstalled", err)
	}
	n, err := d.store.Node(t.Context(), id.ID())
	if err != nil || n.KeyHash != id.KeyHash() || n.NotAfter.IsZero() {
		t.Errorf("node %+v, %v", n, err)
	}
	if list := d.requests(api.RequestDelivered); len(list) != 1 {
		t.Errorf("%d delivered requests, want 1", len(list))
	}
	for _, what := range []string{"request.import", "request.grant", "request.export", "certificate.issue"} {
		if d.audited(what) == 0 {
			t.Errorf("no audit row %s", what)
		}
	}
	d.exports(q.ID) // a lost file is written again, for the same key
	_, err = d.grant(t.Context(), "vault-1", api.Grant{})
	saysProblem(t, err, "its certificate was exported to a file")
}

// TestImportedCertificateRuns: what came by file is taken over by the role.
func TestImportedCertificateRuns(t *testing.T) {
	d := newDesk(t)
	if _, err := d.addRCP(t.Context(), api.AddRCP{Name: "dmz-1", Address: "203.0.113.4:9090"}); err != nil {
		t.Fatal(err)
	}
	id := d.offlineParty(wire.RoleNode)
	q := d.imports(d.offlineFile(id, enroll.Offer{Name: "vault-1"}))
	if _, err := d.grant(t.Context(), q.ID, api.Grant{}); err != nil {
		t.Fatal(err)
	}
	if _, err := enroll.Import(id, d.exports(q.ID)); err != nil {
		t.Fatal(err)
	}
	var kept []wire.EnrollVerdict
	a := enroll.New(enroll.Config{Identity: id, Log: d.log, OnGrant: func(v wire.EnrollVerdict) error {
		kept = append(kept, v)
		return nil
	}})
	for range 2 { // the second finds nothing more
		if err := a.TakeImported(); err != nil {
			t.Fatal(err)
		}
	}
	if len(kept) != 1 || kept[0].Name != "vault-1" || kept[0].Installation != d.store.Installation().UID {
		t.Errorf("taken over: %+v", kept)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- a.Run(ctx) }()
	eventually(t, "the applicant is ready and knows the way", func() bool {
		return a.Ready() == nil && len(a.Addresses()) == 1 && a.Addresses()[0] == "203.0.113.4:9090"
	})
	cancel()
	if err := <-ran; err != nil {
		t.Error(err)
	}
}

// TestExportOfANameThatWasReplaced: the name means the party that has it now.
func TestExportOfANameThatWasReplaced(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	var last *store.Request
	for range 3 {
		last = d.imports(d.offlineFile(d.offlineParty(wire.RoleNode), enroll.Offer{Name: "vault-1"}))
		if _, err := d.grant(t.Context(), last.ID, api.Grant{Replace: true}); err != nil {
			t.Fatal(err)
		}
		out, err := d.exportRequest(t.Context(), "vault-1")
		if err != nil || out.Request.ID != last.ID {
			t.Fatalf("exported %s, want %s: %v", out.Request.ID, last.ID, err)
		}
	}
}

// TestOfflineRequestsThatAreRefused: nothing of them is queued.
func TestOfflineRequestsThatAreRefused(t *testing.T) {
	d := newDesk(t)
	id := d.offlineParty(wire.RoleNode)
	good, err := enroll.Offline(id, enroll.Offer{Name: "vault-1"})
	if err != nil {
		t.Fatal(err)
	}
	var r wire.OfflineRequest
	open := func() (x wire.OfflineRequest) {
		x, _, err := identity.OpenRequest(good)
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	seal := func(by *identity.Identity, r wire.OfflineRequest) string {
		env, err := by.SealRequest(r)
		if err != nil {
			t.Fatal(err)
		}
		return d.file(wire.PEMOfflineRequest, env)
	}
	refused := func(name, text, why string) {
		t.Helper()
		_, err := d.importRequest(t.Context(), api.ImportRequest{File: text})
		saysProblem(t, err, why)
		if list := d.requests(""); len(list) != 0 {
			t.Errorf("%s: %d requests", name, len(list))
		}
	}
	tampered := good
	tampered.Payload = []byte(strings.Replace(string(good.Payload), "vault-1", "vault-2", 1))
	refused("tampered", d.file(wire.PEMOfflineRequest, tampered), "signature")
	refused("no such file", "hello", "PEM")

	thief := d.offlineParty(wire.RoleNode)
	refused("another's CSR", seal(thief, open()), "signed it")

	r = open()
	r.Request.Time = time.Now().Add(-requestLife - time.Hour)
	refused("old", seal(id, r), "make a new one")
	r = open()
	r.Request.Time = time.Now().Add(maxFileSkew + time.Hour)
	refused("from the future", seal(id, r), "clock")
	r = open()
	r.TrustDomain = "elsewhere.sallyport"
	refused("another trust domain", seal(id, r), "trust domain")
	r = open()
	r.Root = thief.KeyHash()
	refused("another root", seal(id, r), "not ours")
	r = open()
	r.Request.Role = wire.RoleGateway
	refused("a gateway", seal(id, r), "not enrolled here")
	r = open()
	r.Request.ID = "nobody"
	refused("no UUID", seal(id, r), "cannot be the UUID")
}

// TestOfflineRequestWaits: a file proves a key and no more.
func TestOfflineRequestWaits(t *testing.T) {
	d := newDesk(t)
	code := mustParse(t, d.join(api.CreateJoin{Name: "web-1"}))
	live := d.enrolled(d.join(api.CreateJoin{Name: "web-2"}), "web-2")

	// A token in a file counts for nothing, and is not consumed.
	id := d.offlineParty(wire.RoleNode)
	env, err := enroll.Offline(id, enroll.Offer{Name: "web-1"})
	if err != nil {
		t.Fatal(err)
	}
	r, _, err := identity.OpenRequest(env)
	if err != nil {
		t.Fatal(err)
	}
	r.Request.TokenID, r.Request.Token = code.TokenID, code.Token
	if env, err = id.SealRequest(r); err != nil {
		t.Fatal(err)
	}
	_, err = d.importRequest(t.Context(), api.ImportRequest{File: d.file(wire.PEMOfflineRequest, env)})
	saysProblem(t, err, wire.EnrollTokenUnknown)
	if j, err := d.store.Join(t.Context(), code.TokenID); err != nil || j.Used != 0 {
		t.Errorf("join code %+v, %v", j, err)
	}

	// The UUID of a live node waits for an operator, who is told so.
	thief := d.offlineParty(wire.RoleNode)
	r.Request.TokenID, r.Request.Token, r.Request.ID = "", "", live.id.ID()
	if r.Request.CSR, err = thief.CSR(false); err != nil {
		t.Fatal(err)
	}
	if env, err = thief.SealRequest(r); err != nil {
		t.Fatal(err)
	}
	q := d.imports(d.file(wire.PEMOfflineRequest, env))
	if q.Code != wire.EnrollUUIDInUse {
		t.Errorf("foreign UUID: %+v", q)
	}
	_, err = d.grant(t.Context(), q.ID, api.Grant{})
	saysProblem(t, err, wire.EnrollUUIDInUse)

	// Denied is final for this key; a rule that names the key grants.
	denied := d.offlineParty(wire.RoleNode)
	text := d.offlineFile(denied, enroll.Offer{Name: "web-3"})
	if _, err := d.deny(t.Context(), d.imports(text).ID, api.Deny{Reason: "not today"}); err != nil {
		t.Fatal(err)
	}
	_, err = d.importRequest(t.Context(), api.ImportRequest{File: text})
	saysProblem(t, err, "not today")
	known := d.offlineParty(wire.RoleNode)
	d.rules("kind: rule\nname: vaults\nkeys: ["+known.Fingerprint()+"]\n", false)
	if q := d.imports(d.offlineFile(known, enroll.Offer{Name: "web-4"})); q.State != api.RequestGranted || q.Rule != "vaults" {
		t.Errorf("registered key: %+v", q)
	}
}

// TestOfflineAnswersThatAreRefused: the party installs what is its own only.
func TestOfflineAnswersThatAreRefused(t *testing.T) {
	d := newDesk(t)
	id, other := d.offlineParty(wire.RoleNode), d.offlineParty(wire.RoleNode)
	q := d.imports(d.offlineFile(id, enroll.Offer{Name: "vault-1"}))
	if _, err := d.grant(t.Context(), q.ID, api.Grant{}); err != nil {
		t.Fatal(err)
	}
	env := d.exports(q.ID)
	refused := func(name string, who *identity.Identity, env wire.Envelope, want error) {
		t.Helper()
		if _, err := enroll.Import(who, env); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
		if _, has := who.Party(); has {
			t.Fatalf("%s: installed", name)
		}
	}
	refused("another's", other, env, identity.ErrWrongParty)
	tampered := env
	tampered.Payload = []byte(strings.Replace(string(env.Payload), "vault-1", "vault-2", 1))
	refused("tampered", id, tampered, identity.ErrSignature)

	// Somebody with a node's certificate of the same CA is no gateway.
	a, err := id.OpenAnswer(env)
	if err != nil {
		t.Fatal(err)
	}
	node := d.enrolled(d.join(api.CreateJoin{Name: "web-1"}), "web-1")
	forged, err := node.id.Sign(wire.TypeOfflineAnswer, a)
	if err != nil {
		t.Fatal(err)
	}
	refused("sealed by a node", id, forged, identity.ErrWrongRole)

	// The leaf of another UUID, for our key.
	a.Verdict.Party.ID = other.ID()
	if a.Verdict.Chain, err = d.ca.Issue(t.Context(), wire.IssueRequest{Party: a.Verdict.Party, Name: "vault-1", CSR: q.CSR}); err != nil {
		t.Fatal(err)
	}
	foreign, err := d.id.Sign(wire.TypeOfflineAnswer, a)
	if err != nil {
		t.Fatal(err)
	}
	refused("another UUID", id, foreign, identity.ErrWrongParty)

	// Another installation's answer: the pinned root decides.
	elsewhere := newDesk(t)
	stranger, err := identity.Open(t.TempDir(), wire.RoleNode)
	if err != nil {
		t.Fatal(err)
	}
	if err := stranger.Pin(wire.KeyOf(elsewhere.ca.CA.Root), d.ca.TrustDomain); err != nil {
		t.Fatal(err)
	}
	r := wire.OfflineRequest{TrustDomain: d.ca.TrustDomain, Root: wire.KeyOf(d.ca.CA.Root)}
	mine, err := enroll.Offline(stranger, enroll.Offer{Name: "vault-9"})
	if err != nil {
		t.Fatal(err)
	}
	opened, _, err := identity.OpenRequest(mine)
	if err != nil {
		t.Fatal(err)
	}
	r.Request = opened.Request
	if mine, err = stranger.SealRequest(r); err != nil {
		t.Fatal(err)
	}
	q = d.imports(d.file(wire.PEMOfflineRequest, mine))
	if _, err := d.grant(t.Context(), q.ID, api.Grant{}); err != nil {
		t.Fatal(err)
	}
	refused("another root", stranger, d.exports(q.ID), identity.ErrUntrusted)

	// A key that was revoked meanwhile is not exported any more.
	n, err := d.store.Node(t.Context(), id.ID())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.revokeNode(t.Context(), n, false); err != nil {
		t.Fatal(err)
	}
	_, err = d.exportRequest(t.Context(), "vault-1")
	saysProblem(t, err, "revoked")
}
