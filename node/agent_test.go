package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"sallyport/config"
	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/local"
	"sallyport/internal/session"
	"sallyport/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const installation = "11111111-1111-4111-8111-111111111111"

// plant is a CA, a gateway, and an RCP's port that nodes dial.
type plant struct {
	t       *testing.T
	ca      *identitytest.CA
	gateway *identity.Identity
	addr    string
	conns   chan *channel.Conn // as they come, from the RCP's side
}

func newPlant(t *testing.T) *plant {
	t.Helper()
	p := &plant{t: t, ca: identitytest.NewCA(t), conns: make(chan *channel.Conn, 64)}
	p.gateway = p.ca.Party(t, wire.RoleGateway)
	p.addr = p.listen("127.0.0.1:0")
	return p
}

// listen opens an RCP's port until the test ends.
func (p *plant) listen(addr string) string {
	p.t.Helper()
	rcp := p.ca.Party(p.t, wire.RoleRCP)
	ln, err := channel.Listen(channel.ListenConfig{Addr: addr, Identity: rcp, AllowDownstream: true, AllowEnroll: true, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		p.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = ln.Run(ctx, func(ctx context.Context, c *channel.Conn) {
			p.conns <- c
			select {
			case <-c.Done():
			case <-ctx.Done():
			}
		})
	}()
	p.t.Cleanup(func() { cancel(); <-done })
	return ln.Addr().String()
}

// code is a join code for the plant without a token.
func (p *plant) code(besides ...string) string {
	p.t.Helper()
	code, err := wire.JoinCode{TrustDomain: p.ca.TrustDomain, Root: wire.KeyOf(p.ca.Root), Role: wire.RoleNode, Addresses: append(besides, p.addr)}.Encode()
	if err != nil {
		p.t.Fatal(err)
	}
	return code
}

// agent is a node under test.
type agent struct {
	p    *plant
	data string
	a    *Agent
	stop func()
	c    *channel.Conn
}

// config makes a node's configuration from an environment.
func (p *plant) config(data string, env ...string) Config {
	p.t.Helper()
	environ := append([]string{"SALLYPORT_DATA=" + data, "SALLYPORT_NODE_ADMIN_LISTEN=off", "SALLYPORT_NODE_JOIN=" + p.code(),
		"SALLYPORT_NODE_NAME=web-1", "SALLYPORT_NODE_CARRIER=h2", "SALLYPORT_NODE_ALLOW_COMMANDS=*"}, env...)
	cfg, err := config.LoadNode(environ)
	if err != nil {
		p.t.Fatal(err)
	}
	return Config{Node: cfg, Version: "test"}
}

// dataDir is short enough for a unix socket.
func dataDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "node")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// certify gives the node of a data directory its certificate, as if it had
// enrolled in an earlier life.
func (p *plant) certify(data string) {
	p.t.Helper()
	id, err := identity.Open(filepath.Join(data, "node", p.ca.TrustDomain, "identity"), wire.RoleNode)
	if err != nil {
		p.t.Fatal(err)
	}
	if err := id.Pin(wire.KeyOf(p.ca.Root), p.ca.TrustDomain); err != nil {
		p.t.Fatal(err)
	}
	p.ca.Certify(p.t, id)
}

// start runs an agent until stop, or the end of the test.
func (p *plant) start(cfg Config) *agent {
	p.t.Helper()
	a, err := New(cfg, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		p.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	ag := &agent{p: p, data: cfg.Data, a: a}
	stopped := false
	ag.stop = func() {
		p.t.Helper()
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			p.t.Errorf("agent: %v", err)
		}
	}
	p.t.Cleanup(ag.stop)
	return ag
}

// node starts a certified node and waits for its channel.
func (p *plant) node(env ...string) *agent {
	p.t.Helper()
	data := dataDir(p.t)
	p.certify(data)
	ag := p.start(p.config(data, env...))
	ag.c = p.channel()
	return ag
}

// restart ends the agent and starts it again on the same directory.
func (ag *agent) restart(env ...string) *agent {
	ag.p.t.Helper()
	ag.stop()
	next := ag.p.start(ag.p.config(ag.data, env...))
	next.c = ag.p.channel()
	return next
}

