package policy

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"sallyport/internal/atomicfile"
	"sallyport/internal/wire"
	"sallyport/node/proc"
)

// Limits on what policies may do.
const (
	MaxPolicies      = 1000
	commandTimeout   = time.Minute // of a validate or reload command
	maxCommandOutput = 64 << 10    // of each stream of a check or command
	parallelChecks   = 8
	firstRetry       = 5 * time.Second // of a failed policy; doubles up to lastRetry
	lastRetry        = 10 * time.Minute
	commandsVariable = "SALLYPORT_NODE_ALLOW_POLICY_COMMANDS"
)

// Config of an Engine.
type Config struct {
	Dir      string // what was applied, what it replaced
	Instance string // trust domain: the owner's name in Claims
	Bounds   Bounds
	Commands proc.Allow // SALLYPORT_NODE_ALLOW_POLICY_COMMANDS
	Reach    *Reach     // of targets; nil: they reach nothing
	Claims   *Claims
	// Raise puts an event on disk.
	Raise func(wire.Event) error
	// Changed is told after a status changed without Apply.
	Changed func()
	Log     *slog.Logger
	// Run runs a program of a policy; nil: the real one.
	Run func(ctx context.Context, command []string, limit int) (Output, error)
}

// applied is one policy as it holds on the host.
type applied struct {
	Name   string          `json:"name"`
	Type   string          `json:"type"`
	Digest string          `json:"digest"`
	Spec   json.RawMessage `json:"spec"`
	Paths  []string        `json:"paths,omitempty"` // resolved, of a files policy
	Since  time.Time       `json:"since"`
}

// Engine applies the policies of one instance. Apply may be called before and
// while Run runs.
type Engine struct {
	cfg       Config
	slots     *semaphore.Weighted
	originals *originals

	applying sync.Mutex // held by whoever changes the host

	mu       sync.Mutex
	want     []wire.Policy
	specs    map[string]json.RawMessage
	applied  map[string]applied
	status   map[string]wire.PolicyStatus
	retry    map[string]*backoff
	checks   map[string]*check
	memories map[string]checkMemory
	offers   map[string]offer // applied targets that were asked for
	wake     chan struct{}    // capacity 1: Run looks at checks and retries again
}

type backoff struct {
	delay time.Duration
	at    time.Time
}

