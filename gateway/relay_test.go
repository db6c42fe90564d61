package gateway

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

// caller makes HTTP requests over the gateway's socket.
func (st *site) caller() *http.Client {
	tr := &http.Transport{DisableCompression: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", st.cfg.Socket)
	}}
	st.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 20 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

func (st *site) ask(c *http.Client, method, path string, body io.Reader, set ...func(*http.Request)) *http.Response {
	st.t.Helper()
	req, err := http.NewRequestWithContext(st.t.Context(), method, "http://gateway"+path, body)
	if err != nil {
		st.t.Fatal(err)
	}
	for _, f := range set {
		f(req)
	}
	res, err := c.Do(req)
	if err != nil {
		st.t.Fatal(err)
	}
	st.t.Cleanup(func() { _ = res.Body.Close() })
	return res
}

// fault checks an answer of the relay's own.
func fault(t *testing.T, res *http.Response, status int, hop string) api.Problem {
	t.Helper()
	var p api.Problem
	if err := json.NewDecoder(res.Body).Decode(&p); err != nil {
		t.Errorf("no problem document: %v", err)
	}
	if res.StatusCode != status || p.Status != status || res.Header.Get(headerFailedHop) != hop || res.Header.Get("Content-Type") != "application/problem+json" {
		t.Errorf("%d %q %q %+v, want %d at %q", res.StatusCode, res.Header.Get(headerFailedHop), res.Header.Get("Content-Type"), p, status, hop)
	}
	return p
}

func TestRelayPassesRequestsAsTheyAre(t *testing.T) {
	t.Parallel()
	st := newSite(t, false)
	ids := st.nodes("a")
	st.offer("web", "url: 'http://shop.internal:8080/base'", ids...)
	got := make(chan *http.Request, 1)
	bodies := make(chan string, 1)
	st.serve("a", "web", to(web(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		bodies <- string(b)
		got <- r
		w.Header().Set("Location", "/base/next?x=1")
		w.Header().Set("Strict-Transport-Security", "max-age=1")
		w.Header().Set("Sallyport-Failed-Hop", "forged")
		w.Header().Add("Set-Cookie", "s=1; Path=/base/admin; Domain=internal; HttpOnly")
		w.Header().Set("Etag", `"7"`)
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, "made")
	})))
	c := st.caller()
	res := st.ask(c, "PUT", "/relay/default/web/a%2Fb/%7Ec//d/../e;p?q=%41&&r=;", strings.NewReader("body"), func(r *http.Request) {
		r.Header.Set("Authorization", "Bearer spt_secret")
		r.Header.Set("Sallyport-Target-Authorization", "Basic abc")
		r.Header.Set("Sallyport-Other", "1")
		r.Header.Set("X-Forwarded-For", "1.2.3.4")
		r.Header.Set("Forwarded", "for=1.2.3.4")
		r.Header.Set("Connection", "X-Hop")
		r.Header.Set("X-Hop", "1")
		r.Header.Set("X-Kept", "1")
	})
	r := <-got
	if r.RequestURI != "/base/a%2Fb/%7Ec//d/../e;p?q=%41&&r=;" {
		t.Errorf("the target sees %s", r.RequestURI)
	}
	for name, want := range map[string]string{"Authorization": "Basic abc", "Sallyport-Target-Authorization": "", "Sallyport-Other": "", "X-Forwarded-For": "",
		"X-Hop": "", "X-Kept": "1", "X-Forwarded-Host": "gateway", "X-Forwarded-Proto": "http", "X-Forwarded-Prefix": "/relay/default/web",
		"Forwarded": `for=unknown;host="gateway";proto=http;by=_sallyport`} {
		if v := r.Header.Get(name); v != want {
			t.Errorf("%s is %q, want %q", name, v, want)
		}
	}
	if r.Host != "shop.internal:8080" || r.Method != "PUT" || r.ContentLength != 4 || <-bodies != "body" {
		t.Errorf("%s %s %d", r.Method, r.Host, r.ContentLength)
	}
	if res.StatusCode != http.StatusCreated || readAll(t, res.Body) != "made" {
		t.Errorf("%d", res.StatusCode)
	}
	for name, want := range map[string]string{"Location": "/relay/default/web/next?x=1", "Strict-Transport-Security": "", "Sallyport-Failed-Hop": "",
		"Sallyport-Node": "a", "Set-Cookie": "s=1; HttpOnly; Path=/relay/default/web/admin", "Etag": `"7"`, "Cache-Control": "", "Content-Security-Policy": relaySandbox} {
		if v := res.Header.Get(name); v != want {
			t.Errorf("%s is %q, want %q", name, v, want)
		}
	}
	// Without an Authorization for the target there is none.
	st.ask(c, "GET", "/relay/default/web", nil, func(r *http.Request) { r.Header.Set("Authorization", "Bearer spt_secret") })
	if <-bodies; (<-got).Header.Get("Authorization") != "" {
		t.Error("the API token reached the target")
	}
}