// channel waits for the next channel of a node.
func (p *plant) channel() *channel.Conn {
	p.t.Helper()
	select {
	case c := <-p.conns:
		return c
	case <-time.After(15 * time.Second):
		p.t.Fatal("the node does not connect")
		return nil
	}
}

func (ag *agent) in() *instance { return ag.a.all()[0] }

// session opens a gateway's session with the node.
func (ag *agent) session() *session.Session {
	ag.p.t.Helper()
	return ag.sessionOf(ag.p.gateway)
}

func (ag *agent) sessionOf(gateway *identity.Identity) *session.Session {
	ag.p.t.Helper()
	party, ok := ag.in().id.Party()
	if !ok {
		ag.p.t.Fatal("the node is not certified")
	}
	stream, err := ag.c.Connect(ag.p.t.Context(), wire.ConnectAuthority(party.ID), nil)
	if err != nil {
		ag.p.t.Fatal(err)
	}
	s, err := session.Dial(ag.p.t.Context(), stream, gateway, party)
	if err != nil {
		ag.p.t.Fatal(err)
	}
	ag.p.t.Cleanup(func() { _ = s.Close() })
	return s
}

// call sends one request and decodes the answer into out, if there is one.
func call(t *testing.T, rt http.RoundTripper, method, path string, in, out any) int {
	t.Helper()
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			t.Fatal(err)
		}
		body = bytes.NewReader(b)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://peer"+path, body)
	if err != nil {
		t.Fatal(err)
	}
	res, err := rt.RoundTrip(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	defer func() { _ = res.Body.Close() }()
	if out != nil && res.StatusCode == http.StatusOK {
		reflect.ValueOf(out).Elem().SetZero()
		if err := json.NewDecoder(res.Body).Decode(out); err != nil {
			t.Fatalf("%s %s: %v", method, path, err)
		}
	}
	return res.StatusCode
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(15 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("never: %s", what)
		}
	}
}

// TestClosedList enumerates what an RCP can ask of a node.
func TestClosedList(t *testing.T) {
	p := newPlant(t)
	ag := p.node()
	id := ag.in().id.ID()
	paths := []string{"/", wire.PathSignals, wire.PathDrain, wire.PathLanes, wire.PathArtifacts + "abc", wire.PathPeers, wire.PathChannels, wire.PathHello, wire.PathDesired,
		wire.PathOutbox, wire.PathActions, wire.PathActionID + "x", wire.PathCSR, wire.PathCertificate, wire.PathRevocations, wire.PathUnlock, wire.PathReidentify, wire.PathEcho, wire.PathEnroll, "/metrics", "/debug/pprof/"}
	allowed := map[string]int{"POST " + wire.PathDrain: http.StatusNoContent, "GET " + wire.PathSignals: http.StatusOK,
		"POST " + wire.PathLanes: http.StatusBadRequest} // for want of a ticket
	for _, method := range []string{"GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"} {
		for _, path := range paths {
			want := allowed[method+" "+path]
			if want == 0 {
				want = http.StatusNotFound
			}
			if method == "POST" && path == wire.PathDrain {
				continue // last: it replaces the channel
			}
			var out wire.Signal
			got := call(t, ag.c, method, path, nil, map[bool]any{true: &out}[method+" "+path == "GET "+wire.PathSignals])
			if got != want {
				t.Errorf("%s %s: %d, want %d", method, path, got, want)
			}
		}
	}
	for authority, want := range map[string]int{
		wire.ConnectAuthority(id):                            200,
		wire.ConnectAuthority(wire.NewID()):                  404,
		wire.PendingAuthority(ag.in().id.KeyHash()):          404,
		"localhost:22":                                       400,
		"127.0.0.1:443":                                      400,
		wire.PendingAuthority(p.gateway.KeyHash()):           404,
		strings.TrimSuffix(wire.ConnectAuthority(id), "443"): 400,
	} {
		got := 200
		s, err := ag.c.Connect(t.Context(), authority, nil)
		var no *channel.RefusedError
		if errors.As(err, &no) {
			got = no.Status
		} else if err != nil {
			got = 400 // not even an authority
		} else {
			_ = s.Close()
		}
		if got != want {
			t.Errorf("CONNECT %s: %d, want %d", authority, got, want)
		}
	}
	if got := call(t, ag.c, "POST", wire.PathDrain, wire.Drain{Deadline: time.Second}, nil); got != http.StatusNoContent {
		t.Errorf("drain: %d", got)
	}
}

