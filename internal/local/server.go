package local

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"path/filepath"
	"strings"
	"time"

	"sallyport/internal/httpserve"
	"sallyport/internal/wire"
)

// Server is a role's local socket.
type Server struct {
	ln   net.Listener
	dir  *os.Root
	http *http.Server
}

// Listen opens the socket dir/local.sock; [Server.Run] answers on it. The
// caller holds the lock on dir, so that a socket that is there already is a
// dead one and is replaced.
func Listen(dir string, role Role, log *slog.Logger) (*Server, error) {
	path := filepath.Join(dir, SocketName)
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("local socket: %w", err)
	}
	ln, err := listenSocket(root, path)
	if err != nil {
		_ = root.Close()
		return nil, fmt.Errorf("local socket %s: %w", path, err)
	}
	return &Server{
		ln:  &userListener{UnixListener: ln, open: map[uint32]int{}},
		dir: root,
		http: &http.Server{
			Handler:           handler(role, log),
			ConnContext:       withUser,
			ReadHeaderTimeout: 5 * time.Second,
			ReadTimeout:       2 * time.Minute, // also ends the request: a CPU profile takes half a minute
			IdleTimeout:       time.Minute,
			MaxHeaderBytes:    wire.MaxHeader,
			ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		},
	}, nil
}

func listenSocket(root *os.Root, path string) (*net.UnixListener, error) {
	if st, err := root.Lstat(SocketName); err == nil {
		if st.Mode().Type() != os.ModeSocket {
			return nil, errors.New("the path is taken by something that is no socket: remove it")
		}
		if err := root.Remove(SocketName); err != nil {
			return nil, err
		}
	}
	addr, done, err := socketAddr(path)
	if err != nil {
		return nil, err
	}
	defer done()
	ln, err := net.ListenUnix("unix", addr)
	if err != nil {
		return nil, err
	}
	ln.SetUnlinkOnClose(false) // by the name given to bind, which may be a short stand-in: Run removes the real one
	if err := root.Chmod(SocketName, 0o666); err != nil {
		_ = ln.Close()
		return nil, err
	}
	return ln, nil
}

// Close frees the socket of a server that never ran.
func (s *Server) Close() error {
	err := s.ln.Close()
	_ = s.dir.Remove(SocketName)
	return errors.Join(err, s.dir.Close())
}

// Run serves until ctx ends; requests that run then get a second.
func (s *Server) Run(ctx context.Context) error {
	defer func() {
		_ = s.dir.Remove(SocketName)
		_ = s.dir.Close()
	}()
	if err := httpserve.Until(ctx, s.http, s.ln, time.Second); err != nil {
		return fmt.Errorf("local socket: %w", err)
	}
	return nil
}

func handler(role Role, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	var events allowances
	answer := func(pattern string, f func(r *http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			v, err := f(r)
			writeAnswer(w, v, err, log)
		})
	}
	answer("GET /v1/status", func(r *http.Request) (any, error) { return status(r.Context(), role), nil })
	answer("GET /v1/instances", func(r *http.Request) (any, error) { return status(r.Context(), role).Instances, nil })
	answer("GET /v1/doctor", func(r *http.Request) (any, error) { return append([]Check{}, role.Doctor(r.Context())...), nil })
	answer("POST /v1/events", func(r *http.Request) (any, error) {
		s, ok := role.(EventSender)
		if !ok {
			return nil, &Error{CodeUnsupported, "this role has no events: send them to a node's socket"}
		}
		var e EventRequest
		if err := decode(r, &e); err != nil {
			return nil, err
		}
		if err := (wire.Event{Severity: e.Severity, Application: e.Application, Object: e.Object, Key: e.Key, Text: e.Text}).Validate(); err != nil {
			return nil, &Error{CodeInvalid, err.Error()}
		}
		for name, text := range map[string]string{"application": e.Application, "object": e.Object, "key": e.Key, "text": e.Text} {
			if strings.IndexByte(text, 0) >= 0 { // JSON made the rest UTF-8
				return nil, &Error{CodeInvalid, fmt.Sprintf("event %s contains a NUL character", name)}
			}
		}
		if err := events.spend(r.Context(), len(e.Text)+len(e.Key)+len(e.Object)+len(e.Application)); err != nil {
			return nil, err
		}
		return s.SendEvent(r.Context(), e)
	})
	answer("POST /v1/unlock", func(r *http.Request) (any, error) {
		if err := privileged(r.Context(), "unlock"); err != nil {
			return nil, err
		}
		s, ok := role.(Unlocker)
		if !ok {
			return nil, &Error{CodeUnsupported, "this role has no lock: only nodes have"}
		}
		var q unlockRequest
		if err := decode(r, &q); err != nil {
			return nil, err
		}
		return struct{}{}, s.Unlock(r.Context(), q.Instance)
	})
	answer("POST /v1/join", func(r *http.Request) (any, error) {
		if err := privileged(r.Context(), "join"); err != nil {
			return nil, err
		}
		s, ok := role.(Joiner)
		if !ok {
			return nil, &Error{CodeUnsupported, "this role does not join a gateway"}
		}
		var q joinRequest
		if err := decode(r, &q); err != nil {
			return nil, err
		}
		if _, err := wire.ParseJoinCode(q.Code); err != nil {
			return nil, &Error{CodeInvalid, err.Error()}
		}
		return struct{}{}, s.Join(r.Context(), q.Code)
	})
	profiles := http.NewServeMux()
	profiles.HandleFunc("/debug/pprof/", pprof.Index)
	profiles.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	profiles.HandleFunc("/debug/pprof/profile", pprof.Profile)
	profiles.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	profiles.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("GET /debug/pprof/", func(w http.ResponseWriter, r *http.Request) {
		if err := privileged(r.Context(), "read profiles"); err != nil { // a heap dump holds keys
			writeAnswer(w, nil, err, log)
			return
		}
		profiles.ServeHTTP(w, r)
	})
	return mux
}

// status fills the lists, so that scripts never meet null.
func status(ctx context.Context, role Role) Status {
	s := role.Status(ctx)
	s.Upstreams = append([]wire.UpstreamStatus{}, s.Upstreams...)
	s.Instances = append([]Instance{}, s.Instances...)
	for i := range s.Instances {
		s.Instances[i].Upstreams = append([]wire.UpstreamStatus{}, s.Instances[i].Upstreams...)
		s.Instances[i].Policies = append([]wire.PolicyStatus{}, s.Instances[i].Policies...)
	}
	return s
}

func decode(r *http.Request, v any) error {
	if err := wire.DecodeJSON(r.Body, maxBody, v); err != nil {
		return &Error{CodeInvalid, "request body: " + err.Error()}
	}
	return nil
}

func writeAnswer(w http.ResponseWriter, v any, err error, log *slog.Logger) {
	code := http.StatusOK
	if err != nil {
		var e *Error
		if !errors.As(err, &e) {
			e = &Error{CodeInternal, err.Error()}
		} else {
			e = &Error{e.Code, err.Error()} // with what wraps it
		}
		v = e
		if code = httpStatus[e.Code]; code == 0 {
			code = http.StatusInternalServerError
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		log.Debug("local socket: answer not delivered", "error", err)
	}
}
