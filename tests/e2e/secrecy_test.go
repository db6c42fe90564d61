package e2e

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"sallyport/internal/wire"
	"sallyport/tests/harness"
)

// forms lists how a text may stand in memory or traffic: as it is, in hex, and
// in base64 at each of the three alignments, without the digits that its
// neighbours decide.
func forms(text string) [][]byte {
	all := [][]byte{[]byte(text), []byte(hex.EncodeToString([]byte(text)))}
	for shift := range 3 {
		encoded := base64.RawStdEncoding.EncodeToString(append(make([]byte, shift), text...))
		first := (shift*8 + 5) / 6
		whole := (shift + len(text)) * 8 / 6
		part := []byte(encoded[first:whole])
		all = append(all, part)
		if safe := strings.NewReplacer("+", "-", "/", "_").Replace(string(part)); safe != string(part) {
			all = append(all, []byte(safe))
		}
	}
	return all
}

// holds reports whether data holds the text in any form.
func holds(data []byte, text string) bool {
	for _, form := range forms(text) {
		if bytes.Contains(data, form) {
			return true
		}
	}
	return false
}

func TestForms(t *testing.T) {
	const secret = "a secret? ~~~ of >>> some length"
	for before := range 7 {
		text := strings.Repeat("x", before) + secret + "tail"
		for name, data := range map[string]string{
			"plain": text, "hex": hex.EncodeToString([]byte(text)),
			"base64": base64.StdEncoding.EncodeToString([]byte(text)), "base64url": base64.RawURLEncoding.EncodeToString([]byte(text)),
		} {
			if !holds([]byte(data), secret) {
				t.Errorf("%s with %d bytes before it is not found", name, before)
			}
		}
	}
	if holds([]byte(base64.StdEncoding.EncodeToString([]byte("another text of some length"))), secret) {
		t.Error("a text that is not there was found")
	}
}

// recorder keeps what a capture writes.
type recorder struct {
	mu   sync.Mutex
	data bytes.Buffer
}

func (r *recorder) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.data.Write(b)
}

// core dumps the memory of a running process.
func core(t *testing.T, p *harness.Process, dir string) []byte {
	t.Helper()
	if _, err := exec.LookPath("gcore"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("CI=true, but no gcore: install gdb: %v", err)
		}
		t.Skipf("no gcore: %v", err)
	}
	prefix := filepath.Join(dir, "core")
	out, err := exec.CommandContext(t.Context(), "gcore", "-a", "-o", prefix, fmt.Sprint(p.PID())).CombinedOutput()
	if err != nil {
		t.Fatalf("gcore: %v\n%s", err, out)
	}
	data, err := os.ReadFile(fmt.Sprintf("%s.%d", prefix, p.PID()))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// directory returns all files below dir in one piece.
func directory(t *testing.T, dir string) []byte {
	t.Helper()
	var all bytes.Buffer
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(name)
		all.Write(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all.Bytes()
}

// TestRCPSeesNothing: neither the memory nor the traffic nor the directory of
// an RCP holds a word of what passed through it, while the same search finds
// every word at the node (SE-02).
func TestRCPSeesNothing(t *testing.T) {
	for _, c := range []string{"h2", "h3"} {
		t.Run(c, func(t *testing.T) { rcpSeesNothing(t, c) })
	}
}

func rcpSeesNothing(t *testing.T, c string) {
	lab := plant(t)
	site := harness.In(t, lab)
	traffic := new(recorder)
	stop, err := lab.Host("dmz-1").Capture(traffic)
	if err != nil {
		t.Fatal(err)
	}
	gateway := site.Gateway(carrier("GATEWAY", c))
	relay := site.RCP(gateway, "dmz-1")
	node := site.Node(gateway, "web-1", tagged("web-1"), carrier("NODE", c))
	node.WaitRunning(runningWithin)
	words := map[string]string{}
	for i, word := range story(t, site, gateway, node) {
		words[[]string{"policy", "action output", "event"}[i]] = word
	}
	code, err := os.ReadFile(node.Environment()["SALLYPORT_NODE_JOIN"])
	if err != nil {
		t.Fatal(err)
	}
	join, err := wire.ParseJoinCode(string(code))
	if err != nil {
		t.Fatal(err)
	}
	if join.Token == "" {
		t.Fatal("the join code holds no token")
	}
	words["token"] = join.Token

	atNode := append(core(t, node.Process, t.TempDir()), directory(t, node.Data)...)
	atRCP := core(t, relay.Process, t.TempDir())
	frames, dropped, err := stop()
	if err != nil || dropped > 0 || frames == 0 {
		t.Fatalf("capture: %d frames, %d dropped, %v", frames, dropped, err)
	}
	// The search works on this dump and on this capture: the RCP's own UUID
	// is in its memory, and on TCP the ALPN name is on its wire. (QUIC hides
	// even that.)
	var status struct{ ID string }
	if err := json.Unmarshal([]byte(relay.Local("status", "-o", "json").Exits(0).Stdout), &status); err != nil || status.ID == "" {
		t.Fatalf("the RCP's status: %v", err)
	}
	if !holds(atRCP, status.ID) {
		t.Error("the core dump does not hold the RCP's own UUID: the search proves nothing")
	}
	if c == "h2" && !holds(traffic.data.Bytes(), "sallyport-up") {
		t.Error("the capture does not hold an ALPN name: the search proves nothing")
	}
	for what, word := range words {
		if !holds(atNode, word) {
			t.Errorf("the %s marker is not found at the node: the search proves nothing", what)
		}
		if holds(atRCP, word) {
			t.Errorf("the RCP's memory holds the %s marker", what)
		}
		if holds(traffic.data.Bytes(), word) {
			t.Errorf("the RCP's traffic holds the %s marker", what)
		}
		if holds(directory(t, relay.Data), word) {
			t.Errorf("the RCP's directory holds the %s marker", what)
		}
	}
}
