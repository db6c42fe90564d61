package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"sallyport/gateway/api"
)

const (
	streamKeepAlive = 15 * time.Second
	// Live streams of one caller, and of all. Each costs a goroutine and looks
	// at the database whenever something happens. Nobody has more than are free, so
	// that a few callers who want all of them leave room for the others.
	maxStreamsPerCaller = 256
	maxStreams          = 1024
	streamWrite         = 30 * time.Second // a reader that takes nothing for so long is cut off
)

func unwrap(ctx huma.Context) (*http.Request, http.ResponseWriter) { return humago.Unwrap(ctx) }

// sendFunc sends one item of a live stream.
type sendFunc func(item any) error

// stream registers an operation that answers with server-sent events (HTML
// Living Standard, section 9.2). prepare checks the request, while an error
// can still be a status; run sends until it has nothing more, which ends the
// stream with an event "end", or fails, which ends it with a "problem".
func stream[I, T any](r *rest, op huma.Operation, need permission, prepare func(ctx context.Context, in *I) (run func(ctx context.Context, send sendFunc) error, err error)) {
	op.Method = http.MethodGet
	schema := r.api.OpenAPI().Components.Schemas
	op.Responses = map[string]*huma.Response{"200": {
		Description: "Server-sent events; the data of each is one object. The stream ends with an event named end, or problem.",
		Content:     map[string]*huma.MediaType{"text/event-stream": {Schema: schema.Schema(reflect.TypeFor[T](), true, "")}},
	}}
	handle(r, op, need, func(ctx context.Context, in *I) (*huma.StreamResponse, error) {
		if err := r.s.live.enter(ctx); err != nil {
			return nil, err
		}
		run, err := prepare(ctx, in)
		if err != nil {
			return nil, err
		}
		return &huma.StreamResponse{Body: func(hctx huma.Context) { r.pump(hctx, op.OperationID, run) }}, nil
	})
}

// liveStreams counts the live streams that are open.
type liveStreams struct {
	mu       sync.Mutex
	all      int
	byCaller map[string]int
}

// enter counts a stream of the caller of ctx until ctx ends, as every request
// does, or refuses it.
func (l *liveStreams) enter(ctx context.Context) error {
	who := askerFrom(ctx).actor.Who
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.all >= maxStreams:
		return api.NewProblem(api.CodeBusy, fmt.Sprintf("%d live streams are open, the limit: try again later", maxStreams))
	case l.byCaller[who] >= min(maxStreamsPerCaller, maxStreams-l.all):
		return api.NewProblem(api.CodeBusy, fmt.Sprintf("%s has %d live streams open, its share of %d of which %d are taken: end some of them",
			who, l.byCaller[who], maxStreams, l.all))
	}
	if l.byCaller == nil {
		l.byCaller = make(map[string]int)
	}
	l.all++
	l.byCaller[who]++
	context.AfterFunc(ctx, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.all--
		if l.byCaller[who]--; l.byCaller[who] == 0 {
			delete(l.byCaller, who)
		}
	})
	return nil
}

// pump writes one stream. It ends with the request or with the server.
func (r *rest) pump(hctx huma.Context, what string, run func(ctx context.Context, send sendFunc) error) {
	req, w := unwrap(hctx)
	ctx, cancel := context.WithCancel(req.Context())
	defer cancel()
	defer context.AfterFunc(r.streams, cancel)()
	w.Header().Set("Content-Type", "text/event-stream")
	s := &eventStream{w: w, rc: http.NewResponseController(w)}
	_ = s.rc.SetReadDeadline(time.Time{}) // the request was read; what follows is only the end
	if s.comment() != nil {
		return
	}
	idle := make(chan struct{})
	go func() {
		defer close(idle)
		t := time.NewTicker(streamKeepAlive)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
				if s.comment() != nil {
					cancel()
					return
				}
			}
		}
	}()
	err := run(ctx, func(item any) error { return s.send("", item) })
	var p *api.Problem
	switch {
	case err == nil:
		err = s.send("end", struct{}{})
	case r.streams.Err() != nil:
		err = s.send("problem", api.NewProblem(api.CodeUnavailable, "the gateway is stopping"))
	case errors.As(context.Cause(req.Context()), &p): // its token is not good any more
		err = s.send("problem", p)
	case ctx.Err() != nil: // the reader went away
	case errors.As(err, &p):
		err = s.send("problem", p)
	default:
		err = s.send("problem", r.problem(ctx, what, err))
	}
	if err != nil && ctx.Err() == nil {
		r.log.Debug("live stream broke", "operation", what, "error", err)
	}
	cancel()
	<-idle
}

// eventStream writes server-sent events; a keep-alive may come between them.
type eventStream struct {
	mu sync.Mutex
	w  http.ResponseWriter
	rc *http.ResponseController
}

func (s *eventStream) write(b []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.rc.SetWriteDeadline(time.Now().Add(streamWrite)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return err
	}
	if _, err := s.w.Write(b); err != nil {
		return err
	}
	return s.rc.Flush()
}

func (s *eventStream) comment() error { return s.write([]byte(": keep-alive\n\n")) }

func (s *eventStream) send(name string, item any) error {
	data, err := json.Marshal(item)
	if err != nil {
		return err
	}
	b := make([]byte, 0, len(data)+len(name)+20)
	if name != "" {
		b = append(append(append(b, "event: "...), name...), '\n')
	}
	b = append(append(append(b, "data: "...), data...), "\n\n"...)
	return s.write(b)
}
