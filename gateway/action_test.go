package gateway

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

// follow collects the output of an action until it ends.
func (w *world) follow(ctx context.Context, ids ...wire.ID) (stdout string, ends []api.Action, err error) {
	err = w.s.followActions(ctx, ids, true, func(o api.Output) error {
		stdout += string(o.Data)
		if o.End != nil {
			ends = append(ends, *o.End)
		}
		return nil
	})
	return stdout, ends, err
}

func running(t *testing.T) (*world, *fakeRCP, *fakeNode) {
	w := newWorld(t)
	r, n := w.rcp("dmz"), w.enrolled(w.node("web"))
	r.hold(n)
	w.run()
	w.state(n.id.ID(), wire.StateRunning)
	return w, r, n
}

func TestActionStreamsItsOutputAndExitCode(t *testing.T) {
	t.Parallel()
	w, _, n := running(t)
	a := w.act(n, 0, "sh", "-c", "echo out; exit 3")
	type result struct {
		out  string
		ends []api.Action
		err  error
	}
	got := make(chan result, 1)
	go func() {
		var r result
		r.out, r.ends, r.err = w.follow(context.Background(), a.ID)
		got <- r
	}()
	run := n.started(t, "sh")
	if run.action.Node != n.id.ID() || run.action.Installation != w.db.Installation().UID || run.action.Command[2] != "echo out; exit 3" {
		t.Fatalf("the node was asked for %+v", run.action)
	}
	n.output(run, "out\n")
	n.output(run, "more\n")
	n.exit(run, 3)
	r := <-got
	if r.err != nil || r.out != "out\nmore\n" {
		t.Fatalf("output %q, %v", r.out, r.err)
	}
	last := r.ends[len(r.ends)-1]
	if last.State != wire.ActionFailed || last.ExitStatus() != 3 {
		t.Fatalf("ended as %+v", last)
	}
}

func TestActionForAnAbsentNodeEndsAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n := w.enrolled(w.node("away"))
	w.run()
	eventually(t, "the fleet is loaded", func() bool { return w.s.fleet.Presence(n.id.ID()).Known })
	began := time.Now()
	a := w.done(w.act(n, 0, "true"))
	if v := actionView(a); v.ExitStatus() != api.ExitNotRun || a.Code != api.ActionCodeNotConnected || !strings.Contains(a.Reason, "not connected") {
		t.Fatalf("ended as %+v", v)
	}
	if d := time.Since(began); d > 2*time.Second {
		t.Fatalf("it took %v", d)
	}
}

// A node that is revoked does not come, whatever time it is given.
func TestActionForARevokedNodeSaysSo(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n := w.enrolled(w.node("gone"))
	w.run()
	eventually(t, "the fleet is loaded", func() bool { return w.s.fleet.Presence(n.id.ID()).Known })
	row, err := w.s.store.Node(t.Context(), n.id.ID())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.s.enrolment.revokeNode(t.Context(), row, false); err != nil {
		t.Fatal(err)
	}
	a := w.done(w.act(n, 0, "true"))
	if v := actionView(a); v.ExitStatus() != api.ExitNotRun || !strings.Contains(a.Reason, "revoked") || strings.Contains(a.Reason, "ttl") {
		t.Errorf("ended as %+v", v)
	}
	if _, err := w.s.fleet.routes(n.id.ID()); !errors.Is(err, ErrNotConnected) || !strings.Contains(err.Error(), "revoked") {
		t.Errorf("no session, because %v", err)
	}
}

func TestActionWhoseSessionCannotBeOpenedWasNotRun(t *testing.T) {
	t.Parallel()
	w, r, n := running(t)
	r.mu.Lock()
	r.refuse = true
	r.mu.Unlock()
	w.s.sessions.cut(n.id.ID())
	a := w.done(w.act(n, 0, "true"))
	if v := actionView(a); v.ExitStatus() != api.ExitNotRun || !a.SentAt.IsZero() || !strings.Contains(a.Reason, "not run") {
		t.Fatalf("ended as %+v", v)
	}
}

