package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/wire"
	"sallyport/node/proc"
)

// action makes a signed action.
func (p *plant) action(ag *agent, uid string, command ...string) wire.Envelope {
	p.t.Helper()
	return p.signAction(wire.Action{ID: wire.NewID(), Node: ag.in().id.ID(), Installation: uid, Command: command, Issued: time.Now(), TTL: time.Minute})
}

func (p *plant) signAction(a wire.Action) wire.Envelope {
	p.t.Helper()
	env, err := p.gateway.Sign(wire.TypeAction, a)
	if err != nil {
		p.t.Fatal(err)
	}
	return env
}

type outcome struct {
	stdout, stderr string
	frames         int
	first          int64
	result         wire.ActionResult
	status         int
}

// runAction posts an action and reads its frames to the end.
func runAction(t *testing.T, rt http.RoundTripper, env wire.Envelope, after int64) (o outcome) {
	t.Helper()
	b, err := json.Marshal(env)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "POST", fmt.Sprintf("http://peer%s?after=%d", wire.PathActions, after), bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	res, err := rt.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	o.status = res.StatusCode
	if res.StatusCode != 200 {
		return o
	}
	lines := wire.NewLineReader(res.Body, wire.MaxFrameLine)
	for {
		var f wire.ActionFrame
		if err := lines.Next(&f); err != nil {
			t.Fatalf("frame: %v", err)
		}
		if o.frames == 0 {
			o.first = f.N
		}
		o.frames++
		switch {
		case f.Result != nil:
			o.result = *f.Result
			return o
		case f.Stream == "stdout":
			o.stdout += string(f.Data)
		case f.Stream == "stderr":
			o.stderr += string(f.Data)
		}
		if len(f.Data) > maxFrameData {
			t.Errorf("frame of %d bytes", len(f.Data))
		}
	}
}

func TestAction(t *testing.T) {
	p := newPlant(t)
	ag := p.node()
	s := ag.session()
	env := p.action(ag, installation, "sh", "-c", "echo out; echo err >&2; exit 3")
	o := runAction(t, s, env, 0)
	if o.stdout != "out\n" || o.stderr != "err\n" || o.result.State != wire.ActionFailed || o.result.ExitCode != 3 || o.result.Started.IsZero() {
		t.Errorf("outcome %+v", o)
	}
	// The same again attaches: nothing runs twice, what arrived is left out.
	again := runAction(t, s, env, 1)
	if again.first != 2 || again.result != o.result || again.frames != o.frames-1 {
		t.Errorf("retry %+v", again)
	}
	o = runAction(t, s, p.action(ag, installation, "sh", "-c", "kill -9 $$"), 0)
	if o.result.ExitCode != 137 || o.result.Signal != 9 {
		t.Errorf("signal: %+v", o.result)
	}
	o = runAction(t, s, p.action(ag, installation, "no-such-program"), 0)
	if o.result.ExitCode != 127 || o.result.State != wire.ActionFailed || !o.result.Started.IsZero() {
		t.Errorf("missing program: %+v", o.result)
	}
	for name, a := range map[string]wire.Action{
		"another node": {ID: wire.NewID(), Node: wire.NewID(), Installation: installation, Command: []string{"true"}},
		"no id":        {Node: ag.in().id.ID(), Installation: installation, Command: []string{"true"}},
		"path as id":   {ID: "../../x", Node: ag.in().id.ID(), Installation: installation, Command: []string{"true"}},
		"no command":   {ID: wire.NewID(), Node: ag.in().id.ID(), Installation: installation},
	} {
		if o := runAction(t, s, p.signAction(a), 0); o.result.State != wire.ActionRefused || o.result.Reason == "" {
			t.Errorf("%s: %+v", name, o.result)
		}
	}
	forged, err := p.ca.Party(t, wire.RoleRCP).Sign(wire.TypeAction, wire.Action{ID: wire.NewID(), Node: ag.in().id.ID(), Installation: installation, Command: []string{"true"}})
	if err != nil {
		t.Fatal(err)
	}
	if o := runAction(t, s, forged, 0); o.result.State != wire.ActionRefused {
		t.Errorf("signed by an RCP: %+v", o.result)
	}
}

