package local

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"sallyport/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var quiet = slog.New(slog.DiscardHandler)

type plainRole struct{}

func (plainRole) Status(context.Context) Status {
	return Status{Role: wire.RoleRCP, ID: "x", State: "running", Instances: []Instance{{TrustDomain: "a.sallyport"}}}
}
func (plainRole) Doctor(context.Context) []Check { return nil }

type nodeRole struct {
	plainRole
	got      []EventRequest
	unlocked string
	joined   string
}

func (n *nodeRole) SendEvent(_ context.Context, e EventRequest) (EventReceipt, error) {
	if e.Object == "full" {
		return EventReceipt{}, &Error{CodeUnavailable, "spool is full"}
	}
	if e.Object == "broken" {
		return EventReceipt{}, errors.New("disk on fire")
	}
	n.got = append(n.got, e)
	return EventReceipt{Stored: []StoredEvent{{Instance: "a.sallyport", Seq: int64(len(n.got))}}}, nil
}
func (n *nodeRole) Unlock(_ context.Context, i string) error { n.unlocked = i; return nil }
func (n *nodeRole) Join(_ context.Context, c string) error   { n.joined = c; return nil }

func serve(t *testing.T, dir string, role Role) *Client {
	t.Helper()
	s, err := Listen(dir, role, quiet)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if _, err := os.Lstat(filepath.Join(dir, SocketName)); !os.IsNotExist(err) {
			t.Errorf("socket stays behind: %v", err)
		}
	})
	return NewClient(filepath.Join(dir, SocketName))
}

func code(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

func TestNodeSocket(t *testing.T) {
	dir := t.TempDir()
	role := &nodeRole{}
	c := serve(t, dir, role)
	ctx := t.Context()

	st, err := c.Status(ctx)
	if err != nil || st.State != "running" || st.Upstreams == nil || st.Instances[0].Policies == nil {
		t.Fatalf("status %+v, %v (lists must not be null)", st, err)
	}
	if d, err := c.Doctor(ctx); err != nil || d == nil {
		t.Errorf("doctor: %v, %v", d, err)
	}
	if i, err := c.Instances(ctx); err != nil || len(i) != 1 {
		t.Errorf("instances: %v, %v", i, err)
	}
	r, err := c.SendEvent(ctx, EventRequest{Severity: wire.SeverityMajor, Text: "disk full"})
	if err != nil || r.Stored[0].Seq != 1 || role.got[0].Text != "disk full" {
		t.Errorf("event: %+v %v", r, err)
	}
	for _, c2 := range []struct {
		e    EventRequest
		want string
	}{
		{EventRequest{Severity: "loud", Text: "x"}, CodeInvalid},
		{EventRequest{Severity: wire.SeverityNormal}, CodeInvalid},
		{EventRequest{Severity: wire.SeverityNormal, Text: strings.Repeat("x", wire.MaxEventText+1)}, CodeInvalid},
		{EventRequest{Severity: wire.SeverityNormal, Text: strings.Repeat("x", maxBody)}, CodeInvalid},
		{EventRequest{Severity: wire.SeverityNormal, Text: "x", Object: "full"}, CodeUnavailable},
		{EventRequest{Severity: wire.SeverityNormal, Text: "x", Object: "broken"}, CodeInternal},
	} {
		if _, err := c.SendEvent(ctx, c2.e); code(err) != c2.want {
			t.Errorf("event %.40v: %v, want code %s", c2.e, err, c2.want)
		}
	}
	if err := c.Unlock(ctx, "a.sallyport"); err != nil || role.unlocked != "a.sallyport" {
		t.Errorf("unlock by our own user: %v, %q", err, role.unlocked)
	}
	if err := c.Join(ctx, "sp1.garbage"); code(err) != CodeInvalid || role.joined != "" {
		t.Errorf("garbage join code: %v", err)
	}
	good, err := (wire.JoinCode{TrustDomain: "a", Root: wire.HashSPKI(nil), Role: wire.RoleNode}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Join(ctx, good); err != nil || role.joined != good {
		t.Errorf("join: %v", err)
	}
	if st, err := os.Stat(filepath.Join(dir, SocketName)); err != nil || st.Mode().Perm() != 0o666 {
		t.Errorf("socket mode %v, %v", st.Mode(), err)
	}
}

func TestStrangersReadButChangeNothing(t *testing.T) {
	role := &nodeRole{}
	h := handler(role, quiet)
	stranger := uint32(os.Geteuid()) + 4711
	ask := func(ctx context.Context, method, path, body string) int {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(ctx, method, path, strings.NewReader(body)))
		return w.Code
	}
	for name, ctx := range map[string]context.Context{
		"stranger": context.WithValue(t.Context(), userKey{}, stranger),
		"nobody":   context.WithValue(t.Context(), userKey{}, nobody),
		"unknown":  t.Context(),
	} {
		for _, q := range []struct {
			method, path, body string
			want               int
		}{
			{"GET", "/v1/status", "", 200},
			{"GET", "/v1/doctor", "", 200},
			{"GET", "/v1/instances", "", 200},
			{"POST", "/v1/events", `{"severity":"normal","text":"x"}`, 200},
			{"POST", "/v1/unlock", `{}`, 403},
			{"POST", "/v1/join", `{"code":"x"}`, 403},
			{"GET", "/debug/pprof/", "", 403},
			{"GET", "/debug/pprof/heap", "", 403},
			{"GET", "/debug/pprof/cmdline", "", 403},
		} {
			if got := ask(ctx, q.method, q.path, q.body); got != q.want {
				t.Errorf("%s: %s %s: %d, want %d", name, q.method, q.path, got, q.want)
			}
		}
	}
	if got := ask(context.WithValue(t.Context(), userKey{}, uint32(0)), "GET", "/debug/pprof/cmdline", ""); got != 200 {
		t.Errorf("root: profile: %d", got)
	}
	if role.unlocked != "" || role.joined != "" {
		t.Error("a refused request was carried out")
	}
}

func TestRoleWithoutEvents(t *testing.T) {
	c := serve(t, t.TempDir(), plainRole{})
	if _, err := c.SendEvent(t.Context(), EventRequest{Severity: wire.SeverityNormal, Text: "x"}); code(err) != CodeUnsupported {
		t.Errorf("event to an RCP: %v", err)
	}
	if err := c.Unlock(t.Context(), ""); code(err) != CodeUnsupported {
		t.Errorf("unlock: %v", err)
	}
	if err := c.Join(t.Context(), ""); code(err) != CodeUnsupported {
		t.Errorf("join: %v", err)
	}
}

func TestLongPathAndDeadSocket(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 60), strings.Repeat("e", 60))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	dead, err := Listen(dir, plainRole{}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	_ = dead.ln.Close() // as after kill -9: the file stays
	_ = dead.dir.Close()
	c := NewClient(filepath.Join(dir, SocketName))
	if _, err := c.Status(t.Context()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("dead socket: %v, want ErrNotRunning", err)
	}
	c = serve(t, dir, plainRole{})
	if _, err := c.Status(t.Context()); err != nil {
		t.Errorf("after restart: %v", err)
	}
	if _, err := NewClient(filepath.Join(t.TempDir(), "x")).Status(t.Context()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("no socket: %v, want ErrNotRunning", err)
	}
}

