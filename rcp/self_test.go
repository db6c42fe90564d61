package rcp

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport/config"
	"sallyport/internal/channel"
	"sallyport/internal/enroll"
	"sallyport/internal/identity"
	"sallyport/internal/local"
	"sallyport/internal/session"
	"sallyport/internal/wire"
)

// talk is a gateway's session with one party.
type talk struct {
	t *testing.T
	s *session.Session
}

func (p *plant) talkTo(gw *identity.Identity, c *channel.Conn, party wire.Party) talk {
	p.t.Helper()
	stream, err := c.Connect(p.t.Context(), wire.ConnectAuthority(party.ID), nil)
	if err != nil {
		p.t.Fatal(err)
	}
	s, err := session.Dial(p.t.Context(), stream, gw, party)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = s.Close() })
	return talk{p.t, s}
}

func (k talk) do(method, path string, in, out any) int {
	k.t.Helper()
	b, err := json.Marshal(in)
	if err != nil {
		k.t.Fatal(err)
	}
	req, err := http.NewRequest(method, "http://peer"+path, bytes.NewReader(b))
	if err != nil {
		k.t.Fatal(err)
	}
	resp, err := k.s.RoundTrip(req)
	if err != nil {
		k.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		k.t.Fatal(err)
	}
	if out != nil && resp.StatusCode == http.StatusOK {
		if err := json.Unmarshal(body, out); err != nil {
			k.t.Fatalf("%s %s: %v in %.100q", method, path, err, body)
		}
	}
	return resp.StatusCode
}

func (r *testRCP) party() wire.Party {
	p, _ := r.id.Party()
	return p
}

func TestOwnSession(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(nil)
	gwID := p.ca.Party(t, wire.RoleGateway)
	gw, err := p.up(gwID, r.addr)
	if err != nil {
		t.Fatal(err)
	}
	k := p.talkTo(gwID, gw, r.party())
	var h wire.Hello
	if got := k.do("GET", wire.PathHello, nil, &h); got != 200 || h.Party != r.party() || h.State != wire.StateRunning || h.Program != "test" ||
		h.NotAfter.IsZero() || len(h.Upstreams) != 1 || h.Upstreams[0].Dialler != "them" || h.Versions != wire.OwnVersions {
		t.Errorf("hello: %d %+v", got, h)
	}
	if got := k.do("POST", wire.PathEcho, strings.Repeat("x", 1000), nil); got != 200 {
		t.Errorf("echo: %d", got)
	}
	if got := k.do("POST", wire.PathEcho, strings.Repeat("x", wire.MaxEcho), nil); got != 413 {
		t.Errorf("echo above its limit: %d", got)
	}
	for _, q := range []struct{ method, path string }{
		{"PUT", wire.PathDesired}, {"POST", wire.PathActions}, {"POST", wire.PathOutbox}, {"GET", wire.PathEnroll}, {"POST", wire.PathUnlock}, {"GET", "/debug/pprof/"},
	} {
		if got := k.do(q.method, q.path, struct{}{}, nil); got != 404 {
			t.Errorf("%s %s: %d: an RCP has no such thing", q.method, q.path, got)
		}
	}

	// Renewal, with the same key and with a new one.
	for _, rekey := range []bool{false, true} {
		old := r.id.KeyHash()
		var csr wire.CSR
		if got := k.do("POST", wire.PathCSR, wire.CSRRequest{Rekey: rekey}, &csr); got != 200 {
			t.Fatalf("csr: %d", got)
		}
		req, err := x509.ParseCertificateRequest(csr.DER)
		if err != nil {
			t.Fatal(err)
		}
		stranger := p.ca.IssueKey(t, wire.Party{Role: wire.RoleRCP, ID: wire.NewID(), TrustDomain: p.ca.TrustDomain}, req.PublicKey.(*ecdsa.PublicKey))
		if got := k.do("PUT", wire.PathCertificate, wire.Certificate{Chain: stranger}, nil); got != 422 {
			t.Errorf("another party's certificate: %d", got)
		}
		chain := p.ca.IssueKey(t, r.party(), req.PublicKey.(*ecdsa.PublicKey))
		if got := k.do("PUT", wire.PathCertificate, wire.Certificate{Chain: chain}, nil); got != 204 {
			t.Fatalf("certificate: %d", got)
		}
		if changed := r.id.KeyHash() != old; changed != rekey {
			t.Errorf("rekey %v, key changed %v", rekey, changed)
		}
	}
	n := p.node(r.addr) // who comes now meets the new certificate
	w := p.watch(gw)
	w.until("the node", w.has(n.id.ID()))

	// Draining: everybody is told, new streams are refused, those that run go on.
	running, err := gw.Connect(t.Context(), wire.ConnectAuthority(n.id.ID()), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = running.Close() }()
	if got := k.do("POST", wire.PathDrain, wire.Drain{Deadline: time.Minute, Reason: "new disk"}, nil); got != 204 {
		t.Fatalf("drain: %d", got)
	}
	w.until("the draining line", func(v view) bool { return v.drain != nil && v.drain.Reason == "new disk" })
	if status, reason := connectStatus(t, gw, wire.ConnectAuthority(n.id.ID()), nil); status != 503 || !strings.Contains(reason, "draining") {
		t.Errorf("while draining: %d %q", status, reason)
	}
	roundTrip(t, running, []byte("goes on"))
	if k.do("GET", wire.PathHello, nil, &h); h.State != wire.StateDraining || h.Reason != "new disk" {
		t.Errorf("hello while draining: %s %s", h.State, h.Reason)
	}
	if got := p.talkTo(gwID, gw, r.party()).do("DELETE", wire.PathDrain, nil, nil); got != 204 {
		t.Fatalf("resume: %d", got)
	}
	if status, reason := connectStatus(t, gw, wire.ConnectAuthority(n.id.ID()), nil); status != 200 {
		t.Errorf("after draining: %d %q", status, reason)
	}

	var held wire.Envelope
	if got := k.do("GET", wire.PathRevocations, nil, &held); got != 404 {
		t.Errorf("revocations before the first set: %d", got)
	}
	// Revocations in the session count as those on the channel do.
	if got := k.do("PUT", wire.PathRevocations, p.ca.Revoke(t, 3, n.id.KeyHash()), nil); got != 204 {
		t.Errorf("revocations: %d", got)
	}
	if got := k.do("GET", wire.PathRevocations, nil, &held); got != 200 || held.Type != wire.TypeRevocations || len(held.Signature) == 0 {
		t.Errorf("a gateway asks for the set: %d %+v", got, held)
	}
	select {
	case <-n.conn.Done():
	case <-time.After(10 * time.Second):
		t.Error("the revoked node's channel lives on")
	}
}

