package session_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/session"
	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

func echoTarget(_ context.Context, target string, s *tunnel.Stream) {
	_, _ = io.WriteString(s, target+":")
	_, _ = io.Copy(s, s)
	_ = s.CloseWrite()
}

// both answers sessions and tunnels.
func both(ctx context.Context, stream net.Conn, id *identity.Identity, h http.Handler) error {
	return session.Handlers{API: h, Targets: echoTarget}.Serve(ctx, stream, id)
}

// tunnelTo dials a tunnel and runs it until end is called, which returns why it ended.
func tunnelTo(t *testing.T, conn net.Conn, gateway *identity.Identity, to wire.Party) (tu *session.Tunnel, end func() error, err error) {
	t.Helper()
	tu, err = session.DialTunnel(t.Context(), conn, gateway, to, tunnel.Config{})
	if err != nil {
		return nil, nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- tu.Run(context.Background()) }()
	end = func() error {
		_ = tu.Close()
		return <-ended
	}
	return tu, end, nil
}

func askTarget(tu *session.Tunnel, text string) (string, error) {
	s, err := tu.Open("db")
	if err != nil {
		return "", err
	}
	defer func() { _ = s.Close() }()
	if _, err := io.WriteString(s, text); err != nil {
		return "", err
	}
	if err := s.CloseWrite(); err != nil {
		return "", err
	}
	b, err := io.ReadAll(s)
	return string(b), err
}

func TestTunnelBesideSessions(t *testing.T) {
	ca := identitytest.NewCA(t)
	w := newWorld(t, ca, ca.Party(t, wire.RoleGateway), ca.Party(t, wire.RoleNode), both, http.HandlerFunc(whatIsAsked))
	for i, resumed := range []bool{false, true, true} {
		tu, end, err := tunnelTo(t, w.stream(t), w.gateway, party(t, w.other))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := askTarget(tu, "hello"); err != nil || got != "db:hello" {
			t.Errorf("got %q, %v", got, err)
		}
		if tu.Resumed() != resumed || tu.Peer().Party.ID != w.other.ID() {
			t.Errorf("tunnel %d with %s: resumed %v", i, tu.Peer(), tu.Resumed())
		}
		if err := end(); !errors.Is(err, tunnel.ErrClosed) {
			t.Errorf("ended with %v", err)
		}
		w.waitServed(t)

		s, err := session.Dial(t.Context(), w.stream(t), w.gateway, party(t, w.other))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := get(t, s, "/v1/hello"); err != nil || got != "/v1/hello" {
			t.Errorf("a session beside a tunnel: %q, %v", got, err)
		}
		_ = s.Close()
		w.waitServed(t)
	}
}

// The name in the clear is the same for all nodes: their tickets are not, and
// neither are they themselves.
func TestTunnelIsWithTheVeryNode(t *testing.T) {
	ca := identitytest.NewCA(t)
	gateway, asked, answers := ca.Party(t, wire.RoleGateway), ca.Party(t, wire.RoleNode), ca.Party(t, wire.RoleNode)
	right := newWorld(t, ca, gateway, asked, both, nil)
	_, end, err := tunnelTo(t, right.stream(t), gateway, party(t, asked))
	if err != nil {
		t.Fatal(err)
	}
	_ = end()
	right.waitServed(t)
	wrong := newWorld(t, ca, gateway, answers, both, nil)
	if _, _, err := tunnelTo(t, wrong.stream(t), gateway, party(t, asked)); !errors.Is(err, identity.ErrWrongParty) {
		t.Errorf("another node gave %v", err)
	}
	wrong.waitServed(t)
}

func TestLaneServesTunnelsOfGatewaysOnly(t *testing.T) {
	ca := identitytest.NewCA(t)
	gateway, node := ca.Party(t, wire.RoleGateway), ca.Party(t, wire.RoleNode)
	lane := func() (net.Conn, chan error) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = l.Close() }()
		a, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		b, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan error, 1)
		go func() { served <- session.ServeLane(context.Background(), b, node, echoTarget) }()
		return a, served
	}
	a, served := lane()
	tu, end, err := tunnelTo(t, a, gateway, party(t, node))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := askTarget(tu, "hello"); err != nil || got != "db:hello" {
		t.Errorf("got %q, %v", got, err)
	}
	_ = end()
	if err := <-served; !errors.Is(err, tunnel.ErrEnded) {
		t.Errorf("a lane whose gateway left: %v", err)
	}

	a, served = lane()
	if s, err := session.Dial(t.Context(), a, gateway, party(t, node)); err == nil {
		if _, err := get(t, s, "/v1/hello"); err == nil {
			t.Error("a session on a lane was answered")
		}
		_ = s.Close()
	}
	if err := <-served; !errors.Is(err, session.ErrProtocol) {
		t.Errorf("a session on a lane was served until %v", err)
	}
	for name, id := range map[string]*identity.Identity{
		"rcp": ca.Party(t, wire.RoleRCP), "node": ca.Party(t, wire.RoleNode), "foreign gateway": identitytest.NewCA(t).Party(t, wire.RoleGateway),
	} {
		a, served = lane()
		if tu, end, err := tunnelTo(t, a, id, party(t, node)); err == nil {
			if _, err := askTarget(tu, "hello"); err == nil {
				t.Errorf("%s was answered", name)
			}
			_ = end()
		}
		if err := <-served; err == nil {
			t.Errorf("%s was served", name)
		}
	}
}

func TestTunnelEndsWhenEitherIsRevoked(t *testing.T) {
	for _, who := range []string{"gateway", "node"} {
		ca := identitytest.NewCA(t)
		w := newWorld(t, ca, ca.Party(t, wire.RoleGateway), ca.Party(t, wire.RoleNode), both, nil)
		tu, end, err := tunnelTo(t, w.stream(t), w.gateway, party(t, w.other))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := askTarget(tu, "hello"); err != nil {
			t.Fatal(err)
		}
		if who == "gateway" {
			_, err = w.other.ApplyRevocations(ca.Revoke(t, 1, w.gateway.KeyHash()))
		} else {
			_, err = w.gateway.ApplyRevocations(ca.Revoke(t, 1, w.other.KeyHash()))
		}
		if err != nil {
			t.Fatal(err)
		}
		select {
		case <-tu.Done():
		case <-time.After(10 * time.Second):
			t.Errorf("the tunnel outlives the %s's key", who)
		}
		_ = end()
		w.waitServed(t)
		if who == "node" {
			continue // the channel to it is cut too
		}
		if tu, end, err := tunnelTo(t, w.stream(t), w.gateway, party(t, w.other)); err == nil {
			if _, err := askTarget(tu, "hello"); err == nil {
				t.Errorf("another tunnel after the %s was revoked", who)
			}
			_ = end()
		}
		w.waitServed(t)
	}
}

func TestTunnelEndsWithItsLeaf(t *testing.T) {
	ca := identitytest.NewCA(t)
	w := newWorld(t, ca, ca.Party(t, wire.RoleGateway), ca.Party(t, wire.RoleNode), both, nil)
	ca.Certify(t, w.gateway, identitytest.NotAfter(time.Now().Add(2*time.Second)))
	tu, end, err := tunnelTo(t, w.stream(t), w.gateway, party(t, w.other))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := askTarget(tu, "hello"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-tu.Done():
	case <-time.After(10 * time.Second):
		t.Error("the tunnel outlives its leaf")
	}
	_ = end()
	w.waitServed(t)
}
