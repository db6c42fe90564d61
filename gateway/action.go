package gateway

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/bus"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

const (
	// maxRunsPerNode bounds the actions that are under way with one node; the
	// rest wait in the database.
	maxRunsPerNode = 16
	// A node that is gone while an action runs may have been restarted: its
	// result is unknown only after this time of down, or of unreachable.
	lostAfterDown        = time.Minute
	lostAfterUnreachable = 15 * time.Minute
	// startLate is how much later than its TTL an action may reach a node: the
	// time that a session takes. After it only a run that was begun is joined.
	startLate = 30 * time.Second
	// runRetry is the pause before an action whose session broke is joined again.
	runRetry = time.Second
	// runSilence is how long the frames of a run may be silent: three times that
	// a node that is there says so were missed.
	runSilence = 3*wire.ActionAlive + 5*time.Second
	// endGrace is how long a node may take to end a run whose time limit is over, or
	// that it was told to cancel: it needs seconds, unless it does not want to.
	endGrace = 5 * time.Minute
	// batchPause is the least time between two looks at a batch that somebody
	// follows.
	batchPause = 250 * time.Millisecond
	// maxOutput bounds what is kept of one action's output, in bytes, whatever
	// the node's own limit is.
	maxOutput = 64 << 20
)

// runAction decides on queued actions that were stored a moment ago: it sends
// them, leaves them to wait for their node, or ends those that may not wait
// and whose node is not connected. It changes them as it changes the database.
func (s *Server) runAction(ctx context.Context, actions []*store.Action) error {
	var absent []*store.Action
	for _, a := range actions {
		if p := s.fleet.Presence(a.NodeID); a.Open() && a.State == wire.ActionQueued && a.TTL == 0 && !p.Connected {
			notConnected(a, p)
			absent = append(absent, a)
		}
	}
	if len(absent) > 0 {
		// The actions are on disk: whoever asked for them may go away now.
		err := s.store.Update(context.WithoutCancel(ctx), func(ctx context.Context, tx *store.Tx) error {
			for _, a := range absent {
				if err := tx.SaveAction(ctx, a); err != nil && !errors.Is(err, store.ErrChanged) {
					return fmt.Errorf("action %s: %w", a.ID, err)
				}
			}
			return nil
		})
		if err != nil { // the runner looks at all of them, and tries again
			for _, a := range actions {
				s.actions.begin(a)
			}
			return err
		}
	}
	for _, a := range actions {
		if a.Open() {
			s.actions.begin(a)
		} else {
			s.metrics.actions.WithLabelValues(a.State).Inc()
		}
	}
	return nil
}

// notConnected ends an action that may not wait.
func notConnected(a *store.Action, p presence) {
	a.State, a.Code = wire.ActionExpired, api.ActionCodeNotConnected
	state := string(p.State)
	if p.Reason != "" {
		state += ": " + p.Reason
	}
	a.Reason = fmt.Sprintf("not run: the node is not connected (%s); give it time with a ttl", state)
	if p.State == wire.StateRevoked { // time does not help
		a.Reason = fmt.Sprintf("not run: the node is not connected (%s); it has to enrol anew", state)
	}
}

// cancelAction tells the node of an action that was marked as cancelling a
// moment ago. One that was not sent yet has ended with the mark.
func (s *Server) cancelAction(_ context.Context, a *store.Action) error {
	if a.Open() {
		s.actions.cancel(a)
	}
	return nil
}

