package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/tests/harness"
)

func socketOf(g *harness.Gateway) string { return filepath.Join(g.Data, "gateway", "api.sock") }

// relayClient speaks HTTP/1.1 with the gateway's socket, or HTTP/2.
func relayClient(t *testing.T, g *harness.Gateway, h2 bool) *http.Client {
	tr := &http.Transport{Protocols: new(http.Protocols), DisableCompression: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socketOf(g))
	}}
	tr.Protocols.SetHTTP1(!h2)
	tr.Protocols.SetUnencryptedHTTP2(h2)
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func relayGet(t *testing.T, g *harness.Gateway, path string) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://gateway"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := relayClient(t, g, false).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = res.Body.Close() })
	return res
}

func wantFault(t *testing.T, res *http.Response, status int, hop string) {
	t.Helper()
	var p api.Problem
	err := json.NewDecoder(res.Body).Decode(&p)
	if err != nil || res.StatusCode != status || p.Status != status || res.Header.Get("Sallyport-Failed-Hop") != hop {
		t.Errorf("%d, failed hop %q, %+v, %v: want %d at %q", res.StatusCode, res.Header.Get("Sallyport-Failed-Hop"), p, err, status, hop)
	}
}

// curlRelay asks over the unix socket and returns the status and the body.
func (s *targetSite) curlRelay(path string, args ...string) (status int, body string) {
	s.t.Helper()
	args = append([]string{"-sS", "--unix-socket", socketOf(s.gateway), "-w", "\n%{http_code}", "http://gateway" + path}, args...)
	out := s.Exec(harness.Tool(s.t, "curl"), args...).Exits(0).Stdout
	i := strings.LastIndexByte(out, '\n')
	status, err := strconv.Atoi(out[i+1:])
	if err != nil {
		s.t.Fatal(err)
	}
	return status, out[:i]
}

// TestRelay: curl and nginx meet through the relay.
func TestRelay(t *testing.T) {
	s := newTargetSite(t, []string{"web-1"})
	s.File("www/base/a b/page.txt", "the page\n")
	if err := os.MkdirAll(s.Path("www/up"), 0o755); err != nil {
		t.Fatal(err)
	}
	s.offer("web", "url: 'http://"+s.nginx(s.Path("www"), `
		location /up/ { dav_methods PUT DELETE; client_body_temp_path `+s.Path("www/up/.tmp")+`; }
		location /who { default_type text/plain; return 200 "$request_method $request_uri $http_authorization $http_x_forwarded_prefix"; }
		location /moved { return 302 /base/; }`)+"'")
	want := func(status int, body, path string, args ...string) {
		t.Helper()
		if code, got := s.curlRelay(path, args...); code != status || got != body {
			t.Errorf("%s: %d %q, want %d %q", path, code, got, status, body)
		}
	}
	want(200, "the page\n", "/relay/default/web/base/a%20b/page.txt")
	want(200, "the page\n", "/relay/default/web@web-1/base/a%20b/page.txt")
	want(206, "page", "/relay/default/web/base/a%20b/page.txt", "-r", "4-7")
	want(404, "", "/relay/default/web/nothing", "-o", "/dev/null")
	want(200, "PATCH /who/%2E//x%2Fy?a=%41&&b  /relay/default/web", "/relay/default/web/who/%2E//x%2Fy?a=%41&&b", "--path-as-is", "-X", "PATCH", "-H", "Authorization: Bearer spt_x")
	want(200, "GET /who Basic eA== /relay/default/web", "/relay/default/web/who", "-H", "Sallyport-Target-Authorization: Basic eA==")
	file := s.File("upload", strings.Repeat("0123456789abcdef", 1<<16))
	want(201, "", "/relay/default/web/up/file", "-T", file)
	if b, err := os.ReadFile(s.Path("www/up/file")); err != nil || len(b) != 1<<20 {
		t.Errorf("%d bytes arrived, %v", len(b), err)
	}
	want(204, "", "/relay/default/web/up/file", "-X", "DELETE")
	_, head := s.curlRelay("/relay/default/web/moved", "-i", "-o", "-")
	if !strings.Contains(strings.ToLower(head), "location: /relay/default/web/base/") || !strings.Contains(head, "Sallyport-Node: web-1") {
		t.Errorf("%s", head)
	}
	want(200, strings.Repeat("x", 100_000), "/relay/default/echo/", "-H", "Expect: 100-continue", "-d", strings.Repeat("x", 100_000))
	if code, body := s.curlRelay("/relay/default/ping@web-1/"); code != 200 || !strings.Contains(body, "web-1") {
		t.Errorf("%d %s", code, body)
	}
	r := s.gateway.Run("audit", "list", "-o", "json").Exits(0)
	if !strings.Contains(r.Stdout, "target.relay") {
		t.Error("the use of targets is not in the audit log")
	}
}