func TestRelayStatusMap(t *testing.T) {
	t.Parallel()
	st := newSite(t, false, func(c *Config) { c.TargetLimit = 1 })
	ids := st.nodes("a", "b")
	st.offer("web", "url: 'http://web:80', timeout: 1s", ids...)
	st.offer("db", "address: 'db:5432'", ids...)
	st.offer("spare", "url: 'http://web:80'")
	addr := web(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/slow":
			<-r.Context().Done()
		case "/cut":
			c, _, err := w.(http.Hijacker).Hijack()
			if err == nil {
				reset(c.(*net.TCPConn))
			}
		}
	})
	for _, n := range []string{"a", "b"} {
		st.serve(n, "web", to(addr))
	}
	c := st.caller()
	get := func(path string) *http.Response { return st.ask(c, "GET", path, nil) }
	fault(t, get("/relay/other/web/"), 404, "gateway")
	fault(t, get("/relay/default/nothing/"), 404, "gateway")
	fault(t, get("/relay/default/web@nobody/"), 404, "gateway")
	fault(t, get("/relay/default"), 404, "gateway")
	fault(t, get("/relay/"), 404, "gateway")
	fault(t, get("/relay/default/db/"), 404, "gateway")
	fault(t, get("/relay/default/spare/"), 503, "gateway")
	fault(t, st.ask(c, "TRACE", "/relay/default/web/", nil), 405, "gateway")
	began := time.Now()
	fault(t, get("/relay/default/web@a/slow"), 504, "target web")
	if took := time.Since(began); took < time.Second || took > waitLimit {
		t.Errorf("the time-out of 1s took %v", took)
	}
	fault(t, get("/relay/default/web@a/cut"), 502, "target web")

	for code, want := range map[tunnel.Code]struct {
		status int
		hop    string
	}{tunnel.Unreachable: {502, "target web"}, tunnel.Reset: {502, "target web"}, tunnel.Timeout: {504, "target web"}, tunnel.Forbidden: {403, "node a"},
		tunnel.Locked: {503, "node a"}, tunnel.Draining: {503, "node a"}, tunnel.NotFound: {503, "node a"}, tunnel.Overloaded: {429, "node a"}, tunnel.Failed: {502, "node a"}} {
		st.serve("a", "web", refusing(code))
		p := fault(t, get("/relay/default/web@a/"+code.String()), want.status, want.hop)
		if !strings.Contains(p.Detail, "said the node") {
			t.Errorf("%v: %s", code, p.Detail)
		}
	}
	st.serve("a", "web", func() (targetStream, error) { return nil, ErrNotConnected })
	fault(t, get("/relay/default/web@a/"), 503, "node a")
	st.serve("a", "web", func() (targetStream, error) { return nil, context.DeadlineExceeded })
	fault(t, get("/relay/default/web@a/"), 504, "node a")

	// One at a time: the second is refused while the first runs.
	st.serve("a", "web", to(addr))
	slow := make(chan int)
	go func() {
		res, err := c.Get("http://gateway/relay/default/web@a/slow")
		if err != nil {
			t.Error(err)
			slow <- 0
			return
		}
		_ = res.Body.Close()
		slow <- res.StatusCode
	}()
	eventually(t, "one runs", func() bool { return st.s.targets.usage("web").running == 1 })
	res := get("/relay/default/web/")
	fault(t, res, 429, "gateway")
	if res.Header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	if <-slow != 504 {
		t.Error("the first was not let end")
	}

	// Nobody is there: at once, with the body unread.
	for i, id := range ids {
		st.s.fleet.linkDown(id, "gone")
		if i == 0 {
			fault(t, get("/relay/default/web@a/"), 503, "node a")
		}
	}
	fault(t, st.ask(c, "POST", "/relay/default/web/", io.LimitReader(neverEnding('x'), 1<<40)), 503, "node "+st.s.fleet.nameNow(st.s.targets.usage("web").offered[0]))
	fault(t, get("/relay/default/ping/"), 503, "gateway")
}

