package admin

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestEndpoints(t *testing.T) {
	var notReady atomic.Value
	s, err := Listen(Config{
		Addr: "127.0.0.1:0", Gatherer: NewRegistry("1.2.3"), Log: slog.New(slog.DiscardHandler),
		Ready: func() error {
			if err, ok := notReady.Load().(error); ok {
				return err
			}
			return nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()

	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(path string) (int, string) {
		t.Helper()
		resp, err := client.Get("http://" + s.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}
	if code, body := get("/metrics"); code != 200 || !strings.Contains(body, `sallyport_build_info{version="1.2.3"} 1`) || !strings.Contains(body, "go_goroutines") {
		t.Errorf("/metrics: %d %.200s", code, body)
	}
	if code, _ := get("/livez"); code != 200 {
		t.Errorf("/livez: %d", code)
	}
	if code, _ := get("/readyz"); code != 200 {
		t.Errorf("/readyz: %d", code)
	}
	notReady.Store(errors.New("join code was used up"))
	if code, body := get("/readyz"); code != 503 || !strings.Contains(body, "used up") {
		t.Errorf("/readyz while not ready: %d %q", code, body)
	}
	for _, path := range []string{"/debug/pprof/", "/", "/v1/status"} {
		if code, _ := get(path); code != 404 {
			t.Errorf("%s: %d, want 404", path, code)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	if _, err := client.Get("http://" + s.Addr().String() + "/livez"); err == nil {
		t.Error("still answers after Run ended")
	}
}
