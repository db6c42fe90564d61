package rcp

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// maxEcho bounds the body of POST /v1/echo, in bytes.
const maxEcho = 64 << 10

// selfHandler is the RCP's own session API. The session has proved that its
// client is a gateway.
func (r *Relay) selfHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+wire.PathHello, func(w http.ResponseWriter, req *http.Request) {
		r.clock.Heard(req.Header)
		writeJSON(w, r.hello())
	})
	mux.HandleFunc("POST "+wire.PathEcho, echo)
	mux.Handle(wire.PathParked, r.lot.API(""))
	mux.HandleFunc("POST "+wire.PathCSR, r.takeCSR)
	mux.HandleFunc("PUT "+wire.PathCertificate, r.takeCertificate)
	mux.HandleFunc("GET "+wire.PathRevocations, r.giveRevocations)
	mux.HandleFunc("PUT "+wire.PathRevocations, r.takeRevocations)
	mux.HandleFunc("PUT "+wire.PathTrust, r.takeTrust)
	mux.HandleFunc("PUT "+wire.PathReign, r.takeReign)
	mux.HandleFunc("GET "+wire.PathReign+"{installation}", r.giveReign)
	mux.HandleFunc("POST "+wire.PathDrain, r.startDrain)
	mux.HandleFunc("DELETE "+wire.PathDrain, r.endDrain)
	return mux
}

// giveRevocations shows a gateway the set that is in force here: it may have
// been restored from a backup and know less.
func (r *Relay) giveRevocations(w http.ResponseWriter, _ *http.Request) {
	_, env := r.id.Revocations()
	if env == nil {
		channel.Refuse(w, http.StatusNotFound, "no revocation set is held here")
		return
	}
	writeJSON(w, env)
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

func echo(w http.ResponseWriter, req *http.Request) {
	b, err := io.ReadAll(http.MaxBytesReader(w, req.Body, maxEcho))
	if err != nil {
		channel.Refuse(w, http.StatusRequestEntityTooLarge, fmt.Sprintf("echo: the limit is %d bytes", maxEcho))
		return
	}
	_, _ = w.Write(b)
}

// takeCSR begins a renewal: the gateway pulls the request and puts the chain.
func (r *Relay) takeCSR(w http.ResponseWriter, req *http.Request) {
	var q wire.CSRRequest
	if err := wire.DecodeJSON(req.Body, wire.MaxEnrollBody, &q); err != nil {
		channel.Refuse(w, http.StatusBadRequest, "csr: "+err.Error())
		return
	}
	der, err := r.id.RenewalCSR(q.Rekey)
	if errors.Is(err, identity.ErrNoCertificate) {
		channel.Refuse(w, http.StatusConflict, "csr: "+err.Error())
		return
	}
	if err != nil {
		r.log.Error("certificate request not made", "error", err)
		channel.Refuse(w, http.StatusInternalServerError, "csr: "+err.Error())
		return
	}
	writeJSON(w, wire.CSR{DER: der})
}

func (r *Relay) takeCertificate(w http.ResponseWriter, req *http.Request) {
	var c wire.Certificate
	if err := wire.DecodeJSON(req.Body, wire.MaxEnrollBody, &c); err != nil {
		channel.Refuse(w, http.StatusBadRequest, "certificate: "+err.Error())
		return
	}
	if err := r.id.Install(c.Chain); err != nil {
		r.log.Warn("new certificate refused", "error", err)
		channel.Refuse(w, http.StatusUnprocessableEntity, "certificate: "+err.Error())
		return
	}
	r.log.Info("certificate renewed", "not_after", r.id.NotAfter(), "fingerprint", r.id.Fingerprint())
	w.WriteHeader(http.StatusNoContent)
}

// takeTrust changes the roots that are trusted here. Only a gateway brings
// them, end to end: no RCP hands them on.
func (r *Relay) takeTrust(w http.ResponseWriter, req *http.Request) {
	var env wire.Envelope
	if err := wire.DecodeJSON(req.Body, wire.MaxEnrollBody, &env); err != nil {
		channel.Refuse(w, http.StatusBadRequest, "trust: "+err.Error())
		return
	}
	newer, err := r.id.ApplyTrust(env)
	switch {
	case errors.Is(err, identity.ErrOlder):
		channel.Refuse(w, http.StatusConflict, err.Error())
		return
	case err != nil:
		r.log.Warn("trust document refused", "error", err)
		channel.Refuse(w, http.StatusUnprocessableEntity, err.Error())
		return
	case newer:
		number, _ := r.id.Trust()
		r.log.Info("the gateway's certificate authority changed its roots", "number", number)
	}
	w.WriteHeader(http.StatusNoContent)
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
