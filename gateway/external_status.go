package gateway

import (
	"context"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/doors"
	"sallyport/internal/wire"
)

// delegating is a certificate authority whose leaves an external CA issues: that
// signs the CRL of their issuers, and has to be told what is revoked.
type delegating interface {
	State() wire.CAState
	ExternalCRL(ctx context.Context, issuer wire.KeyHash, revoked []doors.Revoked) (wire.CAStatus, error)
}

const (
	// tellTick is how often the external CA is told what is revoked, and asked
	// for its CRL; tellSoon how soon after a revocation.
	tellTick = time.Minute
	tellSoon = 2 * time.Second
)

// externalStatus keeps an external CA's CRLs up to what is revoked here, and
// hands them out.
type externalStatus struct {
	ca    delegating
	store *store.DB
	log   *slog.Logger

	mu    sync.Mutex
	lists map[wire.KeyHash]wire.CAStatus
}

// newExternalStatus is nil for an authority that never has an external CA.
func newExternalStatus(ca any, db *store.DB, log *slog.Logger) *externalStatus {
	d, ok := ca.(delegating)
	if !ok {
		return nil
	}
	return &externalStatus{ca: d, store: db, log: log, lists: map[wire.KeyHash]wire.CAStatus{}}
}

// run repeats what there is to tell until ctx ends. revoked says which set of
// revocations is in force: another one is passed on at once.
func (x *externalStatus) run(ctx context.Context, revoked func() int64) error {
	if x == nil {
		return nil
	}
	tick := time.NewTicker(tellSoon)
	defer tick.Stop()
	var last time.Time
	number := int64(-1)
	for {
		if now := revoked(); now != number || time.Since(last) >= tellTick {
			number, last = now, time.Now()
			x.turn(ctx)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// turn tells and asks once for each intermediate that is in use.
func (x *externalStatus) turn(ctx context.Context) {
	state := x.ca.State()
	for _, i := range state.Intermediates {
		if i.State == wire.IssuerRetired || state.External == "" {
			continue
		}
		st, err := x.one(ctx, i.Key)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			st.Problem = err.Error()
		}
		x.mu.Lock()
		was := x.lists[i.Key]
		if st.CRL == nil && time.Now().Before(was.Next) { // the last one is in force until it ends
			st.CRL, st.Next = was.CRL, was.Next
		}
		x.lists[i.Key] = st
		x.mu.Unlock()
		if st.Problem != was.Problem {
			x.log.WarnContext(ctx, "the CRL of the external CA", "intermediate", i.Key.Fingerprint(), "problem", st.Problem, "was", was.Problem, "missing", st.Missing)
		}
	}
}

func (x *externalStatus) one(ctx context.Context, issuer wire.KeyHash) (st wire.CAStatus, err error) {
	list, err := revokedOf(ctx, x.store, issuer, time.Now())
	if err != nil {
		return st, err
	}
	return x.ca.ExternalCRL(ctx, issuer, list)
}

// serveCRL answers for an issuer of the external CA; false if there is none of
// that name.
func (x *externalStatus) serveCRL(w http.ResponseWriter, name string) bool {
	st, ok := x.named(name)
	if !ok {
		return false
	}
	if st.CRL == nil || time.Now().After(st.Next) {
		http.Error(w, "no CRL now: the external CA, which signs it, has none that is good; `sallyport ca show` says why", http.StatusServiceUnavailable)
		return true
	}
	w.Header().Set("Content-Type", "application/pkix-crl")
	w.Header().Set("Cache-Control", statusCache)
	_, _ = w.Write(st.CRL) // the client is gone, or not
	return true
}

// named finds the CRL that a client asks for. It is written without the lock:
// nobody waits for a client that does not read.
func (x *externalStatus) named(name string) (st wire.CAStatus, ok bool) {
	if x == nil {
		return st, false
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	for key, st := range x.lists {
		if name == doors.KeyName(key)+".crl" {
			return st, true
		}
	}
	return st, false
}

// noOCSP is said of parties' certificates that an external CA issues.
const noOCSP = "none: the external CA signs for its certificates, and has no OCSP responder; use the CRL"

// view says for people what there is.
func (x *externalStatus) view(issuers []wire.CAIssuer) (out []api.CAStatus) {
	if x == nil {
		return nil
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, i := range issuers {
		st, ok := x.lists[i.Key]
		if !ok || i.State == wire.IssuerRetired {
			continue
		}
		v := api.CAStatus{Intermediate: i.N, CRL: "none", OCSP: noOCSP, Missing: st.Missing, Problem: st.Problem}
		if st.CRL != nil {
			v.CRL = "of the external CA, at /crl/" + doors.KeyName(i.Key) + ".crl"
			v.Next = when(st.Next)
		}
		out = append(out, v)
	}
	return out
}
