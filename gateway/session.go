package gateway

import (
	"bytes"
	"cmp"
	lists "container/list"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/wire"
)

const (
	// defaultWarm is that of the configuration.
	defaultWarm = 512
	// idleSession is how long a session stays open with nobody using it.
	idleSession = 45 * time.Second
	// openWay bounds one attempt by one way, openAll all of them together.
	openWay = 8 * time.Second
	openAll = 20 * time.Second
	// maxLingering is how many sessions are being closed before who opens others
	// has to wait for one.
	maxLingering = 512
	// sessionAnswer bounds the time to the headers of one answer.
	sessionAnswer = 15 * time.Second
	// maxRefusal bounds the reason of a refusal, in bytes: the paths of a node's
	// files come before what is wrong with them.
	maxRefusal = 512
)

// errSessionsClosed says that the server is stopping.
var errSessionsClosed = errors.New("the gateway is stopping")

// endToEnd is an open session: *session.Session.
type endToEnd interface {
	http.RoundTripper
	Close() error
	Done() <-chan struct{}
}

// sessions opens end-to-end sessions with parties and keeps those in use warm.
type sessions struct {
	fleet   *fleet
	connect func(ctx context.Context, link wire.ID, authority string) (net.Conn, error)
	dial    func(ctx context.Context, stream net.Conn, party wire.Party) (endToEnd, error)
	metrics *metrics
	most    int // kept open; one more closes the one that was idle longest

	mu        sync.Mutex
	closed    bool
	warm      map[wire.ID]*conversation
	idle      lists.List       // of those that are warm and that nobody uses; the longest first
	opening   map[wire.ID]*try // those that others wait for
	tries     map[*try]bool    // all that are under way
	over      []*conversation  // to be closed by unlock
	evicted   bool             // one of these by who opened another
	closing   sync.WaitGroup   // those that are being closed; grows with mu held, until closed
	lingering int              // how many they are
}

// try is a session that is being opened, or that nobody else knows of yet.
type try struct {
	party wire.ID
	over  chan struct{} // closed when it is neither any more
	end   context.CancelCauseFunc
	cut   bool // under sessions.mu: the party was cut off meanwhile
}

func newSessions(f *fleet, m *metrics, most int,
	connect func(ctx context.Context, link wire.ID, authority string) (net.Conn, error),
	dial func(ctx context.Context, stream net.Conn, party wire.Party) (endToEnd, error),
) *sessions {
	return &sessions{fleet: f, metrics: m, connect: connect, dial: dial, most: cmp.Or(most, defaultWarm),
		warm: make(map[wire.ID]*conversation), opening: make(map[wire.ID]*try), tries: make(map[*try]bool)}
}

// conversation is one verified session with one party.
type conversation struct {
	party  wire.Party
	via    route
	since  time.Time
	rt     endToEnd
	broken atomic.Bool // a request failed in transport
	blame  func(error) // tells the fleet that its way is bad; nil in tests

	users  int            // under sessions.mu, as what follows
	used   time.Time      // when the last user left
	unused *lists.Element // in sessions.idle; nil while it is used
}

// RoundTrip sends a request inside the session; host and scheme of its URL do
// not matter.
func (c *conversation) RoundTrip(req *http.Request) (*http.Response, error) {
	res, err := c.rt.RoundTrip(req)
	if err != nil && req.Context().Err() == nil {
		c.broken.Store(true)
	}
	return res, err
}

func (c *conversation) dead() bool {
	select {
	case <-c.rt.Done():
		return true
	default:
		return c.broken.Load()
	}
}

// errMute says that a party does not answer although its session is open.
var errMute = errors.New("the party does not answer")

// mute gives a session up whose other end does not answer: the path may be
// dead without anybody having noticed yet, or an RCP lets nothing through. The
// next session goes another way, if there is one.
func (c *conversation) mute() error { return c.silent(sessionAnswer) }

func (c *conversation) silent(limit time.Duration) error {
	err := fmt.Errorf("%w within %s", errMute, limit)
	if !c.broken.Swap(true) && c.blame != nil {
		c.blame(err)
	}
	return err
}

// statusError is an answer with a status that is not 2xx.
type statusError struct {
	Status int
	Reason string // from the party, so for people only
}

func (e *statusError) Error() string {
	if e.Reason == "" {
		return fmt.Sprintf("answered with status %d %s", e.Status, http.StatusText(e.Status))
	}
	return fmt.Sprintf("answered with status %d: %s", e.Status, e.Reason)
}

// call sends in as JSON, unless it is nil, and reads the answer of at most
// limit bytes into out, unless that is nil. It returns when the whole answer
// was there, within sessionAnswer.
func (c *conversation) call(ctx context.Context, method, path string, in, out any, limit int64) error {
	return c.callWith(ctx, method, path, nil, in, out, limit)
}

