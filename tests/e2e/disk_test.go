package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/tests/harness"
)

// volume is a small disk of its own under a role's data directory.
type volume struct {
	t   *testing.T
	dir string
}

// mount makes a disk of some MiB at dir. Roles must be started after it, so
// that they end before it goes away.
func mount(t *testing.T, dir string, mib int) volume {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("sallyport-test", dir, "tmpfs", 0, fmt.Sprintf("size=%dm,mode=0755", mib)); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("mount a small disk: %v (CI runs this test as root)", err)
		}
		t.Skipf("mount a small disk: %v (run as root)", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return volume{t, dir}
}

func (v volume) filler() string { return filepath.Join(v.dir, "filler") }

// fill takes all the room that is left.
func (v volume) fill() {
	v.t.Helper()
	f, err := os.OpenFile(v.filler(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		v.t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	for size := 64 << 10; size > 0; {
		_, err := f.Write(make([]byte, size))
		switch {
		case errors.Is(err, syscall.ENOSPC):
			size /= 2
		case err != nil:
			v.t.Fatal(err)
		}
	}
}

// free gives the room back.
func (v volume) free() {
	v.t.Helper()
	if err := os.Remove(v.filler()); err != nil {
		v.t.Fatal(err)
	}
}

func (v volume) remount(flags uintptr) {
	v.t.Helper()
	if err := unix.Mount("", v.dir, "", unix.MS_REMOUNT|flags, ""); err != nil {
		v.t.Fatal(err)
	}
}

// large makes a text that finds no room in the last page of a file.
func large(text string) string { return text + strings.Repeat(".", 24<<10) }

// emit sends an event and reports whether the node took it.
func emit(node *harness.Node, text string) harness.Result {
	return node.Local("event", "send", "--severity", "minor", text)
}

// explains fails the test unless a failure says all of it.
func explains(t *testing.T, what, text string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(text, w) {
			t.Errorf("%s: the error does not say %q: %s", what, w, text)
		}
	}
	if strings.Contains(text, "panic") || strings.Contains(text, "goroutine ") {
		t.Errorf("%s: it crashed: %s", what, text)
	}
}

// works is an error unless actions and events of the node work.
func works(t *testing.T, gateway *harness.Gateway, node *harness.Node, text string) {
	t.Helper()
	r := gateway.Run("action", "run", "--node", node.Name, "--", "echo", text).Exits(0)
	if !strings.Contains(r.Stdout, text) {
		t.Errorf("no output of the action at %s: %v", node.Name, r)
	}
	emit(node, text).Exits(0)
	harness.Eventually(t, 10*time.Second, text+" arrives", func() error { return gateway.HasEvent(text) })
}

// noEvent fails the test if the gateway has an event that was refused.
func noEvent(t *testing.T, gateway *harness.Gateway, text string) {
	t.Helper()
	events, err := gateway.Events("--limit", "0")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range events {
		if e.Text == text {
			t.Errorf("the event was refused and arrived nevertheless: %.60s", text)
		}
	}
}

// TestFullNode: a node without room takes no event that it cannot keep, says
// so, and goes on by itself when there is room. Its neighbour notices nothing.
func TestFullNode(t *testing.T) {
	harness.Long(t)
	site := harness.New(t)
	disk := mount(t, site.Path("web-1"), 8)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1")
	node, neighbour := site.Node(gateway, "web-1", tagged("web-1")), site.Node(gateway, "web-2")
	node.WaitRunning(10 * time.Second)
	neighbour.WaitRunning(10 * time.Second)
	works(t, gateway, node, "before")
	pid := node.PID()

	disk.fill()
	refused := large("refused ")
	r := emit(node, refused)
	if r.Code == 0 {
		t.Fatalf("the node took an event for which it has no room: %v", r)
	}
	explains(t, "local event send", r.Stderr, "no space left", "free some space")
	works(t, gateway, neighbour, "neighbour of a full disk")
	a := gateway.Run("action", "run", "--node", "web-1", "--", "touch", site.Path("touched")).Exits(125)
	explains(t, "action run", a.Stdout+a.Stderr, "no space left", "free some space")
	if _, err := os.Stat(site.Path("touched")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an action that was not begun ran: %v", err)
	}
	gateway.Apply(documents("motd", "name=web-1", site.Path("files/motd"), large("full "))).Exits(0)
	harness.Eventually(t, 10*time.Second, "the operator sees why the policy is not applied", func() error {
		n, err := gateway.Node("web-1")
		if err == nil && (!strings.Contains(n.StateReason, "no space left") || !strings.Contains(n.StateReason, "free some space")) {
			err = fmt.Errorf("it is %s (%s)", n.State, n.StateReason)
		}
		return err
	})
	disk.free()
	gateway.Apply(documents("motd", "name=web-1", site.Path("files/motd"), large("room "))).Exits(0)
	harness.Eventually(t, 20*time.Second, "the policy is applied", node.Applied)
	harness.Eventually(t, 5*time.Second, "the reason is gone", func() error {
		n, err := gateway.Node("web-1")
		if err == nil && n.StateReason != "" {
			err = fmt.Errorf("it is %s (%s)", n.State, n.StateReason)
		}
		return err
	})
	works(t, gateway, node, "after")
	noEvent(t, gateway, refused)
	if node.PID() != pid {
		t.Error("the node was restarted")
	}

	// What a full disk acknowledged is on it: the node is killed before
	// anybody could take it.
	gateway.Stop()
	disk.fill()
	var taken []string
	for i := range 40 {
		text := fmt.Sprintf("into the last page %d", i)
		if emit(node, text).Code != 0 {
			break
		}
		taken = append(taken, text)
	}
	if r := emit(node, refused); r.Code == 0 {
		t.Errorf("the node took an event for which it has no room: %v", r)
	}
	node.Kill()
	disk.free()
	node.Start()
	gateway.Start()
	gateway.WaitAPI()
	took := harness.Eventually(t, 30*time.Second, "all that was acknowledged arrives once", func() error {
		var errs []error
		for _, text := range append(taken, "before", "after") {
			errs = append(errs, gateway.HasEvent(text))
		}
		return errors.Join(errs...)
	})
	t.Logf("%d events after %v", len(taken), took)
	noEvent(t, gateway, refused)
}

// TestFullGateway: events wait at the nodes while the gateway has no room.
func TestFullGateway(t *testing.T) {
	harness.Long(t)
	site := harness.New(t)
	disk := mount(t, site.Path("gateway"), 16)
	gateway := site.Gateway()
	site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1", tagged("web-1"))
	node.WaitRunning(runningWithin)
	works(t, gateway, node, "before")
	pid := gateway.PID()

	disk.fill()
	var sent []string
	for i := range 12 { // more than the journal has room for
		text := large(fmt.Sprintf("while the gateway is full %d ", i))
		emit(node, text).Exits(0)
		sent = append(sent, text)
	}
	r := gateway.Apply(documents("motd", "name=web-1", site.Path("files/motd"), strings.Repeat("x", 1<<20)))
	if r.Code == 0 {
		t.Errorf("the gateway took a policy for which it has no room: %v", r.Command)
	}
	explains(t, "apply", r.Stderr, "disk", "free some space")
	harness.Eventually(t, 10*time.Second, "the gateway's log tells of the disk", func() error {
		if !strings.Contains(gateway.Log(), "free some space") {
			return errors.New("it does not")
		}
		return nil
	})
	gateway.Run("node", "list").Exits(0)
	if st := mustStatus(t, node.Role); st.State != "running" {
		t.Errorf("the node is %s", st.State)
	}

	disk.free()
	began := time.Now()
	harness.Eventually(t, 30*time.Second, "all events arrive once", func() error {
		var errs []error
		for _, text := range sent {
			errs = append(errs, gateway.HasEvent(text))
		}
		return errors.Join(errs...)
	})
	t.Logf("events after %v", time.Since(began))
	works(t, gateway, node, "after")
	t.Logf("works after %v", time.Since(began))
	gateway.Apply(documents("motd", "name=web-1", site.Path("files/motd"), "room")).Exits(0)
	harness.Eventually(t, 10*time.Second, "the policy is applied", node.Applied)
	if gateway.PID() != pid {
		t.Error("the gateway was restarted")
	}
}

// TestFullRCP: an RCP needs no room to forward, and none to start again.
func TestFullRCP(t *testing.T) {
	harness.Long(t)
	site := harness.New(t)
	disk := mount(t, site.Path("dmz-1"), 2)
	gateway := site.Gateway()
	relay := site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1")
	node.WaitRunning(runningWithin)
	disk.fill()
	works(t, gateway, node, "the RCP is full")
	late := site.Node(gateway, "web-2")
	late.WaitRunning(10 * time.Second)
	relay.Stop()
	relay.Start()
	for _, n := range []*harness.Node{node, late} {
		harness.Eventually(t, 30*time.Second, n.Name+" is connected again", func() error {
			return gateway.Run("action", "run", "--node", n.Name, "--", "true").Err()
		})
	}
	works(t, gateway, node, "the RCP was started again while full")
	disk.free()
	works(t, gateway, late, "the RCP has room")
}

// nobody is a user who owns nothing.
const nobody = 65534

// startAs runs a role as a user until it ends, which it must within the time.
func startAs(t *testing.T, uid uint32, env map[string]string, program, role string) (code int, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "run", role)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	for name, value := range env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}, Pdeathsig: syscall.SIGKILL}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		t.Fatalf("%s goes on with a bad data directory: %s", role, &out)
	case errors.As(err, &exit):
		return exit.ExitCode(), out.String()
	case err != nil:
		t.Fatal(err)
	}
	return 0, out.String()
}

