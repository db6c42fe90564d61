package node

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/session"
	"sallyport/internal/wire"
)

// newSessionAPI is what a gateway can ask inside a session, which has proved
// its role. What changes the host comes in signed documents besides: they hold
// after the session, and name the node and the installation they are for.
func (in *instance) newSessionAPI() http.Handler {
	mux := http.NewServeMux()
	session.Party{Identity: in.id, Log: in.log, Changed: in.signals.wake}.Register(mux)
	mux.HandleFunc("GET "+wire.PathHello, func(w http.ResponseWriter, r *http.Request) {
		in.clock.Heard(r.Header)
		in.hearQuarantine(r.Header.Get(wire.HeaderQuarantined) == "1")
		previous, marked := in.copies.heard(r.Header)
		h := in.hello()
		h.Previous = previous
		channel.Answer(w, h)
		if marked {
			in.log.Warn("a gateway found that this process was copied while it ran, and gave this one of the copies a boot ID of its own", "boot", h.Boot)
			in.changed()
		}
	})
	mux.HandleFunc("PUT "+wire.PathDesired, in.takeDesired)
	mux.HandleFunc("POST "+wire.PathOutbox, in.outbox)
	mux.HandleFunc("POST "+wire.PathActions, in.takeAction)
	mux.HandleFunc("DELETE "+wire.PathActionID+"{id}", in.cancelAction)
	mux.HandleFunc("PUT "+wire.PathRevocations, in.takeRevocations)
	mux.HandleFunc("POST "+wire.PathUnlock, in.takeUnlock)
	mux.HandleFunc("POST "+wire.PathReidentify, in.takeReidentify)
	mux.HandleFunc("POST "+wire.PathDrain, in.startDrain)
	mux.HandleFunc("DELETE "+wire.PathDrain, in.endDrain)
	mux.Handle(wire.PathParked, in.lot.API(in.td))
	return mux
}

// hearQuarantine keeps what a gateway says in a session: nobody else is believed that
// two hosts have this node's identity.
func (in *instance) hearQuarantine(now bool) {
	if in.quarantine.Swap(now) == now {
		return
	}
	if now {
		in.log.Warn("quarantined by the gateway", "reason", whyQuarantined, "boot", in.copies.boot(in.boot))
	} else {
		in.log.Info("the gateway ended the quarantine")
	}
}

// quarantined tells whether that holds: it was said of the certificate of then.
func (in *instance) quarantined() bool { return in.quarantine.Load() && in.applicant.Ready() == nil }

// whyQuarantined is shown on the host.
const whyQuarantined = "the gateway found another live host with this node's identity: neither gets policies, actions or connections"

func (in *instance) takeDesired(w http.ResponseWriter, r *http.Request) {
	var env wire.Envelope
	if !channel.Decode(w, r, wire.MaxDesired, &env) {
		return
	}
	res, err := in.desired.put(r.Context(), env)
	in.signals.wake()
	if err != nil {
		in.log.Error("desired state not taken", "error", err)
		channel.Refuse(w, http.StatusInternalServerError, "desired: "+err.Error())
		return
	}
	res.State, _ = in.state()
	channel.Answer(w, res)
}

