// Package enroll is the waiting party's side of enrolment, for nodes and RCPs
// alike: which join code counts, what the gateway is told when it asks, and
// what becomes of its verdict.
//
// A party that [Applicant.Needed] says true of presents itself as pending (it
// dials with the enrolment ALPN, or is dialled with it) as soon as
// [Applicant.Wait] returns, and serves [Applicant.Handler] in the enrolment
// session. [Applicant.Decided] tells it to leave the pending set again.
package enroll

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"sallyport/internal/atomicfile"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

const (
	// retryAfter is how long a refused party stays away, unless it is given
	// another code.
	retryAfter = time.Minute
	// pollEvery is how often the join files are read: a replaced one is
	// picked up without a restart.
	pollEvery = 2 * time.Second

	fileJoin = "join.json"
)

// State is how far enrolment is.
type State string

// The states. Only StateEnrolled is ready.
const (
	StateNoCode   State = "no-code" // no certificate and nothing that says whom to trust
	StateWaiting  State = "pending" // no verdict yet, or an operator has to decide
	StateDenied   State = "denied"
	StateExpired  State = "expired" // waits for a renewal with the same key
	StateRevoked  State = "revoked" // waits for a new join code
	StateEnrolled State = "enrolled"
)

// Status is what `local status` and /readyz show. Reason is for people.
type Status struct {
	State  State     `json:"state"`
	Code   string    `json:"code,omitempty"`
	Reason string    `json:"reason,omitempty"`
	Since  time.Time `json:"since"`
	Retry  time.Time `json:"retry,omitzero"` // of a denied party: not before
	Source string    `json:"source,omitempty"`
}

// Why is the reason for one who is shown no state of an enrolment beside it: a
// refusal in an operator's own words need not say that it is one.
func (s Status) Why() string {
	if s.State == StateDenied {
		return string(s.State) + ": " + s.Reason
	}
	return s.Reason
}

// Config is what an Applicant needs; everything but Identity and Log may be
// left empty.
type Config struct {
	Identity *identity.Identity
	Join     *identity.JoinSource
	// TrustDomain limits the codes to one trust domain, for a party that has
	// one directory for each. Empty: whatever the code says, until enrolled.
	TrustDomain string
	Name        string // a wish: the right to a name comes from the code
	Tags        map[string]string
	Program     string // version of the program
	// OnGrant keeps what else a grant carries (installation, name, RCP list).
	// It is called before the certificate counts; an error refuses the grant
	// and the gateway repeats it.
	OnGrant func(wire.EnrollVerdict) error
	// Attest has a device vouch for this party; nil: none does.
	Attest func(wire.AttestationStatement) (*wire.Envelope, error)
	Log    *slog.Logger
}

// Applicant waits for a certificate, on behalf of one identity.
type Applicant struct {
	cfg Config
	id  *identity.Identity

	mu      sync.Mutex
	code    *identity.Join // in use; nil without one
	codeID  string         // digest of it, never the code itself
	denied  map[string]time.Time
	memory  joinMemory
	asked   string // codeID of the last request that was handed out, "" without a code
	shown   bool   // one was handed out
	status  Status
	gone    bool   // a gateway said that the key in use is revoked
	refused string // why an upstream refused our certificate
	granted chan struct{}
	decided chan struct{}
	another chan struct{}
	changed chan struct{}
	problem string // last complaint about codes that was logged
	trouble bool   // a code could not be written down, and that was logged
	first   bool   // the first refresh is done
}

// joinMemory outlives the join code: with which one the key in use began to
// enrol, which one made the certificate, and where it said to go. It holds no
// secret.
type joinMemory struct {
	Began     string   `json:"began,omitempty"`
	Used      string   `json:"used,omitempty"`
	Addresses []string `json:"addresses,omitempty"`
}

// New does no I/O; Run does.
func New(cfg Config) *Applicant {
	return &Applicant{
		cfg:     cfg,
		id:      cfg.Identity,
		denied:  map[string]time.Time{},
		granted: make(chan struct{}),
		decided: make(chan struct{}),
		another: make(chan struct{}),
		changed: make(chan struct{}),
	}
}

// Run keeps the join code current until ctx ends: it pins the root that the
// code names, notices a replaced code, and gives a revoked party that has a
// new code a new key. It returns early only when the party cannot ever enrol
// as it was started: its one join code is malformed, or for another role.
func (a *Applicant) Run(ctx context.Context) error {
	if err := a.loadMemory(); err != nil {
		return err
	}
	if err := a.refresh(); err != nil {
		return err
	}
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		changed := a.id.Changed()
		if err := a.refresh(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-tick.C:
		}
	}
}