// publicCopy copies a program to where every user may run it.
func publicCopy(t *testing.T, program string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	to := filepath.Join(dir, "sallyport")
	in, err := os.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(out, in)
	if err := errors.Join(err, out.Close(), os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	return to
}

// TestUnusableDirectory: no role starts on a directory that it cannot use, and
// each says which one and what to do.
func TestUnusableDirectory(t *testing.T) {
	harness.Long(t)
	site := harness.New(t)
	disk := mount(t, site.Path("disk"), 16)
	if err := os.Chmod(filepath.Dir(disk.dir), 0o755); err != nil {
		t.Fatal(err)
	}
	program := publicCopy(t, site.Program("sallyport"))
	roles := map[string]map[string]string{
		"gateway": {"SALLYPORT_GATEWAY_LISTEN": "off", "SALLYPORT_GATEWAY_ADMIN_LISTEN": "off"},
		"rcp":     {"SALLYPORT_RCP_LISTEN": fmt.Sprintf("127.0.0.1:%d", harness.FreePort(t)), "SALLYPORT_RCP_ADMIN_LISTEN": "off"},
		"node":    {"SALLYPORT_NODE_ADMIN_LISTEN": "off"},
	}
	gateway := site.Gateway()
	relay := site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1")
	node.WaitRunning(runningWithin)
	used := map[string]string{"gateway": gateway.Data, "rcp": relay.Data, "node": node.Data}
	roles["node"]["SALLYPORT_NODE_JOIN"] = node.Environment()["SALLYPORT_NODE_JOIN"]
	for _, p := range []*harness.Role{node.Role, relay.Role, gateway.Role} { // so that nobody has anybody to drain
		p.Stop()
	}
	dir := func(t *testing.T, name string, mode os.FileMode) string {
		t.Helper()
		path := filepath.Join(disk.dir, name)
		if err := errors.Join(os.MkdirAll(path, mode), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for role, env := range roles {
		t.Run(role, func(t *testing.T) {
			refused := func(t *testing.T, uid uint32, data string, want ...string) {
				t.Helper()
				env["SALLYPORT_DATA"] = data
				code, text := startAs(t, uid, env, program, role)
				if code != 1 {
					t.Errorf("exit code %d, want 1: %s", code, text)
				}
				explains(t, role, text, append(want, data)...)
			}
			t.Run("unreadable", func(t *testing.T) {
				refused(t, nobody, filepath.Join(dir(t, role+"-closed", 0o700), "data"), "permission denied", "SALLYPORT_DATA")
			})
			t.Run("of another user", func(t *testing.T) {
				refused(t, nobody, used[role], "permission denied", "SALLYPORT_DATA")
			})
			t.Run("read-only", func(t *testing.T) {
				data := dir(t, role+"-new", 0o777)
				disk.remount(unix.MS_RDONLY)
				defer disk.remount(0)
				refused(t, 0, data, "read-only file system", "SALLYPORT_DATA")
			})
			t.Run("read-only with content", func(t *testing.T) {
				data := dir(t, role+"-used", 0o755)
				copyTree(t, used[role], data)
				disk.remount(unix.MS_RDONLY)
				defer disk.remount(0)
				refused(t, 0, data, "read-only file system", "SALLYPORT_DATA")
			})
			t.Run("full", func(t *testing.T) {
				data := dir(t, role+"-full", 0o755)
				disk.fill()
				defer disk.free()
				refused(t, 0, data, "no space left", "free some space")
			})
		})
	}
}