func TestMuteRole(t *testing.T) {
	path := filepath.Join(t.TempDir(), SocketName)
	ln, err := net.Listen("unix", path) // nobody accepts, as when the process is stopped
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	c := NewClient(path)
	c.patience = 20 * time.Millisecond
	_, err = c.Doctor(t.Context())
	if !errors.Is(err, ErrMute) || !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v, want ErrMute", err)
	}
	if want := path + ": the role does not answer within 20ms: is its process stopped, or its disk?"; err.Error() != want {
		t.Errorf("%q, want %q", err, want)
	}
}

func TestForeignFileIsNotReplaced(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, SocketName)
	if err := os.WriteFile(path, []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(dir, plainRole{}, quiet); err == nil {
		t.Fatal("a plain file was replaced by a socket")
	}
	if b, _ := os.ReadFile(path); string(b) != "keep" {
		t.Errorf("file now holds %q", b)
	}
}

func TestConnectionsPerUserAreBounded(t *testing.T) {
	dir := t.TempDir()
	c := serve(t, dir, plainRole{})
	var held []net.Conn
	defer func() {
		for _, h := range held {
			_ = h.Close()
		}
	}()
	for range maxConnsPerUser {
		conn, err := net.Dial("unix", filepath.Join(dir, SocketName))
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, conn)
	}
	if _, err := c.Status(t.Context()); err == nil {
		t.Error("a connection above the limit was served")
	}
	_ = held[0].Close()
	held = held[1:]
	deadline := time.Now().Add(10 * time.Second)
	for {
		if _, err := c.Status(t.Context()); err == nil {
			return
		} else if time.Now().After(deadline) {
			t.Fatalf("after one left: %v", err)
		}
	}
}

func TestRequestsAreClosedUnderUnknownPaths(t *testing.T) {
	w := httptest.NewRecorder()
	handler(plainRole{}, quiet).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/v1/secrets", nil))
	if w.Code != http.StatusNotFound {
		t.Errorf("unknown path: %d", w.Code)
	}
}