// Open reads what the engine applied before, and puts back what a crash left
// half done. Nothing is run until Apply.
func Open(cfg Config) (*Engine, error) {
	e := &Engine{
		cfg: cfg, slots: semaphore.NewWeighted(parallelChecks),
		applied: map[string]applied{}, status: map[string]wire.PolicyStatus{}, retry: map[string]*backoff{},
		checks: map[string]*check{}, memories: map[string]checkMemory{}, offers: map[string]offer{}, wake: make(chan struct{}, 1),
	}
	if e.cfg.Run == nil {
		e.cfg.Run = e.runProgram
	}
	if e.cfg.Reach == nil {
		e.cfg.Reach = &Reach{}
	}
	if e.cfg.Changed == nil {
		e.cfg.Changed = func() {}
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	var err error
	if e.originals, err = openOriginals(filepath.Join(cfg.Dir, "originals")); err != nil {
		return nil, err
	}
	if err := loadJSON(e.appliedFile(), &e.applied); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err := loadJSON(e.memoryFile(), &e.memories); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err := e.rollback(context.Background()); err != nil {
		return nil, fmt.Errorf("put back files of a policy that was being applied: %w", err)
	}
	owned := map[string]bool{}
	for name, a := range e.applied {
		e.status[name] = wire.PolicyStatus{Name: name, Type: a.Type, Digest: a.Digest, State: wire.PolicyApplied, Since: a.Since}
		for _, p := range a.Paths {
			owned[p] = true
		}
	}
	for path := range maps.Clone(e.originals.have) {
		if !owned[path] { // its policy never came through, or has gone
			if err := e.originals.restored(path); err != nil {
				return nil, err
			}
		}
	}
	if err := cfg.Claims.claim(cfg.Instance, slices.Collect(maps.Keys(owned))); err != nil {
		return nil, err
	}
	return e, nil
}

func (e *Engine) appliedFile() string { return filepath.Join(e.cfg.Dir, "applied.json") }
func (e *Engine) memoryFile() string  { return filepath.Join(e.cfg.Dir, "checks.json") }

// Apply makes the host as the policies say and reports each. Whatever fails
// keeps what was applied of it before, and is tried again by Run. Applying the
// same again repairs drift. When ctx ends, the policy under way is put back and
// the rest is left as it is.
func (e *Engine) Apply(ctx context.Context, policies []wire.Policy, specs map[string]json.RawMessage) []wire.PolicyStatus {
	e.applying.Lock()
	defer e.applying.Unlock()
	if err := e.finish(ctx); err != nil {
		e.cfg.Log.Error("files of a failed policy", "error", err) // no other files policy is applied before
	}
	e.mu.Lock()
	e.want, e.specs = slices.Clone(policies), specs
	clear(e.retry)
	e.mu.Unlock()
	wanted := map[string]bool{}
	for _, p := range policies {
		wanted[p.Name] = true
	}
	gone := func() (gone []applied) {
		e.mu.Lock()
		defer e.mu.Unlock()
		for name, a := range e.applied {
			if !wanted[name] {
				gone = append(gone, a)
			}
		}
		slices.SortFunc(gone, func(a, b applied) int { return cmp.Compare(a.Name, b.Name) })
		return gone
	}
	for _, a := range gone() {
		if a.Type == wire.PolicyTarget { // not after the commands of other policies
			e.removeOne(ctx, a)
		}
	}
	conflicts := e.conflicts()
	for _, p := range policies {
		if ctx.Err() != nil {
			return e.Statuses()
		}
		e.applyOne(ctx, p, conflicts[p.Name])
	}
	e.mu.Lock()
	for name := range e.status {
		if _, held := e.applied[name]; !held && !wanted[name] {
			delete(e.status, name)
		}
	}
	e.mu.Unlock()
	for _, a := range gone() {
		if ctx.Err() != nil {
			return e.Statuses()
		}
		e.removeOne(ctx, a)
	}
	e.releaseClaims()
	e.poke()
	return e.Statuses()
}

// conflicts names, for each files policy that shares a path with another, why
// it cannot be applied.
func (e *Engine) conflicts() map[string]error {
	claimed := map[string][]string{}
	for _, p := range e.want {
		var spec wire.FilesSpec
		if p.Type != wire.PolicyFiles || json.Unmarshal(e.specs[p.Digest], &spec) != nil {
			continue
		}
		for _, f := range spec.Files {
			path := f.Path
			if resolved, err := realPath(path); err == nil {
				path = resolved
			}
			if !slices.Contains(claimed[path], p.Name) {
				claimed[path] = append(claimed[path], p.Name)
			}
		}
	}
	errs := map[string]error{}
	for _, path := range slices.Sorted(maps.Keys(claimed)) {
		names := claimed[path]
		if len(names) < 2 {
			continue
		}
		slices.Sort(names)
		for _, name := range names {
			if errs[name] == nil {
				errs[name] = fmt.Errorf("%s is claimed by the policies %s: neither is applied", path, joinAnd(names))
			}
		}
	}
	return errs
}

// applyOne is called with applying held.
func (e *Engine) applyOne(ctx context.Context, p wire.Policy, conflict error) {
	err := conflict
	if err == nil {
		err = e.applyType(ctx, p)
	}
	if err != nil && ctx.Err() != nil {
		return // we are stopping: that is no fault of the policy
	}
	e.report(p, err)
}

func (e *Engine) applyType(ctx context.Context, p wire.Policy) error {
	raw, ok := e.specs[p.Digest]
	if !ok || wire.SpecDigest(raw) != p.Digest {
		return errors.New("its spec is missing or does not match its digest")
	}
	a := applied{Name: p.Name, Type: p.Type, Digest: p.Digest, Spec: raw, Since: time.Now().UTC()}
	e.mu.Lock()
	previous, had := e.applied[p.Name]
	e.mu.Unlock()
	if had && previous.Digest == p.Digest && previous.Type == p.Type {
		a.Since = previous.Since
	}
	switch p.Type {
	case wire.PolicyFiles:
		var spec wire.FilesSpec
		if err := strictJSON(raw, &spec); err != nil {
			return err
		}
		plan, err := e.planFiles(spec)
		if err != nil {
			return err
		}
		a.Paths = plan.paths()
		if err := e.cfg.Claims.claim(e.cfg.Instance, a.Paths); err != nil {
			return err
		}
		return e.applyFiles(ctx, p.Name, plan, previous.Paths, func() error { return e.hold(a) })
	case wire.PolicyCheck:
		var spec wire.CheckSpec
		if err := strictJSON(raw, &spec); err != nil {
			return err
		}
		if err := spec.Validate(); err != nil {
			return err
		}
		if _, err := e.cfg.Commands.Resolve(spec.Command[0], commandsVariable); err != nil {
			return err
		}
		return e.replace(ctx, previous, a)
	case wire.PolicyTarget:
		if err := e.applyTarget(ctx, p, raw); err != nil {
			return err
		}
		return e.replace(ctx, previous, a)
	}
	return fmt.Errorf("policy type %q is not known to this version of the node", wire.Quotable(p.Type))
}

// replace records that a, which has no files, is applied in the place of
// previous, whose files go.
func (e *Engine) replace(ctx context.Context, previous, a applied) error {
	if previous.Type == wire.PolicyFiles {
		if err := e.removeFiles(ctx, a.Name, previous.Paths, reloadOf(previous)); err != nil {
			return err
		}
	}
	return e.hold(a)
}

// hold records that a is applied.
func (e *Engine) hold(a applied) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if previous, ok := e.applied[a.Name]; ok && previous.Digest == a.Digest && previous.Type == a.Type && slices.Equal(previous.Paths, a.Paths) {
		return nil
	}
	next := maps.Clone(e.applied)
	next[a.Name] = a
	if err := atomicfile.WriteJSON(e.appliedFile(), next); err != nil {
		return err
	}
	e.applied = next
	e.dropOfferLocked(a.Name)
	return nil
}

