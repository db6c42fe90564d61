package node

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
	"sallyport/node/policy"
)

const (
	// targetDial is how long a target may take to be connected, TLS included.
	targetDial = 10 * time.Second
	// maxTargetConns bounds the connections of one instance: each takes two
	// files and two goroutines where a process may have 20,000 files.
	maxTargetConns = 4096
	// refusalsPerSecond are logged; a gateway that asks for more fills no disk.
	refusalsPerSecond = 1
	refusalsBurst     = 10
)

// targets is what a gateway can reach through one instance: the applied
// policies of type target, within the bounds of the host, and two targets that
// are answered here.
type targets struct {
	engine *policy.Engine
	reach  *policy.Reach
	closed func() (tunnel.Code, string) // why nothing is served at all; 0: it is
	own    *builtin
	tls    *tls.Config
	log    *slog.Logger

	refusals *rate.Limiter // of the log
	silent   atomic.Int64  // refusals that were not logged

	open     atomic.Int64
	accepted atomic.Int64
	sent     atomic.Int64 // bytes from targets, of connections that ended
	received atomic.Int64 // bytes to targets, the same

	mu      sync.Mutex
	refused map[tunnel.Code]int64
}

func newTargets(engine *policy.Engine, reach *policy.Reach, own *builtin, closed func() (tunnel.Code, string), log *slog.Logger) *targets {
	return &targets{
		engine: engine, reach: reach, own: own, closed: closed, log: log,
		tls: &tls.Config{
			MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, // inside runs what a gateway relays
			ClientSessionCache: tls.NewLRUClientSessionCache(64),
		},
		refusals: rate.NewLimiter(refusalsPerSecond, refusalsBurst), refused: map[tunnel.Code]int64{},
	}
}

// refusedError is why a stream is not served.
type refusedError struct {
	code tunnel.Code
	err  error
}

func (e *refusedError) Error() string { return e.err.Error() }

func refuse(code tunnel.Code, format string, args ...any) error {
	return &refusedError{code, fmt.Errorf(format, args...)}
}

// serve answers one stream to a target, from its open to its end.
func (t *targets) serve(ctx context.Context, target string, s *tunnel.Stream) {
	if n := t.open.Add(1); n > maxTargetConns {
		t.open.Add(-1)
		t.refuse(target, s, refuse(tunnel.Overloaded, "%d connections to targets are open", maxTargetConns))
		return
	}
	defer t.open.Add(-1)
	if code, why := t.closed(); code != 0 {
		t.refuse(target, s, refuse(code, "%s", why))
		return
	}
	if t.own.has(target) {
		t.accepted.Add(1)
		t.own.serve(target, s)
		return
	}
	spec, offered, ok := t.engine.Target(target)
	if !ok {
		t.refuse(target, s, refuse(tunnel.NotFound, "the node offers no target %q", wire.Quotable(target)))
		return
	}
	conn, err := t.dial(ctx, spec)
	if err != nil {
		t.refuse(target, s, err)
		return
	}
	t.accepted.Add(1)
	sent, received, err := tunnel.Join(offered, s, conn)
	t.sent.Add(sent)
	t.received.Add(received)
	t.log.Debug("connection to a target ended", "target", target, "sent", sent, "received", received, "reason", err)
}

// dial connects to a target. Its errors are of type *refusedError.
func (t *targets) dial(ctx context.Context, spec wire.TargetSpec) (net.Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, targetDial, fmt.Errorf("not within %v", targetDial))
	defer cancel()
	where := spec.HostPort()
	conn, err := t.reach.Dial(ctx, spec)
	if err != nil {
		return nil, dialError(ctx, where, err)
	}
	if spec.Scheme() != wire.SchemeHTTPS {
		return conn, nil
	}
	conf := t.tls.Clone()
	conf.ServerName, _, err = net.SplitHostPort(where)
	if err != nil {
		_ = conn.Close()
		return nil, dialError(ctx, where, err)
	}
	secure := tls.Client(conn, conf)
	if err := secure.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		return nil, dialError(ctx, where, fmt.Errorf("TLS: %w", err))
	}
	return &tlsConn{Conn: secure, raw: conn}, nil
}

// tlsConn says goodbye to its service only where our direction ended well: a
// gateway that died must not look like the end of a body.
type tlsConn struct {
	*tls.Conn
	raw   *net.TCPConn
	ended atomic.Bool
}

// CloseWrite ends our direction.
func (c *tlsConn) CloseWrite() error {
	c.ended.Store(true)
	return c.Conn.CloseWrite()
}

// Close resets the connection unless our direction has ended.
func (c *tlsConn) Close() error {
	if c.ended.Load() {
		return c.Conn.Close()
	}
	_ = c.raw.SetLinger(0)
	return c.raw.Close()
}

func dialError(ctx context.Context, where string, err error) error {
	var timeout net.Error
	switch {
	case errors.Is(err, policy.ErrNotAllowed):
		return &refusedError{tunnel.Forbidden, err}
	case errors.Is(ctx.Err(), context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return refuse(tunnel.Timeout, "dial %s: not within %v", where, targetDial)
	}
	return refuse(tunnel.Unreachable, "dial %s: %w", where, err)
}

// refuse tells the other end, the metrics and, not too often, the log.
func (t *targets) refuse(target string, s *tunnel.Stream, err error) {
	code := tunnel.Failed
	if r, ok := errors.AsType[*refusedError](err); ok {
		code = r.code
	}
	s.Refuse(code, err.Error())
	t.mu.Lock()
	t.refused[code]++
	t.mu.Unlock()
	if !t.refusals.Allow() {
		t.silent.Add(1)
		return
	}
	t.log.Warn("target refused", "target", wire.Quotable(target), "code", code.String(), "reason", err, "not_logged", t.silent.Swap(0))
}

// refusalsByCode is for the metrics.
func (t *targets) refusalsByCode() map[tunnel.Code]int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make(map[tunnel.Code]int64, len(t.refused))
	for code, n := range t.refused {
		out[code] = n
	}
	return out
}

// serveTarget serves a stream that a gateway opened. A read-only node serves
// it: nothing on the host changes.
func (in *instance) serveTarget(ctx context.Context, target string, s *tunnel.Stream) {
	if id, ok := wire.ParseParkedTarget(target); ok {
		in.serveParked(ctx, id, s)
		return
	}
	if kind, host, ok := wire.ParseChallengeTarget(target); ok {
		in.challenges.serve(ctx, kind, host, s)
		return
	}
	in.targets.serve(ctx, target, s)
}

// closedToTargets is why this node reaches nothing for its gateway.
func (in *instance) closedToTargets() (tunnel.Code, string) {
	if in.id.Revoked(in.id.KeyHash()) {
		return tunnel.Locked, "the node is revoked"
	}
	if why := in.lock.locked(); why != "" {
		return tunnel.Locked, why
	}
	if why := in.lock.draining(); why != "" {
		return tunnel.Draining, why
	}
	return 0, ""
}