// neverEnding is a reader of one byte without end.
type neverEnding byte

func (b neverEnding) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(b)
	}
	return len(p), nil
}

func TestRelayNeedsATokenOfAnOperator(t *testing.T) {
	t.Parallel()
	st := newSite(t, true)
	st.nodes("a")
	st.serve("a", "ping", to(web(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Error("the token reached the target")
		}
		_, _ = fmt.Fprintf(w, "%s %s", r.Header.Get("X-Forwarded-For"), r.Header.Get("Forwarded"))
	})))
	eventually(t, "the API listens on its port", func() bool {
		conn, err := net.Dial("tcp", string(st.cfg.Listen))
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	})
	roots := x509Pool(t, filepath.Join(st.s.apiTLSDir(), apiCertFile))
	for _, h2 := range []bool{false, true} {
		tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13}, ForceAttemptHTTP2: h2}
		defer tr.CloseIdleConnections()
		get := func(token string) *http.Response {
			t.Helper()
			req, err := http.NewRequestWithContext(t.Context(), "GET", "https://"+string(st.cfg.Listen)+"/relay/default/ping/", nil)
			if err != nil {
				t.Fatal(err)
			}
			if token != "" {
				req.Header.Set("Authorization", "Bearer "+token)
			}
			res, err := (&http.Client{Transport: tr}).Do(req)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = res.Body.Close() })
			return res
		}
		fault(t, get(""), 401, "gateway")
		token := func(role api.Role) string {
			tok, err := st.c.CreateToken(t.Context(), api.CreateToken{Role: role, TTL: wire.Duration(time.Hour)})
			if err != nil {
				t.Fatal(err)
			}
			return tok.Secret
		}
		fault(t, get(token(api.RoleViewer)), 403, "gateway")
		fault(t, get(token(api.RoleCertificateOfficer)), 403, "gateway")
		res := get(token(api.RoleOperator))
		if want := `127.0.0.1 for=127.0.0.1;host="` + string(st.cfg.Listen) + `";proto=https;by=_sallyport`; res.StatusCode != 200 || readAll(t, res.Body) != want {
			t.Errorf("%d, want 200 and %s", res.StatusCode, want)
		}
		if (res.ProtoMajor == 2) != h2 {
			t.Errorf("spoken was %s", res.Proto)
		}
	}
	log, err := st.db.AuditLog(t.Context(), store.AuditFilter{Limit: 100, What: "target.relay"})
	if err != nil || len(log) != 2 || log[0].Object != "target ping" || !strings.HasPrefix(log[0].Who, "token") {
		t.Errorf("audit log: %+v, %v", log, err)
	}
}