// TestRelayStatus walks the status map with real processes.
func TestRelayStatus(t *testing.T) {
	port := harness.FreePort(t)
	// Over TCP the kernel tells at once that a process is gone.
	s := newTargetSite(t, []string{"web-1", "web-2"}, harness.Env("SALLYPORT_GATEWAY_TARGET_LIMIT", "2"), harness.Env("SALLYPORT_GATEWAY_CARRIER", "h2"),
		harness.Env("SALLYPORT_GATEWAY_LISTEN", fmt.Sprintf("127.0.0.1:%d", port)))
	backend := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	defer backend.Close()
	s.offer("slow", "url: 'http://"+backend.Listener.Addr().String()+"', timeout: 1s")
	s.offer("closed", fmt.Sprintf("url: 'http://127.0.0.1:%d'", harness.FreePort(t)))
	s.offer("garbage", "url: 'http://"+tcpService(t, func(c *net.TCPConn) {
		_, _ = c.Read(make([]byte, 100))
		_, _ = io.WriteString(c, "this is not HTTP\r\n\r\n")
	})+"'")

	wantFault(t, relayGet(t, s.gateway, "/relay/default/nothing/"), 404, "gateway")
	wantFault(t, relayGet(t, s.gateway, "/relay/other/slow/"), 404, "gateway")
	wantFault(t, relayGet(t, s.gateway, "/relay/default/slow@web-9/"), 404, "gateway")
	wantFault(t, relayGet(t, s.gateway, "/relay/default/closed/"), 502, "target closed")
	wantFault(t, relayGet(t, s.gateway, "/relay/default/garbage@web-1/"), 502, "target garbage")
	wantFault(t, relayGet(t, s.gateway, "/relay/default/slow@web-1/"), 504, "target slow")

	// The limit of 2: whoever comes third is told so.
	answers := make(chan int, 3)
	for range 3 {
		go func() {
			req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://gateway/relay/default/slow/", nil)
			res, err := relayClient(t, s.gateway, false).Do(req)
			if err != nil {
				t.Error(err)
				answers <- 0
				return
			}
			_ = res.Body.Close()
			answers <- res.StatusCode
		}()
	}
	seen := map[int]int{}
	for range 3 {
		seen[<-answers]++
	}
	if seen[504] != 2 || seen[429] != 1 {
		t.Errorf("of three at once: %v, want two 504 and one 429", seen)
	}

	// Over https with tokens.
	curl, ca := harness.Tool(t, "curl"), filepath.Join(s.gateway.Data, "gateway", "api-tls", "cert.pem")
	status := func(header string) string {
		t.Helper()
		return s.Exec(curl, "-sS", "--cacert", ca, "-H", header, "-o", "/dev/null", "-w", "%{http_code} %header{sallyport-failed-hop}",
			fmt.Sprintf("https://127.0.0.1:%d/relay/default/ping/", port)).Exits(0).Stdout
	}
	bearer := func(role string) string {
		return "Authorization: Bearer " + strings.TrimSpace(s.gateway.Run("token", "create", "--role", role, "--ttl", "1h").Exits(0).Stdout)
	}
	for header, want := range map[string]string{"X-None: 1": "401 gateway", "Authorization: Bearer spt_wrong": "401 gateway",
		bearer("viewer"): "403 gateway", bearer("operator"): "200 "} {
		if got := status(header); got != want {
			t.Errorf("%.30s...: %q, want %q", header, got, want)
		}
	}

	// No live channel: 503 at once, with the hop that is missing.
	s.nodes["web-1"].Kill()
	unavailable := func(path, hop string) {
		t.Helper()
		var began time.Time
		harness.Eventually(t, 30*time.Second, "the loss is noticed", func() error {
			began = time.Now()
			res := relayGet(t, s.gateway, path)
			if got := res.Header.Get("Sallyport-Failed-Hop"); res.StatusCode != 503 || got != hop {
				return fmt.Errorf("%d at %q", res.StatusCode, got)
			}
			return nil
		})
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("503 took %v", took)
		}
	}
	unavailable("/relay/default/slow@web-1/", "node web-1")
	s.relay.Kill()
	unavailable("/relay/default/ping@web-2/", "rcp dmz-1")
}

