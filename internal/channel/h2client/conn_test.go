package h2client_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"sallyport/internal/channel/h2client"
)

// What breaks the protocol for all streams ends the connection, and the peer is
// told (RFC 9113 section 5.4.1).
func TestConnectionErrors(t *testing.T) {
	u32 := func(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
	raw := func(typ http2.FrameType, flags http2.Flags, id uint32, b []byte) func(*peer) error {
		return func(p *peer) error { return p.WriteRawFrame(typ, flags, id, b) }
	}
	setting := func(id uint16, v uint32) []byte { return append(binary.BigEndian.AppendUint16(nil, id), u32(v)...) }
	for name, c := range map[string]struct {
		send func(*peer) error
		code h2client.ErrCode
	}{
		"data for a stream of the future":  {raw(http2.FrameData, 0, 5, nil), h2client.CodeProtocol},
		"data for a stream of the server":  {raw(http2.FrameData, 0, 2, nil), h2client.CodeProtocol},
		"data for no stream":               {raw(http2.FrameData, 0, 0, nil), h2client.CodeProtocol},
		"only padding":                     {raw(http2.FrameData, http2.FlagDataPadded, 1, []byte{9, 0}), h2client.CodeProtocol},
		"padded nothing":                   {raw(http2.FrameData, http2.FlagDataPadded, 1, nil), h2client.CodeFrameSize},
		"headers for a stream never begun": {raw(http2.FrameHeaders, 4, 3, headers(":status", "200")), h2client.CodeProtocol},
		"headers that are not HPACK":       {raw(http2.FrameHeaders, 4, 1, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}), h2client.CodeCompression},
		"headers that use a table":         {raw(http2.FrameHeaders, 4, 1, []byte{0x3f, 0xe1, 0x1f, 0x88}), h2client.CodeCompression},
		"headers too short for a priority": {raw(http2.FrameHeaders, 0x24, 1, []byte{0, 0}), h2client.CodeFrameSize},
		"push":                             {raw(http2.FramePushPromise, 4, 1, u32(2)), h2client.CodeProtocol},
		"continuation of nothing":          {raw(http2.FrameContinuation, 4, 1, nil), h2client.CodeProtocol},
		"settings on a stream":             {raw(http2.FrameSettings, 0, 1, nil), h2client.CodeProtocol},
		"settings cut short":               {raw(http2.FrameSettings, 0, 0, u32(1)), h2client.CodeFrameSize},
		"an ack with settings":             {raw(http2.FrameSettings, 1, 0, setting(3, 1)), h2client.CodeFrameSize},
		"a server that wants to be pushed": {raw(http2.FrameSettings, 0, 0, setting(2, 1)), h2client.CodeProtocol},
		"a window too large":               {raw(http2.FrameSettings, 0, 0, setting(4, 1<<31)), h2client.CodeFlowControl},
		"frames too small":                 {raw(http2.FrameSettings, 0, 0, setting(5, 100)), h2client.CodeProtocol},
		"ping cut short":                   {raw(http2.FramePing, 0, 0, u32(1)), h2client.CodeFrameSize},
		"reset cut short":                  {raw(http2.FrameRSTStream, 0, 1, nil), h2client.CodeFrameSize},
		"reset of a stream never begun":    {raw(http2.FrameRSTStream, 0, 3, u32(0)), h2client.CodeProtocol},
		"window by nothing":                {raw(http2.FrameWindowUpdate, 0, 0, u32(0)), h2client.CodeProtocol},
		"window above the limit":           {raw(http2.FrameWindowUpdate, 0, 0, u32(1<<31-1)), h2client.CodeFlowControl},
		"window of a stream never begun":   {raw(http2.FrameWindowUpdate, 0, 3, u32(1)), h2client.CodeProtocol},
		"goaway cut short":                 {raw(http2.FrameGoAway, 0, 0, u32(0)), h2client.CodeFrameSize},
		"priority cut short":               {raw(http2.FramePriority, 0, 1, nil), h2client.CodeFrameSize},
		"a frame above the limit":          {raw(http2.FrameData, 0, 1, make([]byte, 16<<10+1)), h2client.CodeFrameSize},
		"a header block that does not end": {func(p *peer) error {
			return errors.Join(raw(http2.FrameHeaders, 0, 1, nil)(p), p.WritePing(true, [8]byte{}))
		}, h2client.CodeProtocol},
		"a header block in endless pieces":  {func(p *peer) error { return endless(p, nil, 40) }, h2client.CodeEnhanceYourCalm},
		"a header block without an end":     {func(p *peer) error { return endless(p, make([]byte, 10<<10), 10) }, h2client.CodeEnhanceYourCalm},
		"a flood of empty data":             {flood(func(p *peer) error { return p.WriteData(1, false, nil) }), h2client.CodeEnhanceYourCalm},
		"a flood of settings":               {flood(func(p *peer) error { return p.WriteSettings() }), h2client.CodeEnhanceYourCalm},
		"a flood of pings":                  {flood(func(p *peer) error { return p.WritePing(false, [8]byte{}) }), h2client.CodeEnhanceYourCalm},
		"a flood of frames of unknown type": {flood(raw(0x77, 0, 1, []byte("?"))), h2client.CodeEnhanceYourCalm},
	} {
		bubble(t, name, func(t *testing.T) {
			cfg := small
			var ended []error
			cfg.Ended = func(err error) { ended = append(ended, err) }
			conn, p := newPeer(t, cfg)
			p.AllowIllegalWrites = true
			got := ask(conn, get(t, "/"))
			p.want("HEADERS 1 end")
			go func() { _ = c.send(p) }() // it may be cut before it is through
			p.want("GOAWAY " + c.code.String())
			wantConnError(t, conn, c.code)
			if r := <-got; r.err == nil {
				t.Error("the request was answered")
			}
			synctest.Wait()
			if len(ended) != 1 || !errors.Is(ended[0], conn.Err()) {
				t.Errorf("Ended was called with %v", ended)
			}
		})
	}
	bubble(t, "the first frame is not SETTINGS", func(t *testing.T) {
		ours, theirs := net.Pipe()
		go func() {
			_, _ = io.CopyN(io.Discard, theirs, 24)
			fr := http2.NewFramer(theirs, theirs)
			go func() { _ = fr.WritePing(false, [8]byte{}) }()
			for _, err := fr.ReadFrame(); err == nil; {
				_, err = fr.ReadFrame()
			}
			_ = theirs.Close()
		}()
		c, err := h2client.New(ours, small)
		if err != nil {
			t.Fatal(err)
		}
		wantConnError(t, c, h2client.CodeProtocol)
	})
}

