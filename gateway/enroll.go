package gateway

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

const (
	// minRevoked is how long after the end of its leaf a revoked key stays in
	// the set at least: clocks may be wrong by days.
	minRevoked = 30 * 24 * time.Hour
	// maxWaiting bounds the requests that wait for an operator: whoever
	// reaches an RCP can make one.
	maxWaiting = 10_000
	// maxWaitingPerRCP leaves room for those behind the others, when one RCP
	// makes parties up or its network is full of strangers.
	maxWaitingPerRCP = maxWaiting / 2
	// requestLife is how long a request waits for its party to be seen again.
	requestLife = 30 * 24 * time.Hour
	// maxUncollected is how long a grant waits for its party.
	maxUncollected = 365 * 24 * time.Hour
	// maxAttempts bounds the memory of parties that were asked.
	maxAttempts = 50_000
	// maxLeaves is how many leaves one key is given within retryGranted, and how
	// often a party's renewal is tried. Each is kept, and audited: who has a key
	// could fill our disk by coming anew, or by refusing what is brought.
	maxLeaves = 8
	// maxCSR bounds what is kept of each party that waits, in bytes. Ours have 400;
	// others may have names in them, which nobody reads.
	maxCSR = 4 << 10
	// maxRevocationsInVerdict keeps a verdict below wire.MaxEnrollBody; a
	// larger set follows in the first session.
	maxRevocationsInVerdict = 24 << 10
)

// How soon a waiting party is looked at again, while its connection stays.
const (
	retryRefused = time.Minute
	retryGranted = time.Minute
	retryWaiting = 10 * time.Minute // a grant or a new connection is sooner
	retryFailed  = 5 * time.Second  // doubled up to retryRefused
)

// registrar is what enrolment needs of the certificate authority.
type registrar interface {
	Issue(ctx context.Context, r wire.IssueRequest) (chain [][]byte, err error)
	SignRevocations(ctx context.Context, set wire.Revocations, after int64) (wire.Envelope, error)
	Revocations() (wire.Envelope, bool)
	Root() *x509.Certificate
}

// enrolment decides who becomes a party. What an RCP says is shown and never
// decided from: key, role, UUID and token are read in a session with the party.
type enrolment struct {
	store *store.DB
	ca    registrar
	id    *identity.Identity
	log   *slog.Logger
	// open opens a session with the holder of a key, by a first hop if it is there;
	// rcp names the way.
	open func(ctx context.Context, key wire.KeyHash, hop wire.ID) (s endToEnd, rcp string, err error)
	// keepPlace is for a party whose request waits for an operator; nil: no place is kept.
	keepPlace func(ctx context.Context, key wire.KeyHash)
	// changed is told of parties that were made, replaced or revoked.
	changed func(ctx context.Context, role wire.Role, id wire.ID)
	// talk opens or reuses a session with a certified party.
	talk talker
	// lastWord is talk with a party that is revoked already, and with no other;
	// nil: there is none.
	lastWord talker
	// reach does it with the one process of a node that has a boot ID, by
	// whichever way that answers; nil: as talk.
	reach func(ctx context.Context, node wire.ID, boot string, f func(ctx context.Context, call caller) error) error
	// first claims the first visit of a node, and visits it in the session in
	// which it got its certificate; nil: nobody does before it comes back.
	first func(node wire.Party) (visit func(ctx context.Context, s endToEnd), end func())
	// returns prepares to wait for a party to come by another channel than those
	// that it has; nil: nobody waits.
	returns func(id wire.ID) (wait func(context.Context))
	// push asks for every connected node to be visited.
	push func()
	// ways are where a party waits now; nil: nowhere but where it is shown.
	ways func(key wire.KeyHash) []pendingAt
	// release ends the channel that we have to a party that waited.
	release func(key wire.KeyHash)
	// look asks for the party to be looked at now, if it is there.
	look func(key wire.KeyHash)
	// public is where nodes dial this gateway, for join codes; empty if they cannot.
	public string
	// grace is how long after the end of its leaf a party that still has its
	// key is given a new one without being asked for a join code.
	grace time.Duration

	mu       sync.Mutex
	attempts map[wire.KeyHash]*attempt
	renewals map[wire.ID]*attempt // of parties whose renewal was due and failed
	rules    map[string]*rule     // parsed, by their text
	heard    map[wire.ID]bool     // RCPs whose revocation set was looked at since this gateway started

	unsigned revocationTrouble

	signing sync.Mutex // one revocation set at a time
	above   int64      // another set of this number was met: the next one is above it
}

// attempt remembers what became of a waiting party, so that it is not asked
// over and over.
type attempt struct {
	arrivals []arrival // of its connections, as reported
	next     time.Time
	failures int
	leaves   int       // that were made for its key
	counted  time.Time // since when
}

