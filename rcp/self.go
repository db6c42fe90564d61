package rcp

import (
	"net/http"
	"os"
	"runtime"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/session"
	"sallyport/internal/wire"
)

// selfHandler is the RCP's own session API. The session has proved that its
// client is a gateway.
func (r *Relay) selfHandler() http.Handler {
	mux := http.NewServeMux()
	session.Party{Identity: r.id, Log: r.log}.Register(mux)
	mux.HandleFunc("GET "+wire.PathHello, func(w http.ResponseWriter, req *http.Request) {
		r.clock.Heard(req.Header)
		channel.Answer(w, r.hello())
	})
	mux.Handle(wire.PathParked, r.lot.API(""))
	mux.HandleFunc("PUT "+wire.PathRevocations, r.takeRevocations)
	mux.HandleFunc("PUT "+wire.PathReign, r.takeReign)
	mux.HandleFunc("GET "+wire.PathReign+"{installation}", r.giveReign)
	mux.HandleFunc("POST "+wire.PathDrain, r.startDrain)
	mux.HandleFunc("DELETE "+wire.PathDrain, r.endDrain)
	return mux
}

// hello is what this RCP says of itself.
func (r *Relay) hello() wire.Hello {
	party, _ := r.id.Party()
	number, _ := r.id.Revocations()
	trust, _ := r.id.Trust()
	state, reason := r.state()
	return wire.Hello{
		Party: party, Boot: r.boot, Program: r.cfg.Version, Versions: wire.OwnVersions,
		State: state, Reason: reason, Revocations: number, Trust: trust, Reigns: r.reigns.marks(),
		NotAfter: r.id.NotAfter(), RenewAfter: r.id.RenewAfter(),
		Upstreams: r.upstreamStatus(),
		OS:        runtime.GOOS, Arch: runtime.GOARCH, AsRoot: os.Geteuid() == 0,
		Time: time.Now().UTC(), Salt: r.salt,
	}
}

// state is one word for how the RCP fares, and why.
func (r *Relay) state() (wire.NodeState, string) {
	if err := r.applicant.Ready(); err != nil {
		if r.id.Revoked(r.id.KeyHash()) {
			return wire.StateRevoked, r.applicant.Status().Reason
		}
		return wire.StatePending, r.applicant.Status().Why()
	}
	if d := r.draining.Load(); d != nil {
		return wire.StateDraining, d.Reason
	}
	return wire.StateRunning, ""
}

// startDrain takes the RCP out of use: what runs goes on, new streams are
// refused, and every upstream is told. It lasts until endDrain or a restart.
func (r *Relay) startDrain(w http.ResponseWriter, req *http.Request) {
	var d wire.Drain
	if err := wire.DecodeJSON(req.Body, wire.MaxEnrollBody, &d); err != nil {
		channel.Refuse(w, http.StatusBadRequest, "drain: "+err.Error())
		return
	}
	d.Reason = printable(d.Reason, 200)
	r.setDraining(&d)
	r.log.Info("draining", "reason", d.Reason, "deadline", d.Deadline)
	w.WriteHeader(http.StatusNoContent)
}

func (r *Relay) endDrain(w http.ResponseWriter, _ *http.Request) {
	r.setDraining(nil)
	r.log.Info("no longer draining")
	w.WriteHeader(http.StatusNoContent)
}

func (r *Relay) setDraining(d *wire.Drain) {
	r.draining.Store(d)
	r.table.setDraining(d)
}