// TestLatePreface: a connection that is made for a request says nothing before
// it, and then all at once; what it owes the peer's settings goes with the next one.
func TestLatePreface(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := small
		cfg.Late = true
		ours, theirs := net.Pipe()
		c, err := h2client.New(ours, cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		_ = theirs.SetReadDeadline(time.Now().Add(time.Minute))
		if n, err := theirs.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("%d bytes before there was a request, %v", n, err)
		}
		_ = theirs.SetReadDeadline(time.Time{})
		asked := ask(c, get(t, "/"))
		b := make([]byte, 4<<10)
		n, err := theirs.Read(b) // one Write: net.Pipe hands over no more
		if err != nil || !bytes.HasPrefix(b[:n], []byte(http2.ClientPreface)) {
			t.Fatalf("%q, %v", b[:n], err)
		}
		var frames []string
		fr := http2.NewFramer(io.Discard, bytes.NewReader(b[len(http2.ClientPreface):n]))
		for f, err := fr.ReadFrame(); err == nil; f, err = fr.ReadFrame() {
			frames = append(frames, f.Header().Type.String())
		}
		if len(frames) < 2 || frames[0] != "SETTINGS" || frames[len(frames)-1] != "HEADERS" {
			t.Errorf("frames %v", frames)
		}
		synctest.Wait() // the request is written
		if err := http2.NewFramer(theirs, nil).WriteSettings(); err != nil {
			t.Fatal(err)
		}
		_ = theirs.SetReadDeadline(time.Now().Add(time.Minute))
		if n, err := theirs.Read(b); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("%d bytes before there was another request, %v", n, err)
		}
		_ = theirs.SetReadDeadline(time.Time{})
		again := ask(c, get(t, "/"))
		if n, err = theirs.Read(b); err != nil {
			t.Fatal(err)
		}
		frames = nil
		fr = http2.NewFramer(io.Discard, bytes.NewReader(b[:n]))
		for f, err := fr.ReadFrame(); err == nil; f, err = fr.ReadFrame() {
			frames = append(frames, f.Header().String())
		}
		if len(frames) != 2 || !strings.Contains(frames[0]+frames[1], "SETTINGS flags=ACK") || !strings.Contains(frames[0]+frames[1], "HEADERS") {
			t.Errorf("frames %v, want what acknowledges the settings and the request", frames)
		}
		_ = theirs.Close()
		for _, asked := range []chan result{asked, again} {
			if a := <-asked; a.err == nil {
				t.Error("a connection that has ended answered")
			}
		}
	})
}