// removeOne takes a policy off the host. When that fails the policy stays in
// the reports, and Run tries again.
func (e *Engine) removeOne(ctx context.Context, a applied) {
	p := wire.Policy{Name: a.Name, Type: a.Type, Digest: a.Digest}
	if a.Type == wire.PolicyFiles {
		if err := e.removeFiles(ctx, a.Name, a.Paths, reloadOf(a)); err != nil {
			e.report(p, fmt.Errorf("remove: %w", err))
			return
		}
	}
	e.mu.Lock()
	next := maps.Clone(e.applied)
	delete(next, a.Name)
	err := atomicfile.WriteJSON(e.appliedFile(), next)
	if err == nil {
		e.applied = next
		e.dropOfferLocked(a.Name)
		delete(e.status, a.Name)
		delete(e.retry, a.Name)
	}
	e.mu.Unlock()
	if err != nil {
		e.report(p, fmt.Errorf("remove: %w", err))
	}
}

func reloadOf(a applied) []string {
	var spec wire.FilesSpec
	if err := json.Unmarshal(a.Spec, &spec); err != nil {
		return nil
	}
	return spec.Reload
}

// ownedByOther reports whether another applied policy has the path.
func (e *Engine) ownedByOther(path, name string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for n, a := range e.applied {
		if n != name && slices.Contains(a.Paths, path) {
			return true
		}
	}
	return false
}

func (e *Engine) releaseClaims() {
	e.mu.Lock()
	kept := map[string]bool{}
	for _, a := range e.applied {
		for _, p := range a.Paths {
			kept[p] = true
		}
	}
	e.mu.Unlock()
	e.cfg.Claims.keep(e.cfg.Instance, kept)
}

