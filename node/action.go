package node

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"sallyport/internal/atomicfile"
	"sallyport/internal/wire"
	"sallyport/node/proc"
)

// Limits on actions of one instance.
const (
	parallelRuns     = 8
	waitingRuns      = 256
	maxRunOutput     = 16 << 20 // bytes of output that one run keeps
	keepCollected    = time.Hour
	keepUncollected  = 7 * 24 * time.Hour
	keepRuns         = 1000 // whatever their age
	keepTombstones   = 20_000
	commandsVariable = "SALLYPORT_NODE_ALLOW_COMMANDS"
)

// Conditions that the session API tells apart.
var (
	errNoRun     = errors.New("no such action")
	errManyRuns  = errors.New("too many actions wait")
	errStopped   = errors.New("the agent is stopping")
	errForgotten = errors.New("its result was discarded")
)

// actions runs what gateways ask for, each ID once. A run belongs to the node,
// not to the request that began it: it goes on when the gateway is gone, and a
// retry joins it.
type actions struct {
	dir     string
	allow   proc.Allow
	limit   int64
	log     *slog.Logger
	changed func() // the hint "action" may have changed
	slots   chan struct{}

	mu      sync.Mutex
	runs    map[wire.ID]*run
	dead    map[wire.ID]bool // runs whose results are gone: never begun again
	order   []wire.ID        // of dead
	base    context.Context  // of runs; ends with Run
	stopped bool
	tasks   sync.WaitGroup
}

// openActions reads what earlier lives left. A run without a result was cut
// off by a crash: nobody knows how far it came, so it is lost, and not repeated.
func openActions(dir string, allow proc.Allow, log *slog.Logger, changed func()) (*actions, error) {
	a := &actions{
		dir: dir, allow: allow, limit: maxRunOutput, log: log, changed: changed, slots: make(chan struct{}, parallelRuns),
		runs: map[wire.ID]*run{}, dead: map[wire.ID]bool{},
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := a.readTombstones(); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		id, err := wire.ParseID(e.Name())
		if err != nil || !e.IsDir() {
			continue
		}
		r, err := a.reopen(id)
		if err != nil {
			return nil, fmt.Errorf("action %s: %w", id, err)
		}
		if r != nil {
			a.runs[id] = r
		}
	}
	return a, nil
}

func (a *actions) reopen(id wire.ID) (*run, error) {
	r := &run{dir: filepath.Join(a.dir, string(id)), limit: a.limit}
	if err := loadJSON(filepath.Join(r.dir, fileAction), &r.action); err != nil {
		return nil, err
	}
	if r.action.ID != id { // cut off before the request was on disk: nothing ran
		return nil, os.RemoveAll(r.dir)
	}
	if err := r.recount(); err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(r.dir, fileCollected)); err == nil {
		r.collected = true
	}
	var res wire.ActionResult
	if err := loadJSON(filepath.Join(r.dir, fileResult), &res); err != nil {
		return nil, err
	}
	if res.State == "" {
		r.end(wire.ActionResult{State: wire.ActionLost, Reason: "the agent or the host went down while it ran; it is not run again"})
		return r, nil
	}
	r.result, r.ended = &res, res.Ended
	return r, nil
}