func TestHelloAndSignals(t *testing.T) {
	p := newPlant(t)
	ag := p.node("SALLYPORT_NODE_TAGS=role=web")
	var h wire.Hello
	s := ag.session()
	if st := call(t, s, "GET", wire.PathHello, nil, &h); st != 200 {
		t.Fatal(st)
	}
	if h.Party.ID != ag.in().id.ID() || h.State != wire.StateRunning || h.Name != "web-1" || h.Tags["role"] != "web" || h.Outbox.Spool == "" {
		t.Errorf("hello %+v", h)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", "http://peer"+wire.PathSignals, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := ag.c.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	lines := wire.NewLineReader(res.Body, wire.MaxSignalLine)
	next := func() (sig wire.Signal) {
		t.Helper()
		if err := lines.Next(&sig); err != nil {
			t.Fatal(err)
		}
		return sig
	}
	first := next()
	if first.ID != h.Party.ID || first.Boot != h.Boot || first.Digest != h.Digest() || len(first.Hints) != 0 {
		t.Errorf("signal %+v, digest of the hello %s", first, h.Digest())
	}
	if _, err := ag.a.SendEvent(ctx, local.EventRequest{Severity: wire.SeverityMinor, Text: "x"}); err != nil {
		t.Fatal(err)
	}
	if sig := next(); fmt.Sprint(sig.Hints) != "[outbox]" || sig.Digest != first.Digest {
		t.Errorf("after an event: %+v", sig)
	}
	if st := call(t, s, "POST", wire.PathDrain, wire.Drain{Reason: "maintenance"}, nil); st != 204 {
		t.Fatal(st)
	}
	if sig := next(); sig.Digest == first.Digest {
		t.Errorf("the digest does not change with the state: %+v", sig)
	}
	if state, reason := ag.in().state(); state != wire.StateDraining || reason != "maintenance" {
		t.Errorf("state %s: %s", state, reason)
	}
}

// desired makes a signed desired state with one files policy.
func (p *plant) desired(ag *agent, signer *identity.Identity, change func(*wire.Desired)) wire.Envelope {
	p.t.Helper()
	spec, err := json.Marshal(wire.FilesSpec{Files: []wire.FileSpec{{Path: filepath.Join(ag.data, "..", filepath.Base(ag.data)+".out"), Content: "hello"}}})
	if err != nil {
		p.t.Fatal(err)
	}
	d := wire.Desired{Node: ag.in().id.ID(), Installation: installation, Revision: wire.Revision{Generation: 1, N: 1}, Issued: time.Now(), Name: "web-1",
		Policies: []wire.Policy{{Name: "motd", Type: wire.PolicyFiles, Digest: wire.SpecDigest(spec)}}, Specs: map[string]json.RawMessage{wire.SpecDigest(spec): spec}}
	if change != nil {
		change(&d)
	}
	env, err := signer.Sign(wire.TypeDesired, d)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = os.Remove(ag.data + ".out") })
	return env
}