// A run that writes nothing says that it goes on, and its frames are numbered
// as if it had not.
func TestSilentRunSaysThatItGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		frames, err := os.Create(filepath.Join(dir, fileFrames))
		if err != nil {
			t.Fatal(err)
		}
		r := &run{dir: dir, limit: maxRunOutput, frames: frames}
		out, in := io.Pipe()
		go func() { _ = in.CloseWithError(r.replay(t.Context(), 0, in, func() {})) }()
		lines := wire.NewLineReader(out, wire.MaxFrameLine)
		next := func() (f wire.ActionFrame) {
			t.Helper()
			if err := lines.Next(&f); err != nil {
				t.Fatal(err)
			}
			return f
		}
		began := time.Now()
		for i := range 3 {
			if f := next(); f.N != 0 || f.Stream != "" || f.Result != nil || time.Since(began) != time.Duration(i+1)*wire.ActionAlive {
				t.Fatalf("frame %+v after %v", f, time.Since(began))
			}
		}
		if err := r.write("stdout", []byte("x")); err != nil {
			t.Fatal(err)
		}
		if f := next(); f.N != 1 || string(f.Data) != "x" {
			t.Fatalf("frame %+v", f)
		}
		r.end(wire.ActionResult{State: wire.ActionSucceeded})
		if f := next(); f.N != 2 || f.Result == nil {
			t.Fatalf("frame %+v", f)
		}
	})
}

// TestActionOutlivesSession: the gateway goes, the run goes on, and a later
// session collects it.
func TestActionOutlivesSession(t *testing.T) {
	p := newPlant(t)
	ag := p.node()
	flag := filepath.Join(t.TempDir(), "go")
	act := wire.Action{ID: wire.NewID(), Node: ag.in().id.ID(), Installation: installation, TTL: time.Minute,
		Command: []string{"sh", "-c", "echo one; while [ ! -e " + flag + " ]; do sleep 0.02; done; echo two"}}
	s := ag.session()
	b, err := json.Marshal(p.signAction(act))
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), "POST", "http://peer"+wire.PathActions, bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	res, err := s.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	var f wire.ActionFrame
	if err := wire.NewLineReader(res.Body, wire.MaxFrameLine).Next(&f); err != nil || string(f.Data) != "one\n" {
		t.Fatalf("%+v, %v", f, err)
	}
	_ = res.Body.Close()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(flag, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the result waits", func() bool { return ag.in().actions.uncollected() })
	o := runAction(t, ag.session(), p.signAction(act), f.N)
	if o.stdout != "two\n" || o.result.State != wire.ActionSucceeded {
		t.Errorf("outcome %+v", o)
	}
	eventually(t, "it is collected", func() bool { return !ag.in().actions.uncollected() })
}

func TestActionLimits(t *testing.T) {
	p := newPlant(t)
	ag := p.node()
	s := ag.session()
	act := func(command ...string) wire.Action {
		return wire.Action{ID: wire.NewID(), Node: ag.in().id.ID(), Installation: installation, TTL: time.Minute, Command: command}
	}
	a := act("sleep", "1000")
	a.Timeout = 100 * time.Millisecond
	if o := runAction(t, s, p.signAction(a), 0); o.result.State != wire.ActionTimedOut {
		t.Errorf("timeout: %+v", o.result)
	}
	a = act("sh", "-c", "sleep 1000 & echo up; wait")
	done := make(chan outcome)
	go func() { done <- runAction(t, ag.session(), p.signAction(a), 0) }()
	eventually(t, "it runs", func() bool { return ag.in().actions.knows(a.ID) })
	if st := call(t, s, "DELETE", wire.PathActionID+string(a.ID), nil, nil); st != 204 {
		t.Errorf("cancel: %d", st)
	}
	if o := <-done; o.result.State != wire.ActionCancelled {
		t.Errorf("cancel: %+v", o.result)
	}
	if st := call(t, s, "DELETE", wire.PathActionID+string(wire.NewID()), nil, nil); st != 404 {
		t.Errorf("cancel of an unknown action: %d", st)
	}
	ag.in().actions.limit = 100_000
	o := runAction(t, s, p.signAction(act("sh", "-c", "head -c 300000 /dev/zero | tr '\\0' x; echo end >&2")), 0)
	if len(o.stdout) != 100_000 || !o.result.Truncated || o.result.State != wire.ActionSucceeded {
		t.Errorf("%d bytes, %+v", len(o.stdout), o.result)
	}
	ag = ag.restart("SALLYPORT_NODE_ALLOW_COMMANDS=none")
	if o := runAction(t, ag.session(), p.action(ag, installation, "true"), 0); o.result.State != wire.ActionRefused || !strings.Contains(o.result.Reason, "SALLYPORT_NODE_ALLOW_COMMANDS") {
		t.Errorf("nothing is allowed: %+v", o.result)
	}
	ag = ag.restart("SALLYPORT_NODE_ALLOW_COMMANDS=/usr/bin/true")
	if o := runAction(t, ag.session(), p.action(ag, installation, "sh", "-c", "exit 0"), 0); o.result.State != wire.ActionRefused {
		t.Errorf("another program is allowed: %+v", o.result)
	}
}

