package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	mrand "math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport/tests/harness"
	"sallyport/tests/netlab"
)

const (
	targetPort  = 7000 // of the target, in a lab
	forwardPort = 7001 // of the gateway, in a lab
	mib         = int64(1) << 20
)

// service is a TCP service that a node offers. A client says in 8 bytes how
// many it wants, and sends what it likes; when it has ended its direction it
// gets the SHA-256 of that, and as many bytes as it wanted.
type service struct {
	listener net.Listener
	conns    sync.WaitGroup
	hold     chan struct{} // if set: nothing is read after the first MiB until it is closed
}

func serveBulk(t *testing.T, l net.Listener, hold chan struct{}) {
	t.Helper()
	s := &service{listener: l, hold: hold}
	var accepting sync.WaitGroup
	accepting.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.conns.Go(func() { s.serve(c.(*net.TCPConn)) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		accepting.Wait()
		s.conns.Wait()
	})
}

func (s *service) serve(c *net.TCPConn) {
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
	var head [8]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return
	}
	hash := sha256.New()
	if s.hold != nil {
		if _, err := io.CopyN(hash, c, mib); err != nil {
			return
		}
		<-s.hold
	}
	if _, err := io.Copy(hash, c); err != nil {
		return
	}
	if _, err := c.Write(hash.Sum(nil)); err != nil {
		return
	}
	if _, err := io.CopyN(c, answer(), int64(binary.BigEndian.Uint64(head[:]))); err == nil {
		_ = c.CloseWrite()
		_, _ = io.Copy(io.Discard, c) // the client's end
	}
}

// answer is what the service sends, always the same.
func answer() io.Reader { return mrand.NewChaCha8([32]byte{1}) }

// transfer sends up bytes through a connection to the service, and wants down
// bytes back: with nothing lost or changed, and each end of a direction seen.
func transfer(c net.Conn, up, down int64) error {
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
	var head [8]byte
	binary.BigEndian.PutUint64(head[:], uint64(down))
	sent := sha256.New()
	var seed [32]byte
	_, _ = rand.Read(seed[:])
	if _, err := c.Write(head[:]); err != nil {
		return err
	}
	if _, err := io.CopyN(io.MultiWriter(c, sent), mrand.NewChaCha8(seed), up); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	var got [sha256.Size]byte
	if _, err := io.ReadFull(c, got[:]); err != nil {
		return fmt.Errorf("read the hash: %w", err)
	}
	if !bytes.Equal(got[:], sent.Sum(nil)) {
		return errors.New("the service got something else than was sent")
	}
	want, have := sha256.New(), sha256.New()
	_, _ = io.CopyN(want, answer(), down)
	n, err := io.Copy(have, c)
	if err != nil || n != down || !bytes.Equal(want.Sum(nil), have.Sum(nil)) {
		return fmt.Errorf("got %d bytes of %d, %w", n, down, err)
	}
	return nil
}

// bulk is a site with a forward to a service beside its node.
type bulk struct {
	t       *testing.T
	lab     *netlab.Lab
	site    *harness.Site
	gateway *harness.Gateway
	node    *harness.Node
	target  string // address of the service
	forward string // address of the forward
	hold    chan struct{}
}

// admin makes a role show its metrics.
func (b *bulk) admin(role string, port uint16) harness.Option {
	addr := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)
	if b.lab == nil {
		addr = netip.AddrPortFrom(addr.Addr(), harness.FreePort(b.t))
	}
	return harness.Env("SALLYPORT_"+role+"_ADMIN_LISTEN", addr.String())
}

func newBulk(t *testing.T, lab *netlab.Lab) *bulk {
	t.Helper()
	return &bulk{t: t, lab: lab, site: harness.In(t, lab)}
}

func (b *bulk) gatewayOptions(opts ...harness.Option) []harness.Option {
	return append(opts, b.admin("GATEWAY", 9190))
}