// followActions hands the output of one action, or of those of one batch, to f, what is stored first and
// then what comes, and for each action its end. Without follow it returns when
// what is stored was handed over.
func (s *Server) followActions(ctx context.Context, ids []wire.ID, follow bool, f func(api.Output) error) error {
	t := &tail{s: s, f: f, open: make(map[wire.ID]*progress, len(ids))}
	topic := bus.Action(string(ids[0]))
	if len(ids) > 1 {
		first, err := s.store.Action(ctx, ids[0])
		if err != nil {
			return fmt.Errorf("action %s: %w", ids[0], err)
		}
		t.batch = first.Batch
		topic = bus.Batch(t.batch)
	}
	wakes, cancel := s.bus.Subscribe(topic)
	defer cancel()
	look := time.NewTicker(5 * time.Second) // wake-ups may be lost
	defer look.Stop()
	for _, id := range ids { // all of them, once
		t.open[id] = &progress{}
		if err := t.read(ctx, id); err != nil {
			return err
		}
	}
	for follow && len(t.open) > 0 {
		select {
		case <-wakes:
		case <-look.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if len(ids) == 1 {
			if err := t.read(ctx, ids[0]); err != nil {
				return err
			}
			continue
		}
		if err := t.readChanged(ctx); err != nil {
			return err
		}
		select { // a look at a large batch has a price
		case <-time.After(batchPause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// tail is one caller that follows actions.
type tail struct {
	s     *Server
	f     func(api.Output) error
	batch string // of all of them, if there are several
	open  map[wire.ID]*progress
}

// progress is how far a caller has read an action.
type progress struct {
	after         int64
	state, reason string
}

// readChanged reads those actions of which there is something new.
func (t *tail) readChanged(ctx context.Context) error {
	all, err := t.s.store.Progress(ctx, t.batch)
	if err != nil {
		return fmt.Errorf("actions of batch %s: %w", t.batch, err)
	}
	for _, now := range all {
		if p := t.open[now.ID]; p == nil || p.after >= now.N && p.state == now.State && p.reason == now.Reason {
			continue
		}
		if err := t.read(ctx, now.ID); err != nil {
			return err
		}
	}
	return nil
}

// read hands over what is new of one action.
func (t *tail) read(ctx context.Context, id wire.ID) error {
	p := t.open[id]
	// The state first: what was stored before an end is then there.
	a, err := t.s.store.Action(ctx, id)
	if err != nil {
		return fmt.Errorf("action %s: %w", id, err)
	}
	if p.after, err = t.s.handFrames(ctx, a, p.after, t.f); err != nil {
		return err
	}
	if a.State != p.state || a.Reason != p.reason {
		p.state, p.reason = a.State, a.Reason
		v := actionView(a)
		if err := t.f(api.Output{Action: a.ID, Node: a.NodeName, N: p.after, End: &v}); err != nil {
			return err
		}
	}
	if !a.Open() {
		delete(t.open, id)
	}
	return nil
}

func (s *Server) handFrames(ctx context.Context, a *store.Action, after int64, f func(api.Output) error) (int64, error) {
	const page = 256
	for {
		frames, err := s.store.Frames(ctx, a.ID, after, page)
		if err != nil {
			return after, fmt.Errorf("output of action %s: %w", a.ID, err)
		}
		for _, fr := range frames {
			if err := f(api.Output{Action: a.ID, Node: a.NodeName, N: fr.N, Stream: fr.Stream, Data: fr.Data}); err != nil {
				return after, err
			}
			after = fr.N
		}
		if len(frames) < page {
			return after, nil
		}
	}
}

// actionView is an action as the API shows it.
func actionView(a *store.Action) api.Action {
	v := api.Action{ID: a.ID, Batch: a.Batch, NodeID: a.NodeID, Node: a.NodeName, Command: a.Command, State: a.State, Code: a.Code, Reason: a.Reason,
		ExitCode: a.ExitCode, Signal: a.Signal, Truncated: a.Truncated, TTL: wire.Duration(a.TTL), Timeout: wire.Duration(a.Timeout),
		Created: a.CreatedAt, CreatedBy: a.CreatedBy}
	for _, t := range []struct {
		to   **time.Time
		from time.Time
	}{{&v.Expires, a.ExpiresAt}, {&v.Started, a.StartedAt}, {&v.Ended, a.EndedAt}} {
		if !t.from.IsZero() {
			*t.to = &t.from
		}
	}
	return v
}