func content(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestDesiredState(t *testing.T) {
	p := newPlant(t)
	ag := p.node()
	s := ag.session()
	put := func(env wire.Envelope) (res wire.DesiredResult) {
		t.Helper()
		if st := call(t, s, "PUT", wire.PathDesired, env, &res); st != 200 {
			t.Fatalf("status %d", st)
		}
		return res
	}
	rev := func(g, n int64) func(*wire.Desired) {
		return func(d *wire.Desired) { d.Revision = wire.Revision{Generation: g, N: n} }
	}
	res := put(p.desired(ag, p.gateway, rev(1, 5)))
	if res.Refused != "" || res.Applied != (wire.Revision{Generation: 1, N: 5}) || res.State != wire.StateRunning || len(res.Policies) != 1 || res.Policies[0].State != wire.PolicyApplied {
		t.Fatalf("result %+v", res)
	}
	if content(t, ag.data+".out") != "hello" {
		t.Error("the file is not there")
	}
	other := identitytest.NewCA(t)
	stolen := p.desired(ag, p.gateway, rev(1, 9))
	stolen.Payload = bytes.Replace(stolen.Payload, []byte(`"1.9"`), []byte(`"1.8"`), 1)
	for name, c := range map[string]struct {
		env  wire.Envelope
		want string
	}{
		"older revision":             {p.desired(ag, p.gateway, rev(1, 4)), "older"},
		"older generation":           {p.desired(ag, p.gateway, rev(0, 99)), "older"},
		"other content, same number": {p.desired(ag, p.gateway, func(d *wire.Desired) { d.Revision, d.Policies = wire.Revision{Generation: 1, N: 5}, nil }), "older"},
		"another node":               {p.desired(ag, p.gateway, func(d *wire.Desired) { d.Node = wire.NewID() }), "wrong-node"},
		"signed by an RCP":           {p.desired(ag, p.ca.Party(t, wire.RoleRCP), rev(1, 9)), "bad-signature"},
		"signed by a node":           {p.desired(ag, p.ca.Party(t, wire.RoleNode), rev(1, 9)), "bad-signature"},
		"of another trust domain":    {p.desired(ag, other.Party(t, wire.RoleGateway), rev(1, 9)), "bad-signature"},
		"altered":                    {stolen, "bad-signature"},
		"a digest without its spec":  {p.desired(ag, p.gateway, func(d *wire.Desired) { d.Revision.N, d.Specs = 9, nil }), "bad-signature"},
		"one name twice":             {p.desired(ag, p.gateway, func(d *wire.Desired) { d.Revision.N = 9; d.Policies = append(d.Policies, d.Policies[0]) }), "bad-signature"},
	} {
		if res := put(c.env); res.Refused != c.want || res.Applied != (wire.Revision{Generation: 1, N: 5}) || res.Reason == "" {
			t.Errorf("%s: %+v, want %s", name, res, c.want)
		}
	}
	env := p.desired(ag, p.gateway, rev(1, 9))
	env.Type = wire.TypeAction
	if res := put(env); res.Refused != "bad-signature" {
		t.Errorf("another type: %+v", res)
	}
	// Last known good: without any gateway, after a restart, drift is repaired.
	if err := os.Remove(ag.data + ".out"); err != nil {
		t.Fatal(err)
	}
	ag = ag.restart()
	eventually(t, "the file is back", func() bool { return content(t, ag.data+".out") == "hello" })
	eventually(t, "the revision is known", func() bool { return ag.in().desired.revision() == wire.Revision{Generation: 1, N: 5} })
	// A restored gateway begins a new generation with lower numbers.
	s = ag.session()
	if res := put(p.desired(ag, p.gateway, func(d *wire.Desired) { d.Revision, d.Policies = wire.Revision{Generation: 2, N: 1}, nil })); res.Refused != "" || len(res.Policies) != 0 {
		t.Errorf("new generation: %+v", res)
	}
	if content(t, ag.data+".out") != "" {
		t.Error("the file of a policy that went is still there")
	}
}

// TestLock: a gateway with another database is refused and changes nothing.
func TestLock(t *testing.T) {
	p := newPlant(t)
	ag := p.node()
	s := ag.session()
	var res wire.DesiredResult
	call(t, s, "PUT", wire.PathDesired, p.desired(ag, p.gateway, func(d *wire.Desired) { d.Revision.N = 5 }), &res)
	foreign := func(n int64) wire.Envelope {
		return p.desired(ag, p.gateway, func(d *wire.Desired) { d.Installation, d.Revision.N, d.Policies = "wiped", n, nil })
	}
	call(t, s, "PUT", wire.PathDesired, foreign(100), &res)
	if res.Refused != "locked" || res.State != wire.StateLocked || content(t, ag.data+".out") != "hello" {
		t.Fatalf("result %+v", res)
	}
	if r := runAction(t, s, p.action(ag, "wiped", "true"), 0); r.result.State != wire.ActionRefused {
		t.Errorf("locked node ran an action: %+v", r.result)
	}
	ag = ag.restart()
	var h wire.Hello
	s = ag.session()
	call(t, s, "GET", wire.PathHello, nil, &h)
	if h.State != wire.StateLocked || h.Installation != installation || h.Outbox.Depth == 0 {
		t.Errorf("hello of a locked node: %+v", h)
	}
	applied := func(when string, want wire.Revision) {
		t.Helper()
		eventually(t, when, func() bool {
			var h wire.Hello
			call(t, s, "GET", wire.PathHello, nil, &h)
			return h.Applied == want
		})
	}
	applied("a locked node has what it had", wire.Revision{Generation: 1, N: 5})
	if err := ag.a.Unlock(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	// Its revision is no number of the installation that comes: that one counts
	// from the beginning, and would push nothing to who is ahead of it.
	applied("an unlocked node has nothing of the next installation", wire.Revision{})
	call(t, s, "PUT", wire.PathDesired, foreign(1), &res)
	if res.Refused != "" || content(t, ag.data+".out") != "" {
		t.Errorf("after unlock: %+v", res)
	}
	applied("it has what that one gave it", wire.Revision{Generation: 1, N: 1})
	// Remotely: a signed unlock that names the node.
	for _, c := range []struct {
		u    wire.Unlock
		who  *identity.Identity
		want int
	}{
		{wire.Unlock{Node: wire.NewID(), Installation: installation}, p.gateway, 403},
		{wire.Unlock{Node: ag.in().id.ID(), Installation: installation}, p.ca.Party(t, wire.RoleRCP), 403},
		{wire.Unlock{Node: ag.in().id.ID(), Installation: installation}, p.gateway, 204},
	} {
		env, err := c.who.Sign(wire.TypeUnlock, c.u)
		if err != nil {
			t.Fatal(err)
		}
		if st := call(t, s, "POST", wire.PathUnlock, env, nil); st != c.want {
			t.Errorf("unlock: %d, want %d", st, c.want)
		}
	}
	call(t, s, "PUT", wire.PathDesired, p.desired(ag, p.gateway, nil), &res)
	if res.Refused != "" {
		t.Errorf("after a remote unlock: %+v", res)
	}
	// Deleting the file is the third way.
	call(t, s, "PUT", wire.PathDesired, foreign(100), &res)
	if err := os.Remove(filepath.Join(ag.in().dir, "uid")); err != nil {
		t.Fatal(err)
	}
	if state, _ := ag.in().state(); state != wire.StateRunning {
		t.Errorf("state %s after the uid file was deleted", state)
	}
}

func TestReadonly(t *testing.T) {
	p := newPlant(t)
	ag := p.node("SALLYPORT_NODE_MODE=readonly")
	s := ag.session()
	var res wire.DesiredResult
	call(t, s, "PUT", wire.PathDesired, p.desired(ag, p.gateway, nil), &res)
	if res.Refused != "readonly" || res.State != wire.StateReadonly || content(t, ag.data+".out") != "" {
		t.Errorf("result %+v", res)
	}
	if r := runAction(t, s, p.action(ag, installation, "true"), 0); r.result.State != wire.ActionRefused {
		t.Errorf("read-only node ran an action: %+v", r.result)
	}
}

// TestNotAGateway: an RCP that opens the session itself gets nowhere.
func TestNotAGateway(t *testing.T) {
	p := newPlant(t)
	ag := p.node()
	party, _ := ag.in().id.Party()
	for name, id := range map[string]*identity.Identity{
		"rcp": p.ca.Party(t, wire.RoleRCP), "node": p.ca.Party(t, wire.RoleNode), "gateway of another CA": identitytest.NewCA(t).Party(t, wire.RoleGateway),
	} {
		stream, err := ag.c.Connect(t.Context(), wire.ConnectAuthority(party.ID), nil)
		if err != nil {
			t.Fatal(err)
		}
		s, err := session.Dial(t.Context(), stream, id, party)
		if err == nil {
			req, rerr := http.NewRequestWithContext(t.Context(), "GET", "http://peer"+wire.PathHello, nil)
			if rerr != nil {
				t.Fatal(rerr)
			}
			var res *http.Response
			if res, err = s.RoundTrip(req); err == nil {
				_ = res.Body.Close()
			}
			_ = s.Close()
		}
		if err == nil {
			t.Errorf("a session of a %s was served", name)
		}
	}
}

// TestEnrol: a node without a certificate waits, is granted, and comes back
// with it.
func TestEnrol(t *testing.T) {
	p := newPlant(t)
	data := dataDir(t)
	ag := p.start(p.config(data))
	ag.c = p.channel()
	if !ag.c.Enrolling() {
		t.Fatal("not an enrolment channel")
	}
	key := ag.in().id.KeyHash()
	if err := ag.a.Ready(); err == nil {
		t.Error("ready without a certificate")
	}
	stream, err := ag.c.Connect(t.Context(), wire.PendingAuthority(key), nil)
	if err != nil {
		t.Fatal(err)
	}
	s, err := session.DialEnroll(t.Context(), stream, p.gateway, key)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	var req wire.EnrollRequest
	if st := call(t, s, "GET", wire.PathEnroll, nil, &req); st != 200 || req.Name != "web-1" || req.ID != ag.in().id.ID() {
		t.Fatalf("%d, %+v", st, req)
	}
	chain := p.ca.Issue(t, ag.in().id)
	party := wire.Party{Role: wire.RoleNode, ID: req.ID, TrustDomain: p.ca.TrustDomain}
	call(t, s, "PUT", wire.PathEnroll, wire.EnrollVerdict{State: wire.EnrollGranted, Party: party, Name: "web-7", Chain: chain, Installation: installation}, nil)
	for ag.c.Enrolling() {
		ag.c = p.channel()
	}
	var h wire.Hello
	call(t, ag.session(), "GET", wire.PathHello, nil, &h)
	if h.State != wire.StateRunning || h.Installation != installation {
		t.Errorf("hello %+v", h)
	}
	eventually(t, "ready", func() bool { return ag.a.Ready() == nil })
	if st := ag.a.Status(t.Context()); st.Name != "web-7" || st.State != "running" || len(st.Instances) != 1 {
		t.Errorf("status %+v", st)
	}
	// Revocation cuts the channel, and is shown.
	env := p.ca.Revoke(t, 1, key)
	b, err := json.Marshal(env)
	if err != nil {
		t.Fatal(err)
	}
	put, err := http.NewRequestWithContext(t.Context(), "PUT", "http://peer"+wire.PathRevocations, bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	if res, err := ag.session().RoundTrip(put); err == nil { // the answer may be cut with the channel
		_ = res.Body.Close()
	}
	select {
	case <-ag.c.Done():
	case <-time.After(10 * time.Second):
		t.Error("the channel of a revoked node lives")
	}
	eventually(t, "revoked", func() bool { state, _ := ag.in().state(); return state == wire.StateRevoked })
}

// TestTwoGateways: two worlds in one process share nothing.
func TestTwoGateways(t *testing.T) {
	p, q := newPlant(t), newPlant(t)
	data, codes := dataDir(t), t.TempDir()
	p.certify(data)
	q.certify(data)
	cfg := p.config(data, "SALLYPORT_NODE_JOIN="+codes)
	for name, pl := range map[string]*plant{"p": p, "q": q} {
		if err := os.WriteFile(filepath.Join(codes, name), []byte(pl.code()), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ag := p.start(cfg)
	ag.c = p.channel()
	qc := q.channel()
	if n := len(ag.a.all()); n != 2 {
		t.Fatalf("%d instances", n)
	}
	if ag.c.Peer().Party.TrustDomain != p.ca.TrustDomain || qc.Peer().Party.TrustDomain != q.ca.TrustDomain {
		t.Error("the instances dial each other's gateways")
	}
	receipt, err := ag.a.SendEvent(t.Context(), local.EventRequest{Severity: wire.SeverityMinor, Text: "both"})
	if err != nil || len(receipt.Stored) != 2 {
		t.Errorf("receipt %+v, %v", receipt, err)
	}
	receipt, err = ag.a.SendEvent(t.Context(), local.EventRequest{Severity: wire.SeverityMinor, Text: "one", Instance: q.ca.TrustDomain})
	if err != nil || len(receipt.Stored) != 1 || receipt.Stored[0].Seq != 2 {
		t.Errorf("receipt %+v, %v", receipt, err)
	}
	// One whose disk fails keeps no event from the other.
	first, second := ag.a.all()[0], ag.a.all()[1]
	if err := first.spool.Close(); err != nil {
		t.Fatal(err)
	}
	receipt, err = ag.a.SendEvent(t.Context(), local.EventRequest{Severity: wire.SeverityMinor, Text: "at least one"})
	if err == nil || !strings.Contains(err.Error(), first.td) {
		t.Errorf("an event that one instance refuses: %v", err)
	}
	if len(receipt.Stored) != 1 || receipt.Stored[0].Instance != second.td {
		t.Errorf("receipt %+v, want it stored for %s", receipt, second.td)
	}
}

// TestTwoGatewaysOfOneList: SALLYPORT_NODE_UPSTREAMS holds for all instances. That
// the address of one leads nowhere for another is nothing to mend.
func TestTwoGatewaysOfOneList(t *testing.T) {
	p, q := newPlant(t), newPlant(t)
	data, codes := dataDir(t), t.TempDir()
	p.certify(data)
	q.certify(data)
	ag := p.start(p.config(data, "SALLYPORT_NODE_JOIN="+codes, "SALLYPORT_NODE_UPSTREAMS="+p.addr+";"+q.addr))
	ag.c = p.channel()
	q.channel()
	for _, addr := range []string{p.addr, q.addr} {
		eventually(t, "all is well at "+addr, func() bool {
			var found int
			for _, c := range ag.a.Doctor(t.Context()) {
				if strings.HasSuffix(c.Check, ": upstream "+addr) && c.OK {
					found++
				}
			}
			return found == 2
		})
	}
	lone := ag.a.all()[0].doctor(func(string) string { return "" })
	if !slices.ContainsFunc(lone, func(c local.Check) bool { return !c.OK && strings.HasPrefix(c.Check, "upstream ") && c.Fix != "" }) {
		t.Errorf("nobody else serves the other address, and nothing is wrong: %+v", lone)
	}
}

// TestRemovedRCPOfAJoinCode: an address that nobody but the join code names is said to
// be that, once the gateway's list leads somewhere; it is no failure.
func TestRemovedRCPOfAJoinCode(t *testing.T) {
	p := newPlant(t)
	const gone = "127.0.0.1:1"
	ag := p.node("SALLYPORT_NODE_JOIN=" + p.code(gone))
	find := func() (c local.Check) {
		for _, c = range ag.a.Doctor(t.Context()) {
			if c.Check == "upstream "+gone && strings.Contains(c.Detail, "failed") {
				return c
			}
		}
		return local.Check{}
	}
	eventually(t, "one of the two is there", func() bool { return find().Check != "" && len(ag.in().upstreams.connected()) == 1 })
	if c := find(); c.OK || strings.Contains(c.Detail, "join code") {
		t.Errorf("before the gateway named its RCPs: %+v", c)
	}
	ag.in().takeRCPs(rcps(p.addr))
	if c := find(); !c.OK || !c.Warning || !strings.Contains(c.Detail, "was that RCP removed?") || !strings.Contains(c.Fix, "nothing has to be done") {
		t.Errorf("doctor: %+v", c)
	}
	for _, u := range ag.a.Status(t.Context()).Upstreams {
		if (u.Address == gone) != strings.Contains(u.Error, ofJoinCode) {
			t.Errorf("status: %+v", u)
		}
	}
}

// TestListen: a node that is dialled.
func TestListen(t *testing.T) {
	p := newPlant(t)
	data := dataDir(t)
	p.certify(data)
	ag := p.start(p.config(data, "SALLYPORT_NODE_LISTEN=127.0.0.1:0"))
	addr, _, err := ag.a.Addrs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	d := &channel.Dialer{Addr: addr.String(), Peer: channel.PeerDownstream, Identity: p.gateway, Carrier: channel.CarrierH2, Log: slog.New(slog.DiscardHandler)}
	if ag.c, err = d.Dial(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer ag.c.Close(nil)
	var h wire.Hello
	if st := call(t, ag.session(), "GET", wire.PathHello, nil, &h); st != 200 {
		t.Errorf("status %d", st)
	}
	d = &channel.Dialer{Addr: addr.String(), Peer: channel.PeerDownstream, Identity: p.ca.Party(t, wire.RoleNode), Carrier: channel.CarrierH2, Log: slog.New(slog.DiscardHandler)}
	if c, err := d.Dial(t.Context()); err == nil {
		c.Close(nil)
		t.Error("a node dialled a node as its upstream")
	}
}

// TestListenServesOne: a node that listens takes no code of a second gateway,
// which would keep it from starting the next time.
func TestListenServesOne(t *testing.T) {
	p, q := newPlant(t), newPlant(t)
	data, codes := dataDir(t), t.TempDir()
	write := func(pl *plant) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(codes, pl.ca.TrustDomain), []byte(pl.code()), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(p)
	write(q)
	cfg := p.config(data, "SALLYPORT_NODE_LISTEN=127.0.0.1:0", "SALLYPORT_NODE_JOIN="+codes)
	a, err := New(cfg, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "this one has 2") || !strings.Contains(err.Error(), p.ca.TrustDomain) {
		t.Errorf("two codes: %v", err)
	}
	if err := os.Remove(filepath.Join(codes, q.ca.TrustDomain)); err != nil {
		t.Fatal(err)
	}
	ag := p.start(cfg) // what was refused left nothing that is in the way
	if _, _, err := ag.a.Addrs(t.Context()); err != nil {
		t.Fatal(err)
	}
	refused := (*local.Error)(nil)
	if err := ag.a.Join(t.Context(), q.code()); !errors.As(err, &refused) || refused.Code != local.CodeRefused || !strings.Contains(err.Error(), "SALLYPORT_NODE_LISTEN") {
		t.Errorf("a second gateway's code: %v", err)
	}
	if err := ag.a.Join(t.Context(), p.code()); err != nil {
		t.Errorf("a new code of its own gateway: %v", err)
	}
	write(q)
	found, err := ag.a.domains(cfg.Dir("node"))
	if len(found) != 1 || err == nil || !strings.Contains(err.Error(), "SALLYPORT_NODE_LISTEN") {
		t.Errorf("a second code in the directory gave %v, %v", found, err)
	}
}

// TestBadStart: what cannot work is said at once.
func TestBadStart(t *testing.T) {
	p := newPlant(t)
	cfg := p.config(dataDir(t), "SALLYPORT_NODE_JOIN=sp1.!!!")
	a, err := New(cfg, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Run(t.Context()); !errors.Is(err, wire.ErrJoinCode) {
		t.Errorf("malformed join code: %v", err)
	}
	code, err := wire.JoinCode{TrustDomain: p.ca.TrustDomain, Root: wire.KeyOf(p.ca.Root), Role: wire.RoleRCP, TokenID: string(wire.NewID()), Token: "secret"}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if a, err = New(p.config(dataDir(t), "SALLYPORT_NODE_JOIN="+code), slog.New(slog.DiscardHandler), prometheus.NewRegistry()); err != nil {
		t.Fatal(err)
	}
	if err := a.Run(t.Context()); !errors.Is(err, wire.ErrJoinRole) {
		t.Errorf("a code for an RCP: %v", err)
	}
	ag := p.node()
	b, err := New(p.config(ag.data), slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("second start: %v", err)
	}
	if _, err := net.Dial("unix", filepath.Join(ag.data, "node", "local.sock")); err != nil {
		t.Errorf("the second start broke the first: %v", err)
	}
}
