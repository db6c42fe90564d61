package enroll

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// Handler serves one enrolment session: GET and PUT /v1/enroll. It hands out the
// token, so it must only be reached through a session whose other end was
// verified as a gateway below the pinned root. Once that gateway has granted the
// certificate it may go on with what it would ask in the next session, which
// could prove no more of either side; nil: with nothing.
func (a *Applicant) Handler(granted http.Handler) http.Handler {
	var certified atomic.Bool
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+wire.PathEnroll, a.get)
	mux.HandleFunc("PUT "+wire.PathEnroll, func(w http.ResponseWriter, r *http.Request) {
		if v, ok := a.put(w, r); ok && v.State == wire.EnrollGranted {
			certified.Store(true)
		}
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if granted == nil || !certified.Load() || a.Ready() != nil {
			http.NotFound(w, r)
			return
		}
		granted.ServeHTTP(w, r)
	})
	return mux
}

func (a *Applicant) get(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	pause, ok := a.pause()
	reason, renewal := a.status.Reason, a.status.State == StateEnrolled
	a.mu.Unlock()
	switch {
	case renewal: // a gateway that reaches us by no other way offers a new leaf
	case !ok:
		http.Error(w, "nothing to enrol: "+reason, http.StatusConflict)
		return
	case pause > 0: // a party that listens is asked whenever the gateway likes
		w.Header().Set("Retry-After", strconv.Itoa(int(pause/time.Second)+1))
		http.Error(w, "refused a moment ago: "+reason, http.StatusServiceUnavailable)
		return
	}
	req, err := a.request()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	req.Attestation = a.attest(r.Header.Get(wire.HeaderChallenge), req.ID)
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(req) // the session died: the gateway asks again
}

// attest has the device vouch for our key, in answer to the gateway's challenge.
// Without it the request is like any other: the gateway decides.
func (a *Applicant) attest(challenge string, id wire.ID) *wire.Envelope {
	if a.cfg.Attest == nil || challenge == "" {
		return nil
	}
	c, err := base64.RawURLEncoding.DecodeString(challenge)
	if err == nil && len(c) != wire.ChallengeSize {
		err = errors.New("the gateway's challenge has another size")
	}
	var env *wire.Envelope
	if err == nil {
		env, err = a.cfg.Attest(wire.AttestationStatement{Challenge: c, Key: a.id.KeyHash(), Role: a.id.Role(), ID: id, TrustDomain: a.id.TrustDomain()})
	}
	if err != nil {
		a.cfg.Log.Warn("no device vouches for this request", "error", err)
		return nil
	}
	return env
}

func (a *Applicant) put(w http.ResponseWriter, r *http.Request) (v wire.EnrollVerdict, ok bool) {
	if err := wire.DecodeJSON(http.MaxBytesReader(w, r.Body, wire.MaxEnrollBody+1), wire.MaxEnrollBody, &v); err != nil {
		http.Error(w, "verdict: "+err.Error(), http.StatusBadRequest)
		return v, false
	}
	if err := a.verdict(v); err != nil {
		a.cfg.Log.Warn("the gateway's verdict cannot be used", "state", wire.Quotable(v.State), "error", err)
		http.Error(w, "verdict: "+err.Error(), verdictStatus(err))
		return v, false
	}
	w.WriteHeader(http.StatusNoContent)
	return v, true
}

// verdictStatus tells the gateway whether the same verdict may help later.
func verdictStatus(err error) int {
	for _, e := range []error{errVerdict, identity.ErrWrongParty, identity.ErrWrongRole, identity.ErrWrongTrustDomain, identity.ErrUntrusted,
		identity.ErrRevoked, identity.ErrNotPinned, identity.ErrExpired} {
		if errors.Is(err, e) {
			return http.StatusUnprocessableEntity
		}
	}
	return http.StatusInternalServerError
}
