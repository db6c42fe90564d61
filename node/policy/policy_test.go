package policy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"sallyport/internal/wire"
	"sallyport/node/proc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// host is a directory that policies may write to, and an engine on it.
type host struct {
	t      *testing.T
	cfg    Config
	etc    string
	e      *Engine
	mu     sync.Mutex
	events []wire.Event
	ran    []string
	run    func(ctx context.Context, command []string) (Output, error)
}

func newHost(t *testing.T) *host {
	t.Helper()
	etc, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, etc: etc}
	h.cfg = Config{
		Dir: filepath.Join(t.TempDir(), "policies"), Instance: "a.test", Bounds: Bounds{Allow: proc.Allow{etc + "/**"}},
		Commands: proc.Allow{"*"}, Claims: &Claims{}, Log: slog.New(slog.DiscardHandler),
		Raise: func(e wire.Event) error {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.events = append(h.events, e)
			return e.Validate()
		},
		Run: func(ctx context.Context, command []string, _ int) (Output, error) {
			h.mu.Lock()
			h.ran = append(h.ran, strings.Join(command, " "))
			run := h.run
			h.mu.Unlock()
			if run == nil {
				return Output{}, nil
			}
			return run(ctx, command)
		},
	}
	h.open()
	return h
}

func (h *host) open() {
	h.t.Helper()
	var err error
	if h.e, err = Open(h.cfg); err != nil {
		h.t.Fatal(err)
	}
}

// script makes commands fail: the program's name to its exit status.
func (h *host) script(codes map[string]int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.run = func(_ context.Context, c []string) (Output, error) {
		return Output{Exit: proc.Exit{Code: codes[filepath.Base(c[0])]}, Stdout: "said " + c[0]}, nil
	}
}

type doc struct {
	name, typ string
	spec      any
}

func (h *host) apply(docs ...doc) map[string]wire.PolicyStatus {
	h.t.Helper()
	var policies []wire.Policy
	specs := map[string]json.RawMessage{}
	for _, d := range docs {
		raw, err := json.Marshal(d.spec)
		if err != nil {
			h.t.Fatal(err)
		}
		digest := wire.SpecDigest(raw)
		specs[digest] = raw
		policies = append(policies, wire.Policy{Name: d.name, Type: d.typ, Digest: digest})
	}
	out := map[string]wire.PolicyStatus{}
	for _, st := range h.e.Apply(h.t.Context(), policies, specs) {
		out[st.Name] = st
	}
	return out
}

func (h *host) files(name string, spec wire.FilesSpec) doc { return doc{name, wire.PolicyFiles, spec} }

func (h *host) file(path, content string) wire.FileSpec {
	return wire.FileSpec{Path: filepath.Join(h.etc, path), Content: content}
}

func (h *host) write(path, content string, mode fs.FileMode) {
	h.t.Helper()
	if err := os.WriteFile(filepath.Join(h.etc, path), []byte(content), mode); err != nil {
		h.t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(h.etc, path), mode); err != nil {
		h.t.Fatal(err)
	}
}

// want compares the whole tree: path → "mode content".
func (h *host) want(tree map[string]string) {
	h.t.Helper()
	got := map[string]string{}
	err := filepath.WalkDir(h.etc, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == h.etc {
			return err
		}
		rel, _ := filepath.Rel(h.etc, p)
		fi, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			got[rel] = "dir"
		case d.Type() == fs.ModeSymlink:
			target, err := os.Readlink(p)
			got[rel] = "-> " + target
			return err
		default:
			b, err := os.ReadFile(p)
			got[rel] = fmt.Sprintf("%o %s", fi.Mode().Perm(), b)
			return err
		}
		return nil
	})
	if err != nil {
		h.t.Fatal(err)
	}
	if fmt.Sprint(got) != fmt.Sprint(tree) {
		h.t.Errorf("tree is  %v\nwant     %v", got, tree)
	}
}