// offer applies the policy and makes the forward.
func (b *bulk) offer(opts ...harness.Option) {
	b.t.Helper()
	var l net.Listener
	var err error
	if b.lab == nil {
		l, err = net.Listen("tcp4", "127.0.0.1:0")
	} else {
		l, err = b.lab.Host("web-1").Listen(targetPort)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	serveBulk(b.t, l, b.hold)
	b.target = l.Addr().String()
	if b.lab != nil {
		b.target = b.lab.Host("web-1").AddrPort(targetPort)
	}
	b.node = b.site.Node(b.gateway, "web-1", append([]harness.Option{tagged("web-1"), harness.Env("SALLYPORT_NODE_ALLOW_TARGETS", b.target)}, opts...)...)
	b.node.WaitRunning(15 * time.Second)
	b.gateway.Apply(fmt.Sprintf("kind: policy\nname: service\ntype: target\nspec: {address: %q}\n---\nkind: deployment\nname: service\nselector: name=web-1\npolicies: [service]\n", b.target)).Exits(0)
	harness.Eventually(b.t, 15*time.Second, "the target is offered", b.node.Applied)
	port := uint16(forwardPort)
	if b.lab == nil {
		port = harness.FreePort(b.t)
	}
	b.forward = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port).String()
	b.gateway.Run("target", "forward", "service", b.forward).Exits(0)
}

// dial connects to the forward, as a program on the gateway's host.
func (b *bulk) dial() net.Conn {
	b.t.Helper()
	c, err := b.dialAt(b.gateway.Host(), b.forward)
	if err != nil {
		b.t.Fatal(err)
	}
	return c
}

func (b *bulk) dialAt(host *netlab.Host, addr string) (net.Conn, error) {
	if host == nil {
		return net.DialTimeout("tcp4", addr, 5*time.Second)
	}
	return host.Dial("tcp4", addr, 5*time.Second)
}

func (b *bulk) transfers(up, down int64) {
	b.t.Helper()
	if err := transfer(b.dial(), up, down); err != nil {
		b.t.Fatalf("%v\ngateway: %s", err, tailOf(b.gateway.Log()))
	}
}

func tailOf(s string) string { return s[max(0, len(s)-4000):] }

// metric reads the sum of a role's metric, of the series with a label value if
// one is given.
func (b *bulk) metric(r *harness.Role, name, label string) float64 {
	b.t.Helper()
	addr := ""
	for _, role := range []string{"GATEWAY", "RCP"} {
		if v := r.Environment()["SALLYPORT_"+role+"_ADMIN_LISTEN"]; v != "" && v != "off" {
			addr = v
		}
	}
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) { return b.dialAt(r.Host(), addr) }}}
	res, err := client.Get("http://" + addr + "/metrics")
	if err != nil {
		b.t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	sum := 0.0
	for line := range strings.Lines(string(text)) {
		series, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		base, labels, _ := strings.Cut(series, "{")
		if base == name && (label == "" || strings.Contains(labels, `"`+label+`"`)) {
			v, err := strconv.ParseFloat(value, 64)
			if err != nil {
				b.t.Fatal(err)
			}
			sum += v
		}
	}
	return sum
}

// copied is what a process has moved with system calls that copy, in bytes.
func copied(t *testing.T, p *harness.Process) (n int64) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", p.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if key, value, _ := strings.Cut(strings.TrimSpace(line), ": "); key == "rchar" || key == "wchar" {
			v, err := strconv.ParseInt(value, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			n += v
		}
	}
	return n
}

// cpu is what a process has used, user and system, in seconds.
func cpu(t *testing.T, p *harness.Process) float64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID()))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+2:]))
	user, err1 := strconv.ParseInt(fields[11], 10, 64)
	system, err2 := strconv.ParseInt(fields[12], 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	return float64(user+system) / 100 // USER_HZ
}

