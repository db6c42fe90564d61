package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

// runner carries actions to nodes and brings back what became of them. The
// database holds all of it: a gateway that starts goes on where the last one
// stopped.
type runner struct {
	s     *Server
	limit int64         // bytes of output that are kept of an action
	grace time.Duration // endGrace
	retry chan struct{} // holds a wake-up: the timers changed

	mu     sync.Mutex
	active map[wire.ID]wire.ID // actions with a goroutine, and their nodes
	byNode map[wire.ID]int     // likewise, by node
	timers map[wire.ID]waiting // open actions that nothing happens to now
	late   map[wire.ID]lateRun // runs that should have ended
}

// waiting is when to look at an action again.
type waiting struct {
	node wire.ID
	at   time.Time
}

func newRunner(s *Server) *runner {
	return &runner{s: s, limit: maxOutput, grace: endGrace, retry: make(chan struct{}, 1), late: make(map[wire.ID]lateRun),
		active: make(map[wire.ID]wire.ID), byNode: make(map[wire.ID]int), timers: make(map[wire.ID]waiting)}
}

// Run runs actions until stop ends; those under way end with work. They are
// picked up by the next gateway.
func (r *runner) Run(stop, work context.Context) error {
	open, err := r.s.store.Actions(stop, store.ActionFilter{OpenOnly: true})
	if err != nil {
		if stop.Err() != nil {
			return nil
		}
		return fmt.Errorf("load open actions: %w", err)
	}
	var runs errgroup.Group
	defer func() { _ = runs.Wait() }() // runs return no errors
	for _, a := range open {
		r.wait(a, time.Now())
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-stop.Done():
			return nil
		case <-r.retry:
		case <-timer.C:
		}
		due, next := r.due(time.Now())
		for id, w := range due {
			a, err := r.s.store.Action(stop, id)
			switch {
			case errors.Is(err, store.ErrNotFound):
			case err != nil:
				r.mu.Lock()
				r.timers[id] = waiting{w.node, time.Now().Add(runRetry)}
				r.mu.Unlock()
				next = minTime(next, time.Now().Add(runRetry))
			case a.Open():
				r.launch(work, &runs, a)
			}
		}
		if !next.IsZero() {
			timer.Reset(max(time.Until(next), time.Millisecond))
		}
	}
}

// due takes out the actions whose time has come, and tells when the next is.
func (r *runner) due(now time.Time) (due map[wire.ID]waiting, next time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	due = make(map[wire.ID]waiting)
	for id, w := range r.timers {
		switch {
		case r.active[id] != "":
		case !w.at.After(now):
			due[id] = w
			delete(r.timers, id)
		case next.IsZero() || w.at.Before(next):
			next = w.at
		}
	}
	return due, next
}

func (r *runner) wait(a *store.Action, at time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.timers[a.ID] = waiting{a.NodeID, at}
	wake(r.retry)
}

// begin starts an action that was just stored.
func (r *runner) begin(a *store.Action) { r.wait(a, time.Now()) }

// cancel makes the goroutine of an action tell its node, or starts one.
func (r *runner) cancel(a *store.Action) { r.wait(a, time.Now()) }

// kick is called when a node came, or hinted that a result waits. An action that
// is being looked at may have been found without its node a moment ago: it is
// looked at once more.
func (r *runner) kick(_ context.Context, t task) (want, time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	for id, w := range r.timers {
		if w.node == t.id {
			r.timers[id] = waiting{w.node, now}
		}
	}
	for id, node := range r.active {
		if node == t.id {
			r.timers[id] = waiting{node, now}
		}
	}
	wake(r.retry)
	return 0, 0
}