func state(t *testing.T, st wire.PolicyStatus, want, errPart string) {
	t.Helper()
	if st.State != want || !strings.Contains(st.Error, errPart) || (want == wire.PolicyApplied) != (st.Error == "") {
		t.Errorf("policy %s is %s (%s), want %s (%s)", st.Name, st.State, st.Error, want, errPart)
	}
}

func TestFilesApplyAndRestore(t *testing.T) {
	h := newHost(t)
	h.write("app.conf", "old", 0o600)
	if err := os.Symlink("app.conf", filepath.Join(h.etc, "link")); err != nil {
		t.Fatal(err)
	}
	spec := wire.FilesSpec{Files: []wire.FileSpec{h.file("app.conf", "new"), h.file("link", "x"), {Path: h.etc + "/sub/dir/a", Content: "deep", Mode: "0640"}},
		Validate: []string{"/bin/true", "v"}, Reload: []string{"/bin/true", "r"}}
	state(t, h.apply(h.files("app", spec))["app"], wire.PolicyApplied, "")
	h.want(map[string]string{"app.conf": "644 new", "link": "644 x", "sub": "dir", "sub/dir": "dir", "sub/dir/a": "640 deep"})
	if got := strings.Join(h.ran, ","); got != "/bin/true v,/bin/true r" {
		t.Errorf("ran %s", got)
	}
	// The same again changes nothing and runs nothing.
	h.apply(h.files("app", spec))
	if len(h.ran) != 2 {
		t.Errorf("ran %v", h.ran)
	}
	// Drift is repaired, in a later life too.
	h.write("app.conf", "edited", 0o666)
	h.open()
	h.apply(h.files("app", spec))
	h.want(map[string]string{"app.conf": "644 new", "link": "644 x", "sub": "dir", "sub/dir": "dir", "sub/dir/a": "640 deep"})
	// A new version drops a path and takes another.
	spec2 := wire.FilesSpec{Files: []wire.FileSpec{h.file("app.conf", "newer"), h.file("b", "b")}}
	state(t, h.apply(h.files("app", spec2))["app"], wire.PolicyApplied, "")
	h.want(map[string]string{"app.conf": "644 newer", "link": "-> app.conf", "b": "644 b"})
	// Another policy takes over; then all go.
	state(t, h.apply(h.files("other", spec2))["other"], wire.PolicyApplied, "")
	h.open()
	if st := h.apply(); len(st) != 0 {
		t.Errorf("left %v", st)
	}
	h.want(map[string]string{"app.conf": "600 old", "link": "-> app.conf"})
}

func TestFilesAllOrNone(t *testing.T) {
	h := newHost(t)
	h.write("a", "old a", 0o644)
	good := wire.FilesSpec{Files: []wire.FileSpec{h.file("a", "good a"), h.file("b", "good b")}, Reload: []string{"/bin/true"}}
	state(t, h.apply(h.files("p", good))["p"], wire.PolicyApplied, "")
	for name, c := range map[string]struct {
		spec  wire.FilesSpec
		codes map[string]int
		err   string
	}{
		"validate":                 {wire.FilesSpec{Files: []wire.FileSpec{h.file("a", "bad"), h.file("c", "bad")}, Validate: []string{"/bin/false"}}, map[string]int{"false": 1}, "validate command /bin/false failed with exit status 1: said /bin/false"},
		"reload":                   {wire.FilesSpec{Files: []wire.FileSpec{h.file("a", "bad")}, Reload: []string{"/bin/false"}}, map[string]int{"false": 7}, "reload command"},
		"a directory stands there": {wire.FilesSpec{Files: []wire.FileSpec{h.file("a", "bad"), {Path: h.etc, Content: "x"}}}, nil, "ALLOW_PATHS"},
	} {
		t.Run(name, func(t *testing.T) {
			h.script(c.codes)
			state(t, h.apply(h.files("p", c.spec))["p"], wire.PolicyFailed, c.err)
			h.want(map[string]string{"a": "644 good a", "b": "644 good b"})
		})
	}
	if n := len(h.events); n == 0 || h.events[n-1].Key != "policy-failed/p" || h.events[n-1].Severity != wire.SeverityMajor {
		t.Errorf("events %+v", h.events)
	}
	h.script(nil)
	h.apply(h.files("p", good))
	if last := h.events[len(h.events)-1]; last.Severity != wire.SeverityNormal || last.Key != "policy-failed/p" {
		t.Errorf("last event %+v", last)
	}
	h.apply()
	h.want(map[string]string{"a": "644 old a"})
}