// takeAction begins an action or joins its run, and streams its frames.
func (in *instance) takeAction(w http.ResponseWriter, r *http.Request) {
	var env wire.Envelope
	if !channel.Decode(w, r, wire.MaxActionBody, &env) {
		return
	}
	after, err := strconv.ParseInt(firstOf(r.URL.Query().Get("after"), "0"), 10, 64)
	if err != nil || after < 0 {
		channel.Refuse(w, http.StatusBadRequest, "actions: after is no frame number")
		return
	}
	var act wire.Action
	if err := in.admitAction(env, &act); err != nil {
		in.log.Warn("action refused", "action", wire.Quotable(string(act.ID)), "reason", err)
		streamResult(w, &wire.ActionResult{State: wire.ActionRefused, Reason: err.Error()})
		return
	}
	run, res, err := in.actions.begin(act, r.URL.Query().Get(wire.QueryAttach) == "1")
	switch {
	case errors.Is(err, errNoRun):
		channel.Refuse(w, http.StatusNotFound, err.Error())
		return
	case errors.Is(err, errManyRuns):
		channel.Refuse(w, http.StatusTooManyRequests, err.Error())
		return
	case errors.Is(err, errStopped):
		channel.Refuse(w, http.StatusServiceUnavailable, err.Error())
		return
	case err != nil:
		in.log.Error("action not begun", "error", err)
		channel.Refuse(w, http.StatusInternalServerError, err.Error())
		return
	case res != nil:
		in.log.Warn("action not run", "action", act.ID, "state", res.State, "reason", res.Reason)
		streamResult(w, res)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.WriteHeader(http.StatusOK)
	ctl := http.NewResponseController(w)
	if err := run.replay(r.Context(), after, w, func() { _ = ctl.Flush() }); err != nil {
		in.log.Debug("action stream ended", "action", act.ID, "reason", err)
		return
	}
	in.actions.collect(run)
}

// admitAction decides whether a signed action is for this node, now. A run
// that has begun may be joined while the node drains.
func (in *instance) admitAction(env wire.Envelope, act *wire.Action) error {
	if _, err := in.id.VerifyEnvelope(env, wire.TypeAction, wire.RoleGateway, act); err != nil {
		return err
	}
	if _, err := wire.ParseID(string(act.ID)); err != nil {
		return fmt.Errorf("action: %w", err)
	}
	if act.Node != in.id.ID() {
		return fmt.Errorf("the action is for node %s", wire.Quotable(string(act.Node)))
	}
	if in.readonly {
		return errors.New("SALLYPORT_NODE_MODE is readonly: the node runs no actions")
	}
	if err := in.lock.obey(act.Installation); err != nil {
		in.signals.wake()
		return err
	}
	if why := in.lock.draining(); why != "" && !in.actions.knows(act.ID) {
		return fmt.Errorf("the node is being drained: %s", why)
	}
	return nil
}

func streamResult(w http.ResponseWriter, res *wire.ActionResult) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	line, err := wire.AppendLine(nil, wire.ActionFrame{N: 1, Result: res})
	if err != nil {
		channel.Refuse(w, http.StatusInternalServerError, err.Error())
		return
	}
	_, _ = w.Write(line) // the session died: the gateway asks again
}

func (in *instance) cancelAction(w http.ResponseWriter, r *http.Request) {
	id, err := wire.ParseID(r.PathValue("id"))
	if err == nil {
		err = in.actions.stop(id)
	}
	if err != nil {
		channel.Refuse(w, http.StatusNotFound, err.Error())
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (in *instance) takeRevocations(w http.ResponseWriter, r *http.Request) {
	var env wire.Envelope
	if !channel.Decode(w, r, wire.MaxRevocations, &env) {
		return
	}
	_, err := in.id.ApplyRevocations(env)
	switch {
	case errors.Is(err, identity.ErrOlder):
		channel.Refuse(w, http.StatusConflict, err.Error())
	case err != nil:
		channel.Refuse(w, http.StatusUnprocessableEntity, err.Error())
	default:
		in.signals.wake()
		w.WriteHeader(http.StatusNoContent)
	}
}

// takeUnlock makes the node obey another installation, on a gateway's signed
// word that names this node.
func (in *instance) takeUnlock(w http.ResponseWriter, r *http.Request) {
	var env wire.Envelope
	if !channel.Decode(w, r, wire.MaxEnrollBody, &env) {
		return
	}
	var u wire.Unlock
	_, err := in.id.VerifyEnvelope(env, wire.TypeUnlock, wire.RoleGateway, &u)
	if err == nil && (u.Node != in.id.ID() || u.Installation == "") {
		err = errors.New("unlock: it is for another node, or names no installation")
	}
	if err != nil {
		channel.Refuse(w, http.StatusForbidden, err.Error())
		return
	}
	if err := in.lock.unlock(u.Installation); err != nil {
		channel.Refuse(w, http.StatusInternalServerError, "unlock: "+err.Error())
		return
	}
	in.log.Warn("unlocked by a gateway", "installation", u.Installation)
	in.signals.wake()
	w.WriteHeader(http.StatusNoContent)
}

// startDrain: what runs goes on, nothing new is taken, until endDrain or the
// deadline.
func (in *instance) startDrain(w http.ResponseWriter, r *http.Request) {
	var d wire.Drain
	if !channel.Decode(w, r, wire.MaxEnrollBody, &d) {
		return
	}
	var until time.Time
	if d.Deadline > 0 {
		until = time.Now().Add(d.Deadline)
	}
	in.answerChange(w, in.lock.drain(wire.Quotable(d.Reason), until))
}

func (in *instance) endDrain(w http.ResponseWriter, _ *http.Request) {
	in.answerChange(w, in.lock.resume())
}

func (in *instance) answerChange(w http.ResponseWriter, err error) {
	if err != nil {
		channel.Refuse(w, http.StatusInternalServerError, err.Error())
		return
	}
	in.signals.wake()
	w.WriteHeader(http.StatusNoContent)
}