// launch gives an action a goroutine, unless it has one or its node has too
// many.
func (r *runner) launch(ctx context.Context, runs *errgroup.Group, a *store.Action) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.active[a.ID] != "" {
		return
	}
	if r.byNode[a.NodeID] >= maxRunsPerNode && !a.Cancelling {
		r.timers[a.ID] = waiting{a.NodeID, time.Now().Add(runRetry)}
		return
	}
	r.active[a.ID] = a.NodeID
	r.byNode[a.NodeID]++
	runs.Go(func() error {
		r.rest(a, r.step(ctx, a))
		return nil
	})
}

// rest takes the goroutine from an action, which is to be looked at again then,
// or at once if it was asked for meanwhile.
func (r *runner) rest(a *store.Action, next time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.active, a.ID)
	if !a.Open() {
		delete(r.late, a.ID)
	}
	if r.byNode[a.NodeID]--; r.byNode[a.NodeID] == 0 {
		delete(r.byNode, a.NodeID)
	}
	w, poked := r.timers[a.ID]
	switch {
	case poked && a.Open() && (next.IsZero() || w.at.Before(next)):
	case a.Open() && !next.IsZero():
		r.timers[a.ID] = waiting{a.NodeID, next}
	default:
		delete(r.timers, a.ID)
	}
	wake(r.retry)
}

// step does what can be done for an open action now, and returns when to look
// again; zero when it has ended, or the gateway stops.
func (r *runner) step(ctx context.Context, a *store.Action) (next time.Time) {
	p := r.s.fleet.Presence(a.NodeID)
	now := time.Now()
	late := !now.Before(a.CreatedAt.Add(a.TTL + startLate))
	var err error
	switch {
	case a.State == wire.ActionQueued && a.TTL > 0 && !now.Before(a.ExpiresAt):
		err = r.end(ctx, a, wire.ActionExpired, api.ActionCodeExpired, fmt.Sprintf("not run: the node did not come within %s", a.TTL))
	case a.State == wire.ActionQueued && a.TTL == 0 && (late || !p.Connected):
		notConnected(a, p)
		err = r.save(ctx, a)
	case a.State == wire.ActionQueued && r.s.fleet.quarantined(a.NodeID) != "":
		err = r.end(ctx, a, wire.ActionRefused, api.ActionCodeRefused, "not run: the node is quarantined: "+r.s.fleet.quarantined(a.NodeID))
	case p.State == wire.StateRevoked || p.State == "":
		err = r.end(ctx, a, wire.ActionLost, api.ActionCodeUnknown, "the node was removed or revoked")
	case !p.Connected:
		if a.State == wire.ActionQueued {
			return a.ExpiresAt
		}
		if until := patience(a, p); now.Before(until) {
			r.awaits(ctx, a, p, until)
			return minTime(until, now.Add(lostAfterDown))
		}
		err = r.end(ctx, a, wire.ActionLost, api.ActionCodeUnknown, fmt.Sprintf("the result is unknown: the node is %s (%s)", p.State, p.Reason))
	default:
		err = r.deliver(ctx, a, late)
		if a.Open() && ctx.Err() == nil && a.TTL == 0 && a.State == wire.ActionQueued {
			// No session came about: nothing was sent.
			notConnected(a, r.s.fleet.Presence(a.NodeID))
			a.Reason = "not run: " + clip(fmt.Sprint(err))
			err = r.save(ctx, a)
		}
	}
	if !a.Open() || ctx.Err() != nil {
		return time.Time{}
	}
	if err != nil {
		r.s.log.Debug("action not finished", "action", a.ID, "node", a.NodeName, "state", a.State, "error", err)
	}
	next = now.Add(2 * runRetry)
	if a.State == wire.ActionQueued && a.ExpiresAt.After(now) {
		next = minTime(a.ExpiresAt, next)
	}
	return next
}

