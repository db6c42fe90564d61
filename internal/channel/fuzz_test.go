package channel

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

// What a hostile HTTP proxy answers never makes us read past its header, into
// what may be the first bytes of the tunnel.
func FuzzProxyAnswer(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\n\r\n\x16\x03"))
	f.Add([]byte("HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 5\r\n\r\nhello"))
	f.Add([]byte("HTTP/1.0 200\n\n"))
	f.Add([]byte("nonsense\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		err := readProxyAnswer(r, &http.Request{Method: http.MethodConnect})
		if err != nil {
			return
		}
		read := b[:len(b)-r.Len()]
		if !headerEnds(read) || headerEnds(read[:len(read)-1]) {
			t.Errorf("read %q of %q", read, b)
		}
	})
}

// A reason that goes into a header is one line of at most 512 bytes.
func FuzzHeaderText(f *testing.F) {
	f.Add("no such node")
	f.Add("two\r\nlines\x00\x7f")
	f.Fuzz(func(t *testing.T, s string) {
		got := headerText(s)
		if len(got) > 512 || strings.ContainsAny(got, "\r\n\x00\x7f") {
			t.Errorf("%q became %q", s, got)
		}
		if len(s) <= 512 && utf8.ValidString(s) && !utf8.ValidString(got) {
			t.Errorf("%q is no longer UTF-8: %q", s, got)
		}
	})
}

// Whatever a stranger sends to the TCP port, the handshake ends with an error
// in its time, and a first byte that is not TLS gets no answer.
func FuzzStrangersBytes(f *testing.F) {
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte{recordHandshake, 3, 1, 0, 5, 1, 0, 0, 1, 0})
	f.Add([]byte{recordHandshake})
	ca := identitytest.NewCA(f)
	l, err := Listen(ListenConfig{Addr: "127.0.0.1:0", Identity: ca.Party(f, wire.RoleRCP), Carriers: []string{CarrierH2},
		AllowUpstream: true, AllowDownstream: true, AllowEnroll: true, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = l.Close() })
	f.Fuzz(func(t *testing.T, b []byte) {
		ours, theirs := net.Pipe()
		answer := make(chan []byte, 1)
		go func() {
			go func() {
				_, _ = theirs.Write(b)
				_ = theirs.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
			}()
			got, _ := io.ReadAll(theirs)
			_ = theirs.Close()
			answer <- got
		}()
		g, err := l.door.enter(context.Background(), ours)
		if err != nil {
			t.Fatal(err)
		}
		defer g.leave()
		c, err := l.handshake(context.Background(), ours, g)
		_ = ours.Close()
		if err == nil {
			t.Errorf("a stranger is %s", c.Peer())
		}
		if got := <-answer; len(b) > 0 && b[0] != recordHandshake && len(got) > 0 {
			t.Errorf("%q was answered with %q", b, got)
		}
	})
}