func TestOnlyGatewaysOpenTheSession(t *testing.T) {
	p := newPlant(t)
	above := p.ca.Party(t, wire.RoleRCP)
	r := p.rcp(func(c *Config) { c.Upstreams = config.Endpoints{{ID: string(above.ID())}} })
	c, err := p.up(above, r.addr)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := c.Connect(t.Context(), wire.ConnectAuthority(r.id.ID()), nil)
	if err != nil {
		t.Fatal(err)
	}
	s, err := session.Dial(t.Context(), stream, above, r.party())
	if err != nil {
		return // refused in the handshake already
	}
	defer func() { _ = s.Close() }()
	req, err := http.NewRequest(http.MethodGet, "http://peer"+wire.PathHello, nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := s.RoundTrip(req); err == nil {
		_ = resp.Body.Close()
		t.Errorf("an RCP reads the hello: %s", resp.Status)
	}
}

// pendingRCP starts a relay that has a join code and no certificate.
func (p *plant) pendingRCP(change func(*Config)) *testRCP {
	p.t.Helper()
	code, err := (wire.JoinCode{TrustDomain: p.ca.TrustDomain, Root: wire.KeyOf(p.ca.Root), Role: wire.RoleRCP, TokenID: "id", Token: "the secret token"}).Encode()
	if err != nil {
		p.t.Fatal(err)
	}
	file := filepath.Join(p.t.TempDir(), "join")
	if err := os.WriteFile(file, []byte(code), 0o600); err != nil {
		p.t.Fatal(err)
	}
	return p.start(p.t.TempDir(), func(c *Config) {
		if err := c.Join.UnmarshalText([]byte(file)); err != nil {
			p.t.Fatal(err)
		}
		if change != nil {
			change(c)
		}
	})
}

// grant does what a gateway does with a pending party that it can reach by c.
func (p *plant) grant(gw *identity.Identity, c *channel.Conn, key wire.KeyHash) {
	p.t.Helper()
	var stream io.Closer
	conn, err := c.Connect(p.t.Context(), wire.PendingAuthority(key), nil)
	if err != nil {
		p.t.Fatal(err)
	}
	stream = conn
	defer func() { _ = stream.Close() }()
	s, err := session.DialEnroll(p.t.Context(), conn, gw, key)
	if err != nil {
		p.t.Fatal(err)
	}
	stream = s
	k := talk{p.t, s}
	var req wire.EnrollRequest
	if got := k.do("GET", wire.PathEnroll, nil, &req); got != 200 || req.Role != wire.RoleRCP || req.Token != "the secret token" {
		p.t.Fatalf("enrolment request: %d %+v", got, req)
	}
	if got := k.do("GET", wire.PathHello, nil, nil); got != 404 {
		p.t.Errorf("hello in an enrolment session: %d", got)
	}
	csr, err := x509.ParseCertificateRequest(req.CSR)
	if err != nil {
		p.t.Fatal(err)
	}
	chain := p.ca.IssueKey(p.t, wire.Party{Role: wire.RoleRCP, ID: req.ID, TrustDomain: p.ca.TrustDomain}, csr.PublicKey.(*ecdsa.PublicKey))
	if got := k.do("PUT", wire.PathEnroll, wire.EnrollVerdict{State: wire.EnrollGranted, Chain: chain}, nil); got != 204 {
		p.t.Fatalf("verdict: %d", got)
	}
}

func TestRCPEnrolsWhenTheGatewayDials(t *testing.T) {
	p := newPlant(t)
	r := p.pendingRCP(nil)
	eventually(t, "the code is read", r.applicant.Needed)
	sock := local.NewClient(local.SocketPath(r.data, wire.RoleRCP))
	if st, err := sock.Status(t.Context()); err != nil || st.State != "pending" || st.Reason == "" || st.Fingerprint != r.id.Fingerprint() {
		t.Errorf("status %+v, %v", st, err)
	}
	if err := r.Ready(); err == nil {
		t.Error("ready without a certificate")
	}
	gw := p.ca.Party(t, wire.RoleGateway)
	if _, err := p.up(gw, r.addr); err == nil {
		t.Error("a pending RCP took an ordinary channel")
	}
	d := p.dialler(gw, r.addr, channel.PeerDownstream)
	d.Enroll = func() bool { return true }
	c, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close(nil)
	if status, _ := connectStatus(t, c, wire.ConnectAuthority(wire.NewID()), nil); status != 403 {
		t.Errorf("CONNECT to a node through a pending RCP: %d", status)
	}
	if status, _ := connectStatus(t, c, wire.ConnectAuthority(r.id.ID()), nil); status != 503 {
		t.Errorf("CONNECT to its uuid: %d", status)
	}
	if got := put(t, c, "GET", wire.PathPeers, nil); got != 403 {
		t.Errorf("peers of a pending RCP: %d", got)
	}
	p.grant(gw, c, r.id.KeyHash())
	eventually(t, "enrolled", func() bool { return r.applicant.Status().State == enroll.StateEnrolled })
	k := p.talkTo(gw, mustUp(t, p, gw, r.addr), r.party())
	var h wire.Hello
	if k.do("GET", wire.PathHello, nil, &h); h.State != wire.StateRunning {
		t.Errorf("hello: %+v", h)
	}
	checks, err := sock.Doctor(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range checks {
		if !c.OK {
			t.Errorf("doctor of a healthy RCP: %+v", c)
		}
	}
}

func mustUp(t *testing.T, p *plant, id *identity.Identity, addr string) *channel.Conn {
	t.Helper()
	c, err := p.up(id, addr)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestRCPThatDialsEnrolsThroughTheOneAbove(t *testing.T) {
	p := newPlant(t)
	top := p.rcp(nil)
	gwID := p.ca.Party(t, wire.RoleGateway)
	gw := mustUp(t, p, gwID, top.addr)
	w := p.watch(gw)
	low := p.pendingRCP(func(c *Config) { c.Upstreams = config.Endpoints{{Addr: top.addr}} })
	key := low.id.KeyHash()
	w.until("the RCP waits", func(v view) bool { _, ok := v.peers[peerKey{target: target{key: key}}]; return ok })
	p.grant(gwID, gw, key)
	w.until("the RCP is a peer, and waits no more", func(v view) bool {
		_, waits := v.peers[peerKey{target: target{key: key}}]
		return w.has(low.id.ID())(v) && !waits
	})
	n := p.node(low.addr)
	w.until("a node behind it", w.has(n.id.ID(), low.id.ID()))
	if st := low.Status(t.Context()); len(st.Upstreams) != 1 || st.Upstreams[0].State != "connected" || st.Upstreams[0].ID != top.id.ID() || len(st.DialTargets) != 1 {
		t.Errorf("status of the lower one: %+v", st)
	}
	// Its own session through the upper one.
	var h wire.Hello
	if p.talkTo(gwID, gw, low.party()).do("GET", wire.PathHello, nil, &h); h.Party != low.party() {
		t.Errorf("hello of the lower one: %+v", h)
	}
}

func TestJoinOverTheLocalSocket(t *testing.T) {
	p := newPlant(t)
	r := p.start(t.TempDir(), nil)
	sock := local.NewClient(local.SocketPath(r.data, wire.RoleRCP))
	eventually(t, "a status that asks for a code", func() bool {
		st, err := sock.Status(t.Context())
		return err == nil && st.State == "pending" && strings.Contains(st.Reason, "SALLYPORT_RCP_JOIN")
	})
	checks, err := sock.Doctor(t.Context())
	if i := slices.IndexFunc(checks, func(c local.Check) bool { return c.Check == "identity" }); err != nil || i < 0 || checks[i].OK || checks[i].Fix == "" {
		t.Errorf("doctor without a code: %+v, %v", checks, err)
	}
	code := func(role wire.Role) string {
		s, err := (wire.JoinCode{TrustDomain: p.ca.TrustDomain, Root: wire.KeyOf(p.ca.Root), Role: role}).Encode()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	if err := sock.Join(t.Context(), code(wire.RoleNode)); err == nil {
		t.Error("an RCP took a node's code")
	}
	if err := sock.Join(t.Context(), code(wire.RoleRCP)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "waiting with the new code", r.applicant.Needed)
}

func TestRCPDialsTheGateway(t *testing.T) {
	p := newPlant(t)
	gwID := p.ca.Party(t, wire.RoleGateway)
	ln, err := channel.Listen(channel.ListenConfig{
		Addr: "127.0.0.1:0", Identity: gwID, AllowDownstream: true, AllowEnroll: true, Carriers: []string{channel.CarrierH2}, Log: quiet,
	})
	if err != nil {
		t.Fatal(err)
	}
	came := make(chan *channel.Conn, 2*maxMore)
	p.background(func(ctx context.Context) {
		_ = ln.Run(ctx, func(_ context.Context, c *channel.Conn) {
			came <- c
			<-c.Done()
		})
	})
	next := func(what string) *channel.Conn {
		t.Helper()
		select {
		case c := <-came:
			return c
		case <-time.After(15 * time.Second):
			t.Fatalf("never: %s", what)
			return nil
		}
	}
	r := p.pendingRCP(func(c *Config) { c.Upstreams = config.Endpoints{{Addr: ln.Addr().String(), ID: string(gwID.ID())}} })
	c := next("the RCP without a certificate")
	if !c.Enrolling() || c.Peer().Key != r.id.KeyHash() {
		t.Fatalf("came %s, enrolling %v", c.Peer(), c.Enrolling())
	}
	p.grant(gwID, c, r.id.KeyHash())
	c = next("the RCP")
	if c.Peer().Party != r.party() || c.Direction() != channel.PeerDownstream {
		t.Fatalf("came %s, %s", c.Peer(), c.Direction())
	}
	n := p.node(r.addr)
	w := p.watch(c)
	w.until("a node behind it", w.has(n.id.ID()))
	s, err := c.Connect(t.Context(), wire.ConnectAuthority(n.id.ID()), nil)
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, s, []byte("reversed"))
	_ = s.Close()

	// We cannot dial it, so it dials more channels for us: as many as it may.
	for range maxMore {
		if got := put(t, c, http.MethodPost, wire.PathChannels, wire.MoreChannels{Class: channel.ClassSession}); got != http.StatusAccepted {
			t.Fatalf("another channel: %d", got)
		}
	}
	if got := put(t, c, http.MethodPost, wire.PathChannels, wire.MoreChannels{Class: channel.ClassBulk}); got != http.StatusConflict {
		t.Errorf("more than the limit: %d", got)
	}
	extra := next("another channel")
	s, err = extra.Connect(t.Context(), wire.ConnectAuthority(n.id.ID()), nil)
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, s, []byte("on the other channel"))
	_ = s.Close()
}