func flood(send func(*peer) error) func(*peer) error {
	return func(p *peer) error {
		for range 1100 {
			if err := send(p); err != nil {
				return err
			}
		}
		return nil
	}
}

func endless(p *peer, piece []byte, n int) error {
	err := p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: piece})
	for range n {
		err = errors.Join(err, p.WriteContinuation(1, false, piece))
	}
	return err
}

// What is no flood: the same frames over a long time.
func TestPingsOverDays(t *testing.T) {
	bubble(t, "", func(t *testing.T) {
		c, p := newPeer(t, small)
		for range 3000 {
			p.do(p.WritePing(false, [8]byte{}))
			p.want("PING ack")
			time.Sleep(time.Minute)
		}
		if err := c.Err(); err != nil {
			t.Error(err)
		}
	})
}

// A peer that asks for answers, and does not read them, is cut before they
// take memory (CVE-2019-9512); nothing waits for it meanwhile.
func TestUnreadAnswersAreBounded(t *testing.T) {
	bubble(t, "", func(t *testing.T) {
		c, p := newPeer(t, small)
		p.pause()
		var sent int
		for ; sent < 1000 && p.WritePing(false, [8]byte{}) == nil; sent++ {
		}
		if sent > 100 {
			t.Errorf("%d PINGs were taken", sent)
		}
		wantConnError(t, c, h2client.CodeEnhanceYourCalm)
		p.resume()
	})
}

func TestGoAway(t *testing.T) {
	bubble(t, "what it has taken goes on", func(t *testing.T) {
		c, p := newPeer(t, small)
		first := ask(c, get(t, "/1"))
		p.want("HEADERS 1 end")
		second := ask(c, get(t, "/2"))
		p.want("HEADERS 3 end")
		p.do(p.WriteGoAway(1, http2.ErrCodeNo, []byte("restart")))
		if r := <-second; !errors.Is(r.err, h2client.ErrGoingAway) {
			t.Errorf("what it has not taken gave %v", r.err)
		}
		if _, err := c.RoundTrip(get(t, "/3")); !errors.Is(err, h2client.ErrGoingAway) {
			t.Errorf("a new request gave %v", err)
		}
		p.answer(1, false, ":status", "200")
		p.do(p.WriteData(1, true, []byte("done")))
		if s := read(t, <-first); s != "done" {
			t.Errorf("got %q", s)
		}
		<-c.Done() // with its last stream
		if !errors.Is(c.Err(), h2client.ErrGoingAway) {
			t.Error(c.Err())
		}
	})
	bubble(t, "with a reason", func(t *testing.T) {
		c, p := newPeer(t, small)
		p.do(p.WriteGoAway(0, http2.ErrCodeEnhanceYourCalm, []byte("too much\xff"+kilobyte)))
		<-c.Done()
		var e *h2client.ConnError
		if !errors.As(c.Err(), &e) || !e.Remote || e.Code != h2client.CodeEnhanceYourCalm || !strings.HasPrefix(e.Reason, "too much?") || len(e.Reason) > 64 {
			t.Errorf("got %v", c.Err())
		}
	})
}

func TestStreamsWaitForASlot(t *testing.T) {
	bubble(t, "", func(t *testing.T) {
		c, p := newPeer(t, small, http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 1})
		first := ask(c, get(t, "/1"))
		p.want("HEADERS 1 end")
		second := ask(c, get(t, "/2"))
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		third := ask(c, get(t, "/3").WithContext(ctx))
		synctest.Wait()
		if len(p.frames) > 0 {
			t.Errorf("the client sent %s above the limit", <-p.frames)
		}
		cancel()
		if r := <-third; !errors.Is(r.err, context.Canceled) {
			t.Errorf("one that gives up gave %v", r.err)
		}
		p.answer(1, true, ":status", "200")
		p.want("HEADERS 3 end")
		fourth := ask(c, get(t, "/4"))
		synctest.Wait()
		p.do(p.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 2}))
		p.want("HEADERS 5 end") // more are allowed now
		p.answer(3, true, ":status", "200")
		p.answer(5, true, ":status", "200")
		for _, got := range []chan result{first, second, fourth} {
			if r := <-got; r.err != nil {
				t.Error(r.err)
			}
		}
	})
}