// TestLane: bulk goes through a lane, whose bytes the RCP's kernel moves. With
// these switched off it goes through one of sealed legs, which the RCP copies.
func TestLane(t *testing.T) {
	for _, lanes := range []string{"on", "off"} {
		t.Run(lanes, func(t *testing.T) {
			b := newBulk(t, nil)
			b.gateway = b.site.Gateway(b.gatewayOptions(carrier("GATEWAY", "h2"))...) // of QUIC the counters of copied bytes know nothing
			relay := b.site.RCP(b.gateway, "dmz-1", harness.Env("SALLYPORT_RCP_LANES", lanes), b.admin("RCP", 9191))
			b.offer(carrier("NODE", "h2"))
			b.transfers(1, 1) // the lane is there
			before, used := copied(t, relay.Process), cpu(t, relay.Process)
			const up, down = 48 * mib, 48 * mib
			b.transfers(up, down)
			moved := copied(t, relay.Process) - before
			t.Logf("RCP: %.2f CPU-s/GiB, %d of %d MiB copied", (cpu(t, relay.Process)-used)*1024*float64(mib)/float64(up+down), moved/mib, (up+down)/mib)
			opened, refused := b.metric(relay.Role, "sallyport_rcp_lanes_opened_total", ""), b.metric(relay.Role, "sallyport_rcp_lanes_refused_total", "off")
			if lanes == "off" {
				if opened > 0 || refused == 0 || moved < up {
					t.Errorf("lanes are off: %v opened, %v refused, %d bytes copied", opened, refused, moved)
				}
				for _, d := range []string{"up", "down"} {
					if n := b.metric(relay.Role, "sallyport_rcp_sealed_lane_bytes_total", d); n < 48*float64(mib) {
						t.Errorf("%v bytes are counted %s through sealed lanes", n, d)
					}
				}
				if n := b.metric(b.gateway.Role, "sallyport_gateway_tunnels", "sealed"); n == 0 {
					t.Error("no tunnel runs over a sealed lane")
				}
				relay.Stop()
				return
			}
			if opened == 0 || refused > 0 || b.metric(relay.Role, "sallyport_rcp_lanes", "") == 0 {
				t.Errorf("%v lanes opened, %v refused", opened, refused)
			}
			for _, d := range []string{"up", "down"} {
				if n := b.metric(relay.Role, "sallyport_rcp_lane_bytes_total", d); n < 40*float64(mib) {
					t.Errorf("%v bytes are counted %s", n, d)
				}
			}
			if moved > 4*mib { // 192 MiB would have been copied otherwise
				t.Errorf("the RCP copied %d MiB: the kernel does not splice", moved/mib)
			}
			relay.Stop()
		})
	}
}

// TestLaneSeesNothing: while a lane is full of it, the RCP's memory does not
// hold what passes through.
func TestLaneSeesNothing(t *testing.T) {
	harness.Long(t)
	b := newBulk(t, nil)
	b.hold = make(chan struct{})
	released := sync.OnceFunc(func() { close(b.hold) })
	b.gateway = b.site.Gateway(b.gatewayOptions()...)
	relay := b.site.RCP(b.gateway, "dmz-1", b.admin("RCP", 9191))
	b.offer()
	t.Cleanup(released)
	word := marker(t, "Lane")
	c := b.dial()
	var sending sync.WaitGroup
	sending.Go(func() { // blocks when everything on the way is full
		_, _ = c.Write(make([]byte, 8))
		chunk := bytes.Repeat([]byte(word+" "), 4096)
		for {
			if _, err := c.Write(chunk); err != nil {
				return
			}
		}
	})
	defer func() { _ = c.Close(); released(); sending.Wait() }()
	harness.Eventually(t, 30*time.Second, "the lane is in use", func() error {
		if b.metric(relay.Role, "sallyport_rcp_lanes", "") == 0 {
			return errors.New("no lane")
		}
		return nil
	})
	harness.Eventually(t, 30*time.Second, "the words are at the node", func() error {
		if !holds(core(t, b.node.Process, t.TempDir()), word) {
			return errors.New("not there: the search proves nothing")
		}
		return nil
	})
	if holds(core(t, relay.Process, t.TempDir()), word) {
		t.Error("the RCP's memory holds what passes through the lane")
	}
}