// awaits tells operators why nothing comes of an action that was sent.
func (r *runner) awaits(ctx context.Context, a *store.Action, p presence, until time.Time) {
	reason := "the node is not connected"
	if p.Reason != "" {
		reason += " (" + p.Reason + ")"
	}
	reason = fmt.Sprintf("%s: its result is awaited until %s", clip(reason), until.UTC().Format(time.RFC3339))
	if a.Reason == reason {
		return
	}
	a.Reason = reason
	if err := r.save(ctx, a); err != nil && ctx.Err() == nil {
		r.s.log.Warn("why an action waits was not noted", "action", a.ID, "node", a.NodeName, "error", err)
	}
}

// patience is until when a node that is gone may come back with the result of
// an action that was sent to it.
func patience(a *store.Action, p presence) time.Time {
	switch {
	case a.State == wire.ActionSent: // and perhaps never arrived: it may not begin late
		return a.CreatedAt.Add(a.TTL + startLate)
	case p.State == wire.StateDown:
		return p.Since.Add(lostAfterDown)
	}
	// Presence may not have noticed yet, or the way is cut and the node is well.
	since := p.LastSeen
	if p.State == wire.StateUnreachable {
		since = p.Since
	}
	if a.SentAt.After(since) {
		since = a.SentAt
	}
	return since.Add(lostAfterUnreachable)
}

// minTime is the earlier of two, where zero is never.
func minTime(a, b time.Time) time.Time {
	if b.IsZero() || !a.IsZero() && a.Before(b) {
		return a
	}
	return b
}

// deliver sends the action, or joins the run that was begun, and stores what
// comes back. With attach the node must not begin it now.
func (r *runner) deliver(ctx context.Context, a *store.Action, attach bool) error {
	env, err := r.s.id.Sign(wire.TypeAction, wire.Action{ID: a.ID, Node: a.NodeID, Installation: r.s.store.Installation().UID, Command: a.Command,
		Issued: a.CreatedAt, TTL: a.TTL, Timeout: a.Timeout})
	if err != nil {
		return fmt.Errorf("sign action: %w", err)
	}
	err = r.s.sessions.Do(ctx, r.s.party(wire.RoleNode, a.NodeID), func(ctx context.Context, c *conversation) error {
		if a.State == wire.ActionQueued {
			a.State, a.SentAt = wire.ActionSent, time.Now().UTC()
			if err := r.save(ctx, a); err != nil || !a.Open() { // on disk before it is sent; cancelled while the session opened
				return err
			}
		}
		return r.converse(ctx, c, a, env, attach)
	})
	var no *statusError
	switch {
	case err == nil || !errors.As(err, &no):
		return err
	case attach && no.Status == http.StatusNotFound:
		return r.end(ctx, a, wire.ActionLost, api.ActionCodeUnknown, "the node knows of no such run: it was not begun in time")
	case no.Status == http.StatusTooManyRequests, no.Status == http.StatusServiceUnavailable && a.TTL > 0, no.Status >= 500 && no.Status != http.StatusServiceUnavailable:
		return err // it may be otherwise later
	}
	return r.end(ctx, a, wire.ActionRefused, api.ActionCodeRefused, no.Error())
}

