package policy

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"encoding/json"

	"sallyport/internal/atomicfile"
	"sallyport/internal/wire"
)

// CheckState is the outcome of a check, as plugins exit with it.
type CheckState int

// The states of the Nagios plugin contract.
const (
	CheckOK CheckState = iota
	CheckWarning
	CheckCritical
	CheckUnknown
)

func (s CheckState) String() string {
	return [...]string{"OK", "WARNING", "CRITICAL", "UNKNOWN"}[s]
}

// severity of the event that a change to s raises.
func (s CheckState) severity() wire.Severity {
	return [...]wire.Severity{wire.SeverityNormal, wire.SeverityWarning, wire.SeverityCritical, wire.SeverityMinor}[s]
}

// CheckResult is the last outcome of one check.
type CheckResult struct {
	Policy   string
	State    CheckState
	Text     string // first line of the output
	Perf     []Perf
	At       time.Time
	Duration time.Duration
}

// checkMemory outlives a restart, so that one does not repeat events.
type checkMemory struct {
	State CheckState `json:"state"`
	Since time.Time  `json:"since"`
}

// check runs one check policy.
type check struct {
	e      *Engine
	name   string
	digest string
	spec   wire.CheckSpec
	cancel context.CancelFunc
	done   chan struct{}
	last   CheckResult // guarded by e.mu
}

// startChecks makes the running checks those of the applied policies.
func (e *Engine) startChecks(ctx context.Context, wg *sync.WaitGroup) {
	e.mu.Lock()
	var stop []*check
	for name, c := range e.checks {
		if a, ok := e.applied[name]; !ok || a.Type != wire.PolicyCheck || a.Digest != c.digest {
			stop = append(stop, c)
			delete(e.checks, name)
		}
	}
	e.mu.Unlock()
	for _, c := range stop {
		c.cancel()
		<-c.done
	}
	e.mu.Lock()
	var start []*check
	for name, a := range e.applied {
		if a.Type != wire.PolicyCheck || e.checks[name] != nil {
			continue
		}
		c := &check{e: e, name: name, digest: a.Digest, done: make(chan struct{})}
		if err := json.Unmarshal(a.Spec, &c.spec); err != nil {
			e.cfg.Log.Error("spec of an applied check", "policy", name, "error", err)
			continue
		}
		e.checks[name] = c
		start = append(start, c)
	}
	var orphans []string
	for name := range e.memories {
		if e.checks[name] == nil {
			orphans = append(orphans, name)
		}
	}
	e.mu.Unlock()
	for _, c := range start {
		var cctx context.Context
		cctx, c.cancel = context.WithCancel(ctx)
		wg.Go(func() {
			defer close(c.done)
			defer c.cancel()
			c.run(cctx)
		})
	}
	for _, name := range orphans {
		e.closeCheck(name)
	}
}

// closeCheck ends the story of a check whose policy went: an open problem that
// nobody looks at any more is closed.
func (e *Engine) closeCheck(name string) {
	e.mu.Lock()
	m := e.memories[name]
	e.mu.Unlock()
	if m.State != CheckOK {
		if err := e.cfg.Raise(checkEvent(name, CheckOK, "the check was removed")); err != nil {
			e.cfg.Log.Error("raise event", "policy", name, "error", err)
			return
		}
	}
	e.remember(name, nil)
}

func checkEvent(name string, state CheckState, text string) wire.Event {
	return wire.Event{Severity: state.severity(), Application: "check", Object: name, Key: "check/" + name, Instance: name, Text: text}
}

// remember keeps a check's state on disk; nil forgets it.
func (e *Engine) remember(name string, m *checkMemory) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if m == nil {
		delete(e.memories, name)
	} else {
		e.memories[name] = *m
	}
	if err := atomicfile.WriteJSON(e.memoryFile(), e.memories); err != nil {
		e.cfg.Log.Error("remember the state of a check", "policy", name, "error", err) // a restart repeats one event
	}
}

