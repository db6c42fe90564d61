package gateway

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

func (st *site) forward(target, node string) api.Forward {
	st.t.Helper()
	f, err := st.c.AddForward(st.t.Context(), api.AddForward{Target: target, Node: node, Listen: ":0"})
	if err != nil {
		st.t.Fatal(err)
	}
	return f
}

func connect(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

func send(t *testing.T, c *net.TCPConn, text string, end bool) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	if end {
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestForwardCarriesBothWaysAndEndsEachByItself(t *testing.T) {
	t.Parallel()
	st := newSite(t, false)
	ids := st.nodes("a")
	st.offer("db", "address: 'db:5432'", ids...)
	st.serve("a", "db", to(peer(t, func(c *net.TCPConn) { // answers when the client has ended
		b, err := io.ReadAll(c)
		if err != nil {
			t.Error(err)
		}
		_, _ = fmt.Fprintf(c, "%d bytes", len(b))
	})))
	f := st.forward("db", "")
	if !strings.HasPrefix(f.Listen, "127.0.0.1:") || f.State != api.ForwardListening || f.CreatedBy == "" {
		t.Errorf("%+v", f)
	}
	const size = 10 << 20
	c := connect(t, f.Listen)
	send(t, c, strings.Repeat("x", size), true)
	if got := readAll(t, c); got != fmt.Sprintf("%d bytes", size) {
		t.Error(got)
	}
	// And the other way round: the target ends first.
	up := make(chan string, 1)
	st.serve("a", "db", to(peer(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "hello")
		_ = c.CloseWrite()
		b, _ := io.ReadAll(c)
		up <- string(b)
	})))
	c = connect(t, f.Listen)
	if got := readAll(t, c); got != "hello" {
		t.Error(got)
	}
	send(t, c, "late", true)
	if got := <-up; got != "late" {
		t.Errorf("the target got %q after it had ended its own direction", got)
	}
	eventually(t, "both connections are counted", func() bool {
		all, err := st.c.Forwards(t.Context())
		return err == nil && len(all) == 1 && all[0].Total == 2 && all[0].Connections == 0 && all[0].BytesTo == size+4 && all[0].Refused == 0
	})
}

// What was made with an API token ends with it: the port, and what runs through it.
func TestForwardEndsWithItsToken(t *testing.T) {
	t.Parallel()
	st := newSite(t, true)
	ids := st.nodes("a")
	st.offer("db", "address: 'db:5432'", ids...)
	st.serve("a", "db", to(peer(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "220 ready")
		_, _ = io.Copy(io.Discard, c)
	})))
	stays := st.forward("db", "")
	tok, err := st.c.CreateToken(t.Context(), api.CreateToken{Role: api.RoleOperator, TTL: wire.Duration(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	f, err := st.https(t, tok.Secret).AddForward(t.Context(), api.AddForward{Target: "db", Listen: ":0"})
	if err != nil {
		t.Fatal(err)
	}
	c := connect(t, f.Listen)
	if _, err := io.ReadFull(c, make([]byte, 9)); err != nil {
		t.Fatal(err)
	}
	if _, err := st.c.RevokeToken(t.Context(), tok.ID); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection goes on: %d bytes, %v", n, err)
	}
	all, err := st.c.Forwards(t.Context())
	if err != nil || len(all) != 1 || all[0].Listen != stays.Listen {
		t.Errorf("%+v, %v", all, err)
	}
	if again, err := net.Dial("tcp", f.Listen); err == nil {
		_ = again.Close()
		t.Error("the port is still open")
	}
}

func TestForwardCoversAFailureWithWhatWasSent(t *testing.T) {
	t.Parallel()
	for _, first := range []string{"client", "server"} {
		t.Run(first+" speaks first", func(t *testing.T) {
			st := newSite(t, false)
			ids := st.nodes("a", "b")
			st.offer("db", "address: 'db:5432'", ids...)
			good := to(peer(t, func(c *net.TCPConn) {
				if first == "server" {
					_, _ = io.WriteString(c, "220 ready")
					return
				}
				line, err := bufio.NewReader(c).ReadString('\n')
				if err != nil {
					return
				}
				_, _ = io.WriteString(c, "echo "+line)
			}))
			f := st.forward("db", "")
			for _, bad := range []string{"a", "b"} { // whichever is asked first
				other := map[string]string{"a": "b", "b": "a"}[bad]
				st.serve(bad, "db", refusing(tunnel.Unreachable))
				st.serve(other, "db", good)
				st.s.targets.worked(ids[0], "db")
				st.s.targets.worked(ids[1], "db")
				for range 4 {
					c := connect(t, f.Listen)
					want := "220 ready"
					if first == "client" {
						want = "echo hello"
						send(t, c, "hello\n", false)
					}
					if got := readAll(t, c); got != want {
						t.Errorf("%q", got)
					}
				}
				if n := st.dialled(bad, "db"); n > 4 {
					t.Errorf("the node that fails was asked %d times", n)
				}
			}
			if st.dialled("a", "db")+st.dialled("b", "db") <= 8 {
				t.Error("no connection was taken over")
			}
		})
	}
}

func TestForwardDoesNotRepeatWhatMayHaveArrived(t *testing.T) {
	t.Parallel()
	st := newSite(t, false)
	ids := st.nodes("a", "b")
	st.offer("db", "address: 'db:5432'", ids...)
	for _, n := range []string{"a", "b"} {
		st.serve(n, "db", func() (targetStream, error) {
			s, err := to(peer(t, func(c *net.TCPConn) { _, _ = io.CopyN(io.Discard, c, 5) }))()
			return &cutStream{targetStream: s, err: tunnel.ErrEnded}, err
		})
	}
	f := st.forward("db", "")
	c := connect(t, f.Listen)
	send(t, c, "order", false)
	if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("want a reset, not %v", err)
	}
	if n := st.dialled("a", "db") + st.dialled("b", "db"); n != 1 {
		t.Errorf("%d nodes were asked", n)
	}
}