// TestFilesCrash: the process dies inside the validate command.
func TestFilesCrash(t *testing.T) {
	h := newHost(t)
	h.write("a", "old", 0o644)
	copied := filepath.Join(t.TempDir(), "policies")
	h.run = func(context.Context, []string) (Output, error) {
		return Output{}, os.CopyFS(copied, os.DirFS(h.cfg.Dir)) // what a kill -9 would leave
	}
	h.apply(h.files("p", wire.FilesSpec{Files: []wire.FileSpec{h.file("a", "new"), h.file("b", "new")}, Validate: []string{"/bin/true"}}))
	h.want(map[string]string{"a": "644 new", "b": "644 new"})
	h.cfg.Dir, h.run = copied, nil
	h.open()
	h.want(map[string]string{"a": "644 old"})
	if len(h.e.originals.have) != 0 {
		t.Errorf("kept %v", h.e.originals.have)
	}
}

func TestFilesBounds(t *testing.T) {
	h := newHost(t)
	outside := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(h.etc, "out")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/nowhere/at/all", filepath.Join(h.etc, "dangling")); err != nil {
		t.Fatal(err)
	}
	h.cfg.Bounds.Forbidden = []string{h.etc + "/data"}
	h.open()
	for name, path := range map[string]string{
		"SALLYPORT_NODE_ALLOW_PATHS": outside + "/x",
		"is not in":                  h.etc + "/out/x",
		"data directory":             h.etc + "/data/node/uid",
		"leads nowhere":              h.etc + "/dangling/x",
		"clean path":                 h.etc + "/../x",
	} {
		st := h.apply(h.files("p", wire.FilesSpec{Files: []wire.FileSpec{{Path: path, Content: "x"}}}))
		state(t, st["p"], wire.PolicyFailed, name)
	}
	h.cfg.Bounds.Allow = proc.Allow{"*"}
	h.open()
	for _, path := range []string{"/proc/self/x", "/sys/x", "/dev/x", "/dev/shm/x"} {
		st := h.apply(h.files("p", wire.FilesSpec{Files: []wire.FileSpec{{Path: path, Content: "x"}}}))
		state(t, st["p"], wire.PolicyFailed, "lies in /")
	}
	if entries, err := os.ReadDir(outside); err != nil || len(entries) != 0 {
		t.Errorf("written outside: %v, %v", entries, err)
	}
	h.cfg.Commands = proc.Allow{"/usr/bin/nothing"}
	h.open()
	st := h.apply(h.files("p", wire.FilesSpec{Files: []wire.FileSpec{h.file("a", "x")}, Reload: []string{"/bin/sh"}}))
	state(t, st["p"], wire.PolicyFailed, commandsVariable)
	h.want(map[string]string{"out": "-> " + outside, "dangling": "-> /nowhere/at/all"})
}

// TestPlaceFollowsNoLink: a directory on the way that is exchanged for a link
// after the check does not lead anywhere.
func TestPlaceFollowsNoLink(t *testing.T) {
	h := newHost(t)
	outside := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(h.etc, "dir")); err != nil {
		t.Fatal(err)
	}
	if _, err := write(snapshot{Path: h.etc + "/dir/x", Kind: kindFile, Mode: 0o644}); err == nil {
		t.Error("a link on the way was followed")
	}
	if entries, err := os.ReadDir(outside); err != nil || len(entries) != 0 {
		t.Errorf("written outside: %v, %v", entries, err)
	}
}