// run runs the check every interval, a little jittered, so that the checks of
// a host do not start in step.
func (c *check) run(ctx context.Context) {
	interval := c.spec.Interval.Std()
	if interval == 0 {
		interval = wire.DefaultCheckInterval.Std()
	}
	wait := rand.N(min(interval, time.Second))
	for {
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		if err := c.e.slots.Acquire(ctx, 1); err != nil {
			return
		}
		started := time.Now()
		r := c.once(ctx)
		c.e.slots.Release(1)
		if ctx.Err() != nil {
			return
		}
		c.enter(r)
		next := interval - interval/20 + rand.N(interval/10+1)
		wait = max(next-time.Since(started), 0)
	}
}

// once runs the plugin and reads its outcome.
func (c *check) once(ctx context.Context) CheckResult {
	timeout := c.spec.Timeout.Std()
	if timeout == 0 {
		timeout = wire.DefaultCheckTimeout.Std()
	}
	r := CheckResult{Policy: c.name, State: CheckUnknown, At: time.Now().UTC()}
	tctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	out, err := c.e.cfg.Run(tctx, c.spec.Command, maxCommandOutput)
	r.Duration = time.Since(r.At)
	text, perf := splitOutput(out.Stdout)
	switch {
	case err != nil:
		r.Text = fmt.Sprintf("cannot run the check: %v", err)
		return r
	case errors.Is(tctx.Err(), context.DeadlineExceeded):
		r.Text = fmt.Sprintf("the check did not end within %v", timeout)
		return r
	case out.Exit.Signal != 0:
		r.Text = fmt.Sprintf("the check was ended by signal %d: %s", out.Exit.Signal, firstOf(text, lastText(out.Stderr), "no output"))
		return r
	case out.Exit.Code > int(CheckUnknown):
		r.Text = fmt.Sprintf("the check ended with status %d, outside of the plugin contract: %s", out.Exit.Code, firstOf(text, lastText(out.Stderr), "no output"))
		return r
	}
	r.State = CheckState(out.Exit.Code)
	r.Text = firstOf(text, lastText(out.Stderr), "the check said nothing")
	r.Perf, _ = ParsePerfdata(perf)
	return r
}

// enter keeps a result and raises an event when the state changed. The event
// is on disk before the state: after a crash in between it comes twice with one
// key, and is one event to an operator.
func (c *check) enter(r CheckResult) {
	e := c.e
	e.mu.Lock()
	c.last = r
	m, known := e.memories[c.name]
	e.mu.Unlock()
	if known && m.State == r.State {
		return
	}
	if known || r.State != CheckOK {
		if err := e.cfg.Raise(checkEvent(c.name, r.State, r.State.String()+": "+r.Text)); err != nil {
			e.cfg.Log.Error("raise event", "policy", c.name, "error", err)
			return // the next run tries again
		}
	}
	e.remember(c.name, &checkMemory{State: r.State, Since: r.At})
}

// Checks are the last results; a check that did not run yet is left out.
func (e *Engine) Checks() []CheckResult {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []CheckResult
	for _, c := range e.checks {
		if !c.last.At.IsZero() {
			out = append(out, c.last)
		}
	}
	return out
}

// splitOutput takes a plugin's output apart: the first line, and performance
// data of all lines. Format: TEXT | PERF, then LONG TEXT lines, then one with
// "|" after which everything is performance data.
func splitOutput(out string) (text, perf string) {
	first, rest, _ := strings.Cut(out, "\n")
	text, perf, _ = strings.Cut(first, "|")
	if _, more, ok := strings.Cut(rest, "|"); ok {
		perf += " " + more
	}
	return clip(strings.TrimSpace(text), maxCheckText), strings.TrimSpace(perf)
}

const maxCheckText = 4 << 10

// clip shortens s to n bytes at most, and makes it valid UTF-8.
func clip(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// lastText is the last line of s that is not empty.
func lastText(s string) string {
	s = strings.TrimSpace(s)
	return clip(s[strings.LastIndexByte(s, '\n')+1:], maxCheckText)
}

func firstOf(texts ...string) string {
	for _, t := range texts {
		if t != "" {
			return t
		}
	}
	return ""
}

// joinAnd writes "a, b and c".
func joinAnd(names []string) string {
	if len(names) < 2 {
		return strings.Join(names, "")
	}
	return strings.Join(names[:len(names)-1], ", ") + " and " + names[len(names)-1]
}
