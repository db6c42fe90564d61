package node

import (
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

// Limits of the targets that every node has.
const (
	builtinHeader    = 30 * time.Second // until a request's headers are there
	builtinIdle      = 2 * time.Minute  // between two requests
	builtinMaxHeader = 64 << 10
	echoBuffer       = 32 << 10
)

// builtin are the targets that are answered inside the node: one HTTP server
// for the streams of each, with keep-alive.
type builtin struct {
	servers map[string]*http.Server
}

// newBuiltin: who tells what ping says of the node.
func newBuiltin(who func() map[string]string, log *slog.Logger) *builtin {
	server := func(h http.HandlerFunc) *http.Server {
		return &http.Server{
			Handler: h, ReadHeaderTimeout: builtinHeader, IdleTimeout: builtinIdle, MaxHeaderBytes: builtinMaxHeader,
			ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		}
	}
	return &builtin{servers: map[string]*http.Server{
		wire.TargetPing: server(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Cache-Control", "no-store")
			about := who()
			about["time"] = time.Now().UTC().Format(time.RFC3339Nano)
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(about) // the stream died: its client knows
		}),
		wire.TargetEcho: server(echoBody),
	}}
}

func (b *builtin) has(target string) bool { return b.servers[target] != nil }

// serve answers the requests of one stream until either end is done.
func (b *builtin) serve(target string, s *tunnel.Stream) {
	l := &oneConn{conn: &hooked{Conn: s, closed: make(chan struct{})}}
	_ = b.servers[target].Serve(l) // always the end of the one connection
}

// echoBody sends the request's body back while it comes.
func echoBody(w http.ResponseWriter, r *http.Request) {
	ctl := http.NewResponseController(w)
	if err := ctl.EnableFullDuplex(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	kind := r.Header.Get("Content-Type")
	if kind == "" {
		kind = "application/octet-stream"
	}
	w.Header().Set("Content-Type", kind)
	if l := r.Header.Get("Content-Length"); l != "" && r.ContentLength >= 0 {
		w.Header().Set("Content-Length", l)
	}
	w.WriteHeader(http.StatusOK)
	buf := make([]byte, echoBuffer)
	for {
		n, err := r.Body.Read(buf)
		if _, werr := w.Write(buf[:n]); werr != nil {
			return
		}
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			panic(http.ErrAbortHandler) // what came back is not the whole
		}
		if err := ctl.Flush(); err != nil {
			return
		}
	}
}

// oneConn is a listener that accepts one connection, and ends with it.
type oneConn struct {
	mu   sync.Mutex
	conn *hooked
	done bool
}

// Accept returns the connection, then waits for its end.
func (l *oneConn) Accept() (net.Conn, error) {
	l.mu.Lock()
	first := !l.done
	l.done = true
	l.mu.Unlock()
	if first {
		return l.conn, nil
	}
	<-l.conn.closed
	return nil, net.ErrClosed
}

// Close leaves the connection alone: the server closes it.
func (l *oneConn) Close() error { return nil }

// Addr is not that of any socket.
func (l *oneConn) Addr() net.Addr { return l.conn.LocalAddr() }

// hooked tells when it is closed.
type hooked struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

// Close closes the stream.
func (h *hooked) Close() error {
	err := h.Conn.Close()
	h.once.Do(func() { close(h.closed) })
	return err
}