func TestConflicts(t *testing.T) {
	h := newHost(t)
	one := wire.FilesSpec{Files: []wire.FileSpec{h.file("a", "1"), h.file("x", "1")}}
	two := wire.FilesSpec{Files: []wire.FileSpec{h.file("a", "2")}}
	st := h.apply(h.files("one", one), h.files("two", two), h.files("three", wire.FilesSpec{Files: []wire.FileSpec{h.file("c", "3")}}))
	state(t, st["one"], wire.PolicyFailed, "claimed by the policies one and two")
	state(t, st["two"], wire.PolicyFailed, "claimed by the policies one and two")
	state(t, st["three"], wire.PolicyApplied, "")
	h.want(map[string]string{"c": "644 3"})
	// Another gateway's instance cannot take what this one owns.
	other := newHost(t)
	other.cfg.Instance, other.cfg.Claims, other.cfg.Bounds = "b.test", h.cfg.Claims, h.cfg.Bounds
	other.open()
	grab := doc{"grab", wire.PolicyFiles, wire.FilesSpec{Files: []wire.FileSpec{h.file("c", "stolen")}}}
	state(t, other.apply(grab)["grab"], wire.PolicyFailed, "belongs to a policy of another gateway (a.test)")
	h.apply()
	state(t, other.apply(grab)["grab"], wire.PolicyApplied, "")
	h.want(map[string]string{"c": "644 stolen"})
}

// TestRetry: a policy that fails for a week is tried again, ever more rarely,
// and heals by itself.
func TestRetry(t *testing.T) {
	h := newHost(t)
	synctest.Test(t, func(t *testing.T) {
		h.t = t
		changed := 0
		h.cfg.Changed = func() { changed++ }
		h.open()
		h.script(map[string]int{"false": 1})
		state(t, h.apply(h.files("p", wire.FilesSpec{Files: []wire.FileSpec{h.file("a", "1")}, Validate: []string{"/bin/false"}}))["p"], wire.PolicyFailed, "validate")
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- h.e.Run(ctx) }()
		time.Sleep(7 * 24 * time.Hour)
		synctest.Wait()
		h.mu.Lock()
		tries := len(h.ran)
		events := len(h.events)
		h.mu.Unlock()
		if tries < 1000 || tries > 2500 {
			t.Errorf("%d tries in a week", tries)
		}
		if events != 1 {
			t.Errorf("%d events for one failure", events)
		}
		h.script(nil)
		time.Sleep(2 * lastRetry)
		synctest.Wait()
		state(t, h.e.Statuses()[0], wire.PolicyApplied, "")
		cancel()
		if err := <-done; err != nil || changed == 0 {
			t.Errorf("run: %v, changed %d", err, changed)
		}
	})
}