// callWith is call with further headers.
func (c *conversation) callWith(ctx context.Context, method, path string, header http.Header, in, out any, limit int64) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	answer := time.AfterFunc(sessionAnswer, func() { cancel(c.mute()) })
	defer answer.Stop()
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "https://"+c.party.ServerName()+path, body)
	if err != nil {
		return err
	}
	maps.Copy(req.Header, header)
	req.Header.Set(wire.HeaderTime, time.Now().UTC().Format(time.RFC3339Nano))
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := c.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, because(ctx, err))
	}
	defer func() { _ = res.Body.Close() }()
	if err := refusal(res); err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if out == nil {
		return nil
	}
	if err := wire.DecodeJSON(res.Body, limit, out); err != nil {
		return fmt.Errorf("%s %s: %w", method, path, because(ctx, err))
	}
	return nil
}

// send posts a body of JSON and returns the answer, whose body is a stream.
func (c *conversation) send(ctx context.Context, method, path string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "https://"+c.party.ServerName()+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := c.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, path, err)
	}
	return res, nil
}

// refusal turns a status that is not 2xx into a *statusError.
func refusal(res *http.Response) error {
	if res.StatusCode >= 200 && res.StatusCode < 300 {
		return nil
	}
	reason := res.Header.Get(wire.HeaderError)
	if reason == "" {
		b, _ := io.ReadAll(io.LimitReader(res.Body, maxRefusal)) // what there is of an explanation
		reason = strings.Join(strings.Fields(string(b)), " ")
	}
	return &statusError{Status: res.StatusCode, Reason: reason[:min(len(reason), maxRefusal)]}
}

// greeting is what a party says of itself.
type greeting struct {
	hello     wire.Hello
	skew      time.Duration // by which its clock is ahead of ours
	nonce     wire.Nonce    // that it was brought
	sent, got time.Time     // when it was asked, and when the answer was there
}

// Hello reads what the party says of itself now, and how far its clock is
// ahead of ours.
func (c *conversation) Hello(ctx context.Context) (wire.Hello, time.Duration, error) {
	a, err := c.greet(ctx, nil)
	if err != nil {
		return wire.Hello{}, 0, err
	}
	return a.hello, a.skew, nil
}

// greet reads what the party says of itself now, and brings it a nonce, and what else
// is in header.
func (c *conversation) greet(ctx context.Context, header http.Header) (*greeting, error) {
	a := &greeting{nonce: wire.NewNonce(), sent: time.Now()}
	if header == nil {
		header = http.Header{}
	}
	header.Set(wire.HeaderNonce, a.nonce.String())
	if err := c.callWith(ctx, http.MethodGet, wire.PathHello, header, nil, &a.hello, wire.MaxHello); err != nil {
		return nil, err
	}
	a.got = time.Now()
	if a.hello.Party != c.party {
		return nil, fmt.Errorf("%s calls itself %s in its hello", c.party, wire.Quotable(a.hello.Party.String()))
	}
	if at := a.hello.Time; !at.IsZero() {
		a.skew = at.Sub(a.sent.Add(a.got.Sub(a.sent) / 2))
	}
	return a, nil
}

// Do runs fn in a session with party: the warm one, or a new one by the best
// way that works. A warm session may have died unnoticed; fn is then run once
// more in a new one, so what it asks must be safe to repeat (everything in the
// session API is).
func (s *sessions) Do(ctx context.Context, party wire.Party, fn func(ctx context.Context, c *conversation) error) error {
	for {
		c, reused, err := s.get(ctx, party)
		if err != nil {
			return err
		}
		err = fn(ctx, c)
		s.put(c)
		if err == nil || !reused || !c.dead() || ctx.Err() != nil {
			return err
		}
	}
}

// get returns a session that put gives back.
func (s *sessions) get(ctx context.Context, party wire.Party) (c *conversation, reused bool, err error) {
	for {
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			return nil, false, errSessionsClosed
		}
		if c := s.warm[party.ID]; c != nil {
			if c.party == party && !c.dead() {
				s.useLocked(c)
				s.mu.Unlock()
				return c, true, nil
			}
			s.removeLocked(c)
		}
		other := s.opening[party.ID]
		if other == nil {
			break
		}
		s.unlock()
		select { // somebody is opening it
		case <-other.over:
		case <-ctx.Done():
			return nil, false, context.Cause(ctx)
		}
	}
	opening, t := s.beginLocked(ctx, party.ID)
	s.opening[party.ID] = t
	s.unlock()

	c, err = s.open(opening, party, "")

	s.mu.Lock()
	defer s.unlock()
	delete(s.opening, party.ID)
	if c, err = s.endLocked(t, c, err); err != nil {
		return nil, false, err
	}
	s.useLocked(c)
	s.keepLocked(c)
	return c, false, nil
}