// recount reads how many whole frames there are.
func (r *run) recount() error {
	f, err := os.OpenFile(filepath.Join(r.dir, fileFrames), os.O_RDONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	in := bufio.NewReaderSize(f, wire.MaxFrameLine)
	for {
		line, err := in.ReadSlice('\n')
		if err != nil {
			return nil // the rest is half a line
		}
		r.size += int64(len(line))
		r.n++
	}
}

// Run keeps the runs going until ctx ends, and clears away old results.
func (a *actions) Run(ctx context.Context) error {
	a.mu.Lock()
	a.base = ctx
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		a.stopped = true
		a.mu.Unlock()
		a.tasks.Wait()
	}()
	tick := time.NewTicker(10 * time.Minute)
	defer tick.Stop()
	for {
		if err := a.clear(time.Now()); err != nil {
			a.log.Warn("clear away old actions", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// begin returns the run of an action: the one that is known, or a new one. A
// nil run comes with the result of an action that is not run.
func (a *actions) begin(act wire.Action, attach bool) (*run, *wire.ActionResult, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if r := a.runs[act.ID]; r != nil {
		return r, nil, nil
	}
	switch {
	case a.dead[act.ID]:
		return nil, &wire.ActionResult{State: wire.ActionLost, Reason: errForgotten.Error()}, nil
	case attach:
		return nil, nil, errNoRun
	case a.base == nil || a.stopped:
		return nil, nil, errStopped
	}
	refused := func(err error) *wire.ActionResult {
		return &wire.ActionResult{State: wire.ActionRefused, Reason: err.Error()}
	}
	if len(act.Command) == 0 || slices.ContainsFunc(act.Command, func(s string) bool { return strings.ContainsRune(s, 0) }) {
		return nil, refused(errors.New("the command is empty or holds a NUL byte")), nil
	}
	if len(a.allow) == 0 {
		return nil, refused(fmt.Errorf("%w: %s allows no programs", proc.ErrRefused, commandsVariable)), nil
	}
	path, err := a.allow.Resolve(act.Command[0], commandsVariable)
	if errors.Is(err, proc.ErrNotFound) {
		return nil, &wire.ActionResult{State: wire.ActionFailed, ExitCode: 127, Reason: err.Error()}, nil
	}
	if err != nil {
		return nil, refused(err), nil
	}
	if act.TTL <= 0 && len(a.slots) == cap(a.slots) {
		return nil, &wire.ActionResult{State: wire.ActionExpired, Reason: fmt.Sprintf("%d actions run on the node, its limit, and this one must not wait", cap(a.slots))}, nil
	}
	if a.open() >= parallelRuns+waitingRuns {
		return nil, nil, errManyRuns
	}
	r, err := a.create(act)
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		reason := fmt.Sprintf("the program did not start: %v: free some space on the node, then run it again", err)
		return nil, &wire.ActionResult{State: wire.ActionFailed, ExitCode: 126, Reason: reason}, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("action is not begun: %w", err)
	}
	a.runs[act.ID] = r
	var ctx context.Context
	ctx, r.cancel = context.WithCancelCause(a.base)
	arrived := time.Now()
	a.tasks.Go(func() {
		defer r.cancel(nil)
		a.attend(ctx, r, path, arrived)
		a.changed()
	})
	return r, nil, nil
}

// open counts runs that did not end; mu is held.
func (a *actions) open() (n int) {
	for _, r := range a.runs {
		r.mu.Lock()
		if r.result == nil {
			n++
		}
		r.mu.Unlock()
	}
	return n
}

// create puts the idempotency key on disk.
func (a *actions) create(act wire.Action) (*run, error) {
	r := &run{action: act, dir: filepath.Join(a.dir, string(act.ID)), limit: a.limit}
	if err := os.Mkdir(r.dir, 0o700); err != nil {
		return nil, err
	}
	var err error
	if r.frames, err = os.OpenFile(filepath.Join(r.dir, fileFrames), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600); err == nil {
		if err = atomicfile.WriteJSON(filepath.Join(r.dir, fileAction), act); err == nil {
			err = atomicfile.SyncDir(a.dir)
		}
	}
	if err != nil {
		if r.frames != nil {
			_ = r.frames.Close()
		}
		_ = os.RemoveAll(r.dir)
		return nil, err
	}
	return r, nil
}

// attend waits for a free slot, at most the action's TTL, and runs it.
func (a *actions) attend(ctx context.Context, r *run, path string, arrived time.Time) {
	wait := time.NewTimer(max(r.action.TTL-time.Since(arrived), time.Second))
	defer wait.Stop()
	notRun := func() {
		state := wire.ActionLost
		if errors.Is(context.Cause(ctx), errCancelled) {
			state = wire.ActionCancelled
		}
		r.end(wire.ActionResult{State: state, Reason: "not run: " + context.Cause(ctx).Error()})
	}
	select {
	case a.slots <- struct{}{}:
		defer func() { <-a.slots }()
		if ctx.Err() != nil { // both came true, and select takes either
			notRun()
			return
		}
		a.log.Info("action starts", "action", r.action.ID, "program", path)
		r.execute(ctx, path)
		a.log.Info("action ended", "action", r.action.ID, "state", r.result.State, "exit_code", r.result.ExitCode)
	case <-wait.C:
		r.end(wire.ActionResult{State: wire.ActionExpired, Reason: fmt.Sprintf("not run: no free slot within %v", r.action.TTL)})
	case <-ctx.Done():
		notRun()
	}
}

// stop cancels a run; one that has ended is left as it is.
func (a *actions) stop(id wire.ID) error {
	a.mu.Lock()
	r := a.runs[id]
	a.mu.Unlock()
	if r == nil {
		return errNoRun
	}
	if r.cancel != nil {
		r.cancel(errCancelled)
	}
	return nil
}

// collect notes that a gateway has read a run to its end.
func (a *actions) collect(r *run) {
	r.mu.Lock()
	first := !r.collected
	r.collected = true
	r.mu.Unlock()
	if !first {
		return
	}
	// Without it a restart shows the hint once more.
	if err := os.WriteFile(filepath.Join(r.dir, fileCollected), nil, 0o600); err != nil && !errors.Is(err, fs.ErrNotExist) {
		a.log.Debug("note that an action was collected", "action", r.action.ID, "error", err)
	}
	a.changed()
}

// uncollected reports whether a result waits for a gateway.
func (a *actions) uncollected() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, r := range a.runs {
		r.mu.Lock()
		waits := r.result != nil && !r.collected
		r.mu.Unlock()
		if waits {
			return true
		}
	}
	return false
}

// clear removes results that are old, or too many. Their IDs are remembered.
func (a *actions) clear(now time.Time) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var ended []*run
	for _, r := range a.runs {
		r.mu.Lock()
		if r.result != nil {
			ended = append(ended, r)
		}
		r.mu.Unlock()
	}
	slices.SortFunc(ended, func(x, y *run) int { return x.ended.Compare(y.ended) })
	for i, r := range ended {
		keep := keepUncollected
		if r.collected {
			keep = keepCollected
		}
		if now.Sub(r.ended) < keep && len(ended)-i <= keepRuns {
			continue
		}
		if err := a.bury(r.action.ID); err != nil {
			return err
		}
		delete(a.runs, r.action.ID)
		if err := os.RemoveAll(r.dir); err != nil {
			return err
		}
	}
	return nil
}

func (a *actions) tombstones() string { return filepath.Join(a.dir, "discarded") }

func (a *actions) readTombstones() error {
	b, err := os.ReadFile(a.tombstones())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		if id, err := wire.ParseID(strings.TrimSpace(line)); err == nil {
			a.dead[id] = true
			a.order = append(a.order, id)
		}
	}
	return nil
}

// bury remembers an ID before its run is removed; mu is held.
func (a *actions) bury(id wire.ID) error {
	a.dead[id] = true
	a.order = append(a.order, id)
	if len(a.order) > keepTombstones {
		for _, old := range a.order[:len(a.order)-keepTombstones/2] {
			delete(a.dead, old)
		}
		a.order = slices.Clone(a.order[len(a.order)-keepTombstones/2:])
	}
	var b strings.Builder
	for _, id := range a.order {
		b.WriteString(string(id) + "\n")
	}
	return atomicfile.Write(a.tombstones(), []byte(b.String()), 0o600)
}

// knows reports whether an action was begun here.
func (a *actions) knows(id wire.ID) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.runs[id] != nil || a.dead[id]
}
