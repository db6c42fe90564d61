package session_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"sallyport/internal/channel"
	"sallyport/internal/channel/channeltest"
	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/session"
	"sallyport/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a gateway that reaches another party over a channel.
type world struct {
	ca      *identitytest.CA
	gateway *identity.Identity
	other   *identity.Identity
	up      *channel.Conn
	served  chan error
}

// answer is what the other party does with each CONNECT.
type answer func(ctx context.Context, stream net.Conn, id *identity.Identity, h http.Handler) error

func newWorld(t *testing.T, ca *identitytest.CA, gateway, other *identity.Identity, serve answer, h http.Handler) *world {
	t.Helper()
	up, down := channeltest.PairOf(t, gateway, other, false)
	w := &world{ca: ca, gateway: gateway, other: other, up: up, served: make(chan error, 100)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = down.Serve(context.Background(), http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			stream, err := channel.AcceptConnect(rw, r)
			if err != nil {
				t.Error(err)
				return
			}
			w.served <- serve(r.Context(), stream, other, h)
		}))
	}()
	t.Cleanup(func() {
		down.Close(nil)
		<-ended
	})
	return w
}

// waitServed waits for the end of one session at the other party.
func (w *world) waitServed(t *testing.T) {
	t.Helper()
	t.Logf("served until: %v", <-w.served)
}

func (w *world) stream(t *testing.T) net.Conn {
	t.Helper()
	s, err := w.up.Connect(t.Context(), wire.ConnectAuthority(w.other.ID()), nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func whatIsAsked(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.URL.Path) }

func get(t *testing.T, rt http.RoundTripper, path string) (string, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://peer"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := rt.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(res.Body)
	return string(b), err
}

func party(t *testing.T, id *identity.Identity) wire.Party {
	t.Helper()
	p, ok := id.Party()
	if !ok {
		t.Fatal("no certificate")
	}
	return p
}

func TestSession(t *testing.T) {
	ca := identitytest.NewCA(t)
	w := newWorld(t, ca, ca.Party(t, wire.RoleGateway), ca.Party(t, wire.RoleNode), session.Serve, http.HandlerFunc(whatIsAsked))
	for i, resumed := range []bool{false, true, true} {
		s, err := session.Dial(t.Context(), w.stream(t), w.gateway, party(t, w.other))
		if err != nil {
			t.Fatal(err)
		}
		got, err := get(t, s, "/v1/hello")
		if err != nil || got != "/v1/hello" {
			t.Fatalf("got %q, %v", got, err)
		}
		if s.Resumed() != resumed {
			t.Errorf("session %d: resumed %v, want %v", i, s.Resumed(), resumed)
		}
		if s.Peer().Party.ID != w.other.ID() {
			t.Errorf("peer is %s", s.Peer())
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		<-s.Done()
		w.waitServed(t)
	}
}

func TestDialRefusesAnotherParty(t *testing.T) {
	ca := identitytest.NewCA(t)
	w := newWorld(t, ca, ca.Party(t, wire.RoleGateway), ca.Party(t, wire.RoleNode), session.Serve, http.HandlerFunc(whatIsAsked))
	want := party(t, w.other)
	want.ID = wire.NewID()
	if _, err := session.Dial(t.Context(), w.stream(t), w.gateway, want); err == nil {
		t.Error("a session with another node was opened")
	}
	w.waitServed(t)
}

func TestServeRefusesAnybodyButAGateway(t *testing.T) {
	ca := identitytest.NewCA(t)
	w := newWorld(t, ca, ca.Party(t, wire.RoleGateway), ca.Party(t, wire.RoleNode), session.Serve, http.HandlerFunc(whatIsAsked))
	rcp := ca.Party(t, wire.RoleRCP)
	s, err := session.Dial(t.Context(), w.stream(t), rcp, party(t, w.other))
	if err == nil { // TLS 1.3: the refusal shows in the first request
		_, err = get(t, s, "/v1/hello")
		_ = s.Close()
	}
	if err == nil {
		t.Error("an RCP was answered")
	}
	if err := <-w.served; !errors.Is(err, identity.ErrWrongRole) {
		t.Errorf("served: %v", err)
	}
}

// A party that has made itself a new key is met with it at once: the ticket of a
// session with the old one, which is revoked, leads nowhere.
func TestSessionAfterRekey(t *testing.T) {
	ca := identitytest.NewCA(t)
	gateway, node := ca.Party(t, wire.RoleGateway), ca.Party(t, wire.RoleNode)
	meet := func() identity.Peer { // by a stream that outlives a revocation, as one by another channel does
		t.Helper()
		here, there := net.Pipe()
		var served sync.WaitGroup
		served.Go(func() { _ = session.Serve(t.Context(), there, node, http.HandlerFunc(whatIsAsked)) })
		s, err := session.Dial(t.Context(), here, gateway, party(t, node))
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			_ = s.Close()
			served.Wait()
		}()
		if _, err := get(t, s, "/v1/hello"); err != nil {
			t.Fatal(err)
		}
		return s.Peer()
	}
	meet()
	old := node.KeyHash()
	csr, err := node.CSR(true)
	if err != nil {
		t.Fatal(err)
	}
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		t.Fatal(err)
	}
	if err := node.Install(ca.IssueKey(t, party(t, node), req.PublicKey.(*ecdsa.PublicKey))); err != nil {
		t.Fatal(err)
	}
	if _, err := gateway.ApplyRevocations(ca.Revoke(t, 1, old)); err != nil {
		t.Fatal(err)
	}
	if peer := meet(); wire.KeyOf(peer.Leaf) == old {
		t.Error("it answers with the key that it has given up")
	}
}