// errCutOff says that the party was revoked, or its record changed, while a
// session with it was being opened.
var errCutOff = errors.New("the party was revoked or replaced meanwhile")

// beginLocked notes that a session is being opened, for cut to end.
func (s *sessions) beginLocked(ctx context.Context, party wire.ID) (context.Context, *try) {
	ctx, end := context.WithCancelCause(ctx)
	t := &try{party: party, over: make(chan struct{}), end: end}
	s.tries[t] = true
	return ctx, t
}

// endLocked is the end of what beginLocked began. A session that came about
// although its party was cut off meanwhile is closed.
func (s *sessions) endLocked(t *try, c *conversation, err error) (*conversation, error) {
	delete(s.tries, t)
	close(t.over)
	t.end(nil)
	switch {
	case t.cut:
		err = fmt.Errorf("session with %s: %w", s.fleet.label(t.party), errCutOff)
	case err == nil && s.closed:
		err = errSessionsClosed
	}
	if err != nil && c != nil {
		s.over = append(s.over, c)
		c = nil
	}
	return c, err
}

// fresh opens a session of its own, by another first hop than the last one if
// there is another, runs fn in it and closes it, or keeps it warm if none is.
func (s *sessions) fresh(ctx context.Context, party wire.Party, fn func(ctx context.Context, c *conversation) error) error {
	s.mu.Lock()
	ctx, t := s.beginLocked(ctx, party.ID)
	s.unlock()
	c, err := s.open(ctx, party, s.fleet.lastLink(party.ID))
	if err == nil {
		err = fn(ctx, c)
	}
	s.mu.Lock()
	defer s.unlock()
	c, err = s.endLocked(t, c, err)
	switch {
	case err != nil:
		return err
	case s.warm[party.ID] != nil:
		s.over = append(s.over, c)
		return nil
	}
	s.restLocked(c)
	s.keepLocked(c)
	return nil
}

// lastWord runs fn in a session of its own with a node that is revoked, which
// gets no other.
func (s *sessions) lastWord(ctx context.Context, party wire.Party, fn func(ctx context.Context, c *conversation) error) error {
	routes, err := s.fleet.lastRoutes(party.ID)
	if err != nil {
		return fmt.Errorf("open session with %s: %w", s.fleet.label(party.ID), err)
	}
	c, err := s.openBest(ctx, party, byFirstHop(routes, ""))
	if err != nil {
		return err
	}
	err = fn(ctx, c)
	s.mu.Lock()
	defer s.unlock()
	s.over = append(s.over, c)
	return err
}

// put gives a session back.
func (s *sessions) put(c *conversation) {
	s.mu.Lock()
	defer s.unlock()
	c.users--
	switch {
	case c.dead() || s.closed:
		s.removeLocked(c)
	case c.users == 0 && s.warm[c.party.ID] == c:
		s.restLocked(c)
	}
}

// useLocked notes one more user of a session.
func (s *sessions) useLocked(c *conversation) {
	c.users++
	s.stirLocked(c)
}

// stirLocked takes a session out of those that nobody uses.
func (s *sessions) stirLocked(c *conversation) {
	if c.unused != nil {
		s.idle.Remove(c.unused)
		c.unused = nil
	}
}

// restLocked puts a session behind those that were unused for longer.
func (s *sessions) restLocked(c *conversation) {
	c.used, c.unused = time.Now(), s.idle.PushBack(c)
}

// keepLocked keeps a session warm.
func (s *sessions) keepLocked(c *conversation) {
	s.warm[c.party.ID] = c
	s.metrics.warm.Set(float64(len(s.warm)))
	s.evictLocked()
}

// removeLocked forgets a session if it is the warm one, and leaves it to
// unlock to close it.
func (s *sessions) removeLocked(c *conversation) {
	if s.warm[c.party.ID] == c {
		delete(s.warm, c.party.ID)
		s.metrics.warm.Set(float64(len(s.warm)))
	}
	s.stirLocked(c)
	s.over = append(s.over, c)
}

// unlock gives mu up and has what was removed closed: to close a session writes
// to its stream, which takes seconds where an RCP lets nothing through. Who cuts a
// party that is revoked does not wait for that: there is more to be done about it.
// Who has opened one too many does if many linger already, and Run waits for all.
func (s *sessions) unlock() {
	removed, lingering := s.over, &s.closing
	wait := s.evicted && s.lingering >= maxLingering
	if s.closed {
		wait, lingering = true, new(sync.WaitGroup)
	}
	s.over, s.evicted = nil, false
	s.lingering += len(removed)
	var own sync.WaitGroup
	for _, c := range removed {
		own.Add(1)
		lingering.Go(func() {
			defer own.Done()
			_ = c.rt.Close() // it is over either way
			s.mu.Lock()
			s.lingering--
			s.mu.Unlock()
		})
	}
	s.mu.Unlock()
	if wait {
		own.Wait()
	}
}