// converse runs one POST /v1/actions.
func (r *runner) converse(ctx context.Context, c *conversation, a *store.Action, env wire.Envelope, attach bool) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	after, err := r.s.store.LastFrame(ctx, a.ID)
	if err != nil {
		return err
	}
	size, err := r.s.store.OutputSize(ctx, a.ID) // with what earlier sessions brought
	if err != nil {
		return err
	}
	q := url.Values{"after": {strconv.FormatInt(after, 10)}}
	if attach {
		q.Set(wire.QueryAttach, "1")
	}
	body, err := wire.AppendLine(nil, env)
	if err != nil {
		return err
	}
	if a.Cancelling {
		if err := r.tellCancel(ctx, c, a); err != nil {
			return err
		}
	}
	answer := time.AfterFunc(sessionAnswer, func() { cancel(c.mute()) })
	res, err := c.send(ctx, http.MethodPost, wire.PathActions+"?"+q.Encode(), body)
	answer.Stop()
	if err != nil {
		return because(ctx, err)
	}
	defer func() { _ = res.Body.Close() }()
	if err := refusal(res); err != nil {
		return err
	}
	if a.State == wire.ActionSent || a.Reason != "" {
		if a.State == wire.ActionSent {
			a.State, a.StartedAt = wire.ActionRunning, time.Now().UTC()
		}
		a.Reason = "" // it waits no more
		if err := r.save(ctx, a); err != nil {
			return err
		}
	}
	frames, stop := readFrames(ctx, c, cancel, res.Body)
	defer stop()
	told := a.Cancelling
	look := time.NewTicker(runRetry)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-look.C:
			if !told && r.cancelWanted(ctx, a) {
				told = true
				if err := r.tellCancel(ctx, c, a); err != nil {
					return err
				}
			}
			if why := r.overdue(a, told, size, time.Now()); why != "" {
				return r.end(ctx, a, wire.ActionLost, api.ActionCodeUnknown, why)
			}
		case <-frames.news:
			var batch []wire.ActionFrame
			var result *wire.ActionResult
			var end error
			for _, f := range frames.take() {
				switch {
				case f.err != nil:
					end = f.err
				case f.Result != nil:
					result = f.Result
				case f.N > after && size < r.limit && (f.Stream == "stdout" || f.Stream == "stderr"):
					after = f.N
					size += int64(len(f.Data)) + store.FrameOverhead
					batch = append(batch, f.ActionFrame)
				case f.N > after:
					a.Truncated = true
				}
			}
			if err := r.store(ctx, a, batch, result); err != nil {
				return err
			}
			switch {
			case result != nil:
				r.s.fleet.contact(a.NodeID)
				return nil
			case errors.Is(end, io.EOF):
				return fmt.Errorf("the node ended the stream without a result: %w", io.ErrUnexpectedEOF)
			case end != nil:
				return because(ctx, end)
			}
		}
	}
}

// lateRun is a run that should have ended: for how long its node was there and said
// that it goes on, since when its output had that size.
type lateRun struct {
	said time.Duration
	size int64
}

// overdue says at each look, every runRetry, why a run is given up that should have
// ended, and of which its node says that it goes on; empty: it is not. Output that
// comes slowly is waited for, in steps of which there are few: a byte now and then
// keeps nothing.
func (r *runner) overdue(a *store.Action, told bool, size int64, now time.Time) string {
	var why string
	switch {
	case told:
		why = "the node was told to cancel it"
	case a.Timeout > 0 && !a.StartedAt.IsZero() && now.After(a.StartedAt.Add(a.Timeout)):
		why = fmt.Sprintf("the node is to end it after %s", a.Timeout)
	default:
		return ""
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	l, ok := r.late[a.ID]
	if !ok || size-l.size >= maxOutput/64 {
		l = lateRun{size: size}
	} else {
		l.said += runRetry
	}
	if r.late[a.ID] = l; l.said < r.grace {
		return ""
	}
	return fmt.Sprintf("the result is unknown: %s, and has not ended it for %s", why, l.said)
}

// runFrame is one line of a run, or the end of its stream.
type runFrame struct {
	wire.ActionFrame
	err error
}

// readFrames reads the frames of a run until its stream ends; stop ends it. A
// session that brings none for runSilence is given up, and cancel called.
func readFrames(ctx context.Context, c *conversation, cancel context.CancelCauseFunc, body io.ReadCloser) (frames *intake[runFrame], stop func()) {
	frames = newIntake[runFrame](256, 1<<20)
	lines := wire.NewLineReader(body, wire.MaxFrameLine)
	silence := time.AfterFunc(runSilence, func() { cancel(c.silent(runSilence)) })
	read := make(chan struct{})
	go func() { // ends with the body, which is closed before we return
		defer close(read)
		defer silence.Stop()
		for {
			var f runFrame
			silence.Reset(runSilence)
			f.err = lines.Next(&f.ActionFrame)
			silence.Stop() // to wait for the database is no silence of the node
			if !frames.put(ctx, f, len(f.Data), f.err != nil) || f.err != nil {
				return
			}
		}
	}()
	return frames, func() { cancel(nil); _ = body.Close(); <-read }
}

// cancelWanted looks whether an operator asked for the end of a run. The
// runner's timer was set for it; the run's own goroutine does it.
func (r *runner) cancelWanted(ctx context.Context, a *store.Action) bool {
	r.mu.Lock()
	_, poked := r.timers[a.ID]
	delete(r.timers, a.ID)
	r.mu.Unlock()
	if !poked {
		return false
	}
	now, err := r.s.store.Action(ctx, a.ID)
	return err == nil && now.Cancelling
}

func (r *runner) tellCancel(ctx context.Context, c *conversation, a *store.Action) error {
	err := c.call(ctx, http.MethodDelete, wire.PathActionID+string(a.ID), nil, nil, 0)
	var no *statusError
	if errors.As(err, &no) { // it has ended, or never began: its result says so
		return nil
	}
	return err
}

// store writes frames, and the end if there is one, in one transaction.
func (r *runner) store(ctx context.Context, a *store.Action, frames []wire.ActionFrame, result *wire.ActionResult) error {
	if len(frames) == 0 && result == nil {
		return nil
	}
	if result != nil {
		applyResult(a, result)
	}
	err := r.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		if err := tx.AddFrames(ctx, a, frames); err != nil {
			return err
		}
		if result == nil {
			return nil
		}
		return tx.SaveAction(ctx, a)
	})
	return r.ended(a, err)
}

