package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/internal/wire"
)

// serve answers on a unix socket and returns a client of it.
func serve(t *testing.T, h http.Handler) *Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "api.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(ln) }()
	t.Cleanup(func() { _ = srv.Close(); <-done })
	c, err := NewClient(ClientConfig{URL: "unix://" + path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestNewClientRefusesPlaintext(t *testing.T) {
	if _, err := NewClient(ClientConfig{URL: "http://127.0.0.1:8443"}); !errors.Is(err, ErrPlainHTTP) {
		t.Errorf("http://: %v", err)
	}
	for _, u := range []string{"", "ftp://x", "https://", "https://u:p@host", "https://host/path", "host:8443"} {
		if _, err := NewClient(ClientConfig{URL: u}); err == nil {
			t.Errorf("%q was accepted", u)
		}
	}
	if _, err := NewClient(ClientConfig{URL: "https://gateway.example:8443/"}); err != nil {
		t.Error(err)
	}
}

func TestMuteGateway(t *testing.T) {
	path := filepath.Join(t.TempDir(), "api.sock")
	ln, err := net.Listen("unix", path) // nobody accepts, as when the process is stopped
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	c, err := NewClient(ClientConfig{URL: path, Timeout: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = c.Nodes(t.Context(), NodeQuery{})
	if want := "ask gateway: no answer within 20ms: is its process stopped, or its disk?"; err == nil || err.Error() != want || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, want %q", err, want)
	}
}

func TestListFollowsCursors(t *testing.T) {
	var asked []string
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.RequestURI())
		page := List[Node]{Items: []Node{{Name: "a"}, {Name: "b"}}, Next: "x"}
		if r.URL.Query().Get("cursor") == "x" {
			page = List[Node]{Items: []Node{{Name: "c"}}}
		}
		_ = json.NewEncoder(w).Encode(page)
	}))
	nodes, err := c.Nodes(context.Background(), NodeQuery{Selector: "role=web,!x"})
	if err != nil || len(nodes) != 3 || nodes[2].Name != "c" {
		t.Fatalf("%v, %v", nodes, err)
	}
	if want := "/api/v1/nodes?limit=1000&selector=role%3Dweb%2C%21x"; asked[0] != want || len(asked) != 2 {
		t.Errorf("asked %q; want %q first", asked, want)
	}
}

func TestProblemsAreMatchedByCode(t *testing.T) {
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/bare") {
			http.Error(w, "no", http.StatusNotFound)
			return
		}
		p := NewProblem(CodeAmbiguous, "2 nodes fit", ProblemError{Location: "bad.yaml:3", Message: "no such type"})
		w.Header().Set("Content-Type", p.ContentType(""))
		w.WriteHeader(p.Status)
		_ = json.NewEncoder(w).Encode(p)
	}))
	_, err := c.Node(context.Background(), "x")
	if !Is(err, CodeAmbiguous) || Is(err, CodeNotFound) || err.Error() != "bad.yaml:3: no such type" {
		t.Errorf("%v", err)
	}
	if _, err = c.Node(context.Background(), "bare"); !Is(err, CodeNotFound) {
		t.Errorf("an answer without a problem: %v", err)
	}
}

func TestNamesAreEscaped(t *testing.T) {
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = json.NewEncoder(w).Encode(NodeDetail{Node: Node{Name: r.URL.EscapedPath()}})
	}))
	n, err := c.Node(context.Background(), "../tokens?x=1")
	if err != nil || n.Name != "/api/v1/nodes/..%2Ftokens%3Fx=1" {
		t.Errorf("%q, %v", n.Name, err)
	}
	for _, name := range []string{"", ".", ".."} { // no escape keeps these from being another path
		if n, err := c.Node(context.Background(), name); !Is(err, CodeNotFound) {
			t.Errorf("%q is %q, %v", name, n.Name, err)
		}
	}
}

func TestStreams(t *testing.T) {
	send := func(w io.Writer, event, data string) {
		_, _ = fmt.Fprintf(w, "event: %s\ndata: %s\n\n", event, data)
	}
	c := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, ": keep-alive\n\n")
		send(w, "output", `{"n":1,"stream":"stdout","data":"b3V0Cg=="}`)
		switch r.URL.Query().Get("batch") {
		case "whole":
			send(w, "end", "{}")
		case "problem":
			send(w, "problem", `{"code":"internal","detail":"disk full"}`)
		}
	}))
	run := func(batch string) (got string, err error) {
		err = c.FollowActions(context.Background(), batch, func(o Output) error { got += string(o.Data); return nil })
		return got, err
	}
	if got, err := run("whole"); err != nil || got != "out\n" {
		t.Errorf("whole: %q, %v", got, err)
	}
	if _, err := run("problem"); !Is(err, CodeInternal) {
		t.Errorf("problem: %v", err)
	}
	if _, err := run("cut"); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a stream that was cut off looks whole: %v", err)
	}
	err := c.FollowActions(context.Background(), "cut", func(Output) error { return ErrStop })
	if err != nil {
		t.Errorf("stopped: %v", err)
	}
}

func TestExitStatus(t *testing.T) {
	code := func(n int) *int { return &n }
	for _, c := range []struct {
		a    Action
		want int
	}{
		{Action{State: wire.ActionSucceeded, ExitCode: code(0)}, 0},
		{Action{State: wire.ActionFailed, ExitCode: code(3)}, 3},
		{Action{State: wire.ActionFailed, ExitCode: code(137), Signal: 9}, 137},
		{Action{State: wire.ActionFailed, Code: ActionCodeNotStarted, ExitCode: code(-1)}, 125},
		{Action{State: wire.ActionTimedOut}, 124},
		{Action{State: wire.ActionExpired, Code: ActionCodeExpired}, 124},
		{Action{State: wire.ActionExpired, Code: ActionCodeNotConnected}, 125},
		{Action{State: wire.ActionRefused}, 126},
		{Action{State: wire.ActionLost}, 125},
	} {
		if got := c.a.ExitStatus(); got != c.want || !c.a.Done() {
			t.Errorf("%s/%s: %d; want %d", c.a.State, c.a.Code, got, c.want)
		}
	}
}