func TestRelayAsksAnotherNodeWhenThatIsSafe(t *testing.T) {
	t.Parallel()
	st := newSite(t, false)
	ids := st.nodes("a", "b")
	st.offer("web", "url: 'http://web:80'", ids...)
	echo := to(web(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close") // so that each request opens a stream
		_, _ = io.Copy(w, r.Body)
	}))
	broken := func() (targetStream, error) { // takes the request, and breaks
		s, err := to(peer(t, func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 1)) }))()
		return &cutStream{targetStream: s, err: tunnel.ErrEnded}, err
	}
	c := st.caller()
	big := strings.Repeat("x", maxReplay+1)
	for _, tc := range []struct {
		name, method, body string
		first              func() (targetStream, error)
		status             int
	}{
		{"refused, no body", "GET", "", refusing(tunnel.Unreachable), 200},
		{"refused, small body", "POST", "order", refusing(tunnel.Unreachable), 200},
		{"no tunnel, small body", "POST", "order", func() (targetStream, error) { return nil, ErrNotConnected }, 200},
		{"no tunnel, large body", "POST", big, func() (targetStream, error) { return nil, ErrNotConnected }, 200},
		{"broken, no body", "GET", "", broken, 200},
		{"broken, body", "POST", "order", broken, 502},
		{"broken, DELETE", "DELETE", "", broken, 502},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, bad := range []int{0, 1} {
				st.serve("ab"[bad:bad+1], "web", tc.first)
				st.serve("ba"[bad:bad+1], "web", echo)
				// The bad one is asked first.
				st.s.targets.failed(ids[1-bad], "web")
				st.s.targets.worked(ids[bad], "")
				st.s.targets.worked(ids[bad], "web")
				var body io.Reader
				if tc.body != "" {
					body = strings.NewReader(tc.body)
				}
				before := st.dialled("ab"[bad:bad+1], "web")
				res := st.ask(c, tc.method, "/relay/default/web/", body)
				if got := readAll(t, res.Body); res.StatusCode != tc.status || tc.status == 200 && got != tc.body {
					t.Errorf("%d with %d bytes", res.StatusCode, len(got))
				}
				if st.dialled("ab"[bad:bad+1], "web") == before {
					t.Error("the bad node was not asked")
				}
			}
		})
	}
}

func TestRelayStreamsBothWays(t *testing.T) {
	t.Parallel()
	st := newSite(t, false)
	ids := st.nodes("a")
	st.offer("web", "url: 'http://web:80'", ids...)
	st.serve("a", "web", to(web(t, func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		_ = rc.EnableFullDuplex()
		_ = rc.Flush()
		in := bufio.NewReader(r.Body)
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				w.Header().Set("X-After", r.Trailer.Get("X-Before")+" and back")
				return
			}
			_, _ = io.WriteString(w, "event: "+line)
			_ = rc.Flush()
		}
	})))
	pr, pw := io.Pipe()
	req, err := http.NewRequestWithContext(t.Context(), "POST", "http://gateway/relay/default/web/", pr)
	if err != nil {
		t.Fatal(err)
	}
	req.Trailer = http.Header{"X-Before": nil}
	res, err := st.caller().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	out := bufio.NewReader(res.Body)
	for i := range 3 { // each line comes back before the next is sent
		if _, err := fmt.Fprintf(pw, "%d\n", i); err != nil {
			t.Fatal(err)
		}
		if line, err := out.ReadString('\n'); line != fmt.Sprintf("event: %d\n", i) || err != nil {
			t.Fatalf("%q, %v", line, err)
		}
	}
	req.Trailer.Set("X-Before", "there")
	_ = pw.Close()
	if rest, err := io.ReadAll(out); len(rest) != 0 || err != nil {
		t.Errorf("%q, %v", rest, err)
	}
}