func (a *Applicant) loadMemory() error {
	if a.id.Dir() == "" {
		return nil
	}
	b, err := os.ReadFile(filepath.Join(a.id.Dir(), fileJoin))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("enrolment: %w", err)
	}
	var m joinMemory
	if err := json.Unmarshal(b, &m); err != nil {
		a.cfg.Log.Warn("the memory of the join code is damaged and is forgotten", "file", filepath.Join(a.id.Dir(), fileJoin), "error", err)
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.memory = m
	return nil
}

// remember writes the memory; mu is held.
func (a *Applicant) remember(m joinMemory) error {
	if m.Began == a.memory.Began && m.Used == a.memory.Used && slices.Equal(m.Addresses, a.memory.Addresses) {
		return nil
	}
	if a.id.Dir() == "" { // no directory, no memory: it costs the same superfluous attempt
		a.memory = m
		return nil
	}
	if err := m.write(a.id.Dir()); err != nil {
		return fmt.Errorf("enrolment: remember the join code: %w", err)
	}
	a.memory = m
	return nil
}

// write keeps the memory in the directory of an identity. A lost one costs a
// superfluous attempt, so the directory is not synced.
func (m joinMemory) write(dir string) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(dir, fileJoin), b, 0o644)
}

// refresh reads the codes and settles the state.
func (a *Applicant) refresh() error {
	joins, err := a.cfg.Join.Codes()
	joins, skipped := a.ours(joins)

	a.mu.Lock()
	defer a.mu.Unlock()
	_, enrolled := a.id.Party()
	first := !a.first
	a.first = true
	if err = errors.Join(err, skipped); err != nil {
		if first && !enrolled && len(joins) == 0 {
			return err
		}
		if err.Error() != a.problem {
			a.cfg.Log.Warn("join code is not used", "error", err)
		}
		a.problem = err.Error()
	} else {
		a.problem = ""
	}
	if join, id := a.pick(joins); id != a.codeID && (join != nil || a.codeID == "") {
		// A code that vanished stays in use in memory: it is removed by
		// tidy operators as soon as the party runs.
		switch err := a.use(join, id, enrolled); {
		case err != nil && first && !enrolled:
			return err
		case err != nil: // the disk is full: the next look tries again, and what there is goes on
			if !a.trouble {
				a.cfg.Log.Error("join code is not used yet; it is tried again", "source", join.Source, "error", err)
			}
			a.trouble = true
		default:
			a.trouble = false
		}
	}
	a.settle()
	if first && a.status.State == StateNoCode {
		a.cfg.Log.Warn("no gateway can be asked for a certificate", "reason", a.status.Reason)
	}
	return nil
}

// ours drops the codes that are for somebody else.
func (a *Applicant) ours(joins []identity.Join) ([]identity.Join, error) {
	var errs []error
	_, enrolled := a.id.Party()
	joins = slices.DeleteFunc(slices.Clone(joins), func(j identity.Join) bool {
		switch {
		case j.Code.Role != a.id.Role():
			errs = append(errs, fmt.Errorf("join code from %s: %w: it is for a %s, this is a %s", j.Source, wire.ErrJoinRole, j.Code.Role, a.id.Role()))
		case a.cfg.TrustDomain != "":
			return j.Code.TrustDomain != a.cfg.TrustDomain // another instance's
		case enrolled && j.Code.TrustDomain != a.id.TrustDomain():
			errs = append(errs, fmt.Errorf("join code from %s: %w: it is for %s, this %s is enrolled in %s (to enrol elsewhere stop it and run `sallyport local rejoin`, which sets %s aside)",
				j.Source, identity.ErrWrongTrustDomain, j.Code.TrustDomain, a.id.Role(), a.id.TrustDomain(), a.id.Dir()))
		default:
			return false
		}
		return true
	})
	return joins, errors.Join(errs...)
}

// pick prefers the codes that were not refused yet, then the order of the
// files; mu is held.
func (a *Applicant) pick(joins []identity.Join) (*identity.Join, string) {
	var join *identity.Join
	var id string
	for n := range joins {
		d := digest(joins[n].Code)
		if join == nil || a.denied[d].Before(a.denied[id]) {
			join, id = &joins[n], d
		}
	}
	return join, id
}