func TestActionWaitsForItsNodeAndExpires(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r, n, never := w.rcp("dmz"), w.enrolled(w.node("late")), w.enrolled(w.node("never"))
	w.run()
	eventually(t, "the rcp is connected", func() bool { h, ok := w.s.fleet.hop(r.id.ID()); return ok && h.Synced })
	a, b := w.act(n, time.Hour, "queued"), w.act(never, 300*time.Millisecond, "true")
	if b = w.done(b); b.State != wire.ActionExpired || actionView(b).ExitStatus() != api.ExitTimedOut {
		t.Fatalf("ended as %+v", actionView(b))
	}
	w.restart() // the queue is in the database
	r.hold(n)
	run := n.started(t, "queued")
	n.exit(run, 0)
	if a = w.done(a); a.State != wire.ActionSucceeded {
		t.Fatalf("ended as %+v", actionView(a))
	}
}

func TestBrokenSessionJoinsTheRunAgain(t *testing.T) {
	t.Parallel()
	w, _, n := running(t)
	n.mu.Lock()
	n.cutAfter = 2
	n.mu.Unlock()
	a := w.act(n, 0, "long")
	run := n.started(t, "long")
	for _, s := range []string{"1 ", "2 ", "3 "} {
		n.output(run, s)
	}
	eventually(t, "output came over the second session", func() bool {
		f, err := w.db.LastFrame(context.Background(), a.ID)
		return err == nil && f == 3
	})
	n.exit(run, 0)
	w.done(a)
	out, _, err := w.follow(context.Background(), a.ID)
	if err != nil || out != "1 2 3 " {
		t.Fatalf("output %q, %v", out, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.runs) != 1 || run.starts != 1 {
		t.Fatalf("it ran %d times", run.starts)
	}
}

// The limit on output is one of the action, not of each session, and each piece
// counts for more than its bytes; one without bytes does no harm.
func TestOutputLimitOutlivesASession(t *testing.T) {
	t.Parallel()
	w, _, n := running(t)
	w.s.actions.limit = 3*store.FrameOverhead + 3
	n.mu.Lock()
	n.cutAfter = 3
	n.mu.Unlock()
	a := w.act(n, 0, "long")
	run := n.started(t, "long")
	for _, s := range []string{"1", "", "3", "4", "5", "6"} {
		n.output(run, s)
	}
	n.exit(run, 0)
	if a = w.done(a); a.State != wire.ActionSucceeded || !a.Truncated {
		t.Fatalf("ended as %+v", actionView(a))
	}
	out, _, err := w.follow(context.Background(), a.ID)
	if err != nil || out != "134" {
		t.Fatalf("output %q, %v", out, err)
	}
	if size, err := w.db.OutputSize(context.Background(), a.ID); err != nil || size != 3*store.FrameOverhead+3 {
		t.Fatalf("%d bytes are stored, %v", size, err)
	}
}

// A node that says for ever that a run goes on, which it was told to cancel, or whose
// time limit is over, does not keep it so.
func TestRunThatItsNodeDoesNotEndIsGivenUp(t *testing.T) {
	t.Parallel()
	w, _, n := running(t)
	const grace = 3 * time.Second
	w.s.actions.grace = grace
	n.mu.Lock()
	n.deaf = true
	n.mu.Unlock()
	cancelled, free := w.act(n, 0, "cancelled"), w.act(n, 0, "free")
	late := &store.Action{ID: wire.NewID(), Tenant: store.DefaultTenant, NodeID: n.id.ID(), NodeName: n.name, Command: []string{"late"}, Timeout: time.Second}
	w.update(func(ctx context.Context, tx *store.Tx) error { return tx.AddActions(ctx, []*store.Action{late}) })
	copied := *late
	if err := w.s.runAction(t.Context(), []*store.Action{&copied}); err != nil {
		t.Fatal(err)
	}
	n.started(t, "free")
	n.started(t, "late")
	n.output(n.started(t, "cancelled"), "x")
	eventually(t, "it runs", func() bool { return must1(w.db.Action(t.Context(), cancelled.ID)).State == wire.ActionRunning })
	w.update(func(ctx context.Context, tx *store.Tx) error {
		row, err := tx.Action(ctx, cancelled.ID)
		if err != nil {
			return err
		}
		return tx.CancelAction(ctx, row, api.ActionCodeCancelled)
	})
	began := time.Now()
	if err := w.s.cancelAction(t.Context(), must1(w.db.Action(t.Context(), cancelled.ID))); err != nil {
		t.Fatal(err)
	}
	for _, a := range []*store.Action{late, cancelled} {
		if now := w.done(a); now.State != wire.ActionLost || now.Code != api.ActionCodeUnknown || !strings.Contains(now.Reason, "has not ended it") || now.EndedAt.IsZero() {
			t.Errorf("%s ended as %+v", a.Command, actionView(now))
		}
	}
	if took := time.Since(began); took < grace {
		t.Errorf("given up after %v", took)
	}
	if now := must1(w.db.Action(t.Context(), free.ID)); now.State != wire.ActionRunning {
		t.Errorf("a run without an end is %s", now.State)
	}
}

// What counts is what the node says while it is there: one that comes back after it
// was cut off has the time to bring the result.
func TestNodeThatWasCutOffIsNotLate(t *testing.T) {
	t.Parallel()
	r := newRunner(nil)
	now := time.Now()
	a := &store.Action{ID: wire.NewID(), Timeout: time.Second, StartedAt: now.Add(-time.Hour)}
	if why := r.overdue(a, false, 0, now) + r.overdue(a, false, 0, now.Add(2*endGrace)); why != "" {
		t.Errorf("given up at once: %s", why)
	}
	looks := 0
	for r.overdue(a, false, 0, now) == "" {
		if looks++; looks > int(endGrace/runRetry) {
			t.Fatal("it is waited for for ever")
		}
	}
	if looks < int(endGrace/runRetry)-3 {
		t.Errorf("given up after %d looks", looks)
	}
}

func TestRestartedGatewayPicksUpARun(t *testing.T) {
	t.Parallel()
	w, _, n := running(t)
	a := w.act(n, 0, "long")
	run := n.started(t, "long")
	n.output(run, "before ")
	eventually(t, "output is stored", func() bool {
		f, err := w.db.LastFrame(context.Background(), a.ID)
		return err == nil && f == 1
	})
	w.restart()
	n.output(run, "after")
	n.exit(run, 7)
	if a = w.done(a); a.ExitCode == nil || *a.ExitCode != 7 {
		t.Fatalf("ended as %+v", actionView(a))
	}
	if out, _, err := w.follow(context.Background(), a.ID); err != nil || out != "before after" {
		t.Fatalf("output %q, %v", out, err)
	}
}

func TestCancelReachesTheNode(t *testing.T) {
	t.Parallel()
	w, _, n := running(t)
	a := w.act(n, 0, "long")
	n.started(t, "long")
	eventually(t, "it runs", func() bool {
		now, err := w.db.Action(context.Background(), a.ID)
		return err == nil && now.State == wire.ActionRunning
	})
	var row *store.Action
	w.update(func(ctx context.Context, tx *store.Tx) (err error) {
		if row, err = tx.Action(ctx, a.ID); err != nil {
			return err
		}
		return tx.CancelAction(ctx, row, api.ActionCodeCancelled)
	})
	if err := w.s.cancelAction(context.Background(), row); err != nil {
		t.Fatal(err)
	}
	if a = w.done(a); a.State != wire.ActionCancelled || actionView(a).ExitStatus() != 143 {
		t.Fatalf("ended as %+v", actionView(a))
	}
}

func TestRefusedByTheNode(t *testing.T) {
	t.Parallel()
	w, _, n := running(t)
	a := w.done(w.act(n, time.Hour, "forbidden"))
	if actionView(a).ExitStatus() != api.ExitRefused || !strings.Contains(a.Reason, "SALLYPORT_NODE_ALLOW_COMMANDS") {
		t.Fatalf("ended as %+v", actionView(a))
	}
}

func TestRunThatWasNeverBegunIsNotBegunLate(t *testing.T) {
	t.Parallel()
	w, _, n := running(t)
	// The gateway was killed between "sent" on disk and the sending, long ago.
	a := &store.Action{ID: wire.NewID(), Batch: "b", Tenant: store.DefaultTenant, NodeID: n.id.ID(), NodeName: n.name, Command: []string{"late"}}
	w.update(func(ctx context.Context, tx *store.Tx) error {
		if err := tx.AddActions(ctx, []*store.Action{a}); err != nil {
			return err
		}
		a.State, a.SentAt = wire.ActionSent, tx.Now()
		return tx.SaveAction(ctx, a)
	})
	sent := *a
	sent.CreatedAt = time.Now().Add(-time.Hour)
	if err := w.s.actions.deliver(context.Background(), &sent, true); err != nil {
		t.Fatal(err)
	}
	if a = w.done(a); a.State != wire.ActionLost || actionView(a).ExitStatus() != api.ExitNotRun {
		t.Fatalf("ended as %+v", actionView(a))
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.runs) != 0 {
		t.Fatal("it was begun")
	}
}

func TestResultOfANodeThatIsGoneIsUnknown(t *testing.T) {
	t.Parallel()
	w, _, n := running(t)
	a := w.act(n, 0, "long")
	n.started(t, "long")
	if err := w.s.nodeChanged(context.Background(), n.id.ID()); err != nil {
		t.Fatal(err)
	}
	w.update(func(ctx context.Context, tx *store.Tx) error { return tx.RemoveNode(ctx, n.id.ID()) })
	if err := w.s.nodeChanged(context.Background(), n.id.ID()); err != nil {
		t.Fatal(err)
	}
	if a = w.done(a); a.State != wire.ActionLost || a.Code != api.ActionCodeUnknown {
		t.Fatalf("ended as %+v", actionView(a))
	}
}

func TestFollowEndsWithItsCaller(t *testing.T) {
	t.Parallel()
	w, _, n := running(t)
	both := w.batch(n, 0, []string{"one"}, []string{"two"})
	a, b := both[0], both[1]
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		_, _, err := w.follow(ctx, a.ID, b.ID)
		ended <- err
	}()
	n.started(t, "one")
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Fatalf("follow ended with %v", err)
	}
	n.exit(n.started(t, "one"), 0)
	n.exit(n.started(t, "two"), 0)
	w.done(a)
	w.done(b)
}

