package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/tests/harness"
)

// targetSite is a site whose nodes may reach services on loopback.
type targetSite struct {
	*harness.Site
	t       *testing.T
	gateway *harness.Gateway
	relay   *harness.RCP
	nodes   map[string]*harness.Node
}

func newTargetSite(t *testing.T, names []string, gateway ...harness.Option) *targetSite {
	t.Helper()
	s := &targetSite{Site: harness.New(t), t: t, nodes: map[string]*harness.Node{}}
	s.gateway = s.Gateway(gateway...)
	s.relay = s.RCP(s.gateway, "dmz-1")
	for _, name := range names {
		s.nodes[name] = s.Node(s.gateway, name, harness.JoinFlags("--tag", "name="+name), harness.Env("SALLYPORT_NODE_ALLOW_TARGETS", "127.0.0.1:*"), harness.Env("SALLYPORT_NODE_CARRIER", "h2"))
	}
	for _, n := range s.nodes {
		n.WaitRunning(30 * time.Second)
	}
	return s
}

// offer makes a target at all nodes and waits until they have it.
func (s *targetSite) offer(name, spec string) {
	s.t.Helper()
	s.gateway.Apply(targetDocument(name, spec)).Exits(0)
	harness.Eventually(s.t, 20*time.Second, "target "+name+" is offered", func() error {
		var d api.TargetDetail
		r := s.gateway.Run("target", "show", name, "-o", "json")
		if r.Code != 0 {
			return r.Err()
		}
		r.JSON(&d)
		if d.Connected != len(s.nodes) {
			return fmt.Errorf("%+v", d)
		}
		return nil
	})
}

func targetDocument(name, spec string) string {
	return fmt.Sprintf(`kind: policy
name: %[1]s
type: target
spec: {%[2]s}
---
kind: deployment
name: %[1]s
selector: "*"
policies: [%[1]s]
`, name, spec)
}

// forward makes a TCP forward and returns its address.
func (s *targetSite) forward(target string) string {
	s.t.Helper()
	var f api.Forward
	s.gateway.Run("target", "forward", target, "0", "-o", "json").Exits(0).JSON(&f)
	return f.Listen
}

// nginx starts Debian's nginx on a free port of loopback; its files are in www.
func (s *targetSite) nginx(www, more string) (addr string) {
	s.t.Helper()
	program := harness.Tool(s.t, "nginx")
	addr = fmt.Sprintf("127.0.0.1:%d", harness.FreePort(s.t))
	if err := os.MkdirAll(s.Path("nginx"), 0o755); err != nil {
		s.t.Fatal(err)
	}
	conf := s.File("nginx/nginx.conf", fmt.Sprintf(`daemon off; master_process off; user root;
pid %[1]s/nginx/pid; error_log stderr;
events {}
http {
	access_log off; sendfile on; types { text/plain txt; } default_type application/octet-stream; client_max_body_size 0;
	client_body_temp_path %[1]s/nginx/body; proxy_temp_path %[1]s/nginx/proxy; fastcgi_temp_path %[1]s/nginx/fcgi;
	uwsgi_temp_path %[1]s/nginx/uwsgi; scgi_temp_path %[1]s/nginx/scgi;
	server { listen %[2]s; root %[3]s; %[4]s }
}
`, s.Path(""), addr, www, more))
	s.Start("nginx", program, "-c", conf, "-p", s.Path("nginx"), "-e", "stderr")
	harness.Eventually(s.t, 10*time.Second, "nginx listens", func() error {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			err = c.Close()
		}
		return err
	})
	return addr
}

// tcpService starts a TCP service that hands each connection to f.
func tcpService(t *testing.T, f func(c *net.TCPConn)) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		_ = ln.Close()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(time.Minute))
				f(c.(*net.TCPConn))
			})
		}
	})
	return ln.Addr().String()
}