func TestFlowControl(t *testing.T) {
	bubble(t, "our window is given back as it is read", func(t *testing.T) {
		cfg := small
		cfg.StreamWindow, cfg.ConnWindow = 32<<10, 512<<10
		c, p := newPeer(t, cfg)
		s, _, err := connect(t, c, p, 1)
		if err != nil {
			t.Fatal(err)
		}
		p.do(p.WriteDataPadded(1, false, make([]byte, 16<<10-256), make([]byte, 255))) // padding counts
		p.do(p.WriteData(1, false, make([]byte, 16<<10)))
		synctest.Wait()
		if len(p.frames) > 0 {
			t.Errorf("unread, and the client sent %s", <-p.frames)
		}
		if n, err := io.ReadFull(s, make([]byte, 16<<10)); err != nil {
			t.Fatal(n, err)
		}
		p.want("WINDOW_UPDATE 1 +16640")
		p.do(p.WriteData(1, false, make([]byte, 16<<10)))
		p.do(p.WriteData(1, false, make([]byte, 300))) // 44 bytes too many
		p.want("RST_STREAM 1 FLOW_CONTROL_ERROR")
	})
	bubble(t, "all streams full and one goes on", func(t *testing.T) {
		cfg := small
		cfg.StreamWindow, cfg.ConnWindow = 16<<10, 20*16<<10
		c, p := newPeer(t, cfg)
		for id := range 3 {
			if _, _, err := connect(t, c, p, uint32(2*id+1)); err != nil {
				t.Fatal(err)
			}
			p.do(p.WriteData(uint32(2*id+1), false, make([]byte, 16<<10)))
		}
		s, _, err := connect(t, c, p, 7)
		if err != nil {
			t.Fatal(err)
		}
		for range 100 {
			p.do(p.WriteData(7, false, make([]byte, 8<<10)))
			if _, err := io.ReadFull(s, make([]byte, 8<<10)); err != nil {
				t.Fatal(err)
			}
			p.want("WINDOW_UPDATE 7 +8192")
		}
	})
	bubble(t, "the peer's windows and their changes", func(t *testing.T) {
		c, p := newPeer(t, small, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 10})
		s, _, err := connect(t, c, p, 1)
		if err != nil {
			t.Fatal(err)
		}
		wrote := make(chan error, 1)
		go func() {
			_, err := s.Write(make([]byte, 30))
			wrote <- err
		}()
		p.want("DATA 1 10 bytes")
		p.do(p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 5})) // -5
		p.do(p.WriteWindowUpdate(1, 5))                                                  // 0
		p.want("SETTINGS ack")
		synctest.Wait()
		if len(p.frames) > 0 {
			t.Errorf("the client sent %s without a window", <-p.frames)
		}
		p.do(p.WriteWindowUpdate(1, 7))
		p.want("DATA 1 7 bytes")
		p.do(p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 100}))
		p.want("DATA 1 13 bytes")
		if err := <-wrote; err != nil {
			t.Error(err)
		}
		p.do(p.WriteWindowUpdate(1, 1<<31-1))
		p.want("RST_STREAM 1 FLOW_CONTROL_ERROR")
	})
	bubble(t, "of the windows in one frame the last one counts", func(t *testing.T) {
		c, p := newPeer(t, small, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 10})
		s, _, err := connect(t, c, p, 1)
		if err != nil {
			t.Fatal(err)
		}
		p.do(p.WriteWindowUpdate(1, 1<<31-1-10))
		p.AllowIllegalWrites = true
		flood := make([]http2.Setting, 2730) // each one of them would be work for all streams
		for i := range flood {
			flood[i] = http2.Setting{ID: http2.SettingInitialWindowSize, Val: uint32(11 - i%2)}
		}
		p.do(p.WriteSettings(flood...))
		p.want("SETTINGS ack")
		if _, err := s.Write(make([]byte, 30)); err != nil {
			t.Error(err)
		}
		p.want("DATA 1 30 bytes")
	})
	bubble(t, "the connection's window is shared", func(t *testing.T) {
		c, p := newPeer(t, small, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
		s, _, err := connect(t, c, p, 1)
		if err != nil {
			t.Fatal(err)
		}
		go func() { _, _ = s.Write(make([]byte, 65535+100)) }()
		for range 4 {
			p.want("DATA 1 16375 bytes")
		}
		p.want("DATA 1 35 bytes")
		p.do(p.WriteWindowUpdate(0, 100))
		p.want("DATA 1 100 bytes")
	})
	bubble(t, "more than the connection's window", func(t *testing.T) {
		cfg := small
		cfg.StreamWindow, cfg.ConnWindow = 1<<20, 64<<10
		c, p := newPeer(t, cfg)
		if _, _, err := connect(t, c, p, 1); err != nil {
			t.Fatal(err)
		}
		go func() {
			for range 5 {
				_ = p.WriteData(1, false, make([]byte, 16<<10))
			}
		}()
		wantConnError(t, c, h2client.CodeFlowControl)
	})
}