func TestFollowOfABatch(t *testing.T) {
	t.Parallel()
	w, _, n := running(t)
	both := w.batch(n, 0, []string{"one"}, []string{"two"})
	lines, ended := make(chan string), make(chan error, 1)
	go func() {
		ended <- w.s.followActions(context.Background(), []wire.ID{both[0].ID, both[1].ID}, true, func(o api.Output) error {
			if len(o.Data) > 0 {
				lines <- string(o.Data)
			}
			return nil
		})
	}()
	one, two := n.started(t, "one"), n.started(t, "two")
	for _, run := range []*fakeRun{one, two, two, one} { // as it comes, of whichever
		text := run.action.Command[0]
		n.output(run, text)
		if got := <-lines; got != text {
			t.Fatalf("output %q, want %q", got, text)
		}
	}
	n.exit(one, 0)
	n.exit(two, 1)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}

func TestPatienceWithANodeThatIsGone(t *testing.T) {
	t.Parallel()
	t0 := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		name  string
		state string
		ttl   time.Duration
		p     presence
		want  time.Time
	}{
		{"perhaps never arrived", wire.ActionSent, 0, presence{State: wire.StateUnreachable, Since: t0.Add(time.Hour)}, t0.Add(startLate)},
		{"perhaps never arrived, and may be late", wire.ActionSent, time.Hour, presence{State: wire.StateDown}, t0.Add(time.Hour + startLate)},
		{"was running, node is down", wire.ActionRunning, 0, presence{State: wire.StateDown, Since: t0.Add(time.Hour)}, t0.Add(time.Hour + lostAfterDown)},
		{"was running, rcp is cut off", wire.ActionRunning, 0, presence{State: wire.StateUnreachable, Since: t0.Add(time.Hour)}, t0.Add(time.Hour + lostAfterUnreachable)},
		{"was running, nobody noticed yet", wire.ActionRunning, 0, presence{State: wire.StateRunning, Since: t0.Add(-time.Hour), LastSeen: t0.Add(time.Minute)}, t0.Add(time.Minute + lostAfterUnreachable)},
	} {
		a := &store.Action{State: c.state, TTL: c.ttl, CreatedAt: t0, SentAt: t0}
		if got := patience(a, c.p); !got.Equal(c.want) {
			t.Errorf("%s: until %v, want %v", c.name, got, c.want)
		}
	}
}

func TestMuteNodeIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &conversation{party: wire.Party{Role: wire.RoleNode, ID: wire.NewID()}, rt: muteSession{}}
		began := time.Now()
		_, _, err := c.Hello(t.Context())
		if !errors.Is(err, errMute) || time.Since(began) != sessionAnswer {
			t.Fatalf("%v after %v", err, time.Since(began))
		}
		if !c.dead() {
			t.Fatal("its session is used again")
		}
	})
}

// A run may be silent for hours; the path to it may not.
func TestSilentPathOfARunIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var blamed error
		c := &conversation{rt: nopSession{}, blame: func(err error) { blamed = err }}
		ctx, cancel := context.WithCancelCause(t.Context())
		body, node := io.Pipe()
		frames, stop := readFrames(ctx, c, cancel, body)
		defer stop()
		for range 100 { // that it goes on, for a quarter of an hour
			time.Sleep(wire.ActionAlive)
			if _, err := io.WriteString(node, `{"n":0}`+"\n"); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if got := frames.take(); len(got) != 100 || got[99].err != nil || got[99].N != 0 || ctx.Err() != nil || c.dead() {
			t.Fatalf("%d frames, %v", len(got), context.Cause(ctx))
		}
		began := time.Now()
		<-ctx.Done()
		if err := context.Cause(ctx); !errors.Is(err, errMute) || time.Since(began) != runSilence || !c.dead() || !errors.Is(blamed, errMute) {
			t.Fatalf("%v after %v", err, time.Since(began))
		}
	})
}