// cutStream ends with an error where the stream below ends well.
type cutStream struct {
	targetStream
	err error
}

func (s *cutStream) Read(p []byte) (int, error) {
	n, err := s.targetStream.Read(p)
	if err != nil {
		err = s.err
	}
	return n, err
}

func TestForwardPassesResetsOn(t *testing.T) {
	t.Parallel()
	st := newSite(t, false)
	ids := st.nodes("a")
	st.offer("db", "address: 'db:5432'", ids...)
	seen := make(chan error, 1)
	st.serve("a", "db", to(peer(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "partial")
		_, err := io.ReadAll(c)
		seen <- err
	})))
	f := st.forward("db", "")
	c := connect(t, f.Listen)
	if _, err := io.ReadFull(c, make([]byte, 7)); err != nil {
		t.Fatal(err)
	}
	reset(c)
	if err := <-seen; err != nil && !errors.Is(err, syscall.ECONNRESET) { // the stream is plain TCP here
		t.Error(err)
	}

	st.serve("a", "db", to(peer(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "partial")
		_, _ = io.ReadFull(c, make([]byte, 2))
		reset(c)
	})))
	c = connect(t, f.Listen)
	if _, err := io.ReadFull(c, make([]byte, 7)); err != nil {
		t.Fatal(err)
	}
	send(t, c, "go", false)
	if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("an answer that broke off looks like %v", err)
	}
}

func TestForwardsAreRestoredAndRemoved(t *testing.T) {
	t.Parallel()
	st := newSite(t, false)
	ids := st.nodes("a")
	st.offer("db", "address: 'db:5432'", ids...)
	st.serve("a", "db", to(peer(t, func(c *net.TCPConn) { _, _ = io.Copy(c, c) })))
	f := st.forward("db", "a")
	if f.Node != "a" || f.NodeID != ids[0] {
		t.Errorf("%+v", f)
	}
	st.restart()
	st.connect(ids[0], "a")
	echo := func() (*net.TCPConn, string) {
		c := connect(t, f.Listen)
		send(t, c, "x", false)
		b := make([]byte, 1)
		_, _ = io.ReadFull(c, b)
		return c, string(b)
	}
	eventually(t, "the forward listens again", func() bool {
		all, err := st.c.Forwards(t.Context())
		return err == nil && len(all) == 1 && all[0].State == api.ForwardListening
	})
	c, got := echo()
	if got != "x" {
		t.Error("the restored forward carries nothing")
	}
	_, port, _ := net.SplitHostPort(f.Listen)
	if _, err := st.c.RemoveForward(t.Context(), port); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("its connections are cut: %v", err)
	}
	if c, err := net.Dial("tcp", f.Listen); err == nil {
		t.Error("it still listens")
		_ = c.Close()
	}
	if _, err := st.c.RemoveForward(t.Context(), port); !api.Is(err, api.CodeNotFound) {
		t.Errorf("removed twice: %v", err)
	}
	log, err := st.db.AuditLog(t.Context(), store.AuditFilter{Limit: 100})
	if err != nil {
		t.Fatal(err)
	}
	what := map[string]int{}
	for _, e := range log {
		what[e.What+" "+e.Result]++
	}
	if what["target.forward ok"] != 1 || what["target.unforward ok"] != 1 || what["target.unforward refused"] != 1 {
		t.Errorf("audit log: %v", what)
	}
}