func TestRelayTrailers(t *testing.T) {
	t.Parallel()
	st := newSite(t, false)
	ids := st.nodes("a")
	st.offer("grpc", "url: 'h2c://grpc:50051'", ids...)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor != 2 || r.Header.Get("Te") != "trailers" {
			t.Errorf("%s, TE %q", r.Proto, r.Header.Get("Te"))
		}
		rc := http.NewResponseController(w)
		w.Header().Set("Content-Type", "application/grpc")
		_ = rc.Flush()
		b := make([]byte, 4)
		for {
			n, err := io.ReadFull(r.Body, b)
			_, _ = w.Write(b[:n])
			_ = rc.Flush()
			if err != nil {
				break
			}
		}
		w.Header().Set(http.TrailerPrefix+"Grpc-Status", "0")
		w.Header().Set(http.TrailerPrefix+"X-Request-Trailer", r.Trailer.Get("X-Sum"))
	})}
	srv.Protocols.SetUnencryptedHTTP2(true)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = srv.Serve(ln)
	}()
	t.Cleanup(func() {
		_ = srv.Close()
		<-served
	})
	st.serve("a", "grpc", to(ln.Addr().String()))

	tr := &http.Transport{Protocols: new(http.Protocols), DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", st.cfg.Socket)
	}}
	tr.Protocols.SetUnencryptedHTTP2(true)
	defer tr.CloseIdleConnections()
	for range 2 { // the second over the same connections
		pr, pw := io.Pipe()
		req, err := http.NewRequestWithContext(t.Context(), "POST", "http://gateway/relay/default/grpc/pkg.Service/Method", pr)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Te", "trailers")
		req.Trailer = http.Header{"X-Sum": nil}
		res, err := tr.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 4)
		for _, m := range []string{"ping", "pong"} {
			if _, err := io.WriteString(pw, m); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(res.Body, b); err != nil || string(b) != m {
				t.Fatalf("%q, %v", b, err)
			}
		}
		req.Trailer.Set("X-Sum", "42")
		_ = pw.Close()
		if rest, err := io.ReadAll(res.Body); len(rest) > 0 || err != nil {
			t.Errorf("%q, %v", rest, err)
		}
		if res.Trailer.Get("Grpc-Status") != "0" || res.Trailer.Get("X-Request-Trailer") != "42" {
			t.Errorf("trailers %v", res.Trailer)
		}
		_ = res.Body.Close()
	}
	if n := st.dialled("a", "grpc"); n != 1 {
		t.Errorf("%d streams for two calls", n)
	}
}

func TestRelayUpgrades(t *testing.T) {
	t.Parallel()
	st := newSite(t, false)
	ids := st.nodes("a")
	st.offer("ws", "url: 'http://ws:80'", ids...)
	ended := make(chan struct{})
	st.serve("a", "ws", to(web(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "websocket" || r.Header.Get("Connection") != "Upgrade" {
			t.Errorf("%v", r.Header)
		}
		c, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer close(ended)
		defer func() { _ = c.Close() }()
		_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_ = rw.Flush()
		_, _ = io.Copy(c, rw)
	})))
	c, err := net.Dial("unix", st.cfg.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_, _ = io.WriteString(c, "GET /relay/default/ws/chat HTTP/1.1\r\nHost: gateway\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	in := bufio.NewReader(c)
	res, err := http.ReadResponse(in, nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%+v, %v", res, err)
	}
	for _, m := range []string{"one\n", "two\n"} {
		_, _ = io.WriteString(c, m)
		if got, err := in.ReadString('\n'); got != m || err != nil {
			t.Fatalf("%q, %v", got, err)
		}
	}
	// A gateway that stops cuts it, and waits for nothing.
	began := time.Now()
	st.stop()
	if took := time.Since(began); took > drainTime/2 {
		t.Errorf("stopping took %v", took)
	}
	<-ended
}

func TestRelayExpectContinue(t *testing.T) {
	t.Parallel()
	st := newSite(t, false)
	ids := st.nodes("a")
	st.offer("web", "url: 'http://web:80'", ids...)
	st.serve("a", "web", to(web(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			w.WriteHeader(http.StatusExpectationFailed)
			return
		}
		b, _ := io.ReadAll(r.Body)
		_, _ = fmt.Fprint(w, len(b))
	})))
	for path, want := range map[string]int{"/yes": 200, "/no": http.StatusExpectationFailed} {
		continued := false
		ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
			continued = continued || code == http.StatusContinue
			return nil
		}, Got100Continue: func() { continued = true }})
		req, err := http.NewRequestWithContext(ctx, "POST", "http://gateway/relay/default/web"+path, bytes.NewReader(make([]byte, 1<<20)))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Expect", "100-continue")
		c := st.caller()
		c.Transport.(*http.Transport).ExpectContinueTimeout = 10 * time.Second
		res, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if res.StatusCode != want || continued != (want == 200) {
			t.Errorf("%s: %d, continued %v", path, res.StatusCode, continued)
		}
		_ = res.Body.Close()
	}
}