// report enters the outcome of one policy, and raises an event when it fails
// and when it is well again.
func (e *Engine) report(p wire.Policy, err error) {
	st := wire.PolicyStatus{Name: p.Name, Type: p.Type, Digest: p.Digest, State: wire.PolicyApplied, Since: time.Now().UTC()}
	e.mu.Lock()
	before := e.status[p.Name]
	if err != nil {
		st.State, st.Error = wire.PolicyFailed, clip(err.Error(), maxError)
		b := e.retry[p.Name]
		if b == nil {
			b = &backoff{delay: firstRetry}
		} else {
			b = &backoff{delay: min(2*b.delay, lastRetry)}
		}
		b.at = time.Now().Add(b.delay/2 + rand.N(b.delay/2))
		e.retry[p.Name] = b
	} else {
		delete(e.retry, p.Name)
		st.Since = e.applied[p.Name].Since
	}
	if before.State == st.State && before.Digest == st.Digest && before.Error == st.Error {
		st.Since = before.Since
	}
	e.status[p.Name] = st
	e.mu.Unlock()
	failed := before.State == wire.PolicyFailed
	if err == nil && !failed || err != nil && failed && before.Digest == st.Digest {
		return
	}
	ev := wire.Event{Severity: wire.SeverityMajor, Application: "sallyport", Object: p.Name, Key: "policy-failed/" + p.Name, Instance: p.Name,
		Text: fmt.Sprintf("policy %s failed: %v", p.Name, err)}
	if err == nil {
		ev.Severity, ev.Text = wire.SeverityNormal, fmt.Sprintf("policy %s is applied", p.Name)
	}
	if rerr := e.cfg.Raise(ev); rerr != nil {
		e.cfg.Log.Error("raise event", "policy", p.Name, "error", rerr)
	}
}

const maxError = 1 << 10

// Statuses of all policies, by name.
func (e *Engine) Statuses() []wire.PolicyStatus {
	e.mu.Lock()
	defer e.mu.Unlock()
	list := slices.SortedFunc(maps.Values(e.status), func(a, b wire.PolicyStatus) int { return cmp.Compare(a.Name, b.Name) })
	wire.FitStatuses(list)
	return list
}

func (e *Engine) poke() {
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

// Run runs the checks and retries what failed, until ctx ends.
func (e *Engine) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		e.startChecks(ctx, &wg)
		timer := time.NewTimer(e.nextRetry())
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-e.wake:
			timer.Stop()
		case <-timer.C:
			if e.retryDue(ctx) {
				e.cfg.Changed()
			}
		}
	}
}

func (e *Engine) nextRetry() time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	wait := time.Hour
	for _, b := range e.retry {
		wait = min(wait, max(time.Until(b.at), 0))
	}
	return wait
}

// retryDue tries failed policies whose time has come.
func (e *Engine) retryDue(ctx context.Context) (tried bool) {
	e.applying.Lock()
	defer e.applying.Unlock()
	e.mu.Lock()
	due := map[string]bool{}
	for name, b := range e.retry {
		if !time.Now().Before(b.at) {
			due[name] = true
		}
	}
	want, held := slices.Clone(e.want), e.applied
	e.mu.Unlock()
	conflicts := e.conflicts()
	for _, p := range want {
		if due[p.Name] {
			e.applyOne(ctx, p, conflicts[p.Name])
			delete(due, p.Name)
			tried = true
		}
	}
	for name := range due { // what is left could not be removed
		if a, ok := held[name]; ok {
			e.removeOne(ctx, a)
			tried = true
		}
	}
	e.releaseClaims()
	return tried
}

// runProgram resolves and runs a program of a policy.
func (e *Engine) runProgram(ctx context.Context, command []string, limit int) (Output, error) {
	path, err := e.cfg.Commands.Resolve(command[0], commandsVariable)
	if err != nil {
		return Output{}, err
	}
	stdout, stderr := &proc.Buffer{Limit: limit}, &proc.Buffer{Limit: limit}
	exit, err := proc.Run(ctx, proc.Command{Path: path, Args: command, Stdout: stdout, Stderr: stderr})
	return Output{Exit: exit, Stdout: stdout.String(), Stderr: stderr.String()}, err
}

// strictJSON refuses keys that this version does not know: they would be
// ignored silently.
func strictJSON(raw json.RawMessage, v any) error {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("spec: %w", err)
	}
	return nil
}
