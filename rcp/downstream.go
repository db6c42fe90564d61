package rcp

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"golang.org/x/time/rate"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

const (
	signalRate   = 10 // lines per second of one node; what is above waits in its own stream
	signalBurst  = 20
	peersRate    = 2000 // lines per second of one RCP below us
	peersBurst   = 20000
	answerWithin = 10 * time.Second // for response headers of everything but CONNECT
	retryFirst   = time.Second      // a stream of signals or peers that ended is asked for again
	retryMost    = time.Minute

	// replaceGrace is what a replaced channel gets to finish what runs on it.
	replaceGrace = 30 * time.Second
)

// errNotAllowed guards the closed list below; it shows a mistake of ours.
var errNotAllowed = errors.New("an RCP never sends this downstream")

// mayAsk is the closed list of requests that an RCP sends to whoever hangs on
// it. A node gets nothing that would make it do something but answer; an RCP
// below gets what an RCP answers to its upstreams. While a party is pending
// its key can be reached, and nothing else.
//
// Artifacts stand in the list because they are part of what a node accepts;
// this program does not send them yet.
func mayAsk(p identity.Peer, method, target string) bool {
	if p.Pending {
		return method == http.MethodConnect && target == wire.PendingAuthority(p.Key)
	}
	switch p.Party.Role {
	case wire.RoleNode:
		switch method {
		case http.MethodConnect:
			return target == wire.ConnectAuthority(p.Party.ID)
		case http.MethodGet:
			return target == wire.PathSignals
		case http.MethodPost:
			return target == wire.PathDrain || target == wire.PathLanes
		case http.MethodPut:
			return strings.HasPrefix(target, wire.PathArtifacts) && !strings.Contains(target[len(wire.PathArtifacts):], "/")
		}
	case wire.RoleRCP:
		switch method {
		case http.MethodConnect:
			_, _, err := wire.ParseAuthority(target)
			return err == nil
		case http.MethodGet:
			return target == wire.PathPeers || strings.HasPrefix(target, wire.PathPeers+"?")
		case http.MethodPost:
			return target == wire.PathDrain || target == wire.PathLanes
		case http.MethodPut:
			return target == wire.PathRevocations
		}
	}
	return false
}

// ask sends one request. The answer's headers must come within answerWithin;
// its body lives as long as ctx.
func (a *attached) ask(ctx context.Context, method, path string, body []byte) (*http.Response, error) {
	if !mayAsk(a.peer, method, path) {
		return nil, fmt.Errorf("%w: %s %s to %s", errNotAllowed, method, path, a.peer)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	late := time.AfterFunc(answerWithin, func() { cancel(fmt.Errorf("%s %s: no answer within %s", method, path, answerWithin)) })
	req, err := http.NewRequestWithContext(ctx, method, "http://peer"+path, bytes.NewReader(body))
	if err != nil {
		cancel(nil)
		return nil, err
	}
	resp, err := a.conn.RoundTrip(req)
	if !late.Stop() && err == nil {
		_ = resp.Body.Close()
		err = context.Cause(ctx)
	}
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		cancel(nil)
		return nil, fmt.Errorf("%s: %w", a.peer, err)
	}
	resp.Body = &endedBody{resp.Body, func() { cancel(nil) }}
	if resp.StatusCode/100 != 2 {
		_ = resp.Body.Close()
		return nil, fmt.Errorf("%s: %s %s: %s", a.peer, method, path, resp.Status)
	}
	return resp, nil
}

type endedBody struct {
	io.ReadCloser
	end func()
}

func (b *endedBody) Close() error {
	b.end()
	return b.ReadCloser.Close()
}

// notifier is the body of a channel's response: f is called when there is
// something to read, or the end, unless that is so already.
type notifier interface {
	Notify(f func()) (later bool)
}

func (b *endedBody) Notify(f func()) (later bool) {
	n, ok := b.ReadCloser.(notifier)
	return ok && n.Notify(f)
}