// TestRelayBreaksOff: an answer that is not complete must not look so.
func TestRelayBreaksOff(t *testing.T) {
	t.Parallel()
	st := newSite(t, false)
	ids := st.nodes("a")
	st.offer("web", "url: 'http://web:80'", ids...)
	st.serve("a", "web", to(web(t, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "the beginning")
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	})))
	res := st.ask(st.caller(), "GET", "/relay/default/web/", nil)
	if b, err := io.ReadAll(res.Body); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%q, %v", b, err)
	}
}

func TestRelayedLocations(t *testing.T) {
	t.Parallel()
	x := &relayed{prefix: "/relay/default/web", via: choice{spec: &wire.TargetSpec{URL: "http://shop:8080/base/"}}}
	sent := &http.Request{Host: "shop:8080"}
	for in, want := range map[string]string{
		"/base/x": "/relay/default/web/x", "/base": "/relay/default/web/", "/base?q": "/relay/default/web/?q", "x/y": "x/y", "?q": "?q", "#f": "#f",
		"http://shop:8080/base/a%2Fb": "/relay/default/web/a%2Fb", "//shop:8080/base/x": "/relay/default/web/x",
		"https://other/x": "https://other/x", "//other/x": "//other/x", "mailto:a@b": "mailto:a@b", "http://u:p@shop:8080/base/": "http://u:p@shop:8080/base/",
		"ftp://shop:8080/base/x": "ftp://shop:8080/base/x", "/basement": "/relay/default/web/basement",
	} {
		if got := x.location(in, sent); got != want {
			t.Errorf("%s becomes %s, want %s", in, got, want)
		}
	}
}

func FuzzParseRelay(f *testing.F) {
	for _, s := range []string{"/relay/default/web/x", "/relay/d/t@n/", "/relay/d%2Fe/t%40n", "/relay//", "/relay/a", "/relay/%zz/b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, uri string) {
		req, err := http.ReadRequest(bufio.NewReader(strings.NewReader("GET " + uri + " HTTP/1.1\r\nHost: h\r\n\r\n")))
		if err != nil || !isRelay(req) {
			return
		}
		tenant, target, _, x, err := parseRelay(req)
		if err != nil {
			return
		}
		if tenant == "" || target == "" || !strings.HasPrefix(x.prefix, relayPrefix) || x.path != "" && x.path[0] != '/' {
			t.Fatalf("%q: %q %q %+v", uri, tenant, target, x)
		}
		raw, _, _ := strings.Cut(req.RequestURI, "?")
		if strings.HasPrefix(raw, relayPrefix) && x.prefix+x.path != raw {
			t.Fatalf("%q is not %q and %q", raw, x.prefix, x.path)
		}
		_ = targetURL("host", "/base"+x.path, x.query).RequestURI()
	})
}