// arrival is one connection of a waiting party, to one first hop.
type arrival struct {
	link  wire.ID // empty: our own
	since time.Time
}

// pending looks at a party that waits for a certificate. It is called when the
// party comes, and again while it is there.
func (e *enrolment) pending(ctx context.Context, key wire.KeyHash, met pendingAt) {
	at := []pendingAt{met}
	if e.ways != nil {
		at = append(at, slices.DeleteFunc(e.ways(key), func(w pendingAt) bool { return w.Link == met.Link })...)
	}
	if !e.due(key, at) {
		return
	}
	spots := e.spots(ctx, at)
	source := origin{spot: spots[0], also: spots[1:], hop: met.Link}
	state, err := e.ask(ctx, key, source)
	if err != nil && ctx.Err() == nil {
		e.log.Warn("enrolment of a waiting party failed; it is tried again", "fingerprint", key.Fingerprint(), "rcp", source.rcp, "source", met.Peer.Source, "error", err)
	}
	e.asked(key, state, err)
}

// spots says where a party waits, as those say that report it.
func (e *enrolment) spots(ctx context.Context, at []pendingAt) []spot {
	out := make([]spot, len(at))
	for i, w := range at {
		out[i].address = w.Peer.Source
		if w.Name != "" {
			out[i].rcp = e.waitsAt(ctx, w.Name, w.Peer.Path)
		}
	}
	return out
}

// waitsAt names the RCP where a party waits that a first hop reports: the last one
// of its path, which knows the address, if the operator has put that behind the
// first (rcp add --via). An RCP must not speak for one that it does not lead to.
func (e *enrolment) waitsAt(ctx context.Context, first string, path []wire.ID) string {
	if len(path) == 0 {
		return first
	}
	last, err := e.store.RCPByID(ctx, path[len(path)-1])
	if err != nil {
		return first
	}
	for at := last; len(path) > 0 && at.Via != ""; path = path[1:] {
		if at.Via == first {
			return last.Name
		}
		if at, err = e.store.RCP(ctx, at.Via); err != nil {
			break
		}
	}
	return first
}

