package channel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"

	"sallyport/internal/wire"
)

type connKey struct{}

// FromContext returns the connection by which a request came; nil for none.
func FromContext(ctx context.Context) *Conn {
	c, _ := ctx.Value(connKey{}).(*Conn)
	return c
}

// Serve answers the requests of an upstream peer until the connection ends or
// ctx is done, and then returns when every handler has. Handlers must heed the
// context of their request.
func (c *Conn) Serve(ctx context.Context, h http.Handler) error {
	if c.dir != PeerUpstream {
		return fmt.Errorf("serve %s: %w: it is downstream", c.peer, ErrWrongSide)
	}
	stop := context.AfterFunc(ctx, func() { c.Close(context.Cause(ctx)) })
	defer stop()
	g := &countingHandler{next: &gate{next: h, conn: c}}
	err := c.t.serve(context.WithValue(ctx, connKey{}, c), g)
	if err == nil {
		err = ErrPeerGone
	}
	c.Close(err)
	g.wait()
	return c.Err()
}

// countingHandler knows when the last handler of a connection has returned.
type countingHandler struct {
	next http.Handler

	mu   sync.Mutex
	shut bool
	wg   sync.WaitGroup
}

func (h *countingHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	if h.shut {
		h.mu.Unlock()
		return
	}
	h.wg.Add(1)
	h.mu.Unlock()
	defer h.wg.Done()
	h.next.ServeHTTP(w, r)
}

func (h *countingHandler) wait() {
	h.mu.Lock()
	h.shut = true
	h.mu.Unlock()
	h.wg.Wait()
}

// gate stands before the handler of a channel: it counts streams and holds limits.
type gate struct {
	next http.Handler
	conn *Conn
}

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := g.conn
	c.streamBegins()
	defer c.streamEnds()
	if c.named.CompareAndSwap(false, true) {
		switch class := r.Header.Get(wire.HeaderClass); class {
		case ClassAdmin, ClassSession:
			c.class.Store(&class)
		}
	}
	if r.Method == http.MethodConnect {
		if c.drained.Load() {
			Refuse(w, http.StatusServiceUnavailable, ErrDraining.Error())
			return
		}
		g.next.ServeHTTP(w, r)
		return
	}
	limit := c.limits.MaxBody
	if c.Enrolling() {
		limit = wire.MaxEnrollBody
	}
	if r.ContentLength > limit {
		Refuse(w, http.StatusRequestEntityTooLarge, fmt.Sprintf("body of %d bytes is above the limit of %d", r.ContentLength, limit))
		return
	}
	r.Body = http.MaxBytesReader(w, r.Body, limit)
	if r.Method == http.MethodPost && r.URL.Path == wire.PathDrain {
		c.requestDrain()
	}
	g.next.ServeHTTP(w, r)
}

// Answer answers a request with a value as JSON.
func Answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the peer went: it asks again
}

// Decode reads the body of a request, one JSON value of at most limit bytes, or
// refuses it.
func Decode(w http.ResponseWriter, r *http.Request, limit int64, v any) bool {
	err := wire.DecodeJSON(http.MaxBytesReader(w, r.Body, limit+1), limit, v)
	if err == nil {
		return true
	}
	status := http.StatusBadRequest
	if errors.Is(err, wire.ErrTooLarge) {
		status = http.StatusRequestEntityTooLarge
	}
	Refuse(w, status, r.URL.Path+": "+err.Error())
	return false
}

// Refuse answers a request with a status and, in Sallyport-Error, the reason
// that a [RefusedError] at the other end gives. Reason is one line.
func Refuse(w http.ResponseWriter, status int, reason string) {
	w.Header().Set(wire.HeaderError, headerText(reason))
	w.WriteHeader(status)
}

// headerText keeps what may stand in a header value, at most 512 bytes.
func headerText(s string) string {
	b := make([]byte, 0, min(len(s), 512))
	for i := 0; i < len(s) && len(b) < 512; i++ {
		switch ch := s[i]; {
		case ch < ' ' || ch == 0x7f:
			b = append(b, ' ')
		default:
			b = append(b, ch)
		}
	}
	return string(b)
}