// evictLocked holds the bound on warm sessions; those in use stay.
func (s *sessions) evictLocked() {
	for len(s.warm) > s.most && s.idle.Len() > 0 {
		s.evicted = true
		s.removeLocked(s.idle.Front().Value.(*conversation)) //nolint:forcetypeassert // nothing else is in it
	}
}

// cut ends the session with a party at once, for instance because its key was
// revoked, and the opening of one.
func (s *sessions) cut(id wire.ID) {
	s.mu.Lock()
	defer s.unlock()
	for t := range s.tries {
		if t.party == id {
			t.cut = true
			t.end(errCutOff)
		}
	}
	if c := s.warm[id]; c != nil {
		s.removeLocked(c)
	}
}

// Run closes sessions that nobody uses, until ctx ends; then it closes all.
func (s *sessions) Run(ctx context.Context) error {
	sweep := time.NewTicker(idleSession / 3)
	defer sweep.Stop()
	for {
		select {
		case <-ctx.Done():
			s.mu.Lock()
			s.closed = true
			for _, c := range s.warm {
				s.removeLocked(c)
			}
			s.unlock()
			s.closing.Wait()
			return nil
		case now := <-sweep.C:
			s.mu.Lock()
			for _, c := range s.warm {
				if c.users == 0 && (now.Sub(c.used) >= idleSession || c.dead()) {
					s.removeLocked(c)
				}
			}
			s.unlock()
		}
	}
}

// open opens a session by the best way that works; by avoid last of all.
func (s *sessions) open(ctx context.Context, party wire.Party, avoid wire.ID) (*conversation, error) {
	routes, err := s.fleet.routes(party.ID)
	if err != nil {
		return nil, fmt.Errorf("open session with %s: %w", s.fleet.label(party.ID), err)
	}
	return s.openBest(ctx, party, byFirstHop(routes, avoid))
}

// openBest opens a session by the first of the ways that works.
func (s *sessions) openBest(ctx context.Context, party wire.Party, routes []route) (*conversation, error) {
	ctx, cancel := context.WithTimeout(ctx, openAll)
	defer cancel()
	began := time.Now()
	var errs []error
	for _, r := range routes {
		rt, err := s.openBy(ctx, party, r)
		if ctx.Err() == nil || err == nil {
			s.fleet.tried(party.ID, r, err)
		}
		if err == nil {
			s.metrics.opened.WithLabelValues("ok").Inc()
			s.metrics.opening.Observe(time.Since(began).Seconds())
			return &conversation{party: party, via: r, since: time.Now(), rt: rt,
				blame: func(err error) { s.fleet.tried(party.ID, r, err) }}, nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", r.name, err))
		if ctx.Err() != nil {
			break
		}
	}
	s.metrics.opened.WithLabelValues("failed").Inc()
	return nil, fmt.Errorf("open session with %s: %w", s.fleet.label(party.ID), errors.Join(errs...))
}

func (s *sessions) openBy(ctx context.Context, party wire.Party, r route) (endToEnd, error) {
	ctx, cancel := context.WithTimeout(ctx, openWay)
	defer cancel()
	stream, err := s.connect(ctx, r.link, wire.ConnectAuthority(party.ID))
	if err != nil {
		return nil, err
	}
	return s.dialOn(ctx, party, stream)
}

// openOn is openBy on one certain channel of a party that hangs on us.
func (s *sessions) openOn(ctx context.Context, party wire.Party, c *channel.Conn) (endToEnd, error) {
	ctx, cancel := context.WithTimeout(ctx, openWay)
	defer cancel()
	stream, err := c.Connect(ctx, wire.ConnectAuthority(party.ID), nil)
	if err != nil {
		return nil, err
	}
	return s.dialOn(ctx, party, stream)
}

func (s *sessions) dialOn(ctx context.Context, party wire.Party, stream net.Conn) (endToEnd, error) {
	rt, err := s.dial(ctx, stream, party)
	if err != nil {
		_ = stream.Close()
		return nil, err
	}
	return rt, nil
}

// byFirstHop keeps the best way of each first hop, which alone decides how a
// CONNECT goes on from there.
func byFirstHop(routes []route, avoid wire.ID) []route {
	var out, last []route
	seen := make(map[wire.ID]bool, len(routes))
	for _, r := range routes {
		switch {
		case seen[r.link]:
		case r.link == avoid:
			last = append(last, r)
		default:
			out = append(out, r)
		}
		seen[r.link] = true
	}
	return append(out, last...)
}
