// Package admin serves what operators' tools ask every role over HTTP:
// /metrics, /livez and /readyz. It listens on loopback unless told otherwise,
// and shows no secret: profiles are on the local socket only.
package admin

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"

	"sallyport/internal/httpserve"
)

// maxConns bounds the scrapers and probes that are connected at one time.
const maxConns = 64

// Config of a [Server].
type Config struct {
	Addr     string              // ADMIN_LISTEN, host:port
	Gatherer prometheus.Gatherer // what /metrics shows
	Live     func() error        // nil: alive while it answers. An error is 503 with its text
	Ready    func() error        // nil: always ready. An error is 503 with its text
	Log      *slog.Logger
}

// Server answers /metrics, /livez and /readyz.
type Server struct {
	ln   net.Listener
	http *http.Server
}

// NewRegistry returns a registry with the Go runtime's, the process's and the
// program's own version in it. Every role of a process has its own.
func NewRegistry(version string) *prometheus.Registry {
	reg := prometheus.NewRegistry()
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "sallyport_build_info", Help: "Always 1; the version stands in the label.",
		ConstLabels: prometheus.Labels{"version": version},
	})
	build.Set(1)
	reg.MustRegister(build, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return reg
}

// Listen opens the port; [Server.Run] answers on it.
func Listen(cfg Config) (*Server, error) {
	ln, err := net.Listen("tcp", cfg.Addr)
	if err != nil {
		return nil, fmt.Errorf("admin listener: %w (choose another *_ADMIN_LISTEN)", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(cfg.Gatherer, promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(cfg.Log.Handler(), slog.LevelWarn), MaxRequestsInFlight: 4, Timeout: 10 * time.Second,
	}))
	mux.Handle("GET /livez", probe(cfg.Live))
	mux.Handle("GET /readyz", probe(cfg.Ready))
	return &Server{
		ln: netutil.LimitListener(ln, maxConns),
		http: &http.Server{
			Handler:           mux,
			ReadHeaderTimeout: 5 * time.Second,
			ReadTimeout:       10 * time.Second,
			WriteTimeout:      30 * time.Second,
			IdleTimeout:       time.Minute,
			MaxHeaderBytes:    16 << 10,
			ErrorLog:          slog.NewLogLogger(cfg.Log.Handler(), slog.LevelDebug),
		},
	}, nil
}

// Addr is the address in use, with the port that the system chose for port 0.
func (s *Server) Addr() net.Addr { return s.ln.Addr() }

// Close frees the port of a server that never ran.
func (s *Server) Close() error { return s.ln.Close() }

// Run serves until ctx ends; requests that run then get a second.
func (s *Server) Run(ctx context.Context) error {
	if err := httpserve.Until(ctx, s.http, s.ln, time.Second); err != nil {
		return fmt.Errorf("admin listener: %w", err)
	}
	return nil
}

func probe(check func() error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("Cache-Control", "no-store")
		if check != nil {
			if err := check(); err != nil {
				w.WriteHeader(http.StatusServiceUnavailable)
				_, _ = fmt.Fprintln(w, err)
				return
			}
		}
		_, _ = fmt.Fprintln(w, "ok")
	})
}