// noLane transfers, and shows that no bare lane was used, but the kind of
// tunnel that it should be.
func (b *bulk) noLane(relay *harness.RCP, kind string) {
	b.t.Helper()
	began := time.Now()
	b.transfers(4*mib, 4*mib)
	if took := time.Since(began); took > 15*time.Second {
		b.t.Errorf("without a lane the first transfer took %v", took)
	}
	if n := b.metric(relay.Role, "sallyport_rcp_lanes_opened_total", ""); n > 0 {
		b.t.Errorf("%v lanes were opened", n)
	}
	if n := b.metric(b.gateway.Role, "sallyport_gateway_tunnels", kind); n == 0 {
		b.t.Errorf("no tunnel is of kind %s", kind)
	}
	if n := b.metric(relay.Role, "sallyport_rcp_sealed_lanes_opened_total", ""); (n > 0) != (kind == "sealed") {
		b.t.Errorf("%v sealed lanes were opened", n)
	}
	began = time.Now()
	b.transfers(mib, mib)
	if took := time.Since(began); took > 3*time.Second {
		b.t.Errorf("the next transfer took %v: a lane was tried again", took)
	}
}

// TestLaneQUICOnly: TCP between node and RCP is blocked by a firewall; QUIC
// passes, a lane cannot, and the bytes go through the channels.
func TestLaneQUICOnly(t *testing.T) {
	harness.Long(t)
	lab := plant(t)
	b := newBulk(t, lab)
	b.gateway = b.site.Gateway(b.gatewayOptions(carrier("GATEWAY", "h3"))...)
	relay := b.site.RCP(b.gateway, "dmz-1", b.admin("RCP", 9191))
	b.offer(carrier("NODE", "h3"))
	if err := lab.Cut(t.Context(), "remote", "dmz", netlab.TCP); err != nil {
		t.Fatal(err)
	}
	b.noLane(relay, "stream")
	if err := usesCarrier(b.gateway, "web-1", "h3"); err != nil {
		t.Error(err)
	}
	closed(t, lab, "dmz-1", "gateway")
}

// TestLaneOverQUIC: a lane needs TCP only for itself.
func TestLaneOverQUIC(t *testing.T) {
	harness.Long(t)
	lab := plant(t)
	b := newBulk(t, lab)
	b.gateway = b.site.Gateway(b.gatewayOptions(carrier("GATEWAY", "h3"))...)
	relay := b.site.RCP(b.gateway, "dmz-1", b.admin("RCP", 9191))
	b.offer(carrier("NODE", "h3"))
	b.transfers(16*mib, 16*mib)
	if n := b.metric(relay.Role, "sallyport_rcp_lanes_opened_total", ""); n == 0 {
		t.Errorf("no lane was opened\n%s", tailOf(relay.Log()))
	}
	closed(t, lab, "dmz-1", "gateway")
}

// TestLaneBehindProxy: a node whose channel goes through an HTTP proxy has no
// bare lane, but a sealed one, which goes through the proxy too.
func TestLaneBehindProxy(t *testing.T) {
	harness.Long(t)
	lab, _, way := behindProxy(t)
	b := newBulk(t, lab)
	b.gateway = b.site.Gateway(b.gatewayOptions()...)
	relay := b.site.RCP(b.gateway, "dmz-1", b.admin("RCP", 9191))
	b.offer(way)
	b.noLane(relay, "sealed")
	if n := b.metric(relay.Role, "sallyport_rcp_lanes_refused_total", "impossible"); n == 0 {
		t.Error("the RCP does not count that a bare lane was impossible")
	}
}