func TestForwardThatCannotListenSaysWhoIsInTheWay(t *testing.T) {
	t.Parallel()
	st := newSite(t, false)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	add := func(target, node, listen string) error {
		_, err := st.c.AddForward(t.Context(), api.AddForward{Target: target, Node: node, Listen: listen})
		return err
	}
	if err := add("ping", "", ln.Addr().String()); !api.Is(err, api.CodeConflict) || !strings.Contains(err.Error(), "gateway.test") {
		t.Errorf("a port in use: %v", err)
	}
	if err := add("ping", "", "203.0.113.7:4000"); !api.Is(err, api.CodeConflict) || !strings.Contains(err.Error(), "no such address") {
		t.Errorf("another host's address: %v", err)
	}
	if err := add("nothing", "", ":0"); !api.Is(err, api.CodeNotFound) {
		t.Errorf("no such target: %v", err)
	}
	if err := add("ping", "nobody", ":0"); !api.Is(err, api.CodeNotFound) {
		t.Errorf("no such node: %v", err)
	}
	if err := add("ping", "", "example.com:80"); !api.Is(err, api.CodeInvalid) {
		t.Errorf("a name: %v", err)
	}
	f := st.forward("ping", "")
	if err := add("echo", "", f.Listen); !api.Is(err, api.CodeExists) || !strings.Contains(err.Error(), "ping") {
		t.Errorf("another forward: %v", err)
	}
	// One that cannot be had at a start is shown, and tried again.
	st.update(func(ctx context.Context, tx *store.Tx) error {
		return tx.AddForward(ctx, &store.Forward{Listen: ln.Addr().String(), Tenant: store.DefaultTenant, Target: "ping"})
	})
	eventually(t, "the failure is shown", func() bool {
		all, err := st.c.Forwards(t.Context())
		for _, f := range all {
			if f.State == api.ForwardFailed && strings.Contains(f.Error, "listens there") {
				return true
			}
		}
		return err != nil
	})
}

func TestForwardLimitResets(t *testing.T) {
	t.Parallel()
	st := newSite(t, false, func(c *Config) { c.TargetLimit = 2 })
	ids := st.nodes("a")
	st.offer("db", "address: 'db:5432'", ids...)
	var open atomic.Int64
	st.serve("a", "db", to(peer(t, func(c *net.TCPConn) {
		open.Add(1)
		_, _ = io.Copy(c, c)
	})))
	f := st.forward("db", "")
	first, second := connect(t, f.Listen), connect(t, f.Listen)
	eventually(t, "two are open", func() bool { return open.Load() == 2 })
	try := func(text string) (string, error) {
		c, err := net.Dial("tcp", f.Listen)
		if err != nil { // the reset may be there before we look
			return "", err
		}
		defer func() { _ = c.Close() }()
		if _, err := io.WriteString(c, text); err != nil {
			return "", err
		}
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			return "", err
		}
		b, err := io.ReadAll(c)
		return string(b), err
	}
	if got, err := try("x"); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ENOTCONN) {
		t.Errorf("the third: %q, %v", got, err)
	}
	_, _ = first.Close(), second.Close()
	eventually(t, "there is room again", func() bool {
		got, err := try("x")
		return err == nil && got == "x"
	})
}

func TestOperatorsForwardOnLoopbackOnly(t *testing.T) {
	t.Parallel()
	for role, want := range map[api.Role]map[string]bool{
		api.RoleOperator: {"127.0.0.1:4000": true, "[::1]:4000": true, "127.0.0.1:0": true, "127.0.0.1:80": false, "0.0.0.0:4000": false, "192.0.2.1:4000": false},
		api.RoleAdmin:    {"127.0.0.1:80": true, "0.0.0.0:4000": true},
	} {
		req, err := http.NewRequest(http.MethodPost, "/", nil)
		if err != nil {
			t.Fatal(err)
		}
		ctx := withAsker(req, asker{role: role}).Context()
		for listen, ok := range want {
			if err := mayListen(ctx, netip.MustParseAddrPort(listen)); (err == nil) != ok {
				t.Errorf("%s on %s: %v", role, listen, err)
			}
		}
	}
}

func TestParseListen(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"8080": "127.0.0.1:8080", ":8080": "127.0.0.1:8080", "localhost:8080": "127.0.0.1:8080", "0.0.0.0:1": "0.0.0.0:1", "*:1": "0.0.0.0:1",
		"[::1]:2": "[::1]:2", "[::]:2": "[::]:2", "192.0.2.1:0": "192.0.2.1:0",
		"": "", "x": "", "70000": "", "host:1": "", "1.2.3.4": "", "::1:2:3": "", "-1": "",
	} {
		got, err := parseListen(in)
		if want == "" && err == nil || want != "" && (err != nil || got.String() != want) {
			t.Errorf("%q: %s, %v", in, got, err)
		}
	}
}

func TestListenerInode(t *testing.T) {
	t.Parallel()
	const line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 123456 1 0000000000000000 100 0 0 10 0"
	if got := listenerInode(line, 8080); got != "123456" {
		t.Error(got)
	}
	if listenerInode(line, 80) != "" || listenerInode(strings.Replace(line, " 0A ", " 01 ", 1), 8080) != "" || listenerInode("junk", 1) != "" {
		t.Error("another port, or no listener")
	}
}

// TestForwardKeepsAlive looks at what the kernel gives to an accepted
// connection: the listener's options.
func TestForwardKeepsAlive(t *testing.T) {
	ln, err := listenForward(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	client, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	c, err := ln.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = raw.Control(func(fd uintptr) {
		for _, o := range []struct {
			name                string
			level, option, want int
		}{
			{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
			{"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 15},
			{"TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 15},
			{"TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 9},
		} {
			if got, err := unix.GetsockoptInt(int(fd), o.level, o.option); err != nil || got != o.want {
				t.Errorf("%s is %d, want %d (%v)", o.name, got, o.want, err)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}
