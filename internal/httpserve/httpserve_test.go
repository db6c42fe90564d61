package httpserve

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// listener is one in memory.
type listener struct {
	conns chan net.Conn
	shut  chan struct{}
	close sync.Once
}

func newListener() *listener {
	return &listener{conns: make(chan net.Conn), shut: make(chan struct{})}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.shut:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.close.Do(func() { close(l.shut) })
	return nil
}

func (l *listener) Addr() net.Addr { return &net.UnixAddr{Name: "memory"} }

// ask returns the status of an answer, or 0 when the connection ends without one.
func (l *listener) ask(t *testing.T) int {
	ours, theirs := net.Pipe()
	defer func() { _ = ours.Close() }()
	l.conns <- theirs
	if _, err := io.WriteString(ours, "GET / HTTP/1.1\r\nHost: here\r\n\r\n"); err != nil {
		t.Error(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(ours), nil)
	if err != nil {
		return 0
	}
	_ = res.Body.Close()
	return res.StatusCode
}

// serverOf answers after some time of work.
func serverOf(work time.Duration) *http.Server {
	return &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(work):
			w.WriteHeader(http.StatusTeapot)
		case <-r.Context().Done():
		}
	})}
}

// TestUntil: what runs at the end has its time, and no more.
func TestUntil(t *testing.T) {
	for _, c := range []struct {
		name            string
		work, grace     time.Duration
		answered, ended time.Duration // after the stop; answered 0: not at all
	}{
		{"in time", 2 * time.Second, 5 * time.Second, 2 * time.Second, 3 * time.Second},
		{"too late", time.Minute, 5 * time.Second, 0, 5 * time.Second},
		{"no time", time.Minute, 0, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ln := newListener()
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error, 1)
				go func() { done <- Until(ctx, serverOf(c.work), ln, c.grace) }()
				answer := make(chan int, 1)
				go func() { answer <- ln.ask(t) }()
				synctest.Wait()
				cancel()
				stopped := time.Now()
				if status := <-answer; (status == http.StatusTeapot) != (c.answered > 0) || c.answered > 0 && time.Since(stopped) != c.answered {
					t.Errorf("answer %d after %v", status, time.Since(stopped))
				}
				if err := <-done; err != nil || time.Since(stopped) > c.ended {
					t.Errorf("ended after %v: %v", time.Since(stopped), err)
				}
			})
		})
	}
}

// A listener that fails is an error, and leaves nobody waiting.
func TestListenerFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := newListener()
		done := make(chan error, 1)
		go func() { done <- Until(t.Context(), serverOf(time.Minute), ln, time.Minute) }()
		answer := make(chan int, 1)
		go func() { answer <- ln.ask(t) }()
		synctest.Wait()
		began := time.Now()
		_ = ln.Close()
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("%v", err)
		}
		if status := <-answer; status != 0 || time.Since(began) > 0 {
			t.Errorf("answer %d after %v", status, time.Since(began))
		}
	})
}