// TestRelayStreaming: server-sent events, WebSocket and gRPC's kind of HTTP/2.
func TestRelayStreaming(t *testing.T) {
	s := newTargetSite(t, []string{"web-1"})
	next := make(chan string)
	backend := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		switch r.URL.Path {
		case "/events":
			w.Header().Set("Content-Type", "text/event-stream")
			_ = rc.Flush()
			for text := range next {
				_, _ = fmt.Fprintf(w, "data: %s\n\n", text)
				_ = rc.Flush()
			}
		case "/ws":
			c, rw, err := rc.Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { _ = c.Close() }()
			_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n")
			_ = rw.Flush()
			_, _ = io.Copy(c, rw) // frames come back as they are
		case "/pkg.Service/Chat":
			w.Header().Set("Content-Type", "application/grpc")
			_ = rc.Flush()
			b := make([]byte, 5)
			for {
				if _, err := io.ReadFull(r.Body, b); err != nil {
					break
				}
				_, _ = w.Write(b)
				_ = rc.Flush()
			}
			w.Header().Set(http.TrailerPrefix+"Grpc-Status", "0")
			w.Header().Set(http.TrailerPrefix+"Grpc-Message", r.Proto)
		}
	}))
	backend.Config.Protocols = new(http.Protocols)
	backend.Config.Protocols.SetHTTP1(true)
	backend.Config.Protocols.SetUnencryptedHTTP2(true)
	backend.Start()
	defer backend.Close()
	addr := backend.Listener.Addr().String()
	s.offer("web", "url: 'http://"+addr+"'")
	s.offer("grpc", "url: 'h2c://"+addr+"'")

	// Each event is there before the next is made.
	res := relayGet(t, s.gateway, "/relay/default/web/events")
	in := bufio.NewReader(res.Body)
	for i := range 3 {
		next <- fmt.Sprint(i)
		if line, err := in.ReadString('\n'); line != fmt.Sprintf("data: %d\n", i) || err != nil {
			t.Fatalf("%q, %v", line, err)
		}
		_, _ = in.ReadString('\n')
	}
	close(next)
	if rest, err := io.ReadAll(in); len(rest) > 0 || err != nil {
		t.Errorf("%q, %v", rest, err)
	}

	c, err := net.Dial("unix", socketOf(s.gateway))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	_, _ = io.WriteString(c, "GET /relay/default/web/ws HTTP/1.1\r\nHost: gateway\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
	in = bufio.NewReader(c)
	up, err := http.ReadResponse(in, nil)
	if err != nil || up.StatusCode != http.StatusSwitchingProtocols || up.Header.Get("Sec-Websocket-Accept") == "" {
		t.Fatalf("%+v, %v", up, err)
	}
	frame := []byte{0x81, 0x85, 1, 2, 3, 4, 'h' ^ 1, 'e' ^ 2, 'l' ^ 3, 'l' ^ 4, 'o' ^ 1}
	for range 3 {
		if _, err := c.Write(frame); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, len(frame))
		if _, err := io.ReadFull(in, b); err != nil || string(b) != string(frame) {
			t.Fatalf("%x, %v", b, err)
		}
	}

	pr, pw := io.Pipe()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://gateway/relay/default/grpc/pkg.Service/Chat", pr)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Te", "trailers")
	req.Header.Set("Content-Type", "application/grpc")
	call, err := relayClient(t, s.gateway, true).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = call.Body.Close() }()
	for _, m := range []string{"hello", "world"} {
		if _, err := io.WriteString(pw, m); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 5)
		if _, err := io.ReadFull(call.Body, b); err != nil || string(b) != m {
			t.Fatalf("%q, %v", b, err)
		}
	}
	_ = pw.Close()
	if rest, err := io.ReadAll(call.Body); len(rest) > 0 || err != nil {
		t.Errorf("%q, %v", rest, err)
	}
	if call.Trailer.Get("Grpc-Status") != "0" || call.Trailer.Get("Grpc-Message") != "HTTP/2.0" {
		t.Errorf("trailers: %v", call.Trailer)
	}
}

