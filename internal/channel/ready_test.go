package channel_test

import (
	"io"
	"net/http"
	"testing"
)

// The body of a response tells when there is something to read, so that nobody
// has to wait for that. HTTP/3 cannot tell.
func TestBodyTellsWhenThereIsSomethingToRead(t *testing.T) {
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
		body := res.Body.(interface{ Notify(func()) bool })
		told := make(chan bool, 8)
		notify := func(when string, later bool) {
			t.Helper()
			if got := body.Notify(func() { told <- true }); got != (later && v.carrier != "h3") {
				t.Errorf("%s: told later: %v", when, got)
			}
		}
		await := func() {
			if v.carrier != "h3" {
				<-told
			}
		}
		notify("with nothing to read", true)
		more <- "hello"
		await()
		notify("with something to read", false)
		b := make([]byte, 5)
		if _, err := io.ReadFull(res.Body, b); err != nil || string(b) != "hello" {
			t.Errorf("%q %v", b, err)
		}
		notify("with all of it read", true)
		close(more)
		await() // the end is something to read, too
		if n, err := res.Body.Read(b); n != 0 || err != io.EOF {
			t.Errorf("%d %v", n, err)
		}
		notify("at the end", false)
		if len(told) > 0 {
			t.Error("told twice")
		}
	})
}