// digest names a code without being one.
func digest(c wire.JoinCode) string {
	b, err := json.Marshal(c)
	if err != nil {
		return "" // a JoinCode holds strings only
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// use takes a code; an error says that the disk did not take it, and that the
// code before it stays in use. mu is held.
func (a *Applicant) use(join *identity.Join, id string, enrolled bool) error {
	if join == nil {
		a.code, a.codeID = nil, id
		return nil
	}
	if err := a.id.Pin(join.Code.Root, join.Code.TrustDomain); err != nil {
		if !enrolled {
			return err
		}
		a.cfg.Log.Warn("join code is not used", "source", join.Source, "error", err)
		a.code, a.codeID = nil, id
		return nil
	}
	m := a.memory
	m.Addresses = join.Code.Addresses
	if m.Began == "" && !enrolled {
		m.Began = id
	}
	if err := a.remember(m); err != nil {
		return err
	}
	a.code, a.codeID = join, id
	if !enrolled {
		// Whatever was said of another code is void; the gateway reads anew.
		a.set(Status{State: StateWaiting, Reason: a.waiting()})
		a.decide()
		a.cfg.Log.Info("enrolling", "source", join.Source, "trust_domain", join.Code.TrustDomain, "fingerprint", a.id.Fingerprint())
	}
	if (!enrolled || a.id.OutOfTime()) && a.shown && a.asked != id && time.Since(a.denied[id]) >= retryAfter {
		close(a.another)
		a.another = make(chan struct{})
	}
	return nil
}

// settle derives the state, and makes a new key where one is needed; mu is held.
func (a *Applicant) settle() {
	_, enrolled := a.id.Party()
	revoked := a.id.Revoked(a.id.KeyHash())
	fresh := a.code != nil && a.codeID != a.memory.Used
	// A grant may have been taken back before we came for it: nobody can tell a
	// party without a certificate why it is refused, and another code is its sign.
	if another := a.memory.Began != "" && a.codeID != a.memory.Began; (revoked || a.gone || a.refused != "" && (enrolled || another)) && fresh {
		old := a.id.Fingerprint()
		if err := a.id.NewKey(); err != nil {
			a.set(Status{State: StateRevoked, Reason: err.Error()})
			return
		}
		a.cfg.Log.Info("the old key is no longer accepted; enrolling again with a new one", "old", old, "fingerprint", a.id.Fingerprint())
		enrolled, revoked, a.gone, a.refused = false, false, false, ""
		a.status.State = "" // the reason names the key
		m := a.memory
		m.Began = a.codeID
		if err := a.remember(m); err != nil {
			a.cfg.Log.Warn("the memory of the join code is not kept", "error", err)
		}
	}
	_, pinned := a.id.Pinned()
	switch {
	case revoked:
		a.set(Status{State: StateRevoked, Code: wire.EnrollRevoked,
			Reason: "this identity is revoked: it enrols again when SALLYPORT_" + roleVar(a.id.Role()) + "_JOIN holds a new join code"})
	case enrolled && a.id.OutOfTime() && a.status.State == StateExpired:
	case enrolled && a.id.OutOfTime() && a.status.State == StateDenied && !a.denied[a.codeID].IsZero(): // what the gateway said matters more
	case enrolled && a.id.OutOfTime():
		why := "expired on " + a.id.NotAfter().UTC().Format(time.RFC3339)
		if begin := a.id.NotBefore(); time.Now().Before(begin) {
			why = "is good from " + begin.UTC().Format(time.RFC3339) + " on, which by the clock of this host is yet to come"
		}
		a.set(Status{State: StateExpired, Reason: "the certificate " + why + "; waiting for the gateway to renew it"})
	case enrolled:
		a.set(Status{State: StateEnrolled, Reason: a.refused})
	case pinned == "":
		a.set(Status{State: StateNoCode, Reason: a.noCode()})
	case !a.denied[a.codeID].IsZero():
		if a.status.State != StateDenied {
			a.set(Status{State: StateDenied, Reason: "refused", Retry: a.denied[a.codeID].Add(retryAfter)})
		}
	case a.refused != "" && a.status.Code == "":
		a.set(Status{State: StateWaiting, Reason: a.refused})
	case a.status.State != StateWaiting:
		a.set(Status{State: StateWaiting, Reason: a.waiting()})
	}
}

func (a *Applicant) noCode() string {
	variable, made := "SALLYPORT_"+roleVar(a.id.Role())+"_JOIN", " (the gateway prints one: "+joinVerb(a.id.Role())+")"
	if why := a.cfg.Join.Absent(); why != "" {
		return "not enrolled: " + why + "; put a join code where " + variable + " points" + made
	}
	return "not enrolled: set " + variable + " to a join code or its file" + made
}

func (a *Applicant) waiting() string { return "waiting for a gateway; key " + a.id.Fingerprint() }

// decide ends the attempt that is under way; mu is held.
func (a *Applicant) decide() {
	close(a.decided)
	a.decided = make(chan struct{})
}

func roleVar(r wire.Role) string {
	if r == wire.RoleRCP {
		return "RCP"
	}
	return "NODE"
}

func joinVerb(r wire.Role) string {
	if r == wire.RoleRCP {
		return "sallyport rcp add, or rcp join for a known one"
	}
	return "sallyport join create"
}

// set changes the status and wakes those who wait; mu is held.
func (a *Applicant) set(s Status) {
	if a.code != nil {
		s.Source = a.code.Source
	}
	old := a.status
	s.Since = old.Since
	if s == old {
		return
	}
	if s.State != old.State {
		s.Since = time.Now().UTC()
	}
	a.status = s
	close(a.changed)
	a.changed = make(chan struct{})
}

// Status is a snapshot.
func (a *Applicant) Status() Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.first {
		return Status{State: StateNoCode, Reason: "starting"}
	}
	return a.status
}

// Ready is nil for an enrolled party whose certificate is in force; otherwise
// it says what is missing.
func (a *Applicant) Ready() error {
	if s := a.Status(); s.State != StateEnrolled {
		return fmt.Errorf("%s: %s", s.State, s.Reason)
	}
	return nil
}

// Needed tells whether the party has to present itself as pending: it has no
// certificate, or only one that is not good now. A revoked one waits for a code.
func (a *Applicant) Needed() bool {
	switch a.Status().State {
	case StateWaiting, StateDenied, StateExpired:
		return true
	}
	return false
}

// Changed is closed at the next change of the status.
func (a *Applicant) Changed() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.changed
}

