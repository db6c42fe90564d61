package e2e

import (
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"sallyport/tests/harness"
)

const preface = "SPLANE1\n"

// thief stands between the gateway and an RCP and sees all that one on the path
// sees. It passes connections on, but for those that begin with a lane's ticket.
type thief struct {
	to      string
	tickets chan stolen
	conns   sync.WaitGroup
}

// stolen is a connection that presents a ticket, and has not reached the RCP yet.
type stolen struct {
	victim  net.Conn
	preface string
}

func newThief(t *testing.T, to string) (th *thief, addr string) {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	th = &thief{to: to, tickets: make(chan stolen, 16)}
	var mu sync.Mutex
	open := map[net.Conn]struct{}{}
	track := func(c net.Conn) {
		mu.Lock()
		defer mu.Unlock()
		open[c] = struct{}{}
	}
	th.conns.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			track(c)
			th.conns.Go(func() { th.pass(c, track) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for c := range open {
			_ = c.Close()
		}
		mu.Unlock()
		th.conns.Wait()
	})
	return th, l.Addr().String()
}

func (th *thief) pass(c net.Conn, track func(net.Conn)) {
	first := make([]byte, 1)
	if _, err := io.ReadFull(c, first); err != nil {
		_ = c.Close()
		return
	}
	if first[0] == preface[0] {
		rest := make([]byte, 39)
		if _, err := io.ReadFull(c, rest); err == nil {
			th.tickets <- stolen{c, string(first) + string(rest)}
		}
		return
	}
	far, err := net.Dial("tcp4", th.to)
	if err != nil {
		_ = c.Close()
		return
	}
	track(far)
	th.conns.Go(func() { _, _ = io.Copy(c, far); _ = c.Close() })
	_, _ = far.Write(first)
	_, _ = io.Copy(far, c)
	_ = far.Close()
}

// present shows a ticket to the RCP.
func (th *thief) present(t *testing.T, preface string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp4", th.to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if _, err := io.WriteString(c, preface); err != nil {
		t.Fatal(err)
	}
	return c
}

// worthless wants the RCP to close without a word.
func worthless(t *testing.T, what string, c net.Conn) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	b, err := io.ReadAll(c)
	if n, ok := err.(net.Error); len(b) > 0 || ok && n.Timeout() { //nolint:errorlint // ReadAll does not wrap
		t.Errorf("%s: answered %q, %v; want it closed", what, b, err)
	}
}

// TestTickets: who stands on the path between gateway and RCP and takes tickets
// gains nothing but what he could cut anyway; transfers go on by the channels.
func TestTickets(t *testing.T) {
	harness.Long(t)
	b := newBulk(t, nil)
	b.gateway = b.site.Gateway(b.gatewayOptions(carrier("GATEWAY", "h2"))...)
	relay := b.site.RCP(b.gateway, "dmz-1", b.admin("RCP", 9191))
	b.offer()
	th, addr := newThief(t, relay.Address)
	b.gateway.Run("rcp", "set", "dmz-1", "--address", addr, "--public", relay.Address).Exits(0)
	harness.Eventually(t, 20*time.Second, "the gateway's channel goes through the thief", func() error {
		all, err := b.gateway.RCPs()
		if err == nil && (len(all) != 1 || all[0].Address != addr || all[0].State != "connected") {
			err = io.ErrNoProgress
		}
		return err
	})
	b.node.WaitRunning(15 * time.Second)

	// Before anything was asked for, nothing is expected.
	worthless(t, "a made-up ticket", th.present(t, preface+"0123456789abcdef0123456789abcdef"))

	// Stolen: the thief is first. He finds TLS, which wants a gateway.
	result := make(chan error, 1)
	go func() { result <- transfer(b.dial(), mib, mib) }()
	var s stolen
	select {
	case s = <-th.tickets:
	case <-time.After(20 * time.Second):
		t.Fatal("no ticket came by")
	}
	lane := th.present(t, s.preface)
	_, _ = io.WriteString(lane, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	_ = lane.SetReadDeadline(time.Now().Add(20 * time.Second))
	if got, err := io.ReadAll(lane); len(got) > 64 || err != nil { // a TLS alert, and the end
		t.Errorf("the thief read %d bytes: %q, %v", len(got), got, err)
	}
	_ = lane.Close()
	worthless(t, "the ticket, replayed by the thief", th.present(t, s.preface))
	late := th.present(t, s.preface) // what its owner sent, at last
	worthless(t, "the ticket, from its owner", late)
	_ = s.victim.Close()
	if err := <-result; err != nil {
		t.Errorf("the transfer whose ticket was stolen: %v", err)
	}
	kinds := b.metric(b.gateway.Role, "sallyport_gateway_tunnels", "sealed") + b.metric(b.gateway.Role, "sallyport_gateway_tunnels", "stream")
	if kinds == 0 {
		t.Error("no tunnel runs over sealed legs or a stream")
	}
	if n := b.metric(b.gateway.Role, "sallyport_gateway_tunnels", "lane"); n > 0 {
		t.Errorf("%v tunnels run over a lane that nobody let through", n)
	}
	b.transfers(mib, mib)

	// Expired: nobody presents it in time.
	b.gateway.Stop()
	b.gateway.Start() // it has forgotten that this way gave no lane
	b.gateway.WaitAPI()
	go func() {
		began := time.Now()
		for {
			c, err := b.dialAt(b.gateway.Host(), b.forward)
			if err == nil {
				err = transfer(c, mib, mib)
			}
			if err == nil || time.Since(began) > 20*time.Second { // until the gateway has found the node again
				result <- err
				return
			}
		}
	}()
	select {
	case s = <-th.tickets:
	case <-time.After(20 * time.Second):
		t.Fatal("no ticket came by")
	}
	if err := <-result; err != nil {
		t.Errorf("the transfer whose ticket was held back: %v", err)
	}
	harness.Eventually(t, 15*time.Second, "the RCP gives the lane up", func() error {
		if b.metric(relay.Role, "sallyport_rcp_lanes_refused_total", "no-show") == 0 {
			return io.ErrNoProgress
		}
		return nil
	})
	worthless(t, "an expired ticket", th.present(t, s.preface))
	harness.Eventually(t, 10*time.Second, "no lane is left", func() error {
		if b.metric(relay.Role, "sallyport_rcp_lanes", "") > 0 {
			return io.ErrNoProgress
		}
		return nil
	})
}
