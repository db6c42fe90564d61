package rcp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/session"
	"sallyport/internal/wire"
)

// maxTries is how many ways to a party one CONNECT may try.
const maxTries = 3

// refused is why a CONNECT goes no further. Statuses: 400 unreadable, 403 not
// for this upstream, 404 nobody knows the party, 502 the next hop failed, 503
// the party is known and not there now, 504 the next hop does not answer, 508
// the path leads in a circle or over more than wire.MaxHops RCPs.
type refused struct {
	status int
	reason string // from the hop that refused to here, as a path
}

func (e *refused) Error() string { return fmt.Sprintf("%d %s", e.status, e.reason) }

func refusef(status int, format string, args ...any) *refused {
	return &refused{status, fmt.Sprintf(format, args...)}
}

// journey is what a CONNECT carries besides its target.
type journey struct {
	to   target
	host string    // the authority, as it was written
	hops int       // RCPs that may still be passed, this one included
	via  []wire.ID // RCPs passed

	requested bool // an operator is shown the pending party's request
}

func (r *Relay) parseJourney(req *http.Request) (journey, *refused) {
	j := journey{host: req.Host, hops: wire.MaxHops, requested: req.Header.Get(wire.HeaderRequested) != ""}
	id, key, err := wire.ParseAuthority(req.Host)
	if err != nil {
		return j, refusef(http.StatusBadRequest, "%v", err)
	}
	j.to = target{id, key}
	if s := req.Header.Get(wire.HeaderHops); s != "" {
		if j.hops, err = strconv.Atoi(s); err != nil || j.hops < 0 || j.hops > wire.MaxHops {
			return j, refusef(http.StatusBadRequest, "header %s is %q, want 0 to %d", wire.HeaderHops, wire.Quotable(s), wire.MaxHops)
		}
	}
	if s := req.Header.Get(wire.HeaderVia); s != "" {
		parts := strings.Split(s, ",")
		if len(parts) > wire.MaxHops {
			return j, refusef(http.StatusLoopDetected, "more than %d RCPs were passed", wire.MaxHops)
		}
		for _, p := range parts {
			id, err := wire.ParseID(strings.TrimSpace(p))
			if err != nil {
				return j, refusef(http.StatusBadRequest, "header %s: %v", wire.HeaderVia, err)
			}
			j.via = append(j.via, id)
		}
	}
	if slices.Contains(j.via, r.id.ID()) {
		return j, refusef(http.StatusLoopDetected, "loop: this CONNECT was here before")
	}
	if j.hops < 1 {
		return j, refusef(http.StatusLoopDetected, "the CONNECT passed %d RCPs already, the limit", wire.MaxHops)
	}
	return j, nil
}

// connect serves one CONNECT of an upstream peer, to its end.
func (r *Relay) connect(w http.ResponseWriter, req *http.Request, up *channel.Conn) {
	began := time.Now()
	r.running.Add(1)
	r.metrics.streams.Inc()
	defer func() {
		r.metrics.streams.Dec()
		r.running.Add(-1)
		r.ended.Add(1)
	}()
	bytes, err := r.route(w, req, up)
	log := r.log.With("target", wire.Quotable(req.Host), "upstream", up.Peer().String())
	if no, ok := errors.AsType[*refused](err); ok {
		r.metrics.connects.WithLabelValues(strconv.Itoa(no.status)).Inc()
		log.Info("CONNECT refused", "status", no.status, "reason", no.reason)
		channel.Refuse(w, no.status, printable("rcp "+r.id.ID().Short()+": "+no.reason, 500))
		return
	}
	r.metrics.connects.WithLabelValues("200").Inc()
	log.Debug("CONNECT ended", "took", time.Since(began), "bytes_down", bytes.down.Load(), "bytes_up", bytes.up.Load(), "error", err)
}

// route finds who answers a CONNECT and lets him. The error is a *refused as
// long as nothing was answered.
func (r *Relay) route(w http.ResponseWriter, req *http.Request, up *channel.Conn) (*traffic, error) {
	bytes := &traffic{m: r.metrics}
	j, no := r.parseJourney(req)
	if no != nil {
		return bytes, no
	}
	if j.to == (target{id: r.id.ID()}) || j.to == (target{key: r.id.KeyHash()}) {
		return bytes, r.answerSelf(w, req, up, j.to)
	}
	if up.Enrolling() {
		return bytes, refusef(http.StatusForbidden, "this RCP is not enrolled yet: only its own key can be reached")
	}
	if r.draining.Load() != nil {
		return bytes, refusef(http.StatusServiceUnavailable, "the RCP is draining")
	}
	w, req = bytes.count(w, req)
	if j.requested && j.to.key != "" {
		r.roster.requested(j.to)
	}
	ways, gone := r.table.route(j.to)
	if len(ways) == 0 {
		return bytes, unreachable(j, gone)
	}
	var last *refused
	tries := 0
	for _, way := range ways {
		for _, a := range r.nextHops(j, way) {
			if tries++; tries > maxTries || req.Context().Err() != nil {
				break
			}
			header, no := r.headerFor(j, way)
			if no != nil {
				last = worse(last, no)
				continue
			}
			answered, err := a.forward(w, req, j.host, header)
			if answered {
				return bytes, err
			}
			last = worse(last, explain(a, err))
		}
	}
	if last == nil { // it left between the table and the roster
		last = refusef(http.StatusServiceUnavailable, "%s has just gone", j.name())
	}
	return bytes, last
}

func (j journey) name() string {
	if j.to.key != "" {
		return "pending party " + j.to.key.Fingerprint()
	}
	return "party " + string(j.to.id)
}

