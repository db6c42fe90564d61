package netlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func plant(t *testing.T) *Lab {
	t.Helper()
	return New(t,
		Network{Name: "trusted", Policy: NoInbound, Hosts: []string{"gateway"}},
		Network{Name: "dmz", Policy: NoOutbound, Hosts: []string{"rcp", "rcp2"}},
		Network{Name: "remote", Policy: NoInbound, Hosts: []string{"node"}})
}

// echo answers what arrives on TCP and UDP of one port of a host.
func echo(t *testing.T, h *Host) (tcp, udp netip.AddrPort) {
	t.Helper()
	l, err := h.Listen(0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(c, c) // the test closes its end
				_ = c.Close()
			}()
		}
	}()
	u, err := h.ListenUDP(0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = u.Close() })
	go func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := u.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			_, _ = u.WriteToUDPAddrPort(buf[:n], from) // lost datagrams are what the test looks for
		}
	}()
	return netip.MustParseAddrPort(l.Addr().String()), netip.MustParseAddrPort(u.LocalAddr().String())
}

func dial(t *testing.T, h *Host, network string, addr netip.AddrPort) net.Conn {
	t.Helper()
	c, err := h.Dial(network, addr.String(), 5*time.Second)
	if err != nil {
		t.Fatalf("%s cannot reach %s over %s: %v", h.Name, addr, network, err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// says reports whether an echo of the text comes back within the time.
func says(c net.Conn, text string, within time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(within)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	buf := make([]byte, len(text))
	if _, err := io.ReadFull(c, buf); err != nil {
		return err
	}
	if string(buf) != text {
		return fmt.Errorf("echo of %q is %q", text, buf)
	}
	return nil
}

func counters(t *testing.T, lab *Lab) Counters {
	t.Helper()
	c, err := lab.Counters(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestAllowedDirections(t *testing.T) {
	lab := plant(t)
	tcp, udp := echo(t, lab.Host("rcp"))
	for _, from := range []string{"gateway", "node", "rcp2"} {
		if err := says(dial(t, lab.Host(from), "tcp4", tcp), "hello over TCP", 5*time.Second); err != nil {
			t.Errorf("%s: %v", from, err)
		}
		if err := says(dial(t, lab.Host(from), "udp4", udp), "hello over UDP", 5*time.Second); err != nil {
			t.Errorf("%s: %v", from, err)
		}
	}
	c := counters(t, lab)
	if bad := c.Violations(); len(bad) > 0 {
		t.Errorf("allowed traffic was counted: %q", bad)
	}
	if c.Passed.Packets != 4 { // rcp2 is in the same network: the border does not see it pass
		t.Errorf("%d connections passed the border, want 4", c.Passed.Packets)
	}
}

// TestCountersCount is the positive control: each forbidden direction is
// dropped and counted, packet by packet.
func TestCountersCount(t *testing.T) {
	lab := plant(t)
	gatewayTCP, _ := echo(t, lab.Host("gateway"))
	nodeTCP, _ := echo(t, lab.Host("node"))

	// The node may go out but nobody comes in to the gateway.
	if err := lab.Host("node").Knock(gatewayTCP); err != nil {
		t.Error(err)
	}
	if err := lab.Host("gateway").Knock(nodeTCP); err != nil {
		t.Error(err)
	}
	c := counters(t, lab)
	if c.Inbound["trusted"].Packets != 2 || c.Inbound["remote"].Packets != 2 {
		t.Errorf("a datagram and a SYN each way were counted as %v", c.Inbound)
	}
	if c.Outbound["dmz"].Packets != 0 || c.Passed.Packets != 0 {
		t.Errorf("counted out of dmz: %v, passed: %v", c.Outbound["dmz"], c.Passed)
	}

	// The sealed network reaches nobody: no host, not the router, no address
	// that nobody has.
	for _, to := range []netip.AddrPort{gatewayTCP, nodeTCP, netip.AddrPortFrom(lab.Host("rcp").router, 53), netip.MustParseAddrPort("192.0.2.1:443")} {
		before := counters(t, lab).Outbound["dmz"].Packets
		if err := lab.Host("rcp").Knock(to); err != nil {
			t.Error(err)
		}
		if n := counters(t, lab).Outbound["dmz"].Packets - before; n != 2 {
			t.Errorf("a datagram and a SYN from rcp to %s were counted as %d", to, n)
		}
	}
	if len(counters(t, lab).Violations()) != 3 {
		t.Errorf("violations: %q", counters(t, lab).Violations())
	}
}

// TestNameLookupIsSeen: a program on a sealed host that looks up a name is
// counted, though nothing answers it.
func TestNameLookupIsSeen(t *testing.T) {
	lab := plant(t)
	out, err := lab.Host("rcp").Command(t.Context(), "getent", "hosts", "telemetry.example.com").CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		t.Fatalf("getent: %v, %s", err, out)
	}
	if counters(t, lab).Outbound["dmz"].Packets == 0 {
		t.Error("a name lookup from the sealed network was not counted")
	}
}

func TestCutAndRestore(t *testing.T) {
	lab := plant(t)
	ctx := t.Context()
	tcpAddr, udpAddr := echo(t, lab.Host("rcp"))
	tcp, udp := dial(t, lab.Host("gateway"), "tcp4", tcpAddr), dial(t, lab.Host("gateway"), "udp4", udpAddr)
	other := dial(t, lab.Host("node"), "udp4", udpAddr)
	const soon, late = 200 * time.Millisecond, 5 * time.Second
	check := func(step string, c net.Conn, want bool) {
		t.Helper()
		within := soon
		if want {
			within = late
		}
		if err := says(c, step, within); (err == nil) != want {
			t.Errorf("%s: reachable is %v, want %v (%v)", step, err == nil, want, err)
		}
	}
	check("before", tcp, true)
	check("before, UDP", udp, true)

	if err := lab.Cut(ctx, "dmz", "trusted", UDP); err != nil {
		t.Fatal(err)
	}
	check("UDP cut", udp, false)
	check("UDP cut, TCP goes on", tcp, true)
	check("UDP cut, the other network goes on", other, true)

	if err := lab.Restore(ctx, "trusted", "dmz", UDP); err != nil {
		t.Fatal(err)
	}
	check("restored", udp, true)

	if err := lab.Cut(ctx, "trusted", "dmz", All); err != nil {
		t.Fatal(err)
	}
	check("all cut, UDP", udp, false)
	check("all cut, TCP", tcp, false)
	if err := lab.Restore(ctx, "trusted", "dmz", All); err != nil {
		t.Fatal(err)
	}
	// TCP sends the lost segment again: the echo of the last step may come first.
	if err := says(dial(t, lab.Host("gateway"), "tcp4", tcpAddr), "all restored", late); err != nil {
		t.Error(err)
	}
	if bad := counters(t, lab).Violations(); len(bad) > 0 {
		t.Errorf("a cut was counted as a violation: %q", bad)
	}
	if err := lab.Cut(ctx, "trusted", "nowhere", UDP); err == nil {
		t.Error("a network that does not exist was cut")
	}
}

// behind keeps the first frame waiting until the capture was stopped: what came
// after it is then still in the socket.
type behind struct {
	bytes.Buffer

	ready chan struct{}
}

func (b *behind) Write(p []byte) (int, error) {
	<-b.ready
	return b.Buffer.Write(p)
}

func TestCapture(t *testing.T) {
	lab := plant(t)
	tcp, udp := echo(t, lab.Host("rcp"))
	seen := behind{ready: make(chan struct{})}
	stop, err := lab.Host("rcp").Capture(&seen)
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		says(dial(t, lab.Host("gateway"), "tcp4", tcp), "marker-tcp", 5*time.Second),
		says(dial(t, lab.Host("node"), "udp4", udp), "marker-udp", 5*time.Second),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	time.AfterFunc(50*time.Millisecond, func() { close(seen.ready) })
	frames, dropped, err := stop()
	if err != nil || dropped != 0 || frames < 6 {
		t.Fatalf("%d frames captured, %d dropped, %v", frames, dropped, err)
	}
	for _, marker := range []string{"marker-tcp", "marker-udp"} {
		if n := strings.Count(seen.String(), marker); n != 2 { // there and back
			t.Errorf("%s was seen %d times, want 2", marker, n)
		}
	}
}

// TestLeftovers: a lab whose process was killed disappears with the next one,
// with what still ran in it.
func TestLeftovers(t *testing.T) {
	if os.Getenv("NETLAB_LEAVE") != "" {
		lab, err := Open(t.Context(), Network{Name: "left", Hosts: []string{"over"}})
		if err != nil {
			t.Fatal(err)
		}
		h := lab.Host("over")
		if err := h.Command(context.Background(), "sleep", "1000").Start(); err != nil {
			t.Fatal(err)
		}
		fmt.Println("left", h.namespace, lab.router)
		os.Exit(9) // no cleanup runs, as after kill -9
	}
	lab := plant(t)
	self := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestLeftovers$")
	self.Env = append(os.Environ(), "NETLAB_LEAVE=1")
	out, err := self.Output()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 9 {
		t.Fatalf("the process that leaves a lab behind: %v\n%s", err, out)
	}
	names := strings.Fields(string(out))[1:]
	for _, name := range names {
		if _, err := os.Stat(filepath.Join(namespaces, name)); err != nil {
			t.Fatalf("nothing was left behind: %v", err)
		}
	}
	New(t, Network{Name: "next", Hosts: []string{"host"}})
	for _, name := range names {
		if _, err := os.Stat(filepath.Join(namespaces, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there: %v", name, err)
		}
		if _, err := os.Stat(filepath.Join(netnsConfig, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("/etc/netns/%s is still there: %v", name, err)
		}
	}
	// The lab of a living process stays.
	if bad := counters(t, lab).Violations(); len(bad) > 0 {
		t.Errorf("our own lab: %q", bad)
	}
}

// TestThreadsOutliveDo: a program that dies with the thread that started it
// (prctl(2), PR_SET_PDEATHSIG) outlives every visit to a host.
func TestThreadsOutliveDo(t *testing.T) {
	lab := plant(t)
	ended := make(chan error, 8)
	var running []*exec.Cmd
	for range cap(ended) {
		cmd := exec.CommandContext(t.Context(), "sleep", "1000")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		running = append(running, cmd)
		go func() { ended <- cmd.Wait() }()
		for range 8 {
			if err := lab.Host("node").Do(func() error { return nil }); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, cmd := range running {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Errorf("process %d has ended: %v", cmd.Process.Pid, err)
		}
		var exit *exec.ExitError
		if err := <-ended; !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGTERM {
			t.Errorf("a process ended with %v, not with the signal of this test", err)
		}
	}
}

func TestNamesAreChecked(t *testing.T) {
	if err := Available(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	if _, err := Open(t.Context(), Network{Name: "a", Hosts: []string{"x"}}, Network{Name: "b", Hosts: []string{"x"}}); err == nil {
		t.Error("two hosts of one name were built")
	}
}

func TestOwnerOf(t *testing.T) {
	for name, want := range map[string]int{
		"sallyport-123-1-router": 123, "sallyport-0-1-x": 0, "sallyport-x-1": 0, "other-123-1": 0, "sallyport-123": 0,
	} {
		pid, ok := ownerOf(name)
		if ok != (want > 0) || (ok && pid != want) {
			t.Errorf("%s belongs to %d, %v", name, pid, ok)
		}
	}
}
