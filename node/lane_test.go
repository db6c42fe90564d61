package node

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/session"
	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

func (a *agent) lane(t *testing.T) (channel.LaneConn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := a.c.OpenLane(ctx, wire.LaneRequest{})
	if err == nil {
		t.Cleanup(func() { _ = c.Close() })
	}
	return c, err
}

// A gateway reaches targets through a lane, and through no lane anything else.
func TestLane(t *testing.T) {
	p := newPlant(t)
	ag := p.node()
	leg, err := ag.lane(t)
	if err != nil {
		t.Fatal(err)
	}
	node, _ := ag.in().id.Party()
	tun, err := session.DialTunnel(t.Context(), leg, p.gateway, node, tunnel.Config{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = tun.Run(ctx) }()
	defer func() { cancel(); <-done }()
	s, err := tun.Open("nowhere")
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Read(make([]byte, 1))
	var no *tunnel.RefusedError
	if !errors.As(err, &no) || no.Code != tunnel.NotFound {
		t.Errorf("got %v", err)
	}
	_ = s.Close()

	other, err := ag.lane(t)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := session.Dial(t.Context(), other, p.gateway, node); err == nil {
		if st, err := statusOf(s, wire.PathHello); err == nil {
			t.Errorf("the session API answers on a lane: %d", st)
		}
		_ = s.Close()
	}
}

func statusOf(rt http.RoundTripper, path string) (int, error) {
	req, err := http.NewRequest(http.MethodGet, "http://peer"+path, nil)
	if err != nil {
		return 0, err
	}
	res, err := rt.RoundTrip(req)
	if err != nil {
		return 0, err
	}
	_ = res.Body.Close()
	return res.StatusCode, nil
}

// Whoever stole a ticket finds TLS, which wants a gateway's certificate.
func TestLaneIsForGateways(t *testing.T) {
	p := newPlant(t)
	ag := p.node()
	node, _ := ag.in().id.Party()
	for name, id := range map[string]*identity.Identity{
		"an RCP": p.ca.Party(t, wire.RoleRCP), "a node": p.ca.Party(t, wire.RoleNode), "a gateway of another trust domain": newPlant(t).gateway,
	} {
		leg, err := ag.lane(t)
		if err != nil {
			t.Fatal(err)
		}
		tun, err := session.DialTunnel(t.Context(), leg, id, node, tunnel.Config{})
		if err == nil { // TLS 1.3: the client is done first
			err = tun.Run(t.Context())
		}
		if err == nil {
			t.Errorf("%s opened a tunnel", name)
		}
	}
	leg, err := ag.lane(t)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(leg, "GET / HTTP/1.1\r\n\r\n")
	_ = leg.SetReadDeadline(time.Now().Add(20 * time.Second))
	if b, err := io.ReadAll(leg); len(b) > 7 || err != nil && errors.Is(err, context.DeadlineExceeded) { // an alert
		t.Errorf("garbage was answered with %d bytes, %v", len(b), err)
	}
	eventually(t, "no lane is left", func() bool { return ag.in().lanes.count() == 0 })
}

func TestLanesAreLimited(t *testing.T) {
	p := newPlant(t)
	ag := p.node()
	var legs []net.Conn
	for range maxLanesPerPeer {
		leg, err := ag.lane(t)
		if err != nil {
			t.Fatal(err)
		}
		legs = append(legs, leg)
	}
	var no *channel.RefusedError
	if _, err := ag.lane(t); !errors.As(err, &no) || no.Status != http.StatusTooManyRequests {
		t.Errorf("one too many: %v", err)
	}
	_ = legs[0].Close()
	eventually(t, "the place is free", func() bool { return ag.in().lanes.count() == maxLanesPerPeer-1 })
	if _, err := ag.lane(t); err != nil {
		t.Errorf("after one has ended: %v", err)
	}
	for _, req := range []any{nil, wire.LaneRequest{}, wire.LaneRequest{Ticket: wire.NewTicket(), Node: "x"}} {
		if got := call(t, ag.c, http.MethodPost, wire.PathLanes, req, nil); got != http.StatusBadRequest {
			t.Errorf("%+v: %d", req, got)
		}
	}
	if got := call(t, ag.c, http.MethodPost, wire.PathLanes, wire.LaneRequest{Ticket: wire.NewTicket(), Node: wire.NewID()}, nil); got != http.StatusNotFound {
		t.Errorf("for another node: %d", got)
	}
	for n := 0; ; n++ { // each is refused, and counts
		if got := call(t, ag.c, http.MethodPost, wire.PathLanes, wire.LaneRequest{Ticket: wire.NewTicket()}, nil); got != http.StatusTooManyRequests {
			t.Fatalf("got %d", got)
		}
		if n == laneBurst {
			break
		}
	}
	ag.stop() // returns: no lane holds it up
	for _, leg := range legs[1:] {
		_ = leg.SetReadDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.ReadAll(leg); errors.Is(err, context.DeadlineExceeded) {
			t.Error("a lane outlives the node")
		}
	}
}

func TestLanesStopWithTheirInstance(t *testing.T) {
	l := newLanes()
	peer := identity.Peer{Party: wire.Party{Role: wire.RoleRCP, ID: wire.NewID()}}
	if _, _, err := l.enter(peer); !errors.Is(err, errLanesStopped) {
		t.Errorf("before Run: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan struct{})
	go func() { defer close(ran); _ = l.Run(ctx) }()
	var leaves []func()
	var ctxs []context.Context
	eventually(t, "it runs", func() bool {
		lctx, leave, err := l.enter(peer)
		if err == nil {
			leaves, ctxs = append(leaves, leave), append(ctxs, lctx)
		}
		return err == nil
	})
	for i := 1; i < maxLanes; i++ {
		other := identity.Peer{Party: wire.Party{Role: wire.RoleRCP, ID: wire.NewID()}}
		lctx, leave, err := l.enter(other)
		if err != nil {
			t.Fatal(err)
		}
		leaves, ctxs = append(leaves, leave), append(ctxs, lctx)
	}
	if _, _, err := l.enter(peer); !errors.Is(err, errLaneTotal) {
		t.Errorf("above the total: %v", err)
	}
	l.cut(func(p identity.Peer) bool { return p.Party == peer.Party }, errRevoked)
	if !errors.Is(context.Cause(ctxs[0]), errRevoked) || context.Cause(ctxs[1]) != nil {
		t.Errorf("cut: %v, %v", context.Cause(ctxs[0]), context.Cause(ctxs[1]))
	}
	cancel()
	for i, leave := range leaves {
		<-ctxs[i].Done()
		leave()
	}
	<-ran
	if l.count() != 0 || len(l.byPeer) != 0 {
		t.Errorf("%d lanes are left", l.count())
	}
}
