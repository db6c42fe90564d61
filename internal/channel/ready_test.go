package channel_test

import (
	"io"
	"net/http"
	"testing"
)

// The body of a response says when there is something to read, so that nobody
// waits for that in the depth of a reader. HTTP/3 cannot tell.
func TestBodySaysWhenItIsReady(t *testing.T) {
	each(t, func(t *testing.T, v variant) {
		more := make(chan string)
		p := newPlant(t, v, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			rc := http.NewResponseController(w)
			_ = rc.Flush()
			for s := range more {
				_, _ = io.WriteString(w, s)
				_ = rc.Flush()
			}
		}))
		res, err := request(t.Context(), t, p.connect(t), http.MethodGet, "/", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = res.Body.Close() }()
		body := res.Body.(interface {
			Ready() (<-chan struct{}, bool)
		})
		wait, ok := body.Ready()
		if ok != (v.carrier != "h3") || ok && wait == nil {
			t.Errorf("with nothing to read: %v %v", wait, ok)
		}
		more <- "hello"
		if ok {
			<-wait
			if wait, ok := body.Ready(); !ok || wait != nil {
				t.Errorf("with something to read: %v %v", wait, ok)
			}
		}
		b := make([]byte, 5)
		if _, err := io.ReadFull(res.Body, b); err != nil || string(b) != "hello" {
			t.Errorf("%q %v", b, err)
		}
		if wait, ok = body.Ready(); ok && wait == nil {
			t.Error("with all of it read there is something to read")
		}
		close(more)
		if ok {
			<-wait // the end is something to read, too
			if wait, _ := body.Ready(); wait != nil {
				t.Error("at the end there is something to wait for")
			}
		}
		if n, err := res.Body.Read(b); n != 0 || err != io.EOF {
			t.Errorf("%d %v", n, err)
		}
	})
}