// Neither side reads, both have more to say than fits: what arrives is still
// taken, and requests can be given up.
func TestABlockedWriteBlocksNoReader(t *testing.T) {
	bubble(t, "", func(t *testing.T) {
		c, p := newPeer(t, small)
		s, _, err := connect(t, c, p, 1)
		if err != nil {
			t.Fatal(err)
		}
		p.pause()
		wrote := make(chan error, 1)
		go func() {
			_, err := s.Write(make([]byte, 1<<10)) // net.Pipe has no buffer: it hangs
			wrote <- err
		}()
		synctest.Wait()
		p.do(p.WritePing(false, [8]byte{}))
		p.do(p.WriteData(1, false, []byte("still heard")))
		b := make([]byte, 11)
		if _, err := io.ReadFull(s, b); err != nil || string(b) != "still heard" {
			t.Errorf("%q %v", b, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := c.RoundTrip(get(t, "/").WithContext(ctx)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a request behind it gave %v", err)
		}
		_ = s.Close() // does not hang either
		p.resume()
		p.want("PING ack")
		p.want("RST_STREAM 1 CANCEL")
		if err := <-wrote; err != nil && !strings.Contains(err.Error(), "closed") {
			t.Error(err)
		}
	})
}

func TestKeepAlive(t *testing.T) {
	cfg := small
	cfg.KeepAlive = 10 * time.Second
	bubble(t, "a peer that answers lives", func(t *testing.T) {
		c, p := newPeer(t, cfg)
		for range 20 {
			p.want("PING")
			p.do(p.WritePing(true, [8]byte{7: 1}))
		}
		if c.Err() != nil {
			t.Error(c.Err())
		}
	})
	bubble(t, "one that speaks is not asked", func(t *testing.T) {
		_, p := newPeer(t, cfg)
		for range 20 {
			time.Sleep(9 * time.Second)
			p.do(p.WritePing(true, [8]byte{}))
		}
		if len(p.frames) > 0 {
			t.Errorf("the client sent %s", <-p.frames)
		}
	})
	bubble(t, "a silent one is dead", func(t *testing.T) {
		c, p := newPeer(t, cfg)
		began := time.Now()
		p.want("PING")
		<-c.Done()
		if since := time.Since(began); !errors.Is(c.Err(), h2client.ErrSilent) || since != 20*time.Second {
			t.Errorf("after %v: %v", since, c.Err())
		}
	})
	bubble(t, "and so is one that speaks and does not read", func(t *testing.T) {
		c, p := newPeer(t, cfg)
		p.pause()
		began := time.Now()
		go func() { _, _ = c.RoundTrip(get(t, "/")) }()
		for c.Err() == nil && time.Since(began) < time.Minute {
			_ = p.WritePing(true, [8]byte{})
			time.Sleep(time.Second)
		}
		if since := time.Since(began); !errors.Is(c.Err(), h2client.ErrStuck) || since > 31*time.Second {
			t.Errorf("after %v: %v", since, c.Err())
		}
		p.resume()
	})
	bubble(t, "Ping", func(t *testing.T) {
		c, p := newPeer(t, small)
		go func() {
			p.want("PING")
			time.Sleep(time.Second)
			_ = p.WritePing(true, [8]byte{7: 1})
		}()
		if err := c.Ping(t.Context()); err != nil {
			t.Error(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := c.Ping(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		_ = c.Close()
		if err := c.Ping(t.Context()); !errors.Is(err, h2client.ErrClosed) {
			t.Error(err)
		}
	})
}

var _ http.RoundTripper = (*h2client.Conn)(nil)