// Wait blocks until the party may present itself as pending: it is needed,
// and a refusal of the same code is a minute ago. It returns ctx's cause when
// ctx ends first.
func (a *Applicant) Wait(ctx context.Context) error {
	for {
		a.mu.Lock()
		pause, ok := a.pause()
		changed := a.changed
		a.mu.Unlock()
		if ok && pause <= 0 {
			return nil
		}
		var timer *time.Timer
		var due <-chan time.Time
		if ok {
			timer = time.NewTimer(pause)
			due = timer.C
		}
		select {
		case <-ctx.Done():
		case <-changed:
		case <-due:
		}
		if timer != nil {
			timer.Stop()
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

// pause is the time until the next attempt; false when none is called for; mu
// is held.
func (a *Applicant) pause() (time.Duration, bool) {
	switch a.status.State {
	case StateWaiting, StateExpired, StateDenied:
		at := a.denied[a.codeID]
		if at.IsZero() {
			return 0, true
		}
		return time.Until(at.Add(retryAfter)), true
	}
	return 0, false
}

// Granted is closed when a certificate arrives. After a change of key it is
// another channel: ask anew for each attempt.
func (a *Applicant) Granted() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.granted
}

// Decided is closed when the attempt that is under way ends, with a grant, a
// refusal or another code: the party leaves the pending set and calls Wait.
func (a *Applicant) Decided() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.decided
}

// Another is closed when a code takes the place of what a gateway was shown, the
// code before or none: see [LeaveFor].
func (a *Applicant) Another() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.another
}

// Addresses are the upstreams that the join code names (host:port), kept for
// the time after it is gone.
func (a *Applicant) Addresses() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.code != nil {
		return slices.Clone(a.code.Code.Addresses)
	}
	return slices.Clone(a.memory.Addresses)
}

// Refused is told when an upstream does not accept the certificate. That is
// only a hint, any RCP can say so: it matters when the operator has also given
// the party a new code.
func (a *Applicant) Refused(cause error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	what := "certificate"
	if _, enrolled := a.id.Party(); !enrolled {
		what = "key"
	}
	a.refusal("an upstream refuses this " + what + " (" + cause.Error() + "); if the gateway removed it, a new join code enrols it again")
}

// Accepted takes it back, after a connection succeeded: one for enrolling tells
// nothing of a certificate, and a party without one has nothing but its key.
func (a *Applicant) Accepted(enrolling bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, enrolled := a.id.Party(); !enrolling || !enrolled {
		a.refusal("")
	}
}

// refusal notes that an upstream refuses us, or none does; mu is held.
func (a *Applicant) refusal(why string) {
	was := a.refused
	a.refused = why
	if !a.first || was == why {
		return
	}
	if was != "" && a.status.Reason == was {
		a.status.State = "" // which is said no more
	}
	a.settle()
}
