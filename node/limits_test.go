package node

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyport/internal/wire"
)

// An RCP may read a node's signals, and not make it write any number of them.
func TestStreamsOfSignalsAreBounded(t *testing.T) {
	p := newPlant(t)
	ag := p.node()
	open := func() *http.Response {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://peer"+wire.PathSignals, nil)
		if err != nil {
			t.Fatal(err)
		}
		res, err := ag.c.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = res.Body.Close() })
		return res
	}
	var first *http.Response
	for range maxSignals {
		res := open()
		if res.StatusCode != http.StatusOK {
			t.Fatalf("status %d", res.StatusCode)
		}
		if first == nil {
			first = res
		}
	}
	if res := open(); res.StatusCode != http.StatusTooManyRequests {
		t.Fatalf("one too many: status %d", res.StatusCode)
	}
	_ = first.Body.Close()
	eventually(t, "there is room again", func() bool { return open().StatusCode == http.StatusOK })
}

// stalled is a body that says when it is asked for, and then has nothing.
type stalled struct {
	asked func()
	over  <-chan struct{}
}

func (s stalled) Read([]byte) (int, error) {
	s.asked()
	<-s.over
	return 0, io.EOF
}

// An RCP that owns a channel makes its node hold no more than a few requests.
func TestRequestsOfAnUpstreamAreBounded(t *testing.T) {
	p := newPlant(t)
	ag := p.node()
	ctx, cancel := context.WithCancel(t.Context())
	var begun atomic.Int64
	var all sync.WaitGroup
	for range 4 * maxStreams {
		all.Go(func() {
			body := stalled{sync.OnceFunc(func() { begun.Add(1) }), ctx.Done()}
			req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://peer"+wire.PathLanes, body)
			if err != nil {
				t.Error(err)
				return
			}
			if res, err := ag.c.RoundTrip(req); err == nil {
				_ = res.Body.Close()
			}
		})
	}
	eventually(t, "it holds what it may", func() bool { return begun.Load() >= maxStreams })
	select {
	case <-ctx.Done():
	case <-time.After(200 * time.Millisecond): // more would have come by now
	}
	if n := begun.Load(); n > maxStreams {
		t.Errorf("it holds %d requests at once, want at most %d", n, maxStreams)
	}
	cancel()
	all.Wait()
}

// To stop an agent takes no longer because a policy's command runs: the policy
// is put back, and applied at the next start.
func TestStopDoesNotWaitForAPolicysCommand(t *testing.T) {
	p := newPlant(t)
	ag := p.node()
	began := filepath.Join(t.TempDir(), "began")
	file := filepath.Join(t.TempDir(), "file")
	spec, err := json.Marshal(wire.FilesSpec{Files: []wire.FileSpec{{Path: file, Content: "hello"}},
		Validate: []string{"/bin/sh", "-c", "test -e " + began + " && exit 0; : > " + began + "; exec sleep 55"}})
	if err != nil {
		t.Fatal(err)
	}
	env := p.desired(ag, p.gateway, func(d *wire.Desired) {
		d.Policies = []wire.Policy{{Name: "slow", Type: wire.PolicyFiles, Digest: wire.SpecDigest(spec)}}
		d.Specs = map[string]json.RawMessage{wire.SpecDigest(spec): spec}
	})
	in := ag.in()
	got := make(chan error, 1)
	go func() {
		_, err := in.desired.put(t.Context(), env)
		got <- err
	}()
	eventually(t, "the command runs", func() bool { _, err := os.Stat(began); return err == nil })
	start := time.Now()
	ag.stop()
	if err := <-got; err == nil || time.Since(start) > 30*time.Second {
		t.Fatalf("stopped after %v: %v", time.Since(start), err)
	}
	if got := content(t, file); got != "" {
		t.Errorf("what was not validated stays: %q", got)
	}
	next := ag.restart()
	eventually(t, "it is applied at the next start", func() bool { return content(t, file) == "hello" })
	eventually(t, "and reported", func() bool { return next.in().desired.revision() == wire.Revision{Generation: 1, N: 1} })
}