// TestActionCrash: a run that a crash cut off is lost, and never repeated.
func TestActionCrash(t *testing.T) {
	dir := t.TempDir()
	open := func() *actions {
		t.Helper()
		a, err := openActions(dir, proc.Allow{"*"}, slog.New(slog.DiscardHandler), func() {})
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	a := open()
	act := wire.Action{ID: wire.NewID(), Command: []string{"true"}}
	r, err := a.create(act)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.write("stdout", []byte("half")); err != nil {
		t.Fatal(err)
	}
	if _, err := r.frames.WriteAt([]byte(`{"n":2,"da`), r.size); err != nil { // torn
		t.Fatal(err)
	}
	_ = r.frames.Close()
	if err := os.Mkdir(filepath.Join(dir, string(wire.NewID())), 0o700); err != nil { // before action.json
		t.Fatal(err)
	}
	for range 2 {
		a = open()
		if err := a.clear(time.Now()); err != nil { // as at each start: no gateway has read it yet
			t.Fatal(err)
		}
		if len(a.runs) != 1 {
			t.Fatalf("%d runs", len(a.runs))
		}
		again, res, err := a.begin(act, false)
		if err != nil || res != nil || again == nil || again.result.State != wire.ActionLost {
			t.Fatalf("%+v, %+v, %v", again, res, err)
		}
		var out bytes.Buffer
		if err := again.replay(t.Context(), 0, &out, func() {}); err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(out.String(), "\n"); n != 2 || !strings.Contains(out.String(), `"n":2,"result"`) {
			t.Errorf("replay %s", out.String())
		}
	}
	if err := a.clear(time.Now().Add(keepUncollected + time.Hour)); err != nil {
		t.Fatal(err)
	}
	a = open()
	if r, res, err := a.begin(act, false); r != nil || err != nil || res.State != wire.ActionLost {
		t.Errorf("a discarded run: %+v, %+v, %v", r, res, err)
	}
}

// TestActionCancelledInTime: an action that was cancelled before its turn came
// does not start, also when a slot is free at that moment.
func TestActionCancelledInTime(t *testing.T) {
	a, err := openActions(t.TempDir(), proc.Allow{"*"}, slog.New(slog.DiscardHandler), func() {})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errCancelled)
	for range 50 { // select takes either at random
		r, err := a.create(wire.Action{ID: wire.NewID(), Command: []string{"/bin/true"}, TTL: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		a.attend(ctx, r, "/bin/true", time.Now())
		if r.result.State != wire.ActionCancelled || !r.result.Started.IsZero() {
			t.Fatalf("it was started: %+v", r.result)
		}
	}
	again, err := openActions(a.dir, proc.Allow{"*"}, slog.New(slog.DiscardHandler), func() {})
	if err != nil {
		t.Fatal(err)
	}
	if err := again.clear(time.Now()); err != nil || len(again.runs) != 50 {
		t.Errorf("after a restart %d of 50 results are left, %v", len(again.runs), err)
	}
}

func TestActionQueue(t *testing.T) {
	a, err := openActions(t.TempDir(), proc.Allow{"*"}, slog.New(slog.DiscardHandler), func() {})
	if err != nil {
		t.Fatal(err)
	}
	a.slots = make(chan struct{}, 1)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- a.Run(ctx) }()
	eventually(t, "it accepts", func() bool { a.mu.Lock(); defer a.mu.Unlock(); return a.base != nil })
	begin := func(ttl time.Duration, command ...string) (*run, *wire.ActionResult) {
		t.Helper()
		r, res, err := a.begin(wire.Action{ID: wire.NewID(), Command: command, TTL: ttl}, false)
		if err != nil {
			t.Fatal(err)
		}
		return r, res
	}
	long, _ := begin(time.Minute, "sleep", "1000")
	eventually(t, "it runs", func() bool { return len(a.slots) == 1 })
	if _, res := begin(0, "true"); res == nil || res.State != wire.ActionExpired {
		t.Errorf("without time to wait: %+v", res)
	}
	ended := func(r *run) string {
		t.Helper()
		eventually(t, "it ends", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return r.result != nil })
		return r.result.State
	}
	short, _ := begin(time.Second, "true")
	queued, _ := begin(time.Minute, "true")
	if err := a.stop(queued.action.ID); err != nil {
		t.Fatal(err)
	}
	if got := ended(queued); got != wire.ActionCancelled {
		t.Errorf("cancelled in the queue: %s", got)
	}
	if got := ended(short); got != wire.ActionExpired {
		t.Errorf("time to live over: %s", got)
	}
	if _, _, err := a.begin(wire.Action{ID: wire.NewID(), Command: []string{"true"}}, true); !errors.Is(err, errNoRun) {
		t.Errorf("attach to nothing: %v", err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got := ended(long); got != wire.ActionLost {
		t.Errorf("the agent stopped: %s", got)
	}
}