func unreachable(j journey, gone *entry) *refused {
	if gone == nil {
		return refusef(http.StatusNotFound, "%s is not connected here", j.name())
	}
	who := j.name()
	if gone.peer.Role != "" {
		who = fmt.Sprintf("%s %s", gone.peer.Role, gone.peer.ID)
	}
	return refusef(http.StatusServiceUnavailable, "%s is gone since %s: %s", who, gone.goneAt.UTC().Format(time.RFC3339), gone.reason)
}

// nextHops are the channels by which a way begins, best first.
func (r *Relay) nextHops(j journey, way wire.Peer) []*attached {
	if len(way.Path) == 0 {
		return r.roster.channels(j.to)
	}
	return r.roster.channels(target{id: way.Path[0]})
}

// headerFor is what goes with the CONNECT: to a party nothing, to the next RCP
// the hops that remain and the RCPs passed. Nothing else of the request is
// handed on, and the empty User-Agent keeps net/http from adding its own.
func (r *Relay) headerFor(j journey, way wire.Peer) (http.Header, *refused) {
	if len(way.Path) == 0 {
		return http.Header{"User-Agent": {""}}, nil
	}
	if slices.Contains(j.via, way.Path[0]) {
		return nil, refusef(http.StatusLoopDetected, "loop: the way to %s leads back through rcp %s", j.name(), way.Path[0])
	}
	if j.hops < 2 {
		return nil, refusef(http.StatusLoopDetected, "%s is behind rcp %s, and %d RCPs is the limit", j.name(), way.Path[0], wire.MaxHops)
	}
	via := make([]string, 0, len(j.via)+1)
	for _, id := range j.via {
		via = append(via, string(id))
	}
	h := http.Header{
		"User-Agent":    {""},
		wire.HeaderHops: {strconv.Itoa(j.hops - 1)},
		wire.HeaderVia:  {strings.Join(append(via, string(r.id.ID())), ",")},
	}
	if j.requested {
		h.Set(wire.HeaderRequested, "1")
	}
	return h, nil
}

// explain turns the failure of the next hop into a status.
func explain(a *attached, err error) *refused {
	var no *channel.RefusedError
	switch {
	case errors.As(err, &no) && a.peer.Party.Role == wire.RoleRCP:
		switch no.Status {
		case http.StatusNotFound, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout, http.StatusLoopDetected:
			return refusef(no.Status, "%s", no.Reason) // it names its RCP itself
		}
		return refusef(http.StatusBadGateway, "%s: %v", a.peer, no)
	case errors.As(err, &no) && no.Status == http.StatusServiceUnavailable:
		return refusef(http.StatusServiceUnavailable, "%s: %v", a.peer, no)
	case errors.As(err, &no):
		return refusef(http.StatusBadGateway, "%s: %v", a.peer, no)
	case errors.Is(err, channel.ErrHeaderTimeout), errors.Is(err, context.DeadlineExceeded):
		return refusef(http.StatusGatewayTimeout, "%s: %v", a.peer, err)
	case errors.Is(err, channel.ErrDraining), a.conn.Err() != nil:
		return refusef(http.StatusServiceUnavailable, "%s is gone: %v", a.peer, err)
	}
	return refusef(http.StatusBadGateway, "%s: %v", a.peer, err)
}

// worse keeps the refusal that tells more: of several ways, one that failed
// tells more than one that does not exist.
func worse(a, b *refused) *refused {
	if a == nil || a.status == http.StatusNotFound || a.status == http.StatusLoopDetected && b.status != http.StatusNotFound {
		return b
	}
	return a
}

// forward joins the request with a new stream behind this channel.
func (a *attached) forward(w http.ResponseWriter, req *http.Request, authority string, h http.Header) (answered bool, err error) {
	if !mayAsk(a.peer, http.MethodConnect, authority) {
		return false, fmt.Errorf("%w: CONNECT %s to %s", errNotAllowed, authority, a.peer)
	}
	return a.conn.Forward(w, req, authority, h)
}

// answerSelf is the RCP's own session listener.
func (r *Relay) answerSelf(w http.ResponseWriter, req *http.Request, up *channel.Conn, to target) error {
	enrolling := to.key != ""
	if _, certified := r.id.Party(); !enrolling && (!certified || up.Enrolling()) {
		return refusef(http.StatusServiceUnavailable, "this RCP is not enrolled yet: reach it by its key, %s", wire.PendingAuthority(r.id.KeyHash()))
	}
	stream, err := channel.AcceptConnect(w, req)
	if err != nil {
		return err
	}
	defer func() { _ = stream.Close() }()
	if enrolling {
		return session.ServeEnroll(req.Context(), stream, r.id, r.applicant.Handler(nil))
	}
	return session.Handlers{API: r.selfHandler(), Targets: r.serveTarget}.Serve(req.Context(), stream, r.id)
}

// traffic counts the bytes of one stream: down is from the gateway.
type traffic struct {
	m        *metrics
	down, up atomic.Int64
}

func (t *traffic) count(w http.ResponseWriter, req *http.Request) (http.ResponseWriter, *http.Request) {
	r := *req
	r.Body = countedBody{req.Body, t}
	return countedWriter{w, t}, &r
}

type countedBody struct {
	io.ReadCloser
	t *traffic
}

func (b countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		b.t.down.Add(int64(n))
		b.t.m.bytesDown.Add(float64(n))
	}
	return n, err
}

type countedWriter struct {
	http.ResponseWriter
	t *traffic
}

func (w countedWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.t.up.Add(int64(n))
	w.t.m.bytesUp.Add(float64(n))
	return n, err
}

// Unwrap is for http.ResponseController.
func (w countedWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