func TestCheckEvents(t *testing.T) {
	h := newHost(t)
	synctest.Test(t, func(t *testing.T) {
		h.t = t
		h.open()
		out := Output{Stdout: "DISK OK | /=5%;10;20\nlong\n"}
		var hang bool
		var mu sync.Mutex
		set := func(code int, text string, hanging bool) {
			mu.Lock()
			defer mu.Unlock()
			out, hang = Output{Exit: proc.Exit{Code: code}, Stdout: text}, hanging
		}
		h.run = func(ctx context.Context, _ []string) (Output, error) {
			mu.Lock()
			o, hanging := out, hang
			mu.Unlock()
			if hanging {
				<-ctx.Done()
				return Output{Exit: proc.Exit{Code: 143, Signal: 15}}, nil
			}
			return o, nil
		}
		spec := doc{"disk", wire.PolicyCheck, wire.CheckSpec{Command: []string{"/bin/true"}, Interval: wire.Duration(30 * time.Second), Timeout: wire.Duration(10 * time.Second)}}
		start := func() (stop func()) {
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- h.e.Run(ctx) }()
			return func() {
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
		}
		expect := func(step string, severities ...wire.Severity) {
			t.Helper()
			time.Sleep(2 * time.Minute)
			synctest.Wait()
			h.mu.Lock()
			defer h.mu.Unlock()
			got := []wire.Severity{}
			for _, e := range h.events {
				if e.Key != "check/disk" || e.Instance != "disk" {
					t.Errorf("event %+v", e)
				}
				got = append(got, e.Severity)
			}
			if fmt.Sprint(got) != fmt.Sprint(severities) {
				t.Errorf("%s: events %v, want %v", step, got, severities)
			}
			h.events = nil
		}
		state(t, h.apply(spec)["disk"], wire.PolicyApplied, "")
		stop := start()
		expect("well from the start")
		if r := h.e.Checks(); len(r) != 1 || r[0].State != CheckOK || r[0].Text != "DISK OK" || len(r[0].Perf) != 1 || r[0].Perf[0].Value != 5 {
			t.Errorf("result %+v", r)
		}
		set(1, "low", false)
		expect("warning", wire.SeverityWarning)
		set(2, "full", false)
		expect("critical", wire.SeverityCritical)
		stop()
		h.open() // a restart repeats nothing
		stop = start()
		expect("restart")
		set(0, "", true)
		expect("hangs", wire.SeverityMinor)
		set(99, "what", false)
		expect("breaks the contract: still unknown")
		set(0, "fine", false)
		expect("good", wire.SeverityNormal)
		set(2, "full", false)
		expect("critical", wire.SeverityCritical)
		h.apply()
		expect("removed while critical", wire.SeverityNormal)
		stop()
	})
}

// TestCheckProcess runs a real plugin: its group dies with the timeout, it
// sees no secret, and its output is bounded.
func TestCheckProcess(t *testing.T) {
	t.Setenv("SALLYPORT_NODE_JOIN", "secret")
	h := newHost(t)
	h.cfg.Run = nil
	h.open()
	once := func(script string, timeout time.Duration) CheckResult {
		c := &check{e: h.e, name: "c", spec: wire.CheckSpec{Command: []string{"/bin/sh", "-c", script}, Timeout: wire.Duration(timeout)}}
		return c.once(t.Context())
	}
	if r := once(`echo "join=$SALLYPORT_NODE_JOIN | 'a b'=1s;2;3"; exit 1`, time.Minute); r.State != CheckWarning || r.Text != "join=" || len(r.Perf) != 1 || r.Perf[0].Label != "a b" {
		t.Errorf("result %+v", r)
	}
	if r := once(`sleep 100 & wait`, 200*time.Millisecond); r.State != CheckUnknown || !strings.Contains(r.Text, "did not end within") {
		t.Errorf("result %+v", r)
	}
	if r := once(`head -c 1000000 /dev/zero | tr '\0' x; exit 0`, time.Minute); r.State != CheckOK || len(r.Text) != maxCheckText {
		t.Errorf("result with %d bytes", len(r.Text))
	}
	if r := once(`kill -9 $$`, time.Minute); r.State != CheckUnknown || !strings.Contains(r.Text, "signal 9") {
		t.Errorf("result %+v", r)
	}
}

func TestUnknownType(t *testing.T) {
	h := newHost(t)
	state(t, h.apply(doc{"p", "logfile", map[string]string{}})["p"], wire.PolicyFailed, `"logfile" is not known`)
	state(t, h.apply(doc{"p", wire.PolicyCheck, map[string]any{"command": []string{"/bin/true"}, "retries": 3}})["p"], wire.PolicyFailed, "retries")
	if _, err := (Bounds{}).Resolve("/etc/x"); !errors.Is(err, ErrBounds) {
		t.Errorf("no bounds at all: %v", err)
	}
}