// due tells whether it is time to ask a party, and claims the turn. One that has
// come by a way that was not there when it was asked is asked at once.
func (e *enrolment) due(key wire.KeyHash, at []pendingAt) bool {
	now, arrivals := time.Now(), make([]arrival, len(at))
	for i, w := range at {
		arrivals[i] = arrival{w.Link, w.Peer.Since}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	a := e.attempts[key]
	if a != nil && now.Before(a.next) && (a.leaves >= maxLeaves || !slices.ContainsFunc(arrivals, func(w arrival) bool { return !a.knows(w) })) {
		return false
	}
	if a == nil {
		a = new(attempt)
		e.prune(now)
		e.attempts[key] = a
	}
	a.arrivals, a.next = arrivals, now.Add(retryRefused)
	return true
}

func (a *attempt) knows(w arrival) bool {
	return slices.ContainsFunc(a.arrivals, func(o arrival) bool { return o.link == w.link && o.since.Equal(w.since) })
}

// count begins to count leaves anew when the time for those before is over.
func (a *attempt) count(now time.Time) {
	if now.Sub(a.counted) >= retryGranted {
		a.leaves, a.counted = 0, now
	}
}

// prune forgets parties that nobody has asked for some time; mu is held.
func (e *enrolment) prune(now time.Time) {
	if len(e.attempts) < maxAttempts {
		return
	}
	for key, a := range e.attempts {
		if now.After(a.next) {
			delete(e.attempts, key)
		}
	}
	if len(e.attempts) >= maxAttempts {
		clear(e.attempts)
	}
}

func (e *enrolment) asked(key wire.KeyHash, state string, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	a := e.attempts[key]
	if a == nil {
		return // it was granted in the meantime: ask again
	}
	a.count(time.Now())
	if state == wire.EnrollGranted { // whether it took the leaf or not
		a.leaves++
	}
	var wait time.Duration
	switch {
	case a.leaves >= maxLeaves:
		wait, a.failures = time.Until(a.counted.Add(retryGranted)), 0
	case err != nil:
		wait = min(retryFailed<<min(a.failures, 8), retryRefused)
		a.failures++
	case state == wire.EnrollGranted:
		wait, a.failures = retryGranted, 0
	case state == wire.EnrollDenied:
		wait, a.failures = retryRefused, 0
	default:
		wait, a.failures = retryWaiting, 0
	}
	a.next = time.Now().Add(wait)
}

// again makes the next look at a party count, now.
func (e *enrolment) again(key wire.KeyHash) {
	e.mu.Lock()
	delete(e.attempts, key)
	e.mu.Unlock()
	e.look(key)
}

// spot is where a party waits, as far as that was said.
type spot struct{ rcp, address string }

// origin is where a request came from.
type origin struct {
	spot
	also   []spot   // where the party waits at the same time
	hop    wire.ID  // the first on the way to it; empty for a channel of ours
	device attested // that vouched for the party, in the session with it
}

// ask reads the request of a party in an enrolment session, decides, and tells
// the party.
func (e *enrolment) ask(ctx context.Context, key wire.KeyHash, from origin) (state string, err error) {
	session, via, err := e.open(ctx, key, from.hop)
	if err != nil {
		return "", err
	}
	defer func() { _ = session.Close() }()
	if from.rcp == "" {
		from.rcp = via
	}
	challenge, err := newChallenge()
	if err != nil {
		return "", err
	}
	var req wire.EnrollRequest
	if err := exchange(ctx, challenged{session, challenge}, http.MethodGet, nil, &req); err != nil {
		return "", err
	}
	_, csrKey, err := identity.ParseCSR(req.CSR)
	if err != nil {
		return "", err
	}
	if csrKey != key { // the session's key, the CSR's key and the address are one
		return "", fmt.Errorf("%w: the request is for the key %s, the party holds %s", errForeignCSR, csrKey.Fingerprint(), key.Fingerprint())
	}
	from.device = e.attestation(&req, key, challenge)
	d, err := e.register(ctx, key, &req, from)
	if err != nil {
		return "", err
	}
	if d.state == "" { // discarded: the party is not told
		return wire.EnrollPending, nil
	}
	err = e.tell(ctx, session, key, &req, d)
	if err == nil && e.keepPlace != nil && d.state == wire.EnrollPending && (d.prior != nil || d.fresh) { // else it is not written down
		e.keepPlace(ctx, key)
	}
	return d.state, err
}

// errForeignCSR says that a party asked for a certificate of another's key.
var errForeignCSR = errors.New("not the party's own key")

// register decides on a request and writes the decision down.
func (e *enrolment) register(ctx context.Context, key wire.KeyHash, req *wire.EnrollRequest, from origin) (*decision, error) {
	var d *decision
	err := e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) (err error) {
		if d, err = e.decide(ctx, tx.Queries, key, req, from); err != nil {
			return err
		}
		return e.write(ctx, tx, d, key, req, from)
	})
	if err != nil {
		return nil, fmt.Errorf("register %s %s: %w", req.Role, wire.Quotable(string(req.ID)), err)
	}
	e.registered(ctx, d, key, req, from)
	return d, nil
}

// registered follows a decision that is written down.
func (e *enrolment) registered(ctx context.Context, d *decision, key wire.KeyHash, req *wire.EnrollRequest, from origin) {
	switch {
	case d.state == wire.EnrollDenied:
		e.log.Warn("certificate request refused", "code", d.code, "reason", d.reason, "party", req.Role, "id", req.ID,
			"name", wire.Quotable(req.Name), "fingerprint", key.Fingerprint(), "rcp", from.rcp, "source", from.address)
	case d.state == wire.EnrollPending && d.fresh:
		e.log.Info("certificate request waits for an operator", "code", d.code, "party", req.Role, "id", req.ID,
			"name", wire.Quotable(d.name), "fingerprint", key.Fingerprint(), "rcp", from.rcp, "source", from.address)
	case d.state == wire.EnrollGranted && !d.known:
		e.log.Info("certificate request granted", "party", req.Role, "id", req.ID, "name", d.name, "fingerprint", key.Fingerprint(), "join", d.joinID(), "rule", d.ruleName())
		e.settle(ctx, []wire.Party{d.party}, d.victims)
	}
}

// settle lets the rest of the gateway know of new parties and of those that
// they replaced.
func (e *enrolment) settle(ctx context.Context, parties []wire.Party, victims []victim) {
	if len(victims) > 0 {
		if err := e.publish(ctx, victimParties(victims)); err != nil {
			e.log.Error("revocation set not signed; it is tried again at the next revocation and at the next start", "error", err)
		}
	}
	for _, v := range victims {
		if !slices.ContainsFunc(parties, func(p wire.Party) bool { return p.ID == v.id }) {
			e.changed(ctx, v.role, v.id)
		}
	}
	for _, p := range parties {
		e.changed(ctx, p.Role, p.ID)
	}
}