// TestLaneOfRCPThatDials: the RCP dials the gateway, so it dials that leg too.
func TestLaneOfRCPThatDials(t *testing.T) {
	harness.Long(t)
	lab := netlab.New(t,
		netlab.Network{Name: "trusted", Policy: netlab.NoOutbound, Hosts: []string{"gateway"}},
		netlab.Network{Name: "remote", Policy: netlab.NoInbound, Hosts: []string{"edge-1", "web-1"}})
	b := newBulk(t, lab)
	b.gateway = b.site.Gateway(b.gatewayOptions(harness.DialIn())...)
	relay := b.site.RCP(b.gateway, "edge-1", harness.Dials(b.gateway.Channel), b.admin("RCP", 9191))
	b.offer()
	b.transfers(16*mib, 16*mib)
	if n := b.metric(relay.Role, "sallyport_rcp_lanes_opened_total", ""); n == 0 {
		t.Errorf("no lane was opened\n%s", tailOf(relay.Log()))
	}
	closed(t, lab, "gateway", "web-1")
}

// TestLaneChain: two RCPs, each of which joins two legs.
func TestLaneChain(t *testing.T) {
	harness.Long(t)
	lab := netlab.New(t,
		netlab.Network{Name: "trusted", Policy: netlab.NoInbound, Hosts: []string{"gateway"}},
		netlab.Network{Name: "dmz", Policy: netlab.NoOutbound, Hosts: []string{"dmz-1"}},
		netlab.Network{Name: "edge", Hosts: []string{"edge-1"}},
		netlab.Network{Name: "remote", Policy: netlab.NoInbound, Hosts: []string{"web-1"}})
	if err := lab.Cut(t.Context(), "remote", "dmz", netlab.All); err != nil { // there is but one way
		t.Fatal(err)
	}
	b := newBulk(t, lab)
	b.gateway = b.site.Gateway(b.gatewayOptions()...)
	inner := b.site.RCP(b.gateway, "dmz-1", b.admin("RCP", 9191))
	outer := b.site.RCP(b.gateway, "edge-1", harness.Dials(inner.Address), harness.AddFlags("--via", "dmz-1"), b.admin("RCP", 9191))
	b.offer(harness.JoinFlags("--rcp", "edge-1"))
	b.transfers(16*mib, 16*mib)
	for _, relay := range []*harness.RCP{inner, outer} {
		if n := b.metric(relay.Role, "sallyport_rcp_lanes_opened_total", ""); n == 0 {
			t.Errorf("%s opened no lane\n%s", relay.Name, tailOf(relay.Log()))
		}
	}
	closed(t, lab, "dmz-1", "gateway")
}

// TestLaneNodeDies: a node that is killed in the middle of a transfer ends it,
// visibly, and leaves nothing open at the RCP.
func TestLaneNodeDies(t *testing.T) {
	for kind, lanes := range map[string]string{"lane": "on", "sealed_lane": "off"} {
		t.Run(kind, func(t *testing.T) { testNodeDies(t, lanes, "sallyport_rcp_"+kind+"s") })
	}
}

func testNodeDies(t *testing.T, lanes, open string) {
	b := newBulk(t, nil)
	b.gateway = b.site.Gateway(b.gatewayOptions()...)
	relay := b.site.RCP(b.gateway, "dmz-1", b.admin("RCP", 9191), harness.Env("SALLYPORT_RCP_LANES", lanes))
	b.offer()
	c := b.dial()
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	var head [8]byte
	binary.BigEndian.PutUint64(head[:], math.MaxInt64) // without end
	if _, err := c.Write(head[:]); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, c, 32*mib); err != nil {
		t.Fatal(err)
	}
	if b.metric(relay.Role, open, "") == 0 {
		t.Error("no lane is open")
	}
	b.node.Kill()
	if n, err := io.Copy(io.Discard, c); err == nil {
		t.Errorf("after %d more bytes the transfer ended as if it were complete", n)
	} else if n, ok := errors.AsType[net.Error](err); ok && n.Timeout() {
		t.Errorf("the transfer hangs: %v", err)
	}
	harness.Eventually(t, 10*time.Second, "the RCP has no lane left", func() error {
		if n := b.metric(relay.Role, open, ""); n > 0 {
			return fmt.Errorf("%v are open", n)
		}
		return nil
	})
	b.node.Start()
	b.node.WaitRunning(15 * time.Second)
	harness.Eventually(t, 15*time.Second, "transfers work again", func() error { return transfer(b.dial(), mib, mib) })
}
