package simnode

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/session"
	"sallyport/internal/wire"
)

const (
	// signalEvery spaces the lines of one stream; an RCP takes 10 a second.
	signalEvery = 150 * time.Millisecond
	// outboxChunk is about how much of an outbox is written at once.
	outboxChunk = 32 << 10
)

// channelHandler is what an upstream can ask of a simulated node: the same as
// of a real one.
type channelHandler struct {
	n          *node
	c          *channel.Conn
	generation int64
}

func (h *channelHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.Method == http.MethodConnect:
		h.connect(w, r)
	case h.c.Enrolling():
		channel.Refuse(w, http.StatusNotFound, "this channel is for enrolment")
	case r.Method == http.MethodGet && r.URL.Path == wire.PathSignals:
		h.signals(w, r)
	case r.Method == http.MethodPost && r.URL.Path == wire.PathDrain:
		w.WriteHeader(http.StatusNoContent) // the channel itself sees to its replacement
	default:
		channel.Refuse(w, http.StatusNotFound, "a node answers no such request")
	}
}

func (h *channelHandler) connect(w http.ResponseWriter, r *http.Request) {
	n := h.n
	id, key, err := wire.ParseAuthority(r.Host)
	applicant := n.applicant.Load()
	switch {
	case err != nil:
		channel.Refuse(w, http.StatusBadRequest, err.Error())
		return
	case key != "" && (!h.c.Enrolling() || key != n.id.KeyHash() || applicant == nil), key == "" && (h.c.Enrolling() || id != n.id.ID()):
		channel.Refuse(w, http.StatusNotFound, "this is another node")
		return
	}
	stream, err := channel.AcceptConnect(w, r)
	if err != nil {
		return
	}
	defer func() { _ = stream.Close() }()
	if key != "" {
		_ = session.ServeEnroll(r.Context(), stream, n.id, applicant.Handler(n)) // the gateway comes again
		return
	}
	n.w.count.sessions.Add(1)
	defer n.w.count.sessions.Add(-1)
	_ = session.Serve(r.Context(), stream, n.id, n) // likewise
}

// signals answers GET /v1/signals until the channel ends.
func (h *channelHandler) signals(w http.ResponseWriter, r *http.Request) {
	ctl := http.NewResponseController(w)
	w.Header().Set("Content-Type", "application/x-ndjson")
	n := h.n
	n.w.count.connected.Add(1)
	defer n.w.count.connected.Add(-1)
	var last wire.Signal
	lastKicks := int64(-1)
	for {
		s, kicks, changed := n.signal(h.generation)
		s.Draining = h.c.Draining()
		if kicks != lastKicks || s.Digest != last.Digest || s.Draining != last.Draining || len(s.Hints) != len(last.Hints) {
			line, err := wire.AppendLine(nil, s)
			if err != nil {
				return
			}
			if _, err := w.Write(line); err != nil {
				return
			}
			if err := ctl.Flush(); err != nil {
				return
			}
			last, lastKicks = s, kicks
			if !Pause(r.Context(), signalEvery) {
				return
			}
		}
		drain := h.c.DrainRequested()
		if last.Draining {
			drain = nil
		}
		select {
		case <-changed:
		case <-drain:
		case <-r.Context().Done():
			return
		}
	}
}