// applyResult takes over what the node says of a run that has ended.
func applyResult(a *store.Action, res *wire.ActionResult) {
	a.State, a.Reason, a.Signal = res.State, clip(res.Reason), res.Signal
	a.Truncated = a.Truncated || res.Truncated
	if !res.Started.IsZero() {
		a.StartedAt = res.Started.UTC()
	}
	code := res.ExitCode
	switch res.State {
	case wire.ActionSucceeded:
		a.ExitCode = &code
	case wire.ActionFailed:
		a.ExitCode = &code
		if res.Started.IsZero() {
			a.Code = api.ActionCodeNotStarted
		}
	case wire.ActionTimedOut:
		a.Code = api.ActionCodeTimedOut
		a.ExitCode = &code
	case wire.ActionCancelled:
		a.Code = api.ActionCodeCancelled
		a.ExitCode = &code
	case wire.ActionExpired:
		if a.Code = api.ActionCodeExpired; a.TTL == 0 { // it might not wait, so it was not run
			a.Code = api.ActionCodeNotConnected
		}
	case wire.ActionRefused:
		a.Code = api.ActionCodeRefused
	default:
		a.State, a.Code = wire.ActionLost, api.ActionCodeUnknown
		if a.Reason == "" {
			a.Reason = "the node does not know what became of it"
		}
	}
	a.EndedAt = time.Now().UTC() // our clock; the node's may be off
}

func (r *runner) end(ctx context.Context, a *store.Action, state, code, reason string) error {
	a.State, a.Code, a.Reason = state, code, clip(reason)
	return r.save(ctx, a)
}

func (r *runner) save(ctx context.Context, a *store.Action) error {
	err := r.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error { return tx.SaveAction(ctx, a) })
	return r.ended(a, err)
}

// ended looks at the result of writing an action: one that somebody else ended
// stays as it is.
func (r *runner) ended(a *store.Action, err error) error {
	switch {
	case errors.Is(err, store.ErrChanged):
		a.State = wire.ActionCancelled
		return nil
	case err != nil:
		if !a.Open() { // not written: it is open still
			a.State = wire.ActionSent
		}
		return fmt.Errorf("store action %s: %w", a.ID, err)
	case !a.Open():
		r.s.metrics.actions.WithLabelValues(a.State).Inc()
	}
	return nil
}