// The next session goes another way than one that was silent.
func TestSilentWayIsNotTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		one, two, n := b.rcp("one"), b.rcp("two"), b.node("web", wire.StateRunning)
		for _, r := range []wire.ID{one, two} {
			b.up(r)
			b.snapshot(r, "e", nodePeer(n))
		}
		s := b.sessions(t, func(context.Context, wire.ID) (endToEnd, error) { return nopSession{}, nil })
		var by []wire.ID
		for range 2 {
			err := s.Do(t.Context(), wire.Party{Role: wire.RoleNode, ID: n}, func(_ context.Context, c *conversation) error {
				by = append(by, c.via.link)
				_ = c.mute() // what it says is tested elsewhere
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		if len(by) != 2 || by[0] == by[1] {
			t.Fatalf("the sessions went by %v", by)
		}
	})
}

func TestRunOutlivesItsRCPAndSaysThatItWaits(t *testing.T) {
	t.Parallel()
	w, r, n := running(t)
	a := w.act(n, 0, "long")
	run := n.started(t, "long")
	eventually(t, "the gateway knows that it runs", func() bool {
		now, err := w.db.Action(context.Background(), a.ID)
		return err == nil && now.State == wire.ActionRunning
	})
	r.stop()
	eventually(t, "the action says why nothing comes", func() bool {
		now, err := w.db.Action(context.Background(), a.ID)
		return err == nil && now.State == wire.ActionRunning && strings.Contains(now.Reason, "rcp dmz is cut off") && strings.Contains(now.Reason, "awaited until")
	})
	w.rcp("other").hold(n)
	n.output(run, "after")
	eventually(t, "it goes on", func() bool {
		now, err := w.db.Action(context.Background(), a.ID)
		f, ferr := w.db.LastFrame(context.Background(), a.ID)
		return err == nil && ferr == nil && f == 1 && now.Reason == ""
	})
	n.exit(run, 0)
	if a = w.done(a); a.State != wire.ActionSucceeded || run.starts != 1 {
		t.Fatalf("ended as %+v after %d starts", actionView(a), run.starts)
	}
}