func TestRevokedGatewayIsCutAndCannotResume(t *testing.T) {
	ca := identitytest.NewCA(t)
	w := newWorld(t, ca, ca.Party(t, wire.RoleGateway), ca.Party(t, wire.RoleNode), session.Serve, http.HandlerFunc(whatIsAsked))
	s, err := session.Dial(t.Context(), w.stream(t), w.gateway, party(t, w.other))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	if _, err := get(t, s, "/v1/hello"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.other.ApplyRevocations(ca.Revoke(t, 1, w.gateway.KeyHash())); err != nil {
		t.Fatal(err)
	}
	if err := <-w.served; !errors.Is(err, identity.ErrRevoked) {
		t.Errorf("served: %v", err)
	}
	<-s.Done()
	s2, err := session.Dial(t.Context(), w.stream(t), w.gateway, party(t, w.other))
	if err == nil {
		_, err = get(t, s2, "/v1/hello")
		_ = s2.Close()
	}
	if err == nil {
		t.Error("a revoked gateway was answered")
	}
	if err := <-w.served; !errors.Is(err, identity.ErrRevoked) {
		t.Errorf("served: %v", err)
	}
}

func TestSessionEndsWithItsLeaf(t *testing.T) {
	ca := identitytest.NewCA(t)
	gateway := ca.Party(t, wire.RoleGateway)
	node := ca.Party(t, wire.RoleNode)
	// The channel below keeps the longer leaf of the RCP's place.
	w := newWorld(t, ca, gateway, node, session.Serve, http.HandlerFunc(whatIsAsked))
	ca.Certify(t, gateway, identitytest.NotAfter(time.Now().Add(2*time.Second)))
	s, err := session.Dial(t.Context(), w.stream(t), gateway, party(t, node))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	if _, err := get(t, s, "/"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.Done():
	case <-time.After(10 * time.Second):
		t.Error("the session outlives its leaf")
	}
	w.waitServed(t)
}

func TestEnrolment(t *testing.T) {
	ca := identitytest.NewCA(t)
	mux := http.NewServeMux()
	mux.HandleFunc("/what", whatIsAsked)
	w := newWorld(t, ca, ca.Party(t, wire.RoleGateway), ca.Pending(t, wire.RoleNode), session.ServeEnroll, mux)
	s, err := session.DialEnroll(t.Context(), w.stream(t), w.gateway, w.other.KeyHash())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := get(t, s, "/what"); err != nil || got != "/what" {
		t.Errorf("got %q, %v", got, err)
	}
	if !s.Peer().Pending || s.Peer().Key != w.other.KeyHash() {
		t.Errorf("peer is %+v", s.Peer())
	}
	_ = s.Close()
	w.waitServed(t)

	if _, err := session.DialEnroll(t.Context(), w.stream(t), w.gateway, ca.Pending(t, wire.RoleNode).KeyHash()); !errors.Is(err, identity.ErrWrongParty) {
		t.Errorf("another key gave %v", err)
	}
	w.waitServed(t)

	for name, id := range map[string]*identity.Identity{
		"rcp":             ca.Party(t, wire.RoleRCP),
		"foreign gateway": identitytest.NewCA(t).Party(t, wire.RoleGateway),
	} {
		s, err := session.DialEnroll(t.Context(), w.stream(t), id, w.other.KeyHash())
		if err == nil {
			_, err = get(t, s, "/what")
			_ = s.Close()
		}
		if err == nil {
			t.Errorf("%s was answered", name)
		}
		if err := <-w.served; err == nil {
			t.Errorf("%s was served", name)
		}
	}
}

// TestEnrolmentOfAnExpiredParty: whose leaf is over, or has not begun, is renewed
// in such a session, so it lasts although the leaf does not.
func TestEnrolmentOfAnExpiredParty(t *testing.T) {
	ca := identitytest.NewCA(t)
	for _, id := range []*identity.Identity{ca.Expired(t, wire.RoleNode), ca.Expired(t, wire.RoleRCP), ca.Early(t, wire.RoleNode)} {
		w := newWorld(t, ca, ca.Party(t, wire.RoleGateway), id, session.ServeEnroll, http.HandlerFunc(whatIsAsked))
		s, err := session.DialEnroll(t.Context(), w.stream(t), w.gateway, w.other.KeyHash())
		if err != nil {
			t.Fatal(err)
		}
		for range 100 { // the end of a leaf that counted would be noticed by now
			if _, err := get(t, s, "/what"); err != nil {
				t.Errorf("%s: %v", id.Role(), err)
				break
			}
		}
		_ = s.Close()
		w.waitServed(t)
	}
}