// Pause waits; false when ctx ended first.
func Pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// ServeHTTP is the session API.
func (n *node) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if late := time.Until(time.Unix(0, n.slowUntil.Load())); late > 0 && !Pause(r.Context(), min(late, slowAnswer)) {
		return
	}
	switch r.Method + " " + r.URL.Path {
	case "GET " + wire.PathHello:
		h := n.hello()
		h.Previous = n.swap(r.Header.Get(wire.HeaderNonce))
		channel.Answer(w, h)
		n.w.count.hellos.Add(1)
	case "PUT " + wire.PathDesired:
		var env wire.Envelope
		if channel.Decode(w, r, wire.MaxDesired, &env) {
			res, err := n.apply(env)
			answer(w, res, err)
		}
	case "POST " + wire.PathOutbox:
		n.outbox(w, r)
	case "POST " + wire.PathActions:
		n.action(w, r)
	case "POST " + wire.PathCSR:
		var q wire.CSRRequest
		if channel.Decode(w, r, wire.MaxEnrollBody, &q) {
			der, err := n.id.CSR(q.Rekey)
			answer(w, wire.CSR{DER: der}, err)
		}
	case "PUT " + wire.PathCertificate:
		var c wire.Certificate
		if channel.Decode(w, r, wire.MaxEnrollBody, &c) {
			n.changed(w, n.id.Install(c.Chain))
		}
	case "PUT " + wire.PathRevocations:
		var env wire.Envelope
		if channel.Decode(w, r, wire.MaxRevocations, &env) {
			_, err := n.id.ApplyRevocations(env)
			n.changed(w, err)
		}
	case "PUT " + wire.PathTrust:
		var env wire.Envelope
		if channel.Decode(w, r, wire.MaxEnrollBody, &env) {
			_, err := n.id.ApplyTrust(env)
			n.changed(w, err)
		}
	case "GET " + wire.PathRevocations:
		if _, env := n.id.Revocations(); env != nil {
			channel.Answer(w, env)
			return
		}
		channel.Refuse(w, http.StatusNotFound, "no revocation set is held")
	case "POST " + wire.PathUnlock:
		n.unlock(w, r)
	case "POST " + wire.PathEcho:
		session.Echo(w, r)
	default:
		channel.Refuse(w, http.StatusNotFound, "a simulated node does not do that")
	}
}

// swap takes what a gateway brings, and returns what was held before. A
// simulated node is never copied while it runs: it takes no mark.
func (n *node) swap(brought string) (previous wire.Nonce) {
	nonce, err := wire.ParseNonce(brought)
	if err != nil {
		return wire.Nonce{}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	previous, n.held = n.held, nonce
	return previous
}

func answer(w http.ResponseWriter, v any, err error) {
	if err != nil {
		channel.Refuse(w, http.StatusInternalServerError, err.Error())
		return
	}
	channel.Answer(w, v)
}

// changed answers what changed the identity.
func (n *node) changed(w http.ResponseWriter, err error) {
	switch {
	case errors.Is(err, identity.ErrOlder):
		channel.Refuse(w, http.StatusConflict, err.Error())
	case err != nil:
		channel.Refuse(w, http.StatusUnprocessableEntity, err.Error())
	default:
		n.touched()
		w.WriteHeader(http.StatusNoContent)
	}
}

func (n *node) unlock(w http.ResponseWriter, r *http.Request) {
	var env wire.Envelope
	if !channel.Decode(w, r, wire.MaxEnrollBody, &env) {
		return
	}
	var u wire.Unlock
	if _, err := n.id.VerifyEnvelope(env, wire.TypeUnlock, wire.RoleGateway, &u); err != nil || u.Node != n.id.ID() {
		channel.Refuse(w, http.StatusForbidden, fmt.Sprintf("unlock: not for this node, or not signed: %v", err))
		return
	}
	n.changed(w, n.save(nodeState{Installation: u.Installation}))
}

// action answers at once: a simulated node runs nothing.
func (n *node) action(w http.ResponseWriter, r *http.Request) {
	var env wire.Envelope
	if !channel.Decode(w, r, wire.MaxActionBody, &env) {
		return
	}
	var act wire.Action
	now := time.Now().UTC()
	res := wire.ActionResult{State: wire.ActionSucceeded, Started: now, Ended: now}
	var frames []byte
	last := wire.ActionFrame{N: 1, Result: &res}
	if _, err := n.id.VerifyEnvelope(env, wire.TypeAction, wire.RoleGateway, &act); err != nil || act.Node != n.id.ID() {
		res = wire.ActionResult{State: wire.ActionRefused, Reason: fmt.Sprintf("not for this node, or not signed: %v", err)}
	} else {
		said := wire.ActionFrame{N: 1, Stream: "stdout", Data: []byte(n.name + ": " + strings.Join(act.Command, " ") + "\n")}
		last.N = 2
		if frames, err = wire.AppendLine(nil, said); err != nil {
			channel.Refuse(w, http.StatusInternalServerError, err.Error())
			return
		}
	}
	frames, err := wire.AppendLine(frames, last)
	if err != nil {
		channel.Refuse(w, http.StatusInternalServerError, err.Error())
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	_, _ = w.Write(frames) // the session died: the gateway asks again
}