// TestActionsOfARevokedNodeEnd: nobody brings their results any more, whatever
// they waited for: the end of a run, the node's return, or the node itself.
func TestActionsOfARevokedNodeEnd(t *testing.T) {
	t.Parallel()
	for name, remove := range map[string]bool{"revoked": false, "removed": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, r, n := running(t)
			absent := w.enrolled(w.node("absent"))
			runs, queued := w.act(n, 0, "long"), w.act(absent, time.Hour, "true")
			n.started(t, "long")
			r.stop()
			eventually(t, "the running one waits for its node", func() bool {
				now, err := w.db.Action(context.Background(), runs.ID)
				return err == nil && strings.Contains(now.Reason, "awaited until")
			})
			for _, n := range []*fakeNode{n, absent} {
				row, err := w.db.Node(context.Background(), n.id.ID())
				if err == nil {
					_, err = w.s.enrolment.revokeNode(context.Background(), row, remove)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			for _, a := range []*store.Action{runs, queued} {
				if v := actionView(w.done(a)); v.State != wire.ActionLost || v.ExitStatus() != api.ExitNotRun || !strings.Contains(v.Reason, "removed or revoked") {
					t.Errorf("ended as %+v", v)
				}
			}
		})
	}
}

func TestActionCancelledWhileItsSessionOpensIsNotSent(t *testing.T) {
	t.Parallel()
	w, r, n := running(t)
	hang := make(chan struct{})
	r.mu.Lock()
	r.hang = hang
	before := r.asked[wire.ConnectAuthority(n.id.ID())]
	r.mu.Unlock()
	w.s.sessions.cut(n.id.ID())
	a := w.act(n, time.Hour, "true")
	eventually(t, "a session is being opened", func() bool { return r.connects(n.id.ID()) > before })
	w.update(func(ctx context.Context, tx *store.Tx) error {
		now, err := tx.Action(ctx, a.ID)
		if err != nil {
			return err
		}
		return tx.CancelAction(ctx, now, api.ActionCodeCancelled)
	})
	close(hang)
	eventually(t, "the runner is done with it", func() bool {
		w.s.actions.mu.Lock()
		defer w.s.actions.mu.Unlock()
		_, waits := w.s.actions.timers[a.ID]
		return !waits && w.s.actions.active[a.ID] == ""
	})
	if a = w.done(a); a.State != wire.ActionCancelled || !a.SentAt.IsZero() {
		t.Errorf("ended as %+v", a)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.runs) != 0 {
		t.Error("the node was asked to run what an operator had cancelled")
	}
}

func TestActionsOfACallerThatWentAwayAreStarted(t *testing.T) {
	t.Parallel()
	w, _, n := running(t)
	absent := w.enrolled(w.node("absent"))
	var actions []*store.Action
	for _, to := range []*fakeNode{absent, n} {
		actions = append(actions, &store.Action{ID: wire.NewID(), Batch: "b", Tenant: store.DefaultTenant, NodeID: to.id.ID(), NodeName: to.name, Command: []string{"true"}})
	}
	w.update(func(ctx context.Context, tx *store.Tx) error { return tx.AddActions(ctx, actions) })
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	copies := []*store.Action{new(*actions[0]), new(*actions[1])}
	if err := w.s.runAction(gone, copies); err != nil {
		t.Error(err)
	}
	n.exit(n.started(t, "true"), 0)
	if a := w.done(actions[1]); a.State != wire.ActionSucceeded {
		t.Errorf("ended as %+v", a)
	}
	if a := w.done(actions[0]); a.Code != api.ActionCodeNotConnected {
		t.Errorf("ended as %+v", a)
	}
}

// TestNodeThatComesWhileItsActionIsLookedAt: after a restart an action is found
// without its node, and before that is written down the node is there.
func TestNodeThatComesWhileItsActionIsLookedAt(t *testing.T) {
	t.Parallel()
	r := newRunner(nil)
	node, other := wire.NewID(), wire.NewID()
	for _, c := range []struct {
		came wire.ID
		due  bool
	}{{node, true}, {other, false}} {
		a := &store.Action{ID: wire.NewID(), NodeID: node, State: wire.ActionRunning}
		r.active[a.ID], r.byNode[node] = node, 1
		r.kick(t.Context(), task{id: c.came})
		if due, _ := r.due(time.Now()); len(due) != 0 {
			t.Fatalf("an action that has a goroutine is given another: %v", due)
		}
		r.rest(a, time.Now().Add(time.Hour))
		due, next := r.due(time.Now())
		if _, ok := due[a.ID]; ok != c.due || next.IsZero() == !c.due {
			t.Errorf("due %v, the next one at %v", due, next)
		}
	}
}