// tell sends one small document whose answer does not matter.
func (a *attached) tell(ctx context.Context, method, path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	resp, err := a.ask(ctx, method, path, b)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// serveDownstream keeps company with one channel whose other side is
// downstream, from its first moment to its end; or, where the channel can stay by
// itself, until there is nothing to do.
func (r *Relay) serveDownstream(ctx context.Context, conn link) {
	a := r.welcome(ctx, conn)
	if a == nil {
		return
	}
	if a.peer.Pending || a.peer.Party.Role == wire.RoleNode {
		e := &ear{r: r, a: a, retry: retryFirst}
		if conn.Stay(e.end) {
			e.open()
			return
		}
	}
	if err := r.listenTo(a); err != nil {
		r.cut(a, err)
	}
	select {
	case <-conn.Done():
	case <-ctx.Done():
		conn.Close(context.Cause(ctx))
		<-conn.Done()
	}
	r.farewell(a)
}

func (r *Relay) farewell(a *attached) {
	r.roster.leave(a, reasonText(a.conn.Err()))
	r.logOf(a.conn).Info("channel down", "reason", a.conn.Err())
}

func (r *Relay) logOf(conn link) *slog.Logger {
	return r.log.With("peer", conn.Peer().String(), "source", conn.RemoteAddr(), "carrier", conn.Carrier())
}

// welcome takes a channel in; it returns nil if that was refused.
func (r *Relay) welcome(ctx context.Context, conn link) *attached {
	a, err := r.roster.join(ctx, conn)
	if err != nil {
		r.metrics.refuse(err)
		r.logOf(conn).Warn("channel refused", "error", err)
		conn.Close(err)
		return nil
	}
	if r.id.Ended(a.peer) { // the set arrived between the handshake and here
		conn.Close(identity.ErrRevoked)
	}
	r.logOf(conn).Info("channel up", "dialled", conn.Dialled())
	return a
}

func (r *Relay) cut(a *attached, err error) {
	r.metrics.refuse(err)
	r.logOf(a.conn).Warn("channel cut", "error", err)
	a.conn.Close(err)
}

// drain ends a channel gently: the party is told, and what runs may finish.
func (r *Relay) drain(ctx context.Context, a *attached, d wire.Drain) {
	a.hush()
	if err := a.conn.Drain(ctx, d); err != nil {
		r.log.Debug("channel cut while draining", "peer", a.peer.String(), "error", err)
	}
}

// listenTo reads what the party says of itself, or of those behind it, until
// the channel ends. An error means that the channel must be cut.
func (r *Relay) listenTo(a *attached) error {
	ctx := a.listening
	read := r.readSignals
	switch {
	case a.peer.Pending:
		select {
		case <-a.conn.Done():
		case <-ctx.Done():
		}
		return nil
	case a.peer.Party.Role == wire.RoleRCP:
		m := r.mirrors.take(a.peer.Party.ID)
		defer r.mirrors.release(m)
		read = m.read
		if err := r.tellRevocations(ctx, a); err != nil {
			r.log.Debug("revocations not delivered", "peer", a.peer.String(), "error", err)
		}
	}
	wait := retryFirst
	for {
		began := time.Now()
		err := read(ctx, a)
		if err := forged(err); err != nil {
			return err
		}
		if time.Since(began) > retryMost {
			wait = retryFirst
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
			r.log.Debug("stream of the peer ended; asking again", "peer", a.peer.String(), "error", err)
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-a.conn.Done():
			timer.Stop()
			return nil
		}
		wait = min(2*wait, retryMost)
	}
}

// forged is why a channel must be cut on which reading ended with err; nil: it
// need not be.
func forged(err error) error {
	switch {
	case errors.Is(err, errForged):
		return err
	case errors.Is(err, wire.ErrTooLarge), errors.Is(err, wire.ErrMalformed):
		return fmt.Errorf("%w: %w", errForged, err)
	}
	return nil
}

// readSignals holds GET /v1/signals of a node. Its lines are taken at
// signalRate; a node that sends more waits.
func (r *Relay) readSignals(ctx context.Context, a *attached) error {
	s, err := r.openSignals(ctx, a)
	if err != nil {
		return err
	}
	defer func() { _ = s.body.Close() }()
	for err == nil {
		err = r.nextSignal(ctx, a, s)
	}
	return err
}

// signals is the stream of one node's signals.
type signals struct {
	body  io.ReadCloser
	lines *wire.LineReader
	pace  *rate.Limiter
}

func (r *Relay) openSignals(ctx context.Context, a *attached) (*signals, error) {
	resp, err := a.ask(ctx, http.MethodGet, wire.PathSignals, nil) //nolint:bodyclose // readSignals closes it
	if err != nil {
		return nil, err
	}
	return &signals{body: resp.Body, lines: wire.NewLineReader(resp.Body, wire.MaxSignalLine), pace: rate.NewLimiter(signalRate, signalBurst)}, nil
}

func (r *Relay) nextSignal(ctx context.Context, a *attached, s *signals) error {
	var line wire.Signal
	if err := s.lines.Next(&line); err != nil {
		return err
	}
	if err := s.pace.Wait(ctx); err != nil {
		return err
	}
	if err := r.roster.signal(a, line); err != nil {
		return err
	}
	r.metrics.signals.Inc()
	return nil
}

// tellRevocations hands the set that we hold to an RCP below us.
func (r *Relay) tellRevocations(ctx context.Context, a *attached) error {
	_, env := r.id.Revocations()
	if env == nil {
		return nil
	}
	return a.tell(ctx, http.MethodPut, wire.PathRevocations, env)
}

// reasonText is what a gateway is shown about the end of a channel.
func reasonText(err error) string {
	if err == nil {
		return "channel closed"
	}
	return printable(err.Error(), 200)
}

// printable makes text fit for a header or a log line: one line of ASCII.
func printable(s string, limit int) string {
	if len(s) > limit {
		s = s[:limit]
	}
	return strings.Map(func(c rune) rune {
		if c < ' ' || c > '~' {
			return ' '
		}
		return c
	}, s)
}
