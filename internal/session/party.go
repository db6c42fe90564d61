package session

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"

	"sallyport/internal/channel"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// Party answers what a gateway asks nodes and RCPs alike: for a new certificate,
// to trust other roots, for the revocation set that is in force, and for an echo.
type Party struct {
	Identity *identity.Identity
	Log      *slog.Logger
	Changed  func() // hears of a new certificate and of new roots; nil: nobody does
}

// Register adds the routes.
func (p Party) Register(mux *http.ServeMux) {
	mux.HandleFunc("POST "+wire.PathCSR, p.takeCSR)
	mux.HandleFunc("PUT "+wire.PathCertificate, p.takeCertificate)
	mux.HandleFunc("PUT "+wire.PathTrust, p.takeTrust)
	mux.HandleFunc("GET "+wire.PathRevocations, p.giveRevocations)
	mux.HandleFunc("POST "+wire.PathEcho, Echo)
}

// takeCSR begins a renewal: the gateway pulls the request and puts the chain.
func (p Party) takeCSR(w http.ResponseWriter, r *http.Request) {
	var q wire.CSRRequest
	if !channel.Decode(w, r, wire.MaxEnrollBody, &q) {
		return
	}
	der, err := p.Identity.RenewalCSR(q.Rekey)
	switch {
	case errors.Is(err, identity.ErrNoCertificate):
		channel.Refuse(w, http.StatusConflict, "csr: "+err.Error())
	case err != nil:
		p.Log.Error("certificate request not made", "error", err)
		channel.Refuse(w, http.StatusInternalServerError, "csr: "+err.Error())
	default:
		channel.Answer(w, wire.CSR{DER: der})
	}
}

func (p Party) takeCertificate(w http.ResponseWriter, r *http.Request) {
	var c wire.Certificate
	if !channel.Decode(w, r, wire.MaxEnrollBody, &c) {
		return
	}
	if err := p.Identity.Install(c.Chain); err != nil {
		p.Log.Warn("new certificate refused", "error", err)
		channel.Refuse(w, http.StatusUnprocessableEntity, "certificate: "+err.Error())
		return
	}
	p.Log.Info("certificate renewed", "not_after", p.Identity.NotAfter(), "fingerprint", p.Identity.Fingerprint())
	p.changed(w)
}

// takeTrust changes the roots that are trusted here. Only a gateway brings
// them, end to end: no RCP hands them on.
func (p Party) takeTrust(w http.ResponseWriter, r *http.Request) {
	var env wire.Envelope
	if !channel.Decode(w, r, wire.MaxEnrollBody, &env) {
		return
	}
	newer, err := p.Identity.ApplyTrust(env)
	switch {
	case errors.Is(err, identity.ErrOlder):
		channel.Refuse(w, http.StatusConflict, err.Error())
		return
	case err != nil:
		p.Log.Warn("trust document refused", "error", err)
		channel.Refuse(w, http.StatusUnprocessableEntity, err.Error())
		return
	case newer:
		number, _ := p.Identity.Trust()
		p.Log.Info("the gateway's certificate authority changed its roots", "number", number)
	}
	p.changed(w)
}

func (p Party) changed(w http.ResponseWriter) {
	if p.Changed != nil {
		p.Changed()
	}
	w.WriteHeader(http.StatusNoContent)
}

// giveRevocations shows a gateway the set that is in force here: it may have
// been restored from a backup and know less.
func (p Party) giveRevocations(w http.ResponseWriter, _ *http.Request) {
	_, env := p.Identity.Revocations()
	if env == nil {
		channel.Refuse(w, http.StatusNotFound, "no revocation set is held here")
		return
	}
	channel.Answer(w, env)
}

// Echo answers a request with its body.
func Echo(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, wire.MaxEcho))
	if err != nil {
		channel.Refuse(w, http.StatusRequestEntityTooLarge, fmt.Sprintf("echo: the limit is %d bytes", wire.MaxEcho))
		return
	}
	_, _ = w.Write(b)
}