func dial(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

func TestForward(t *testing.T) {
	s := newTargetSite(t, []string{"web-1"})
	curl := harness.Tool(t, "curl")
	s.File("www/hello.txt", "hello from behind the wall\n")
	s.offer("web", "address: '"+s.nginx(s.Path("www"), "")+"'")
	addr := s.forward("web")
	if got := s.Exec(curl, "-sS", "--fail", "http://"+addr+"/hello.txt").Exits(0).Stdout; got != "hello from behind the wall\n" {
		t.Errorf("%q", got)
	}
	// It stays over a restart of the gateway.
	s.gateway.Kill()
	s.gateway.Start()
	s.gateway.WaitAPI()
	harness.Eventually(t, 30*time.Second, "the forward carries again", func() error {
		return s.Exec(curl, "-sS", "--fail", "http://"+addr+"/hello.txt").Err()
	})
	r := s.gateway.Run("target", "forward", "web-1/web", addr).Exits(4)
	if !strings.Contains(r.Stderr, "forward to web already") {
		t.Errorf("%v", r)
	}
	s.gateway.Run("target", "unforward", addr).Exits(0)
	s.Exec(curl, "-sS", "http://"+addr+"/hello.txt").Exits(7)
}

// TestForwardHalfClose: each direction ends by itself, and a reset is a reset.
func TestForwardHalfClose(t *testing.T) {
	s := newTargetSite(t, []string{"web-1"})
	late := make(chan string, 1)
	s.offer("client-first", "address: '"+tcpService(t, func(c *net.TCPConn) {
		n, err := io.Copy(io.Discard, c)
		if err != nil {
			t.Error(err)
		}
		_, _ = fmt.Fprintf(c, "%d bytes", n)
	})+"'")
	s.offer("server-first", "address: '"+tcpService(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "that is all")
		_ = c.CloseWrite()
		b, err := io.ReadAll(c)
		if err != nil {
			t.Error(err)
		}
		late <- string(b)
	})+"'")
	s.offer("resets", "address: '"+tcpService(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "partial")
		_, _ = io.ReadFull(c, make([]byte, 1))
		_ = c.SetLinger(0)
	})+"'")
	gone := make(chan error, 1)
	s.offer("watches", "address: '"+tcpService(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "x")
		_, err := io.Copy(io.Discard, c)
		gone <- err
	})+"'")

	c := dial(t, s.forward("client-first"))
	const size = 3 << 20
	if _, err := c.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); string(b) != fmt.Sprintf("%d bytes", size) || err != nil {
		t.Errorf("%q, %v", b, err)
	}

	c = dial(t, s.forward("server-first"))
	if b, err := io.ReadAll(c); string(b) != "that is all" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	_, _ = io.WriteString(c, "and yet")
	_ = c.CloseWrite()
	if got := <-late; got != "and yet" {
		t.Errorf("after its own end the target got %q", got)
	}

	c = dial(t, s.forward("resets"))
	if _, err := io.ReadFull(c, make([]byte, len("partial"))); err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(c, "x")
	if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a reset of the target becomes %v", err)
	}

	c = dial(t, s.forward("watches"))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	_ = c.SetLinger(0)
	_ = c.Close()
	if err := <-gone; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a reset of the client becomes %v", err)
	}
}

// TestForwardSlowReader: one that reads nothing does not delay the others.
func TestForwardSlowReader(t *testing.T) {
	s := newTargetSite(t, []string{"web-1"})
	const size = 16 << 20
	s.offer("source", "address: '"+tcpService(t, func(c *net.TCPConn) {
		_, _ = io.CopyN(c, zeros{}, size)
	})+"'")
	addr := s.forward("source")
	for range 4 { // none of them reads
		dial(t, addr)
	}
	var fast sync.WaitGroup
	var slowest atomic.Int64
	for range 4 {
		c := dial(t, addr)
		fast.Go(func() {
			began := time.Now()
			if n, err := io.Copy(io.Discard, c); n != size || err != nil {
				t.Errorf("%d bytes, %v", n, err)
			}
			slowest.Store(max(slowest.Load(), int64(time.Since(began))))
		})
	}
	fast.Wait()
	t.Logf("4 x 16 MiB beside 4 readers that stand still: %v", time.Duration(slowest.Load()))
	if took := time.Duration(slowest.Load()); took > 20*time.Second {
		t.Errorf("the slowest of the fast ones took %v", took)
	}
}

// zeros is a reader without end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// TestTargetNotAllowed: the node has the last word, and says so.
func TestTargetNotAllowed(t *testing.T) {
	s := newTargetSite(t, []string{"web-1"})
	s.gateway.Apply(targetDocument("metadata", "url: 'http://169.254.169.254/latest'")).Exits(0)
	harness.Eventually(t, 20*time.Second, "the refusal is shown", func() error {
		r := s.gateway.Run("target", "show", "metadata")
		if !strings.Contains(r.Stdout, "failed") || !strings.Contains(r.Stdout, "SALLYPORT_NODE_ALLOW_TARGETS") {
			return fmt.Errorf("%v", r)
		}
		return nil
	})
	res := relayGet(t, s.gateway, "/relay/default/metadata@web-1/")
	wantFault(t, res, http.StatusServiceUnavailable, "node web-1")
}

// TestForwardTakeover: a node that dies is no longer asked.
func TestForwardTakeover(t *testing.T) {
	s := newTargetSite(t, []string{"web-1", "web-2"})
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") }))
	defer backend.Close()
	s.offer("web", "address: '"+backend.Listener.Addr().String()+"'")
	addr := s.forward("web")
	get := func() error {
		c, err := net.DialTimeout("tcp", addr, 5*time.Second)
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			return err
		}
		defer func() { _ = res.Body.Close() }()
		b, err := io.ReadAll(res.Body)
		if string(b) != "ok" {
			return fmt.Errorf("%q, %w", b, err)
		}
		return nil
	}
	for range 8 { // both nodes have tunnels
		if err := get(); err != nil {
			t.Fatal(err)
		}
	}
	s.nodes["web-1"].Kill()
	// Requests that were on their way may break; those after a moment may not.
	harness.Eventually(t, 5*time.Second, "the other node takes over", func() error {
		for range 4 {
			if err := get(); err != nil {
				return err
			}
		}
		return nil
	})
	harness.Holds(t, 2*time.Second, "it stays so", get)
}
