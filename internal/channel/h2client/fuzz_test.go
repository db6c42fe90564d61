package h2client_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"sallyport/internal/channel/h2client"
)

// Whatever a server sends, nothing panics, hangs or stays: every request gets
// an end, and all goroutines do (see TestMain).
func FuzzServerBytes(f *testing.F) {
	script := func(write func(fr *http2.Framer)) []byte {
		var b bytes.Buffer
		fr := http2.NewFramer(&b, nil)
		fr.AllowIllegalWrites = true
		_ = fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
		_ = fr.WriteSettingsAck()
		write(fr)
		return b.Bytes()
	}
	f.Add(script(func(fr *http2.Framer) {
		_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headers(":status", "200", "content-length", "5"), EndHeaders: true})
		_ = fr.WriteDataPadded(1, true, []byte("hello"), make([]byte, 3))
		_ = fr.WriteRSTStream(3, http2.ErrCodeNo)
	}))
	f.Add(script(func(fr *http2.Framer) {
		_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: headers(":status", "200")})
		_ = fr.WriteContinuation(3, true, headers("x", "y"))
		_ = fr.WriteData(3, false, []byte("up"))
		_ = fr.WriteWindowUpdate(0, 100)
		_ = fr.WriteWindowUpdate(3, 100)
		_ = fr.WritePing(false, [8]byte{1})
		_ = fr.WriteGoAway(3, http2.ErrCodeInternal, []byte("bye"))
	}))
	f.Add(script(func(fr *http2.Framer) {
		_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headers(":status", "103"), EndHeaders: true, PadLength: 7,
			Priority: http2.PriorityParam{StreamDep: 1, Weight: 3}})
		_ = fr.WritePushPromise(http2.PushPromiseParam{StreamID: 1, PromiseID: 2, BlockFragment: headers(":path", "/")})
		_ = fr.WriteRawFrame(0x99, 0xff, 1, []byte("?"))
	}))
	f.Fuzz(func(t *testing.T, b []byte) {
		ours, theirs := net.Pipe()
		go func() { _, _ = io.Copy(io.Discard, theirs) }()
		cfg := small
		cfg.StreamWindow, cfg.ConnWindow, cfg.HeaderTimeout = 4<<10, 64<<10, time.Second
		c, err := h2client.New(ours, cfg)
		if err != nil {
			t.Fatal(err)
		}
		req, _ := http.NewRequestWithContext(context.Background(), http.MethodPost, "http://peer/", io.NopCloser(strings.NewReader(kilobyte)))
		first := ask(c, req)
		connect := get(t, "/")
		connect.Method, connect.Host = http.MethodConnect, "x:1"
		second := make(chan struct{})
		go func() {
			defer close(second)
			s, _, err := c.Connect(connect)
			if err != nil {
				return
			}
			go func() { _, _ = s.Write([]byte(kilobyte)); _ = s.CloseWrite() }()
			_, _ = io.Copy(io.Discard, s)
			_ = s.Close()
		}()
		_, _ = theirs.Write(b)
		_ = theirs.Close()
		if r := <-first; r.err == nil {
			_, _ = io.Copy(io.Discard, r.res.Body)
			_ = r.res.Body.Close()
		}
		<-second
		<-c.Done()
		_ = c.Close()
	})
}
