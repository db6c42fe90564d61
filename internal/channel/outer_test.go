package channel_test

import (
	"context"
	"errors"
	"net/http"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"sallyport/internal/channel"
	"sallyport/internal/channel/channeltest"
	"sallyport/internal/wire"
)

// A stream that is reset ends the HTTP/2 inside it. It once read on for ever,
// because it took the carrier's StreamError for one of its own.
func TestResetStreamEndsTheSessionInside(t *testing.T) {
	up, down := channeltest.Pair(t)
	reset := make(chan struct{})
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = down.Serve(context.Background(), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusOK)
			_ = http.NewResponseController(w).Flush()
			<-reset
			panic(http.ErrAbortHandler)
		}))
	}()
	defer func() { up.Close(nil); <-served }()
	stream, err := up.Connect(context.Background(), wire.ConnectAuthority(wire.NewID()), nil)
	if err != nil {
		t.Fatal(err)
	}
	inner, err := channel.Client(stream)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = inner.Close() }()
	close(reset)
	select {
	case <-inner.Done():
	case <-time.After(5 * time.Second):
		t.Fatal("the session does not notice that its stream was reset")
	}
	_, err = stream.Read(make([]byte, 1))
	if err == nil {
		t.Fatal("read from a stream that was reset")
	}
	if se, ok := err.(http2.StreamError); ok { //nolint:errorlint // the very type is the point
		t.Fatalf("read returns a bare %T", se)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
}