// TestRelayNodeDies: a body that breaks off does not look complete, and the
// next request finds the other node.
func TestRelayNodeDies(t *testing.T) {
	s := newTargetSite(t, []string{"web-1", "web-2"})
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/endless" {
			_, _ = io.Copy(w, zeros{})
			return
		}
		_, _ = io.WriteString(w, "ok")
	}))
	defer backend.Close()
	s.offer("web", "url: 'http://"+backend.Listener.Addr().String()+"'")
	res := relayGet(t, s.gateway, "/relay/default/web/endless")
	name := res.Header.Get("Sallyport-Node")
	if _, err := io.CopyN(io.Discard, res.Body, 1<<20); err != nil || s.nodes[name] == nil {
		t.Fatalf("by way of %q: %v", name, err)
	}
	s.nodes[name].Kill()
	broke := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, res.Body)
		broke <- err
	}()
	select {
	case err := <-broke:
		if err == nil {
			t.Error("an answer that broke off looks complete")
		}
	case <-time.After(time.Minute):
		t.Error("the loss of the node is not noticed")
	}
	for range 8 {
		began := time.Now()
		res := relayGet(t, s.gateway, "/relay/default/web/")
		b, err := io.ReadAll(res.Body)
		if res.StatusCode != 200 || string(b) != "ok" || err != nil || res.Header.Get("Sallyport-Node") == name {
			t.Errorf("%d %q by way of %s, %v", res.StatusCode, b, res.Header.Get("Sallyport-Node"), err)
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("the other node took over after %v", took)
		}
	}
}

// TestRelayBig: 5 GB each way, with curl and nginx.
func TestRelayBig(t *testing.T) {
	harness.Long(t)
	s := newTargetSite(t, []string{"web-1"})
	const size = 5_000_000_000
	big := s.File("www/big", "")
	if err := os.Truncate(big, size); err != nil { // a hole: it takes no disk
		t.Fatal(err)
	}
	sink := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, r.Body, make([]byte, 256<<10))
		_, _ = fmt.Fprintf(w, "%d %v", n, err)
	}))
	defer sink.Close()
	s.offer("web", "url: 'http://"+s.nginx(s.Path("www"), `location /up { proxy_pass http://`+sink.Listener.Addr().String()+`; proxy_request_buffering off; proxy_http_version 1.1; }`)+"'")
	curl := harness.Tool(t, "curl")
	base := []string{"-sS", "--fail", "--unix-socket", socketOf(s.gateway)}
	down := s.Exec(curl, append(base, "-o", "/dev/null", "-w", "%{size_download}", "http://gateway/relay/default/web/big")...).Exits(0)
	if down.Stdout != strconv.Itoa(size) {
		t.Errorf("%s bytes came down", down.Stdout)
	}
	up := s.Exec(curl, append(base, "-T", big, "http://gateway/relay/default/web/up")...).Exits(0)
	if up.Stdout != fmt.Sprintf("%d <nil>", size) {
		t.Errorf("the sink says %s", up.Stdout)
	}
	t.Logf("5 GB down in %v (%d MB/s), up in %v (%d MB/s)", down.Took.Round(time.Second), int(size/down.Took.Seconds()/1e6), up.Took.Round(time.Second), int(size/up.Took.Seconds()/1e6))
}