// tell puts the verdict on the waiting party.
func (e *enrolment) tell(ctx context.Context, s endToEnd, key wire.KeyHash, req *wire.EnrollRequest, d *decision) error {
	v := wire.EnrollVerdict{State: d.state, Code: d.code, Reason: d.reason, Party: d.party, Name: d.name}
	if env, ok := e.ca.Revocations(); ok && len(env.Payload) < maxRevocationsInVerdict && d.state != wire.EnrollPending {
		v.Revocations = &env
	}
	if d.state == wire.EnrollGranted {
		v.Trust = e.trustOf()
	}
	if d.state != wire.EnrollGranted {
		return exchange(ctx, s, http.MethodPut, v, nil)
	}
	rcps, err := e.store.RCPs(ctx)
	if err != nil {
		return err
	}
	v.RCPs = waysIn(rcps, enrolledRCP, e.id.ID(), e.public)
	v.Installation = e.store.Installation().UID
	c, err := e.issue(ctx, wire.IssueRequest{Party: d.party, Name: d.name, Tenant: d.tenant, CSR: req.CSR})
	if err != nil {
		return errors.Join(err, e.delivery(ctx, key, api.RequestGranted, "not issued: "+clip(err.Error())))
	}
	v.Chain = c.chain
	visit := func(context.Context, endToEnd) {}
	if d.party.Role == wire.RoleNode && e.first != nil {
		var end func()
		visit, end = e.first(d.party)
		defer end()
	}
	if err := exchange(ctx, s, http.MethodPut, v, nil); err != nil {
		state := api.RequestGranted
		if a := (*answerError)(nil); errors.As(err, &a) && a.status == http.StatusUnprocessableEntity {
			state = api.RequestFailed // it is offered again, in case that whatever is wrong there is put right
		}
		return errors.Join(err, e.delivery(ctx, key, state, "not delivered: "+clip(err.Error())))
	}
	if err := e.delivered(ctx, key, d, c); err != nil {
		return err
	}
	visit(ctx, s)
	e.release(key) // it is not pending any more
	return nil
}

// delivered notes that the party has its certificate.
func (e *enrolment) delivered(ctx context.Context, key wire.KeyHash, d *decision, c *issued) error {
	var ended int64 // keys that this one takes the place of
	err := e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) (err error) {
		if d.known {
			ended, err = c.succeed(ctx, tx, d.party, d.name, d.tenant, false)
		} else {
			err = c.record(ctx, tx, d.party, d.name, d.tenant)
		}
		if err != nil {
			return err
		}
		if d.party.Role == wire.RoleRCP {
			if err := tx.SetRCPState(ctx, d.name, api.RCPConnecting, "it has its certificate and was not connected yet"); err != nil {
				return err
			}
		}
		tx.Audit(ctx, "certificate.issue", d.name, fmt.Sprintf("%s, %s", d.party, key.Fingerprint()))
		return tx.MoveRequest(ctx, key, api.RequestDelivered, "")
	})
	if err != nil {
		return err
	}
	e.tellEnded(ctx, d.party, ended)
	return nil
}

// delivery notes how far a granted request is.
func (e *enrolment) delivery(ctx context.Context, key wire.KeyHash, state, reason string) error {
	return e.store.Update(context.WithoutCancel(ctx), func(ctx context.Context, tx *store.Tx) error {
		return tx.MoveRequest(ctx, key, state, reason)
	})
}

// challenged adds a challenge to the requests of a session.
type challenged struct {
	endToEnd
	challenge []byte
}

func (c challenged) RoundTrip(r *http.Request) (*http.Response, error) {
	r.Header.Set(wire.HeaderChallenge, base64.RawURLEncoding.EncodeToString(c.challenge))
	return c.endToEnd.RoundTrip(r)
}

// exchange sends one request inside an enrolment session.
func exchange(ctx context.Context, s endToEnd, method string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		if len(b) > wire.MaxEnrollBody {
			return fmt.Errorf("%s %s: %w", method, wire.PathEnroll, wire.ErrTooLarge)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "https://pending"+wire.PathEnroll, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := s.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, wire.PathEnroll, err)
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode/100 != 2 {
		why, _ := io.ReadAll(io.LimitReader(res.Body, 512)) // for people; half of it will do
		return &answerError{status: res.StatusCode, what: method + " " + wire.PathEnroll, why: clip(string(bytes.TrimSpace(why)))}
	}
	if out == nil {
		return nil
	}
	if err := wire.DecodeJSON(res.Body, wire.MaxEnrollBody, out); err != nil {
		return fmt.Errorf("%s %s: %w", method, wire.PathEnroll, err)
	}
	return nil
}

// answerError is what a waiting party answers instead of doing what it is asked.
type answerError struct {
	status    int
	what, why string
}

func (a *answerError) Error() string {
	return fmt.Sprintf("%s: the party answers %d %s: %s", a.what, a.status, http.StatusText(a.status), a.why)
}
